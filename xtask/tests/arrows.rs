//! Checks that imports point one way. The files of `core` must not import each other in a circle, and neither must the
//! folders of `xtask-vm`. In `core`, `lib.rs` lists the modules in their order. Between crates, cargo rejects circles
//! of normal dependencies. The last test finds circles that a dev-dependency closes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The text of each file, by its module path: `["preflight", "fix"]`.
type Files = BTreeMap<Vec<String>, String>;
/// For each file, the other files that it names.
type Arrows = BTreeMap<Vec<String>, BTreeSet<Vec<String>>>;

/// The folders of `xtask-vm`. Each folder uses only those before it, and `main.rs` uses all of them.
const FOLDERS: [&str; 8] = ["background", "guest", "libvirt", "vm", "smoke", "bench", "preflight", "several"];

/// Reads the files below `root`, without the tests in them.
fn files(root: &Path) -> Files {
    let mut found = Files::new();
    let mut directories = vec![(root.to_owned(), Vec::new())];
    while let Some((directory, module)) = directories.pop() {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let mut module: Vec<String> = module.clone();
            if path.is_dir() {
                module.push(name);
                directories.push((path, module));
            } else if path.extension().is_some_and(|ending| ending == "rs") && name != "tests" {
                if !["mod", "lib", "main"].contains(&name.as_str()) {
                    module.push(name);
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
                found.insert(module, text[..end].to_owned());
            }
        }
    }
    found
}

/// Returns each path of a `use` tree: `a::{b, c::{d, e}}` has three.
fn paths(tree: &str) -> Vec<String> {
    let Some((head, rest)) = tree.split_once('{') else { return vec![tree.trim().to_owned()] };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inner.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            parts.push(String::new());
        } else {
            parts.last_mut().unwrap().push(c);
        }
    }
    let head = head.trim();
    parts.iter().flat_map(|part| paths(part)).map(|path| format!("{head}{path}")).collect()
}

/// Returns every path that code names, in a `use` or in an expression.
fn named(text: &str) -> Vec<String> {
    let code: Vec<_> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join(" ");
    let mut named = Vec::new();
    for (at, _) in code.match_indices("use ") {
        named.extend(paths(code[at + 4..].split(';').next().unwrap()));
    }
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    named.extend(code.split(|c| !is_path(c)).filter(|word| word.contains("::")).map(str::to_owned));
    named
}

/// Returns the file to which a path in `module` leads: the longest beginning of the path that names a file.
fn target(files: &Files, module: &[String], path: &str) -> Option<Vec<String>> {
    let mut words = path.split("::").map(str::trim).peekable();
    let mut at = match words.peek()? {
        &"crate" => Vec::new(),
        &("self" | "super") => module.to_vec(),
        first if files.contains_key(&[module, &[(*first).to_owned()]].concat()) => module.to_vec(),
        _ => return None,
    };
    while let Some(word) = words.next_if(|word| ["crate", "self", "super"].contains(word)) {
        if word == "super" {
            at.pop();
        }
    }
    let mut found = files.contains_key(&at).then(|| at.clone());
    for word in words {
        at.push(word.to_owned());
        if !files.contains_key(&at) {
            break;
        }
        found = Some(at.clone());
    }
    found
}

fn arrows(files: &Files) -> Arrows {
    let of = |(module, text): (&Vec<String>, &String)| {
        let targets = named(text).into_iter().filter_map(|path| target(files, module, &path));
        (module.clone(), targets.filter(|target| target != module).collect())
    };
    files.iter().map(of).collect()
}

/// Repeatedly removes every file that names none of the remaining files. The rest are the circles and the files that
/// lead into them.
fn circles(mut arrows: Arrows) -> Arrows {
    loop {
        let left: BTreeSet<_> = arrows.keys().cloned().collect();
        for targets in arrows.values_mut() {
            targets.retain(|target| left.contains(target));
        }
        let before = arrows.len();
        arrows.retain(|_, targets| !targets.is_empty());
        if arrows.len() == before {
            return arrows;
        }
    }
}

/// Returns the imports that point upward, if each module of `order` may use only those before it.
fn upward(arrows: &Arrows, order: &[String]) -> Vec<String> {
    let place = |module: &[String]| order.iter().position(|name| Some(name) == module.first());
    let mut upward = Vec::new();
    for (from, targets) in arrows {
        for to in targets {
            if let (Some(own), Some(other)) = (place(from), place(to))
                && own < other
            {
                upward.push(format!("{} -> {}", from.join("::"), to.join("::")));
            }
        }
    }
    upward
}

fn of_text(files: &[(&str, &str)]) -> Files {
    let module = |name: &str| name.split('/').map(str::to_owned).collect();
    files.iter().map(|(name, text)| (module(name), (*text).to_owned())).collect()
}

#[test]
fn a_circle_is_found_and_named() {
    let files = of_text(&[
        ("a", "use crate::b::{self, inner::X as _};"),
        ("b", "fn f() { super::c::g() }"),
        ("b/inner", "// use crate::a;\nuse std::fs;"),
        ("c", "use crate::{d, a::Y};"),
        ("d", ""),
    ]);
    let found = circles(arrows(&files));
    let names: Vec<_> = found.keys().map(|module| module.join("::")).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let order = ["d", "c", "b", "a"].map(str::to_owned);
    assert_eq!(upward(&arrows(&files), &order), ["c -> a"]);
    let sound = of_text(&[("a", "use crate::b::X;"), ("b", "use crate::d;"), ("d", "use serde::a;")]);
    assert!(circles(arrows(&sound)).is_empty());
}

#[test]
fn the_files_of_core_form_no_circle_and_stand_in_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("core/src");
    let mut files = files(&root);
    let library = files.remove(&Vec::new()).unwrap();
    assert!(files.len() > 30, "core is not in the directory that this test reads");
    let arrows = arrows(&files);
    assert!(arrows.values().map(BTreeSet::len).sum::<usize>() > 100, "the imports of core were not read");
    assert_eq!(circles(arrows.clone()), Arrows::new());
    let listed = library.split("```text").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let order: Vec<_> = listed.split_whitespace().filter(|word| *word != "//!").map(str::to_owned).collect();
    assert!(files.keys().all(|module| order.contains(&module[0]) || module[0] == "golden"), "{order:?}");
    assert_eq!(upward(&arrows, &order), Vec::<String>::new());
}

#[test]
fn the_folders_of_xtask_vm_form_no_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/xtask-vm");
    let arrows = arrows(&files(&root));
    let order = FOLDERS.map(str::to_owned);
    let unknown = arrows.keys().find(|module| module.first().is_some_and(|folder| !order.contains(folder)));
    assert_eq!(unknown, None, "add this folder to FOLDERS");
    assert_eq!(upward(&arrows, &order), Vec::<String>::new());
}

/// Returns the dependencies between the crates of the workspace, including dev-dependencies.
fn crates(metadata: &serde_json::Value) -> Arrows {
    let name = |value: &serde_json::Value| vec![value["name"].as_str().unwrap().to_owned()];
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            (name(package), dependencies.filter(|one| one["path"].is_string()).map(name).collect())
        })
        .collect()
}

#[test]
fn the_crates_form_no_circle_in_their_tests_either() {
    let arguments = ["metadata", "--no-deps", "--format-version", "1", "--offline"];
    let output = std::process::Command::new(env!("CARGO")).args(arguments).output().unwrap();
    let mut metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = crates(&metadata);
    assert!(found.len() > 8, "{found:?}");
    assert_eq!(circles(found), Arrows::new());
    // Add a dev-dependency of the lowest crate on the highest one.
    let packages = metadata["packages"].as_array_mut().unwrap();
    let core = packages.iter_mut().find(|package| package["name"] == "xtask-core").unwrap();
    let dev = serde_json::json!({ "name": "xtask-images", "kind": "dev", "path": "/w/xtask/images" });
    core["dependencies"].as_array_mut().unwrap().push(dev);
    assert!(circles(crates(&metadata)).contains_key(&vec!["xtask-core".to_owned()]));
}
