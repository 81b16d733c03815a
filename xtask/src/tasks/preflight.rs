//! `cargo xtask preflight`: can this machine do it, what exactly is missing, fix it.

use anyhow::Result;
use serde_json::json;

use crate::arch::VmArchitecture;
use crate::cli::{PreflightArgs, SmokeArgs, Voice};
use crate::exit;
use crate::host::findings::{Remedy, Severity};
use crate::host::{Asked, Preflight, fix};
use crate::report::{Failure, Phase, PhaseReport, PhaseStatus, Report};
use crate::workspace::Workspace;

pub(super) fn run(workspace: &Workspace, args: &PreflightArgs, voice: Voice) -> Result<()> {
    let architectures = architectures(args);
    let asked = Asked { architectures: &architectures, machine: &args.machine, for_ci: false };
    let preflight = if args.fix.fix {
        fix::fix(workspace, &asked, args.fix)?
    } else {
        Preflight::check(workspace, &asked)
    };
    let asks_libvirt = args.rehearse || args.connect.is_some();
    if asks_libvirt && preflight.verdict().is_ok() {
        // The back room looks at everything again, and says it all at once.
        super::build_back_room(workspace, voice)?;
        return super::enter_back_room(workspace);
    }
    present(&preflight, args)
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
        println!(
            "{:#}",
            json!({
                "schema": 1,
                "ready": verdict.is_ok(),
                "findings": preflight.findings,
                "fix": fix::plan(preflight),
            })
        );
    } else {
        print(preflight);
    }
    verdict
}

/// One block a finding; a sentence where there is none.
pub(super) fn print(preflight: &Preflight) {
    for facts in &preflight.facts {
        let of = |known: Option<&String>| known.map_or("missing".to_owned(), Clone::clone);
        let emulator = facts.emulator.as_ref().and_then(|(_, version)| version.as_ref().ok());
        eprintln!(
            "{:<8} on {}: QEMU {}, libvirt {}, nats-server {}",
            facts.arch.to_string(),
            facts.os,
            of(emulator),
            of(facts.libvirt.as_ref().ok()),
            of(facts.nats_server.as_ref()),
        );
    }
    for finding in &preflight.findings {
        let word = match finding.severity {
            Severity::Blocks => "blocks",
            Severity::Degrades => "degrades",
            Severity::Informs => "informs",
        };
        eprintln!("{word:<9} {}", finding.sentence);
        eprintln!("          seen: {}", finding.evidence);
        if let Some(Remedy::Manual(remedy)) = &finding.remedy {
            eprintln!("          to do: {remedy}");
        }
    }
    let commands = fix::plan(preflight);
    if !commands.is_empty() {
        eprintln!("to fix it (--fix runs these):");
        for command in commands {
            eprintln!("    {}", command.join(" "));
        }
    }
    if preflight.blocking().next().is_none() {
        eprintln!("ready");
    }
}

/// A smoke that does not get past preflight leaves its report too, where one was asked for.
pub(super) fn report(args: &SmokeArgs, error: &anyhow::Error) {
    let Some(directory) = &args.report else { return };
    let mut report = Report::begin("none", &crate::report::now_rfc3339(), args.build.arch);
    report.phases.push(PhaseReport {
        name: Phase::Preflight,
        status: PhaseStatus::Failed,
        seconds: 0.0,
        limit_seconds: None,
        detail: error.to_string(),
    });
    let verdict = exit::verdict(error);
    report.failure = Some(Failure::new(Phase::Preflight, error, Vec::new()));
    report.conclude(verdict, 0.0);
    if let Err(error) = report.write(directory) {
        eprintln!("warning: {error:#}");
    }
}
