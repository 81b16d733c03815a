//! The user interface of a job: its output on stderr, and its Ctrl-C. The output has a line for each phase. While a
//! phase runs, a terminal shows a status line, and any other output gets plain heartbeats.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use xtask_core::cache::Cache;
use xtask_core::cli::{ColorChoice, Verbosity};
use xtask_core::error::Failure;
use xtask_core::format::human_seconds;
use xtask_core::limits;
use xtask_core::message;
use xtask_core::output::{clean, plain, write_message};
use xtask_core::report::PhaseStatus;

use crate::background::Background;
use crate::history::{History, Usual};
use crate::interrupt::Interrupt;
use crate::lines::{DETAIL, LOG_WIDTH, cut, width, wrapped};

/// The screen and the Ctrl-C of a command. Clones share both. The screen is locked for one line at a time, and never
/// while a caller's closure runs.
#[derive(Debug, Clone)]
pub struct Ui {
    verbosity: Verbosity,
    coloured: bool,
    terminal: bool,
    /// The width of the terminal in columns; `None` without a terminal.
    width: Option<usize>,
    status: Arc<Mutex<Option<PhaseLine>>>,
    interrupt: Interrupt,
    background: Option<Arc<Background>>,
    /// The factor for the limits of commands and servers on this host.
    timeout_scale: f64,
}

/// A step that may take over two seconds and is not a phase of a smoke.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The name of the history file for the step's durations.
    pub kind: &'a str,
    /// The name that distinguishes the step from other steps of the same kind.
    pub what: &'a str,
    /// The first word of the step's line on the screen.
    pub title: &'a str,
}

/// The phase or step that runs now.
#[derive(Debug)]
struct PhaseLine {
    title: String,
    started: Instant,
    usual: Option<Usual>,
    /// The time of the next plain line, if there is no terminal.
    next_heartbeat: Instant,
    signs: Signs,
    bar: Option<ProgressBar>,
}

/// The signs of life of the phase or step that runs now.
#[derive(Debug)]
struct Signs {
    last: String,
    since: Instant,
    longest: Duration,
    is_reported: bool,
}

impl Signs {
    /// Records the latest sign, which may equal the previous one. Returns the duration of the silence when it first
    /// becomes unusually long.
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

/// Returns whether a silence is much longer than the longest silence of the earlier runs. A slightly longer silence is
/// no sign of a fault.
fn is_stuck(silent: Duration, usual: Usual) -> bool {
    silent > limits::SILENCE && silent.as_secs_f64() > 3.0 * usual.silent
}

impl Ui {
    /// Makes the screen of this command, and listens for Ctrl-C from now on.
    pub fn install(verbosity: Verbosity) -> Result<Self> {
        Ok(Self::new(verbosity, Interrupt::install()?))
    }

    /// Makes a screen that shows only the output of `--quiet` and cannot be interrupted.
    pub fn quiet() -> Self {
        Self::new(Verbosity::silent(), Interrupt::default())
    }

    fn new(verbosity: Verbosity, interrupt: Interrupt) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let coloured = match verbosity.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        Self {
            verbosity,
            coloured,
            terminal,
            width: width().filter(|_| terminal),
            status: Arc::default(),
            interrupt,
            background: None,
            timeout_scale: 1.0,
        }
    }

    /// Returns the same screen with `--timeout-scale`.
    pub fn with_timeout_scale(self, timeout_scale: f64) -> Self {
        Self { timeout_scale, ..self }
    }

    /// Returns a limit of a command or a server on this host, multiplied by `--timeout-scale`.
    pub fn scaled(&self, limit: Duration) -> Duration {
        limit.mul_f64(self.timeout_scale)
    }

    /// Returns the same screen for work that neither Ctrl-C nor a cancelled job must end, such as a teardown.
    pub fn uninterruptible(&self) -> Self {
        Self { interrupt: Interrupt::default(), background: None, ..self.clone() }
    }

    /// Returns the same screen for a background job. Its signs of life are dropped until the job is shown.
    pub fn behind(&self, background: &Arc<Background>) -> Self {
        Self { background: Some(Arc::clone(background)), ..self.clone() }
    }

    /// Locks the status. The status is usable even if a thread panicked while it held the lock.
    fn status(&self) -> MutexGuard<'_, Option<PhaseLine>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails with [`xtask_core::error::Kind::Interrupted`] after Ctrl-C, or if the job was cancelled.
    pub fn check(&self) -> Result<()> {
        self.interrupt.check()?;
        match &self.background {
            Some(job) if job.is_cancelled() => Err(Failure::interrupted().into()),
            _ => Ok(()),
        }
    }

    /// Shows that a phase or step starts; `usual` is its usual duration.
    pub fn start(&self, title: &str, usual: Option<Usual>) {
        let now = Instant::now();
        let expected = usual.map_or(String::new(), |usual| format!(" ({usual})"));
        let bar = (self.terminal && !self.verbosity.quiet).then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}").expect("a constant template");
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.set_message(format!("{title:<10}{expected}"));
            bar.enable_steady_tick(limits::SPINNER);
            bar
        });
        let signs = Signs { last: String::new(), since: now, longest: Duration::ZERO, is_reported: false };
        let title = title.to_owned();
        let next_heartbeat = now + limits::FIRST_HEARTBEAT;
        *self.status() = Some(PhaseLine { title, started: now, usual, next_heartbeat, signs, bar });
    }

    /// Replaces the usual duration of the phase or step that runs now.
    pub fn expect(&self, usual: Option<Usual>) {
        if let Some(status) = &mut *self.status() {
            status.usual = usual;
        }
    }

    /// Shows the latest sign of life of the phase or step that runs now.
    ///
    /// # Errors
    /// Returns the error of [`Ui::check`] after an interrupt.
    pub fn tick(&self, what: &str) -> Result<()> {
        self.check()?;
        if self.background.as_ref().is_some_and(|job| !job.is_shown()) {
            return Ok(());
        }
        let quiet = self.verbosity.quiet;
        let mut status = self.status();
        let Some(status) = &mut *status else { return Ok(()) };
        let stuck = status.signs.take(what, status.usual);
        let elapsed = status.started.elapsed().as_secs_f64();
        let rest = status.usual.map_or(String::new(), |usual| format!(", {}", usual.rest(elapsed)));
        let start = format!("{:<10} {}{rest}  ", status.title, human_seconds(elapsed));
        // A bar begins with a spinner.
        let room = self.width.map_or(LOG_WIDTH, |width| width.saturating_sub(2)).saturating_sub(start.len());
        let line = start + &cut(&clean(what).replace('\n', " "), room);
        if let Some(silent) = stuck {
            let longest = status.usual.map_or(0.0, |usual| usual.silent);
            let text = format!(
                "{} may be stuck: no output for {}, and {} was the longest pause of earlier runs; the last output is above, \
                 -v shows all output, and the run's console.log keeps it",
                status.title,
                human_seconds(silent.as_secs_f64()),
                human_seconds(longest)
            );
            match &status.bar {
                Some(bar) => bar.suspend(|| message!("{line}\n  {text}")),
                None => message!("{line}\n  {text}"),
            }
        }
        match &status.bar {
            Some(bar) => bar.set_message(line),
            None if Instant::now() >= status.next_heartbeat && !quiet => {
                message!("{line}");
                status.next_heartbeat = Instant::now() + limits::HEARTBEAT;
            }
            None => {}
        }
        Ok(())
    }

    /// Removes the status line while a child writes to the terminal itself.
    pub fn pause(&self) {
        if let Some(bar) = self.status().as_mut().and_then(|status| status.bar.take()) {
            bar.finish_and_clear();
        }
    }

    /// Returns the longest time without a new sign of life of the phase or step that runs now.
    pub fn longest_silence(&self) -> Duration {
        self.status().as_ref().map_or(Duration::ZERO, |status| status.signs.longest)
    }

    /// Shows how the phase or step ended.
    pub fn end(&self, outcome: PhaseStatus, detail: &str) {
        let Some(status) = self.status().take() else { return };
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
        let (word, seconds) = (format!("{word:<7}"), human_seconds(status.started.elapsed().as_secs_f64()));
        let word = self.paint(&word, colour);
        let detail = wrapped(&plain(detail), self.width, DETAIL);
        write_message(&format!("{:<10} {word} {seconds:>8}  {detail}\n", status.title));
    }

    /// Prints a line, unless the command is `--quiet`.
    pub fn note(&self, text: &str) {
        if !self.verbosity.quiet {
            self.line(text);
        }
    }

    /// Prints a line that even `--quiet` shows.
    pub fn line(&self, text: &str) {
        let text = text.lines().map(|line| wrapped(line, self.width, 0)).collect::<Vec<_>>().join("\n");
        match self.status().as_ref().and_then(|status| status.bar.as_ref()) {
            Some(bar) => bar.suspend(|| message!("{text}")),
            None => message!("{text}"),
        }
    }

    /// Prints a line that only `--verbose` shows.
    pub fn detail(&self, text: &str) {
        if self.verbosity.verbose {
            self.line(text);
        }
    }

    /// Prints the last line, green or red.
    pub fn verdict(&self, text: &str, good: bool) {
        let text = wrapped(&plain(text), self.width, 0);
        write_message(&(self.paint(&text, if good { "1;32" } else { "1;31" }) + "\n"));
    }

    fn paint(&self, text: &str, colour: &str) -> String {
        if self.coloured { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Runs `body` as a step: shows its title, its usual duration and its outcome, and records its duration if it
    /// succeeds. The text that `body` returns ends the step's line. A step that ends at once is not recorded, because
    /// it had nothing to do, such as the boot of a machine that already runs.
    pub fn step<T>(
        &self,
        cache: &Cache,
        step: Step<'_>,
        body: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<T> {
        let mut history = History::load(cache, step.kind);
        self.start(step.title, history.of(step.what));
        let started = Instant::now();
        let outcome = body();
        let (elapsed, silent) = (started.elapsed(), self.longest_silence());
        let (value, detail) =
            outcome.inspect_err(|error| self.end(PhaseStatus::Failed, &error.to_string()))?;
        self.end(PhaseStatus::Passed, &detail);
        if elapsed >= limits::CACHE_HIT {
            history.note(step.what, elapsed.as_secs_f64(), silent);
            if let Err(error) = history.keep(cache) {
                self.note(&format!("cannot record how long it took: {error:#}"));
            }
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_core::error::Kind;

    #[test]
    fn a_job_in_the_background_ends_when_it_is_cancelled() {
        let ui = Ui::quiet();
        let job = Arc::default();
        let behind = ui.behind(&job);
        behind.tick("a sign that is not shown").unwrap();
        job.show();
        behind.tick("a sign that is shown").unwrap();
        job.cancel();
        assert!(Kind::Interrupted.is(&behind.tick("the last one").unwrap_err()));
        behind.uninterruptible().tick("the job tidies up").unwrap();
        ui.tick("the job on the screen goes on").unwrap();
    }

    #[test]
    fn a_limit_on_this_host_scales_with_the_flag() {
        let ui = Ui::quiet().with_timeout_scale(3.0);
        assert_eq!(ui.clone().uninterruptible().scaled(limits::PROBE), limits::PROBE * 3);
        let limit = Duration::from_millis(200);
        let arguments = ["0.4".into()];
        let sleep = |ui: &Ui| crate::child::read("/bin/sleep".as_ref(), &arguments, limit, ui);
        assert!(sleep(&Ui::quiet()).unwrap_err().to_string().contains("did not end within"));
        sleep(&ui.with_timeout_scale(100.0)).unwrap();
    }

    #[test]
    fn a_step_may_use_the_screen_and_only_its_success_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let ui = Ui::quiet();
        let step = Step { kind: "kind", what: "what", title: "title" };
        let other = ui.clone();
        let value = ui.step(&cache, step, || {
            ui.tick("a sign")?;
            other.detail("a clone has the same screen");
            Ok((7, "done".to_owned()))
        });
        assert_eq!(value.unwrap(), 7);
        assert!(!cache.history().exists(), "the step ended at once");
        let failed = ui.step::<()>(&cache, step, || Err(Failure::interrupted().into()));
        assert!(Kind::Interrupted.is(&failed.unwrap_err()));
    }

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
        assert_eq!(signs.take("line", None), None, "no usual durations are known");
        assert!(signs.take("line", Some(usual(5.0))).is_some());
        assert_eq!(signs.take("line", Some(usual(5.0))), None);
        assert_eq!(signs.take("another", Some(usual(5.0))), None);
        assert!(signs.longest >= std::time::Duration::from_secs(100));
    }
}
