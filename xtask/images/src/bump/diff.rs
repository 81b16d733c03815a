//! Shows the difference between two texts as `diff -U0` does.

use similar::TextDiff;

/// Returns the hunks that turn `old` into `new`, below a header that names the file; empty if both are equal.
pub(super) fn unified(name: &str, old: &str, new: &str) -> String {
    TextDiff::from_lines(old, new).unified_diff().context_radius(0).header(name, name).to_string()
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
            ("a\nb\nd\ne\nf\n", "@@ -3 +2,0 @@\n-c\n@@ -5,0 +5 @@\n+f\n"),
            ("b\nc\nd\nE\n", "@@ -1 +0,0 @@\n-a\n@@ -5 +4 @@\n-e\n+E\n"),
        ];
        for (new, hunks) in table {
            let header = if hunks.is_empty() { "" } else { "--- f\n+++ f\n" };
            assert_eq!(unified("f", old, new), format!("{header}{hunks}"));
        }
    }
}
