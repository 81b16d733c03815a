//! Reports of runs with each verdict, for tests.

use xtask_core::arch::VmArchitecture;
use xtask_core::error::{Failure, Verdict};
use xtask_core::report::{
    AgentReport, EventKind, EventReport, FailureReport, ImageReport, Phase, PhaseReport, PhaseStatus, Report,
    StatusEvidence, StatusReport, WorkloadEvidence,
};

/// Returns a report in which the phases before `end` passed and took ten seconds each.
fn until(end: Phase) -> Report {
    let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
    for (index, name) in
        Phase::of_smoke().enumerate().filter(|(_, name)| *name < end || *name == Phase::Teardown)
    {
        report.phases.push(PhaseReport {
            name,
            status: PhaseStatus::Passed,
            started_seconds: Some(10.0 * index as f64),
            seconds: 10.0,
            limit_seconds: Some(300.0),
            detail: format!("the detail of {}", name.title()),
            console_offset: (name > Phase::Inspect).then(|| 9 * (index as u64 - 3)),
        });
    }
    report.guest.image = Some(ImageReport {
        name: "debian-12".to_owned(),
        requested: None,
        wanted: "ubuntu-24.04".to_owned(),
        source: "https://example.org/debian-12.qcow2".to_owned(),
        digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
        verified: true,
        built: false,
        fallback_reason: None,
    });
    report.agent = Some(AgentReport {
        path: "/t/iot-agent".into(),
        sha256: "1".repeat(64),
        version: Some("0.1.0".to_owned()),
        target: "aarch64-unknown-linux-gnu".to_owned(),
        given_as: None,
        profile: Some("release".to_owned()),
        rustflags: None,
        inspect_warnings: Vec::new(),
    });
    report
}

fn failing(phase: Phase, error: &anyhow::Error, verdict: Verdict) -> Report {
    let mut report = until(phase);
    report.phases.push(PhaseReport {
        name: phase,
        status: PhaseStatus::Failed,
        started_seconds: Some(80.0),
        seconds: 5.5,
        limit_seconds: Some(60.0),
        detail: error.to_string(),
        console_offset: Some(50),
    });
    report.failure =
        Some(FailureReport::new(phase, error, vec!["[  9.1] <script>alert(1)</script>".to_owned()]));
    report.conclude(verdict, 85.5);
    report
}

fn status(revision: u64, boot_id: &str) -> StatusEvidence {
    StatusEvidence {
        boot_id: boot_id.to_owned(),
        kv_revision: revision,
        exe_sha256: "1".repeat(64),
        machine: "aarch64".to_owned(),
        agent_version: "0.1.0".to_owned(),
    }
}

fn workload(boot_id: &str, generation: u64, starts: u64) -> Option<WorkloadEvidence> {
    let machine = "aarch64".to_owned();
    Some(WorkloadEvidence { machine, page_size: Some(4096), boot_id: boot_id.to_owned(), generation, starts })
}

pub(crate) fn verified() -> Report {
    let mut report = until(Phase::Teardown);
    let evidence = &mut report.evidence;
    (evidence.join, evidence.rejoin) = (Some(status(2, "b0b0-before")), Some(status(25, "a1a1-after")));
    evidence.workload = workload("b0b0-before", 1, 1);
    evidence.workload_offline = workload("a1a1-after", 1, 2);
    evidence.workload_rejoin = workload("a1a1-after", 2, 3);
    report.events = vec![
        EventReport { seconds: 40.0, kind: EventKind::Boot, text: "the machine was restored".to_owned() },
        EventReport { seconds: 95.0, kind: EventKind::Fault, text: "power cut".to_owned() },
    ];
    report.statuses = [(2, "b0b0-before"), (25, "a1a1-after")]
        .map(|(kv_revision, boot_id)| StatusReport {
            seconds: 4.0 * kv_revision as f64,
            kv_revision,
            boot_id: boot_id.to_owned(),
            exe_sha256: "1".repeat(64),
            sequence: 1,
            uptime_seconds: 30,
            desired_revision: 3,
            deployments: vec!["persistent running".to_owned()],
        })
        .to_vec();
    report.conclude(Verdict::Verified, 120.0);
    report
}

pub(crate) fn failed() -> Report {
    let error =
        anyhow::Error::new(Failure::guest("systemd has restarted the agent 1 time", "read its journal"))
            .context("ask root in the guest");
    failing(Phase::PowerCut, &error, Verdict::Failed)
}

pub(crate) fn unavailable() -> Report {
    let failure = Failure::host("the broker ended: signal 9", "run again; nothing is known about the agent");
    failing(Phase::Join, &failure.into(), Verdict::Unavailable)
}

pub(crate) fn interrupted() -> Report {
    failing(Phase::Boot, &Failure::interrupted().into(), Verdict::Interrupted)
}
