//! Tests of the report.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

#[test]
fn a_report_lists_every_phase_in_order_and_reads_back() {
    let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
    let mut phase = |name, status| {
        report.phases.push(PhaseReport {
            name,
            status,
            started_seconds: None,
            seconds: 1.0,
            limit_seconds: None,
            detail: String::new(),
            console_offset: None,
        });
    };
    phase(Phase::Preflight, PhaseStatus::Passed);
    phase(Phase::Build, PhaseStatus::Failed);
    phase(Phase::Teardown, PhaseStatus::Passed);
    let error = anyhow::Error::new(crate::error::Failure::guest("no such file", "build it"))
        .context("read the agent");
    report.failure = Some(FailureReport::new(Phase::Build, &error, vec![]));
    report.conclude(Verdict::Failed, 2.0);

    let read: Report = serde_json::from_str(&report.to_json()).unwrap();
    assert!(read.phases.iter().map(|phase| phase.name).eq(Phase::of_smoke()));
    assert!(Phase::of_smoke().is_sorted() && Phase::PowerCut.title() == "power cut");
    assert_eq!(read.phases[2].status, PhaseStatus::Skipped);
    assert_eq!(read.exit_code, 1);
    let failure = read.failure.unwrap();
    assert_eq!((failure.error.as_str(), failure.causes.len()), ("read the agent", 1));
    assert_eq!(
        failure.lines(),
        ["error: build: read the agent", "  caused by: no such file", "  what to do: build it"]
    );
}

fn agent() -> AgentReport {
    AgentReport {
        path: "/t/iot-agent".into(),
        sha256: "0".repeat(64),
        version: None,
        target: "aarch64-unknown-linux-gnu".to_owned(),
        given_as: None,
        profile: Some("release".to_owned()),
        rustflags: None,
        inspect_warnings: Vec::new(),
    }
}

#[test]
fn the_verdict_says_what_makes_an_agent_another_than_the_released_one() {
    let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
    report.conclude(Verdict::Verified, 99.0);
    report.agent = Some(agent());
    assert_eq!(report.verdict_line(), "VERIFIED  iot-agent on aarch64, in 99 s");
    report.workspace = Some(Commit { commit: "0123456789abcdef".repeat(3), dirty: true });
    report.agent = Some(AgentReport {
        profile: Some("dev".to_owned()),
        rustflags: Some("-Ctarget-cpu=native".to_owned()),
        inspect_warnings: vec!["instructions".to_owned(), "allocator".to_owned()],
        ..agent()
    });
    assert_eq!(
        report.verdict_line(),
        "VERIFIED  iot-agent on aarch64, profile dev, RUSTFLAGS -Ctarget-cpu=native, 2 warning(s) of inspect, \
         commit 0123456789ab (dirty), in 99 s"
    );
    let given_as = Some("./iot-agent".into());
    report.agent = Some(AgentReport { given_as, profile: None, ..agent() });
    report.workspace.as_mut().unwrap().dirty = false;
    let line = "VERIFIED  iot-agent on aarch64, agent given as ./iot-agent, commit 0123456789ab, in 99 s";
    assert_eq!(report.verdict_line(), line);
}

#[test]
fn a_report_of_an_earlier_version_is_read() {
    let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
    report.agent = Some(agent());
    report.snapshot = Some(SnapshotReport {
        key: "debian-12-aarch64-0".to_owned(),
        made_at: "2026-11-22T10:15:00Z".to_owned(),
        age_seconds: Some(86_400),
        made_by: "1121-101500-0a0b".to_owned(),
        reused: Vec::new(),
        clock_step_seconds: None,
    });
    report.evidence.workload = Some(WorkloadEvidence {
        machine: "aarch64".to_owned(),
        page_size: Some(4096),
        boot_id: "b0b0".to_owned(),
        generation: 1,
        starts: 1,
    });
    let mut json = serde_json::to_value(&report).unwrap();
    assert!(json.as_object_mut().unwrap().remove("workspace").is_some());
    let workload = json["evidence"]["workload"].as_object_mut().unwrap();
    assert_eq!(workload.remove("page_size"), Some(4096.into()));
    let snapshot = json["snapshot"].as_object_mut().unwrap();
    assert_eq!(snapshot.remove("age_seconds"), Some(86_400.into()));
    let fields = json["agent"].as_object_mut().unwrap();
    for name in ["given_as", "profile", "rustflags", "inspect_warnings"] {
        assert!(fields.remove(name).is_some(), "{name}");
    }
    let read: Report = serde_json::from_value(json).unwrap();
    assert_eq!(read.snapshot.unwrap().age_seconds, None);
    assert_eq!(read.evidence.workload.unwrap().page_size, None);
    assert!(read.workspace.is_none() && read.agent.unwrap().inspect_warnings.is_empty());
}

#[test]
fn the_files_of_an_earlier_run_are_removed_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    for name in FILES.iter().chain(&["notes.txt"]) {
        std::fs::write(directory.path().join(name), "").unwrap();
    }
    remove_earlier(directory.path()).unwrap();
    let left: Vec<_> = crate::fs::entries(directory.path()).collect();
    assert_eq!(left, [directory.path().join("notes.txt")]);
    remove_earlier(directory.path()).unwrap();
}

#[test]
fn a_failure_before_the_run_has_a_report_with_its_exit_code() {
    let table = [
        (error::Failure::host("the cache cannot be written", "set IOT_XTASK_CACHE"), 69),
        (error::Failure::usage("--agent /x: no such file"), 2),
        (error::Failure::interrupted(), 130),
    ];
    for (failure, code) in table {
        let directory = tempfile::tempdir().unwrap();
        let report = Report::before_run(VmArchitecture::Aarch64, &failure.clone().into());
        let path = report.write(&directory.path().join("new")).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let read: Report = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!((read.exit_code, read.verdict), (code, failure.kind.verdict()));
        assert_eq!(read.failure.unwrap().error, failure.to_string());
    }
}

#[test]
fn the_verdict_names_the_image_that_was_tested() {
    let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
    report.guest.image = Some(ImageReport {
        name: "debian-12".to_owned(),
        requested: None,
        wanted: "ubuntu-24.04".to_owned(),
        source: "packages".to_owned(),
        digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
        verified: true,
        built: false,
        fallback_reason: Some("cloud-images.ubuntu.com cannot be reached: no such name".to_owned()),
    });
    report.conclude(Verdict::Verified, 99.0);
    assert_eq!(
        report.verdict_line(),
        "VERIFIED  iot-agent on aarch64, debian-12 instead of ubuntu-24.04, because cloud-images.ubuntu.com cannot be \
         reached, in 99 s"
    );
    let image = report.guest.image.as_mut().unwrap();
    (image.fallback_reason, image.verified) = (None, false);
    assert!(report.verdict_line().contains("debian-12 (UNVERIFIED IMAGE"), "{}", report.verdict_line());
    report.guest.image.as_mut().unwrap().built = true;
    let line = report.verdict_line();
    assert!(line.contains("debian-12 (built from packages, no pinned digest), in"), "{line}");
}
