//! JUnit: one suite for a smoke, one case for a phase. The format is the one that nextest, Jenkins and GitLab read
//! (<https://github.com/testmoapp/junitxml>).

use std::time::Duration;

use anyhow::{Context as _, Result};
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};
use xtask_core::error::Verdict;
use xtask_core::format::name_of;
use xtask_core::report::{PhaseReport, PhaseStatus, Report, StatusEvidence};

use crate::words::{cleaned, not_tested};

/// Returns junit.xml. A failure of the agent or the guest is a `failure`. An error of this host and an interruption are
/// an `error`, because they say nothing about the agent.
///
/// # Errors
/// Returns an error if the start time in the report is not RFC 3339.
pub fn junit(report: &Report) -> Result<String> {
    let report = &cleaned(report);
    let image = report.guest.image.as_ref().map_or(String::new(), |image| format!(" {}", image.name));
    let mut suite = TestSuite::new(format!("smoke {}{image}", report.guest.arch));
    let started = &report.started_at;
    let started = chrono::DateTime::parse_from_rfc3339(started)
        .with_context(|| format!("read the start time {started:?} of the report"))?;
    suite.set_timestamp(started);
    suite.set_time(seconds(report.seconds));
    suite.add_properties(properties(report));
    suite.add_test_cases(report.phases.iter().map(|phase| case(report, phase)));
    let mut whole = quick_junit::Report::new("cargo xtask smoke");
    whole.set_timestamp(started);
    whole.set_time(seconds(report.seconds));
    whole.add_test_suite(suite);
    let text = whole.to_string().context("write junit.xml")?;
    // XML 1.0 (2.2) has no such characters, and quick-junit does not remove them.
    Ok(text.replace(['\u{fffe}', '\u{ffff}'], ""))
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn case(report: &Report, phase: &PhaseReport) -> TestCase {
    let status = match phase.status {
        PhaseStatus::Passed => TestCaseStatus::success(),
        PhaseStatus::Failed => non_success(report, phase),
        PhaseStatus::Skipped => {
            let mut skipped = TestCaseStatus::skipped();
            skipped.set_message(&phase.detail);
            skipped
        }
    };
    let mut case = TestCase::new(phase.name.title(), status);
    case.set_classname(format!("smoke.{}", report.guest.arch));
    case.set_time(seconds(phase.seconds));
    if phase.status == PhaseStatus::Passed {
        case.set_system_out(&phase.detail);
    }
    case
}

fn non_success(report: &Report, phase: &PhaseReport) -> TestCaseStatus {
    let of_agent = report.verdict == Verdict::Failed;
    let kind = if of_agent { NonSuccessKind::Failure } else { NonSuccessKind::Error };
    let mut status = TestCaseStatus::non_success(kind);
    let failure = report.failure.as_ref().filter(|failure| failure.phase == phase.name);
    status.set_message(failure.map_or(&phase.detail, |failure| &failure.error));
    status.set_type(name_of(&report.verdict));
    if let Some(failure) = failure {
        status.set_description(failure.lines().join("\n"));
    }
    status
}

/// Returns the evidence and the circumstances as pairs of names and values.
fn properties(report: &Report) -> Vec<(String, String)> {
    let mut found = vec![
        ("verdict".to_owned(), report.verdict_line()),
        ("exit_code".to_owned(), report.exit_code.to_string()),
        ("run_id".to_owned(), report.run_id.clone()),
    ];
    if !report.host.os.is_empty() {
        found.push(("host".to_owned(), format!("{}, Linux {}", report.host.os, report.host.kernel)));
    }
    let mut add =
        |name: &str, value: Option<String>| found.extend(value.map(|value| (name.to_owned(), value)));
    add("accelerator", report.host.accelerator.map(|accelerator| accelerator.to_string()));
    add("libvirt", report.host.daemon.as_ref().map(|daemon| daemon.uri.clone()));
    add("commit", report.workspace.as_ref().map(|workspace| workspace.commit.clone()));
    add("agent.sha256", report.agent.as_ref().map(|agent| agent.sha256.clone()));
    add("agent.version", report.agent.as_ref().and_then(|agent| agent.version.clone()));
    add("image.digest", report.guest.image.as_ref().map(|image| image.digest.to_string()));
    add("guest.kernel", report.guest.kernel.clone());
    for (moment, status) in [("join", &report.evidence.join), ("rejoin", &report.evidence.rejoin)] {
        let of = |value: fn(&StatusEvidence) -> String| status.as_ref().map(value);
        add(&format!("{moment}.boot_id"), of(|status| status.boot_id.clone()));
        add(&format!("{moment}.kv_revision"), of(|status| status.kv_revision.to_string()));
        add(&format!("{moment}.exe_sha256"), of(|status| status.exe_sha256.clone()));
    }
    let answers = [
        ("workload", &report.evidence.workload),
        ("workload_offline", &report.evidence.workload_offline),
        ("workload_rejoin", &report.evidence.workload_rejoin),
    ];
    for (moment, answer) in
        answers.into_iter().filter_map(|(moment, answer)| Some((moment, answer.as_ref()?)))
    {
        add(&format!("{moment}.boot_id"), Some(answer.boot_id.clone()));
        add(&format!("{moment}.page_size"), answer.page_size.map(|bytes| bytes.to_string()));
        add(&format!("{moment}.generation"), Some(answer.generation.to_string()));
        add(&format!("{moment}.starts"), Some(answer.starts.to_string()));
    }
    for sentence in not_tested(report) {
        add("not_tested", Some(sentence));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    /// Parses the text, and returns the number of tests, failures, errors and skipped cases. The numbers in the attributes
    /// of the suite must be those of the cases.
    fn counted(report: &Report) -> [usize; 4] {
        let text = junit(report).unwrap();
        let tree = roxmltree::Document::parse(&text).unwrap();
        let suite = tree.descendants().find(|node| node.has_tag_name("testsuite")).unwrap();
        let counted = ["testcase", "failure", "error", "skipped"]
            .map(|name| suite.descendants().filter(|node| node.has_tag_name(name)).count());
        let attributes = ["tests", "failures", "errors", "skipped"]
            .map(|name| suite.attribute(name).unwrap().parse::<usize>().unwrap());
        assert_eq!(attributes, counted);
        counted
    }

    #[test]
    fn each_verdict_has_its_cases() {
        assert_eq!(counted(&samples::verified()), [12, 0, 0, 0]);
        assert_eq!(counted(&samples::failed()), [12, 1, 0, 1]);
        assert_eq!(counted(&samples::unavailable()), [12, 0, 1, 4]);
        assert_eq!(counted(&samples::interrupted()), [12, 0, 1, 6]);
    }

    #[test]
    fn a_failure_has_its_cause_and_its_remedy() {
        let text = junit(&samples::failed()).unwrap();
        for words in
            ["systemd has restarted the agent 1 time", "what to do: read its journal", "&lt;script&gt;"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        let text = junit(&samples::verified()).unwrap();
        assert!(text.contains("name=\"rejoin.boot_id\" value=\"a1a1-after\""), "{text}");
        let mut odd = samples::failed();
        odd.failure.as_mut().unwrap().error = "a\0b\u{1b}[31m\u{ffff}]]>".to_owned();
        counted(&odd);
        let broken = Report { started_at: "yesterday".to_owned(), ..samples::verified() };
        assert!(format!("{:#}", junit(&broken).unwrap_err()).contains("yesterday"));
    }
}
