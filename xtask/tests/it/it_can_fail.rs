//! Tests that a smoke can fail, on real machines. Every check of the smoke must fail on a suitable fault, name the
//! right phase, a cause and a remedy, and leave nothing behind. `cargo xtask ci` runs these tests after a preflight.

use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use clap::ValueEnum as _;
use rustix::process::{Pid, Signal};
use xtask_core::cache::Cache;
use xtask_core::cli::Sabotage;
use xtask_core::error::Verdict;
use xtask_core::fs::directories;
use xtask_core::processes::processes_naming;
use xtask_core::report::{Phase, PhaseStatus, Report};

use crate::scratch::{Scratch, XTASK, XTASK_VM, assert_code, command, message, signal, wait_until};

mod disturbance;
mod sabotage;

/// A finished smoke: its output, its report, and the directory with the report.
struct Ended {
    output: Output,
    report: Report,
    directory: PathBuf,
}

impl Ended {
    fn message(&self) -> String {
        message(&self.output)
    }
}

const SMOKE: [&str; 5] = ["smoke", "--arch", "aarch64", DEBIAN_12[0], DEBIAN_12[1]];
/// The arguments that name the machine of most smokes.
const DEBIAN_12: [&str; 2] = ["--image", "debian-12"];

/// Runs a smoke of the aarch64 guest with `arguments`. It starts from a snapshot, except with faults of the first boot.
fn smoke(arguments: &[&str]) -> Ended {
    ended(command(XTASK_VM, &[&SMOKE, arguments].concat()).output().unwrap())
}

/// Reads the report of a smoke. The line `report: ` of the output has the path of its page, which is in the run's
/// directory.
fn ended(output: Output) -> Ended {
    let message = message(&output);
    let path =
        message.lines().find_map(|line| line.strip_prefix("report: ")).unwrap_or_else(|| panic!("{message}"));
    let directory = Path::new(path).parent().unwrap().to_owned();
    Ended { output, report: Report::read(&directory).unwrap(), directory }
}

/// Checks that a smoke exited with 1 in `phase`, with `words` and a remedy, and that nothing of the run is left.
fn assert_fails(ended: &Ended, phase: Phase, words: &str) {
    let message = ended.message();
    assert_code(&ended.output, 1);
    assert_eq!(ended.report.verdict, Verdict::Failed, "{message}");
    let failure = ended.report.failure.as_ref().unwrap();
    assert_eq!(failure.phase, phase, "{message}");
    let described = format!("{} {}", failure.error, failure.causes.join(" "));
    assert!(described.contains(words), "{described:?} does not say {words:?}");
    assert!(failure.hint.is_some(), "no remedy: {message}");
    assert!(message.contains(&failure.error), "the screen does not say what the report says");
    assert_nothing_left(&Cache::from_env().unwrap(), &ended.report.run_id);
}

/// Checks that no process, such as QEMU or nats-server, names the run's working directory, and that the directory is
/// deleted.
fn assert_nothing_left(cache: &Cache, run_id: &str) {
    let run = cache.runs().join(run_id);
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.join("w").exists(), "{} is left", run.display());
}

fn skipped(report: &Report, phase: Phase) -> bool {
    report.phases.iter().any(|done| done.name == phase && done.status == PhaseStatus::Skipped)
}

#[test]
fn a_wrong_value_is_a_usage_error_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let table: &[(&[&str], &str)] = &[
        (&["--image", "ubuntu-95"], "there are: ubuntu-24.04"),
        (&["--image", "./not-there.qcow2", "--unverified"], "./not-there.qcow2"),
        (&["--image", "https://host/disk.img"], "--image-digest"),
        (&["--image-digest", "md5:0"], "64 hex digits"),
        (&["--cpu", "z80"], "cortex-a76"),
        (&["--cpu", "host"], "it needs KVM"),
        (&["--accel", "kvm"], "leave --accel out"),
        (&["--agent", "/nonexistent/agent"], "/nonexistent/agent"),
        (&["--report", file], "cannot write to the directory"),
        (&["--profile", "fastest"], "no such cargo profile"),
        (&["--memory", "1"], "512..=65536"),
        (&["--vcpus", "99"], "1..=16"),
        (&["--timeout-scale", "0"], "0.1 to 100"),
        (&["--arch", "mips"], "possible values"),
        (&["--sabotage", "small-pages", "--image", "debian-13"], "--image debian-13-16k"),
    ];
    for (arguments, words) in table {
        let arch: &[&str] = if arguments.contains(&"--arch") { &[] } else { &["--arch", "aarch64"] };
        let output = command(XTASK, &[&["smoke"], arch, arguments].concat()).output().unwrap();
        let message = message(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message:?} does not say {words:?}");
    }
}

#[test]
fn a_usage_error_leaves_a_report_too() {
    let directory = tempfile::tempdir().unwrap();
    let reports = directory.path().join("reports");
    let arguments =
        [&SMOKE[..], &["--agent", "/nonexistent", "--report", reports.to_str().unwrap()]].concat();
    assert_code(&command(XTASK, &arguments).output().unwrap(), 2);
    let report: Report =
        serde_json::from_slice(&std::fs::read(reports.join("report.json")).unwrap()).unwrap();
    assert_eq!(report.exit_code, 2);
}

#[test]
fn a_cache_that_cannot_be_used_is_the_hosts_fault_and_leaves_a_report() {
    let directory = tempfile::tempdir().unwrap();
    let (file, reports) = (directory.path().join("file"), directory.path().join("reports"));
    std::fs::write(&file, "").unwrap();
    for cache in [file.as_path(), Path::new("relative")] {
        let arguments = [&SMOKE[..], &["--report", reports.to_str().unwrap()]].concat();
        let output = command(XTASK_VM, &arguments).env("IOT_XTASK_CACHE", cache).output().unwrap();
        assert_code(&output, 69);
        assert!(message(&output).contains("what to do: "), "{}", message(&output));
        let path = reports.join("report.json");
        let report: Report = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((report.exit_code, report.verdict), (69, Verdict::Unavailable));
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn each_planted_fault_has_a_test() {
    use Sabotage::{BrokerRefuses, ColdPanics, KernelPanic, OpenNetwork, StaleChain};
    let elsewhere = [BrokerRefuses, ColdPanics, KernelPanic, OpenNetwork, StaleChain];
    for fault in Sabotage::value_variants() {
        assert!(sabotage::FOUND.contains(fault) || elsewhere.contains(fault), "{fault:?}");
    }
}

fn start(scratch: &Scratch) -> Child {
    scratch.xtask_vm(&SMOKE).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the guest of the only run has printed `sign`. Returns the run's directory.
fn wait_for_console(scratch: &Scratch, child: &mut Child, sign: &str) -> PathBuf {
    let mut found = None;
    wait_until(&format!("{sign:?} on the console"), Duration::from_secs(600), || {
        assert_eq!(child.try_wait().unwrap(), None, "the smoke ended before {sign:?}");
        let says = |run: &PathBuf| {
            let text = std::fs::read(run.join("console.log")).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(sign)
        };
        found = directories(&scratch.cache().join("runs")).into_iter().find(says);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn the_first_ctrl_c_tears_down_in_order() {
    let scratch = Scratch::with_images();
    let mut child = start(&scratch);
    let run = wait_for_console(&scratch, &mut child, "Linux version");
    assert!(!processes_naming(&run.join("w")).is_empty(), "neither QEMU nor the broker runs");
    signal(&child, Signal::INT);
    let ended = ended(child.wait_with_output().unwrap());
    assert_code(&ended.output, 130);
    assert_eq!(ended.report.verdict, Verdict::Interrupted);
    let last = ended.report.phases.last().unwrap();
    assert_eq!((last.name, last.status), (Phase::Teardown, PhaseStatus::Passed));
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.join("w").exists());
}

#[test]
fn what_a_killed_run_left_is_collected_by_the_next_one() {
    let scratch = Scratch::with_images();
    let mut child = start(&scratch);
    let run = wait_for_console(&scratch, &mut child, "Linux version");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!processes_naming(&run.join("w")).is_empty(), "QEMU outlives the run that started it");

    let next = scratch.run(XTASK_VM, &[&SMOKE[..], &["--agent", XTASK_VM]].concat());
    let message = message(&next);
    let id = run.file_name().unwrap().to_str().unwrap();
    assert!(message.contains(&format!("collected the run {id}, which died")), "{message}");
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.exists());
}
