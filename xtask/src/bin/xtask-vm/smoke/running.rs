//! The machine while it runs, with its broker: watched by every wait, cut off, entered, stopped.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask_core::error::{Failure, Kind};
use xtask_core::format::now_rfc3339;
use xtask_core::fs::write_private;
use xtask_core::machine::RunFiles;
use xtask_core::machine::seed::marker;
use xtask_core::plan::Plan;
use xtask_core::runs::instance::{self, InstanceRecord};
use xtask_core::{bail_guest, bail_host, limits};
use xtask_fleet::{Broker, ReceivedStatus};
use xtask_jobs::Ui;

use super::run::Run;
use super::target::Target;
use super::warm::{self, UsedSnapshot};
use crate::guest::console::Console;
use crate::guest::root::RootView;
use crate::guest::ssh::Keys;
use crate::guest::watch::{Watch, Watched};
use crate::libvirt::Condition;
use crate::vm::power::greets;

/// Everything that lives while the guest does.
pub(crate) struct RunningVm {
    pub(super) ui: Ui,
    pub(super) plan: Plan,
    pub(super) files: RunFiles,
    pub(super) target: Target,
    /// The snapshot that it came out of.
    pub(super) snapshot: Option<UsedSnapshot>,
    pub(super) libvirt_version: String,
    pub(super) keys: Keys,
    /// The guest's console.
    pub(super) console: Console,
    /// The fleet bus.
    pub(super) broker: Broker,
}

/// The kernel's first line, and one of a kernel whose log level hides that.
const FIRST_KERNEL_LINES: [&str; 2] = ["Linux version", "] Booting Linux"];
/// A getty on the console: the guest can be entered.
const LOGIN_PROMPT: &str = " login:";

impl RunningVm {
    pub(super) fn kernel_has_spoken(&self) -> bool {
        FIRST_KERNEL_LINES.iter().any(|line| self.console.line_with(line).is_some())
    }

    /// Waits for something of the guest.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        probe: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let hint = "on a slow host use --timeout-scale 2; otherwise read console.log";
        Watch { ui: &self.ui.clone(), what, limit, hint }.until(self, probe)
    }

    /// [`RunningVm::wait`] for a status that `check` takes for proof, or that it fails on. Meanwhile the broker's log and,
    /// now and then, the guest's systemd are asked whether it can still come.
    pub(super) fn wait_for_status(
        &mut self,
        what: &str,
        limit: Duration,
        mut check: impl FnMut(&ReceivedStatus) -> Result<bool, Failure>,
    ) -> Result<ReceivedStatus> {
        let refusals_before = self.broker.refusals();
        let mut asked = Instant::now();
        self.wait(what, limit, |vm| {
            if let Some(seen) = vm.broker.latest()?
                && check(&seen)?
            {
                return Ok(Some(seen));
            }
            // Twice: the first may be a connection that the power cut tore.
            if vm.broker.refusals() >= refusals_before + 2 {
                bail_guest!(
                    "the broker refuses the device's credentials";
                    "compare [credentials] in the agent's configuration with the broker's users; \
                    nats.log lists the refusals"
                );
            }
            vm.check_unit(&mut asked)?;
            Ok(None)
        })
    }

    /// Asks the guest's systemd now and then, and fails where the agent's unit will never be up. `asked` is when it was asked
    /// last.
    fn check_unit(&self, asked: &mut Instant) -> Result<()> {
        if asked.elapsed() <= limits::GUEST_QUESTION || !self.can_be_entered() {
            return Ok(());
        }
        let state = self.keys.unit_state(self.target.ssh_port()?, self.plan.limits.guest_command());
        *asked = Instant::now();
        Ok(state?.check()?)
    }

    pub(super) fn can_be_entered(&self) -> bool {
        [LOGIN_PROMPT, marker::DONE, marker::FAILED].iter().any(|sign| self.console.line_with(sign).is_some())
            || self.console.prompts(LOGIN_PROMPT)
    }

    /// Whether the guest says that the agent is installed; an error if the installation failed.
    pub(super) fn provisioned(&self) -> Result<bool> {
        if let Some(reason) = self.console.after(marker::FAILED) {
            let hint = "agent/dist/install.sh failed in the guest; run it there by hand after smoke --keep";
            return Err(Failure::guest(format!("the agent did not install:{reason}"), hint).into());
        }
        Ok(self.console.line_with(marker::DONE).is_some())
    }

    /// Whether it is provisioned and, restored, has this run's keys.
    pub(super) fn has_keys(&self) -> Result<bool> {
        let taken = !self.is_restored() || self.console.line_with(marker::KEYS).is_some();
        Ok(self.provisioned()? && taken)
    }

    /// By how many seconds a restored guest's clock jumped, in words; an error where it was not set.
    pub(super) fn clock_jumped(&mut self) -> Result<String> {
        let Some(used) = &mut self.snapshot else { return Ok(String::new()) };
        let step = warm::clock_step(&self.console)?;
        used.report.clock_step_seconds = Some(step);
        Ok(format!("; its clock jumped by {step} s"))
    }

    /// Waits until the snapshot's files are hashed, if the machine came out of one; fails if one was changed.
    pub(super) fn verify_snapshot(&mut self, run: &Run<'_>) -> Result<()> {
        self.snapshot.as_mut().map_or(Ok(()), |used| used.finish_verification(run))
    }

    /// The power goes: no shutdown, no flush.
    pub(super) fn cut_power(&mut self) -> Result<()> {
        self.target.cut_power()?;
        self.console.new_boot()
    }

    /// One look at the guest as root; an error while it cannot be entered.
    pub(super) fn look(&self) -> Result<RootView> {
        ensure!(self.can_be_entered(), "the guest cannot be entered yet");
        RootView::look(&self.keys, self.target.ssh_port()?, self.plan.limits.guest_command())
    }

    /// Writes the guest's journal to `path`, where it can still be had.
    pub(super) fn fetch_journal(&mut self, path: &Path) {
        if self.target.condition() != Condition::Running || !self.can_be_entered() {
            return;
        }
        let fetched = self.wait_until_entered().and_then(|()| self.target.ssh_port()).and_then(|port| {
            let command = "journalctl --boot --no-pager --output short-monotonic --lines 2000";
            self.keys.run_as_root(port, command, self.plan.limits.journal())
        });
        let written = fetched.and_then(|journal| write_private(path, journal));
        if let Err(error) = written {
            self.ui.note(&format!("cannot read the guest's journal: {error:#}"));
        }
    }

    /// The machine, then the broker.
    pub(super) fn stop(mut self) -> Result<()> {
        let destroyed = self.target.power_off();
        self.broker.stop()?;
        destroyed
    }

    /// Waits, where that takes a moment more, until ssh leads in: a restored machine takes its keys when its agent runs.
    /// No error where it never does, or QEMU ends: a machine that nobody enters can be left to a person too.
    fn wait_until_entered(&mut self) -> Result<()> {
        let restored = self.is_restored();
        let keys = if restored { self.plan.limits.keys() } else { Duration::ZERO };
        let limit = keys + self.plan.limits.guest_command();
        let port = self.target.ssh_port()?;
        let entered = self.wait("ssh", limit, |vm| {
            let output = |sign| vm.console.line_with(sign).is_some();
            let provisioned = output(marker::DONE) || output(marker::FAILED);
            let takes_keys = restored && provisioned && !output(marker::KEYS);
            Ok((!takes_keys && greets(port)).then_some(()))
        });
        match entered {
            Err(error) if Kind::Interrupted.is(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether it came out of a snapshot: there is then one more disk between its own and the image's.
    fn is_restored(&self) -> bool {
        self.files.backing.len() > 1
    }

    /// Leaves the machine running, under a name. Where that cannot be, it is destroyed.
    pub(super) fn release(mut self, run: &Run<'_>, name: Option<&str>) -> Result<InstanceRecord> {
        if self.target.condition() == Condition::Running {
            self.wait_until_entered()?;
        }
        if self.target.condition() != Condition::Running {
            bail_host!(
                "keep the machine: its QEMU has ended";
                "run again; if QEMU ends by itself, read the run's console.log and the host's kernel log"
            );
        }
        let instance = InstanceRecord {
            schema: instance::SCHEMA,
            id: run.dir.id().to_owned(),
            name: name.unwrap_or(run.dir.id()).to_owned(),
            arch: self.plan.spec.architecture,
            image: self.plan.image.name.clone(),
            made_at: now_rfc3339(),
            login_user: self.keys.login_user.clone(),
            ssh_port: Some(self.target.ssh_port()?),
            console: self.files.console_log.clone(),
        };
        instance::keep(&run.dir, &run.cache, instance.clone())?;
        self.target.leave();
        self.broker.stop()?;
        Ok(instance)
    }
}

impl Watched for RunningVm {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn check_alive(&mut self, what: &str) -> Result<()> {
        self.broker.check()?;
        let condition = self.target.condition();
        // One that is off is gone in a moment.
        if matches!(condition, Condition::Running | Condition::Off) {
            return Ok(());
        }
        self.console.read()?;
        if condition == Condition::Gone {
            self.target.hypervisor.check_signal(what)?;
            bail_guest!(
                "QEMU ended while waiting for {what}";
                "read qemu.log in the report's directory; a guest that shuts down ends its QEMU too"
            );
        }
        let overlay = self.files.overlay.display();
        bail_host!(
            "QEMU stopped the guest while waiting for {what}: its disk cannot be written, or KVM failed";
            "check the free space of the file system of {overlay}"
        );
    }
}
