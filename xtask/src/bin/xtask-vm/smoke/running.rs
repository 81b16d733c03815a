//! The machine while it runs, with its broker: watched by every wait, cut off, entered, stopped.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::error::{Failure, Kind};
use xtask_core::format::now_rfc3339;
use xtask_core::fs::write_private;
use xtask_core::image::Image;
use xtask_core::limits::{self, Limits};
use xtask_core::machine::RunFiles;
use xtask_core::machine::seed::marker;
use xtask_core::plan::Plan;
use xtask_core::runs::RunDir;
use xtask_core::runs::instance::{self, InstanceRecord};

use super::Session;
use super::boot::Domain;
use super::verify::Judgement;
use crate::guest::console::Console;
use crate::guest::ssh::Keys;
use crate::libvirt::{self, Condition, Hypervisor};
use crate::vm::power::greets;
use xtask_fleet::{Broker, ReceivedStatus};
use xtask_jobs::Ui;

/// Everything that lives while the guest does.
pub(crate) struct RunningVm {
    pub(super) plan: Plan,
    pub(super) files: RunFiles,
    pub(super) domain: Domain,
    pub(super) hypervisor: Hypervisor,
    pub(crate) machine: libvirt::Machine,
    pub(super) keys: Keys,
    pub(super) device_id: String,
    /// The guest's console.
    pub(crate) console: Console,
    /// The fleet bus.
    pub(crate) broker: Broker,
}

/// The kernel's first line, and one of a kernel whose log level hides that.
const FIRST_KERNEL_LINES: [&str; 2] = ["Linux version", "] Booting Linux"];
/// A getty on the console: the guest can be entered.
const LOGIN_PROMPT: &str = " login:";

impl RunningVm {
    pub(super) fn kernel_has_spoken(&self) -> bool {
        FIRST_KERNEL_LINES.iter().any(|line| self.console.line_with(line).is_some())
    }

    /// Looks again and again until `probe` has something; ends at once on Ctrl-C, a dead QEMU or broker, and on a
    /// console that says that the guest will never be up. A probe's error is kept and told if time runs out, since
    /// a guest that is slow fails in many ways; a A failure of the guest ends the wait.
    pub(crate) fn wait<T>(
        &mut self,
        session: &mut Session<'_>,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut last_error = None;
        loop {
            session.ui.tick(self.console.last())?;
            for line in self.console.read()? {
                session.ui.detail(&format!("    | {line}"));
            }
            if let Some(fault) = self.console.fault() {
                // The lines behind the first one say where it happened.
                std::thread::sleep(limits::BROKER_SETTLE);
                self.console.read()?;
                return Err(Failure::guest(fault.what, fault.hint).into());
            }
            self.broker.check()?;
            match probe(self) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(error) if Kind::Guest.is(&error) => return Err(error),
                Err(error) => last_error = Some(error),
            }
            self.check_qemu(what)?;
            if Instant::now() > deadline {
                let late = format!("timed out waiting for {what} after {} s", limit.as_secs());
                let late =
                    Failure::guest(late, "on a slow host use --timeout-scale 2; otherwise read console.log");
                return Err(match last_error {
                    Some(error) => error.context(late),
                    None => late.into(),
                });
            }
            std::thread::sleep(limits::POLL);
        }
    }

    /// [`RunningVm::wait`] for a status that `check` takes for proof. Meanwhile the broker's log and, now and then, the
    /// guest's systemd are asked whether it can still come.
    pub(crate) fn wait_for_status(
        &mut self,
        session: &mut Session<'_>,
        what: &str,
        limit: Duration,
        mut check: impl FnMut(&ReceivedStatus) -> Judgement,
    ) -> Result<ReceivedStatus> {
        let refusals_before = self.broker.refusals();
        let mut asked = Instant::now();
        self.wait(session, what, limit, |vm| {
            if let Some(seen) = vm.broker.latest()? {
                match check(&seen) {
                    Judgement::Proven => return Ok(Some(seen)),
                    Judgement::Refuted(diagnosis) => return Err(diagnosis.into()),
                    Judgement::NotYet => {}
                }
            }
            // Twice: the first may be a connection that the power cut tore.
            if vm.broker.refusals() >= refusals_before + 2 {
                return Err(Failure::guest(
                    "the broker refuses the device's credentials",
                    "compare [credentials] in the agent's configuration with the broker's users; nats.log lists the refusals",
                )
                .into());
            }
            vm.check_unit(&mut asked)?;
            Ok(None)
        })
    }

    /// Asks the guest's systemd now and then, and fails where the agent's unit will never be up. `asked` is when it was asked
    /// last.
    pub(super) fn check_unit(&self, asked: &mut Instant) -> Result<()> {
        if asked.elapsed() <= limits::GUEST_QUESTION || !self.can_be_entered() {
            return Ok(());
        }
        let state = self.keys.unit_state(self.machine.ssh_port()?, self.limits().guest_command());
        *asked = Instant::now();
        match state?.hopeless() {
            Some((error, hint)) => Err(Failure::guest(error, hint).into()),
            None => Ok(()),
        }
    }

    /// Fails where the guest's processors do not run any more.
    fn check_qemu(&mut self, what: &str) -> Result<()> {
        let condition = self.machine.condition();
        // One that is off is gone in a moment.
        if matches!(condition, Condition::Running | Condition::Off) {
            return Ok(());
        }
        self.console.read()?;
        if condition == Condition::Gone {
            return Err(Failure::guest(
                format!("QEMU ended while waiting for {what}"),
                "read qemu.log in the report's directory; it is empty if QEMU was killed",
            )
            .into());
        }
        Err(Failure::host(
            format!(
                "QEMU stopped the guest while waiting for {what}: its disk cannot be written, or KVM failed"
            ),
            format!("check the free space of the file system of {}", self.files.overlay.display()),
        )
        .into())
    }

    pub(super) fn can_be_entered(&self) -> bool {
        [LOGIN_PROMPT, marker::DONE, marker::FAILED].iter().any(|sign| self.console.line_with(sign).is_some())
            || self.console.prompts(LOGIN_PROMPT)
    }

    /// What the guest says of the agent's installation.
    pub(crate) fn provisioned(&self) -> Result<Option<()>> {
        if let Some(line) = self.console.line_with(marker::FAILED) {
            let (_, reason) = line.split_once(marker::FAILED).unwrap_or(("", line));
            let hint = "agent/dist/install.sh failed in the guest; run it there by hand after smoke --keep";
            return Err(Failure::guest(format!("the agent did not install:{reason}"), hint).into());
        }
        Ok(self.console.line_with(marker::DONE).map(drop))
    }

    /// Whether it is provisioned and, restored, has this run's keys.
    pub(crate) fn has_keys(&self) -> Result<Option<()>> {
        let taken = !self.is_restored() || self.console.line_with(marker::KEYS).is_some();
        Ok(self.provisioned()?.filter(|()| taken))
    }

    /// The plug is pulled: no shutdown, no flush.
    pub(crate) fn cut_power(&mut self) -> Result<()> {
        self.machine.destroy()?;
        self.console.new_boot()
    }

    /// The same machine again, read again before it runs.
    pub(crate) fn power_on(&mut self) -> Result<()> {
        self.machine = self.domain.start(&self.hypervisor)?;
        Ok(())
    }

    pub(crate) fn limits(&self) -> Limits {
        self.plan.limits
    }

    pub(crate) fn image(&self) -> &Image {
        &self.plan.image
    }

    pub(crate) fn device_id(&self) -> &str {
        &self.device_id
    }

    /// The guest's journal, where it can still be had.
    pub(crate) fn fetch_journal(&mut self, path: &Path, ui: &Ui) {
        if self.machine.condition() != Condition::Running || !self.can_be_entered() {
            return;
        }
        let fetched = self.wait_until_entered(ui).and_then(|()| self.machine.ssh_port()).and_then(|port| {
            let command = "journalctl --boot --no-pager --output short-monotonic --lines 2000";
            self.keys.run_as_root(port, command, self.limits().journal())
        });
        let written = fetched.and_then(|journal| write_private(path, journal));
        if let Err(error) = written {
            ui.note(&format!("cannot read the guest's journal: {error:#}"));
        }
    }

    /// The machine, then the broker.
    pub(crate) fn stop(mut self) -> Result<()> {
        let destroyed = self.machine.destroy();
        self.broker.stop()?;
        destroyed
    }

    /// Waits, where that takes a moment more, until ssh leads in: a restored machine takes its keys when its agent runs. No error where
    /// it never does, or QEMU ends: what is kept may be a machine that nobody enters, which is no reason not to keep it.
    fn wait_until_entered(&mut self, ui: &Ui) -> Result<()> {
        let keys = if self.is_restored() { self.limits().keys() } else { Duration::ZERO };
        let deadline = Instant::now() + keys + self.limits().guest_command();
        let port = self.machine.ssh_port()?;
        loop {
            ui.tick(self.console.last())?;
            self.console.read()?;
            let output = |sign| self.console.line_with(sign).is_some();
            let provisioned = output(marker::DONE) || output(marker::FAILED);
            let takes_keys = self.is_restored() && provisioned && !output(marker::KEYS);
            let entered = !takes_keys && greets(port);
            if entered || self.machine.condition() != Condition::Running || Instant::now() > deadline {
                return Ok(());
            }
            std::thread::sleep(limits::POLL);
        }
    }

    /// Whether it came out of a snapshot: there is then one more disk between its own and the image's.
    fn is_restored(&self) -> bool {
        self.files.backing.len() > 1
    }

    /// Leaves the machine running, under a name. Where that cannot be, it is destroyed.
    pub(crate) fn release(
        mut self,
        run: &RunDir,
        cache: &Cache,
        name: Option<&str>,
        ui: &Ui,
    ) -> Result<InstanceRecord> {
        if self.machine.condition() == Condition::Running {
            self.wait_until_entered(ui)?;
        }
        if self.machine.condition() != Condition::Running {
            let hint =
                "run again; if QEMU ends by itself, read the run's console.log and the host's kernel log"
                    .to_owned();
            return Err(Failure::host("keep the machine: its QEMU has ended", hint).into());
        }
        let kept = InstanceRecord {
            schema: instance::SCHEMA,
            id: run.id().to_owned(),
            name: name.unwrap_or(run.id()).to_owned(),
            arch: self.plan.spec.architecture,
            image: self.plan.image.name.clone(),
            made_at: now_rfc3339(),
            login_user: self.keys.login_user.clone(),
            ssh_port: Some(self.machine.ssh_port()?),
            console: self.files.console_log.clone(),
        };
        instance::keep(run, cache, kept.clone())?;
        self.machine.let_go();
        self.broker.stop()?;
        Ok(kept)
    }
}
