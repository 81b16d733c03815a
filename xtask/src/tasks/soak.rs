//! `cargo xtask soak`: tests that take too long for every change. It repeats smokes, runs two at once, and kills
//! smokes or their QEMU at random moments. After a kill, the next smoke must reach the phase `join`. After each round,
//! the soak checks for leftovers.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::cli::SoakArgs;
use xtask_core::error::Failure;
use xtask_core::format::human_seconds;
use xtask_core::fs::directories;
use xtask_core::message;
use xtask_core::output::print;
use xtask_core::processes::processes_naming;
use xtask_core::runs::instance;
use xtask_core::snapshot::{BAD, SnapshotManifest};
use xtask_core::workspace::Workspace;

use super::ci;

mod broker;
mod faults;
mod kills;

/// The arguments that run the fuzz test of the crate `inspect`. An environment variable sets the number of executions,
/// which is otherwise limited by time.
const FUZZ_TEST: &[&str] =
    &["test", "--quiet", "--package", "inspect", "--test", "fuzz", "--", "--nocapture", "whatever"];

/// The arguments that run the test of the corpus. It fetches gigabytes when it runs for the first time.
const CORPUS_TEST: &[&str] = &[
    "test",
    "--quiet",
    "--package",
    "xtask-inspection",
    "--test",
    "corpus",
    "--",
    "--nocapture",
    "--include-ignored",
];

/// The arguments that run the test of the pages. It prints the paths of its pictures.
const PAGES_TEST: &[&str] =
    &["test", "--quiet", "--package", "xtask-reports", "--features", "real", "--", "--nocapture", "pages::"];

/// A kind of round: its name, the number of rounds, and a function that runs one round and returns a line about it.
type Kind<'a> = (String, u32, Box<dyn Fn(u32) -> Result<String> + 'a>);

pub(super) fn run(workspace: &Workspace, args: &SoakArgs) -> Result<()> {
    if needs_cache(args) {
        alone()?;
    }
    // The long tests are ignored by `ci`.
    let agent_tests: Vec<_> = ci::AGENT_TESTS.split(' ').chain(["--include-ignored"]).collect();
    let executions = args.fuzz.to_string();
    let fuzz = || tests(workspace, FUZZ_TEST, Some(("INSPECT_FUZZ_EXECUTIONS", OsStr::new(&executions))));
    let rest: [Kind<'_>; 11] = [
        ("smoke".to_owned(), args.smokes, Box::new(|_| tidy(smoke(args, &["--fsck"])))),
        ("pair".to_owned(), args.pairs, Box::new(|_| tidy(pair(args)))),
        (
            "power cuts".to_owned(),
            (args.power_cuts > 0).into(),
            Box::new(|_| tidy(smoke(args, &["--power-cuts", &args.power_cuts.to_string()]))),
        ),
        ("episodes".to_owned(), (args.episodes > 0).into(), Box::new(|_| tidy(torture(args)))),
        ("kill".to_owned(), args.kills, Box::new(|round| tidy(kills::kill_and_go_on(args, round)))),
        (
            "agent".to_owned(),
            args.agent.into(),
            Box::new(|_| tests(workspace, &agent_tests, Some(("IOT_AGENT_SOAK", OsStr::new("1"))))),
        ),
        (
            "agent with a newer broker".to_owned(),
            args.agent.into(),
            Box::new(|_| tests(workspace, &agent_tests, Some(("PATH", &broker::search_path(workspace)?)))),
        ),
        ("fuzz".to_owned(), (args.fuzz > 0).into(), Box::new(|_| fuzz())),
        ("corpus".to_owned(), args.corpus.into(), Box::new(|_| tests(workspace, CORPUS_TEST, None))),
        ("reports".to_owned(), args.reports.into(), Box::new(|_| tests(workspace, PAGES_TEST, None))),
        ("all".to_owned(), args.all.into(), Box::new(|_| ci::run_tables(workspace))),
    ];
    let kinds = faults::sabotages(args).chain(faults::disturbances(args)).chain(rest);
    let (mut failed, mut summary) = (0, Vec::new());
    for (kind, rounds, soak) in kinds.filter(|(_, rounds, _)| *rounds > 0) {
        let mut seconds = Vec::new();
        let passes = |round: &u32| {
            let started = Instant::now();
            let outcome = soak(*round);
            seconds.push(started.elapsed().as_secs());
            let message = match &outcome {
                Ok(message) => message.clone(),
                Err(error) => format!("FAILED: {error:#}"),
            };
            message!("soak {kind} {round} of {rounds}: {message}");
            outcome.is_ok()
        };
        let passed = (1..=rounds).filter(passes).count();
        let others = rounds as usize - passed;
        failed += others;
        let (least, most) = (seconds.iter().min().unwrap_or(&0), seconds.iter().max().unwrap_or(&0));
        summary.push(format!("soak {kind}: {passed} passed, {others} failed, {least} to {most} s"));
    }
    summary.iter().try_for_each(print)?;
    if failed == 0 { Ok(()) } else { Err(Failure::reported(1).into()) }
}

/// Returns whether a round makes machines in the cache, and then looks for leftovers.
fn needs_cache(args: &SoakArgs) -> bool {
    let SoakArgs { smokes, pairs, power_cuts, kills, sabotages, disturbances, episodes, .. } = args;
    [smokes, pairs, power_cuts, kills, sabotages, disturbances, episodes].iter().any(|rounds| **rounds > 0)
}

/// Returns an error if the cache has instances (machines that were kept) or leftovers. A soak deletes snapshots, and
/// reports everything that is left.
fn alone() -> Result<()> {
    const OTHER: &str = "or use another IOT_XTASK_CACHE";
    let cache = Cache::open()?;
    let kept = instance::all(&cache).len();
    if kept > 0 {
        bail_host!("soak in a cache that has {kept} machine(s)"; "remove them with cargo xtask vm rm, {OTHER}");
    }
    if let Err(error) = nothing_left(&cache) {
        let hint = "wait for its runs, or run cargo xtask vm gc";
        bail_host!("soak in a cache that is in use: {error}"; "{hint}; {OTHER}");
    }
    Ok(())
}

/// Adds an error to the result of a round if the round has left anything.
fn tidy(result: Result<String>) -> Result<String> {
    let left = Cache::open().and_then(|cache| nothing_left(&cache));
    match (result, left) {
        (Err(error), Err(left)) => Err(error.context(format!("{left:#}"))),
        (result, left) => left.and(result),
    }
}

/// The path by which this program starts itself (proc(5)). A soak runs for hours, and a build may replace the
/// program's file meanwhile, but this path still leads to the same program.
const OWN: &str = "/proc/self/exe";

/// Starts a smoke as a child in its own process group, so that the whole group can be killed.
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
    passed(child.wait().context("wait for a smoke")?, started)
}

fn passed(status: ExitStatus, started: Instant) -> Result<String> {
    ensure!(status.success(), "{status}");
    Ok(format!("passed in {}", human_seconds(started.elapsed().as_secs_f64())))
}

fn smoke(args: &SoakArgs, more: &[&str]) -> Result<String> {
    let started = Instant::now();
    end(start(args, more)?, started)
}

/// Disturbs the device with all faults and with pairs.
fn torture(args: &SoakArgs) -> Result<String> {
    let started = Instant::now();
    let status = Command::new(OWN)
        .args(["torture", "--quiet", "--arch", &args.arch.to_string(), "--faults", "all"])
        .args(["--episodes", &args.episodes.to_string()])
        .stdin(Stdio::null())
        .status()
        .context("run torture")?;
    passed(status, started)
}

/// Runs two smokes at once. Waits for both of them, even if one fails.
fn pair(args: &SoakArgs) -> Result<String> {
    let started = Instant::now();
    let children = [start(args, &["--fsck"])?, start(args, &["--fsck"])?];
    let ended = children.map(|child| end(child, started));
    Ok(ended.into_iter().collect::<Result<Vec<_>>>()?.join(", "))
}

/// Runs tests with an environment variable, such as one that makes them take longer.
fn tests(workspace: &Workspace, arguments: &[&str], variable: Option<(&str, &OsStr)>) -> Result<String> {
    let started = Instant::now();
    let mut command = workspace.cargo();
    command.args(arguments).envs(variable).stdin(Stdio::null()).stdout(std::io::stderr());
    let status = command.status().context("run the tests")?;
    passed(status, started).context("see the failures above")
}

/// Returns an error if anything is left: processes of a run, working files of a run, or incomplete snapshots. A soak
/// has the cache to itself.
fn nothing_left(cache: &Cache) -> Result<()> {
    // This also finds processes of a run whose directory is gone.
    let processes = processes_naming(&cache.runs());
    let mut left: Vec<_> = processes.iter().map(|pid| format!("process {}", pid.as_raw_nonzero())).collect();
    let works = directories(&cache.runs()).into_iter().map(|run| run.join("w")).filter(|work| work.exists());
    let is_bad =
        |snapshot: &PathBuf| SnapshotManifest::read(snapshot).is_err() || snapshot.join(BAD).exists();
    let snapshots = directories(&cache.snapshots()).into_iter().filter(is_bad);
    left.extend(works.chain(snapshots).map(|path| path.display().to_string()));
    ensure!(left.is_empty(), "leftovers: {}", left.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

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
        // The command line of the process can be read only a moment after its start.
        process.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let left = nothing_left(&cache).unwrap_err().to_string();
        assert!(left.contains(&format!("process {}", process.id())), "{left}");
        assert!(left.contains(work.to_str().unwrap()), "{left}");
        std::fs::remove_dir_all(&run).unwrap();
        let left = nothing_left(&cache).unwrap_err().to_string();
        assert!(left.contains(&format!("process {}", process.id())), "its directory is gone: {left}");
        drop(process.stdin.take());
        process.wait().unwrap();
        nothing_left(&cache).unwrap();
        let snapshot = cache.snapshots().join("half");
        std::fs::create_dir_all(&snapshot).unwrap();
        assert!(nothing_left(&cache).unwrap_err().to_string().contains("half"));
    }
}
