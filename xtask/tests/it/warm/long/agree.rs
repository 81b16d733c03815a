//! Compares a warm smoke with a cold one.

use xtask_core::report::{Phase, PhaseStatus, Report};

use super::super::{SMOKE, Warm, assert_saved, turn};
use crate::scratch::{XTASK_VM, assert_code, message};

#[test]
fn a_warm_run_and_a_cold_one_agree() {
    let warm = turn();
    let compared = compare(&warm);
    let (made, restored) = (warm.made.snapshot.as_ref().unwrap(), compared.snapshot.as_ref().unwrap());
    assert!(made.age_seconds < restored.age_seconds, "{:?} {:?}", made.age_seconds, restored.age_seconds);
    assert_eq!(restored.made_by, warm.made.run_id, "restored, not made again");
    // Each restored guest begins with the time at which the snapshot was saved. The guest reaches no time server
    // before its clock is set.
    let (first, later) = (made.clock_step_seconds.unwrap(), restored.clock_step_seconds.unwrap());
    assert!(first < later, "{first} s and, later, {later} s");
    assert!(compared.phases.iter().all(|phase| phase.status == PhaseStatus::Passed), "{:?}", compared.phases);
    let evidence = &compared.evidence;
    let (join, rejoin) = (evidence.join.as_ref().unwrap(), evidence.rejoin.as_ref().unwrap());
    assert!(join.boot_id != rejoin.boot_id && join.exe_sha256 == rejoin.exe_sha256);
    assert!(evidence.workload_offline.is_some() && evidence.workload_rejoin.is_some());
    // The runs wrote only to their own overlays, so the shared snapshot is unchanged.
    assert_saved(&warm.snapshot());
}

/// Checks that a warm run and a cold run agree, and that the comparison fails if the cold run fails. Returns the warm
/// run's report.
fn compare(warm: &Warm) -> Report {
    let smoke = |arguments: &[&str]| {
        warm.scratch.run(XTASK_VM, &[&SMOKE, &["--verify-cold", "--warm"][..], arguments].concat())
    };
    let output = smoke(&["--until", "join"]);
    assert_code(&output, 0);
    assert!(message(&output).contains("the warm run and the cold one agree"), "{}", message(&output));
    let output = smoke(&["--sabotage", "cold-panics"]);
    assert_code(&output, 1);
    let differs = "the verdict: warm verified, cold failed";
    assert!(message(&output).contains(differs), "{}", message(&output));
    let report = |name| {
        let path = warm.scratch.cache().join("compared").join(name).join("report.json");
        serde_json::from_slice::<Report>(&std::fs::read(path).unwrap()).unwrap()
    };
    let cold = report("cold");
    assert_eq!(cold.failure.unwrap().phase, Phase::Boot);
    assert!(cold.host.libvirt.is_some(), "the report of a failed boot has no libvirt");
    report("warm")
}
