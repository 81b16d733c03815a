//! `cargo xtask bench warm`: a smoke from a warm layer against one that boots, in turn: from the command to the verdict, until
//! the agent has joined and to the end, and how long the power cut took to the rejoin.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use xtask::cli::{BenchArgs, Voice};
use xtask::paths::Cache;
use xtask::report::{Phase, PhaseStatus, Report, round};

use super::{mean, smoke_report};
use crate::interrupt::Interrupt;
use crate::screen::Screen;

/// Seconds, each from one run.
#[derive(Debug, Default, Serialize)]
struct Figures {
    schema: u32,
    subject: &'static str,
    cold_until_join: Vec<f64>,
    warm_until_join: Vec<f64>,
    cold: Vec<f64>,
    warm: Vec<f64>,
    power_cut_to_rejoin: Vec<f64>,
    /// Of the means: warm by cold.
    ratio_until_join: f64,
    ratio: f64,
}

pub(super) fn run(args: &BenchArgs, voice: Voice, interrupt: &Interrupt) -> Result<()> {
    let mut screen = Screen::new(voice);
    let cache = Cache::from_env()?;
    let mut figures = Figures { schema: 1, subject: "warm", ..Figures::default() };
    let mut measure = |title: &str, flags: &[&str]| -> Result<(f64, Report)> {
        screen.start(title, None);
        let started = Instant::now();
        let report = smoke_report(&cache, args, flags, interrupt)?;
        let seconds = round(started.elapsed().as_secs_f64());
        screen.end(PhaseStatus::Passed, &format!("smoke {}", flags.join(" ")));
        Ok((seconds, report))
    };
    // The layer, where there is none yet.
    measure("layer", &["--until", "join"])?;
    for _ in 0..args.rounds {
        figures.cold_until_join.push(measure("cold", &["--cold", "--until", "join"])?.0);
        figures.warm_until_join.push(measure("warm", &["--until", "join"])?.0);
        for (title, flags, seconds) in
            [("cold", &["--cold"][..], &mut figures.cold), ("warm", &[], &mut figures.warm)]
        {
            let (took, report) = measure(title, flags)?;
            seconds.push(took);
            let cut = [Phase::PowerCut, Phase::Rejoin];
            let phases = report.phases.iter().filter(|phase| cut.contains(&phase.name));
            figures.power_cut_to_rejoin.push(round(phases.map(|phase| phase.seconds).sum()));
        }
    }
    figures.ratio_until_join = round(mean(&figures.warm_until_join) / mean(&figures.cold_until_join));
    figures.ratio = round(mean(&figures.warm) / mean(&figures.cold));
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
        return Ok(());
    }
    let all = |seconds: &[f64]| seconds.iter().map(|one| format!("{one:.1}")).collect::<Vec<_>>().join(", ");
    let Figures { cold_until_join, warm_until_join, cold, warm, power_cut_to_rejoin, .. } = &figures;
    println!(
        "{} until join: cold {} s, warm {} s: {:.2} of it",
        args.arch,
        all(cold_until_join),
        all(warm_until_join),
        figures.ratio_until_join
    );
    println!(
        "{} all of it: cold {} s, warm {} s: {:.2} of it",
        args.arch,
        all(cold),
        all(warm),
        figures.ratio
    );
    println!("{} power cut to rejoin: {} s", args.arch, all(power_cut_to_rejoin));
    Ok(())
}
