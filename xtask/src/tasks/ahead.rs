//! Compiling while the package manager works: the crates that `xtask-vm` uses and that need no package.

use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use xtask_core::workspace::Workspace;

/// A cargo that compiles what it can. Without libvirt's headers it goes on past the crate that needs them; what is wrong
/// besides is reported by the build that follows. It ends with this value.
pub(super) struct Ahead(Child);

impl Ahead {
    pub(super) fn start(workspace: &Workspace) -> Result<Self> {
        let mut command = super::other_binary(workspace, "build", "xtask-vm", "vm");
        command.arg("--keep-going").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().context("run cargo for the crates of xtask-vm")?))
    }

    /// Waits until there is nothing more to compile without the packages.
    pub(super) fn wait(mut self) -> Result<()> {
        let _without_headers_it_fails = self.0.wait().context("wait for cargo")?;
        Ok(())
    }
}

impl Drop for Ahead {
    /// Somebody said no, or pressed Ctrl-C: cargo, and with it its compilers.
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("warning: stop cargo: {error}");
        }
    }
}
