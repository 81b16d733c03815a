//! `cargo xtask ci`: runs the test suite, and ends with a line that counts steps and tests. The lines before it name
//! the distributions that were not tested. In each table of similar cases, a run tries a third, which depends on the
//! commit. `cargo xtask soak --all` tries all cases.

mod draw;
mod failures;
mod runner;
mod tested;

use anyhow::{Result, ensure};

use xtask_core::arch::VmArchitecture;
use xtask_core::cli::{CiArgs, MachineArgs, PlaceArgs};
use xtask_core::error::{Failure, Verdict};
use xtask_core::job;
use xtask_core::message;
use xtask_core::output::{print, write_message};
use xtask_core::preflight::{PreflightRequest, Purpose};
use xtask_core::workspace::Workspace;

use draw::{note_skipped, split};
use runner::{Count, Runner};

/// A step: its name, and cargo's arguments, separated by spaces. `IT` stands for the tests in `xtask/tests/it/`.
type Step<'a> = (&'a str, &'a str);

const IT: &str = "test --package xtask --features vm --test it --";

const LINTS: &[Step<'_>] = &[
    ("formatting", "fmt --all --check"),
    ("clippy", "clippy --workspace --all-targets -- -D warnings"),
    (
        "clippy, every feature",
        "clippy --workspace --all-targets --features xtask/vm,iot-agent/real,xtask-archives/real,xtask-crash/real,xtask-fleet/real,xtask-images/real,xtask-reports/real -- -D warnings",
    ),
    // `completions`, `build`, `inspect`, `try` and `report` build these binaries with one feature each.
    ("clippy, completions", "clippy --package xtask --bin xtask-complete --features complete -- -D warnings"),
    ("clippy, inspect", "clippy --package xtask --bin xtask-inspect --features inspect -- -D warnings"),
    ("clippy, try", "clippy --package xtask --bin xtask-try --features try -- -D warnings"),
    ("clippy, report", "clippy --package xtask --bin xtask-report --features report -- -D warnings"),
];

const TESTS: &[Step<'_>] = &[
    ("tests", "test --workspace"),
    // These tests run a real nats-server, a real podman, a real qemu-img and real e2fsprogs.
    (
        "tests, real programs",
        "test --package xtask-archives --package xtask-crash --package xtask-fleet --package xtask-images --features xtask-archives/real,xtask-crash/real,xtask-fleet/real,xtask-images/real",
    ),
    ("tests, xtask-vm", "test --package xtask --features vm --bins"),
    ("the draw", "IT draw::"),
    ("bump", "IT bump::"),
    ("fetch", "IT fetch::"),
    ("connection", "IT connection::"),
    ("hosts with libvirt", "IT testbed::itself:: testbed::refused:: testbed::collected:: --test-threads 2"),
    ("completions", "IT completions::"),
    ("settings", "IT settings::"),
    ("broken hosts", "IT broken_hosts::"),
    ("the rehearsal", "IT rehearsal::"),
    ("several smokes", "IT several::"),
];

/// This step runs at the same time as [`TESTS`], because its tests mostly wait.
const AGENT: &[Step<'_>] = &[("the agent", AGENT_TESTS)];

/// Tests the agent with a real nats-server and a real podman. Few tests run at a time, because each starts both of
/// them.
pub(super) const AGENT_TESTS: &str =
    "test --workspace --features iot-agent/real --test device -- --test-threads 4";

/// Compares the whole cached images with their digests. A cold smoke compares only the time stamps of a cached image.
const CACHED: &[Step<'_>] = &[("cached images", "xtask image verify")];

/// The first lane of steps that run machines. The steps of a lane run one after the other. The lanes run at the same
/// time in one cache, so steps of different lanes must not use the same files. Two processors are enough for two
/// lanes. The lanes take about the same time.
const FIRST_LANE: &[Step<'_>] = &[
    ("smoke aarch64", "xtask smoke --cold --fsck --arch aarch64"),
    ("inspect", "IT inspect::"),
    ("images", "IT images:: --test-threads 2"),
    ("fresh hosts", "IT fresh_host:: --test-threads 2"),
];

/// The second lane of steps that run machines; the drawn cases of [`OTHER_IMAGES`] are added to its end.
const SECOND_LANE: &[Step<'_>] = &[
    ("smoke x86_64", "xtask smoke --cold --fsck --arch x86_64"),
    ("warm", "IT warm:: --test-threads 2"),
    ("try", "IT attempt::"),
];

/// The steps after the lanes, [`CAN_FAIL`] and [`CRASH_STATES`], run at the same time. Most of the time, most of these
/// tests wait for a boot.
const CAN_FAIL: &[Step<'_>] = &[("the smoke can fail", "IT it_can_fail:: --test-threads 2")];

const CRASH_STATES: &[Step<'_>] =
    &[("crash states", "IT torture::gate:: torture::faults::gate:: torture::a_wrong_state --test-threads 1")];

/// A table whose cases are steps. debian-13 for aarch64 is not in it, because the tests of images boot that image and
/// also look into the guest. ubuntu-shaped for x86_64 is in no step, and is built and booted by hand.
const OTHER_IMAGES: &[Step<'_>] = &[
    ("smoke aarch64 ubuntu-shaped", "xtask smoke --cold --fsck --arch aarch64 --image ubuntu-shaped"),
    ("smoke x86_64 debian-13", "xtask smoke --cold --fsck --arch x86_64 --image debian-13"),
    (
        "smoke aarch64 debian-13-16k",
        "xtask smoke --cold --fsck --arch aarch64 --image debian-13-16k --cpu pi5",
    ),
];

/// The steps that only `cargo xtask soak --all` runs.
const SOAKED: &[Step<'_>] = &[
    ("ordinary user", "IT ordinary_user::"),
    ("containers", "IT containers::"),
    ("crash states, long", "IT torture::soaked:: torture::faults::soaked:: --test-threads 1"),
    ("libvirt daemons", "IT testbed::smokes:: testbed::instance:: --test-threads 1"),
];

/// The names of the steps that contain tables.
const DRAWN: [&str; 5] = ["broken hosts", "the rehearsal", "images", "warm", "the smoke can fail"];

pub(super) fn run(workspace: &Workspace, args: &CiArgs) -> Result<()> {
    let asked = PreflightRequest {
        architectures: &VmArchitecture::ALL,
        machine: &MachineArgs::default(),
        place: &PlaceArgs::default(),
        purpose: Purpose::TestSuite,
    };
    super::ready(workspace, &asked, args.fix, false)?;
    let mut runner = Runner::new(workspace, draw::of_commit(workspace), args.strict_image);
    runner.one_by_one(LINTS);
    runner.guard();
    runner.at_once(&[TESTS, AGENT]);
    if !args.fast {
        runner.one_by_one(CACHED);
        let (tried, skipped) = split(runner.third, OTHER_IMAGES);
        note_skipped("other images", skipped.iter().map(|(name, _)| *name));
        runner.at_once(&[FIRST_LANE, &[SECOND_LANE, &tried].concat()]);
        runner.at_once(&[CAN_FAIL, CRASH_STATES]);
    }
    let count = runner.count;
    for failure in &count.failures {
        message!("failed: {failure}");
        if job::is_in_job() {
            write_message(&format!("{}\n", job::annotation("error", "cargo xtask ci", failure)));
        }
    }
    for line in last_lines(&count) {
        print(line)?;
    }
    match code(&count, args.strict_image) {
        0 => Ok(()),
        code => Err(Failure::reported(code).into()),
    }
}

fn last_lines(count: &Count) -> Vec<String> {
    let not_tested = count.not_tested.iter().map(|distribution| format!("not tested: {distribution}"));
    not_tested.chain([format!("ci: {} passed, {} failed", count.passed, count.failed)]).collect()
}

/// Returns the exit code. If only this host is at fault, nothing is known about the agent.
fn code(count: &Count, strict_image: bool) -> u8 {
    let verdict = match count.failed {
        0 if strict_image && !count.not_tested.is_empty() => Verdict::Unavailable,
        0 => Verdict::Verified,
        failed if failed == count.unavailable => Verdict::Unavailable,
        _ => Verdict::Failed,
    };
    verdict.exit_code()
}

fn steps() -> impl Iterator<Item = Step<'static>> {
    [TESTS, AGENT, CACHED, FIRST_LANE, SECOND_LANE, CAN_FAIL, CRASH_STATES].into_iter().flatten().copied()
}

/// Runs all cases of the tables of which [`run`] tries a third, and the steps that [`run`] leaves out.
pub(super) fn run_tables(workspace: &Workspace) -> Result<String> {
    let mut runner = Runner::new(workspace, None, false);
    let drawn = |(name, _): &Step<'_>| DRAWN.contains(name);
    runner.one_by_one(&steps().filter(drawn).collect::<Vec<_>>());
    runner.one_by_one(OTHER_IMAGES);
    runner.one_by_one(SOAKED);
    let Count { passed, failed, failures, .. } = runner.count;
    ensure!(failed == 0, "{failed} failed:\n{}", failures.join("\n"));
    Ok(format!("{passed} passed"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A pipeline that runs `ci` without `--fix` ends with 69, because `preflight --fix` does not install the programs
    /// that only the test suite starts.
    #[test]
    fn the_shipped_pipelines_install_what_they_need_and_accept_no_fallback_image() {
        let pipelines = [
            include_str!("../../../ci/verify.yaml"),
            include_str!("../../../ci/gitlab-ci.yml"),
            include_str!("../../../ci/Containerfile"),
        ];
        for text in pipelines {
            let commands: Vec<_> = text.lines().filter_map(|line| line.split_once("cargo xtask ")).collect();
            let commands: Vec<_> =
                commands.iter().filter(|(before, _)| !before.contains('`')).map(|(_, rest)| *rest).collect();
            assert_eq!(commands, ["ci --fix --yes --strict-image"]);
        }
    }

    #[test]
    fn a_distribution_that_was_not_tested_is_named_and_fails_a_strict_run() {
        let tested = Count { passed: 7, ..Count::default() };
        assert_eq!((last_lines(&tested), code(&tested, true)), (vec!["ci: 7 passed, 0 failed".into()], 0));
        let ubuntu = "ubuntu-24.04 for aarch64 (cloud-images.ubuntu.com cannot be reached)".to_owned();
        let fallback = Count { not_tested: vec![ubuntu], ..tested };
        let lines = last_lines(&fallback);
        assert_eq!(
            lines,
            [
                "not tested: ubuntu-24.04 for aarch64 (cloud-images.ubuntu.com cannot be reached)",
                "ci: 7 passed, 0 failed"
            ]
        );
        assert_eq!((code(&fallback, false), code(&fallback, true)), (0, 69));
        let strict = Count { failed: 1, unavailable: 1, ..fallback };
        assert_eq!(code(&strict, true), 69);
        assert_eq!(code(&Count { failed: 2, ..strict }, true), 1);
    }

    /// Fails if a step names a module that does not exist, or if no step names a module.
    #[test]
    fn every_module_of_the_integration_tests_is_a_step() {
        let main = include_str!("../../tests/it/main.rs");
        let modules = main.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
        let modules: BTreeSet<_> = modules.filter(|module| *module != "scratch").collect();
        let module = |(_, arguments): Step<'static>| arguments.strip_prefix("IT ")?.split("::").next();
        let named: BTreeSet<_> = steps().chain(SOAKED.iter().copied()).filter_map(module).collect();
        assert_eq!(named, modules);
        let names: Vec<_> = steps().map(|(name, _)| name).collect();
        assert!(DRAWN.iter().all(|name| names.contains(name)), "{names:?}");
    }
}
