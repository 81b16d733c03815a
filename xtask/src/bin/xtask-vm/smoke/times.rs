//! The usual times of this run's phases, and their recording for later runs. Each kind of run has a history of its
//! own.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::limits;
use xtask_core::report::Phase;
use xtask_jobs::history::{History, Usual};

use crate::guest::watch::Deadline;

/// The times of one run. The phases share this value, because only the boot shows whether the run is warm.
pub(super) struct Times {
    cache: Cache,
    /// True if a fault is planted. The times of such a run are not recorded.
    is_planted: bool,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// The kind of the run, without regard to its snapshot.
    kind: String,
    history: Option<History>,
    made_snapshot: bool,
    /// The title of the current phase.
    title: String,
    limit: Option<Duration>,
    /// The time at which the current phase began.
    begun: Option<Instant>,
    has_waited: bool,
}

impl Times {
    pub(super) fn new(cache: &Cache, is_planted: bool) -> Self {
        Self { cache: cache.clone(), is_planted, state: RefCell::default() }
    }

    /// Sets the kind of the run, and loads its history if the kind has changed.
    pub(super) fn set_kind(&self, kind: String) {
        let mut state = self.state.borrow_mut();
        if state.kind != kind {
            state.history = Some(History::load(&self.cache, &kind));
            state.kind = kind;
        }
    }

    /// Notes that a phase begins with this limit. Returns its usual time.
    pub(super) fn begin(&self, phase: Phase, limit: Option<Duration>) -> Option<Usual> {
        let mut state = self.state.borrow_mut();
        (state.title, state.limit, state.has_waited) = (phase.title(), limit, false);
        state.begun = Some(Instant::now());
        drop(state);
        self.usual()
    }

    /// Returns the usual time of the current phase.
    pub(super) fn usual(&self) -> Option<Usual> {
        let state = self.state.borrow();
        state.history.as_ref()?.of(&state.title)
    }

    /// Returns the limit of the current phase.
    pub(super) fn limit(&self) -> Option<Duration> {
        self.state.borrow().limit
    }

    /// Returns the deadline of the current phase. A phase without a limit has no time left.
    pub(super) fn deadline(&self) -> Deadline {
        let state = self.state.borrow();
        Deadline::since(state.begun.unwrap_or_else(Instant::now), state.limit.unwrap_or_default())
    }

    /// Replaces the limit of the current phase, because another accelerator or the making of a snapshot needs another
    /// limit.
    pub(super) fn set_limit(&self, limit: Duration) {
        self.state.borrow_mut().limit = Some(limit);
    }

    /// Notes how long the phase has waited for another run. The limit of the phase begins after the wait.
    pub(super) fn note_wait(&self, waited: Duration) {
        let mut state = self.state.borrow_mut();
        (state.has_waited, state.begun) = (waited > limits::CACHE_HIT, Some(Instant::now()));
    }

    /// Returns the usual time of the current phase in a run that makes a snapshot.
    pub(super) fn usual_of_making(&self) -> Option<Usual> {
        self.of_making().of(&self.state.borrow().title)
    }

    fn of_making(&self) -> History {
        History::load(&self.cache, &format!("{}-snapshot", self.state.borrow().kind))
    }

    /// Writes the times so far, and uses the history of warm runs from then on.
    pub(super) fn switch_to_warm(&self, made_snapshot: bool, installs: bool) -> Result<()> {
        self.keep()?;
        let what = if installs { "warm" } else { "warm-machine" };
        let mut state = self.state.borrow_mut();
        state.made_snapshot = made_snapshot;
        state.history = Some(History::load(&self.cache, &format!("{}-{what}", state.kind)));
        Ok(())
    }

    /// Records the time of a phase that passed, unless the phase waited for another run. A boot that made a snapshot
    /// has a history of its own, because later runs from that snapshot do not boot.
    pub(super) fn note(&self, phase: Phase, elapsed: Duration, silent: Duration) -> Result<()> {
        let (title, seconds) = (phase.title(), elapsed.as_secs_f64());
        if self.state.borrow().has_waited {
            return Ok(());
        }
        if self.state.borrow().made_snapshot && phase == Phase::Boot {
            let mut making = self.of_making();
            making.note(&title, seconds, silent);
            return if self.is_planted { Ok(()) } else { making.keep(&self.cache) };
        }
        if let Some(history) = &mut self.state.borrow_mut().history {
            history.note(&title, seconds, silent);
        }
        Ok(())
    }

    /// Writes the times for later runs, unless a fault is planted.
    pub(super) fn keep(&self) -> Result<()> {
        match &self.state.borrow().history {
            Some(history) if !self.is_planted => history.keep(&self.cache),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn median(cache: &Cache, kind: &str) -> Option<f64> {
        History::load(cache, kind).of(&Phase::Boot.title()).map(|usual| usual.median)
    }

    #[test]
    fn a_boot_is_noted_for_what_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let boot = |seconds: u64, waited: u64, snapshot: Option<bool>, is_planted: bool| {
            let times = Times::new(&cache, is_planted);
            times.set_kind("k".to_owned());
            times.begin(Phase::Boot, None);
            times.note_wait(Duration::from_secs(waited));
            if let Some(made_snapshot) = snapshot {
                times.switch_to_warm(made_snapshot, true).unwrap();
            }
            times.note(Phase::Boot, Duration::from_secs(seconds), Duration::ZERO).unwrap();
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
        let times = Times::new(&cache, false);
        times.set_kind("k".to_owned());
        times.begin(Phase::Boot, None);
        assert_eq!(times.usual_of_making().map(|usual| usual.median), Some(63.0));
    }
}
