//! The sentences about a run: its verdict, and what was not tested.

use serde_json::Value;
use xtask_core::error::Verdict;
use xtask_core::format::human_seconds;
use xtask_core::output::clean;
use xtask_core::report::{PhaseStatus, Report};

use crate::{faults, torture};

/// Returns the report without the escape sequences and control characters in its texts. The guest and the agent can
/// have written some of them.
pub(crate) fn cleaned(report: &Report) -> Report {
    let mut value = serde_json::to_value(report).expect("a report is plain data");
    clean_texts(&mut value);
    serde_json::from_value(value).expect("a report without control characters is a report")
}

fn clean_texts(value: &mut Value) {
    match value {
        Value::String(text) => *text = clean(text),
        Value::Array(values) => values.iter_mut().for_each(clean_texts),
        Value::Object(fields) => fields.values_mut().for_each(clean_texts),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The exit code of a usage error.
const USAGE: u8 = 2;

/// Returns the verdict in a sentence.
pub(crate) fn verdict(report: &Report) -> String {
    let time = human_seconds(report.seconds);
    let phase = report
        .failure
        .as_ref()
        .map_or_else(String::new, |failure| format!(" in the phase {}", failure.phase.title()));
    match report.verdict {
        _ if report.exit_code == USAGE => {
            "The command line was not valid. Nothing is known about the agent.".to_owned()
        }
        Verdict::Verified if report.until.is_some() => {
            format!("The agent joined the fleet bus. The smoke ended there, as requested, after {time}.")
        }
        Verdict::Verified if report.torture.is_some() => {
            report.torture.as_ref().map_or_else(String::new, |torture| torture::verdict(torture, &time))
        }
        Verdict::Verified if report.faults.is_some() => {
            report.faults.as_ref().map_or_else(String::new, |faults| faults::verdict(faults, &time))
        }
        Verdict::Verified => format!(
            "The agent joined the fleet bus, ran its workload, survived a power cut without a broker, and rejoined. All \
             of this was proven in {time}."
        ),
        Verdict::Failed => {
            format!("The agent or the guest failed{phase}. The run took {time}.")
        }
        Verdict::Unavailable => format!("Nothing is known about the agent, because this host failed{phase}."),
        Verdict::Interrupted => {
            format!("The run was interrupted{phase}. Nothing is known about the agent.")
        }
    }
}

/// Returns sentences about what makes this run weaker than a complete smoke of the release build on the requested image.
pub(crate) fn not_tested(report: &Report) -> Vec<String> {
    let mut found = Vec::new();
    let skipped: Vec<_> = report
        .phases
        .iter()
        .filter(|phase| phase.status == PhaseStatus::Skipped)
        .map(|phase| phase.name.title())
        .collect();
    if !skipped.is_empty() {
        found.push(format!("These phases were not reached: {}.", skipped.join(", ")));
    }
    if let Some(image) = &report.guest.image {
        if let Some(reason) = image.fallback_briefly() {
            let (wanted, tested) = (&image.wanted, &image.name);
            found.push(format!("{wanted} was not tested, because {reason}. {tested} was tested instead."));
        }
        if !image.verified {
            found.push(if image.built {
                "The image was built from packages on this host, so it has no pinned digest.".to_owned()
            } else {
                "The content of the image was not checked against a digest.".to_owned()
            });
        }
    }
    if let Some(agent) = &report.agent {
        if let Some(path) = &agent.given_as {
            found.push(format!("The agent was not built by the run. It was given as {}.", path.display()));
        }
        if let Some(profile) = agent.profile.as_ref().filter(|profile| *profile != "release") {
            found.push(format!("The agent was built with the profile {profile}, and not with release."));
        }
        if let Some(flags) = &agent.rustflags {
            found.push(format!("The agent was built with RUSTFLAGS {flags}."));
        }
        if !agent.inspect_warnings.is_empty() {
            found.push(format!("The inspection has warnings: {}.", agent.inspect_warnings.join(", ")));
        }
    }
    if report.workspace.as_ref().is_some_and(|commit| commit.dirty) {
        found.push("The workspace had changes that were not committed.".to_owned());
    }
    if report.host.guest_confined == Some(false) {
        found.push("The guest could reach every TCP port of this host.".to_owned());
    }
    if let Some(fault) = &report.sabotage {
        found.push(format!("The fault {fault} was planted on purpose, to test the smoke."));
    }
    if let Some(disturbance) = &report.disturbance {
        found.push(format!("The device was disturbed on purpose: {disturbance}."));
    }
    found
}

pub(crate) fn status_word(status: PhaseStatus) -> &'static str {
    match status {
        PhaseStatus::Passed => "passed",
        PhaseStatus::Failed => "failed",
        PhaseStatus::Skipped => "not reached",
    }
}

/// Returns the beginning of an id or a digest.
pub(crate) fn short(id: &str) -> &str {
    id.char_indices().nth(12).map_or(id, |(end, _)| &id[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn each_limitation_is_a_sentence() {
        assert_eq!(not_tested(&samples::verified()), Vec::<String>::new());
        let mut report = samples::failed();
        let image = report.guest.image.as_mut().unwrap();
        (image.verified, image.fallback_reason) = (false, Some("the host cannot be reached: x".to_owned()));
        report.sabotage = Some("crash-loop".to_owned());
        let found = not_tested(&report).join("\n");
        for words in [
            "were not reached: rejoin",
            "ubuntu-24.04 was not tested, because the host cannot be reached. debian-12 was",
            "not checked against a digest",
            "The fault crash-loop was planted",
        ] {
            assert!(found.contains(words), "{words}: {found}");
        }
    }

    #[test]
    fn no_text_of_a_report_has_a_control_character() {
        let mut report = samples::failed();
        report.failure.as_mut().unwrap().error = "it says \u{1b}[1A\u{1b}[2Kyes\0".to_owned();
        assert_eq!(cleaned(&report).failure.unwrap().error, "it says yes");
        assert_eq!(cleaned(&samples::verified()).to_json(), samples::verified().to_json());
    }

    #[test]
    fn a_verdict_names_the_phase() {
        assert!(verdict(&samples::failed()).contains("failed in the phase power cut"));
        assert!(verdict(&samples::unavailable()).starts_with("Nothing is known about the agent"));
        assert!(verdict(&samples::interrupted()).contains("interrupted in the phase boot"));
    }
}
