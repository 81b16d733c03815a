//! What changed between two texts, as `diff -U0` prints it.

use std::fmt::Write as _;

/// One line of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step<'a> {
    Same,
    Old(&'a str),
    New(&'a str),
}

/// The hunks that make `new` of `old`, below a header that names the file; empty where they are equal.
pub(super) fn unified(name: &str, old: &str, new: &str) -> String {
    if old == new {
        return String::new();
    }
    let mut text = format!("--- {name}\n+++ {name}\n");
    let (mut old_line, mut new_line) = (0, 0);
    for hunk in steps(old, new).chunk_by(|a, b| (*a == Step::Same) == (*b == Step::Same)) {
        let count = |wanted: fn(&Step<'_>) -> bool| hunk.iter().filter(|step| wanted(step)).count();
        let removed = count(|step| matches!(step, Step::Old(_)));
        let added = count(|step| matches!(step, Step::New(_)));
        if removed + added == 0 {
            old_line += hunk.len();
            new_line += hunk.len();
            continue;
        }
        // A side without lines is named by the line before it.
        let start = |line: usize, count: usize| line + usize::from(count > 0);
        let (from, to) = (start(old_line, removed), start(new_line, added));
        _ = writeln!(text, "@@ -{from},{removed} +{to},{added} @@");
        for step in hunk {
            match step {
                Step::Old(line) => _ = writeln!(text, "-{line}"),
                Step::New(line) => _ = writeln!(text, "+{line}"),
                Step::Same => {}
            }
        }
        old_line += removed;
        new_line += added;
    }
    text
}

/// A longest common subsequence of the lines, walked from the start; of a change, the old lines come first.
fn steps<'a>(old: &'a str, new: &'a str) -> Vec<Step<'a>> {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let mut common = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut steps = Vec::new();
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            steps.push(Step::Same);
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            steps.push(Step::Old(old[i]));
            i += 1;
        } else {
            steps.push(Step::New(new[j]));
            j += 1;
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hunks_are_those_of_diff_u0() {
        let old = "a\nb\nc\nd\ne\n";
        let table = [
            ("a\nb\nc\nd\ne\n", ""),
            ("a\nB\nC\nd\ne\n", "@@ -2,2 +2,2 @@\n-b\n-c\n+B\n+C\n"),
            ("a\nb\nd\ne\nf\n", "@@ -3,1 +2,0 @@\n-c\n@@ -5,0 +5,1 @@\n+f\n"),
            ("b\nc\nd\nE\n", "@@ -1,1 +0,0 @@\n-a\n@@ -5,1 +4,1 @@\n-e\n+E\n"),
        ];
        for (new, hunks) in table {
            let header = if hunks.is_empty() { "" } else { "--- f\n+++ f\n" };
            assert_eq!(unified("f", old, new), format!("{header}{hunks}"));
        }
    }
}
