//! `cargo xtask preflight`: checks that this machine is ready; `--fix` installs what is missing.

use anyhow::Result;
use xtask_core::cli::{PreflightArgs, SmokeArgs, Verbosity};
use xtask_core::error::Kind;
use xtask_core::host::facts::Facts;
use xtask_core::message;
use xtask_core::plan::Plan;
use xtask_core::preflight::show::{architectures, present};
use xtask_core::preflight::{PreflightRequest, Purpose};
use xtask_core::report::Report;
use xtask_core::workspace::Workspace;

pub(super) fn run(workspace: &Workspace, args: &PreflightArgs, verbosity: Verbosity) -> Result<()> {
    let architectures = architectures(args);
    args.place.check()?;
    let asked = PreflightRequest {
        architectures: &architectures,
        machine: &args.machine,
        place: args.place_of_facts(),
        purpose: Purpose::Run,
    };
    let preflight = super::look(workspace, &asked, args.fix)?;
    check_flags(&preflight.facts, args)?;
    let asks_libvirt = args.rehearse || args.place.connect.is_some();
    if asks_libvirt && preflight.verdict().is_ok() {
        // `xtask-vm` repeats all checks, and prints their findings together with libvirt's.
        return super::become_xtask_vm(workspace, verbosity, None);
    }
    present(&preflight, args)
}

/// Returns an error if this machine cannot do what the flags request, for example if the accelerator is missing or no
/// emulator has the CPU model. Without `--arch`, one architecture that can do it is enough.
fn check_flags(facts: &[Facts], args: &PreflightArgs) -> Result<()> {
    let with_emulator = facts.iter().filter(|facts| facts.working_emulator().is_some());
    let checked: Vec<_> = with_emulator.map(|facts| Plan::check_flags(facts).map(drop)).collect();
    if args.arch.is_none() && checked.iter().any(Result::is_ok) {
        return Ok(());
    }
    Ok(checked.into_iter().collect::<Result<_, _>>()?)
}

/// Writes the report of a smoke that failed before `xtask-vm` started, if `--report` is given.
pub(super) fn report(args: &SmokeArgs, error: &anyhow::Error) {
    let Some(directory) = &args.report else { return };
    if Kind::Usage.is(error) && !directory.is_dir() {
        // `--report` itself may be the wrong value.
        return;
    }
    if let Err(error) = Report::before_run(args.build.arch, error).write(directory) {
        message!("warning: {error:#}");
    }
}
