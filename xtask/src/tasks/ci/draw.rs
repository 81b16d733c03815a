//! Selects the cases of a table that a run of the suite tries. The cases of one table usually fail together, so a
//! third of them is enough.

use xtask_core::git;
use xtask_core::message;
use xtask_core::workspace::Workspace;

/// The tables whose cases are tests, each as the prefix of the tests' names. A test that contains a whole table reads
/// the variable [`THIRD`] and selects the cases itself.
pub(super) const TABLES: [&str; 5] =
    ["images::", "it_can_fail::disturbance::", "it_can_fail::sabotage::", "warm::long::", "warm::trouble::"];

/// The environment variable that tells a test which third of its table to try, from 0 to 2. If it is not set, all
/// cases are tried.
pub(super) const THIRD: &str = "IOT_XTASK_THIRD";

/// Returns the third of each table that the commit's hash selects, or `None` without git.
pub(super) fn of_commit(workspace: &Workspace) -> Option<usize> {
    let third = third(&git::head(workspace.root())?)?;
    message!("== of each table, the commit draws {THIRD}={third}; cargo xtask soak --all tries all cases");
    Some(third)
}

fn third(commit: &str) -> Option<usize> {
    Some(usize::from_str_radix(commit.get(..7)?, 16).ok()? % 3)
}

/// Splits the cases into those that are tried and the others.
pub(super) fn split<T: Clone>(third: Option<usize>, cases: &[T]) -> (Vec<T>, Vec<T>) {
    let (tried, skipped): (Vec<_>, Vec<_>) = cases
        .iter()
        .cloned()
        .enumerate()
        .partition(|(index, _)| third.is_none_or(|third| index % 3 == third));
    let cases = |chosen: Vec<(usize, T)>| chosen.into_iter().map(|(_, case)| case).collect();
    (cases(tried), cases(skipped))
}

/// Splits the names of tests into those that are tried and the others. Tests outside of tables are always tried.
pub(super) fn split_tests(third: Option<usize>, names: &[String]) -> (Vec<String>, Vec<String>) {
    let of_table = |name: &&String| TABLES.iter().any(|table| name.starts_with(table));
    let (drawn, always): (Vec<_>, Vec<_>) = names.iter().partition(of_table);
    let (tried, skipped) = split(third, &drawn);
    let owned = |names: Vec<&String>| names.into_iter().cloned().collect();
    (owned([always, tried].concat()), owned(skipped))
}

pub(super) fn note_skipped<'a>(table: &str, names: impl Iterator<Item = &'a str>) {
    let names: Vec<_> = names.collect();
    if !names.is_empty() {
        message!("== {table}: skipped by the draw: {}", names.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_three_thirds_are_everything_and_each_case_is_in_one() {
        let names: Vec<_> = (0..10)
            .flat_map(|n| {
                [format!("it_can_fail::sabotage::t{n}"), format!("images::t{n}"), format!("inspect::t{n}")]
            })
            .collect();
        let thirds = [0, 1, 2].map(|third| split_tests(Some(third), &names));
        for name in &names {
            let tried = thirds.iter().filter(|(tried, _)| tried.contains(name)).count();
            let skipped = thirds.iter().filter(|(_, skipped)| skipped.contains(name)).count();
            assert_eq!((tried, skipped), if name.starts_with("inspect") { (3, 0) } else { (1, 2) }, "{name}");
        }
        assert_eq!(split_tests(None, &names).1, Vec::<String>::new());
    }

    #[test]
    fn a_commit_draws_a_third() {
        let drawn: BTreeSet<_> = ["0000000aa", "0000001ff", "00000020\n"].into_iter().map(third).collect();
        assert_eq!(drawn, BTreeSet::from([Some(0), Some(1), Some(2)]));
        assert_eq!(third("fatal: not a git repository"), None);
        assert_eq!(third(""), None);
    }
}
