//! `cargo xtask preflight`: can this machine do it, what exactly is missing, fix it.

use std::io::{ErrorKind, Write as _};

use anyhow::Result;
use serde_json::json;

use crate::arch::VmArchitecture;
use crate::cli::{PreflightArgs, SmokeArgs, Verbosity};
use crate::error;
use crate::host::facts::Facts;
use crate::plan;
use crate::preflight::findings::{Finding, Remedy, Severity};
use crate::preflight::{Preflight, PreflightRequest, fix};
use crate::report::{Failure, Phase, PhaseReport, PhaseStatus, Report};
use crate::workspace::Workspace;

pub(super) fn run(workspace: &Workspace, args: &PreflightArgs, verbosity: Verbosity) -> Result<()> {
    let architectures = architectures(args);
    let asked = PreflightRequest { architectures: &architectures, machine: &args.machine, for_ci: false };
    let preflight = if args.fix.fix {
        fix::fix(workspace, &asked, args.fix)?
    } else {
        Preflight::check(workspace, &asked)?
    };
    check_flags(&preflight.facts, args)?;
    let asks_libvirt = args.rehearse || args.connect.is_some();
    if asks_libvirt && preflight.verdict().is_ok() {
        // `xtask-vm` looks at everything again, and says it all at once.
        super::build_xtask_vm(workspace, verbosity)?;
        return super::exec_xtask_vm(workspace);
    }
    present(&preflight, args)
}

/// What the flags ask of the machine and it cannot do: an accelerator that is not there, a CPU model that no emulator has. Where
/// no architecture was named, that one of them can do it is enough.
fn check_flags(facts: &[Facts], args: &PreflightArgs) -> Result<()> {
    let checks = facts.iter().filter_map(|facts| Some((facts, facts.working_emulator()?)));
    let checked: Vec<Result<()>> = checks
        .map(|(facts, emulator)| {
            let (accelerator, ..) = plan::accelerator(args.machine.accel, facts.arch, &facts.kvm)?;
            let cpu = args.machine.cpu.as_deref();
            Ok(cpu.map_or(Ok(()), |cpu| emulator.check_cpu(facts.arch.profile(), accelerator, cpu))?)
        })
        .collect();
    if args.arch.is_none() && checked.iter().any(Result::is_ok) {
        return Ok(());
    }
    checked.into_iter().collect()
}

/// The guests' architectures: every one where none was named.
pub fn architectures(args: &PreflightArgs) -> Vec<VmArchitecture> {
    args.arch.map_or(VmArchitecture::ALL.to_vec(), |arch| vec![arch])
}

/// Shows what was found, as asked.
///
/// # Errors
/// The verdict, where something stands in the way.
pub fn present(preflight: &Preflight, args: &PreflightArgs) -> Result<()> {
    let verdict = preflight.verdict();
    if args.json {
        // Whoever reads may have read enough.
        match writeln!(std::io::stdout(), "{:#}", as_json(preflight, verdict.is_ok())) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
    } else {
        print(preflight);
    }
    verdict
}

fn as_json(preflight: &Preflight, ready: bool) -> serde_json::Value {
    let of_host = preflight.facts.first().map(|Facts { host, .. }| {
        json!({
            "os": host.os.name, "kernel": host.kernel, "cpus": host.cpus, "root": host.root, "systemd": host.systemd,
            "container": host.container, "libvirt": host.libvirt.as_ref().ok(),
        })
    });
    let findings = preflight.findings.iter().map(|finding| {
        let mut value = serde_json::to_value(finding).expect("a finding is plain data");
        value["commands"] = json!(commands(preflight, finding));
        value
    });
    json!({
        "schema": 1,
        "ready": ready,
        "host": of_host,
        "findings": findings.collect::<Vec<_>>(),
        "fix": fix::plan(preflight),
    })
}

/// What does one finding's remedy on this machine.
fn commands(preflight: &Preflight, finding: &Finding) -> Vec<Vec<String>> {
    let facts = preflight.facts.first();
    facts.map(|facts| fix::commands(facts, std::iter::once(finding))).unwrap_or_default()
}

/// One block a finding; a sentence where there is none.
pub(super) fn print(preflight: &Preflight) {
    if let Some(Facts { host, .. }) = preflight.facts.first() {
        let nats = host.nats_server.as_ref().and_then(|version| version.as_ref().ok());
        let of = |known: Option<&String>| known.map_or("missing".to_owned(), Clone::clone);
        eprintln!(
            "{}, {}: libvirt {}, nats-server {}",
            host.os.name,
            host.describe(),
            of(host.libvirt.as_ref().ok()),
            of(nats)
        );
    }
    for facts in &preflight.facts {
        let emulator = facts.working_emulator().map_or("missing", |emulator| &emulator.version);
        let firmware = match (&facts.firmware, &facts.edk2) {
            (Ok(_), Some(edk2)) => format!("edk2 {edk2}"),
            (Ok(_), None) => "firmware of unknown release".to_owned(),
            (Err(_), _) => "no firmware".to_owned(),
        };
        eprintln!("{:<8} QEMU {emulator}, {firmware}", facts.arch.to_string());
    }
    for finding in &preflight.findings {
        show(preflight, finding);
    }
    let plan = fix::plan(preflight);
    if !plan.is_empty() {
        if fix::wants_root(preflight) {
            eprintln!("to install everything (needs root; neither sudo nor doas is installed):");
        } else {
            eprintln!("to install everything (--fix runs these):");
        }
        for command in plan {
            eprintln!("    {}", command.join(" "));
        }
    }
    if preflight.blocking().next().is_none() {
        eprintln!("ready");
    }
}

/// A line for each thing that may explain what a run does.
pub(super) fn print_degradations(preflight: &Preflight) {
    for finding in preflight.findings.iter().filter(|finding| finding.severity == Severity::Degrades) {
        eprintln!("note: {}", finding.sentence);
    }
}

fn show(preflight: &Preflight, finding: &Finding) {
    let word = match finding.severity {
        Severity::Blocks => "blocks",
        Severity::Degrades => "degrades",
        Severity::Informs => "informs",
    };
    eprintln!("{word:<9} {}", finding.sentence);
    eprintln!("          seen: {}", finding.evidence);
    let commands = commands(preflight, finding);
    match &finding.remedy {
        Some(Remedy::Manual(remedy)) => eprintln!("          to do: {remedy}"),
        Some(Remedy::Install(..)) if commands.is_empty() => eprintln!(
            "          to do: no package of this distribution is known to provide it; install it by hand, or choose an image \
             that does not need it"
        ),
        // The list of packages is brought up to date once, for all of them.
        Some(_) => {
            for command in commands.iter().filter(|command| !command.ends_with(&["update".to_owned()])) {
                eprintln!("          to do: {}", command.join(" "));
            }
        }
        None => {}
    }
}

/// A smoke that does not get past preflight leaves its report too, where one was asked for.
pub(super) fn report(args: &SmokeArgs, error: &anyhow::Error) {
    let Some(directory) = &args.report else { return };
    let mut report = Report::begin("none", &crate::format::now_rfc3339(), args.build.arch);
    report.phases.push(PhaseReport {
        name: Phase::Preflight,
        status: PhaseStatus::Failed,
        seconds: 0.0,
        limit_seconds: None,
        detail: error.to_string(),
    });
    let verdict = error::verdict(error);
    report.failure = Some(Failure::new(Phase::Preflight, error, Vec::new()));
    report.conclude(verdict, 0.0);
    if let Err(error) = report.write(directory) {
        eprintln!("warning: {error:#}");
    }
}
