//! The binary `xtask`: parses the command line, runs the light tasks, and replaces itself with another binary for the
//! rest.

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::Cli;
use xtask_core::output::conclude;

mod tasks;

fn main() -> ExitCode {
    conclude(&tasks::run(&Cli::parse()))
}
