//! `cargo xtask bench`: what this project claims about speed, measured in turn in one run on this machine, as ratios.

mod boot;
mod cpu;
mod fetch;
mod footprint;
mod front_door;
mod image;
mod inspect;
mod preflight;
mod warm;

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use xtask::cli::{BenchArgs, Subject, Voice};
use xtask::exit::{Unavailable, host_fault};
use xtask::paths::{Cache, make_private_dir};
use xtask::report::{Report, round};
use xtask::run_dir::{end_processes, try_lock};
use xtask::workspace::Workspace;

use crate::image::discard;
use crate::interrupt::Interrupt;

/// Measures what was asked for.
pub(crate) fn run(workspace: &Workspace, args: &BenchArgs, voice: Voice) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let measured = match args.subject {
        Subject::Cpu => cpu::run(workspace, args, voice, &interrupt),
        Subject::FrontDoor => front_door::run(workspace, args, voice, &interrupt),
        Subject::Warm => warm::run(args, voice, &interrupt),
        Subject::Boot => return boot::run(workspace, args, voice, &interrupt),
        Subject::Fetch => fetch::run(args, voice, &interrupt),
        Subject::Footprint => footprint::run(args, voice, &interrupt),
        Subject::Image => image::run(args, voice, &interrupt),
        Subject::Inspect => return inspect::run(workspace, args, &interrupt),
        Subject::Preflight => return preflight::run(args, &interrupt),
    };
    // What was measured may be a child that the Ctrl-C ended.
    interrupt.check()?;
    measured.map_err(|error| host_fault(error, "measure", "see the causes"))
}

/// A directory in the cache, as large as what is measured. A bench that was killed leaves it to the next one.
struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    fn new(cache: &Cache, interrupt: &Interrupt) -> Result<Self> {
        make_private_dir(cache.root())?;
        let path = cache.root().join("bench");
        let lock = try_lock(&cache.root().join("bench.lock"))?.ok_or_else(|| Unavailable {
            error: format!("use {}: another bench runs in it", path.display()),
            hint: "wait for it: two at once would measure each other".to_owned(),
        })?;
        if path.exists() {
            end_processes(&path)?;
            discard(&path, interrupt)?;
        }
        make_private_dir(&path)?;
        Ok(Self { path, _lock: lock })
    }

    /// Empty again.
    fn clear(&self, interrupt: &Interrupt) -> Result<()> {
        discard(&self.path, interrupt)?;
        make_private_dir(&self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // After a Ctrl-C too, which is why nobody asks for another one.
        if let Err(error) = discard(&self.path, &Interrupt::default()) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// A whole smoke as a child, which must pass; its report.
fn smoke_report(cache: &Cache, args: &BenchArgs, more: &[&str], interrupt: &Interrupt) -> Result<Report> {
    let own = std::env::current_exe().context("find this very program")?;
    let directory = cache.history().join("bench");
    let status = Command::new(own)
        .args(["smoke", "--quiet", "--arch", &args.arch.to_string()])
        .args(more)
        .arg("--report")
        .arg(&directory)
        .stdin(Stdio::null())
        .status()
        .context("run a smoke")?;
    interrupt.check()?;
    let path = directory.join("report.json");
    ensure!(status.success(), "the smoke ended with {status}; its report is {}", path.display());
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
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
