//! The search for the fewest faults with which an episode still fails. Each trial is an episode, which takes some 20 s.
//! Therefore the search halves the list, and needs about `log2(n)` trials for each fault that matters. In delta debugging
//! (Zeller, Hildebrandt: Simplifying and Isolating Failure-Inducing Input, 2002), both halves pass if two faults matter
//! that are in different halves, and all smaller parts must be tried then.

use xtask_core::cli::{Schedule, ScheduledFault};

/// Returns the smallest schedule that was seen to fail, after at most `trials` calls of `fails`. `schedule` itself must
/// have failed, and is not tried again. The faults keep their times. The result is empty if an episode without any fault
/// fails, too: then the failure has another reason.
///
/// First, the search looks for the shortest beginning of the list that fails. The last fault of this beginning matters.
/// The search repeats this with the faults before it, until the faults that matter fail alone. Then it leaves each of
/// them out once.
///
/// # Errors
/// Returns the first error of `fails`.
pub fn shrink<E>(
    schedule: &Schedule,
    trials: usize,
    fails: impl FnMut(&Schedule) -> Result<bool, E>,
) -> Result<Schedule, E> {
    let all: Vec<usize> = (0..schedule.faults().len()).collect();
    let mut search = Search { faults: schedule.faults(), trials, tried: vec![(all.clone(), true)], fails };
    search.halves(&all)?;
    search.single_removals()?;
    Ok(search.schedule(&search.smallest()))
}

/// A subset of the faults: their indices in ascending order.
type Subset = Vec<usize>;

struct Search<'a, F> {
    faults: &'a [ScheduledFault],
    /// The number of trials left.
    trials: usize,
    /// The subsets whose result is known.
    tried: Vec<(Subset, bool)>,
    fails: F,
}

impl<E, F: FnMut(&Schedule) -> Result<bool, E>> Search<'_, F> {
    fn schedule(&self, subset: &[usize]) -> Schedule {
        Schedule::new(subset.iter().map(|index| self.faults[*index]).collect())
    }

    /// Returns the smallest subset that has failed. The whole list has failed, so there is one.
    fn smallest(&self) -> Subset {
        let failed = self.tried.iter().filter(|(_, fails)| *fails);
        failed.min_by_key(|(subset, _)| subset.len()).map(|(subset, _)| subset.clone()).unwrap_or_default()
    }

    /// Says whether a subset fails. Without trials left, no subset counts as failing.
    fn fails(&mut self, mut subset: Subset) -> Result<bool, E> {
        subset.sort_unstable();
        if let Some((_, fails)) = self.tried.iter().find(|(tried, _)| *tried == subset) {
            return Ok(*fails);
        }
        if self.trials == 0 {
            return Ok(false);
        }
        self.trials -= 1;
        let schedule = self.schedule(&subset);
        let fails = (self.fails)(&schedule)?;
        self.tried.push((subset, fails));
        Ok(fails)
    }

    /// Finds the faults that matter, from the last one to the first one, by halving the list.
    fn halves(&mut self, all: &[usize]) -> Result<(), E> {
        let mut matter = Subset::new();
        let mut rest = all;
        while !rest.is_empty() && (matter.is_empty() || !self.fails(matter.clone())?) {
            // The faults that matter fail together with the first `high` others, but not with the first `low` ones.
            let (mut low, mut high) = (0, rest.len());
            while high - low > 1 {
                let middle = low.midpoint(high);
                let fails = self.fails([&rest[..middle], &matter].concat())?;
                *(if fails { &mut high } else { &mut low }) = middle;
            }
            matter.push(rest[high - 1]);
            rest = &rest[..high - 1];
        }
        Ok(())
    }

    fn single_removals(&mut self) -> Result<(), E> {
        let mut left = self.smallest();
        let mut place = 0;
        while place < left.len() {
            let mut without = left.clone();
            without.remove(place);
            if self.fails(without.clone())? {
                left = without;
            } else {
                place += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use xtask_core::cli::DeviceFault;

    use super::*;

    const EIGHT: &str = "link-down@0.0+8,kill-agent@1.0,clock-1970@1.5+3,disk-slow@2.0+5,low-rate@2.5+5,\
                         power-cut@4.0+2,broker-slow@6.0+4,kill-podman@9.0";

    /// Shrinks the eight faults, of which those at `matter` must be together for a failure. Returns the indices that are
    /// left, and the number of trials.
    fn shrunk(matter: &[usize], trials: usize) -> (Vec<usize>, usize) {
        let schedule: Schedule = EIGHT.parse().unwrap();
        let place = |fault: &ScheduledFault| schedule.faults().iter().position(|one| one == fault).unwrap();
        let mut calls = 0;
        let small = shrink(&schedule, trials, |tried| {
            calls += 1;
            let tried: Vec<_> = tried.faults().iter().map(place).collect();
            assert!(tried.is_sorted() && tried.len() < 8, "{tried:?}");
            Ok::<_, String>(matter.iter().all(|index| tried.contains(index)))
        });
        (small.unwrap().faults().iter().map(place).collect(), calls)
    }

    #[test]
    fn one_fault_of_eight_is_found_in_five_episodes() {
        for index in 0..8 {
            let (left, calls) = shrunk(&[index], 100);
            assert_eq!(left, [index]);
            assert!(calls <= 5, "{index}: {calls}");
        }
    }

    #[test]
    fn two_faults_of_eight_are_found_in_nine_episodes() {
        let pairs = (0..8).flat_map(|second| (0..second).map(move |first| [first, second]));
        let mut total = 0;
        for pair in pairs {
            let (left, calls) = shrunk(&pair, 100);
            assert_eq!(left, pair);
            assert!(calls <= 9, "{pair:?}: {calls}");
            total += calls;
        }
        assert!(total <= 28 * 8, "{total} calls for 28 pairs");
    }

    #[test]
    fn a_failure_without_faults_and_one_of_all_faults_are_recognized() {
        let (left, calls) = shrunk(&[], 100);
        assert!(left.is_empty() && calls <= 5, "{left:?} {calls}");
        assert_eq!(shrunk(&[0, 1, 2, 3, 4, 5, 6, 7], 100).0.len(), 8);
        assert_eq!(shrunk(&[0, 3, 4, 7], 100).0, [0, 3, 4, 7]);
    }

    #[test]
    fn the_number_of_episodes_is_limited_and_the_smallest_failure_is_kept() {
        assert_eq!(shrunk(&[1], 0), ((0..8).collect(), 0));
        assert_eq!(shrunk(&[1], 1), (vec![0, 1, 2, 3], 1));
        assert_eq!(shrunk(&[1], 2), (vec![0, 1], 2));
        let (left, calls) = shrunk(&[1, 6], 4);
        assert!(left.contains(&1) && left.contains(&6) && left.len() < 8 && calls == 4, "{left:?}");
    }

    /// Here two other faults fail together, too, and one fault hides the failure of the others.
    #[test]
    fn what_is_returned_has_failed_and_no_fault_of_it_can_be_left_out() {
        let schedule: Schedule = EIGHT.parse().unwrap();
        let has = |tried: &Schedule, fault| tried.faults().iter().any(|one| one.fault == fault);
        let fails = |tried: &Schedule| {
            let first = has(tried, DeviceFault::LinkDown) && has(tried, DeviceFault::BrokerSlow);
            let hidden = has(tried, DeviceFault::PowerCut) && !has(tried, DeviceFault::KillPodman);
            first || has(tried, DeviceFault::DiskSlow) && hidden
        };
        let small = shrink(&schedule, 100, |tried| Ok::<_, String>(fails(tried))).unwrap();
        assert!(fails(&small) && small.faults().len() == 2, "{small}");
        for place in 0..2 {
            let mut fewer = small.faults().to_vec();
            fewer.remove(place);
            assert!(!fails(&Schedule::new(fewer)));
        }
    }

    #[test]
    fn an_error_ends_the_search() {
        let schedule: Schedule = EIGHT.parse().unwrap();
        let mut calls = 0;
        let error = shrink(&schedule, 100, |_| {
            calls += 1;
            Err::<bool, _>("no machine")
        });
        assert_eq!((error, calls), (Err("no machine"), 1));
    }
}
