//! `cargo xtask bench try`: measures the time from the command to the first output of the program, when the kernel is in
//! the cache, and compares it with its limit. The first run, which fills the cache, is the cold one.

use std::io::Read as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::limits;

use super::preflight::binary_beside;
use super::{Bench, listed, median, rounded, timed};

/// A program of the guest that needs no image: it is static, and prints at once.
const PROGRAM: xtask_core::build::standalone::Standalone =
    xtask_core::build::standalone::Standalone { name: "prompt", sources: &["xtask/attempt/guest/prompt.rs"] };

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let arch = bench.args.arch;
    let (_, path) = PROGRAM.executable(bench.workspace, &bench.cache, arch)?;
    let device = arch.pick("max-x86", "pi5");
    let mut seconds = Vec::new();
    for _ in 0..=bench.args.rounds {
        bench.ui.check()?;
        seconds.push(first_output(bench, &path, device)?);
    }
    let (cold, warm) = (seconds[0], &seconds[1..]);
    let (middle, limit) = (median(warm), limits::FIRST_OUTPUT.as_secs_f64());
    let figures = json!({
        "schema": 1, "subject": bench.subject(), "first_seconds": round(cold), "seconds": rounded(warm), "median": round(middle),
        "limit": limit,
    });
    let text = format!(
        "first output of try on {device}: {} s, median {middle:.1} s of at most {limit} s; the first run {cold:.1} s",
        listed(warm, 1)
    );
    bench.print(&figures, text)?;
    if middle <= limit {
        return Ok(());
    }
    let error = format!("the first output of try takes {middle:.1} s, and the limit is {limit} s");
    Err(Failure::guest(error, "check that nothing else runs on this machine; see xtask/attempt").into())
}

/// Returns the seconds from the command to its first byte on stdout.
fn first_output(bench: &Bench<'_>, path: &std::path::Path, device: &str) -> Result<f64> {
    let program = binary_beside("xtask-try", "cargo xtask try --help")?;
    let mut command = Command::new(&program);
    command.args(["try", "--quiet", "--device", device]).arg(path).current_dir(bench.workspace.root());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let (mut child, seconds) = timed(|| {
        let mut child = command.spawn().with_context(|| format!("run {}", program.display()))?;
        let stdout = child.stdout.as_mut().context("read the program's output")?;
        stdout.read_exact(&mut [0; 1]).context("read the program's first output")?;
        Ok(child)
    })?;
    let status = child.wait().with_context(|| format!("wait for {}", program.display()))?;
    ensure!(status.success(), "{}: {status}", program.display());
    Ok(seconds)
}
