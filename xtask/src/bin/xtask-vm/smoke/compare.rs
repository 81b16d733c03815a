//! `smoke --verify-cold`: runs the same smoke warm from its snapshot and cold, and compares the two reports.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask_core::cache::Cache;
use xtask_core::cli::{Half, Sabotage, SmokeArgs, Verbosity};
use xtask_core::error::{Failure, Verdict};
use xtask_core::format::name_of;
use xtask_core::fs::{make_private_dir, try_lock};
use xtask_core::message;
use xtask_core::report::{REPORT, Report, remove_earlier};
use xtask_core::{bail_guest, bail_host};

use xtask_jobs::Ui;

/// Runs this command twice: the warm half and the cold half. Each half has a report of its own below `compared/` in the
/// cache. Each half is a process of its own, because libvirt's embedded driver has one root per process.
pub(super) fn run(args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    check_flags(args)?;
    let own = std::env::current_exe().context("find this very program")?;
    let ui = Ui::install(verbosity)?;
    let cache = Cache::open()?;
    let directory = cache.root().join("compared");
    make_private_dir(&directory)?;
    let Some(_lock) = try_lock(&directory.join("lock"))? else {
        bail_host!("compare in {}: another comparison is running", directory.display(); "wait until it ends");
    };
    let run_half = |half: Half| -> Result<Report> {
        let name = name_of(&half);
        let report = directory.join(&name);
        make_private_dir(&report)?;
        let mut command = Command::new(&own);
        command.args(std::env::args_os().skip(1)).args(["--half", &name]);
        let report = smoke(command, &report)?;
        ui.check()?;
        // The half has printed the reason, and there is no result to compare.
        ensure!(report.verdict != Verdict::Unavailable, Failure::reported(report.exit_code));
        Ok(report)
    };
    let (warm, cold) = (run_half(Half::Warm)?, run_half(Half::Cold)?);
    if warm.verdict == Verdict::Verified && (warm.snapshot.is_none() || cold.snapshot.is_some()) {
        bail_host!(
            "compare a warm run with a cold one: no run was warm";
            "under KVM every run is cold; otherwise read the output of the runs above"
        );
    }
    let differences = differences(&warm, &cold);
    if !differences.is_empty() {
        bail_guest!(
            "the warm run and the cold one differ in {}", differences.join("; ");
            "compare the reports in {}; run cargo xtask image prune and use --cold until the cause is \
            found", directory.display()
        );
    }
    if let Some(sabotage) = args.sabotage {
        bail_guest!(
            "the comparison did not find the planted fault {}", name_of(&sabotage);
            "a check of cargo xtask does not work; that is a bug of cargo xtask, not of the agent"
        );
    }
    message!("the warm run and the cold one agree: {}", directory.display());
    match warm.verdict {
        Verdict::Verified => Ok(()),
        verdict => Err(Failure::reported(verdict.exit_code()).into()),
    }
}

/// Returns a usage error for a flag that only a single run can have.
fn check_flags(args: &SmokeArgs) -> Result<(), Failure> {
    if let Some(other) = args.sabotage.filter(|sabotage| *sabotage != Sabotage::ColdPanics) {
        let (other, own) = (name_of(&other), name_of(&Sabotage::ColdPanics));
        return Err(Failure::usage(format!(
            "--sabotage {other}: --verify-cold takes only {own}, a fault of one of the two runs"
        )));
    }
    if args.report.is_some() {
        return Err(Failure::usage(
            "--report: --verify-cold keeps its two reports in compared/ in the cache",
        ));
    }
    Ok(())
}

/// Runs a smoke to its end, with any verdict, and reads the report that it writes into `directory`.
pub(crate) fn smoke(mut command: Command, directory: &Path) -> Result<Report> {
    command.arg("--report").arg(directory).stdin(Stdio::null());
    let path = directory.join(REPORT);
    remove_earlier(directory)?;
    let status = command.status().context("run a smoke")?;
    let text = match fs_err::read(&path) {
        Ok(text) => text,
        // The smoke has printed why it did not begin.
        Err(_) if !status.success() => {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Err(Failure::reported(code.unwrap_or(1)).into());
        }
        Err(error) => return Err(error.into()),
    };
    let report: Report =
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
    ensure!(
        status.code() == Some(report.exit_code.into()),
        "the smoke ended with {status}, but its report says {}",
        report.exit_code
    );
    Ok(report)
}

/// The parts of the report that must be the same in a warm run and a cold run, as JSON pointers (RFC 6901). Boot ids,
/// revisions and times may differ.
const COMPARED: &[(&str, &[&str])] = &[
    ("the verdict", &["/verdict"]),
    ("what was built", &["/agent/sha256"]),
    ("the image", &["/guest/image/name", "/guest/image/digest"]),
    ("the firmware", &["/guest/firmware/code_sha256"]),
    (
        "the machine",
        &["/guest/machine_type", "/guest/cpu", "/guest/vcpus", "/guest/memory_mib", "/host/accelerator"],
    ),
    ("the failure", &["/failure/phase"]),
    ("the guest's kernel", &["/guest/kernel"]),
    ("the guest's system", &["/guest/os_release"]),
    ("join", &["/evidence/join"]),
    ("rejoin", &["/evidence/rejoin"]),
    ("the workload", &["/evidence/workload"]),
    ("the workload without a broker", &["/evidence/workload_offline"]),
    ("the changed workload", &["/evidence/workload_rejoin"]),
];
/// The fields of the evidence that differ from boot to boot.
const VOLATILE: [&str; 2] = ["boot_id", "kv_revision"];

fn differences(warm: &Report, cold: &Report) -> Vec<String> {
    let reports = [warm, cold].map(|report| serde_json::to_value(report).expect("a report is plain data"));
    let mut differences = Vec::new();
    for (what, pointers) in COMPARED {
        let facts = |report| pointers.iter().map(|at| stable(report, at)).collect::<Vec<_>>();
        let [warm, cold] = reports.each_ref().map(facts);
        if warm != cold {
            differences.push(format!("{what}: warm {}, cold {}", words(&warm), words(&cold)));
        }
    }
    let [warm, cold] = [warm, cold].map(|report| {
        let phases = report.phases.iter().map(|phase| format!("{} {:?}", phase.name.title(), phase.status));
        phases.collect::<Vec<_>>().join(", ")
    });
    if warm != cold {
        differences.push(format!("the phases: warm {warm}, cold {cold}"));
    }
    differences
}

fn stable(report: &Value, pointer: &str) -> Value {
    let mut value = report.pointer(pointer).cloned().unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.retain(|name, _| !VOLATILE.contains(&name.as_str()));
    }
    value
}

fn words(values: &[Value]) -> String {
    let word = |value: &Value| match value {
        Value::Null => "nothing".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    values.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use xtask_core::arch::{Accelerator, VmArchitecture};
    use xtask_core::cli::{Cli, Command as Subcommand, HeavyCommand};
    use xtask_core::digest::Algorithm;
    use xtask_core::report::{
        FailureReport, FirmwareReport, ImageReport, Phase, StatusEvidence, WorkloadEvidence,
    };

    fn report() -> Report {
        let mut report = Report::begin("1124-100000-0001", "2026-11-24T10:00:00Z", VmArchitecture::Aarch64);
        report.evidence.join = Some(StatusEvidence {
            boot_id: "b".to_owned(),
            kv_revision: 1,
            exe_sha256: "e".to_owned(),
            machine: "aarch64".to_owned(),
            agent_version: "0.1.0".to_owned(),
        });
        report.evidence.workload_rejoin = Some(WorkloadEvidence {
            machine: "aarch64".to_owned(),
            page_size: Some(4096),
            boot_id: "b".to_owned(),
            generation: 2,
            starts: 3,
        });
        report.guest.image = Some(ImageReport {
            name: "debian-12".to_owned(),
            requested: None,
            wanted: "debian-12".to_owned(),
            source: "built".to_owned(),
            digest: Algorithm::Sha256.of(b"disk"),
            verified: false,
            built: true,
            fallback_reason: None,
        });
        report.guest.firmware = Some(FirmwareReport {
            code: "/c".into(),
            vars_template: "/v".into(),
            code_sha256: Some("0".to_owned()),
        });
        report.conclude(Verdict::Verified, 90.0);
        report
    }

    fn parsed(line: &str) -> SmokeArgs {
        let line = format!("xtask smoke --verify-cold {line}");
        let Subcommand::Heavy(HeavyCommand::Smoke(args)) = Cli::parse_from(line.split(' ')).command else {
            panic!("smoke")
        };
        *args
    }

    #[test]
    fn each_half_has_the_flags_that_were_given_and_its_own() {
        let of = |line: &str| {
            let args = parsed(line);
            let options = crate::smoke::options::RunOptions::from(&args);
            (options.warm, options.cold, options.sabotage)
        };
        assert_eq!(of("--half warm"), (false, false, None));
        assert_eq!(of("--warm --half warm"), (true, false, None));
        assert_eq!(of("--warm --half cold"), (false, true, None));
        assert_eq!(of("--sabotage cold-panics --half warm"), (false, false, None));
        assert_eq!(of("--sabotage cold-panics --half cold"), (false, true, Some(Sabotage::KernelPanic)));
        let refused = |line: &str| check_flags(&parsed(line)).unwrap_err().to_string();
        assert!(refused("--sabotage stale-boot-id").contains("cold-panics"));
        assert!(refused("--report /tmp").contains("compared/"));
    }

    /// If a pointer named no field, nothing would be compared.
    #[test]
    fn every_pointer_leads_to_a_field() {
        let report = serde_json::to_value(report()).unwrap();
        let absent_here = ["/agent", "/guest/os_release", "/failure"];
        for pointer in COMPARED.iter().flat_map(|(_, pointers)| *pointers) {
            let absent = absent_here.iter().find(|parent| pointer.starts_with(**parent));
            let looked_for = absent.copied().unwrap_or(pointer);
            assert!(report.pointer(looked_for).is_some(), "{pointer}");
        }
    }

    #[test]
    fn what_must_be_the_same_is_compared_and_what_may_differ_is_not() {
        let warm = report();
        let mut cold = report();
        cold.seconds = 160.0;
        cold.evidence.join.as_mut().unwrap().boot_id = "c".to_owned();
        cold.evidence.join.as_mut().unwrap().kv_revision = 9;
        assert_eq!(differences(&warm, &cold), [""; 0]);
        type Change = fn(&mut Report);
        let changes: [Change; 13] = [
            |report| report.verdict = Verdict::Failed,
            |report| report.evidence.join = None,
            |report| report.evidence.join.as_mut().unwrap().exe_sha256.push('x'),
            |report| report.evidence.workload_rejoin.as_mut().unwrap().starts = 1,
            |report| report.guest.kernel = Some("6.1".to_owned()),
            |report| report.guest.image = None,
            |report| report.guest.image.as_mut().unwrap().digest = Algorithm::Sha256.of(b"another"),
            |report| report.guest.firmware = None,
            |report| report.guest.cpu = "max".to_owned(),
            |report| report.guest.memory_mib += 1,
            |report| {
                report.failure = Some(FailureReport::new(Phase::Join, &anyhow::anyhow!("x"), Vec::new()))
            },
            |report| report.guest.vcpus += 1,
            |report| report.host.accelerator = Some(Accelerator::Kvm),
        ];
        for change in changes {
            let mut cold = report();
            change(&mut cold);
            assert_eq!(differences(&warm, &cold).len(), 1);
        }
    }
}
