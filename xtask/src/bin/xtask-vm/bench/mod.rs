//! `cargo xtask bench`: what this project claims about speed, measured in turn in one run on this machine, as ratios.

mod bare;
mod claims;
mod delivery;
mod fetch;
mod footprint;
mod image;
mod inspect;
mod preflight;

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use xtask_core::cache::{CACHE_VARIABLE, Cache};
use xtask_core::cli::{BenchArgs, BenchSubject, Verbosity};
use xtask_core::error::{Failure, host_fault};
use xtask_core::format::round;
use xtask_core::fs::{is_own, make_own_dir, make_private_dir, remove_file, try_lock};
use xtask_core::processes::end_processes;
use xtask_core::report::Report;
use xtask_core::workspace::Workspace;

use xtask_images::discard;
use xtask_jobs::Ui;

/// Measures what was asked for.
pub(crate) fn run(workspace: &Workspace, args: &BenchArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let measured = match args.subject {
        BenchSubject::Claims => claims::run(workspace, args, &ui),
        BenchSubject::Delivery => delivery::run(workspace, args, &ui),
        BenchSubject::Fetch => fetch::run(args, &ui),
        BenchSubject::Footprint => footprint::run(workspace, args, &ui),
        BenchSubject::Image => image::run(args, &ui),
        BenchSubject::Inspect => return inspect::run(workspace, args, &ui),
        BenchSubject::Preflight => return preflight::run(args, &ui),
    };
    // What was measured may be a child that the Ctrl-C ended.
    ui.check()?;
    measured.map_err(|error| host_fault(error, "measure", "see the causes"))
}

/// A directory in the cache, as large as what is measured. A bench that was killed leaves it to the next one.
struct Scratch {
    path: PathBuf,
    ui: Ui,
    _lock: File,
}

impl Scratch {
    fn new(cache: &Cache, ui: &Ui) -> Result<Self> {
        make_private_dir(cache.root())?;
        let path = cache.root().join("bench");
        let lock = try_lock(&cache.root().join("bench.lock"))?.ok_or_else(|| {
            Failure::host(
                format!("use {}: another bench is running in it", path.display()),
                "wait until it ends: two at once would disturb each other's measurements",
            )
        })?;
        if path.exists() {
            if !is_own(&path) {
                return Err(Failure::host(
                    format!("use {}: this workflow did not make that directory", path.display()),
                    format!("move it away, or set {CACHE_VARIABLE} to another directory"),
                )
                .into());
            }
            end_processes(&path)?;
            discard(&path, ui)?;
        }
        make_own_dir(&path)?;
        Ok(Self { path, ui: ui.clone(), _lock: lock })
    }

    /// Empty again.
    fn clear(&self) -> Result<()> {
        discard(&self.path, &self.ui)?;
        make_own_dir(&self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // After a Ctrl-C too, which is why nobody asks for another one.
        if let Err(error) = discard(&self.path, &self.ui.uninterruptible()) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// `cargo xtask smoke`, as somebody types it, which must pass; its report, and the seconds from the command to its end.
fn smoke(workspace: &Workspace, args: &BenchArgs, more: &[&str], ui: &Ui) -> Result<(Report, f64)> {
    let directory = Cache::from_env()?.history().join("bench");
    let mut command = cargo_as_typed(workspace);
    command.args(["xtask", "smoke", "--quiet", "--arch", &args.arch.to_string()]).args(more);
    command.arg("--report").arg(&directory).stdin(Stdio::null());
    let path = directory.join("report.json");
    remove_file(&path)?;
    let started = Instant::now();
    let status = command.status().context("run cargo xtask smoke")?;
    let seconds = started.elapsed().as_secs_f64();
    ui.check()?;
    ensure!(status.success(), "the smoke ended with {status}; its report is {}", path.display());
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let report = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
    Ok((report, seconds))
}

fn cargo_as_typed(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo();
    command.env("CARGO_TERM_QUIET", "true");
    command
}

/// Of at least one.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

fn mean(seconds: &[f64]) -> f64 {
    seconds.iter().sum::<f64>() / seconds.len() as f64
}

/// Two ways to do the same, and how they compare.
#[derive(Debug, Serialize)]
struct Comparison {
    schema: u32,
    subject: &'static str,
    theirs: &'static str,
    their_seconds: Vec<f64>,
    our_seconds: Vec<f64>,
    /// How many times as fast ours is, from the means.
    speedup: f64,
}

impl Comparison {
    fn new(subject: &'static str, theirs: &'static str, their_seconds: &[f64], our_seconds: &[f64]) -> Self {
        let speedup = round(mean(their_seconds) / mean(our_seconds));
        let rounded = |seconds: &[f64]| seconds.iter().map(|seconds| round(*seconds)).collect();
        let (their_seconds, our_seconds) = (rounded(their_seconds), rounded(our_seconds));
        Self { schema: 1, subject, theirs, their_seconds, our_seconds, speedup }
    }

    fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
        } else {
            let all = |seconds: &[f64]| {
                seconds.iter().map(|one| format!("{one:.1}")).collect::<Vec<_>>().join(", ")
            };
            println!(
                "{}: {} {} s, ours {} s: {:.2} times as fast",
                self.subject,
                self.theirs,
                all(&self.their_seconds),
                all(&self.our_seconds),
                self.speedup
            );
        }
        Ok(())
    }
}
