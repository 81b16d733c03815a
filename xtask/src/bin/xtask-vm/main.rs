//! The binary `xtask-vm`: every task that links libvirt or opens a socket. It parses the same command line as `xtask`,
//! which has checked that this machine is ready. Read the modules in this order: [`smoke`] (the phases), [`libvirt`]
//! (domains), [`guest`] (access to a guest from this host), [`vm`] (instances: machines that were kept), [`preflight`]
//! (the rehearsal, and the libvirt of `--connect`), [`several`] (several smokes of one call), [`bench`]. Images and
//! snapshots are in the crate `xtask-images`, the broker is in `xtask-fleet`, and child processes, Ctrl-C and the
//! screen are in `xtask-jobs`.

mod background;
mod bench;
mod guest;
mod libvirt;
mod preflight;
mod several;
mod smoke;
mod vm;

use std::process::ExitCode;

use clap::Parser as _;
use xtask_core::cli::{Cli, Command, HeavyCommand, HeavyVmCommand, VmCommand};
use xtask_core::error::Failure;
use xtask_core::output::conclude;
use xtask_core::workspace::Workspace;

fn main() -> ExitCode {
    silence_libvirt();
    conclude(&execute(&Cli::parse()))
}

/// Disables the log of libvirt's embedded driver, which would go to stderr in the middle of the screen. libvirt also
/// returns its errors as values. A user who wants the log sets LIBVIRT_LOG_OUTPUTS (libvirt.org/logging.html).
fn silence_libvirt() {
    const VARIABLE: &str = "LIBVIRT_LOG_OUTPUTS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: `main` calls this function first, so no other thread exists that could read the environment.
        unsafe { std::env::set_var(VARIABLE, "4:file:/dev/null") };
    }
}

fn execute(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        // These commands need only the cache; `image bump` finds the workspace itself.
        Command::Heavy(HeavyCommand::Image(command)) => xtask_images::commands::run(command, cli.verbosity),
        Command::Heavy(HeavyCommand::Smoke(args)) if args.is_several() => {
            several::run(&Workspace::find()?, args, cli.verbosity)
        }
        Command::Heavy(HeavyCommand::Smoke(args)) => smoke::run(&Workspace::find()?, args, cli.verbosity),
        Command::Heavy(HeavyCommand::Torture(args)) => {
            smoke::torture::run(&Workspace::find()?, args, cli.verbosity)
        }
        Command::Heavy(HeavyCommand::Bench(args)) => bench::run(&Workspace::find()?, args, cli.verbosity),
        Command::Preflight(args) if args.rehearse || args.place.connect.is_some() => {
            preflight::run(&Workspace::find()?, args, cli.verbosity)
        }
        Command::Vm(VmCommand::Light(command)) => vm::on_daemon::run(command, cli.verbosity),
        Command::Vm(VmCommand::Heavy(command)) => match command {
            HeavyVmCommand::Up(args) => smoke::up(&Workspace::find()?, args, cli.verbosity),
            HeavyVmCommand::Start(args) => vm::power::start(args, cli.verbosity),
            HeavyVmCommand::Supervise { qemu, ports, others } => {
                libvirt::supervisor::run(*qemu, ports, *others)
            }
            HeavyVmCommand::KeepLog { log } => vm::log::run(log),
            HeavyVmCommand::Stop(args) => vm::power::stop(args, cli.verbosity),
            HeavyVmCommand::Console { machine, .. } => {
                vm::console::console(machine.as_deref(), cli.verbosity)
            }
        },
        Command::Light(_)
        | Command::Inspect(_)
        | Command::Report(_)
        | Command::Try(_)
        | Command::Preflight(_) => {
            Err(Failure::usage("xtask-vm does not run this task; run it as cargo xtask").into())
        }
    }
}
