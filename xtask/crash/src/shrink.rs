//! The search for the smallest state that still fails. Two missing writes show the cause of a failure better than forty.

use anyhow::Result;

use crate::log::WriteLog;
use crate::state::{CrashState, MissingWrite};

/// The maximum number of states that are tried. A trial takes some tens of milliseconds.
const TRIALS: usize = 400;

/// Returns a state at the same point with as few missing writes as possible for which `fails` returns true. `state`
/// itself must have failed. The search is delta debugging (Zeller, Hildebrandt: Simplifying and Isolating
/// Failure-Inducing Input, 2002). Afterwards, torn writes become whole missing ones where the state still fails. After
/// 400 trials, the smallest state that has been found is returned.
///
/// # Errors
/// Returns the first error of `fails`.
pub fn shrink(
    log: &WriteLog,
    state: &CrashState,
    fails: impl FnMut(&CrashState) -> Result<bool>,
) -> Result<CrashState> {
    let mut search = Search { log, point: state.point, trials: TRIALS, fails };
    if search.fails(&[])? {
        return Ok(CrashState { point: state.point, missing: Vec::new() });
    }
    let mut missing = search.fewest(state.missing.clone())?;
    for place in 0..missing.len() {
        let whole = MissingWrite::whole(log, missing[place].entry);
        if missing[place] != whole {
            let mut other = missing.clone();
            other[place] = whole;
            if search.fails(&other)? {
                missing = other;
            }
        }
    }
    Ok(CrashState { point: state.point, missing })
}

struct Search<'a, F> {
    log: &'a WriteLog,
    point: usize,
    trials: usize,
    fails: F,
}

impl<F: FnMut(&CrashState) -> Result<bool>> Search<'_, F> {
    /// Says whether a state is legal and fails. Without trials left, no state counts as failing.
    fn fails(&mut self, missing: &[MissingWrite]) -> Result<bool> {
        let state = CrashState { point: self.point, missing: missing.to_vec() };
        if self.trials == 0 || state.check(self.log).is_err() {
            return Ok(false);
        }
        self.trials -= 1;
        (self.fails)(&state)
    }

    fn fewest(&mut self, mut missing: Vec<MissingWrite>) -> Result<Vec<MissingWrite>> {
        let mut parts = 2;
        while missing.len() > 1 {
            let length = missing.len().div_ceil(parts);
            match self.smaller(&missing, length)? {
                Some((smaller, is_part)) => {
                    missing = smaller;
                    parts = if is_part { 2 } else { (parts - 1).max(2) };
                }
                None if length == 1 => break,
                None => parts = (parts * 2).min(missing.len()),
            }
        }
        Ok(missing)
    }

    /// Returns a part of this length that fails alone, or the rest without such a part, and whether it is the part.
    fn smaller(
        &mut self,
        missing: &[MissingWrite],
        length: usize,
    ) -> Result<Option<(Vec<MissingWrite>, bool)>> {
        for part in missing.chunks(length) {
            if self.fails(part)? {
                return Ok(Some((part.to_vec(), true)));
            }
        }
        for start in (0..missing.len()).step_by(length) {
            let end = (start + length).min(missing.len());
            let rest = [&missing[..start], &missing[end..]].concat();
            if !rest.is_empty() && self.fails(&rest)? {
                return Ok(Some((rest, false)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::samples::{Sample, flush, write};

    fn forty() -> (Sample, CrashState) {
        let writes: Vec<_> = (0..40).map(|number| write(number * 8, 8)).collect();
        let torn: Vec<Range<u64>> = vec![0..3, 6..7];
        let missing = (0..40).map(|entry| MissingWrite { entry, sectors: torn.clone() }).collect();
        (Sample::new(&writes), CrashState { point: 40, missing })
    }

    fn has(state: &CrashState, entry: usize) -> bool {
        state.missing.iter().any(|one| one.entry == entry)
    }

    #[test]
    fn the_two_writes_that_matter_remain_of_forty() {
        let (sample, state) = forty();
        for (first, second) in [(0, 1), (7, 31), (0, 39), (20, 21)] {
            let mut trials = 0;
            let fails = |state: &CrashState| {
                trials += 1;
                Ok(has(state, first) && has(state, second))
            };
            let small = shrink(&sample.log(), &state, fails).unwrap();
            assert_eq!(small.missing, [MissingWrite::run(first, 0..8), MissingWrite::run(second, 0..8)]);
            assert!(trials < 150, "{trials}");
        }
    }

    #[test]
    fn a_tear_that_matters_remains() {
        let (sample, state) = forty();
        let fails =
            |state: &CrashState| Ok(state.missing.iter().any(|one| one.entry == 9 && one.sectors.len() == 2));
        let small = shrink(&sample.log(), &state, fails).unwrap();
        assert_eq!(small.missing, [MissingWrite { entry: 9, sectors: vec![0..3, 6..7] }]);
    }

    #[test]
    fn a_failure_without_a_missing_write_has_none() {
        let (sample, state) = forty();
        assert_eq!(shrink(&sample.log(), &state, |_| Ok(true)).unwrap().missing, []);
        shrink(&sample.log(), &state, |_| anyhow::bail!("no disk")).unwrap_err();
    }

    #[test]
    fn the_number_of_trials_is_limited() {
        let mut trials = 0;
        let writes: Vec<_> = (0..400).map(|number| write(number * 8, 8)).collect();
        let sample = Sample::new(&writes);
        let missing = (0..400).map(|entry| MissingWrite::run(entry, 0..8)).collect();
        let state = CrashState { point: 400, missing };
        let fails = |state: &CrashState| {
            trials += 1;
            Ok((0..200).all(|entry| has(state, entry)))
        };
        let small = shrink(&sample.log(), &state, fails).unwrap();
        assert!(small.missing.len() == 200 && trials == TRIALS, "{} {trials}", small.missing.len());
    }

    #[test]
    fn only_legal_states_are_tried() {
        let operations = [write(0, 8), flush(), write(0, 1), write(8, 8)];
        let sample = Sample::new(&operations);
        // A whole missing write 0 would be illegal, because write 2 covers only one of its sectors.
        let state =
            CrashState { point: 4, missing: vec![MissingWrite::run(0, 0..1), MissingWrite::run(3, 0..8)] };
        let log = sample.log();
        let fails = |state: &CrashState| {
            state.check(&log).unwrap();
            Ok(has(state, 0))
        };
        assert_eq!(shrink(&log, &state, fails).unwrap().missing, [MissingWrite::run(0, 0..1)]);
    }
}
