//! The checks of preflight that need libvirt. [`rehearsal`] starts the domain that a smoke would use, with stopped
//! processors, and examines QEMU's machine. [`sabotage`] plants faults that the rehearsal must find. The libvirt that
//! `--connect` names is checked, too.

mod rehearsal;
mod sabotage;

use anyhow::Result;
use xtask_core::cli::{PreflightArgs, Verbosity};
use xtask_core::error::Failure;
use xtask_core::preflight::show::{architectures, present};
use xtask_core::preflight::{Preflight, PreflightRequest, Purpose};
use xtask_core::workspace::Workspace;

use xtask_jobs::Ui;

use crate::libvirt::connection;

/// Runs all checks of `xtask`, and then the checks that need libvirt.
pub(crate) fn run(workspace: &Workspace, args: &PreflightArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let architectures = architectures(args);
    let asked = PreflightRequest {
        architectures: &architectures,
        machine: &args.machine,
        place: args.place_of_facts(),
        purpose: Purpose::Run,
    };
    let mut preflight = Preflight::check(workspace, &asked)?;
    // A rehearsal needs, for example, an emulator, so it takes place only if no finding blocks. The findings are shown
    // below.
    if preflight.verdict().is_ok() && args.rehearse {
        let found = rehearsal::findings(&preflight.facts, args, &ui)?;
        preflight.add(found);
    }
    // The libvirt of `--connect` is checked even if the rehearsal has found a fault.
    if let Some(uri) = &args.place.connect {
        let asked = PreflightRequest { place: &args.place, ..asked };
        preflight.add(connection::check(uri, &asked, &ui)?.1);
    }
    present(&preflight, args)?;
    let Some(fault) = args.sabotage else { return Ok(()) };
    let error = format!("the rehearsal did not find the planted fault {fault:?}");
    let hint = "a check of cargo xtask does not work; that is a bug of cargo xtask, not of this machine";
    Err(Failure::guest(error, hint).into())
}
