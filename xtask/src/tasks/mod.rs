//! The tasks that the front door does itself, and the way into the back room for the others.

mod build;
mod ci;
mod preflight;
mod soak;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command as Process;

use anyhow::{Context, Result};
use clap::CommandFactory as _;

use crate::agent_build;
use crate::arch::VmArchitecture;
use crate::cli::{Cli, Command, FixArgs, SmokeArgs};
use crate::exit::Usage;
use crate::host::{Preflight, fix};
use crate::image;
use crate::workspace::{Workspace, cargo};

/// Does the task, or becomes the process that does it.
///
/// # Errors
/// Whatever the task could not do; [`crate::exit::code`] has its exit code.
pub fn run(cli: &Cli) -> Result<()> {
    if let Command::Completions { shell } = &cli.command {
        clap_complete::generate(*shell, &mut Cli::command(), "cargo-xtask", &mut std::io::stdout());
        return Ok(());
    }
    let workspace = Workspace::find()?;
    match &cli.command {
        Command::Preflight(args) => preflight::run(&workspace, args),
        Command::Build(args) => build::run(&workspace, args),
        Command::Ci(args) => ci::run(&workspace, args),
        Command::Soak(args) => soak::run(&workspace, args),
        Command::Smoke(args) => {
            check_smoke(&workspace, args)?;
            ready(&workspace, &[args.build.arch], args.fix)
                .inspect_err(|error| preflight::report(args, error))?;
            enter_back_room(&workspace)
        }
        Command::Bench(args) => {
            ready(&workspace, &[args.arch], FixArgs::default())?;
            enter_back_room(&workspace)
        }
        Command::Vm(_) => enter_back_room(&workspace),
        Command::Completions { .. } => unreachable!("done above"),
    }
}

/// What can be known to be wrong before anything slow starts.
fn check_smoke(workspace: &Workspace, args: &SmokeArgs) -> Result<()> {
    image::find(args.machine.image.as_deref().unwrap_or(image::DEFAULT_IMAGE), args.build.arch)?;
    agent_build::profile::check(workspace.root(), &args.build.profile)
        .map_err(|error| Usage(format!("{error:#}")))?;
    if let Some(path) = &args.agent
        && !path.is_file()
    {
        return Err(Usage(format!("--agent {}: there is no such file", path.display())).into());
    }
    if let Some(path) = &args.report
        && path.exists()
        && !path.is_dir()
    {
        return Err(Usage(format!("--report {}: it is there and no directory", path.display())).into());
    }
    Ok(())
}

/// Preflight with `--fix`; quiet where nothing stands in the way.
fn ready(workspace: &Workspace, architectures: &[VmArchitecture], args: FixArgs) -> Result<()> {
    let preflight = if args.fix {
        fix::fix(workspace, architectures, args)?
    } else {
        Preflight::check(workspace, architectures)
    };
    if preflight.blocking().next().is_some() {
        preflight::print(&preflight);
    }
    preflight.verdict()
}

/// Becomes `xtask-vm`, with the same arguments: one process, one Ctrl-C, one exit code.
fn enter_back_room(workspace: &Workspace) -> Result<()> {
    let mut command = Process::new(cargo());
    command
        .args(["run", "--quiet", "--manifest-path"])
        .arg(workspace.root().join("Cargo.toml"))
        .args(["--package", "xtask", "--bin", "xtask-vm", "--features", "vm", "--"])
        .args(std::env::args_os().skip(1));
    for name in inherited_from_cargo() {
        command.env_remove(name);
    }
    eprintln!("building the back room (xtask-vm); about two minutes the first time, then a second");
    Err(command.exec()).context("run cargo for the back room")
}

/// What the outer cargo has set for this package; the inner one would build its dependencies anew for it.
fn inherited_from_cargo() -> impl Iterator<Item = OsString> {
    const PREFIXES: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CFG_"];
    std::env::vars_os().map(|(name, _)| name).filter(|name| {
        name.to_str().is_some_and(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
    })
}
