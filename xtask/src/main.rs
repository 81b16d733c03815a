//! The binary `xtask`: parses the command line, runs the light tasks, and replaces itself with another binary for the
//! rest.

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::Cli;
use xtask_core::error;

mod tasks;

fn main() -> ExitCode {
    match tasks::run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error::lines(&error) {
                eprintln!("{line}");
            }
            ExitCode::from(error::code(&error))
        }
    }
}
