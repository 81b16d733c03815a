//! The phase *inspect*: refuses an executable that cannot run on the device, before any guest starts. The phase runs as
//! soon as the executable is built. It runs again if the libraries of the image were not known at that time.

use anyhow::Result;
use inspect::finding::{Finding, Severity};
use xtask_core::build::Agent;
use xtask_core::error::Failure;
use xtask_core::plan::Plan;
use xtask_core::report::Phase;
use xtask_inspection::Inspection;

use xtask_images::inventory;

use super::recorder::Recorder;
use super::run::Run;

/// The text for unknown libraries before the image is in the cache.
pub(super) const NOT_FETCHED: &str = "the catalogue's data, as it is not in the cache yet";
/// The text for unknown libraries once the image is in the cache.
pub(super) const NOT_READ: &str = "its libraries are unknown: your own images are not read";

/// The result of one inspection.
struct Inspected {
    /// The digest of the image whose libraries were used for the check; `None` if its libraries are not known.
    known: Option<String>,
    /// The ids of the warnings.
    warnings: Vec<String>,
}

/// Runs the phase, and records its warnings. Returns the digest of the image whose libraries were used for the check,
/// or `None` if its libraries are not known.
pub(super) fn phase(
    run: &Run<'_>,
    recorder: &mut Recorder<'_>,
    plan: &Plan,
    agent: &Agent,
    unknown: &str,
) -> Result<Option<String>> {
    let Inspected { known, warnings } =
        recorder.phase(Phase::Inspect, None, || check(run, plan, agent, unknown))?;
    recorder.warned(warnings);
    Ok(known)
}

fn check(run: &Run<'_>, plan: &Plan, agent: &Agent, unknown: &str) -> Result<(Inspected, String)> {
    let inventory = inventory::of_image(&run.cache, &plan.image);
    let inspection = Inspection::for_smoke(&plan.image, inventory, plan.spec.cpu.as_deref());
    let report = inspection.look_at(&agent.content);
    for finding in report.of(Severity::Warned) {
        run.ui.note(&describe(finding));
    }
    let refused: Vec<&Finding> = report.refused().collect();
    if let Some(worst) = refused.first() {
        let all: Vec<_> = refused.iter().map(|finding| describe(finding)).collect();
        return Err(Failure::guest(all.join("; "), worst.remedy.clone()).into());
    }
    let warnings: Vec<_> = report.of(Severity::Warned).map(|finding| finding.id.to_owned()).collect();
    let warned = if warnings.is_empty() { String::new() } else { format!(", {} warning(s)", warnings.len()) };
    let known = inspection.source().map(str::to_owned);
    let libraries = if known.is_some() { "its libraries" } else { unknown };
    let (device, name) = (&inspection.device.name, inspection.name());
    let detail = format!("sound on {device} with {name} ({libraries}){warned}");
    Ok((Inspected { known, warnings }, detail))
}

fn describe(finding: &Finding) -> String {
    format!("{}: {}; {}", finding.id, finding.found, finding.offers)
}
