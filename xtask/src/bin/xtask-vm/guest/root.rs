//! What root sees in the guest: one look, over ssh. A proof compares it with what the agent says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use xtask_core::machine::WORKLOAD_PORTS;
use xtask_core::machine::seed::FAILED_UNITS;

use super::ssh::{Keys, UnitState, parse_unit_state};

/// One look at the guest as root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RootView {
    pub(crate) unit: UnitState,
    /// The pid of the agent's main process; 0 if there is none.
    pub(crate) main_pid: u32,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    /// SHA-256 of the executable of the agent's main process.
    pub(crate) exe_sha256: String,
    /// Whether a file can be made where the agent's state is.
    pub(crate) is_writable: bool,
    /// The agent's containers, by name.
    pub(crate) containers: BTreeMap<String, Container>,
    /// Why podman did not list the containers.
    pub(crate) podman_error: Option<String>,
    /// Those of the workload's ports on which something listens.
    pub(crate) open_ports: BTreeSet<u16>,
    /// Units that have failed and had not failed before the agent was installed.
    pub(crate) failed_units: Vec<String>,
    /// Lines of the kernel's log that say that something is wrong with the machine.
    pub(crate) kernel_faults: Vec<String>,
}

/// A container, as `podman ps --format json` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Container {
    names: Vec<String>,
    pub(crate) state: String,
    pub(crate) id: String,
    /// Its start, in seconds since the epoch as the guest's clock had them.
    pub(crate) started_at: i64,
}

/// The kernel's words for an oops, a process that was killed for want of memory, and a file system or disk that failed.
const KERNEL_FAULTS: &str = "Oops|BUG:|Out of memory|oom-kill|EXT4-fs error|Remounting filesystem|I/O error";

impl RootView {
    /// Looks.
    pub(crate) fn look(keys: &Keys, port: u16, limit: Duration) -> Result<Self> {
        let output = keys.run_as_root(port, &format!("bash -c '{}'", script()), limit)?;
        Ok(Self::parse(&output))
    }

    fn parse(text: &str) -> Self {
        let mut view = Self { unit: parse_unit_state(text), ..Self::default() };
        for (name, value) in text.lines().filter_map(|line| line.trim().split_once('=')) {
            let value = value.trim().to_owned();
            match name {
                "MainPID" => view.main_pid = value.parse().unwrap_or_default(),
                "BootId" => view.boot_id = value,
                "Executable" => view.exe_sha256 = value,
                "Writable" => view.is_writable = value == "yes",
                "Listens" => view.open_ports.extend(value.parse::<u16>().ok()),
                "Failed" => view.failed_units.push(value),
                "Kernel" => view.kernel_faults.push(value),
                "Containers" => match containers(&value) {
                    Ok(containers) => view.containers = containers,
                    Err(error) => view.podman_error = Some(format!("{error:#}")),
                },
                _ => {}
            }
        }
        view
    }
}

#[cfg(test)]
impl Container {
    pub(crate) fn of_test(state: &str) -> Self {
        Self { names: Vec::new(), state: state.into(), id: "c1".into(), started_at: 17 }
    }
}

/// By name.
fn containers(json: &str) -> Result<BTreeMap<String, Container>> {
    let containers: Option<Vec<Container>> =
        serde_json::from_str(json).with_context(|| format!("read podman's containers {json:?}"))?;
    let named = containers.into_iter().flatten().filter_map(|one| Some((one.names.first()?.clone(), one)));
    Ok(named.collect())
}

/// Lines `NAME=VALUE`. It has no single quote, since it is quoted by two of them.
fn script() -> String {
    let ports: Vec<_> = WORKLOAD_PORTS.iter().map(ToString::to_string).collect();
    format!(
        "systemctl show iot-agent.service -p ActiveState -p UnitFileState -p NRestarts -p MainPID; \
         echo SystemState=$(systemctl is-system-running); \
         echo BootId=$(cat /proc/sys/kernel/random/boot_id); \
         echo Executable=$(sha256sum /proc/$(systemctl show -P MainPID iot-agent.service)/exe | cut -c 1-64); \
         probe=/var/lib/iot-agent/.iot-xtask-probe; \
         if : > $probe && rm $probe; then echo Writable=yes; fi; \
         systemctl list-units --state=failed --plain --no-legend --no-pager | while read -r unit _; do \
         grep -qxF $unit {FAILED_UNITS} || echo Failed=$unit; done; \
         dmesg | grep -E \"{KERNEL_FAULTS}\" | while read -r line; do echo \"Kernel=$line\"; done; \
         for port in {}; do if (exec 3<> /dev/tcp/127.0.0.1/$port) 2> /dev/null; then echo Listens=$port; fi; done; \
         echo Containers=$(podman --url unix:///run/iot-agent/podman.sock ps --all --no-trunc --format json)",
        ports.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_read_line_by_line() {
        let view = RootView::parse(
            "ActiveState=active\nUnitFileState=enabled\nNRestarts=2\nMainPID=412\nSystemState=degraded\n\
             BootId=b1\nExecutable=aa\nWritable=yes\nFailed=x.service\nKernel=[ 3.1] EXT4-fs error (device vda2): y=z\n\
             Listens=8080\n\
             Containers=[{\"Names\":[\"iot-d.a\"],\"State\":\"running\",\"Id\":\"5f\",\"StartedAt\":17,\"Pod\":\"\"}]\n",
        );
        assert_eq!((view.unit.restarts, view.main_pid, view.is_writable), (2, 412, true));
        assert_eq!((view.boot_id.as_str(), view.exe_sha256.as_str()), ("b1", "aa"));
        assert_eq!(view.failed_units, ["x.service"]);
        assert_eq!(view.kernel_faults, ["[ 3.1] EXT4-fs error (device vda2): y=z"]);
        assert_eq!(view.open_ports, BTreeSet::from([8080]));
        assert_eq!(
            (view.containers["iot-d.a"].state.as_str(), view.containers["iot-d.a"].started_at),
            ("running", 17)
        );
        assert_eq!(RootView::parse("Containers=null").podman_error, None);
        assert!(RootView::parse("Containers=").podman_error.is_some(), "podman has not answered");
        assert!(!script().contains('\''), "it is quoted by them");
    }
}
