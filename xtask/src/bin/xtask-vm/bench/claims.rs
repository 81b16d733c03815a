//! `cargo xtask bench`: what is claimed of emulation, of snapshots and of `xtask`. All of it is measured in turn in each round;
//! a claim is a ratio of two that were measured in the same one, or seconds where a limit in seconds was promised.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use xtask_core::arch::Accelerator;
use xtask_core::cache::Cache;
use xtask_core::cli::BenchArgs;
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::limits;
use xtask_core::plan::Plan;
use xtask_core::report::{Phase, Report};
use xtask_core::workspace::Workspace;

use super::bare::{Bare, ended, prepare};
use super::preflight::xtask_binary;
use super::{Scratch, cargo_as_typed, median, smoke};
use xtask_images::ReadyImage;
use xtask_jobs::{Step, Ui};

/// From the beginning of the boot, with its broker and its disks, to the first status.
const BOOT_TO_JOIN: &[Phase] = &[Phase::Boot, Phase::Provision, Phase::Join];
const CUT_TO_REJOIN: &[Phase] = &[Phase::PowerCut, Phase::Rejoin];

/// What was measured in one round, in seconds.
#[derive(Debug, Clone, Default, Serialize)]
struct Round {
    /// `xtask`, compiled from nothing.
    xtask_build: f64,
    xtask_start: f64,
    /// Bare QEMU with plain `-cpu max`, until cloud-init has finished; `None` where that is what a smoke has too.
    bare_max: Option<f64>,
    /// The same with a smoke's CPU.
    bare: f64,
    /// `cargo xtask smoke` from the command to its end; the agent is built already.
    cold: f64,
    warm: f64,
    cold_until_join: f64,
    warm_until_join: f64,
    /// Of the cold one, these phases.
    boot_to_join: f64,
    cold_cut_to_rejoin: f64,
    warm_cut_to_rejoin: f64,
}

/// Something that is said in public.
struct Claim {
    what: &'static str,
    of: fn(&Round) -> Option<f64>,
    /// What it may be; `None` where nothing was promised.
    limit: Option<f64>,
}

const CLAIMS: &[Claim] = &[
    Claim {
        what: "warm until join, seconds",
        of: |round| Some(round.warm_until_join),
        limit: Some(limits::WARM_UNTIL_JOIN.as_secs_f64()),
    },
    Claim {
        what: "warm until join, of cold until join",
        of: |round| Some(round.warm_until_join / round.cold_until_join),
        limit: Some(0.2),
    },
    Claim { what: "warm, of cold", of: |round| Some(round.warm / round.cold), limit: Some(0.5) },
    Claim {
        what: "boot to join, of a bare boot",
        of: |round| Some(round.boot_to_join / round.bare),
        limit: Some(1.1),
    },
    Claim {
        what: "our CPU flags, of -cpu max",
        of: |round| round.bare_max.map(|max| round.bare / max),
        limit: Some(0.5),
    },
    Claim {
        what: "power cut to rejoin, of a bare boot",
        of: |round| Some(round.cold_cut_to_rejoin / round.bare),
        limit: None,
    },
    Claim {
        what: "power cut to rejoin, warm, of cold",
        of: |round| Some(round.warm_cut_to_rejoin / round.cold_cut_to_rejoin),
        limit: None,
    },
    Claim { what: "xtask built, seconds", of: |round| Some(round.xtask_build), limit: None },
    Claim { what: "xtask started, milliseconds", of: |round| Some(round.xtask_start * 1000.0), limit: None },
];

/// A claim over all rounds.
#[derive(Debug, PartialEq, Serialize)]
struct ClaimResult {
    what: &'static str,
    median: f64,
    least: f64,
    most: f64,
    limit: Option<f64>,
    holds: bool,
}

#[derive(Debug, Serialize)]
struct ClaimFigures {
    schema: u32,
    subject: &'static str,
    arch: String,
    claims: Vec<ClaimResult>,
    rounds: Vec<Round>,
}

pub(super) fn run(workspace: &Workspace, args: &BenchArgs, ui: &Ui) -> Result<()> {
    let cache = Cache::from_env()?;
    let scratch = Scratch::new(&cache, ui)?;
    let bench = Bench { workspace, args, ui, cache, scratch };
    let rounds = bench.rounds()?;
    let figures = ClaimFigures {
        schema: 3,
        subject: "claims",
        arch: args.arch.to_string(),
        claims: evaluate(&rounds),
        rounds,
    };
    let written = bench.write(&figures)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        figures.print();
    }
    eprintln!("written to {}", written.display());
    let broken: Vec<_> =
        figures.claims.iter().filter(|claim| !claim.holds).map(ClaimResult::describe).collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Failure::guest(
        format!("measurements exceed their limits: {}", broken.join("; ")),
        "check that nothing else runs on this machine, and compare the rounds in the JSON",
    )
    .into())
}

impl ClaimResult {
    fn describe(&self) -> String {
        let most = self.limit.map_or_else(|| "anything".to_owned(), |limit| format!("at most {limit:.2}"));
        format!("{}: {:.3}, limit {most}", self.what, self.median)
    }
}

struct Bench<'a> {
    workspace: &'a Workspace,
    args: &'a BenchArgs,
    ui: &'a Ui,
    cache: Cache,
    /// Nobody else measures meanwhile.
    scratch: Scratch,
}

impl Bench<'_> {
    fn rounds(&self) -> Result<Vec<Round>> {
        let (plan, image, user) = prepare(self.workspace, self.args, &self.cache, self.ui)?;
        let rounds = self.rounds_of(&plan, &image);
        ended(user, rounds)
    }

    fn rounds_of(&self, plan: &Plan, image: &ReadyImage) -> Result<Vec<Round>> {
        if plan.accelerator() != Accelerator::Tcg {
            let error = format!(
                "bench: {} guests run under {} here, not emulated",
                self.args.arch,
                plan.accelerator()
            );
            return Err(Failure::host(error, "measure with --arch of the other architecture").into());
        }
        // What is built first, the agent and the snapshot among it, is in no figure.
        self.smoke("snapshot", &["--until", "join"])?;
        let own = plan.cpu.describe();
        let mut rounds = Vec::new();
        for number in 1..=self.args.rounds {
            let mut round = Round::default();
            let bare = |cpu: &str| -> Result<f64> {
                let kind = kind(self.args);
                let what = format!("bare {cpu}");
                self.ui.step(&self.cache, Step { kind: &kind, what: &what, title: "bare" }, || {
                    let bare = Bare { cache: &self.cache, plan, image, cpu };
                    let seconds = bare.boot(self.ui)?;
                    Ok((seconds, format!("round {number}: -cpu {cpu}")))
                })
            };
            round.bare_max = if own == "max" { None } else { Some(bare("max")?) };
            round.bare = bare(&own)?;
            let (cold, seconds) = self.smoke("cold", &["--cold"])?;
            (round.cold, round.boot_to_join) = (seconds, of(&cold, BOOT_TO_JOIN));
            round.cold_cut_to_rejoin = of(&cold, CUT_TO_REJOIN);
            let (warm, seconds) = self.smoke("warm", &["--warm"])?;
            (round.warm, round.warm_cut_to_rejoin) = (seconds, of(&warm, CUT_TO_REJOIN));
            round.cold_until_join = self.smoke("cold", &["--cold", "--until", "join"])?.1;
            round.warm_until_join = self.smoke("warm", &["--warm", "--until", "join"])?.1;
            self.time_xtask(&mut round)?;
            rounds.push(round);
        }
        Ok(rounds)
    }

    fn smoke(&self, title: &'static str, flags: &[&str]) -> Result<(Report, f64)> {
        let what = format!("smoke {}", flags.join(" "));
        self.ui.step(&self.cache, Step { kind: &kind(self.args), what: &what, title }, || {
            Ok((smoke(self.workspace, self.args, flags, self.ui)?, what.clone()))
        })
    }

    /// Compiled into a directory of its own; and started, the one that is there.
    fn time_xtask(&self, round: &mut Round) -> Result<()> {
        let mut command = cargo_as_typed(self.workspace);
        command.args(["build", "--quiet", "--package", "xtask", "--bin", "xtask", "--target-dir"]);
        command.arg(&self.scratch.path);
        let step = Step { kind: &kind(self.args), what: "xtask", title: "build" };
        round.xtask_build = self.ui.step(&self.cache, step, || {
            Ok((seconds(&mut command)?, "built xtask from nothing".to_owned()))
        })?;
        self.ui.check()?;
        self.scratch.clear()?;
        round.xtask_start = seconds(Command::new(xtask_binary()?).arg("--version"))?;
        Ok(())
    }

    fn write(&self, figures: &ClaimFigures) -> Result<PathBuf> {
        let directory = self.cache.history().join("bench");
        make_private_dir(&directory)?;
        let path = directory.join("claims.json");
        write_private(&path, serde_json::to_string_pretty(figures)?)?;
        Ok(path)
    }
}

/// Whose times are like one another.
fn kind(args: &BenchArgs) -> String {
    format!("bench-{}", args.arch)
}

/// What these phases of a run took.
fn of(report: &Report, phases: &[Phase]) -> f64 {
    let phases = report.phases.iter().filter(|phase| phases.contains(&phase.name));
    phases.map(|phase| phase.seconds).sum()
}

fn seconds(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(started.elapsed().as_secs_f64())
}

/// Each claim by the median of its rounds.
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

impl ClaimFigures {
    fn print(&self) {
        println!(
            "{} guests emulated, {} round(s); the median, and from the least to the most",
            self.arch,
            self.rounds.len()
        );
        for ClaimResult { what, median, least, most, limit, holds } in &self.claims {
            let limit = match (limit, holds) {
                (None, _) => String::new(),
                (Some(limit), true) => format!(", at most {limit:.2}"),
                (Some(limit), false) => format!(", MORE THAN {limit:.2}"),
            };
            println!("  {what:<36} {median:>7.2}  ({least:.2} to {most:.2}{limit})");
        }
        let line = |what: &str, of: fn(&Round) -> Option<f64>| {
            let all: Vec<_> = self.rounds.iter().filter_map(of).map(|one| format!("{one:.1}")).collect();
            println!("  {what:<36} {} s", all.join(", "));
        };
        line("bare boot, -cpu max", |round| round.bare_max);
        line("bare boot, our CPU flags", |round| Some(round.bare));
        line("boot to join, cold", |round| Some(round.boot_to_join));
        line("whole smoke, cold", |round| Some(round.cold));
        line("whole smoke, warm", |round| Some(round.warm));
        line("until join, cold", |round| Some(round.cold_until_join));
        line("until join, warm", |round| Some(round.warm_until_join));
        line("power cut to rejoin, cold", |round| Some(round.cold_cut_to_rejoin));
        line("power cut to rejoin, warm", |round| Some(round.warm_cut_to_rejoin));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round in which every promise is kept.
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
        assert!(same.iter().all(|claim| !claim.what.contains("CPU")), "where there is nothing to compare");
    }
}
