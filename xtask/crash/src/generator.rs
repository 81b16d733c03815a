//! The choice of crash states. Any state can be made again from the seed and its number.

use std::ops::Range;

use fastrand::Rng;

use crate::log::WriteLog;
use crate::state::{CrashState, MissingWrite};

/// Makes legal crash states. A third of them are at the given moments, a third immediately before or after a flush, and
/// a third anywhere.
pub struct Generator<'a> {
    log: &'a WriteLog,
    seed: u64,
    moments: Vec<usize>,
}

/// The choice of the volatile operations that are missing.
#[derive(Debug, Clone, Copy)]
enum Mode {
    All,
    None,
    /// An operation is missing if this bit of its place is set, or if the bit is not set.
    Half {
        bit: u32,
        is_set: bool,
    },
    /// Each operation is missing with this probability.
    Each(f64),
    /// One operation is missing.
    Alone,
    /// One operation is not missing.
    Kept,
    /// A part of one operation is missing; the others are or are not.
    Torn,
    /// Each operation is missing, torn or not missing.
    Scattered,
}

impl Mode {
    /// The modes from which a random one is chosen.
    const ANY: [Self; 12] = [
        Self::All,
        Self::None,
        Self::Each(0.1),
        Self::Each(0.5),
        Self::Each(0.9),
        Self::Alone,
        Self::Alone,
        Self::Kept,
        Self::Torn,
        Self::Torn,
        Self::Scattered,
        Self::Scattered,
    ];

    /// Returns the mode of a visit to a moment at which `count` operations are volatile. The first states at a moment
    /// contain a state for each two operations in which the first one is missing and the second one is not.
    fn of_visit(visit: u64, count: usize) -> Option<Self> {
        let bits = usize::BITS - count.saturating_sub(1).leading_zeros();
        match visit {
            0 => Some(Self::All),
            _ if visit <= 2 * u64::from(bits) => {
                Some(Self::Half { bit: (visit as u32 - 1) / 2, is_set: visit % 2 == 1 })
            }
            _ => None,
        }
    }
}

/// The fractional part of the golden ratio, times 2^64. Its multiples are spread evenly.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A share of a range, as evenly spread over consecutive numbers as possible.
fn spread(number: u64, seed: u64, range: usize) -> usize {
    let share = number.wrapping_mul(GOLDEN).wrapping_add(seed.wrapping_mul(GOLDEN.rotate_left(32)));
    ((u128::from(share) * range as u128) >> 64) as usize
}

impl<'a> Generator<'a> {
    /// `moments` are positions in the log that must be among the points of the states, for example the acknowledgements
    /// that the agent gave. Each moment is used in turn. Positions beyond the end of the log mean its end.
    pub fn new(log: &'a WriteLog, seed: u64, moments: &[usize]) -> Self {
        let mut moments: Vec<_> = moments.iter().map(|moment| (*moment).min(log.entries().len())).collect();
        moments.sort_unstable();
        moments.dedup();
        Self { log, seed, moments }
    }

    /// Returns the state with this number. It depends only on the log, the seed, the moments and the number.
    pub fn state(&self, number: u64) -> CrashState {
        // This finalizer of splitmix64 gives consecutive numbers unrelated streams.
        let mut mixed = (self.seed ^ number.wrapping_mul(GOLDEN)).wrapping_add(GOLDEN);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mut random = Rng::with_seed(mixed ^ (mixed >> 27));
        let flushes = self.log.flushes();
        let (kind, turn) = (number % 3, number / 3);
        let (mut visit, any) = (u64::MAX, Mode::ANY[random.usize(..Mode::ANY.len())]);
        let point = match kind {
            0 if !self.moments.is_empty() => {
                let count = self.moments.len() as u64;
                visit = turn / count;
                self.moments[(turn % count) as usize]
            }
            // After a flush, most states are the same. Before it, the most operations are volatile.
            1 if !flushes.is_empty() => {
                flushes[spread(turn, self.seed, flushes.len())] + usize::from(random.u8(..6) == 0)
            }
            _ => spread(number, self.seed, self.log.entries().len() + 1),
        };
        let mut missing = self.old_discards(point, &mut random);
        let volatile = self.volatile(point);
        let mode = Mode::of_visit(visit, volatile.len()).unwrap_or(any);
        missing.extend(self.choose(mode, &volatile, &mut random));
        CrashState { point, missing }
    }

    /// Returns the operations since the last flush that may be missing. The operation that flushes is among them if it
    /// also writes.
    fn volatile(&self, point: usize) -> Vec<usize> {
        let start = self.log.last_flush(point).unwrap_or(0);
        let entries = &self.log.entries()[start..point];
        let numbered = entries.iter().enumerate().filter(|(_, entry)| entry.changes() && !entry.fua);
        numbered.map(|(number, _)| start + number).collect()
    }

    /// Returns missing discards from before the last flush. A device that ignores a discard ignores most discards, so
    /// all or none of them are missing in three states of four.
    fn old_discards(&self, point: usize, random: &mut Rng) -> Vec<MissingWrite> {
        let discards = self.log.discards(self.log.last_flush(point).unwrap_or(0));
        match random.u8(..4) {
            0 => discards.iter().map(|discard| MissingWrite::whole(self.log, *discard)).collect(),
            1 => discards.iter().filter_map(|discard| self.scattered(*discard, random)).collect(),
            _ => Vec::new(),
        }
    }

    fn choose(&self, mode: Mode, volatile: &[usize], random: &mut Rng) -> Vec<MissingWrite> {
        if volatile.is_empty() {
            return Vec::new();
        }
        let one = random.usize(..volatile.len());
        let torn = self.torn(volatile[one], random);
        let around = [0.0, 0.5, 1.0][random.usize(..3)];
        let missing = |(place, number): (usize, &usize)| {
            let whole_if = |is_missing: bool| is_missing.then(|| MissingWrite::whole(self.log, *number));
            match mode {
                Mode::All => whole_if(true),
                Mode::None => None,
                Mode::Half { bit, is_set } => whole_if((place >> bit & 1 == 1) == is_set),
                Mode::Each(probability) => whole_if(random.f64() < probability),
                Mode::Alone => whole_if(place == one),
                Mode::Kept => whole_if(place != one),
                Mode::Torn if place == one => torn.clone(),
                Mode::Torn => whole_if(random.f64() < around),
                Mode::Scattered => self.scattered(*number, random),
            }
        };
        volatile.iter().enumerate().filter_map(missing).collect()
    }

    fn scattered(&self, entry: usize, random: &mut Rng) -> Option<MissingWrite> {
        match random.u8(..3) {
            0 => Some(MissingWrite::whole(self.log, entry)),
            1 => self.torn(entry, random),
            _ => None,
        }
    }

    /// Returns the operation without its beginning, without its end, or without random sectors.
    fn torn(&self, entry: usize, random: &mut Rng) -> Option<MissingWrite> {
        let count = self.log.entries()[entry].sectors();
        let cut = random.u64(1..=count);
        let torn = match random.u8(..4) {
            0 => MissingWrite::run(entry, cut..count),
            1 => MissingWrite::run(entry, 0..cut),
            _ => MissingWrite { entry, sectors: random_sectors(count, random) },
        };
        torn.sectors.iter().any(|range| !range.is_empty()).then_some(torn)
    }
}

/// Returns a random subset of the sectors. Large writes are usually cut into few runs, and discards of gigabytes always.
fn random_sectors(count: u64, random: &mut Rng) -> Vec<Range<u64>> {
    let longest = [1, 8, count.div_ceil(2).max(1)][random.usize(..3)].max(count / 4096);
    let mut sectors = Vec::new();
    let mut at = 0;
    while at < count {
        let end = (at + random.u64(1..=longest)).min(count);
        if random.bool() {
            sectors.push(at..end);
        }
        at = end;
    }
    sectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Operation, Sample, flush, write};

    /// A log with a flush in each ten entries.
    fn operations() -> Vec<Operation> {
        (0..200).map(|entry| if entry % 10 == 9 { flush() } else { write(entry * 8, 8) }).collect()
    }

    #[test]
    fn a_state_depends_only_on_its_number() {
        let sample = Sample::new(&operations());
        let log = sample.log();
        let all = |seed| {
            let generator = Generator::new(&log, seed, &[40]);
            (0..100).map(move |number| generator.state(number)).collect::<Vec<_>>()
        };
        let states = all(7);
        assert_eq!(Generator::new(&log, 7, &[40]).state(93), states[93]);
        assert_eq!(all(7), states);
        assert_ne!(all(8), states);
    }

    #[test]
    fn a_third_of_the_states_is_at_the_moments_and_the_others_are_everywhere() {
        let sample = Sample::new(&operations());
        let log = sample.log();
        let moments = [33, 77, 500];
        let generator = Generator::new(&log, 1, &moments);
        let points: Vec<_> = (0..900).map(|number| generator.state(number).point).collect();
        for moment in [33, 77, 200] {
            let count = points.iter().filter(|point| **point == moment).count();
            assert!((100..125).contains(&count), "{moment}: {count}");
        }
        let missed: Vec<_> = (0..=200).filter(|point| !points.contains(point)).collect();
        assert!(missed.len() < 10, "{missed:?}");
    }

    /// The faults need one write of an acknowledged change to be missing. Some also need the next write not to be missing.
    #[test]
    fn a_fault_that_needs_one_missing_write_is_found_within_300_states() {
        let sample = Sample::new(&operations());
        let log = sample.log();
        let moments: Vec<_> = (0..10).map(|change| change * 20 + 8).collect();
        let mut unseen = [0, 0];
        for seed in 0..20 {
            let generator = Generator::new(&log, seed, &moments);
            let states: Vec<_> = (0..300).map(|number| generator.state(number)).collect();
            for lost in 100..107 {
                let has = |state: &CrashState, entry| state.missing.iter().any(|one| one.entry == entry);
                let lost_one = || states.iter().filter(|state| has(state, lost));
                unseen[0] += usize::from(lost_one().next().is_none());
                let both = |state: &CrashState| state.point > lost + 1 && !has(state, lost + 1);
                unseen[1] += usize::from(!lost_one().any(both));
            }
        }
        assert!(unseen == [0, 0], "of 140: {unseen:?}");
    }
}
