//! `cargo xtask inspect`: checks without a boot whether executables will run on a device. `collection` and `archive`
//! find the files, `verdict` judges them by the flags of `policy`, `attempt` runs some of them, and `text` and
//! `document` report the result.

mod archive;
mod attempt;
mod candidate;
mod collection;
mod document;
mod policy;
mod text;
mod verdict;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use xshell::Shell;

use xtask_core::build;
use xtask_core::cache::Cache;
use xtask_core::cli::{BuildArgs, InspectArgs, Verbosity};
use xtask_core::error::Failure;
use xtask_core::message;
use xtask_core::output::print_json;
use xtask_core::workspace::Workspace;
use xtask_inspection::Inspection;
use xtask_jobs::{Step, Ui};

use archive::Unpacker;
use collection::Collection;
use policy::Policy;
use text::Depth;
use verdict::Judged;

/// Inspects the files that the flags name, or the agent if they name none.
pub(crate) fn run(args: &InspectArgs, verbosity: Verbosity) -> Result<()> {
    let policy = Policy::from_args(args)?;
    let ui = Ui::install(verbosity)?;
    let mut unpacker = Unpacker::new(&ui);
    let outcome = inspect_all(args, &policy, &mut unpacker, &ui, verbosity);
    // What was unpacked is also deleted after an error or an interrupt.
    let discarded = unpacker.discard();
    let fails = outcome?;
    discarded?;
    if fails { Err(Failure::reported(1).into()) } else { Ok(()) }
}

/// Returns whether a file fails.
fn inspect_all(
    args: &InspectArgs,
    policy: &Policy,
    unpacker: &mut Unpacker<'_>,
    ui: &Ui,
    verbosity: Verbosity,
) -> Result<bool> {
    let collection = if args.paths.is_empty() {
        let inspection = Inspection::from_args(args)?;
        Collection::of_agent(&agent(args, &inspection)?, inspection)?
    } else {
        Collection::of(args, unpacker)?
    };
    let started = Instant::now();
    let mut judged = judge(&collection, policy, ui)?;
    if args.attempt {
        attempt::try_all(&collection, &mut judged, policy, args, ui)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(&document::report(&judged, &collection, seconds))?;
    } else if args.sarif {
        print_json(&document::sarif(&judged, &collection))?;
    }
    let depth = Depth::new(verbosity, args.explain);
    if collection.is_single {
        text::print_one(&judged[0], &collection, depth);
    } else {
        text::print_many(&judged, &collection, depth);
    }
    conclude(args, policy, &judged, &collection)
}

/// Judges the files. Only a collection of many files takes long enough for a line about its progress.
fn judge(collection: &Collection, policy: &Policy, ui: &Ui) -> Result<Vec<Judged>> {
    let cache = Cache::open().ok().filter(|_| !collection.is_single);
    let Some(cache) = cache else { return verdict::judge(collection, policy, ui) };
    let files = collection.subjects.len();
    let step = Step { kind: "inspect", what: &format!("judge {files} files"), title: "judge" };
    ui.step(&cache, step, || Ok((verdict::judge(collection, policy, ui)?, format!("{files} files"))))
}

fn conclude(args: &InspectArgs, policy: &Policy, judged: &[Judged], collection: &Collection) -> Result<bool> {
    if let Some(path) = args.baseline.as_ref().filter(|_| args.write_baseline) {
        check_complete(collection)?;
        let count = policy::write(path, judged)?;
        message!("{} lists {count} findings", path.display());
        return Ok(false);
    }
    let outdated = policy.outdated(judged);
    if outdated > 0 {
        message!(
            "the baseline lists {outdated} findings that no longer exist; write it again with --write-baseline"
        );
    }
    if judged.iter().any(|judged| judged.fails) {
        return Ok(true);
    }
    check_complete(collection)?;
    Ok(false)
}

fn check_complete(collection: &Collection) -> Result<(), Failure> {
    let Some(first) = collection.unreadable.first() else { return Ok(()) };
    let count = collection.unreadable.len();
    Err(Failure::usage(format!(
        "{count} files or directories could not be read, for example {first}; make them readable for this user"
    )))
}

/// Builds the agent unless it is up to date. Returns the path of its executable.
fn agent(args: &InspectArgs, inspection: &Inspection) -> Result<PathBuf> {
    let workspace = Workspace::find()?;
    let build = BuildArgs { arch: inspection.arch, profile: args.profile.clone() };
    let shell = Shell::new().context("create the shell that runs commands")?;
    Ok(build::build(&shell, &workspace, &build)?.path)
}
