//! `cargo xtask soak`: what is too long for every change. Plain smokes, pairs at once, and smokes that are killed, or their QEMU, at
//! random moments, after which the next one must join; each followed by a look at what is left.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::cli::SoakArgs;
use crate::exit::{Code, Unavailable};
use crate::kept;
use crate::layer::{BAD, Layer};
use crate::limits;
use crate::paths::{Cache, processes_naming};
use crate::report::human_seconds;
use crate::run_dir::{directories, remove_tree};
use crate::workspace::{Workspace, cargo};

use super::ci::AGENT_TESTS;

/// Of the crate `inspect`, by executions in the place of its seconds.
const FUZZ_TEST: &[&str] =
    &["test", "--quiet", "--package", "inspect", "--test", "fuzz", "--", "--nocapture", "whatever"];

/// Rounds by kind: how many passed, what the others said.
type Tally = BTreeMap<&'static str, (u32, Vec<String>)>;

pub(super) fn run(workspace: &Workspace, args: &SoakArgs) -> Result<()> {
    if args.smokes + args.pairs + args.kills > 0 {
        alone()?;
    }
    let mut tally = Tally::new();
    for round in 1..=args.smokes {
        note(&mut tally, "smoke", round, args.smokes, tidy(smoke(args)));
    }
    for round in 1..=args.pairs {
        note(&mut tally, "pair", round, args.pairs, tidy(pair(args)));
    }
    for round in 1..=args.kills {
        note(&mut tally, "kill", round, args.kills, tidy(kill_and_go_on(args, round)));
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

/// A soak deletes warm layers and counts what is left.
fn alone() -> Result<()> {
    let unavailable = |error: String, hint: &str| -> anyhow::Error {
        let hint = format!("{hint}; or another IOT_XTASK_CACHE");
        Unavailable { error, hint }.into()
    };
    let kept = kept::all(&Cache::from_env()?).len();
    if kept > 0 {
        let error = format!("soak in a cache in which {kept} machine(s) are kept");
        return Err(unavailable(error, "cargo xtask vm list, vm rm"));
    }
    nothing_left(&Cache::from_env()?).map_err(|error| {
        unavailable(
            format!("soak in a cache that is in use: {error}"),
            "wait for its runs, or cargo xtask vm gc",
        )
    })
}

/// Whatever came of a round, nothing of it may be left.
fn tidy(result: Result<String>) -> Result<String> {
    let left = Cache::from_env().map_err(Into::into).and_then(|cache| nothing_left(&cache));
    match (result, left) {
        (Err(error), Err(left)) => Err(error.context(format!("{left:#}"))),
        (result, left) => left.and(result),
    }
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

/// This very program, also once cargo has put another in its place: a soak goes on for hours beside somebody who builds (proc(5)).
const OWN: &str = "/proc/self/exe";

/// A smoke as a child, in a process group of its own so that it can be killed whole.
fn start(args: &SoakArgs, more: &[&str]) -> Result<Child> {
    Command::new(OWN)
        .args(["smoke", "--quiet", "--arch", &args.arch.to_string()])
        .args(args.cold.then_some("--cold"))
        .args(more)
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
    end(start(args, &["--fsck"])?, started)
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
    let (one, other) = (start(args, &["--fsck"])?, start(args, &["--fsck"])?);
    let (one, other) = (end(one, started), end(other, started));
    Ok(format!("{}, {}", one?, other?))
}

/// Who is killed at a random moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The whole process group of the smoke: nobody is left to tidy up.
    Workflow,
    /// The machine alone: the smoke has to see it, and to end by itself.
    Qemu,
}

impl Victim {
    /// Whether a smoke may end with `code` (`None`: by a signal) so much later than this was killed in it.
    fn may_end(self, code: Option<i32>, later: Duration) -> bool {
        match (self, code) {
            // All was said by then, or the machine was about to lose its power anyway.
            (_, Some(0)) => true,
            (Self::Workflow, code) => code.is_none(),
            (Self::Qemu, code) => matches!(code, Some(1 | 69)) && later < limits::AFTER_KILL,
        }
    }
}

/// So many moments are drawn at most until there is something to be killed.
const DRAWS: u32 = 10;

/// SIGKILL at a random moment, of the one or the other; then a smoke must join, on what was left, and nothing may be left of both.
/// Every fourth round begins without a warm layer, so that its making is hit too.
fn kill_and_go_on(args: &SoakArgs, round: u32) -> Result<String> {
    for _ in 0..DRAWS {
        if let Some(said) = kill_once(args, round)? {
            return Ok(said);
        }
        eprintln!("soak kill {round}: nothing was there to be killed; another moment");
    }
    bail!(
        "at {DRAWS} moments nothing was there to be killed: smokes are shorter here than the window that the moments are drawn from"
    )
}

/// `None` where there was nothing to kill.
fn kill_once(args: &SoakArgs, round: u32) -> Result<Option<String>> {
    let cache = Cache::from_env()?;
    let makes_a_layer = !args.cold && round % 4 == 1;
    if makes_a_layer {
        remove_tree(&cache.layers())?;
    }
    let boots = makes_a_layer || args.cold;
    let window = if boots { limits::KILL_WINDOW } else { limits::WARM_KILL_WINDOW };
    let moment = window.mul_f64(random()?);
    let victim = if random()? < 0.5 { Victim::Workflow } else { Victim::Qemu };
    let before = directories(&cache.runs());
    let mut child = start(args, &[])?;
    std::thread::sleep(moment);
    let killed = kill(&mut child, victim, &cache, &before).and_then(|hit| {
        let at = Instant::now();
        Ok((hit, awaited(&mut child, hit)?, at.elapsed()))
    });
    let (hit, status, later) = match killed {
        Ok(killed) => killed,
        Err(error) => {
            // The next round has the cache to itself all the same.
            end_group(&child)?;
            child.wait().context("wait for the smoke")?;
            return Err(error);
        }
    };
    ensure!(
        hit.then_some(victim).map_or(status.success(), |victim| victim.may_end(status.code(), later)),
        "{victim:?} at {:.1} s, hit: {hit}: the smoke ended {:.1} s later with {status}; at most {} s are allowed without a verdict",
        moment.as_secs_f64(),
        later.as_secs_f64(),
        limits::AFTER_KILL.as_secs()
    );
    if !hit {
        return Ok(None);
    }
    let started = Instant::now();
    end(start(args, &["--until", "join"])?, started).context("the smoke after it")?;
    let what = match victim {
        Victim::Workflow => "the workflow killed",
        Victim::Qemu => "QEMU killed",
    };
    let layer = if makes_a_layer { ", without a warm layer" } else { "" };
    let (at, later) = (moment.as_secs_f64(), later.as_secs_f64());
    Ok(Some(format!("{what} at {at:.1} s{layer}, ended {later:.1} s later, {status}; joined after it")))
}

/// Whether there was somebody to kill.
fn kill(child: &mut Child, victim: Victim, cache: &Cache, before: &[PathBuf]) -> Result<bool> {
    if child.try_wait().context("look at the smoke")?.is_some() {
        return Ok(false);
    }
    if victim == Victim::Workflow {
        return end_group(child);
    }
    let is_qemu = |pid: &Pid| {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
        name.is_ok_and(|name| name.starts_with("qemu-system"))
    };
    let runs = directories(&cache.runs());
    let qemu = runs
        .iter()
        .filter(|run| !before.contains(run))
        .flat_map(|run| processes_naming(&run.join("w")))
        .find(is_qemu);
    qemu.map_or(Ok(false), |pid| found(kill_process(pid, Signal::KILL)).context("kill QEMU"))
}

/// SIGKILL to all of a smoke; whether there was something.
fn end_group(child: &Child) -> Result<bool> {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
    found(kill_process_group(group, Signal::KILL)).context("kill the smoke")
}

/// One that has just ended by itself was not there.
fn found(killed: rustix::io::Result<()>) -> Result<bool> {
    match killed {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// How it ended: by itself. Where something of it was killed it cannot go on for ever.
fn awaited(child: &mut Child, hit: bool) -> Result<ExitStatus> {
    let deadline = Instant::now() + limits::AFTER_KILL_TO_VERDICT;
    loop {
        if let Some(status) = child.try_wait().context("wait for the smoke")? {
            return Ok(status);
        }
        let late = hit && Instant::now() > deadline;
        ensure!(
            !late,
            "{} s after the kill the smoke has not ended",
            limits::AFTER_KILL_TO_VERDICT.as_secs()
        );
        std::thread::sleep(limits::POLL);
    }
}

/// From 0 to 1.
fn random() -> Result<f64> {
    let mut bytes = [0; 2];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).context("a random number")?;
    Ok(f64::from(u16::from_le_bytes(bytes)) / 65_536.0)
}

/// An error where anything is left: processes of any run, runs that still have their working files, layers that are no whole ones. A
/// soak has the cache to itself.
fn nothing_left(cache: &Cache) -> Result<()> {
    let mut left = Vec::new();
    for run in directories(&cache.runs()) {
        let work = run.join("w");
        let processes = processes_naming(&work);
        left.extend(processes.iter().map(|pid| format!("process {}", pid.as_raw_nonzero())));
        if work.exists() {
            left.push(work.display().to_string());
        }
    }
    let whole = |layer: &PathBuf| Layer::read(layer).is_ok() && !layer.join(BAD).exists();
    let layers = directories(&cache.layers());
    left.extend(layers.iter().filter(|layer| !whole(layer)).map(|layer| layer.display().to_string()));
    ensure!(left.is_empty(), "this is left: {}", left.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_smoke_that_ends_wrongly_after_a_kill_fails_its_round() {
        let (soon, late) = (Duration::from_secs(1), limits::AFTER_KILL + Duration::from_secs(1));
        for (victim, code, later, right) in [
            (Victim::Workflow, None, soon, true),
            (Victim::Workflow, Some(1), soon, false),
            (Victim::Workflow, Some(0), late, true),
            (Victim::Qemu, Some(1), soon, true),
            (Victim::Qemu, Some(69), soon, true),
            (Victim::Qemu, Some(1), late, false),
            (Victim::Qemu, Some(101), soon, false),
            (Victim::Qemu, None, soon, false),
            (Victim::Qemu, Some(0), late, true),
        ] {
            assert_eq!(victim.may_end(code, later), right, "{victim:?} {code:?} {later:?}");
        }
    }

    #[test]
    fn what_is_left_of_a_round_is_named() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let run = cache.runs().join("1125-120000-abcd");
        std::fs::create_dir_all(&run).unwrap();
        nothing_left(&cache).unwrap();
        let work = run.join("w");
        std::fs::create_dir(&work).unwrap();
        let mut process = Command::new("sh")
            .args(["-c", "echo ready; read x; :"])
            .arg(work.join("x"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its command line can be read a moment after it was started only.
        process.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let left = nothing_left(&cache).unwrap_err().to_string();
        assert!(left.contains(&format!("process {}", process.id())), "{left}");
        assert!(left.contains(work.to_str().unwrap()), "{left}");
        drop(process.stdin.take());
        process.wait().unwrap();
        std::fs::remove_dir(&work).unwrap();
        nothing_left(&cache).unwrap();
        let layer = cache.layers().join("half");
        std::fs::create_dir_all(&layer).unwrap();
        assert!(nothing_left(&cache).unwrap_err().to_string().contains("half"));
    }
}
