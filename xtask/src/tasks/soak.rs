//! `cargo xtask soak`: what is too long for every change. Plain smokes, pairs at once, and smokes killed at random
//! moments, each followed by a look at what is left.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::cli::SoakArgs;
use crate::exit::Code;
use crate::limits;
use crate::paths::Cache;
use crate::report::human_seconds;
use crate::workspace::{Workspace, cargo};

use super::ci::AGENT_TESTS;

/// Of the crate `inspect`, by executions in the place of its seconds.
const FUZZ_TEST: &[&str] =
    &["test", "--quiet", "--package", "inspect", "--test", "fuzz", "--", "--nocapture", "whatever"];

/// Rounds by kind: how many passed, what the others said.
type Tally = BTreeMap<&'static str, (u32, Vec<String>)>;

pub(super) fn run(workspace: &Workspace, args: &SoakArgs) -> Result<()> {
    let mut tally = Tally::new();
    for round in 1..=args.smokes {
        note(&mut tally, "smoke", round, args.smokes, smoke(args));
    }
    for round in 1..=args.pairs {
        note(&mut tally, "pair", round, args.pairs, pair(args));
    }
    for round in 1..=args.kills {
        note(&mut tally, "kill", round, args.kills, kill_and_collect(args));
    }
    if args.agent {
        note(&mut tally, "agent", 1, 1, tests(workspace, AGENT_TESTS, ("IOT_AGENT_SOAK", "1")));
    }
    if args.fuzz > 0 {
        let executions = args.fuzz.to_string();
        note(&mut tally, "fuzz", 1, 1, tests(workspace, FUZZ_TEST, ("INSPECT_FUZZ_EXECUTIONS", &executions)));
    }
    let mut failed = 0;
    for (kind, (passed, failures)) in &tally {
        println!("soak {kind}: {passed} passed, {} failed", failures.len());
        failed += failures.len();
    }
    if failed == 0 { Ok(()) } else { Err(Code(1).into()) }
}

fn note(tally: &mut Tally, kind: &'static str, round: u32, rounds: u32, result: Result<String>) {
    let (passed, failures) = tally.entry(kind).or_default();
    match result {
        Ok(said) => {
            *passed += 1;
            eprintln!("soak {kind} {round} of {rounds}: {said}");
        }
        Err(error) => {
            eprintln!("soak {kind} {round} of {rounds}: FAILED: {error:#}");
            failures.push(format!("{error:#}"));
        }
    }
}

/// A smoke as a child, in a process group of its own so that it can be killed whole.
fn start(args: &SoakArgs) -> Result<Child> {
    let own = std::env::current_exe().context("find this very program")?;
    Command::new(own)
        .args(["smoke", "--quiet", "--arch", &args.arch.to_string()])
        .args(args.cold.then_some("--cold"))
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .context("start a smoke")
}

fn end(mut child: Child, started: Instant) -> Result<String> {
    let status = child.wait().context("wait for a smoke")?;
    ensure!(status.success(), "{status}");
    Ok(format!("passed in {}", human_seconds(started.elapsed().as_secs_f64())))
}

fn smoke(args: &SoakArgs) -> Result<String> {
    let started = Instant::now();
    end(start(args)?, started)
}

/// Tests that take more time where this variable is set.
fn tests(workspace: &Workspace, arguments: &[&str], (name, value): (&str, &str)) -> Result<String> {
    let started = Instant::now();
    let status = Command::new(cargo())
        .args(arguments)
        .env(name, value)
        .current_dir(workspace.root())
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .context("run the tests")?;
    ensure!(status.success(), "{status}; what failed is named above");
    Ok(format!("passed in {}", human_seconds(started.elapsed().as_secs_f64())))
}

fn pair(args: &SoakArgs) -> Result<String> {
    let started = Instant::now();
    let (one, other) = (start(args)?, start(args)?);
    let (one, other) = (end(one, started), end(other, started));
    Ok(format!("{}, {}", one?, other?))
}

/// SIGKILL at a random moment; then a short smoke collects, and nothing may be left.
fn kill_and_collect(args: &SoakArgs) -> Result<String> {
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).context("a random moment")?;
    let moment = limits::KILL_WINDOW.mul_f64(f64::from(u16::from_le_bytes(random)) / 65_536.0);
    let mut child = start(args)?;
    std::thread::sleep(moment);
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id")?).context("a process id")?;
    if child.try_wait().context("look at the smoke")?.is_none() {
        kill_process_group(pid, Signal::KILL).context("kill the smoke")?;
    }
    child.wait().context("wait for the killed smoke")?;
    // Any smoke collects first; this one then ends by a planted fault that is found before a guest is up.
    let own = std::env::current_exe().context("find this very program")?;
    let status = Command::new(own)
        .args(["smoke", "--quiet", "--arch", &args.arch.to_string(), "--sabotage", "kill-qemu"])
        .stdin(Stdio::null())
        .status()
        .context("run the smoke that collects")?;
    ensure!(status.code() == Some(1), "the smoke that collects ended with {status}, not with 1");
    let left = leftovers(&Cache::from_env()?)?;
    ensure!(left.is_empty(), "after a kill at {moment:?} this is left: {}", left.join(", "));
    Ok(format!("killed at {:.1} s, nothing left", moment.as_secs_f64()))
}

/// Processes of any run, and runs that still have their working files; a soak has the cache to itself.
fn leftovers(cache: &Cache) -> Result<Vec<String>> {
    let runs = cache.runs();
    let mut left = Vec::new();
    for entry in std::fs::read_dir(&runs).with_context(|| format!("list {}", runs.display()))? {
        let work = entry.with_context(|| format!("list {}", runs.display()))?.path().join("w");
        let processes = crate::paths::processes_naming(&work);
        left.extend(processes.iter().map(|pid| format!("process {}", pid.as_raw_nonzero())));
        if work.exists() {
            left.push(work.display().to_string());
        }
    }
    Ok(left)
}
