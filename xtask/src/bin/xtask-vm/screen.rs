//! What a person sees, on stderr: a line for each phase, a status line on a terminal, plain heartbeats elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use xtask::cli::{Color, Voice};
use xtask::limits;
use xtask::report::{PhaseStatus, human_seconds};

/// To stderr, if it is still there: a terminal that was closed must not keep a run from tidying up, and `eprintln!` panics.
macro_rules! say {
    ($($words:tt)*) => { drop(writeln!(std::io::stderr(), $($words)*)) };
}

/// The screen of one task.
pub(crate) struct Screen {
    voice: Voice,
    coloured: bool,
    terminal: bool,
    status: Option<Status>,
}

/// What runs now.
struct Status {
    title: String,
    started: Instant,
    last_time: Option<f64>,
    last_heartbeat: Instant,
    bar: Option<ProgressBar>,
}

impl Screen {
    pub(crate) fn new(voice: Voice) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let coloured = match voice.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        Self { voice, coloured, terminal, status: None }
    }

    /// Something begins that may take over two seconds.
    pub(crate) fn start(&mut self, title: &str, last_time: Option<f64>) {
        let now = Instant::now();
        let usual =
            last_time.map_or(String::new(), |seconds| format!(" (last time {})", human_seconds(seconds)));
        let bar = (self.terminal && !self.voice.quiet).then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}").expect("a constant template");
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.set_message(format!("{title:<10}{usual}"));
            bar.enable_steady_tick(limits::SPINNER);
            bar
        });
        if bar.is_none() && !self.voice.quiet {
            say!("{title:<10} …{usual}");
        }
        self.status =
            Some(Status { title: title.to_owned(), started: now, last_time, last_heartbeat: now, bar });
    }

    /// It is alive; `what` is the latest sign of it.
    pub(crate) fn alive(&mut self, what: &str) {
        let (quiet, width) = (self.voice.quiet, if self.terminal { 70 } else { 100 });
        let Some(status) = &mut self.status else { return };
        let elapsed = status.started.elapsed();
        let usual = status
            .last_time
            .map_or(String::new(), |seconds| format!(" of {} last time", human_seconds(seconds)));
        let what: String = what.chars().take(width).collect();
        let line = format!("{:<10} {}{usual}  {what}", status.title, human_seconds(elapsed.as_secs_f64()));
        match &status.bar {
            Some(bar) => bar.set_message(line),
            None if status.last_heartbeat.elapsed() >= limits::HEARTBEAT && !quiet => {
                say!("{line}");
                status.last_heartbeat = Instant::now();
            }
            None => {}
        }
    }

    /// A child writes to the terminal itself for a while: no status line in its way.
    pub(crate) fn pause(&mut self) {
        if let Some(bar) = self.status.as_mut().and_then(|status| status.bar.take()) {
            bar.finish_and_clear();
        }
    }

    /// It ended.
    pub(crate) fn end(&mut self, outcome: PhaseStatus, detail: &str) {
        let Some(status) = self.status.take() else { return };
        if let Some(bar) = status.bar {
            bar.finish_and_clear();
        }
        if self.voice.quiet && outcome == PhaseStatus::Passed {
            return;
        }
        let (word, colour) = match outcome {
            PhaseStatus::Passed => ("ok", "32"),
            PhaseStatus::Failed => ("FAILED", "31"),
            PhaseStatus::Skipped => ("skipped", "33"),
        };
        let seconds = seconds_column(status.started.elapsed());
        say!("{:<10} {} {seconds}  {detail}", status.title, self.paint(&format!("{word:<7}"), colour));
    }

    /// A line beside the phases.
    pub(crate) fn note(&self, text: &str) {
        if !self.voice.quiet {
            self.line(text);
        }
    }

    /// A line that even `--quiet` shows.
    pub(crate) fn line(&self, text: &str) {
        match self.status.as_ref().and_then(|status| status.bar.as_ref()) {
            Some(bar) => bar.suspend(|| say!("{text}")),
            None => say!("{text}"),
        }
    }

    /// A line that only `--verbose` shows.
    pub(crate) fn detail(&self, text: &str) {
        if self.voice.verbose {
            self.line(text);
        }
    }

    /// The last line: green or red.
    pub(crate) fn verdict(&self, text: &str, good: bool) {
        say!("{}", self.paint(text, if good { "1;32" } else { "1;31" }));
    }

    fn paint(&self, text: &str, colour: &str) -> String {
        if self.coloured { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn seconds_column(elapsed: Duration) -> String {
    format!("{:>8}", human_seconds(elapsed.as_secs_f64()))
}
