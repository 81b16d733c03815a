//! `cargo xtask bench`: measures the claims about emulation, snapshots and `xtask`. Each round measures all of them in
//! turn. A claim is a figure that this project publishes: the ratio of two times from the same round, or a time.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use xtask_core::arch::Accelerator;
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::message;
use xtask_core::plan::Plan;
use xtask_core::report::{Phase, Report};
use xtask_core::{bail_host, limits};
use xtask_images::ReadyImage;

use super::bare::Bare;
use super::preflight::xtask_binary;
use super::{Bench, listed, median, timed};

/// The phases from the boot to the first status. The phase `boot` also starts the broker and makes the disks.
const BOOT_TO_JOIN: &[Phase] = &[Phase::Boot, Phase::Provision, Phase::Join];
const CUT_TO_REJOIN: &[Phase] = &[Phase::PowerCut, Phase::Rejoin];

/// The measurements of one round, in seconds.
#[derive(Debug, Clone, Default, Serialize)]
struct Round {
    /// The compilation of `xtask` from nothing.
    xtask_build: f64,
    xtask_start: f64,
    /// A boot under bare QEMU with plain `-cpu max`, until cloud-init has finished; `None` if a smoke has that CPU too.
    bare_max: Option<f64>,
    /// The same boot with the CPU of a smoke.
    bare: f64,
    /// A cold smoke from the command to its end. The agent is already built.
    cold: f64,
    warm: f64,
    cold_until_join: f64,
    warm_until_join: f64,
    /// The phases boot, provision and join of the cold smoke.
    boot_to_join: f64,
    cold_cut_to_rejoin: f64,
    warm_cut_to_rejoin: f64,
}

/// A published figure.
struct Claim {
    what: &'static str,
    of: fn(&Round) -> Option<f64>,
    /// The largest permitted value; `None` if no limit was promised.
    limit: Option<f64>,
}

const fn at_most(limit: f64, what: &'static str, of: fn(&Round) -> Option<f64>) -> Claim {
    Claim { what, of, limit: Some(limit) }
}

const fn unlimited(what: &'static str, of: fn(&Round) -> Option<f64>) -> Claim {
    Claim { what, of, limit: None }
}

const CLAIMS: &[Claim] = &[
    at_most(limits::WARM_UNTIL_JOIN.as_secs_f64(), "warm until join, seconds", |r| Some(r.warm_until_join)),
    at_most(0.2, "warm until join, of cold until join", |r| Some(r.warm_until_join / r.cold_until_join)),
    at_most(0.5, "warm, of cold", |r| Some(r.warm / r.cold)),
    at_most(1.1, "boot to join, of a bare boot", |r| Some(r.boot_to_join / r.bare)),
    at_most(0.5, "our CPU flags, of -cpu max", |r| r.bare_max.map(|max| r.bare / max)),
    unlimited("power cut to rejoin, of a bare boot", |r| Some(r.cold_cut_to_rejoin / r.bare)),
    unlimited("power cut to rejoin, warm, of cold", |r| Some(r.warm_cut_to_rejoin / r.cold_cut_to_rejoin)),
    unlimited("xtask built, seconds", |r| Some(r.xtask_build)),
    unlimited("xtask started, milliseconds", |r| Some(r.xtask_start * 1000.0)),
];

/// The figures behind the claims, in seconds.
const SHOWN: &[Claim] = &[
    unlimited("bare boot, -cpu max", |r| r.bare_max),
    unlimited("bare boot, our CPU flags", |r| Some(r.bare)),
    unlimited("boot to join, cold", |r| Some(r.boot_to_join)),
    unlimited("whole smoke, cold", |r| Some(r.cold)),
    unlimited("whole smoke, warm", |r| Some(r.warm)),
    unlimited("until join, cold", |r| Some(r.cold_until_join)),
    unlimited("until join, warm", |r| Some(r.warm_until_join)),
    unlimited("power cut to rejoin, cold", |r| Some(r.cold_cut_to_rejoin)),
    unlimited("power cut to rejoin, warm", |r| Some(r.warm_cut_to_rejoin)),
];

/// The result of a claim over all rounds.
#[derive(Debug, PartialEq, Serialize)]
struct ClaimResult {
    what: &'static str,
    median: f64,
    least: f64,
    most: f64,
    limit: Option<f64>,
    holds: bool,
}

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let rounds = bench.with_image(|plan, image| rounds(bench, plan, image))?;
    let claims = evaluate(&rounds);
    let figures = json!({
        "schema": 3, "subject": "claims", "arch": bench.args.arch, "claims": claims, "rounds": rounds,
    });
    let directory = bench.cache.history().join("bench");
    make_private_dir(&directory)?;
    let path = directory.join("claims.json");
    write_private(&path, format!("{figures:#}"))?;
    bench.print(&figures, table(bench, &claims, &rounds))?;
    message!("written to {}", path.display());
    let broken: Vec<_> = claims.iter().filter(|claim| !claim.holds).map(ClaimResult::describe).collect();
    let error = format!("measurements exceed their limits: {}", broken.join("; "));
    let hint = "check that nothing else runs on this machine, and compare the rounds in the JSON";
    ensure!(broken.is_empty(), Failure::guest(error, hint));
    Ok(())
}

impl ClaimResult {
    fn describe(&self) -> String {
        let most = self.limit.map(|limit| format!(", limit at most {limit:.2}")).unwrap_or_default();
        format!("{}: {:.3}{most}", self.what, self.median)
    }
}

fn rounds(bench: &Bench<'_>, plan: &Plan, image: &ReadyImage) -> Result<Vec<Round>> {
    if plan.accelerator() != Accelerator::Tcg {
        bail_host!(
            "bench: {} guests run under {} here, not emulated", bench.args.arch, plan.accelerator();
            "measure with --arch of the other architecture"
        );
    }
    // This smoke builds the agent and the snapshot, so that no figure includes them.
    smoke(bench, "snapshot", &["--until", "join"])?;
    (1..=bench.args.rounds).map(|number| round_of(bench, number, plan, image)).collect()
}

fn round_of(bench: &Bench<'_>, number: u32, plan: &Plan, image: &ReadyImage) -> Result<Round> {
    let mut round = Round::default();
    let own = plan.cpu.describe();
    let bare = |cpu: &str| {
        bench.step(&format!("bare {cpu}"), "bare", || {
            Ok((Bare { bench, plan, image, cpu }.boot()?, format!("round {number}: -cpu {cpu}")))
        })
    };
    round.bare_max = if own == "max" { None } else { Some(bare("max")?) };
    round.bare = bare(&own)?;
    let (cold, seconds) = smoke(bench, "cold", &["--cold"])?;
    (round.cold, round.boot_to_join) = (seconds, of(&cold, BOOT_TO_JOIN));
    round.cold_cut_to_rejoin = of(&cold, CUT_TO_REJOIN);
    let (warm, seconds) = smoke(bench, "warm", &["--warm"])?;
    (round.warm, round.warm_cut_to_rejoin) = (seconds, of(&warm, CUT_TO_REJOIN));
    round.cold_until_join = smoke(bench, "cold", &["--cold", "--until", "join"])?.1;
    round.warm_until_join = smoke(bench, "warm", &["--warm", "--until", "join"])?.1;
    // The compilation goes into the scratch directory. The start is measured with the `xtask` beside this program, not
    // with the one that is compiled here.
    let mut build = bench.cargo();
    build.args(["build", "--quiet", "--package", "xtask", "--bin", "xtask", "--target-dir"]);
    build.arg(&bench.scratch);
    round.xtask_build = bench
        .step("xtask", "build", || Ok((seconds_of(&mut build)?, "built xtask from nothing".to_owned())))?;
    bench.ui.check()?;
    bench.clear()?;
    round.xtask_start = seconds_of(Command::new(xtask_binary()?).arg("--version"))?;
    Ok(round)
}

fn smoke(bench: &Bench<'_>, title: &str, flags: &[&str]) -> Result<(Report, f64)> {
    let what = format!("smoke {}", flags.join(" "));
    bench.step(&what, title, || Ok((bench.smoke(flags)?, what.clone())))
}

/// Returns the seconds that these phases of a run took together.
fn of(report: &Report, phases: &[Phase]) -> f64 {
    let phases = report.phases.iter().filter(|phase| phases.contains(&phase.name));
    phases.map(|phase| phase.seconds).sum()
}

fn seconds_of(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let (status, seconds) = timed(|| command.status().with_context(|| format!("run {command:?}")))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(seconds)
}

/// Evaluates each claim by the median of its rounds.
fn evaluate(rounds: &[Round]) -> Vec<ClaimResult> {
    let results = CLAIMS.iter().filter_map(|claim| {
        let values: Vec<f64> = rounds.iter().filter_map(claim.of).collect();
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        let median = median(&values);
        let holds = claim.limit.is_none_or(|limit| median <= limit);
        let [median, least, most] = [median, least, most].map(round);
        Some(ClaimResult { what: claim.what, median, least, most, limit: claim.limit, holds })
    });
    results.collect()
}

fn table(bench: &Bench<'_>, claims: &[ClaimResult], rounds: &[Round]) -> String {
    let (arch, count) = (bench.args.arch, rounds.len());
    let head = "round(s); median (minimum to maximum)";
    let mut lines = vec![format!("{arch} guests emulated, {count} {head}")];
    lines.extend(claims.iter().map(|ClaimResult { what, median, least, most, limit, holds }| {
        let limit = match (limit, holds) {
            (None, _) => String::new(),
            (Some(limit), true) => format!(", at most {limit:.2}"),
            (Some(limit), false) => format!(", MORE THAN {limit:.2}"),
        };
        format!("  {what:<36} {median:>7.2}  ({least:.2} to {most:.2}{limit})")
    }));
    lines.extend(SHOWN.iter().map(|shown| {
        let values: Vec<_> = rounds.iter().filter_map(shown.of).collect();
        format!("  {:<36} {} s", shown.what, listed(&values, 1))
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a round in which every claim holds.
    fn kept() -> Round {
        Round {
            xtask_build: 20.0,
            xtask_start: 0.01,
            bare_max: Some(120.0),
            bare: 50.0,
            cold: 90.0,
            warm: 40.0,
            cold_until_join: 55.0,
            warm_until_join: 8.0,
            boot_to_join: 50.0,
            cold_cut_to_rejoin: 25.0,
            warm_cut_to_rejoin: 25.0,
        }
    }

    #[test]
    fn each_promise_can_be_broken() {
        assert!(evaluate(&[kept()]).iter().all(|claim| claim.holds));
        type Change = fn(&mut Round);
        let changes: [(&str, Change); 5] = [
            ("warm until join, seconds", |round| {
                (round.warm_until_join, round.cold_until_join) = (16.0, 90.0)
            }),
            ("warm until join, of cold until join", |round| round.cold_until_join = 35.0),
            ("warm, of cold", |round| round.warm = 46.0),
            ("boot to join, of a bare boot", |round| round.boot_to_join = 56.0),
            ("our CPU flags, of -cpu max", |round| round.bare_max = Some(90.0)),
        ];
        for (what, change) in changes {
            let mut broken = kept();
            change(&mut broken);
            let broken = evaluate(&[broken]);
            let broken: Vec<_> = broken.iter().filter(|claim| !claim.holds).map(|claim| claim.what).collect();
            assert_eq!(broken, [what]);
        }
        let promises = CLAIMS.iter().filter(|claim| claim.limit.is_some());
        assert_eq!(promises.count(), changes.len(), "a promise without a row here");
    }

    #[test]
    fn a_claim_is_the_median_of_its_rounds_and_shows_their_spread() {
        let round = |warm| Round { warm, ..kept() };
        let of = |rounds: &[Round]| {
            let results = evaluate(rounds);
            let warm = results.iter().find(|claim| claim.what == "warm, of cold").unwrap();
            (warm.median, warm.least, warm.most, warm.holds)
        };
        assert_eq!(of(&[round(90.0), round(36.0), round(45.0)]), (0.5, 0.4, 1.0, true));
        assert_eq!(of(&[round(90.0), round(36.0)]), (0.7, 0.4, 1.0, false));
        let same = evaluate(&[Round { bare_max: None, ..kept() }]);
        assert!(
            same.iter().all(|claim| !claim.what.contains("CPU")),
            "a smoke's CPU is max, so there is nothing to compare"
        );
    }
}
