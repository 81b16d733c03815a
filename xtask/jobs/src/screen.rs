//! What a person sees, on stderr: a line for each phase, a status line on a terminal, plain heartbeats elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use xtask_core::cli::{Color, Verbosity};
use xtask_core::format::human_seconds;
use xtask_core::limits;
use xtask_core::report::PhaseStatus;

use crate::usual::Usual;

/// To stderr, if it is still there: a terminal that was closed must not keep a run from tidying up, and `eprintln!` panics.
macro_rules! write_line {
    ($($words:tt)*) => { drop(writeln!(std::io::stderr(), $($words)*)) };
}

/// The screen of one task.
#[derive(Debug)]
pub(crate) struct Screen {
    verbosity: Verbosity,
    coloured: bool,
    terminal: bool,
    status: Option<PhaseLine>,
}

/// What runs now.
#[derive(Debug)]
struct PhaseLine {
    title: String,
    started: Instant,
    usual: Option<Usual>,
    last_heartbeat: Instant,
    signs: Signs,
    bar: Option<ProgressBar>,
}

/// The signs of life of what runs now.
#[derive(Debug)]
struct Signs {
    last: String,
    since: Instant,
    longest: Duration,
    is_reported: bool,
}

impl Signs {
    /// Takes the latest sign, which may be the one of before; a silence that is longer than this was ever, the first time.
    fn take(&mut self, what: &str, usual: Option<Usual>) -> Option<Duration> {
        let silent = self.since.elapsed();
        self.longest = self.longest.max(silent);
        if what != self.last {
            (self.last, self.since, self.is_reported) = (what.to_owned(), Instant::now(), false);
            return None;
        }
        let stuck = !self.is_reported && usual.is_some_and(|usual| is_stuck(silent, usual));
        self.is_reported |= stuck;
        stuck.then_some(silent)
    }
}

/// Much longer than the longest silence of the runs that passed; a little one says nothing.
fn is_stuck(silent: Duration, usual: Usual) -> bool {
    silent > limits::SILENCE && silent.as_secs_f64() > 3.0 * usual.silent
}

impl Screen {
    pub(crate) fn new(verbosity: Verbosity) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let coloured = match verbosity.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        Self { verbosity, coloured, terminal, status: None }
    }

    /// Something begins that may take over two seconds.
    pub(crate) fn start(&mut self, title: &str, usual: Option<Usual>) {
        let now = Instant::now();
        let expected = usual.map_or(String::new(), |usual| format!(" ({usual})"));
        let bar = (self.terminal && !self.verbosity.quiet).then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}").expect("a constant template");
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.set_message(format!("{title:<10}{expected}"));
            bar.enable_steady_tick(limits::SPINNER);
            bar
        });
        if bar.is_none() && !self.verbosity.quiet {
            write_line!("{title:<10} …{expected}");
        }
        let signs = Signs { last: String::new(), since: now, longest: Duration::ZERO, is_reported: false };
        let title = title.to_owned();
        self.status = Some(PhaseLine { title, started: now, usual, last_heartbeat: now, signs, bar });
    }

    /// Something else is usual of it than was thought when it began.
    pub(crate) fn expect(&mut self, usual: Option<Usual>) {
        if let Some(status) = &mut self.status {
            status.usual = usual;
        }
    }

    /// It is alive; `what` is the latest sign of it.
    pub(crate) fn alive(&mut self, what: &str) {
        let (quiet, width) = (self.verbosity.quiet, if self.terminal { 70 } else { 100 });
        let Some(status) = &mut self.status else { return };
        let stuck = status.signs.take(what, status.usual);
        let elapsed = status.started.elapsed().as_secs_f64();
        let rest = status.usual.map_or(String::new(), |usual| format!(", {}", usual.rest(elapsed)));
        let what: String = what.chars().take(width).collect();
        let line = format!("{:<10} {}{rest}  {what}", status.title, human_seconds(elapsed));
        if let Some(silent) = stuck {
            let longest = status.usual.map_or(0.0, |usual| usual.silent);
            let text = format!(
                "{} may be stuck: no output for {}, and {} was the longest pause of earlier runs; the last output is above, \
                 -v shows all of them, and the run's console.log keeps them",
                status.title,
                human_seconds(silent.as_secs_f64()),
                human_seconds(longest)
            );
            match &status.bar {
                Some(bar) => bar.suspend(|| write_line!("{line}\n{text}")),
                None => write_line!("{line}\n{text}"),
            }
        }
        match &status.bar {
            Some(bar) => bar.set_message(line),
            None if status.last_heartbeat.elapsed() >= limits::HEARTBEAT && !quiet => {
                write_line!("{line}");
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

    /// The longest that it has given no sign of life.
    pub(crate) fn longest_silence(&self) -> Duration {
        self.status.as_ref().map_or(Duration::ZERO, |status| status.signs.longest)
    }

    /// It ended.
    pub(crate) fn end(&mut self, outcome: PhaseStatus, detail: &str) {
        let Some(status) = self.status.take() else { return };
        if let Some(bar) = status.bar {
            bar.finish_and_clear();
        }
        if self.verbosity.quiet && outcome == PhaseStatus::Passed {
            return;
        }
        let (word, colour) = match outcome {
            PhaseStatus::Passed => ("ok", "32"),
            PhaseStatus::Failed => ("FAILED", "31"),
            PhaseStatus::Skipped => ("skipped", "33"),
        };
        let seconds = seconds_column(status.started.elapsed());
        write_line!("{:<10} {} {seconds}  {detail}", status.title, self.paint(&format!("{word:<7}"), colour));
    }

    /// A line beside the phases.
    pub(crate) fn note(&self, text: &str) {
        if !self.verbosity.quiet {
            self.line(text);
        }
    }

    /// A line that even `--quiet` shows.
    pub(crate) fn line(&self, text: &str) {
        match self.status.as_ref().and_then(|status| status.bar.as_ref()) {
            Some(bar) => bar.suspend(|| write_line!("{text}")),
            None => write_line!("{text}"),
        }
    }

    /// A line that only `--verbose` shows.
    pub(crate) fn detail(&self, text: &str) {
        if self.verbosity.verbose {
            self.line(text);
        }
    }

    /// The last line: green or red.
    pub(crate) fn verdict(&self, text: &str, good: bool) {
        write_line!("{}", self.paint(text, if good { "1;32" } else { "1;31" }));
    }

    fn paint(&self, text: &str, colour: &str) -> String {
        if self.coloured { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn seconds_column(elapsed: Duration) -> String {
    format!("{:>8}", human_seconds(elapsed.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_is_told_once_and_only_where_it_is_unusual() {
        let usual = |silent| Usual { median: 60.0, spread: (50.0, 70.0), silent };
        let table = [(20, 1.0, false), (61, 1.0, true), (61, 25.0, false), (90, 25.0, true)];
        for (seconds, longest, stuck) in table {
            assert_eq!(
                is_stuck(std::time::Duration::from_secs(seconds), usual(longest)),
                stuck,
                "{seconds} s after {longest} s"
            );
        }
        let since = Instant::now().checked_sub(std::time::Duration::from_secs(100)).unwrap();
        let mut signs = Signs { last: "line".to_owned(), since, longest: Duration::ZERO, is_reported: false };
        assert_eq!(signs.take("line", None), None, "nothing is known of what is usual");
        assert!(signs.take("line", Some(usual(5.0))).is_some());
        assert_eq!(signs.take("line", Some(usual(5.0))), None);
        assert_eq!(signs.take("another", Some(usual(5.0))), None);
        assert!(signs.longest >= std::time::Duration::from_secs(100));
    }
}
