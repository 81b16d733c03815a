//! The phase *inspect*: an executable that cannot run there never reaches the guest. Before the image is fetched or built, so
//! that nobody waits for it in vain; and again with the image's own libraries, where they were not known by then.

use anyhow::Result;
use inspect::finding::{Finding, Severity};
use xtask_core::build::Agent;
use xtask_core::error::Failure;
use xtask_core::plan::Plan;
use xtask_inspection::Inspection;

use xtask_images::inventory;

use super::run::Run;

/// The digest of the image whose own libraries the executable was held against; `None` where only its release is known yet.
pub(super) fn before_image(run: &Run<'_>, plan: &Plan, agent: &Agent) -> Result<(Option<String>, String)> {
    let inspection = look(run, plan);
    let known = inspection.source().map(str::to_owned);
    let libraries =
        if known.is_some() { "its libraries" } else { "the catalogue's data, as it is not in the cache yet" };
    let detail = check(run, &inspection, agent, libraries)?;
    Ok((known, detail))
}

/// With the image that will be booted, where that is another one than before.
pub(super) fn with_image(run: &Run<'_>, plan: &Plan, agent: &Agent) -> Result<((), String)> {
    let inspection = look(run, plan);
    let known = inspection.source().is_some();
    let libraries =
        if known { "its libraries" } else { "its libraries are unknown: your own images are not read" };
    let detail = check(run, &inspection, agent, libraries)?;
    Ok(((), detail))
}

fn look(run: &Run<'_>, plan: &Plan) -> Inspection {
    let inventory = inventory::of_image(&run.cache, &plan.image);
    Inspection::for_smoke(&plan.image, inventory, plan.spec.cpu.as_deref())
}

fn check(run: &Run<'_>, inspection: &Inspection, agent: &Agent, libraries: &str) -> Result<String> {
    let report = inspection.look_at(&agent.content);
    for finding in report.of(Severity::Warned) {
        run.ui.note(&describe(finding));
    }
    let refused: Vec<&Finding> = report.refused().collect();
    if let Some(worst) = refused.first() {
        let all: Vec<_> = refused.iter().map(|finding| describe(finding)).collect();
        return Err(Failure::guest(all.join("; "), worst.remedy.clone()).into());
    }
    let warned = report.of(Severity::Warned).count();
    let warned = if warned == 0 { String::new() } else { format!(", {warned} warning(s)") };
    Ok(format!("sound on {} with {} ({libraries}){warned}", inspection.device.name, inspection.name()))
}

fn describe(finding: &Finding) -> String {
    format!("{}: {}; {}", finding.id, finding.found, finding.offers)
}
