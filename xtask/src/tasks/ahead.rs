//! Compiles the crates of `xtask-vm` that need no package, while the package manager installs packages.

use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use xtask_core::message;
use xtask_core::workspace::Workspace;

/// A cargo process that compiles the dependencies of `xtask-vm`. If libvirt's headers are missing, `--keep-going`
/// makes cargo continue with the crates that do not need them. cargo's output is discarded, because the build that
/// follows reports every error again. Dropping this value ends the process.
pub(super) struct Ahead(Child);

impl Ahead {
    pub(super) fn start(workspace: &Workspace) -> Result<Self> {
        let mut command = super::other_binary(workspace, "build", "xtask-vm", "vm");
        command.arg("--keep-going").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().context("run cargo for the crates of xtask-vm")?))
    }

    /// Waits until cargo has compiled every crate that needs no package.
    pub(super) fn wait(mut self) -> Result<()> {
        let _without_headers_it_fails = self.0.wait().context("wait for cargo")?;
        Ok(())
    }
}

impl Drop for Ahead {
    /// Ends cargo if preflight failed, for example because the user declined the installation.
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            message!("warning: stop cargo: {error}");
        }
    }
}
