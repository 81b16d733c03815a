//! The state of the guest as root sees it, which a script reads through a virtio-serial port. Such a *view* is compared
//! with the agent's reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use xtask_core::machine::seed::{BASELINE, LIST_CORE_DUMPS, LIST_KERNEL_FAULTS};
use xtask_core::machine::{HOST_FROM_GUEST, WORKLOAD_PORTS};

use super::root_port::RootPort;
use super::unit::{self, UnitState};

/// The state of the guest at one time, as root sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RootView {
    pub(crate) unit: UnitState,
    /// The process id of the agent's main process; 0 if there is none.
    pub(crate) main_pid: u32,
    /// The content of `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
    /// The SHA-256 digest of the executable of the agent's main process.
    pub(crate) exe_sha256: String,
    /// True if no file can be made in the directory of the agent's state.
    pub(crate) is_read_only: bool,
    /// The agent's containers, by name.
    pub(crate) containers: BTreeMap<String, Container>,
    /// The reason why podman did not list the containers; `None` if it did.
    pub(crate) podman_error: Option<String>,
    /// The ports of the workloads on which a process listens.
    pub(crate) open_ports: BTreeSet<u16>,
    /// True if the guest can connect to a port of the host that does not belong to the run.
    pub(crate) reaches_host: bool,
    /// The units that have failed since the agent was installed, except those that a timer starts. A timer's unit may
    /// fail because the guest has no network to the internet.
    pub(crate) failed_units: Vec<String>,
    /// The lines of the kernel's log that report a fault of the machine.
    pub(crate) kernel_faults: Vec<String>,
    /// The paths of the core dumps of programs that have crashed.
    pub(crate) core_dumps: Vec<String>,
    /// The content of the status file that the agent writes on the device; empty if there is no such file.
    pub(crate) local_status: String,
}

/// A container, as `podman ps --format json` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Container {
    names: Vec<String>,
    pub(crate) state: String,
    pub(crate) id: String,
    /// The start of the container in seconds since the epoch, by the guest's clock.
    pub(crate) started_at: i64,
}

impl RootView {
    /// Runs the script in the guest, and parses its output. Returns `None` if the guest has not answered yet. The
    /// script also tries to connect to the port `canary` of the host.
    ///
    /// # Errors
    /// Returns an error if the port cannot be used, or if the guest ended the script at `limit`.
    pub(crate) fn look(port: &mut RootPort, canary: Option<u16>, limit: Duration) -> Result<Option<Self>> {
        let Some(output) = port.ask(&script(canary), limit)? else { return Ok(None) };
        let view = Self::parse(&output);
        // A file system that is read-only can keep podman from answering.
        let is_usable = output.ends_with(COMPLETE) || view.is_read_only;
        ensure!(
            is_usable,
            "the query of the guest's state as root was not complete after {} s",
            limit.as_secs()
        );
        Ok(Some(view))
    }

    fn parse(text: &str) -> Self {
        let mut view = Self { unit: UnitState::parse(text), ..Self::default() };
        for (name, value) in text.lines().filter_map(|line| line.trim().split_once('=')) {
            let value = value.trim().to_owned();
            match name {
                "MainPID" => view.main_pid = value.parse().unwrap_or_default(),
                "BootId" => view.boot_id = value,
                "Executable" => view.exe_sha256 = value,
                "ReadOnly" => view.is_read_only = true,
                "Listens" => view.open_ports.extend(value.parse::<u16>().ok()),
                "Reaches" => view.reaches_host = true,
                "Failed" => view.failed_units.push(value),
                "Core" => view.core_dumps.push(value),
                "Status" => view.local_status = value,
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

/// Parses podman's list of containers. Returns them by name.
fn containers(json: &str) -> Result<BTreeMap<String, Container>> {
    let containers: Option<Vec<Container>> =
        serde_json::from_str(json).with_context(|| format!("read podman's containers {json:?}"))?;
    let named = containers.into_iter().flatten().filter_map(|one| Some((one.names.first()?.clone(), one)));
    Ok(named.collect())
}

/// The last line of the script's output.
const COMPLETE: &str = "Complete=yes\n";

/// Returns the script that prints lines `NAME=VALUE`. It is one line. It starts few processes, because each of them
/// takes long in an emulated guest.
fn script(canary: Option<u16>) -> String {
    let ports: Vec<_> = WORKLOAD_PORTS.iter().map(ToString::to_string).collect();
    format!(
        "set -f; {query}; pid=${{unit#*MainPID=}}; pid=${{pid%%[!0-9]*}}; \
         echo \"BootId=$(< /proc/sys/kernel/random/boot_id)\"; \
         if [ \"$pid\" != 0 ]; then read -r sum _ < <(sha256sum /proc/$pid/exe); echo \"Executable=$sum\"; fi; \
         probe=/var/lib/iot-agent/.iot-xtask-probe; \
         if ! {{ : > $probe && rm $probe; }}; then echo ReadOnly=yes; fi; \
         while read -r failed _; do \
         if ! grep -qxF -- \"$failed\" {BASELINE} && [[ $(systemctl show -P TriggeredBy \"$failed\") != *.timer* ]]; \
         then echo \"Failed=$failed\"; fi; \
         done < <(systemctl list-units --state=failed --plain --no-legend --no-pager); \
         {LIST_KERNEL_FAULTS} | grep -vxFf {BASELINE} | sed s/^/Kernel=/; \
         {LIST_CORE_DUMPS} | grep -vxFf {BASELINE} | sed s/^/Core=/; \
         for port in {ports}; do if (exec 3<> /dev/tcp/127.0.0.1/$port) 2> /dev/null; then echo Listens=$port; fi; done; \
         for port in {canary}; do \
         if (exec 3<> /dev/tcp/{HOST_FROM_GUEST}/$port) 2> /dev/null; then echo Reaches=$port; fi; done; \
         echo Containers=$(podman --url unix:///run/iot-agent/podman.sock ps --all --no-trunc --format json); \
         echo Status=$(< /run/iot-agent/status.json); \
         echo Complete=yes",
        query = unit::QUERY,
        ports = ports.join(" "),
        canary = canary.map_or(String::new(), |port| port.to_string()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_read_line_by_line() {
        let view = RootView::parse(
            "ActiveState=active\nUnitFileState=enabled\nNRestarts=2\nMainPID=412\nSystemState=degraded\n\
             BootId=b1\nExecutable=aa\nReadOnly=yes\nFailed=x.service\nKernel=[ 3.1] EXT4-fs error (device vda2): y=z\n\
             Listens=8080\n\
             Containers=[{\"Names\":[\"iot-d.a\"],\"State\":\"running\",\"Id\":\"5f\",\"StartedAt\":17,\"Pod\":\"\"}]\n",
        );
        assert_eq!((view.unit.restarts, view.main_pid, view.is_read_only), (2, 412, true));
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
        let script = script(Some(40001));
        assert!(!script.contains('\n'), "a request is one line");
        let parsed = std::process::Command::new("bash").args(["-n", "-c", &script]).status().unwrap();
        assert!(parsed.success(), "{script}");
    }
}
