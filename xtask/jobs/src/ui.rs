//! The one handle by which a job speaks to whoever waits for it, and hears that he does not want to wait any longer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::cli::Verbosity;
use xtask_core::error::Failure;
use xtask_core::limits;
use xtask_core::report::PhaseStatus;

use crate::history::History;
use crate::interrupt::Interrupt;
use crate::screen::Screen;
use crate::usual::Usual;

/// The screen of a command and its Ctrl-C. Clones share both. The screen is locked for one line at a time, and never while
/// a caller's closure runs.
#[derive(Debug, Clone)]
pub struct Ui {
    screen: Arc<Mutex<Screen>>,
    interrupt: Interrupt,
    background: Option<Arc<Background>>,
}

/// The state of a job that runs behind the one on the screen. Dropped early, it ends the job.
#[derive(Debug, Default)]
pub struct Background {
    is_shown: AtomicBool,
    is_cancelled: AtomicBool,
}

impl Background {
    /// The screen is the job's from now on.
    pub fn show(&self) {
        self.is_shown.store(true, Ordering::Relaxed);
    }

    /// Lets the job fail at its next sign of life.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }
}

/// Something that may take over two seconds and is no phase of a smoke.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The history that its times are kept in.
    pub kind: &'a str,
    /// Tells it apart from other steps of its kind.
    pub what: &'a str,
    /// The beginning of its line on the screen.
    pub title: &'a str,
}

impl Ui {
    /// The screen of this command, which listens for Ctrl-C from now on.
    pub fn install(verbosity: Verbosity) -> Result<Self> {
        Ok(Self::new(verbosity, Interrupt::install()?))
    }

    /// Shows only what `--quiet` shows, and cannot be interrupted.
    pub fn quiet() -> Self {
        Self::new(Verbosity::silent(), Interrupt::default())
    }

    fn new(verbosity: Verbosity, interrupt: Interrupt) -> Self {
        Self { screen: Arc::new(Mutex::new(Screen::new(verbosity))), interrupt, background: None }
    }

    /// The same screen for work that Ctrl-C must not end, such as tidying up after one.
    pub fn uninterruptible(&self) -> Self {
        Self { interrupt: Interrupt::default(), ..self.clone() }
    }

    /// The same screen for a job behind the one that is shown: its signs of life are dropped until it is shown itself.
    pub fn behind(&self, background: &Arc<Background>) -> Self {
        Self { background: Some(Arc::clone(background)), ..self.clone() }
    }

    /// A thread that panicked in the middle of a line leaves nothing behind that the next line depends on.
    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the latest sign of life of what runs now.
    ///
    /// # Errors
    /// An interrupt, see [`Ui::check`].
    pub fn tick(&self, what: &str) -> Result<()> {
        self.check()?;
        if self.background.as_ref().is_none_or(|job| job.is_shown.load(Ordering::Relaxed)) {
            self.screen().alive(what);
        }
        Ok(())
    }

    /// Fails with [`xtask_core::error::Kind::Interrupted`] once somebody has pressed Ctrl-C, or cancelled the job.
    pub fn check(&self) -> Result<()> {
        self.interrupt.check()?;
        match &self.background {
            Some(job) if job.is_cancelled.load(Ordering::Relaxed) => Err(Failure::interrupted().into()),
            _ => Ok(()),
        }
    }

    /// Announces what runs from now on; `usual` is how long that usually takes.
    pub fn start(&self, title: &str, usual: Option<Usual>) {
        self.screen().start(title, usual);
    }

    /// Replaces what is usual of what runs now.
    pub fn expect(&self, usual: Option<Usual>) {
        self.screen().expect(usual);
    }

    /// Takes the status line away while a child writes to the terminal itself.
    pub fn pause(&self) {
        self.screen().pause();
    }

    /// The longest time in which what runs now has given no new sign of life.
    pub fn longest_silence(&self) -> Duration {
        self.screen().longest_silence()
    }

    /// Says how it ended.
    pub fn end(&self, outcome: PhaseStatus, detail: &str) {
        self.screen().end(outcome, detail);
    }

    /// Prints a line, unless the command is `--quiet`.
    pub fn note(&self, text: &str) {
        self.screen().note(text);
    }

    /// Prints a line that even `--quiet` shows.
    pub fn line(&self, text: &str) {
        self.screen().line(text);
    }

    /// Prints a line that only `--verbose` shows.
    pub fn detail(&self, text: &str) {
        self.screen().detail(text);
    }

    /// Prints the last line, green or red.
    pub fn verdict(&self, text: &str, good: bool) {
        self.screen().verdict(text, good);
    }

    /// Runs `body` with its name, what is usual of it and how it ended on the screen, and keeps how long it took where it
    /// succeeded. The text that `body` returns is its line's end. What is over at once, as the boot of a machine that ran
    /// already, is no measure of what has to be waited for.
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
        behind.tick("a sign that nobody sees").unwrap();
        job.show();
        behind.tick("one that is seen").unwrap();
        job.cancel();
        assert!(Kind::Interrupted.is(&behind.tick("the last one").unwrap_err()));
        ui.tick("the job on the screen goes on").unwrap();
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
        assert!(!cache.history().exists(), "it was over at once");
        let failed = ui.step::<()>(&cache, step, || Err(Failure::interrupted().into()));
        assert!(Kind::Interrupted.is(&failed.unwrap_err()));
    }
}
