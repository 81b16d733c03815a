//! `cargo xtask bench torture`: measures `torture` with 1,000 crash states and ten boots, the recording included, and the
//! number of states that are judged in a minute. Then measures `torture` with each fault once, and the medians of the
//! episodes. Compares all of these with their bounds.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask_core::error::Failure;
use xtask_core::format::{human_seconds, round};
use xtask_core::limits::{ALL_FAULTS, EPISODE, EPISODE_WITH_BOOT, TORTURE};
use xtask_core::report::{EpisodeReport, Report};

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
    let states = ["--crash-states", STATES, "--boots", BOOTS, "--seed", SEED];
    let (report, seconds) = bench.step(&arch.to_string(), "crash states", || {
        let (report, seconds) = timed(|| torture(bench, &states))?;
        Ok(((report, seconds), format!("{STATES} states and {BOOTS} boots")))
    })?;
    let torture_report = report.torture.context("the report has no crash states")?;
    let (report, faults_seconds) = bench.step(&arch.to_string(), "faults", || {
        let (report, seconds) = timed(|| torture(bench, &["--faults", "all", "--seed", SEED]))?;
        Ok(((report, seconds), "each fault once, and pairs".to_owned()))
    })?;
    let faults = report.faults.context("the report has no episodes")?;
    let (rate, limit) = (torture_report.states_per_minute, TORTURE.as_secs_f64());
    let medians = [false, true].map(|boots| median(&faults.episodes, boots));
    let bounds = [EPISODE, EPISODE_WITH_BOOT].map(|bound| bound.as_secs_f64());
    let slow: Vec<_> = faults.healing.iter().filter(|row| !row.slow.is_empty()).collect();
    let text = format!(
        "{arch}: {STATES} crash states and {} boots in {} of at most {}; {rate:.0} states a minute, at least \
         {STATES_PER_MINUTE}\n\
         {arch}: {} episodes in {} of at most {}; median {:.1} s of at most {} s, with a boot {:.1} s of at most {} s; \
         {} faults took more than three times their median",
        torture_report.boots.len(),
        human_seconds(seconds),
        human_seconds(limit),
        faults.episodes.len(),
        human_seconds(faults_seconds),
        human_seconds(ALL_FAULTS.as_secs_f64()),
        medians[0],
        bounds[0],
        medians[1],
        bounds[1],
        slow.len()
    );
    let figures = json!({
        "schema": 2, "arch": arch, "seconds": round(seconds), "limit": limit, "torture": torture_report,
        "faults_seconds": round(faults_seconds), "faults_limit": ALL_FAULTS.as_secs_f64(), "faults": faults,
        "median_seconds": medians.map(round), "median_limits": bounds,
    });
    bench.print(&figures, text)?;
    let is_slow = faults_seconds > ALL_FAULTS.as_secs_f64()
        || medians.iter().zip(bounds).any(|(median, bound)| *median > bound);
    if seconds > limit || rate < STATES_PER_MINUTE || is_slow {
        let hint = "check that nothing else runs on this machine; otherwise read the times of the phases in the report";
        return Err(Failure::guest("torture misses one of its bounds", hint).into());
    }
    Ok(())
}

/// Returns the median duration of the episodes with a boot, or of those without one.
fn median(episodes: &[EpisodeReport], boots: bool) -> f64 {
    let mut seconds: Vec<_> =
        episodes.iter().filter(|episode| episode.boots == boots).map(|episode| episode.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or_default()
}

/// Runs `cargo xtask torture` as a user types it. Returns an error unless the agent is verified.
fn torture(bench: &Bench<'_>, arguments: &[&str]) -> Result<Report> {
    let directory = bench.cache.history().join("bench");
    let mut command: Command = bench.cargo();
    command.args(["xtask", "torture", "--quiet", "--arch", &bench.args.arch.to_string()]);
    command.args(arguments).arg("--report").arg(&directory);
    let status = command.status().context("run cargo xtask torture")?;
    bench.ui.check()?;
    ensure!(status.success(), "torture ended with {status}; its report is in {}", directory.display());
    Report::read(&directory)
}
