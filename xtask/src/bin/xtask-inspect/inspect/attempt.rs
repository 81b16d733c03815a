//! `--try`: runs the programs about which the inspection is not certain with `cargo xtask try`, and adds what happened
//! to their findings.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use inspect::elf::Elf;
use inspect::finding::{Finding, Severity};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use xtask_core::cli::InspectArgs;
use xtask_core::error::Failure;
use xtask_core::limits;
use xtask_core::workspace::Workspace;
use xtask_inspection::{DeviceRoot, Inspection};
use xtask_jobs::Ui;

use super::candidate::Candidate;
use super::collection::{Collection, Content};
use super::policy::Policy;
use super::verdict::Judged;

/// The warnings that a program which has run for a while refutes, because their faults show when a program is loaded or
/// when its allocator starts.
const REFUTED: [&str; 10] = [
    "address-space",
    "allocator-page-size",
    "exec-stack",
    "library",
    "needed",
    "packed",
    "segment-alignment",
    "symbol",
    "symbol-version",
    "text-relocations",
];

/// The report of `cargo xtask try --report`.
#[derive(Debug, Deserialize)]
struct Report {
    outcome: String,
    code: Option<u8>,
    signal: Option<String>,
    number: Option<i32>,
    sentence: Option<String>,
    stderr: String,
}

/// Runs each program that has a warning which counts, and no refusal.
///
/// # Errors
/// Returns a failure of the host if `cargo xtask try` cannot be built or started, or the error of an interrupt.
pub(super) fn try_all(
    collection: &Collection,
    judged: &mut [Judged],
    policy: &Policy,
    args: &InspectArgs,
    ui: &Ui,
) -> Result<()> {
    let workspace = Workspace::find()?;
    for (judged, subject) in judged.iter_mut().zip(&collection.subjects) {
        let Content::File(candidate) = &subject.content else { continue };
        if judged.worst() != Severity::Warned || !is_program(candidate)? {
            continue;
        }
        ui.tick(&format!("try {}", judged.name))?;
        let inspection = &collection.judges[subject.judge].inspection;
        let report = run(&workspace, candidate, inspection, args)?;
        ui.check()?;
        let (finding, has_run) = finding(&report, inspection);
        judged.add(finding, if has_run { &REFUTED } else { &[] }, policy);
    }
    Ok(())
}

/// Returns whether the file is a program. A library does nothing when it is executed.
fn is_program(candidate: &Candidate) -> Result<bool> {
    let bytes = candidate.read()?;
    Ok(Elf::parse(&bytes).is_ok_and(|elf| !elf.is_library()))
}

fn run(
    workspace: &Workspace,
    candidate: &Candidate,
    inspection: &Inspection,
    args: &InspectArgs,
) -> Result<Report> {
    // The report is a file in memory, so no file is left if this process is killed.
    let memory = memfd_create("report", MemfdFlags::CLOEXEC).context("make a file in memory")?;
    let mut memory = File::from(memory);
    let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
    let mut command = workspace.cargo();
    command.args(["run", "--quiet", "--package", "xtask", "--bin", "xtask-try", "--features", "try", "--"]);
    command.args(["try", "--quiet", "--report", &path, "--device", &inspection.device.name]);
    command.arg(format!("--timeout={}", limits::TRIED.as_secs()));
    match &inspection.place {
        DeviceRoot::Image(image, Some(_)) => command.args(["--image", &image.name]),
        DeviceRoot::Image(_, None) => &mut command,
        DeviceRoot::Sysroot(root, _) => command.arg("--sysroot").arg(root.canonicalize()?),
    };
    command.arg(&candidate.path).arg("--").args(&args.arguments);
    finish(&mut command)?;
    let mut text = String::new();
    memory.rewind().and_then(|()| memory.read_to_string(&mut text)).context("read the report of try")?;
    let what = || {
        let message = format!("try {}: cargo xtask try wrote no report", candidate.path.display());
        Failure::host(message, "see its messages above")
    };
    serde_json::from_str(&text).with_context(what)
}

/// Runs `cargo xtask try` with its messages on this process's stderr. Its exit code is also in its report.
fn finish(command: &mut Command) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.status().map(drop).context("run cargo xtask try")
}

/// Returns what the run shows, and whether the program ran without a failure.
fn finding(report: &Report, inspection: &Inspection) -> (Finding, bool) {
    let pages = inspection.device.page_sizes.iter().max().copied().unwrap_or_default();
    let machine = format!("{} with pages of {pages} bytes", inspection.device.name);
    let lines: Vec<_> = report.stderr.lines().map(str::to_owned).collect();
    let tail = lines[lines.len().saturating_sub(LINES)..].to_vec();
    let refused = |found: String| {
        let remedy = "run cargo xtask try to see the whole output; the other findings may name the cause";
        (Finding::refused("try", &found, &machine, remedy).details(tail.clone()), false)
    };
    let informs = |found: String| Finding::informs("try", found).offers(&*machine).details(tail.clone());
    let seconds = limits::TRIED.as_secs();
    match (report.outcome.as_str(), report.code) {
        ("exited", Some(0)) => (informs("it ran, and ended with exit code 0".to_owned()), true),
        ("exited", Some(LOADER_FAILED)) if LOADER.iter().any(|text| report.stderr.contains(text)) => {
            refused("its dynamic loader ended it when it ran".to_owned())
        }
        ("exited", Some(code)) => {
            let found =
                format!("it ran, and ended with exit code {code}; this may be its answer to the arguments");
            (informs(found), false)
        }
        ("timed-out", _) => (informs(format!("it ran, and had not ended after {seconds} s")), true),
        ("signal", _) => {
            let number = report.number.unwrap_or_default();
            let signal = report.signal.clone().unwrap_or_else(|| format!("signal {number}"));
            refused(format!("{signal} ended it when it ran"))
        }
        ("out-of-memory", _) => {
            let found = "it used up the memory of the machine, so its run shows nothing".to_owned();
            let remedy = "give it arguments after -- with which it needs less memory";
            (Finding::warned("try", &found, &machine, remedy).details(tail), false)
        }
        ("refused", _) => refused("the kernel did not execute it".to_owned()),
        _ => {
            let sentence = report.sentence.as_deref().unwrap_or("nothing is known about the reason");
            let remedy = "correct the reason, and run the command again";
            (Finding::warned("try", &format!("it was not tried: {sentence}"), "", remedy), false)
        }
    }
}

/// The exit code of glibc's loader if it cannot load a program, and its messages.
const LOADER_FAILED: u8 = 127;
const LOADER: [&str; 2] = ["error while loading shared libraries", "symbol lookup error"];

/// The last lines of a program's standard error that a finding has.
const LINES: usize = 4;

#[cfg(test)]
mod tests {
    use xtask_core::arch::VmArchitecture;

    use super::*;

    fn judge(report: &str) -> (Severity, bool, String) {
        let args = InspectArgs { arch: Some(VmArchitecture::Aarch64), ..InspectArgs::default() };
        let report = serde_json::from_str(report).unwrap();
        let (finding, has_run) = finding(&report, &Inspection::from_args(&args).unwrap());
        (finding.severity, has_run, finding.found)
    }

    #[test]
    fn only_a_program_that_ran_without_a_failure_refutes_a_warning() {
        for (report, severity, has_run, words) in [
            (r#"{"outcome":"exited","code":0,"stderr":""}"#, Severity::Informs, true, "exit code 0"),
            (r#"{"outcome":"exited","code":2,"stderr":"usage"}"#, Severity::Informs, false, "exit code 2"),
            (r#"{"outcome":"exited","code":127,"stderr":"not found"}"#, Severity::Informs, false, "127"),
            (
                r#"{"outcome":"exited","code":127,"stderr":"p: error while loading shared libraries: x"}"#,
                Severity::Refused,
                false,
                "loader",
            ),
            (r#"{"outcome":"timed-out","stderr":""}"#, Severity::Informs, true, "had not ended"),
            (
                r#"{"outcome":"signal","signal":"SIGILL","number":4,"stderr":""}"#,
                Severity::Refused,
                false,
                "SIGILL",
            ),
            (
                r#"{"outcome":"signal","signal":null,"number":40,"stderr":""}"#,
                Severity::Refused,
                false,
                "signal 40",
            ),
            (r#"{"outcome":"out-of-memory","stderr":""}"#, Severity::Warned, false, "memory"),
            (r#"{"outcome":"refused","errno":8,"stderr":""}"#, Severity::Refused, false, "kernel"),
            (
                r#"{"outcome":"not-started","sentence":"no QEMU","stderr":""}"#,
                Severity::Warned,
                false,
                "it was not tried: no QEMU",
            ),
        ] {
            let judged = judge(report);
            assert_eq!((judged.0, judged.1), (severity, has_run), "{report}");
            assert!(judged.2.contains(words), "{judged:?}");
        }
    }
}
