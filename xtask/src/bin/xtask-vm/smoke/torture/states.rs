//! The judgement of crash states on all processors, without a boot.

use std::io;
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use xtask_core::error::Kind;
use xtask_core::limits;
use xtask_crash::{CrashState, Generator, StateDisk};
use xtask_jobs::Ui;
use xtask_judge::{Judge, Judgement, Loss, Rule};

use super::super::run::Run;
use super::checker::Checker;
use super::recorded::Recorded;

/// The number of the states that lose something whose journal e2fsck replays, too. If a planted fault is found, hundreds of
/// states lose the same thing.
const CONFIRMED: usize = 10;

/// A state that was judged.
pub(super) struct Judged {
    pub(super) number: u64,
    pub(super) state: CrashState,
    pub(super) judgement: Judgement,
}

/// The result of the judgement of many states.
pub(super) struct Tally {
    pub(super) count: u64,
    /// The time without the checks by e2fsck.
    pub(super) elapsed: Duration,
    /// The states that lose something, in the order of their numbers.
    pub(super) failed: Vec<Judged>,
    /// The states that lose nothing and are odd.
    pub(super) odd: Vec<u64>,
    /// The number of states that were checked by e2fsck.
    pub(super) checked: usize,
}

/// Judges one state.
pub(super) fn judge(recorded: &Recorded, judge: &Judge, state: &CrashState) -> Result<Judgement> {
    match StateDisk::new(&recorded.base, &recorded.log, state).load() {
        Ok(disk) => judge.judge(state.point, &disk),
        // These errors say nothing about the state.
        Err(error) if Kind::Host.is(&error) || error.chain().any(|cause| cause.is::<io::Error>()) => {
            Err(error)
        }
        Err(error) => {
            let loss =
                damaged(format!("the file system cannot be read after the replay of its journal: {error}"));
            Ok(Judgement { losses: vec![loss], is_odd: true, ..Judgement::default() })
        }
    }
}

/// Returns the loss for a damaged file system.
pub(super) fn damaged(text: String) -> Loss {
    Loss { rule: Rule::FileSystem, path: "/".to_owned(), text }
}

/// Judges the states 0 to `count` - 1.
pub(super) fn judge_all(
    recorded: &Recorded,
    by: &Judge,
    generator: &Generator<'_>,
    count: u64,
    ui: &Ui,
) -> Result<Tally> {
    let begun = Instant::now();
    let (next, stopped) = (AtomicU64::new(0), AtomicBool::new(false));
    let found = Mutex::new((Vec::new(), Vec::new()));
    let work = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let state = generator.state(number);
            let judgement = judge(recorded, by, &state)
                .with_context(|| format!("judge the crash state {number}"))
                .inspect_err(|_| stopped.store(true, Ordering::Relaxed))?;
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if judgement.is_odd && judgement.losses.is_empty() {
                found.1.push(number);
            }
            if !judgement.losses.is_empty() {
                found.0.push(Judged { number, state, judgement });
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            // A worker that ends before all states are handed out has failed or panicked.
            if workers.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                stopped.store(true, Ordering::Relaxed);
            }
            let done = next.load(Ordering::Relaxed).min(count);
            if let Err(error) = ui.tick(&format!("{done} of {count} states judged")) {
                stopped.store(true, Ordering::Relaxed);
                return Err(error);
            }
            std::thread::sleep(limits::POLL);
        }
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    let (mut failed, mut odd) = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    failed.sort_by_key(|judged: &Judged| judged.number);
    odd.sort_unstable();
    Ok(Tally { count, elapsed: begun.elapsed(), failed, odd, checked: 0 })
}

/// Checks the file systems of a sample of the states, of each odd state and of some that lose something with e2fsck. A state with damage that a boot
/// does not repair is added to those that have failed.
pub(super) fn check_file_systems(
    run: &Run<'_>,
    recorded: &Recorded,
    judge: &Judge,
    (generator, sample): (&Generator<'_>, u64),
    tally: &mut Tally,
) -> Result<()> {
    let step = (tally.count / sample.max(1)).max(1);
    let mut numbers: Vec<_> = (0..tally.count).step_by(usize::try_from(step).unwrap_or(usize::MAX)).collect();
    numbers.extend(&tally.odd);
    numbers.extend(tally.failed.iter().map(|judged| judged.number).take(CONFIRMED));
    numbers.sort_unstable();
    numbers.dedup();
    let work = run.dir.work();
    let checker = Checker::new(recorded, &work, &run.ui)?;
    for (done, number) in numbers.iter().enumerate() {
        run.ui.tick(&format!("{done} of {} file systems checked", numbers.len()))?;
        let state = generator.state(*number);
        for loss in checker.losses(&state, judge)? {
            tally.add(*number, &state, loss);
        }
        tally.checked += 1;
    }
    Ok(())
}

impl Tally {
    /// Adds a loss that e2fsck has found, unless the judge has found it before.
    fn add(&mut self, number: u64, state: &CrashState, loss: Loss) {
        match self.failed.binary_search_by_key(&number, |judged| judged.number) {
            Ok(at) if self.failed[at].judgement.losses.contains(&loss) => {}
            Ok(at) => self.failed[at].judgement.losses.push(loss),
            Err(at) => {
                let judgement = Judgement { losses: vec![loss], ..Judgement::default() };
                self.failed.insert(at, Judged { number, state: state.clone(), judgement });
            }
        }
    }

    /// Returns the numbers of at most `count` random states that lose nothing and for which `may` is true, spread over all
    /// states.
    pub(super) fn sound(&self, count: u64, random: &mut Rng, may: impl Fn(&u64) -> bool) -> Vec<u64> {
        let is_lossy =
            |number: &u64| self.failed.binary_search_by_key(number, |judged| judged.number).is_ok();
        let mut chosen = Vec::new();
        for turn in 0..count {
            let share = |turn: u64| (u128::from(self.count) * u128::from(turn) / u128::from(count)) as u64;
            let mut numbers: Vec<_> = (share(turn)..share(turn + 1)).collect();
            random.shuffle(&mut numbers);
            chosen.extend(numbers.into_iter().find(|number| !is_lossy(number) && may(number)));
        }
        chosen
    }

    /// Returns the number of states that were judged in a minute.
    pub(super) fn rate(&self) -> f64 {
        60.0 * self.count as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sound_states_of_all_kinds_are_chosen_at_random() {
        let failed = |number| {
            let judgement = Judgement::default();
            Judged { number, state: CrashState { point: 0, missing: Vec::new() }, judgement }
        };
        let failed = (0..300).filter(|number| number % 7 == 0).map(failed).collect();
        let tally = Tally { count: 300, elapsed: Duration::ZERO, failed, odd: Vec::new(), checked: 0 };
        let of = |seed| tally.sound(10, &mut Rng::with_seed(seed), |number| number % 5 != 0);
        let chosen = of(1);
        assert_eq!((chosen.len(), &of(1)), (10, &chosen));
        assert_ne!(of(2), chosen);
        assert!(chosen.iter().all(|number| number % 7 != 0 && number % 5 != 0), "{chosen:?}");
        // The generator makes three kinds of states in turn.
        assert!((0..3).all(|kind| chosen.iter().any(|number| number % 3 == kind)), "{chosen:?}");
        assert!(tally.sound(10, &mut Rng::new(), |_| false).is_empty());
        assert!(tally.sound(0, &mut Rng::new(), |_| true).is_empty());
    }
}
