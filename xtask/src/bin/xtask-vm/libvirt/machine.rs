//! A machine that has been started: its state, QEMU's monitor, and its end.

use std::ffi::CString;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use virt::domain::{
    Domain, DomainPausedReason, DomainShutoffReason, DomainState, DomainStateEnum, DomainStateReason,
};
use virt::enumutil::Enum;
use virt::error::ErrorNumber::{self, AccessDenied, NoSupport, OperationDenied, OperationUnsupported};
use xtask_core::error::{Failure, host_fault};

use super::reaper;
use crate::guest::monitor::returned;

/// A started domain. If this value is dropped, the domain is destroyed, so that no QEMU is left if a run ends early.
pub(crate) struct Machine {
    pub(super) domain: Domain,
    /// True if a drop must not destroy the domain, because it is already destroyed or becomes an instance.
    let_go: bool,
}

/// The state of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// QEMU runs, and so do the guest's processors.
    Running,
    /// QEMU runs but has stopped the guest, because it cannot write the guest's disk, or because KVM failed.
    Paused,
    /// The guest has shut itself down, and its QEMU waits for libvirt to end it.
    Off,
    /// QEMU has ended.
    Gone,
}

impl Machine {
    /// Returns the machine of a domain that was just started.
    pub(super) fn of(domain: Domain) -> Self {
        Self { domain, let_go: false }
    }

    /// Returns the machine of a domain that another process has started and left running.
    pub(super) fn left_by_another(domain: Domain) -> Self {
        Self { domain, let_go: true }
    }

    /// Returns the current state of the domain.
    pub(crate) fn condition(&self) -> Condition {
        // libvirt does not know a transient domain whose QEMU has ended, so an error means that the domain is gone.
        // `is_active` comes first, because `state` of the crate virt 0.5.0 returns no error in this case.
        if !self.domain.is_active().unwrap_or(false) {
            return Condition::Gone;
        }
        match self.domain.state() {
            Ok((DomainStateEnum::Known(DomainState::Paused | DomainState::Crashed), _)) => Condition::Paused,
            Ok((DomainStateEnum::Known(DomainState::Shutdown | DomainState::Shutoff), _)) => Condition::Off,
            _ => Condition::Running,
        }
    }

    /// Checks that QEMU was not ended on the daemon's host. A guest that shuts itself down ends its QEMU, too, and that is
    /// no error here. The caller waits for `what`.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub(crate) fn check_end(&self, what: &str) -> Result<(), Failure> {
        use DomainShutoffReason::{Crashed, Destroyed, Failed};
        let Ok((_, Enum::Known(DomainStateReason::Shutoff(Enum::Known(reason))))) = self.domain.state()
        else {
            return Ok(());
        };
        let how = match reason {
            Crashed => "QEMU crashed or was killed",
            Destroyed => "somebody has destroyed the domain",
            Failed => "QEMU could not run",
            _ => return Ok(()),
        };
        Err(Failure::host(
            format!("{how} on the daemon's host while waiting for {what}"),
            "read QEMU's log in /var/log/libvirt/qemu and the kernel log (dmesg) of that host; the out-of-memory killer \
             ends QEMU, too. Nothing is known about the agent",
        ))
    }

    /// Starts the guest's processors.
    pub(crate) fn resume(&self) -> Result<()> {
        self.domain.resume().context("start the guest's processors")
    }

    /// Stops the guest's processors. QEMU then completes all requests to the disks.
    pub(crate) fn stop_guest(&self) -> Result<()> {
        self.domain.suspend().map(drop).context("stop the guest's processors")
    }

    /// Sends a command of QEMU's machine protocol (QEMU, qemu-qmp-ref) and returns the answer.
    pub(crate) fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let question = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = self.monitor(&question, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)?;
        returned(&answer).with_context(|| format!("ask QEMU: {question}"))
    }

    /// Returns whether libvirt passes commands on to QEMU. A daemon may refuse this to some users (libvirt.org/acl.html).
    pub(crate) fn answers_qmp(&self) -> bool {
        const REFUSES: [ErrorNumber; 4] = [AccessDenied, OperationDenied, NoSupport, OperationUnsupported];
        let question = r#"{"execute":"query-status"}"#;
        let asked =
            self.domain.qemu_monitor_command(question, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT);
        !asked.is_err_and(|error| REFUSES.iter().any(|number| error.code() == (*number).into()))
    }

    /// Returns libvirt's description of the running domain.
    pub(crate) fn live_xml(&self) -> Result<String> {
        self.domain.xml_desc(0).context("describe the running domain")
    }

    /// Returns QEMU's own name of its state (QEMU, RunState). If QEMU cannot be asked, returns the name of the state
    /// that libvirt reports.
    pub(crate) fn run_state(&self) -> Result<String> {
        if self.answers_qmp() {
            let status = self.qmp("query-status", &json!({}))?;
            return Ok(status["status"].as_str().unwrap_or_default().to_owned());
        }
        let (_, reason) = self.domain.state().context("ask for the state of the domain")?;
        let is_io_error = matches!(
            reason,
            Enum::Known(DomainStateReason::Paused(Enum::Known(DomainPausedReason::IOError)))
        );
        Ok(if is_io_error { "io-error" } else { "paused" }.to_owned())
    }

    /// Sends a command to QEMU's human monitor, for facts that the machine protocol does not have. Returns the output.
    pub(crate) fn hmp(&self, command: &str) -> Result<String> {
        self.monitor(command, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
    }

    fn monitor(&self, command: &str, protocol: u32) -> Result<String> {
        let answer = self.domain.qemu_monitor_command(command, protocol);
        answer.with_context(|| format!("ask QEMU: {command}")).map_err(|error| {
            let hint =
                "read QEMU's log (qemu.log in the report's directory, or /var/log/libvirt/qemu on a daemon's host), \
                 and run again; nothing is known about the agent";
            host_fault(error, "use QEMU's monitor", hint)
        })
    }

    /// Leaves the domain running when this value is dropped.
    pub(crate) fn let_go(&mut self) {
        self.let_go = true;
    }

    /// Stops the domain, writes its memory and the state of its devices to `memory`, and ends it (virDomainSave).
    pub(crate) fn save(&mut self, memory: &Path) -> Result<()> {
        let path =
            CString::new(memory.as_os_str().as_encoded_bytes()).context("the path contains a NUL byte")?;
        // SAFETY: the domain lives as long as `self`, and libvirt copies the path. The crate virt 0.5 does not wrap
        // this call.
        let saved =
            reaper::reaping(|| unsafe { virt::sys::virDomainSave(self.domain.as_ptr(), path.as_ptr()) });
        if saved < 0 {
            return Err(virt::error::Error::last_error())
                .with_context(|| format!("save the machine's memory to {}", memory.display()));
        }
        self.let_go = true;
        Ok(())
    }

    /// Ends QEMU with SIGTERM and then SIGKILL, and does not notify the guest (virDomainDestroy).
    pub(crate) fn destroy(&mut self) -> Result<()> {
        // Even after an error, a drop must not destroy the run's next machine, which has the same name and identity.
        self.let_go = true;
        let destroyed = reaper::reaping(|| self.domain.destroy()).context("destroy the domain");
        if self.condition() == Condition::Gone { Ok(()) } else { destroyed }
    }

    /// Returns the port on 127.0.0.1 that is forwarded to `guest_port`. The kernel chose this port.
    pub(crate) fn port_to(&self, guest_port: u16) -> Result<u16> {
        forwarded_port(&self.hmp("info usernet")?, guest_port)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.let_go {
            // The error is ignored. The clean-up of the run's directory ends all processes of the run, and on a
            // daemon, the next run destroys the domain.
            drop(self.destroy());
        }
    }
}

/// Returns the host's port that is forwarded to `guest_port`, from a row of `info usernet` like
/// `TCP[HOST_FORWARD]  14  127.0.0.1 37787  10.0.2.15  22 …`.
pub(crate) fn forwarded_port(table: &str, guest_port: u16) -> Result<u16> {
    let wanted = guest_port.to_string();
    let port = table.lines().find_map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
        ["TCP[HOST_FORWARD]", _, "127.0.0.1", port, _, to, ..] if to == wanted => Some(port),
        _ => None,
    });
    let port =
        port.with_context(|| format!("QEMU forwards no port to the guest's port {guest_port}: {table:?}"));
    port?.parse().with_context(|| format!("read the port in {table:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forwarded_port_is_read_from_qemus_table() {
        let table = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n\
                     \x20 TCP[ESTABLISHED]   15  10.0.2.15 40000  127.0.0.1 4222 0 0\r\n\
                     \x20 TCP[HOST_FORWARD]  14       127.0.0.1 37787       10.0.2.15    22     0     0\r\n\
                     \x20 TCP[HOST_FORWARD]  15       127.0.0.1 41002       10.0.2.15  8080     0     0\r\n";
        assert_eq!(forwarded_port(table, 22).unwrap(), 37787);
        assert_eq!(forwarded_port(table, 8080).unwrap(), 41002);
        assert!(forwarded_port(table, 8081).unwrap_err().to_string().contains("no port"));
    }
}
