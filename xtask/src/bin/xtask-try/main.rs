//! The binary `xtask-try` of `cargo xtask`. It runs a program in a machine of its own, and needs no package of the host
//! to be compiled.

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::{Cli, Command};
use xtask_core::error::Failure;
use xtask_core::output::conclude;
use xtask_core::workspace::Workspace;

fn main() -> ExitCode {
    conclude(&execute(&Cli::parse()))
}

fn execute(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Try(args) => xtask_attempt::run(&Workspace::find()?, args, cli.verbosity),
        _ => Err(Failure::usage("xtask-try does not run this task; run it as cargo xtask").into()),
    }
}
