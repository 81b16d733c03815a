//! Selects the cases of a table that a run tries. `cargo xtask ci` sets [`VARIABLE`] to a third that depends on the
//! commit. A third is enough, because similar cases rarely fail alone. If the variable is not set, as in
//! `cargo xtask soak --all`, all cases are tried.

use std::io::Write as _;

/// The environment variable with the number of the third: 0, 1 or 2.
const VARIABLE: &str = "IOT_XTASK_THIRD";

/// Returns the cases of the table `name` that are tried. The others are named on stderr.
pub(crate) fn drawn<T>(name: &str, cases: Vec<T>, label: impl Fn(&T) -> String) -> Vec<T> {
    let third = std::env::var(VARIABLE).ok().map(|text| text.parse().unwrap());
    let (tried, skipped): (Vec<_>, Vec<_>) =
        cases.into_iter().enumerate().partition(|(index, _)| is_in(third, *index));
    if !skipped.is_empty() {
        let labels: Vec<_> = skipped.iter().map(|(_, case)| label(case)).collect();
        note(&format!("{name}: skipped by the draw: {}", labels.join(", ")));
    }
    tried.into_iter().map(|(_, case)| case).collect()
}

#[expect(
    clippy::explicit_write,
    reason = "unlike eprintln, this is not captured, so a test that passes prints it too"
)]
fn note(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap();
}

fn is_in(third: Option<usize>, index: usize) -> bool {
    assert!(third.is_none_or(|third| third < 3), "{VARIABLE} is 0, 1 or 2");
    third.is_none_or(|third| index % 3 == third)
}

#[test]
fn each_case_is_in_one_third_and_without_a_draw_all_are_tried() {
    for index in 0..100 {
        assert_eq!((0..3).filter(|third| is_in(Some(*third), index)).count(), 1, "{index}");
        assert!(is_in(None, index));
    }
}
