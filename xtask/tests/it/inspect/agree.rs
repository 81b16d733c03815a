//! Reads executables with readelf(1), for comparison.

use std::path::Path;
use std::process::Command;

/// Returns readelf's output for a file.
pub(crate) fn readelf(path: &Path, what: &str) -> String {
    let output =
        Command::new("readelf").args(["--wide", what]).arg(path).env("LC_ALL", "C").output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns the text between `before` and the next `]`, for each line that contains `before`.
pub(crate) fn bracketed<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(before)?.1.split_once(']').map(|(inner, _)| inner))
        .collect()
}
