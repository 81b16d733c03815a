//! Runs the light tasks in this process, and starts another binary for the others.

mod ahead;
mod ci;
mod enter;
/// `xtask-vm` needs this file, too, and the package has no library.
#[path = "../bin/xtask-vm/guest/monitor.rs"]
mod monitor;
mod preflight;
mod soak;
mod vm;

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command as Process;

use anyhow::{Context, Result};
use clap::ValueEnum as _;

use self::ahead::Ahead;
use xtask_core::arch::VmArchitecture;
use xtask_core::bail_host;
use xtask_core::build;
use xtask_core::cli::{
    BenchSubject, Cli, Command, FixArgs, HeavyCommand, HeavyVmCommand, LightCommand, MachineArgs, PlaceArgs,
    Shell, SmokeArgs, TortureArgs, Verbosity, VmCommand,
};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::make_private_dir;
use xtask_core::host::facts::Facts;
use xtask_core::image::choice::Choice;
use xtask_core::message;
use xtask_core::output::{clean, print, write_message};
use xtask_core::plan::Plan;
use xtask_core::preflight::{Preflight, PreflightRequest, Purpose, fix, show};
use xtask_core::report::remove_earlier;
use xtask_core::workspace::Workspace;

/// Runs the task, or replaces this process with the binary that runs it.
///
/// # Errors
/// Returns the task's error; [`xtask_core::error::code`] maps it to the exit code.
pub(crate) fn run(cli: &Cli) -> Result<()> {
    let verbosity = cli.verbosity;
    match &cli.command {
        Command::Inspect(_) => become_unlinked("inspect", verbosity),
        Command::Report(_) => become_unlinked("report", verbosity),
        Command::Try(_) => become_unlinked("try", verbosity),
        Command::Preflight(args) => preflight::run(&Workspace::find()?, args, verbosity),
        Command::Light(command) => run_light(&Workspace::find()?, command, verbosity),
        Command::Heavy(command) => run_heavy(&Workspace::find()?, command, verbosity),
        // These commands also work outside the workspace, because the instances are in the cache.
        Command::Vm(VmCommand::Light(command)) => vm::run(command, verbosity),
        Command::Vm(VmCommand::Heavy(HeavyVmCommand::Console { machine, no_follow: true })) => {
            vm::show_console(machine.as_deref())
        }
        Command::Vm(VmCommand::Heavy(command)) => {
            let workspace = Workspace::find()?;
            vm::prepare(&workspace, command, verbosity)?;
            become_xtask_vm(&workspace, verbosity, None)
        }
    }
}

fn run_light(workspace: &Workspace, command: &LightCommand, verbosity: Verbosity) -> Result<()> {
    match command {
        LightCommand::Build(args) => {
            build::profile::check(workspace, &args.profile)?;
            become_unlinked("inspect", verbosity)
        }
        LightCommand::Ci(args) => ci::run(workspace, args),
        LightCommand::Soak(args) => soak::run(workspace, args),
        LightCommand::Completions { shell } => print_completions(workspace, *shell),
    }
}

/// Makes the checks that do not need `xtask-vm`, and then replaces this process with `xtask-vm`.
fn run_heavy(workspace: &Workspace, command: &HeavyCommand, verbosity: Verbosity) -> Result<()> {
    match command {
        HeavyCommand::Image(_) => become_xtask_vm(workspace, verbosity, None),
        HeavyCommand::Bench(args) => {
            let (machine, place) = (MachineArgs::default(), PlaceArgs::default());
            let purpose = if args.subject == BenchSubject::Torture { Purpose::Torture } else { Purpose::Run };
            let asked =
                PreflightRequest { architectures: &[args.arch], machine: &machine, place: &place, purpose };
            ready(workspace, &asked, FixArgs::default(), verbosity.quiet)?;
            become_xtask_vm(workspace, verbosity, None)
        }
        HeavyCommand::Torture(args) if args.list => print(xtask_faults::list()),
        HeavyCommand::Torture(args) => {
            check_torture(workspace, args)?;
            let purpose = if args.boots_machines() { Purpose::Torture } else { Purpose::Run };
            let TortureArgs { build, machine, place, fix, .. } = &**args;
            let asked = PreflightRequest { architectures: &[build.arch], machine, place, purpose };
            ready(workspace, &asked, *fix, verbosity.quiet)?;
            become_xtask_vm(workspace, verbosity, None)
        }
        HeavyCommand::Smoke(args) => smoke(workspace, args, verbosity)
            .map_err(|error| {
                host_fault(error, "prepare the smoke", "see the causes; nothing is known about the agent")
            })
            .inspect_err(|error| preflight::report(args, error)),
    }
}

fn smoke(workspace: &Workspace, args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    check_smoke(workspace, args)?;
    let ahead = args.fix.fix.then(|| Ahead::start(workspace)).transpose()?;
    ready_for_smokes(workspace, args, verbosity)?;
    become_xtask_vm(workspace, verbosity, ahead)
}

/// Runs preflight for all architectures and images of a call, and checks the flags of the machine. The hosts of
/// `--host` are checked later, because this binary does not link libvirt.
fn ready_for_smokes(workspace: &Workspace, args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    let place = &args.places()[0];
    let (mut all, mut facts) = (Preflight::evaluate(Vec::new()), Vec::new());
    for machine in args.machines() {
        let architectures = &args.repeated.arches;
        let asked = PreflightRequest { architectures, machine: &machine, place, purpose: Purpose::Run };
        let preflight = look(workspace, &asked, args.fix)?;
        facts.extend_from_slice(&preflight.facts);
        all.add(preflight.findings);
        // Each check has the facts about all architectures, so those of the last check are sufficient. `--fix` tries to
        // repair a finding again in each check, so the commands of the last check are sufficient, too.
        (all.facts, all.tried) = (preflight.facts, preflight.tried);
    }
    judge(&all, verbosity.quiet)?;
    if place.connect.is_none() {
        facts.iter().try_for_each(|facts| Plan::check_flags(facts).map(drop))?;
    }
    Ok(())
}

/// Checks the flags of a smoke whose errors can be found before anything slow starts.
fn check_smoke(workspace: &Workspace, args: &SmokeArgs) -> Result<()> {
    // Make the directory first, so that the report of every later error has a place.
    make_report_directory(args.report.as_deref())?;
    args.check_several()?;
    args.check_places()?;
    for smoke in args.smokes() {
        Choice::from_args(&smoke.machine.image, smoke.build.arch)?;
    }
    check_subject(workspace, &args.build.profile, args.agent.as_deref())
}

/// Checks the flags of `torture` whose errors can be found before anything slow starts.
fn check_torture(workspace: &Workspace, args: &TortureArgs) -> Result<()> {
    make_report_directory(args.report.as_deref())?;
    Choice::from_args(&args.machine.image, args.build.arch)?;
    check_file("--state", args.state.as_deref())?;
    check_subject(workspace, &args.build.profile, args.agent.as_deref())
}

fn make_report_directory(report: Option<&Path>) -> Result<()> {
    let Some(path) = report else { return Ok(()) };
    let made = make_private_dir(path).and_then(|()| {
        rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?;
        remove_earlier(path)
    });
    made.map_err(|error| {
        Failure::usage(format!("--report {}: cannot write to the directory: {error:#}", path.display()))
            .into()
    })
}

/// Checks the profile and the executable of `--agent`.
fn check_subject(workspace: &Workspace, profile: &str, agent: Option<&Path>) -> Result<()> {
    build::profile::check(workspace, profile)?;
    check_file("--agent", agent)
}

fn check_file(flag: &str, path: Option<&Path>) -> Result<()> {
    match path.filter(|path| !path.is_file()) {
        None => Ok(()),
        Some(path) => Err(Failure::usage(format!("{flag} {}: no such file", path.display())).into()),
    }
}

/// Runs preflight, with `--fix` if it is given, and judges it.
fn ready(
    workspace: &Workspace,
    asked: &PreflightRequest<'_>,
    args: FixArgs,
    quiet: bool,
) -> Result<Preflight> {
    let preflight = look(workspace, asked, args)?;
    judge(&preflight, quiet)?;
    Ok(preflight)
}

/// Prints the findings of preflight if one of them blocks, and otherwise the degradations, unless `quiet` is true.
/// Returns the verdict.
fn judge(preflight: &Preflight, quiet: bool) -> Result<()> {
    if preflight.blocking().next().is_some() {
        write_message(&clean(&preflight.to_string()));
    } else if !quiet {
        show::print_degradations(preflight);
    }
    preflight.verdict()
}

/// Runs [`ready`] for a guest of one architecture and returns the facts about it.
fn ready_for(
    workspace: &Workspace,
    arch: VmArchitecture,
    (machine, place): (&MachineArgs, &PlaceArgs),
    args: FixArgs,
    verbosity: Verbosity,
) -> Result<Facts> {
    let asked = PreflightRequest { architectures: &[arch], machine, place, purpose: Purpose::Run };
    let facts = ready(workspace, &asked, args, verbosity.quiet)?.facts;
    facts.into_iter().next().context("preflight returned no facts")
}

fn look(workspace: &Workspace, asked: &PreflightRequest<'_>, args: FixArgs) -> Result<Preflight> {
    if args.fix { fix::fix(workspace, asked, args) } else { Ok(Preflight::check(workspace, asked)?) }
}

/// Compiles `xtask-vm`, which takes two minutes the first time, and replaces this process with it.
fn become_xtask_vm(workspace: &Workspace, verbosity: Verbosity, ahead: Option<Ahead>) -> Result<()> {
    if !verbosity.quiet {
        message!("building xtask-vm; about two minutes the first time, then a second");
    }
    ahead.map_or(Ok(()), Ahead::wait)?;
    become_binary(workspace, "xtask-vm", "vm", verbosity)
}

/// Compiles a binary that needs no package of the host, which takes half a minute the first time, and replaces this
/// process with it. The binary `xtask-NAME` has the feature NAME. Outside a checkout, the binary beside this one is
/// used.
fn become_unlinked(name: &str, verbosity: Verbosity) -> Result<()> {
    let binary = format!("xtask-{name}");
    let beside = std::env::current_exe().context("find this program")?.with_file_name(&binary);
    match Workspace::find() {
        Err(_) if beside.exists() => Err(Process::new(&beside).args(std::env::args_os().skip(1)).exec())
            .with_context(|| format!("run {binary}")),
        Err(error) => Err(error),
        Ok(workspace) => {
            if !verbosity.quiet && !beside.exists() {
                message!("building {binary}; about half a minute the first time");
            }
            become_binary(&workspace, &binary, name, verbosity)
        }
    }
}

/// Compiles another binary, and replaces this process with it. The arguments stay the same. No parent process remains
/// that would have to pass Ctrl-C and the exit code on.
fn become_binary(workspace: &Workspace, name: &str, feature: &str, verbosity: Verbosity) -> Result<()> {
    let cargo = |subcommand| {
        let mut command = other_binary(workspace, subcommand, name, feature);
        silence_cargo(&mut command, verbosity);
        command
    };
    let status = cargo("build").status().with_context(|| format!("run cargo for {name}"))?;
    if !status.success() {
        bail_host!(
            "build {name}: cargo {status}; see its messages above";
            "run cargo xtask preflight --fix; errors in this workspace's own code are shown above too"
        );
    }
    Err(cargo("run").arg("--").args(std::env::args_os().skip(1)).exec())
        .with_context(|| format!("run cargo for {name}"))
}

/// With `--quiet`, sets the environment of a command so that every cargo that it starts prints only warnings and
/// errors.
fn silence_cargo(command: &mut Process, verbosity: Verbosity) {
    if verbosity.quiet {
        command.env("CARGO_TERM_QUIET", "true");
    }
}

/// Replaces this process with `xtask-complete`, which prints the script. If it must be compiled first, this takes 15 s.
fn print_completions(workspace: &Workspace, shell: Shell) -> Result<()> {
    let value = shell.to_possible_value().expect("no shell is hidden");
    let mut command = other_binary(workspace, "run", "xtask-complete", "complete");
    Err(command.args(["--", value.get_name()]).exec()).context("run cargo for the completions")
}

/// Returns a cargo command for another binary of this package.
fn other_binary(workspace: &Workspace, subcommand: &str, name: &str, feature: &str) -> Process {
    let mut command = workspace.cargo();
    // Relative paths in the arguments start at the directory in which the command was typed.
    command.current_dir(".");
    command.args([subcommand, "--quiet", "--package", "xtask", "--bin", name, "--features", feature]);
    command.arg("--manifest-path").arg(workspace.root().join("Cargo.toml"));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_command_silences_the_cargo_that_it_starts() {
        let silenced = |quiet| {
            let mut command = Process::new("cargo");
            silence_cargo(&mut command, Verbosity { quiet, ..Verbosity::silent() });
            command
                .get_envs()
                .any(|(name, value)| name == "CARGO_TERM_QUIET" && value == Some("true".as_ref()))
        };
        assert!(silenced(true) && !silenced(false));
    }
}
