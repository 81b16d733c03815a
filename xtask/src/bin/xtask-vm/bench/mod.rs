//! `cargo xtask bench`: measures what this project claims about speed. Things that are compared are measured in turn,
//! in the same run and on the same machine.

mod bare;
mod claims;
mod delivery;
mod fetch;
mod footprint;
mod image;
mod inspect;
mod preflight;
mod torture;
mod trial;

use std::fmt::Display;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use xshell::Shell;
use xtask_core::bail_host;
use xtask_core::build::{self, Agent};
use xtask_core::cache::{CACHE_VARIABLE, Cache};
use xtask_core::cli::{BenchArgs, BenchSubject, BuildArgs, Verbosity};
use xtask_core::error::{Verdict, host_fault};
use xtask_core::format::{name_of, round};
use xtask_core::fs::{is_own, make_own_dir, make_private_dir, try_lock};
use xtask_core::message;
use xtask_core::output::{print, print_json};
use xtask_core::processes::end_processes;
use xtask_core::report::Report;
use xtask_core::workspace::Workspace;
use xtask_images::discard;
use xtask_jobs::{Step, Ui};

use crate::smoke::compare;

/// Measures the requested subject.
pub(crate) fn run(workspace: &Workspace, args: &BenchArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let of_host = |error| host_fault(error, "measure", "see the causes");
    let bench = Bench::new(workspace, args, &ui).map_err(of_host)?;
    let measured = match args.subject {
        BenchSubject::Claims => claims::run(&bench),
        BenchSubject::Delivery => delivery::run(&bench),
        BenchSubject::Fetch => fetch::run(&bench),
        BenchSubject::Footprint => footprint::run(&bench),
        BenchSubject::Image => image::run(&bench),
        BenchSubject::Inspect => return inspect::run(&bench),
        BenchSubject::Torture => return torture::run(&bench),
        BenchSubject::Preflight => return preflight::run(&bench),
        BenchSubject::Try => return trial::run(&bench),
    };
    // If Ctrl-C ended a measured child, this returns the interruption instead of the child's failure.
    ui.check()?;
    measured.map_err(of_host)
}

/// The context in which every subject measures, compares and prints.
struct Bench<'a> {
    workspace: &'a Workspace,
    args: &'a BenchArgs,
    ui: &'a Ui,
    cache: Cache,
    /// A directory in the cache for the measured files. If a bench is killed, the next one deletes the directory.
    scratch: PathBuf,
    /// The lock that keeps other benches from measuring at the same time.
    _lock: File,
}

impl<'a> Bench<'a> {
    fn new(workspace: &'a Workspace, args: &'a BenchArgs, ui: &'a Ui) -> Result<Self> {
        let cache = Cache::open()?;
        make_private_dir(cache.root())?;
        let scratch = cache.root().join("bench");
        let Some(lock) = try_lock(&cache.root().join("bench.lock"))? else {
            bail_host!(
                "use {}: another bench is running in it", scratch.display();
                "wait until it ends: two at once would disturb each other's measurements"
            );
        };
        if scratch.exists() {
            if !is_own(&scratch) {
                bail_host!(
                    "use {}: this workflow did not make that directory", scratch.display();
                    "move it away, or set {CACHE_VARIABLE} to another directory"
                );
            }
            end_processes(&scratch)?;
            discard(&scratch, ui)?;
        }
        make_own_dir(&scratch)?;
        Ok(Self { workspace, args, ui, cache, scratch, _lock: lock })
    }

    /// Empties the scratch directory.
    fn clear(&self) -> Result<()> {
        discard(&self.scratch, self.ui)?;
        make_own_dir(&self.scratch)
    }

    fn subject(&self) -> String {
        name_of(&self.args.subject)
    }

    /// Runs one measurement and shows it as a line on the screen. The line ends with the text that `body` returns.
    fn step<T>(&self, what: &str, title: &str, body: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let kind = match self.args.subject {
            BenchSubject::Claims | BenchSubject::Delivery => self.args.arch.to_string(),
            _ => self.subject(),
        };
        self.ui.step(&self.cache, Step { kind: &format!("bench-{kind}"), what, title }, body)
    }

    /// Builds the agent as a smoke does.
    fn agent(&self) -> Result<Agent> {
        let shell = Shell::new().context("create the shell that runs commands")?;
        let build = BuildArgs { arch: self.args.arch, profile: "release".to_owned() };
        build::build(&shell, self.workspace, &build)
    }

    /// Runs `cargo xtask smoke` as a user types it. The smoke must pass. Returns its report and the seconds from the
    /// command to its end.
    fn smoke(&self, more: &[&str]) -> Result<(Report, f64)> {
        let directory = self.cache.history().join("bench");
        let mut command = self.cargo();
        command.args(["xtask", "smoke", "--quiet", "--arch", &self.args.arch.to_string()]).args(more);
        let (report, seconds) = timed(|| compare::smoke(command, &directory))?;
        self.ui.check()?;
        let (verdict, path) = (report.verdict, directory.join("report.json"));
        ensure!(
            verdict == Verdict::Verified,
            "the smoke ended {verdict:?}; its report is {}",
            path.display()
        );
        Ok((report, seconds))
    }

    fn cargo(&self) -> Command {
        let mut command = self.workspace.cargo();
        command.env("CARGO_TERM_QUIET", "true");
        command
    }

    /// Prints the figures as JSON, or as this text.
    fn print(&self, figures: &impl Serialize, text: impl Display) -> Result<()> {
        if self.args.json { print_json(&serde_json::to_value(figures)?) } else { print(text) }
    }

    /// Prints a comparison of two ways to do the same thing. The speedup is the ratio of the mean times.
    fn compare(&self, name: &str, theirs: &[f64], ours: &[f64]) -> Result<()> {
        let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len() as f64;
        let (subject, speedup) = (self.subject(), round(mean(theirs) / mean(ours)));
        let figures = json!({
            "schema": 1, "subject": subject, "theirs": name,
            "their_seconds": rounded(theirs), "our_seconds": rounded(ours), "speedup": speedup,
        });
        let (theirs, ours) = (listed(theirs, 1), listed(ours, 1));
        self.print(
            &figures,
            format!("{subject}: {name} {theirs} s, ours {ours} s: {speedup:.2} times as fast"),
        )
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        // The directory is also deleted after a Ctrl-C, so this deletion does not react to the Ctrl-C.
        if let Err(error) = discard(&self.scratch, &self.ui.uninterruptible()) {
            message!("warning: {error:#}");
        }
    }
}

/// Returns the value of `body`, and the seconds that it took.
fn timed<T>(body: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let started = Instant::now();
    let value = body()?;
    Ok((value, started.elapsed().as_secs_f64()))
}

/// Returns the median. There must be at least one value.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2])
}

fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().copied().map(round).collect()
}

fn listed(values: &[f64], digits: usize) -> String {
    values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(", ")
}
