//! Leaves the machine of a run to the user, for `vm up` and `smoke --keep`.

use std::time::Duration;

use anyhow::Result;
use xtask_core::bail_host;
use xtask_core::error::Kind;
use xtask_core::format::now_rfc3339;
use xtask_core::machine::seed::marker;
use xtask_core::processes::emulator;
use xtask_core::runs::instance::{self, DaemonRecord, InstanceRecord};

use super::run::Run;
use super::running::RunningVm;
use crate::guest::watch::Deadline;
use crate::libvirt::Condition;
use crate::vm::log;
use crate::vm::power::greets;

impl RunningVm {
    /// Leaves the machine running under a name. Returns an error if its QEMU has ended.
    pub(super) fn release(mut self, run: &Run<'_>, name: Option<&str>) -> Result<InstanceRecord> {
        if self.target.condition() == Condition::Running {
            // A fault that the smoke did not end must not stay in a machine that is kept.
            self.target.limit_writes(0, 0)?;
            self.wait_until_entered()?;
        }
        if self.target.condition() != Condition::Running {
            bail_host!(
                "keep the machine: its QEMU has ended";
                "run again; if QEMU ends by itself, read the run's console.log and the host's kernel log"
            );
        }
        let route = self.target.ssh_route()?;
        let uri = self.plan.place.connect.as_ref();
        let daemon = uri.map(|uri| DaemonRecord { uri: uri.to_string(), route: route.clone() });
        let instance = InstanceRecord {
            schema: instance::SCHEMA,
            id: run.dir.id().to_owned(),
            name: name.unwrap_or(run.dir.id()).to_owned(),
            arch: self.plan.spec.architecture,
            image: self.plan.image.name.clone(),
            made_at: now_rfc3339(),
            login_user: self.keys.login_user.clone(),
            ssh_port: if daemon.is_none() { route.as_ref().map(|route| route.port) } else { None },
            console: self.files.console_log.clone(),
            daemon,
        };
        if let Some(qemu) = emulator(self.target.work()) {
            log::keep_small(qemu.pid, &instance.console)?;
        }
        if let Some(on_daemon) = self.target.daemon() {
            on_daemon.leave();
        }
        instance::keep(&run.dir, &run.cache, instance.clone(), || run.ui.check())?;
        self.target.leave();
        self.broker.stop()?;
        Ok(instance)
    }

    /// Waits until the guest's sshd answers. A restored guest must also have installed the keys of this run, which it
    /// does once its agent runs. A timeout and the end of QEMU are no errors, because a machine that cannot be entered
    /// can still be kept for the user.
    fn wait_until_entered(&mut self) -> Result<()> {
        let restored = self.is_restored();
        let keys = if restored { self.plan.limits.keys() } else { Duration::ZERO };
        let limit = keys + self.plan.limits.guest_command();
        // The sshd of a guest on a daemon may not be reachable from this host's loopback, so this wait does not
        // include it.
        let is_on_daemon = self.plan.place.connect.is_some();
        let port = self.target.ssh_route()?.map(|route| route.port);
        let entered = self.wait_until(Deadline::after(limit), "ssh", |vm| {
            let output = |sign| vm.console.line_with(sign).is_some();
            let provisioned = output(marker::DONE) || output(marker::FAILED);
            let takes_keys = restored && provisioned && !output(marker::KEYS);
            Ok((!takes_keys && (is_on_daemon || port.is_some_and(greets))).then_some(()))
        });
        match entered {
            Err(error) if Kind::Interrupted.is(&error) => Err(error),
            _ => Ok(()),
        }
    }
}
