//! The episodes of a run, drawn from a seed. All random numbers have 32 bits, so a seed gives the same episodes on each
//! platform.

use std::ops::RangeInclusive;

use fastrand::Rng;
use serde::{Deserialize, Serialize};
use xtask_core::cli::{DeviceFault, Schedule, ScheduledFault, Tenths};

use crate::effect::effect_of;
use crate::pairs::{Form, can_pair};

/// The number of episodes with one fault before each pair.
const SINGLES: usize = 4;
/// The moments at which the first fault begins, in tenths of a second.
const BEGINS: RangeInclusive<u32> = 0..=30;
/// The time between the end of the first fault and the beginning of a fault during the healing, in tenths of a second.
const AFTER_END: u32 = 1;
/// Tenths in a second.
const SECOND: u32 = 10;

/// One episode: the device is disturbed by this schedule, and must then heal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Episode {
    /// The number of the episode in its run, from 1.
    pub number: usize,
    pub form: Form,
    pub schedule: Schedule,
}

/// Returns the default number of episodes for this number of faults: each fault once, and a pair for each four.
pub fn default_episodes(faults: usize) -> usize {
    faults + faults / SINGLES
}

/// Returns the episodes of a seed. After each four episodes with one fault comes a pair, alternately overlapping and
/// during the healing, in a form that the two faults allow ([`can_pair`]). Each fault of `kinds` occurs once before any
/// of them repeats. The same holds for the fault with which the search for a pair begins, so each fault with a partner
/// occurs in pairs. With fewer episodes, a seed gives a prefix of the same list. Without kinds, the list is empty.
pub fn schedule(seed: u64, kinds: &[DeviceFault], episodes: usize) -> Vec<Episode> {
    if kinds.is_empty() {
        return Vec::new();
    }
    let rng = Rng::with_seed(seed);
    let mut draw = Draw { rng, kinds, singles: Vec::new(), paired: Vec::new(), next_form: Form::Overlapping };
    (1..=episodes)
        .map(|number| {
            let pair = if number % (SINGLES + 1) == 0 { draw.pair() } else { None };
            let (form, schedule) = pair.unwrap_or_else(|| (Form::Single, draw.single()));
            Episode { number, form, schedule }
        })
        .collect()
}

struct Draw<'a> {
    rng: Rng,
    kinds: &'a [DeviceFault],
    /// The faults that have not occurred alone in this round; the next one is the last.
    singles: Vec<DeviceFault>,
    /// The faults with which no search for a pair has begun in this round.
    paired: Vec<DeviceFault>,
    next_form: Form,
}

impl Draw<'_> {
    fn single(&mut self) -> Schedule {
        if self.singles.is_empty() {
            self.singles = shuffled(&mut self.rng, self.kinds);
        }
        let fault = self.singles.pop().unwrap_or(self.kinds[0]);
        let begin = Tenths(self.rng.u32(BEGINS));
        Schedule::new(vec![ScheduledFault { fault, begin, length: self.length(fault) }])
    }

    /// Returns a pair; `None` if no two faults make one.
    fn pair(&mut self) -> Option<(Form, Schedule)> {
        let (form, first, second) = self.partners()?;
        let begin = Tenths(self.rng.u32(BEGINS));
        let first = ScheduledFault { fault: first, begin, length: self.length(first) };
        let begin = match form {
            Form::Overlapping => Tenths(begin.0 + self.rng.u32(1..first.length.0)),
            Form::Single | Form::DuringHealing => Tenths(first.end().0 + AFTER_END),
        };
        let second = ScheduledFault { fault: second, begin, length: self.length(second) };
        Some((form, Schedule::new(vec![first, second])))
    }

    /// Returns the form of the next pair, and its faults in their order.
    fn partners(&mut self) -> Option<(Form, DeviceFault, DeviceFault)> {
        let wanted = self.next_form;
        let other = match wanted {
            Form::Overlapping => Form::DuringHealing,
            Form::Single | Form::DuringHealing => Form::Overlapping,
        };
        for _ in 0..2 * self.kinds.len() {
            if self.paired.is_empty() {
                self.paired = shuffled(&mut self.rng, self.kinds);
            }
            let fault = self.paired.pop()?;
            for form in [wanted, other] {
                let orders = self.kinds.iter().flat_map(|partner| [(fault, *partner), (*partner, fault)]);
                let pairs: Vec<_> =
                    orders.filter(|(first, second)| can_pair(form, *first, *second)).collect();
                if !pairs.is_empty() {
                    // After a pair of the other form, the wanted form is still due.
                    self.next_form = if form == wanted { other } else { wanted };
                    let (first, second) = pairs[below(&mut self.rng, pairs.len())];
                    return Some((form, first, second));
                }
            }
        }
        None
    }

    /// Draws a length; zero for a moment.
    fn length(&mut self, fault: DeviceFault) -> Tenths {
        let Some(lengths) = effect_of(fault).lengths else { return Tenths(0) };
        Tenths(self.rng.u32(lengths.start() * SECOND..=lengths.end() * SECOND))
    }
}

/// Returns a random index below `length`, which must not be zero. `Rng::usize` depends on the size of a pointer.
fn below(rng: &mut Rng, length: usize) -> usize {
    rng.u32(0..u32::try_from(length).unwrap_or(u32::MAX)) as usize
}

/// Shuffles with Fisher and Yates' algorithm. `Rng::shuffle` depends on the size of a pointer.
fn shuffled(rng: &mut Rng, kinds: &[DeviceFault]) -> Vec<DeviceFault> {
    let mut shuffled = kinds.to_vec();
    for end in (1..shuffled.len()).rev() {
        shuffled.swap(end, below(rng, end + 1));
    }
    shuffled
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::golden;

    fn all(seed: u64, episodes: usize) -> Vec<Episode> {
        schedule(seed, DeviceFault::all(), episodes)
    }

    #[test]
    fn a_seed_gives_the_same_episodes_for_ever() {
        let line = |episode: &Episode| {
            let form = serde_json::to_value(episode.form).unwrap();
            format!("{} {} {}\n", episode.number, form.as_str().unwrap(), episode.schedule)
        };
        let count = default_episodes(DeviceFault::all().len());
        let text: String = all(7, count).iter().map(line).collect();
        golden::compare("episodes-7.txt", text);
        assert_eq!(all(7, 11), all(7, count)[..11], "fewer episodes are a prefix");
        assert_ne!(all(8, count), all(7, count));
    }

    #[test]
    fn each_fault_occurs_alone_once_in_each_round() {
        let kinds = DeviceFault::all();
        for seed in 0..20 {
            let episodes = all(seed, 2 * default_episodes(kinds.len()));
            let singles: Vec<_> = episodes
                .iter()
                .filter(|episode| episode.form == Form::Single)
                .map(|episode| episode.schedule.faults()[0].fault)
                .collect();
            assert_eq!(singles.len(), 2 * kinds.len());
            for round in singles.chunks(kinds.len()) {
                assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), kinds.len(), "seed {seed}");
            }
            assert_ne!(singles[..kinds.len()], singles[kinds.len()..], "seed {seed}");
        }
    }

    #[test]
    fn every_fifth_episode_is_a_pair_in_the_form_that_is_due() {
        let mut faults = BTreeSet::new();
        let mut counts = [0, 0];
        for episode in all(3, 5 * 200) {
            assert_eq!(episode.number % 5 == 0, episode.form != Form::Single, "{episode:?}");
            let [first, second] = episode.schedule.faults() else { continue };
            assert!(can_pair(episode.form, first.fault, second.fault), "{episode:?}");
            match episode.form {
                Form::Overlapping => {
                    assert!(first.begin < second.begin && second.begin < first.end(), "{episode:?}");
                    counts[0] += 1;
                }
                _ => {
                    assert_eq!(second.begin.0, first.end().0 + 1, "{episode:?}");
                    counts[1] += 1;
                }
            }
            faults.extend([first.fault, second.fault]);
        }
        assert_eq!(counts, [100, 100]);
        assert_eq!(faults.len(), DeviceFault::all().len(), "each fault occurs in pairs");
    }

    #[test]
    fn each_time_is_within_the_table_and_its_text_repeats_the_episode() {
        let mut begins = BTreeSet::new();
        for episode in all(11, 500) {
            let text = episode.schedule.to_string();
            assert_eq!(text.parse(), Ok(episode.schedule.clone()));
            begins.insert(episode.schedule.faults()[0].begin);
            for one in episode.schedule.faults() {
                let seconds = one.length.0.div_ceil(10);
                let lengths = effect_of(one.fault).lengths;
                assert!(lengths.map_or(seconds == 0, |lengths| lengths.contains(&seconds)), "{text}");
            }
        }
        assert_eq!((begins.len(), begins.last()), (31, Some(&Tenths(30))), "the moments are drawn");
    }

    #[test]
    fn a_selection_without_pairs_has_none() {
        use DeviceFault as F;
        assert_eq!(schedule(1, &[], 5), []);
        for kinds in [&[F::LinkDown][..], &[F::Clock1970, F::ClockYearBack, F::ClockJumps]] {
            let episodes = schedule(1, kinds, 12);
            assert!(episodes.len() == 12 && episodes.iter().all(|one| one.form == Form::Single));
        }
        let two = schedule(1, &[F::KillAgent, F::KillContainer], 20);
        let forms: Vec<_> = two.iter().map(|one| one.form).filter(|form| *form != Form::Single).collect();
        assert_eq!(forms, [Form::DuringHealing; 4], "a moment cannot be overlapped");
    }
}
