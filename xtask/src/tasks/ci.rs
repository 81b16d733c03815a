//! `cargo xtask ci`: everything that must hold, and a last line that counts.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result};

use xtask_core::arch::VmArchitecture;
use xtask_core::cli::{CiArgs, MachineArgs};
use xtask_core::error::Failure;
use xtask_core::format::human_seconds;
use xtask_core::preflight::PreflightRequest;
use xtask_core::workspace::Workspace;

/// `xtask`'s dependencies may not be more than this; each one costs a bare machine time.
const MOST_CRATES: usize = 66;

/// The features of all crates.
const EVERYTHING: &str = "xtask/vm,iot-agent/real,xtask-fleet/real,xtask-images/real";

/// With a real nats-server and a real qemu-img.
const REAL_TESTS: &[&str] = &[
    "test",
    "--package",
    "xtask-fleet",
    "--package",
    "xtask-images",
    "--features",
    "xtask-fleet/real,xtask-images/real",
];

/// The agent against a real nats-server and a real podman. Few at a time: each has both of its own.
pub(super) const AGENT_TESTS: &[&str] = &[
    "test",
    "--package",
    "iot-agent",
    "--features",
    "real",
    "--test",
    "device",
    "--",
    "--test-threads",
    "3",
];

/// Passed and failed, of steps and of tests.
#[derive(Debug, Default)]
struct Count {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
}

pub(super) fn run(workspace: &Workspace, args: &CiArgs) -> Result<()> {
    let asked = PreflightRequest {
        architectures: &VmArchitecture::ALL,
        machine: &MachineArgs::default(),
        for_ci: true,
    };
    super::ready(workspace, &asked, args.fix)?;
    let mut count = Count::default();
    let lints = ["--all-targets", "--", "-D", "warnings"];
    let vm = ["--features", "vm"];
    let on = |base: &[&'static str], rest: &[&'static str]| [base, rest].concat();

    count.step(workspace, "formatting", &["fmt", "--all", "--check"]);
    count.step(workspace, "clippy", &on(&["clippy", "--workspace"], &lints));
    let everything = ["clippy", "--workspace", "--features", EVERYTHING];
    count.step(workspace, "clippy, every feature", &on(&everything, &lints));
    // As `completions` builds it; all else has it among `xtask-vm`'s features.
    let complete = ["clippy", "--package", "xtask", "--bin", "xtask-complete", "--features", "complete"];
    count.step(workspace, "clippy, completions", &on(&complete, &["--", "-D", "warnings"]));
    count.guard(workspace);
    count.step(workspace, "tests", &["test", "--workspace"]);
    count.step(workspace, "tests, real programs", REAL_TESTS);
    count.step(workspace, "tests, xtask-vm", &on(&["test", "--package", "xtask"], &on(&vm, &["--bins"])));
    let test = on(&["test", "--package", "xtask"], &on(&vm, &["--test", "it", "--"]));
    let quick = ["draw::", "bump::", "fetch::", "connection::", "completions::"];
    count.step(workspace, "tests, without machines", &on(&test, &quick));
    count.step(workspace, "broken hosts", &on(&test, &["broken_hosts::"]));
    count.step(workspace, "the rehearsal", &on(&test, &["rehearsal::"]));
    count.step(workspace, "the agent", AGENT_TESTS);
    if !args.fast {
        let smoke = |arch, image: Option<&'static str>| {
            let image_words = image.map_or(Vec::new(), |image| vec!["--image", image]);
            let name = format!("smoke {arch} {}", image.unwrap_or_default());
            (
                name.trim_end().to_owned(),
                on(&["xtask", "smoke", "--cold", "--fsck", "--arch", arch], &image_words),
            )
        };
        // Two at once, in one cache: they must not meet. Two machines are what two processors carry.
        count.at_once(workspace, &["aarch64", "x86_64"].map(|arch| smoke(arch, None)));
        // debian-13's aarch64 twin is among the tests of images, which look into the guest too; ubuntu-shaped for x86_64 is built and
        // booted by hand.
        let others = [smoke("aarch64", Some("ubuntu-shaped")), smoke("x86_64", Some("debian-13"))];
        count.at_once(workspace, &others);
        let threads = ["--test-threads", "2"];
        let inspect = ("inspect".to_owned(), on(&test, &["inspect::"]));
        let fresh = ("fresh hosts".to_owned(), on(&test, &on(&["fresh_host::"], &threads)));
        count.at_once(workspace, &[inspect, fresh]);
        // The two that take longest: one builds, the other boots.
        let images = ("images".to_owned(), on(&test, &on(&["images::"], &threads)));
        let warm = ("warm".to_owned(), on(&test, &["warm::"]));
        count.at_once(workspace, &[images, warm]);
        // Most of them wait for a boot most of the time.
        let threads = ["--test-threads", "3"];
        count.step(workspace, "the smoke can fail", &on(&test, &on(&["it_can_fail::"], &threads)));
    }
    for failure in &count.failures {
        eprintln!("failed: {failure}");
    }
    println!("ci: {} passed, {} failed", count.passed, count.failed);
    if count.failed == 0 { Ok(()) } else { Err(Failure::reported(1).into()) }
}

impl Count {
    /// One cargo command, its output passed on; the tests that it counts are counted.
    fn step(&mut self, workspace: &Workspace, name: &str, arguments: &[&str]) {
        self.at_once(workspace, &[(name.to_owned(), arguments.to_vec())]);
    }

    /// Several at once, each line with its step's name before it: an emulated machine leaves much of two processors idle while it
    /// waits.
    fn at_once(&mut self, workspace: &Workspace, steps: &[(String, Vec<&str>)]) {
        let alone = steps.len() == 1;
        let ends: Vec<_> = std::thread::scope(|scope| {
            let started: Vec<_> = steps
                .iter()
                .map(|(name, arguments)| {
                    eprintln!("== {name}: cargo {}", arguments.join(" "));
                    let label = if alone { String::new() } else { format!("[{name}] ") };
                    scope.spawn(move || {
                        (Instant::now(), run_cargo(workspace, arguments, &label), Instant::now())
                    })
                })
                .collect();
            started.into_iter().map(|thread| thread.join().expect("a step does not panic")).collect()
        });
        for ((name, _), (started, (tests, result), ended)) in steps.iter().zip(ends) {
            self.passed += tests.passed;
            self.failed += tests.failed;
            let seconds = human_seconds(ended.duration_since(started).as_secs_f64());
            self.close(name, &seconds, result);
        }
    }

    fn close(&mut self, name: &str, seconds: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                eprintln!("== {name}: passed in {seconds}");
            }
            Err(error) => {
                self.failed += 1;
                eprintln!("== {name}: FAILED in {seconds}: {error:#}");
                self.failures.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// `xtask` stays light: few crates, and nothing that links libvirt.
    fn guard(&mut self, workspace: &Workspace) {
        let name = "dependencies of xtask";
        let tree = workspace
            .cargo()
            .args(["tree", "--package", "xtask", "--edges", "normal", "--prefix", "none"])
            .output()
            .context("run cargo tree");
        let checked = tree.and_then(|output| check_tree(&String::from_utf8_lossy(&output.stdout)));
        if let Ok(crates) = &checked {
            eprintln!("== {name}: {crates} crates (limit {MOST_CRATES}), no virt-sys");
        }
        self.close(name, "no time", checked.map(drop));
    }
}

/// Runs it; how many tests it counted, and how it ended.
fn run_cargo(workspace: &Workspace, arguments: &[&str], label: &str) -> (Count, Result<()>) {
    let mut tests = Count::default();
    let result = count_tests(workspace, arguments, label, &mut tests);
    (tests, result)
}

fn count_tests(workspace: &Workspace, arguments: &[&str], label: &str, tests: &mut Count) -> Result<()> {
    let line = format!("cargo {}", arguments.join(" "));
    let stderr = if label.is_empty() { Stdio::inherit() } else { Stdio::piped() };
    let mut child = workspace
        .cargo()
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("run {line}"))?;
    let stdout = child.stdout.take().context("the child's output was asked for")?;
    let stderr = child.stderr.take();
    std::thread::scope(|scope| {
        let passing = stderr.map(|stderr| scope.spawn(move || pass_on(stderr, label, |_| {})));
        pass_on(stdout, label, |text| {
            if let Some((passed, failed)) = test_result(text) {
                tests.passed += passed;
                tests.failed += failed;
            }
        })?;
        passing.map_or(Ok(()), |thread| thread.join().expect("reading lines does not panic"))
    })
    .with_context(|| format!("read what {line} prints"))?;
    let status = child.wait().with_context(|| format!("wait for {line}"))?;
    anyhow::ensure!(status.success(), "{status}");
    Ok(())
}

/// Prints each line behind `label`, once `look` has seen it.
fn pass_on(from: impl std::io::Read, label: &str, mut look: impl FnMut(&str)) -> Result<()> {
    for text in BufReader::new(from).lines() {
        let text = text.context("read a line")?;
        look(&text);
        eprintln!("{label}{text}");
    }
    Ok(())
}

/// How many crates `cargo tree --prefix none` names.
fn check_tree(tree: &str) -> Result<usize> {
    let crates: BTreeSet<&str> =
        tree.lines().map(|line| line.trim_end_matches(" (*)")).filter(|line| !line.is_empty()).collect();
    anyhow::ensure!(!crates.is_empty(), "cargo tree names no crate");
    let linked = crates.iter().find(|name| name.starts_with("virt-sys"));
    anyhow::ensure!(linked.is_none(), "xtask links {linked:?}: it must build without libvirt");
    let count = crates.len();
    anyhow::ensure!(count <= MOST_CRATES, "{count} crates, the limit is {MOST_CRATES}");
    Ok(count)
}

/// `test result: ok. 5 passed; 0 failed; …`
fn test_result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|part| part.split(' ').next()?.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_as_the_test_runner_prints_them() {
        let line = "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(test_result(line), Some((5, 2)));
        assert_eq!(test_result("test agent::tests::works ... ok"), None);
    }

    #[test]
    fn the_guard_can_fail() {
        assert_eq!(check_tree("xtask v0.1.0\nanyhow v1.0\nanyhow v1.0 (*)\n").unwrap(), 2);
        assert!(check_tree("xtask v0.1.0\nvirt-sys v0.3.2\n").unwrap_err().to_string().contains("virt-sys"));
        let many: String = (0..=MOST_CRATES).map(|i| format!("crate{i} v1.0\n")).collect();
        assert!(check_tree(&many).unwrap_err().to_string().contains("67 crates"));
        assert!(check_tree("").is_err());
    }
}
