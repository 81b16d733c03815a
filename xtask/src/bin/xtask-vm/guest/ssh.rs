//! Enters the guest with keys made for the run and with OpenSSH's client, to ask for the state of the agent and to fetch the
//! journal. The evidence that proves the agent comes over the fleet bus instead.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use xtask_core::error::Failure;
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

/// The state of the agent's unit and of the whole system, as systemd reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnitState {
    /// The unit's state: `active`, `failed`, `inactive` or `activating`.
    pub(crate) active: String,
    /// The state of the unit's file, for example `enabled` or `disabled`; empty if there is no such unit.
    pub(crate) file: String,
    /// The number of times that systemd has restarted the unit.
    pub(crate) restarts: u32,
    /// The state of the whole system: `running`, `starting` or `degraded`.
    pub(crate) system: String,
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

    /// Asks systemd in the guest for the state of the agent's unit.
    pub(crate) fn unit_state(&self, port: u16, limit: Duration) -> Result<UnitState> {
        Ok(parse_unit_state(&self.run_as_root(port, &format!("sh -c '{UNIT_STATE}'"), limit)?))
    }

    /// Returns the state of the agent's unit, and the content of the status file that the agent writes on the device. The
    /// content is empty if there is no such file.
    pub(crate) fn unit_and_status(&self, port: u16, limit: Duration) -> Result<(UnitState, String)> {
        let command = format!(
            "sh -c '{UNIT_STATE}; if [ -e /run/iot-agent/status.json ]; then cat /run/iot-agent/status.json; fi'"
        );
        let output = self.run_as_root(port, &command, limit)?;
        let status = output.find('{').map_or("", |at| &output[at..]);
        Ok((parse_unit_state(&output), status.to_owned()))
    }
}

/// The shell command that prints the state of the unit and of the whole system, one value in each line.
const UNIT_STATE: &str = "systemctl show iot-agent.service -p ActiveState -p UnitFileState -p NRestarts; \
                          echo SystemState=$(systemctl is-system-running)";

pub(super) fn parse_unit_state(text: &str) -> UnitState {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().trim().to_owned()
    };
    UnitState {
        active: field("ActiveState"),
        file: field("UnitFileState"),
        // There is no number if systemd does not know the unit. In that case, `file` is empty.
        restarts: field("NRestarts").parse().unwrap_or(0),
        system: field("SystemState"),
    }
}

impl UnitState {
    /// Returns an error if it is certain that the agent will never send a status.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let booted = matches!(self.system.as_str(), "running" | "degraded");
        let journal = "read the agent's journal in the report's directory";
        let (what, hint) = match (self.active.as_str(), self.file.as_str()) {
            ("inactive", "disabled" | "static" | "masked") if booted => (
                format!("the guest is up, but iot-agent.service is not running: it is {} at boot", self.file),
                "enable the unit when the agent is installed: systemctl enable iot-agent.service",
            ),
            ("inactive", "") if booted => (
                "the guest is up, but has no iot-agent.service".to_owned(),
                "the installation did not survive the power cut: the installer must sync its files",
            ),
            ("failed", _) => ("iot-agent.service has failed".to_owned(), journal),
            _ if self.restarts >= 5 => {
                let restarts = self.restarts;
                (format!("iot-agent.service keeps ending; systemd has started it {restarts} times"), journal)
            }
            _ => return Ok(()),
        };
        Err(Failure::guest(what, hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_ends_a_wait() {
        let table = [
            (
                "ActiveState=inactive\nUnitFileState=disabled\nNRestarts=0\nSystemState=running\n",
                Some("disabled at boot"),
            ),
            ("ActiveState=inactive\nUnitFileState=disabled\nNRestarts=0\nSystemState=starting\n", None),
            ("ActiveState=inactive\nUnitFileState=\nSystemState=degraded\n", Some("has no iot-agent")),
            ("ActiveState=active\nUnitFileState=enabled\nNRestarts=0\nSystemState=running\n", None),
            (
                "ActiveState=activating\nUnitFileState=enabled\nNRestarts=7\nSystemState=running\n",
                Some("7 times"),
            ),
            (
                "ActiveState=failed\nUnitFileState=enabled\nNRestarts=0\nSystemState=starting\n",
                Some("has failed"),
            ),
        ];
        for (text, expected) in table {
            let hopeless = parse_unit_state(text).check().err().map(|failure| failure.to_string());
            match expected {
                Some(words) => assert!(hopeless.as_ref().is_some_and(|what| what.contains(words)), "{text}"),
                None => assert_eq!(hopeless, None, "{text}"),
            }
        }
    }
}
