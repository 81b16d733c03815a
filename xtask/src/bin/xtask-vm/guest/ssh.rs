//! Enters the guest with keys made for the run and with OpenSSH's client.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::seed::Seed;
use xtask_core::runs::instance;

use xtask_jobs::{Ui, child};

/// The ssh keys of a run.
#[derive(Debug)]
pub(crate) struct Keys {
    directory: PathBuf,
    /// The user that ssh logs in as.
    pub(crate) login_user: String,
    /// The public key that may log in.
    pub(crate) user_public: String,
    /// The private half of the guest's host key.
    pub(crate) host_private: String,
    /// The public half of the guest's host key.
    pub(crate) host_public: String,
    ui: Ui,
}

impl Keys {
    /// Makes two pairs of ed25519 keys in `directory`: the user's and the guest's.
    pub(crate) fn make(directory: &Path, login_user: &str, ui: &Ui) -> Result<Self> {
        let keygen = tools::require("ssh-keygen")?;
        let pair = |name: &str| -> Result<(String, String)> {
            let path = directory.join(name);
            let options = ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"].map(OsString::from);
            let arguments = [&options[..], &[path.clone().into()]].concat();
            child::read(&keygen, &arguments, limits::SERVER_START, ui).context("make the run's ssh keys")?;
            let public = fs_err::read_to_string(path.with_extension("pub"))?;
            Ok((fs_err::read_to_string(&path)?, public.trim().to_owned()))
        };
        let (_, user_public) = pair("user_key")?;
        let (host_private, host_public) = pair("host_key")?;
        write_private(&directory.join("known_hosts"), instance::known_host(&host_public))?;
        let (directory, login_user) = (directory.to_owned(), login_user.to_owned());
        Ok(Self { directory, login_user, user_public, host_private, host_public, ui: ui.clone() })
    }

    /// Returns the private keys, which must be in no report.
    ///
    /// # Errors
    /// Returns an error that names the file if the user's key cannot be read.
    pub(crate) fn secrets(&self) -> Result<[String; 2]> {
        Ok([fs_err::read_to_string(self.directory.join("user_key"))?, self.host_private.clone()])
    }

    /// Returns a seed with this instance id and these keys. All other values are those of `neutral`.
    pub(crate) fn seed<'a>(&'a self, instance_id: &'a str, neutral: &Seed<'a>) -> Seed<'a> {
        Seed {
            instance_id,
            authorized_key: &self.user_public,
            host_private_key: &self.host_private,
            host_public_key: &self.host_public,
            ..*neutral
        }
    }

    /// Returns ssh's arguments to enter the guest through `port` of this host.
    pub(crate) fn arguments(&self, port: u16) -> Vec<OsString> {
        instance::ssh_arguments(&self.directory, &self.login_user, port)
    }

    /// Runs a command in the guest as root.
    pub(crate) fn run_as_root(&self, port: u16, command: &str, limit: Duration) -> Result<String> {
        let mut arguments = self.arguments(port);
        arguments.push(format!("sudo -n {command}").into());
        child::read(&tools::require("ssh")?, &arguments, limit, &self.ui)
            .context("run a command in the guest")
    }
}
