//! Compares a view, that is, the state of the guest as root sees it, with the agent's reports. The functions are pure.

use xtask_core::bail_guest;
use xtask_core::error::Failure;

use super::proof::Deployed;
use crate::guest::root::RootView;

/// The values that a view must have.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpectedView<'a> {
    pub(super) device_id: &'a str,
    /// The boot id that the agent or the workload has reported.
    pub(super) boot_id: &'a str,
    /// The SHA-256 digest of the executable under test.
    pub(super) exe_sha256: &'a str,
    pub(super) running: &'a [Deployed],
    pub(super) deleted: &'a [Deployed],
    /// The number of times that faults of this run may have made systemd restart the agent in this boot.
    pub(super) allowed_restarts: u32,
}

impl ExpectedView<'_> {
    /// Compares a view with the expected values. The inner error is a difference that may still disappear.
    ///
    /// # Errors
    /// Returns a failure of the guest for a difference that cannot disappear any more.
    pub(super) fn check(&self, view: &RootView) -> Result<Result<(), String>, Failure> {
        check_system(view)?;
        self.check_agent(view)?;
        if let Some(error) = &view.podman_error {
            return Ok(Err(error.clone()));
        }
        if view.unit.active != "active" {
            return Ok(Err(format!("iot-agent.service is {}", view.unit.active)));
        }
        let expected: Vec<_> =
            self.running.iter().map(|deployed| container_of(self.device_id, *deployed)).collect();
        let missing = self.running.iter().find_map(|deployed| self.not_running(view, *deployed));
        let left = self.deleted.iter().find_map(|deployed| self.not_deleted(view, *deployed));
        // The agent's user has no other containers.
        let other = view.containers.keys().find(|name| !expected.contains(name));
        let other = other.map(|name| format!("podman has the container {name}, which is not desired"));
        Ok(missing.or(left).or(other).map_or(Ok(()), Err))
    }

    fn check_agent(&self, view: &RootView) -> Result<(), Failure> {
        // Check this before the unit: without a process, the unit's state does not show who wrote the status.
        if view.main_pid == 0 && view.unit.active == "inactive" {
            bail_guest!(
                "iot-agent.service has no process: it has ended, or another client of the bus has written the device's status";
                "read the agent's journal in the report's directory; if there is none, find out which program in the guest has the device's credentials"
            );
        }
        view.unit.check()?;
        let journal = "read the agent's journal in the report's directory";
        let (what, hint) = if view.unit.restarts > self.allowed_restarts {
            let restarts = view.unit.restarts;
            let what = format!(
                "systemd has restarted the agent {restarts} time(s) in this boot; the smoke did not end it"
            );
            (what, journal)
        } else if view.unit.active == "active" && view.boot_id != self.boot_id {
            let what = format!(
                "the agent reports the boot {}, and the guest is in the boot {}",
                self.boot_id, view.boot_id
            );
            (what, "the guest has rebooted, or the status is not that of its agent")
        } else if view.main_pid != 0 && view.exe_sha256 != self.exe_sha256 {
            let what = format!(
                "the agent's process {} runs an executable with the digest {}, the one under test has {}",
                view.main_pid, view.exe_sha256, self.exe_sha256
            );
            (what, "check what the unit starts")
        } else if let Some(unit) = view.failed_units.first() {
            (
                format!("{unit} has failed since the agent was installed"),
                "read its journal in the report's directory",
            )
        } else {
            return Ok(());
        };
        Err(Failure::guest(what, hint))
    }

    fn not_running(&self, view: &RootView, deployed: Deployed) -> Option<String> {
        let name = deployed.name;
        match view.containers.get(&container_of(self.device_id, deployed)) {
            None => Some(format!("podman has no container of the deployment {name}")),
            Some(container) if container.state != "running" => Some(format!(
                "podman says that the container of the deployment {name} is {}",
                container.state
            )),
            Some(_) if !view.open_ports.contains(&deployed.port) => {
                Some(format!("nothing listens on the port {} of the deployment {name}", deployed.port))
            }
            Some(_) => None,
        }
    }

    fn not_deleted(&self, view: &RootView, deployed: Deployed) -> Option<String> {
        let Deployed { name, port } = deployed;
        if let Some(container) = view.containers.get(&container_of(self.device_id, deployed)) {
            return Some(format!(
                "the deployment {name} was deleted, and podman has a container of it, {}",
                container.state
            ));
        }
        view.open_ports
            .contains(&port)
            .then(|| format!("the deployment {name} was deleted, and its port {port} is open"))
    }
}

/// Checks that the guest's system is sound: its file system, its kernel and its programs.
///
/// # Errors
/// Returns a failure of the guest if its file system is read-only, its kernel has logged a fault, or a program has
/// crashed.
pub(super) fn check_system(view: &RootView) -> Result<(), Failure> {
    if view.is_read_only {
        bail_guest!(
            "root cannot write to /var/lib/iot-agent in the guest";
            "a root file system that is mounted read-only has met an error: read console.log"
        );
    }
    if let Some(fault) = view.kernel_faults.first() {
        bail_guest!("the guest's kernel reports a fault: {fault}"; "read console.log");
    }
    if let Some(core) = view.core_dumps.first() {
        bail_guest!("a program has crashed in the guest: {core}"; "read its journal in the report's directory");
    }
    Ok(())
}

/// Returns the name of the container that the agent makes for a deployment.
pub(super) fn container_of(device_id: &str, deployed: Deployed) -> String {
    format!("iot-{device_id}.{}", deployed.name)
}

/// Compares two views of the same boot. Between them, the fleet has changed nothing.
///
/// # Errors
/// Returns a failure of the guest if the agent's process or a container is not the same in both views.
pub(super) fn check_unchanged(
    device_id: &str,
    running: &[Deployed],
    first: &RootView,
    second: &RootView,
) -> Result<(), Failure> {
    agent_stays(first, second)?;
    running.iter().try_for_each(|deployed| container_stays(device_id, *deployed, first, second))
}

/// Checks that the agent's process is the same in both views.
///
/// # Errors
/// Returns a failure of the guest if it is not.
pub(super) fn agent_stays(first: &RootView, second: &RootView) -> Result<(), Failure> {
    if first.main_pid == second.main_pid {
        return Ok(());
    }
    bail_guest!(
        "the agent's process is {}, before that it was {}", second.main_pid, first.main_pid;
        "read the agent's journal in the report's directory for why it ended"
    )
}

/// Checks that the container of a deployment is the same in both views, and was not started again.
///
/// # Errors
/// Returns a failure of the guest if it is not the same.
pub(super) fn container_stays(
    device_id: &str,
    deployed: Deployed,
    first: &RootView,
    second: &RootView,
) -> Result<(), Failure> {
    let container = |view: &RootView| view.containers.get(&container_of(device_id, deployed)).cloned();
    if container(first) == container(second) {
        return Ok(());
    }
    bail_guest!(
        "the container of the deployment {} was started or made again while nothing was changed", deployed.name;
        "an agent must leave a container alone that is as it is desired"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::root::Container;
    use crate::guest::unit::UnitState;

    const RUNNING: Deployed = Deployed { name: "runs", port: 8080 };
    const DELETED: Deployed = Deployed { name: "went", port: 8081 };
    const EXPECTED: ExpectedView<'_> = ExpectedView {
        device_id: "d",
        boot_id: "b1",
        exe_sha256: "aa",
        running: &[RUNNING],
        deleted: &[DELETED],
        allowed_restarts: 0,
    };

    fn sound() -> RootView {
        RootView {
            unit: UnitState {
                active: "active".into(),
                file: "enabled".into(),
                restarts: 0,
                system: "running".into(),
            },
            main_pid: 412,
            boot_id: "b1".into(),
            exe_sha256: "aa".into(),
            containers: [("iot-d.runs".to_owned(), Container::of_test("running"))].into(),
            open_ports: [8080].into(),
            ..RootView::default()
        }
    }

    /// A change of a sound view, words of the message about it, and true if the difference cannot disappear.
    type Row = (fn(&mut RootView), &'static str, bool);

    #[test]
    fn each_thing_that_root_sees_is_compared() {
        assert_eq!(EXPECTED.check(&sound()).unwrap(), Ok(()));
        let table: &[Row] = &[
            (|view| view.unit.restarts = 1, "restarted the agent 1 time", true),
            (|view| view.boot_id = "b2".into(), "is in the boot b2", true),
            (|view| view.exe_sha256 = "bb".into(), "the digest bb", true),
            (|view| view.is_read_only = true, "cannot write", true),
            (|view| view.kernel_faults.push("Oops".into()), "a fault: Oops", true),
            (|view| view.core_dumps.push("/var/crash/_usr_bin_podman.crash".into()), "has crashed", true),
            (|view| view.failed_units.push("x.service".into()), "x.service has failed", true),
            (|view| view.unit.active = "failed".into(), "has failed", true),
            (
                |view| (view.unit.active, view.main_pid) = ("inactive".into(), 0),
                "another client of the bus has written",
                true,
            ),
            (|view| view.podman_error = Some("no podman".into()), "no podman", false),
            (|view| view.containers.clear(), "no container of the deployment runs", false),
            (|view| view.unit.active = "activating".into(), "iot-agent.service is activating", false),
            (
                |view| drop(view.containers.insert("iot-d.runs-1".into(), Container::of_test("exited"))),
                "the container iot-d.runs-1, which is not desired",
                false,
            ),
            (|view| view.open_ports.clear(), "nothing listens on the port 8080", false),
            (|view| view.open_ports.extend([8081]), "its port 8081 is open", false),
            (
                |view| drop(view.containers.insert("iot-d.runs".into(), Container::of_test("exited"))),
                "of the deployment runs is exited",
                false,
            ),
            (
                |view| drop(view.containers.insert("iot-d.went".into(), Container::of_test("created"))),
                "went was deleted, and podman has a container of it, created",
                false,
            ),
        ];
        for (change, words, is_final) in table {
            let mut view = sound();
            change(&mut view);
            let found = match EXPECTED.check(&view) {
                Err(failure) => (failure.to_string(), true),
                Ok(Err(reason)) => (reason, false),
                Ok(Ok(())) => panic!("{words}: nothing was found"),
            };
            assert!(found.0.contains(words) && found.1 == *is_final, "{words}: {found:?}");
        }
    }

    #[test]
    fn a_restart_by_a_fault_of_the_run_is_allowed_once() {
        let expected = ExpectedView { allowed_restarts: 1, ..EXPECTED };
        let mut view = sound();
        view.unit.restarts = 1;
        assert_eq!(expected.check(&view).unwrap(), Ok(()));
        view.unit.restarts = 2;
        assert!(expected.check(&view).unwrap_err().to_string().contains("restarted the agent 2 time"));
    }

    #[test]
    fn another_process_or_container_is_a_change() {
        let mut other = sound();
        assert!(check_unchanged("d", &[RUNNING], &sound(), &other).is_ok());
        other.main_pid = 500;
        assert!(
            check_unchanged("d", &[RUNNING], &sound(), &other).unwrap_err().to_string().contains("is 500")
        );
        let mut other = sound();
        other.containers.get_mut("iot-d.runs").unwrap().id = "c2".into();
        let found = check_unchanged("d", &[RUNNING], &sound(), &other).unwrap_err().to_string();
        assert!(found.contains("of the deployment runs was started or made again"), "{found}");
    }
}
