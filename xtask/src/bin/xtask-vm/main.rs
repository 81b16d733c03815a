//! `xtask-vm` of `cargo xtask`: everything that links libvirt or opens a socket. It parses `xtask`'s own
//! command line; `xtask` has seen to it that this machine is ready.
//!
//! Modules in reading order: [`smoke`] (the phases, as prose), [`image`], [`snapshot`] (warm machines), [`media`] (seed and payload disks),
//! [`hypervisor`] (libvirt), [`rehearsed`] (a domain read before it runs), [`remote`] (another libvirt), [`console`], [`broker`] (NATS), [`guest`] (ssh), [`bench`], and the tools: [`screen`], [`child`], [`interrupt`], [`history`], [`reaper`].

mod bench;
mod guest;
mod libvirt;
mod preflight;
mod smoke;
mod vm;

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::{Cli, Command, VmCommand};
use xtask_core::error::{self, Failure};
use xtask_core::workspace::Workspace;

fn main() -> ExitCode {
    silence_libvirt();
    let cli = Cli::parse();
    match execute(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error::lines(&error) {
                eprintln!("{line}");
            }
            ExitCode::from(error::code(&error))
        }
    }
}

/// The embedded driver logs to this process' stderr, in the middle of the screen; its errors come back as values. Whoever
/// wants the log sets the variable (libvirt.org/logging.html).
fn silence_libvirt() {
    const VARIABLE: &str = "LIBVIRT_LOG_OUTPUTS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: this is the first statement of the process; there is no other thread that reads the environment.
        unsafe { std::env::set_var(VARIABLE, "4:file:/dev/null") };
    }
}

fn execute(cli: &Cli) -> anyhow::Result<()> {
    // The cache is all that it needs; `bump` alone asks for the workspace.
    if let Command::Image(command) = &cli.command {
        return xtask_images::commands::run(command, cli.verbosity);
    }
    let workspace = Workspace::find()?;
    match &cli.command {
        Command::Smoke(args) => smoke::run(&workspace, args, cli.verbosity),
        Command::Preflight(args) if args.rehearse || args.connect.is_some() => {
            preflight::run(&workspace, args, cli.verbosity)
        }
        Command::Vm(VmCommand::Up(args)) => smoke::up(&workspace, args, cli.verbosity),
        Command::Vm(VmCommand::Start(args)) => vm::power::start(args, cli.verbosity),
        Command::Vm(VmCommand::Console { machine, no_follow: false }) => {
            vm::console::console(machine.as_deref())
        }
        Command::Vm(VmCommand::Stop(args)) => vm::power::stop(args, cli.verbosity),
        Command::Bench(args) => bench::run(&workspace, args, cli.verbosity),
        _ => Err(Failure::usage(
            "this task is one of `cargo xtask` itself, which starts xtask-vm for the others".to_owned(),
        )
        .into()),
    }
}
