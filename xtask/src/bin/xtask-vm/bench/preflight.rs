//! `cargo xtask bench preflight`: the whole command as a person calls it, for both architectures, and the rehearsal of each,
//! against what they may take.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::BenchArgs;
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::limits;

use super::median;
use xtask_jobs::Ui;

/// One command, as often as asked.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    what: String,
    seconds: Vec<f64>,
    median: f64,
    limit: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct TimingFigures {
    schema: u32,
    subject: &'static str,
    measured: Vec<Measured>,
}

pub(super) fn run(args: &BenchArgs, ui: &Ui) -> Result<()> {
    let xtask_vm = std::env::current_exe().context("find this program")?;
    let path = xtask_binary()?;
    let mut measured =
        vec![measure(&path, &["preflight"], "preflight of both", limits::PREFLIGHT, args, ui)?];
    for arch in VmArchitecture::ALL.map(|arch| arch.to_string()) {
        let words = ["preflight", "--rehearse", "--arch", &arch];
        let what = format!("preflight and rehearsal of {arch}");
        measured.push(measure(&xtask_vm, &words, &what, limits::REHEARSAL, args, ui)?);
    }
    TimingFigures::new("preflight", measured)
        .conclude(args.json, "find the slow probe in xtask/core/src/host/")
}

/// `xtask`, beside this program.
pub(super) fn xtask_binary() -> Result<PathBuf> {
    let path = std::env::current_exe().context("find this program")?.with_file_name("xtask");
    ensure!(path.exists(), "find {}: `cargo xtask --help` builds it", path.display());
    Ok(path)
}

impl TimingFigures {
    pub(super) fn new(subject: &'static str, measured: Vec<Measured>) -> Self {
        Self { schema: 1, subject, measured }
    }

    /// Prints them; an error where one took longer than it may.
    pub(super) fn conclude(&self, json: bool, hint: &str) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
        } else {
            for Measured { what, seconds, median, limit } in &self.measured {
                let all: Vec<_> = seconds.iter().map(|one| format!("{one:.3}")).collect();
                println!("{what}: {} s, median {median:.3} s of at most {limit} s", all.join(", "));
            }
        }
        match self.measured.iter().find(|measured| measured.median > measured.limit) {
            None => Ok(()),
            Some(Measured { what, median, limit, .. }) => Err(Failure::guest(
                format!("{what} takes {median:.3} s, and the limit is {limit} s"),
                format!("check that nothing else runs on this machine; otherwise {hint}"),
            )
            .into()),
        }
    }
}

/// Once to warm what is cached, then as often as asked.
pub(super) fn measure(
    program: &Path,
    words: &[&str],
    what: &str,
    limit: Duration,
    args: &BenchArgs,
    ui: &Ui,
) -> Result<Measured> {
    let mut seconds = Vec::new();
    for round in 0..=args.rounds {
        ui.check()?;
        let started = Instant::now();
        let output = Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {}", program.display()))?;
        let took = started.elapsed().as_secs_f64();
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{} {}: {}: {message}",
            program.display(),
            words.join(" "),
            output.status
        );
        if round > 0 {
            seconds.push(took);
        }
    }
    let median = round(median(&seconds));
    let seconds = seconds.into_iter().map(round).collect();
    Ok(Measured { what: what.to_owned(), seconds, median, limit: limit.as_secs_f64() })
}
