//! Entering the guest: keys made for the run, and OpenSSH's own client. Used to ask how the agent is and to fetch the
//! journal; what proves the agent comes over the fleet bus.

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

/// The run's own keys.
#[derive(Debug)]
pub(crate) struct Keys {
    directory: PathBuf,
    /// Whom ssh enters as.
    pub(crate) login_user: String,
    /// Who may enter.
    pub(crate) user_public: String,
    /// What the guest presents.
    pub(crate) host_private: String,
    /// Its public half.
    pub(crate) host_public: String,
    ui: Ui,
}

/// How the agent's unit is, as systemd says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnitState {
    /// `active`, `failed`, `inactive`, `activating`.
    pub(crate) active: String,
    /// `enabled`, `disabled`.
    pub(crate) file: String,
    /// How often systemd has started it again.
    pub(crate) restarts: u32,
    /// `running`, `starting`, `degraded`: the whole system.
    pub(crate) system: String,
}

impl Keys {
    /// Makes two ed25519 pairs in `directory`.
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

    /// The seed of an instance that these keys enter; everything else is as in `neutral`.
    pub(crate) fn seed<'a>(&'a self, instance_id: &'a str, neutral: &Seed<'a>) -> Seed<'a> {
        Seed {
            instance_id,
            authorized_key: &self.user_public,
            host_private_key: &self.host_private,
            host_public_key: &self.host_public,
            ..*neutral
        }
    }

    /// The arguments that lead into the guest behind `port`.
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

    /// Asks systemd in the guest for the agent's unit.
    pub(crate) fn unit_state(&self, port: u16, limit: Duration) -> Result<UnitState> {
        Ok(parse_unit_state(&self.run_as_root(port, &format!("sh -c '{UNIT_STATE}'"), limit)?))
    }

    /// The same, and what the agent says on the device itself; empty where it has said nothing.
    pub(crate) fn unit_and_status(&self, port: u16, limit: Duration) -> Result<(UnitState, String)> {
        let command = format!(
            "sh -c '{UNIT_STATE}; cd /run/iot-agent && if [ -e status.json ]; then cat status.json; fi'"
        );
        let output = self.run_as_root(port, &command, limit)?;
        let status = output.find('{').map_or("", |at| &output[at..]);
        Ok((parse_unit_state(&output), status.to_owned()))
    }
}

/// How the unit and the whole system are, in lines.
const UNIT_STATE: &str = "systemctl show iot-agent.service -p ActiveState -p UnitFileState -p NRestarts; \
                          echo SystemState=$(systemctl is-system-running)";

fn parse_unit_state(text: &str) -> UnitState {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().trim().to_owned()
    };
    UnitState {
        active: field("ActiveState"),
        file: field("UnitFileState"),
        // No number means that systemd knows no such unit, which `file` says already.
        restarts: field("NRestarts").parse().unwrap_or(0),
        system: field("SystemState"),
    }
}

impl UnitState {
    /// Fails where it is certain that no status will ever come.
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
