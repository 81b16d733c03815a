//! What preflight asks libvirt: [`rehearsal`] starts the very domain of a smoke, paused ([`sabotage`] plants the faults that it must find); [`connection`] asks the libvirt
//! that `--connect` names.

mod connection;
mod rehearsal;
mod sabotage;

use anyhow::Result;
use xtask_core::cli::{PreflightArgs, Verbosity};
use xtask_core::error::Failure;
use xtask_core::preflight::show::{architectures, present};
use xtask_core::preflight::{Preflight, PreflightRequest};
use xtask_core::workspace::Workspace;

use xtask_jobs::Ui;

/// Everything that `xtask` looks at, and what libvirt says to it.
pub(crate) fn run(workspace: &Workspace, args: &PreflightArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let architectures = architectures(args);
    let asked = PreflightRequest { architectures: &architectures, machine: &args.machine, for_ci: false };
    let mut preflight = Preflight::check(workspace, &asked)?;
    // Without an emulator there is nothing to rehearse; what is missing is told below.
    if preflight.verdict().is_ok() && args.rehearse {
        let found = rehearsal::findings(&preflight.facts, args, &ui)?;
        preflight.add(found);
    }
    // What this machine lacks is no matter of another libvirt's.
    if let Some(uri) = &args.connect {
        preflight.add(connection::findings(uri, &asked, &ui)?);
    }
    present(&preflight, args)?;
    let Some(fault) = args.sabotage else { return Ok(()) };
    let error = format!("the rehearsal did not find the planted fault {fault:?}");
    let hint = "a check of cargo xtask does not work; that is a bug of cargo xtask, not of this machine";
    Err(Failure::guest(error, hint).into())
}
