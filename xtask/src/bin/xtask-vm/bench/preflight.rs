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
    let both = MeasuredCommand {
        program: &path,
        words: &["preflight"],
        what: "preflight of both",
        limit: limits::PREFLIGHT,
    };
    let mut measured = vec![both.measure(args.rounds, ui)?];
    for arch in VmArchitecture::ALL.map(|arch| arch.to_string()) {
        let rehearsal = MeasuredCommand {
            program: &xtask_vm,
            words: &["preflight", "--rehearse", "--arch", &arch],
            what: &format!("preflight and rehearsal of {arch}"),
            limit: limits::REHEARSAL,
        };
        measured.push(rehearsal.measure(args.rounds, ui)?);
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

/// A command that is measured.
pub(super) struct MeasuredCommand<'a> {
    pub(super) program: &'a Path,
    pub(super) words: &'a [&'a str],
    /// Its name in the figures.
    pub(super) what: &'a str,
    pub(super) limit: Duration,
}

impl MeasuredCommand<'_> {
    /// Runs it once to warm what is cached, then `rounds` times.
    pub(super) fn measure(&self, rounds: u32, ui: &Ui) -> Result<Measured> {
        let Self { program, words, what, limit } = *self;
        let mut seconds = Vec::new();
        for round in 0..=rounds {
            ui.check()?;
            let started = Instant::now();
            let output = Command::new(program)
                .args(words)
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("run {}", program.display()))?;
            let took = started.elapsed().as_secs_f64();
            let (status, message) = (output.status, String::from_utf8_lossy(&output.stderr));
            ensure!(status.success(), "{} {}: {status}: {message}", program.display(), words.join(" "));
            if round > 0 {
                seconds.push(took);
            }
        }
        let median = round(median(&seconds));
        let seconds = seconds.into_iter().map(round).collect();
        Ok(Measured { what: what.to_owned(), seconds, median, limit: limit.as_secs_f64() })
    }
}
