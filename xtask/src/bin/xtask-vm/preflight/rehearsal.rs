//! The rehearsal: the domain of a smoke, started paused, looked at and destroyed.

use anyhow::Result;
use xtask::cli::PreflightArgs;
use xtask::host::facts::Facts;
use xtask::host::findings::Finding;

use crate::interrupt::Interrupt;

/// What QEMU made of the domain for guests of the facts' architecture, judged.
pub(super) fn findings(
    _facts: &Facts,
    _args: &PreflightArgs,
    _interrupt: &Interrupt,
) -> Result<Vec<Finding>> {
    anyhow::bail!("rehearse: not there yet")
}
