//! The phase *inspect*: refuses an executable that cannot run on the device, and a workload that cannot run in the guest,
//! before any guest starts. The phase runs as soon as both are built. It runs again if the libraries of the image were
//! not known at that time.

use anyhow::Result;
use inspect::finding::{Finding, Report, Severity};
use xtask_core::bail_guest;
use xtask_core::build::Agent;
use xtask_core::cli::Sabotage;
use xtask_core::error::Failure;
use xtask_core::format::name_of;
use xtask_core::plan::Plan;
use xtask_core::report::Phase;
use xtask_inspection::Inspection;

use xtask_images::inventory;

use super::recorder::Recorder;
use super::run::Run;
use crate::guest::workload::Workload;

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
    (agent, workload): (&Agent, &Workload),
    unknown: &str,
) -> Result<Option<String>> {
    let Inspected { known, warnings } = recorder.phase(Phase::Inspect, None, || {
        let inventory = inventory::of_image(&run.cache, &plan.image);
        let inspection = Inspection::for_smoke(&plan.image, inventory, plan.spec.cpu.as_deref());
        let (inspected, detail) = check(run, &inspection, agent, unknown)?;
        let report = inspection.without_unit().look_at(&workload.program);
        let overridden = check_workload(&report, run.options.sabotage)?;
        if let Some(note) = &overridden {
            run.ui.note(note);
        }
        let end = overridden.map_or("", |_| "; the refusal of the workload is overridden");
        Ok((inspected, detail + end))
    })?;
    recorder.warned(warnings);
    Ok(known)
}

fn check(
    run: &Run<'_>,
    inspection: &Inspection,
    agent: &Agent,
    unknown: &str,
) -> Result<(Inspected, String)> {
    let report = inspection.look_at(&agent.content);
    for finding in report.of(Severity::Warned) {
        run.ui.note(&describe(finding));
    }
    if let Some(worst) = report.refused().next() {
        return Err(Failure::guest(describe_refused(&report), worst.remedy.clone()).into());
    }
    let warnings: Vec<_> = report.of(Severity::Warned).map(|finding| finding.id.to_owned()).collect();
    let warned = if warnings.is_empty() { String::new() } else { format!(", {} warning(s)", warnings.len()) };
    let known = inspection.source().map(str::to_owned);
    let libraries = if known.is_some() { "its libraries" } else { unknown };
    let (device, name) = (&inspection.device.name, inspection.name());
    let detail = format!("sound on {device} with {name} ({libraries}){warned}");
    Ok((Inspected { known, warnings }, detail))
}

/// Returns an error if the workload is refused. If the fault is in the workload, the workload must be refused for it.
/// The smoke continues all the same, and this function returns a note about it. Warnings are not evaluated, because the
/// phase *workload* runs the program.
///
/// # Errors
/// Returns a failure of the host if a workload without a fault is refused: nothing is known about the agent.
fn check_workload(report: &Report, sabotage: Option<Sabotage>) -> Result<Option<String>> {
    let refused = describe_refused(report);
    let Some((fault, id)) = sabotage.and_then(|fault| Some((name_of(&fault), fault.refused_for()?))) else {
        return match report.refused().next() {
            None => Ok(None),
            Some(worst) => {
                let what = format!("the smoke's workload cannot run in the guest: {refused}");
                Err(Failure::host(what, format!("{}; nothing is known about the agent", worst.remedy)).into())
            }
        };
    };
    if !report.refused().any(|finding| finding.id == id) {
        bail_guest!(
            "inspect does not refuse the workload with the planted fault {fault} for {id}";
            "a check of cargo xtask does not work; that is a bug of cargo xtask, not of the agent"
        );
    }
    Ok(Some(format!(
        "the workload is refused, and is run all the same because of --sabotage {fault}: {refused}"
    )))
}

fn describe_refused(report: &Report) -> String {
    report.refused().map(describe).collect::<Vec<_>>().join("; ")
}

fn describe(finding: &Finding) -> String {
    format!("{}: {}; {}", finding.id, finding.found, finding.offers)
}

#[cfg(test)]
mod tests {
    use xtask_core::error::{self, Kind};

    use super::*;

    #[test]
    fn a_workload_is_refused_unless_its_fault_was_planted() {
        let finding = |id| Finding::refused_if(true, id, "it is so", "the target is not", "change it");
        let report = |ids: &[&'static str]| Report::new(ids.iter().map(|id| finding(*id)).collect());
        let (sound, small) = (report(&[]), report(&["allocator-page-size"]));
        for fault in [None, Some(Sabotage::CrashLoop)] {
            assert_eq!(check_workload(&sound, fault).unwrap(), None);
            let error = check_workload(&small, fault).unwrap_err();
            assert!(Kind::Host.is(&error), "{error}");
            assert!(error.to_string().contains("allocator-page-size: it is so"), "{error}");
            assert!(error::hint(&error).unwrap().contains("change it"));
        }
        let note = check_workload(&small, Some(Sabotage::SmallPages)).unwrap().unwrap();
        assert!(note.contains("--sabotage small-pages: allocator-page-size: it is so"), "{note}");
        for (report, fault) in [(&sound, Sabotage::SmallPages), (&small, Sabotage::ForeignImage)] {
            let error = check_workload(report, Some(fault)).unwrap_err();
            assert!(Kind::Guest.is(&error) && error.to_string().contains("does not refuse"), "{error}");
        }
    }
}
