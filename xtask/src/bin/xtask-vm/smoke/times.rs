//! What is usual of this run's phases, and what later runs learn of them: the times of its own kind of run.

use std::time::Duration;

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::limits;
use xtask_core::report::Phase;

use xtask_jobs::history::History;
use xtask_jobs::usual::Usual;

/// The times of one run.
pub(super) struct Times {
    cache: Cache,
    /// A run with a planted fault teaches nothing.
    is_planted: bool,
    /// The kind of run, but for its snapshot.
    kind: String,
    history: Option<History>,
    made_snapshot: bool,
    has_waited: bool,
}

impl Times {
    pub(super) fn new(cache: &Cache, is_planted: bool) -> Self {
        let (kind, history) = (String::new(), None);
        Self { cache: cache.clone(), is_planted, kind, history, made_snapshot: false, has_waited: false }
    }

    /// The kind is known, or another one than was thought.
    pub(super) fn are_of(&mut self, kind: String) {
        self.history = Some(History::load(&self.cache, &kind));
        self.kind = kind;
    }

    /// A phase begins.
    pub(super) fn begin(&mut self, phase: Phase) -> Option<Usual> {
        self.has_waited = false;
        self.usual(phase)
    }

    pub(super) fn usual(&self, phase: Phase) -> Option<Usual> {
        self.history.as_ref()?.of(phase.title())
    }

    /// The phase has waited for another run, for so long.
    pub(super) fn waited(&mut self, waited: Duration) {
        self.has_waited = waited > limits::CACHE_HIT;
    }

    /// What is usual of a phase that makes a snapshot.
    pub(super) fn usual_of_making(&self, phase: Phase) -> Option<Usual> {
        self.of_making().of(phase.title())
    }

    fn of_making(&self) -> History {
        History::load(&self.cache, &format!("{}-snapshot", self.kind))
    }

    /// Other times from here on, of machines out of a snapshot; those so far are of any run.
    pub(super) fn are_warm(&mut self, made_snapshot: bool, installs: bool) -> Result<()> {
        self.made_snapshot = made_snapshot;
        self.keep()?;
        let what = if installs { "warm" } else { "warm-machine" };
        self.history = Some(History::load(&self.cache, &format!("{}-{what}", self.kind)));
        Ok(())
    }

    /// Of a phase that passed. One that waited for another run says nothing of the next time, and what made a snapshot took a boot,
    /// which no later run out of it takes.
    pub(super) fn note(&mut self, phase: Phase, elapsed: Duration, silent: Duration) -> Result<()> {
        let (title, seconds) = (phase.title(), elapsed.as_secs_f64());
        if self.has_waited {
            return Ok(());
        }
        if self.made_snapshot && phase == Phase::Boot {
            let mut making = self.of_making();
            making.note(title, seconds, silent);
            return if self.is_planted { Ok(()) } else { making.keep(&self.cache) };
        }
        if let Some(history) = &mut self.history {
            history.note(title, seconds, silent);
        }
        Ok(())
    }

    /// For later runs.
    pub(super) fn keep(&self) -> Result<()> {
        match &self.history {
            Some(history) if !self.is_planted => history.keep(&self.cache),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn median(cache: &Cache, kind: &str) -> Option<f64> {
        History::load(cache, kind).of(Phase::Boot.title()).map(|usual| usual.median)
    }

    #[test]
    fn a_boot_is_noted_for_what_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let boot = |seconds: u64, waited: u64, snapshot: Option<bool>, is_planted: bool| {
            let mut times = Times::new(&cache, is_planted);
            times.are_of("k".to_owned());
            times.begin(Phase::Boot);
            times.waited(limits::rest(waited));
            if let Some(made_snapshot) = snapshot {
                times.are_warm(made_snapshot, true).unwrap();
            }
            times.note(Phase::Boot, limits::rest(seconds), Duration::ZERO).unwrap();
            times.keep().unwrap();
        };
        let all = || ["k", "k-warm", "k-snapshot"].map(|kind| median(&cache, kind));
        boot(60, 0, None, true);
        boot(61, 0, Some(true), true);
        boot(80, 80, Some(false), false);
        assert_eq!(all(), [None, None, None], "planted faults, and another run that was waited for");
        boot(62, 0, None, false);
        boot(2, 1, Some(false), false);
        boot(63, 0, Some(true), false);
        assert_eq!(all(), [Some(62.0), Some(2.0), Some(63.0)]);
        let mut times = Times::new(&cache, false);
        times.are_of("k".to_owned());
        assert_eq!(times.usual_of_making(Phase::Boot).map(|usual| usual.median), Some(63.0));
    }
}
