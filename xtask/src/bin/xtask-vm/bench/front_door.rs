//! `cargo xtask bench front-door`: what the front door takes to be compiled from nothing, and to start once it is.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask::cli::{BenchArgs, Voice};
use xtask::paths::Cache;
use xtask::report::{PhaseStatus, round};
use xtask::workspace::{Workspace, cargo, inherited_from_cargo};

use super::Scratch;
use super::preflight::front_door;
use crate::interrupt::Interrupt;
use crate::screen::Screen;

pub(super) fn run(
    workspace: &Workspace,
    args: &BenchArgs,
    voice: Voice,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut screen = Screen::new(voice);
    let scratch = Scratch::new(&Cache::from_env()?, interrupt)?;
    let (mut builds, mut starts) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        screen.start("build", None);
        let mut command = Command::new(cargo());
        command.args(["build", "--quiet", "--package", "xtask", "--bin", "xtask", "--target-dir"]);
        command.arg(&scratch.path).current_dir(workspace.root());
        for name in inherited_from_cargo() {
            command.env_remove(name);
        }
        builds.push(seconds(&mut command)?);
        screen.end(PhaseStatus::Passed, &format!("round {round}: the front door from nothing"));
        starts.push(seconds(Command::new(front_door()?).arg("--version"))?);
        scratch.clear(interrupt)?;
    }
    if args.json {
        println!(
            "{:#}",
            json!({ "schema": 1, "subject": "front-door", "build_seconds": builds, "start_seconds": starts })
        );
    } else {
        println!("front door: built in {builds:?} s, started in {starts:?} s");
    }
    Ok(())
}

fn seconds(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(round(started.elapsed().as_secs_f64()))
}
