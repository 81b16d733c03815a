//! Tests of disturbances, one for each. A sound agent survives them, so the smoke must verify it. `cargo xtask ci` runs a
//! third of this file's tests.

use xtask_core::cache::Cache;
use xtask_core::cli::Disturbance;
use xtask_core::error::Verdict;
use xtask_core::format::name_of;
use xtask_core::report::Phase;

use super::{assert_nothing_left, smoke};
use crate::scratch::assert_code;

#[test]
fn clock_year_back() {
    assert_survived(Disturbance::ClockYearBack);
}

#[test]
fn qemu_stopped() {
    assert_survived(Disturbance::QemuStopped);
}

#[test]
fn broker_restarted() {
    assert_survived(Disturbance::BrokerRestarted);
}

#[test]
fn slow_disk() {
    assert_survived(Disturbance::SlowDisk);
}

fn assert_survived(disturbance: Disturbance) {
    let name = name_of(&disturbance);
    let ended = smoke(&["--disturb", &name]);
    assert_code(&ended.output, 0);
    let (report, message) = (&ended.report, ended.message());
    assert_eq!((report.verdict, report.disturbance.as_deref()), (Verdict::Verified, Some(name.as_str())));
    assert!(message.contains(&format!("disturbing the device: {name}")), "{message}");
    assert!(message.contains(&format!("disturbed: {name}")), "the verdict line does not say so: {message}");
    assert!(report.phases.iter().any(|phase| phase.name == Phase::Rejoin), "{message}");
    assert_nothing_left(&Cache::from_env().unwrap(), &report.run_id);
}
