//! Checks the house rules in every Rust file of the workspace.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Returns the path of every Rust file, relative to the workspace's root, and its text.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut directories = ["agent", "xtask"].map(|name| root().join(name)).to_vec();
    while let Some(directory) = directories.pop() {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 30, "the sources are not in the directories that this test reads");
    found
}

/// Returns the lines of a file without its tests and comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let end =
        text.find("#[cfg(test)]\nmod tests").or_else(|| text.find("#[cfg(test)]\npub(crate) mod tests"));
    text[..end.unwrap_or(text.len())].lines().filter(|line| !line.trim_start().starts_with("//"))
}

fn offenders(offends: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let own = |name: &str| name == "xtask/tests/tidy.rs";
    sources()
        .into_iter()
        .filter(|(name, text)| !own(name) && offends(name, text))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn every_module_says_what_it_is_for() {
    assert_eq!(offenders(|_, text| !text.starts_with("//! ")), Vec::<String>::new());
}

#[test]
fn libvirt_is_named_in_one_folder() {
    let named =
        offenders(|_, text| code(text).any(|line| line.contains("virt::") && !line.contains("libvirt::")));
    let elsewhere: Vec<_> =
        named.iter().filter(|name| !name.starts_with("xtask/src/bin/xtask-vm/libvirt/")).collect();
    assert!(!named.is_empty() && elsewhere.is_empty(), "{elsewhere:?}");
}

#[test]
fn flags_stand_in_cli() {
    let flags =
        |_: &str, text: &str| code(text).any(|line| line.contains("#[arg(") || line.contains("#[command("));
    let elsewhere: Vec<_> =
        offenders(flags).into_iter().filter(|name| !name.starts_with("xtask/core/src/cli/")).collect();
    assert_eq!(elsewhere, ["agent/src/main.rs"]);
}

#[test]
fn architectures_are_told_apart_in_one_table() {
    let branches = |name: &str, text: &str| {
        name != "xtask/core/src/arch.rs"
            && name != "xtask/core/src/host/packages.rs"
            && code(text).any(|line| {
                line.contains("== VmArchitecture::") || line.contains("VmArchitecture::X86_64 =>")
            })
    };
    assert_eq!(offenders(branches), Vec::<String>::new());
}

/// The agent has one thread, and a sync takes minutes on a slow card. Two of the agent's modules sync files. Other
/// modules call their functions in a thread of its own.
#[test]
fn the_agent_waits_for_its_disk_in_threads_of_their_own() {
    const CALLS: [&str; 10] = [
        "store.save(",
        "store.sync_file_system(",
        "records.begin(",
        "records.end(",
        "records.finish(",
        "records.forget(",
        "records.interrupted(",
        "reset.finish(",
        "reset.request(",
        "reset.withdraw(",
    ];
    /// The lines that a closure of `spawn_blocking` has at most before such a call.
    const LINES: usize = 6;
    let has = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    let is_agent = |name: &str| name.starts_with("agent/src/");
    let mut syncs = offenders(|name, text| {
        is_agent(name) && code(text).any(|line| has(line, &["sync_all", "sync_data", "syncfs"]))
    });
    syncs.sort();
    assert_eq!(syncs, ["agent/src/files.rs", "agent/src/store.rs"]);
    let mut calls = 0;
    // `prepare-storage` is a program of its own.
    let is_in_loop = |name: &str| is_agent(name) && name != "agent/src/storage.rs";
    for (name, text) in sources().iter().filter(|(name, _)| is_in_loop(name)) {
        let lines: Vec<_> = code(text).collect();
        for at in (0..lines.len()).filter(|at| has(lines[*at], &CALLS)) {
            calls += 1;
            let closure = &lines[at.saturating_sub(LINES)..=at];
            assert!(closure.iter().any(|line| line.contains("spawn_blocking(")), "{name}: {}", lines[at]);
        }
    }
    assert!(calls >= CALLS.len(), "the calls have other names");
}

/// `println!` and its siblings panic if the stream is closed or its disk is full. `xtask_core::output` has functions
/// that do not.
#[test]
fn no_program_prints_with_a_macro_that_panics() {
    let prints = |name: &str, text: &str| {
        name.contains("/src/")
            && code(text).any(|line| {
                let words = line.split(|c: char| !c.is_alphanumeric() && c != '!');
                words.into_iter().any(|word| ["print!", "println!", "eprint!", "eprintln!"].contains(&word))
            })
    };
    assert_eq!(offenders(prints), Vec::<String>::new());
}

/// Checks the paths in the documents: they are in backticks and start at the workspace's root.
#[test]
fn the_documents_name_paths_that_exist() {
    let documents = ["README.md", "agent/README.md", "xtask/ARCHITECTURE.md", "xtask/CONTRIBUTING.md"];
    let mut documents = documents.map(|name| root().join(name)).to_vec();
    let pages = std::fs::read_dir(root().join("xtask/docs")).unwrap();
    documents.extend(pages.map(|page| page.unwrap().path()));
    let mut named = Vec::new();
    for document in documents {
        let text = std::fs::read_to_string(&document).unwrap();
        let spans = text.split('`').skip(1).step_by(2).map(str::to_owned);
        named.extend(spans.filter(|span| span.starts_with("xtask/") || span.starts_with("agent/")));
    }
    let is_path = |span: &String| !span.contains([' ', '*', '…', '<', '{']);
    named.retain(is_path);
    assert!(named.len() > 30, "{named:?}");
    named.retain(|path| !root().join(path).exists());
    assert_eq!(named, Vec::<String>::new());
}

/// Checks that ARCHITECTURE.md names every crate and folder. It names no files: a file in a folder is found by its
/// name.
#[test]
fn the_map_names_every_crate_and_folder() {
    let map = std::fs::read_to_string(root().join("xtask/ARCHITECTURE.md")).unwrap();
    let mut folders: Vec<_> = sources()
        .into_iter()
        .filter(|(name, _)| name.contains("/src/"))
        .filter_map(|(name, _)| Some(name.rsplit_once('/')?.0.to_owned()))
        .collect();
    folders.sort();
    folders.dedup();
    let missing: Vec<_> = folders.into_iter().filter(|folder| !map.contains(&format!("{folder}/"))).collect();
    assert_eq!(missing, Vec::<String>::new(), "xtask/ARCHITECTURE.md does not name them");
}
