//! What preflight asks libvirt: [`rehearsal`] starts the very domain of a smoke, paused ([`sabotage`] plants the faults that it must find); [`connection`] asks the libvirt
//! that `--connect` names.

mod connection;
mod rehearsal;
mod sabotage;

use anyhow::Result;
use xtask::cli::{PreflightArgs, Voice};
use xtask::exit::Diagnosis;
use xtask::host::{Asked, Preflight};
use xtask::tasks::preflight::{architectures, present};
use xtask::workspace::Workspace;

use crate::interrupt::Interrupt;

/// Everything that the front door looks at, and what libvirt says to it.
pub(crate) fn run(workspace: &Workspace, args: &PreflightArgs, voice: Voice) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let architectures = architectures(args);
    let asked = Asked { architectures: &architectures, machine: &args.machine, for_ci: false };
    let mut preflight = Preflight::check(workspace, &asked)?;
    // Without an emulator there is nothing to rehearse; what is missing is told below.
    if preflight.verdict().is_ok() && args.rehearse {
        let found = rehearsal::findings(&preflight.facts, args, voice, &interrupt)?;
        preflight.add(found);
    }
    // What this machine lacks is no matter of another libvirt's.
    if let Some(uri) = &args.connect {
        preflight.add(connection::findings(uri, &asked, &interrupt)?);
    }
    present(&preflight, args)?;
    match args.sabotage {
        None => Ok(()),
        Some(fault) => Err(Diagnosis::new(
            format!("the rehearsal did not find the planted fault {fault:?}"),
            "a check of this workflow does not check; that is a bug of the workflow, not of this machine",
        )
        .into()),
    }
}
