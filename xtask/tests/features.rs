//! cargo compiles a crate once for `xtask`, `xtask-vm` and the tests only if all of them ask it for the same features. A crate with
//! other features is compiled again, with all that depends on it: half a minute of a first run, and more of the test suite.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// The selections that cargo is run with, as `xtask/src/tasks/` does.
const SELECTIONS: [&[&str]; 3] = [
    &["--package", "xtask", "--edges", "normal"],
    &["--package", "xtask", "--features", "vm", "--edges", "normal,dev"],
    &["--workspace", "--edges", "normal,dev"],
];

/// The features that a selection has a crate of a registry compiled with. What only build scripts and macros use is left
/// out: cargo resolves that apart.
fn features(selection: &[&str]) -> BTreeMap<String, String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none", "--format", "{p}|{f}", "--edges", "no-proc-macro"])
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

/// The crates that two selections have compiled differently.
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
    // The agent as it ships is compiled apart, with the features that it needs alone.
    let trees = [SELECTIONS[2], &["--package", "iot-agent", "--edges", "normal"]].map(features);
    let found = differing(&trees);
    assert!(found.iter().any(|name| name.starts_with("hyper-util ")), "{found:?}");
}
