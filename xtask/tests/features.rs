//! Checks that `xtask`, `xtask-vm` and the tests select the same features of each crate. Only then does cargo compile
//! the crate once. With other features, cargo compiles the crate again, and all crates that depend on it. This would
//! make a first run half a minute longer, and the test suite still longer.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// The selections of the binaries and of most tests. The features that only one step uses (`inspect`, `complete`,
/// `real`) select features of this workspace alone, or a part of those of `vm`.
const SELECTIONS: [&[&str]; 3] = [
    &["--package", "xtask", "--edges", "normal"],
    &["--package", "xtask", "--features", "vm", "--edges", "normal,dev"],
    &["--workspace", "--edges", "normal,dev"],
];

/// Returns the features of each registry crate in a selection. Crates that only build scripts and macros use are left
/// out, because cargo resolves their features separately.
fn features(selection: &[&str]) -> BTreeMap<String, String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--color",
            "never",
            "--offline",
            "--prefix",
            "none",
            "--format",
            "{p}|{f}",
            "--edges",
            "no-proc-macro",
        ])
        .args(selection)
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = tree.lines().filter_map(|line| line.trim_end_matches(" (*)").split_once('|'));
    lines
        .filter(|(name, _)| !name.contains(" (/"))
        .map(|(name, features)| (name.to_owned(), features.to_owned()))
        .collect()
}

/// Returns the crates that two selections compile with different features.
fn differing(trees: &[BTreeMap<String, String>]) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (tree, other) in trees.iter().flat_map(|tree| trees.iter().map(move |other| (tree, other))) {
        found.extend(
            tree.iter()
                .filter(|(name, of)| other.get(*name).is_some_and(|found| found != *of))
                .map(|(name, _)| name.as_str()),
        );
    }
    found
}

#[test]
fn each_crate_is_compiled_once() {
    let trees = SELECTIONS.map(features);
    assert!(trees[0].len() > 20, "{:?}", trees[0]);
    assert_eq!(differing(&trees), BTreeSet::new(), "name the feature in xtask/core/Cargo.toml");
}

#[test]
fn another_feature_is_found() {
    // The agent that ships is compiled separately, with only the features that it needs.
    let trees = [SELECTIONS[2], &["--package", "iot-agent", "--edges", "normal"]].map(features);
    let found = differing(&trees);
    assert!(found.iter().any(|name| name.starts_with("hyper-util ")), "{found:?}");
}
