//! `cargo xtask inspect`: checks without a boot whether an executable will run on a device.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use inspect::finding::{Finding, Report, SCHEMA, Severity};
use serde_json::json;
use xshell::Shell;

use xtask_core::build;
use xtask_core::cli::{BuildArgs, InspectArgs, Verbosity};
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::message;
use xtask_core::output::print_json;
use xtask_core::workspace::Workspace;
use xtask_inspection::{DeviceRoot, Inspection};

/// Inspects the given executable, or the agent if none is given.
pub(crate) fn run(args: &InspectArgs, verbosity: Verbosity) -> Result<()> {
    let inspection = Inspection::from_args(args)?;
    let path = match &args.path {
        Some(path) => path.clone(),
        None => agent(args, &inspection)?,
    };
    let bytes = std::fs::read(&path)
        .map_err(|error| Failure::usage(format!("inspect {}: {error}", path.display())))?;
    let started = Instant::now();
    let report = inspection.look_at(&bytes);
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(&as_json(&path, bytes.len(), &inspection, &report, seconds))?;
    }
    print(&path, &inspection, &report, verbosity);
    if report.is_sound() { Ok(()) } else { Err(Failure::reported(1).into()) }
}

/// Builds the agent unless it is up to date. Returns the path of its executable.
fn agent(args: &InspectArgs, inspection: &Inspection) -> Result<PathBuf> {
    let workspace = Workspace::find()?;
    let build = BuildArgs { arch: inspection.arch, profile: args.profile.clone() };
    let shell = Shell::new().context("create the shell that runs commands")?;
    Ok(build::build(&shell, &workspace, &build)?.path)
}

fn as_json(
    path: &Path,
    bytes: usize,
    inspection: &Inspection,
    report: &Report,
    seconds: f64,
) -> serde_json::Value {
    let known = match &inspection.place {
        DeviceRoot::Image(image, None) => json!({
            "from": image.name, "known": "release",
            "glibc": image.expected.as_ref().map(|expected| &expected.glibc),
        }),
        DeviceRoot::Image(image, Some(inventory)) => json!({
            "from": image.name, "known": "all", "source": inventory.source,
            "libraries": inventory.libraries.len(),
        }),
        DeviceRoot::Sysroot(path, inventory) => {
            json!({ "from": path.to_string_lossy(), "known": "all", "libraries": inventory.libraries.len() })
        }
    };
    json!({
        "schema": SCHEMA,
        "verdict": if report.is_sound() { "sound" } else { "refused" },
        "file": { "path": path.to_string_lossy(), "bytes": bytes },
        "target": {
            "arch": inspection.arch, "device": inspection.device.name, "about": inspection.device.about,
            "libraries": known,
        },
        "findings": report.findings,
        "seconds": round(seconds),
    })
}

fn print(path: &Path, inspection: &Inspection, report: &Report, verbosity: Verbosity) {
    if !verbosity.quiet {
        let informs = report.of(Severity::Informs).filter(|finding| verbosity.verbose || says_more(finding));
        for finding in report.of(Severity::Refused).chain(report.of(Severity::Warned)).chain(informs) {
            for line in lines(finding) {
                message!("{line}");
            }
            for path in finding.paths.iter().filter(|_| verbosity.verbose) {
                message!("         reached through {path}");
            }
        }
    }
    let verdict = if report.is_sound() { "sound" } else { "REFUSED" };
    let warnings = report.of(Severity::Warned).count();
    let warned = if warnings == 0 { String::new() } else { format!(", {warnings} warning(s)") };
    message!(
        "{verdict}{warned}: {} on {} with {}",
        path.display(),
        inspection.device.name,
        inspection.name()
    );
}

/// Returns whether a finding of severity `informs` is shown without `-v`. It is shown if it has a remedy, or if it
/// lists instructions that are guarded by a check at run time.
fn says_more(finding: &Finding) -> bool {
    !finding.remedy.is_empty() || (finding.id == "instructions" && !finding.details.is_empty())
}

pub(super) fn lines(finding: &Finding) -> Vec<String> {
    let mut lines = vec![format!("{:<8} {}: {}", finding.severity, finding.id, finding.found)];
    let rest = [("the target", &finding.offers), ("what to do", &finding.remedy)];
    lines.extend(
        rest.iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(what, text)| format!("         {what}: {text}")),
    );
    lines.extend(finding.details.iter().map(|detail| format!("         - {detail}")));
    lines
}
