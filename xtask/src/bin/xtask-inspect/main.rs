//! The binary `xtask-inspect` of `cargo xtask`. It runs the tasks that read executables, `build` and `inspect`, and
//! needs no package of the host. Its disassemblers take longer to compile than all of `xtask`. They are not in
//! `xtask`, because a fresh machine must compile that first.

mod build;
mod inspect;

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::{Cli, Command, LightCommand};
use xtask_core::error::Failure;
use xtask_core::output::conclude;
use xtask_core::workspace::Workspace;

fn main() -> ExitCode {
    conclude(&execute(&Cli::parse()))
}

fn execute(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Inspect(args) => inspect::run(args, cli.verbosity),
        Command::Light(LightCommand::Build(args)) => build::run(&Workspace::find()?, args),
        _ => Err(Failure::usage("xtask-inspect does not run this task; run it as cargo xtask").into()),
    }
}
