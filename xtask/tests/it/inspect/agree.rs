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

/// Returns objdump's text of the instruction at an address.
pub(crate) fn disassembly(path: &Path, address: u64, names: &str) -> String {
    let output = Command::new("aarch64-linux-gnu-objdump")
        .args(["-d", "--no-show-raw-insn", "-M", names])
        .arg(format!("--start-address={address:#x}"))
        .arg(format!("--stop-address={:#x}", address + 4))
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}
