//! `cargo xtask bench preflight`: measures the whole command for both architectures, and the rehearsal (the start of a
//! paused domain) for each. Compares the times with their limits.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::limits;

use super::{Bench, listed, median, rounded, timed};

/// A command with its time limit.
pub(super) struct TimedCommand {
    pub(super) what: String,
    pub(super) program: PathBuf,
    pub(super) words: Vec<String>,
    pub(super) limit: Duration,
}

/// The times of a command, one for each round.
#[derive(Debug, Serialize)]
struct Measured {
    what: String,
    seconds: Vec<f64>,
    median: f64,
    limit: f64,
}

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let mut commands = vec![TimedCommand {
        what: "preflight of both architectures".to_owned(),
        program: xtask_binary()?,
        words: vec!["preflight".to_owned()],
        limit: limits::PREFLIGHT,
    }];
    let xtask_vm = std::env::current_exe().context("find this program")?;
    commands.extend(VmArchitecture::ALL.map(|arch| TimedCommand {
        what: format!("preflight and rehearsal of {arch}"),
        program: xtask_vm.clone(),
        words: ["preflight", "--rehearse", "--arch", &arch.to_string()].map(str::to_owned).into(),
        limit: limits::REHEARSAL,
    }));
    bench.check_times(&commands, "find the slow probe in xtask/core/src/host/")
}

/// Returns the path of `xtask`, which is in the directory of this program.
pub(super) fn xtask_binary() -> Result<PathBuf> {
    binary_beside("xtask", "cargo xtask --help")
}

/// Returns the path of another binary of this package, which is in the directory of this program. `command` builds it.
pub(super) fn binary_beside(name: &str, command: &str) -> Result<PathBuf> {
    let path = std::env::current_exe().context("find this program")?.with_file_name(name);
    ensure!(path.exists(), "find {}: `{command}` builds it", path.display());
    Ok(path)
}

impl Bench<'_> {
    /// Measures the commands and prints the figures. Returns an error if a command exceeds its limit.
    pub(super) fn check_times(&self, commands: &[TimedCommand], hint: &str) -> Result<()> {
        let measured = commands.iter().map(|command| self.measure(command)).collect::<Result<Vec<_>>>()?;
        let line = |Measured { what, seconds, median, limit }: &Measured| {
            format!("{what}: {} s, median {median:.3} s of at most {limit} s", listed(seconds, 3))
        };
        let figures = json!({ "schema": 1, "subject": self.subject(), "measured": measured });
        self.print(&figures, measured.iter().map(line).collect::<Vec<_>>().join("\n"))?;
        let late = measured.iter().find(|measured| measured.median > measured.limit);
        let Some(Measured { what, median, limit, .. }) = late else { return Ok(()) };
        let error = format!("{what} takes {median:.3} s, and the limit is {limit} s");
        let hint = format!("check that nothing else runs on this machine; otherwise {hint}");
        Err(Failure::guest(error, hint).into())
    }

    /// Runs the command once to fill the caches, and then once for each round.
    fn measure(&self, TimedCommand { what, program, words, limit }: &TimedCommand) -> Result<Measured> {
        let name = program.display();
        let mut all = Vec::new();
        for _ in 0..=self.args.rounds {
            self.ui.check()?;
            let mut command = Command::new(program);
            command.args(words).stdin(Stdio::null());
            let (output, seconds) = timed(|| command.output().with_context(|| format!("run {name}")))?;
            let (status, message) = (output.status, String::from_utf8_lossy(&output.stderr));
            ensure!(status.success(), "{name} {}: {status}: {message}", words.join(" "));
            all.push(seconds);
        }
        let seconds = &all[1..];
        let (what, limit) = (what.clone(), limit.as_secs_f64());
        Ok(Measured { what, seconds: rounded(seconds), median: round(median(seconds)), limit })
    }
}
