//! `cargo xtask bench torture`: measures `torture` with 1,000 crash states and ten boots, the recording included, and the
//! number of states that are judged in a minute. Compares both with their bounds.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask_core::error::Failure;
use xtask_core::format::{human_seconds, round};
use xtask_core::limits::TORTURE;
use xtask_core::report::Report;

use super::{Bench, timed};

const STATES: &str = "1000";
const BOOTS: &str = "10";
/// The seed of the states. With the same seed, each bench makes as many states of each kind.
const SEED: &str = "1";
/// The least number of states that must be judged in a minute.
const STATES_PER_MINUTE: f64 = 2000.0;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let arch = bench.args.arch;
    // The time of a torture does not include the agent's build and the making of a snapshot.
    bench.step("warm-up", "warm-up", || {
        bench.smoke(&["--until", "join"])?;
        Ok(((), "the agent is built, and the machine has a snapshot".to_owned()))
    })?;
    let (report, seconds) = bench.step(&arch.to_string(), "torture", || {
        let (report, seconds) = timed(|| torture(bench))?;
        Ok(((report, seconds), format!("{STATES} states and {BOOTS} boots")))
    })?;
    let torture = report.torture.context("the report has no crash states")?;
    let (rate, limit) = (torture.states_per_minute, TORTURE.as_secs_f64());
    let text = format!(
        "{arch}: {STATES} crash states and {} boots in {} of at most {}; {rate:.0} states a minute, at least \
         {STATES_PER_MINUTE}",
        torture.boots.len(),
        human_seconds(seconds),
        human_seconds(limit)
    );
    let figures = json!({
        "schema": 1, "arch": arch, "seconds": round(seconds), "limit": limit, "torture": torture,
    });
    bench.print(&figures, text)?;
    if seconds > limit || rate < STATES_PER_MINUTE {
        let hint = "check that nothing else runs on this machine; otherwise read the times of the phases in the report";
        return Err(Failure::guest("torture misses one of its bounds", hint).into());
    }
    Ok(())
}

/// Runs `cargo xtask torture` as a user types it. Returns an error unless the agent is verified.
fn torture(bench: &Bench<'_>) -> Result<Report> {
    let directory = bench.cache.history().join("bench");
    let mut command: Command = bench.cargo();
    command.args(["xtask", "torture", "--quiet", "--arch", &bench.args.arch.to_string()]);
    command.args(["--crash-states", STATES, "--boots", BOOTS, "--seed", SEED, "--report"]).arg(&directory);
    let status = command.status().context("run cargo xtask torture")?;
    bench.ui.check()?;
    ensure!(status.success(), "torture ended with {status}; its report is in {}", directory.display());
    Report::read(&directory)
}
