//! A running machine and its servers: the waits that watch it, the access as root, and its end.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::error::{Failure, failure};
use xtask_core::machine::RunFiles;
use xtask_core::machine::seed::marker;
use xtask_core::plan::Plan;
use xtask_core::report::{EventKind, FirmwareReport, GUEST, JOURNAL};
use xtask_core::{bail_guest, limits};
use xtask_fleet::{Broker, Contents, ReceivedStatus, Registry};
use xtask_jobs::Ui;

use super::disturbance::PlannedDisturbance;
use super::fault::Fault;
use super::run::Run;
use super::target::Target;
use super::warm::{self, UsedSnapshot};
use crate::guest::console::Console;
use crate::guest::first_boot::FirstBoot;
use crate::guest::root::RootView;
use crate::guest::root_port::RootPort;
use crate::guest::ssh::Keys;
use crate::guest::watch::{Deadline, Watch, Watched};
use crate::libvirt::Condition;

/// A running machine with everything that it needs.
pub(crate) struct RunningVm {
    pub(super) ui: Ui,
    pub(super) plan: Plan,
    pub(super) files: RunFiles,
    pub(super) target: Target,
    /// The snapshot from which the machine was restored; `None` for a cold run.
    pub(super) snapshot: Option<UsedSnapshot>,
    pub(super) libvirt_version: String,
    /// The firmware that a libvirt daemon has selected.
    pub(super) firmware: Option<FirmwareReport>,
    pub(super) keys: Keys,
    pub(super) console: Console,
    pub(super) root: RootPort,
    pub(super) broker: Broker,
    /// The registry of a run that records the writes; `None` in other runs.
    pub(super) registry: Option<Registry>,
    /// A port of this host's loopback that the guest must not reach. `None` if this host cannot confine QEMU.
    pub(super) canary: Option<TcpListener>,
    /// The time at which the current phase must have ended.
    pub(super) deadline: Deadline,
    /// The expected number of boots since the power was last switched on; `None` while the guest may reboot.
    pub(super) expected_boots: Option<usize>,
    /// The fault that the smoke has begun and not ended.
    pub(super) fault: Option<Fault>,
    /// The disturbance that has not come yet.
    pub(super) disturbance: Option<PlannedDisturbance>,
    /// The limits of the disk, in bytes and requests per second; 0 means no limit.
    pub(super) disk_limits: (u64, u64),
    /// The content of the bucket of the desired state, while a fault has emptied it.
    pub(super) emptied: Option<Contents>,
    /// The boots and the faults so far.
    pub(super) events: Vec<Event>,
}

/// A boot, a fault or the end of a fault, with its time and its description.
pub(super) type Event = (Instant, EventKind, String);

/// The kernel's first line, and a line of a kernel whose log level hides the first one.
const FIRST_KERNEL_LINES: [&str; 2] = ["Linux version", "] Booting Linux"];
/// The first line of the UEFI firmware for Arm (AAVMF).
const FIRMWARE_LINE: &str = "UEFI firmware (version";

/// The command that prints the journal of all boots. The numbers before the lines are seconds since the boot.
const JOURNAL_COMMAND: &str = "journalctl --boot=all --no-pager --output short-monotonic --lines 2500";
/// The commands that print what cloud-init, podman and systemd say about the guest. Each of them is ended after a while,
/// so that one which hangs does not hide the others. The agent and its unit with its drop-in files are printed last,
/// because report.html shows only the last lines of guest.txt. Before them are the units and drop-in files that the
/// distribution's packages did not install.
const GUEST_COMMANDS: [&str; 11] = [
    "cloud-init status --long",
    "tail -n 100 /var/log/cloud-init-output.log",
    "df -h",
    "free -m",
    "podman --url unix:///run/iot-agent/podman.sock ps --all --no-trunc",
    "systemctl --failed --no-pager",
    "systemctl list-jobs --no-pager",
    "find /etc/systemd/system -type f ! -path '*/iot-agent.service*' -exec tail -v -n +1 {} +",
    "sha256sum /usr/local/bin/iot-agent",
    "systemctl cat --no-pager iot-agent",
    "systemctl status --full --no-pager iot-agent",
];

/// Returns the shell command that runs [`GUEST_COMMANDS`], each for at most `seconds`.
fn guest_command(seconds: u64) -> String {
    let commands = GUEST_COMMANDS.map(|command| format!("timeout {seconds} {command} 2>&1"));
    commands.join("; ")
}

impl RunningVm {
    /// Counts the boots since the power was last switched on, by the first lines of firmware and kernel on the console.
    /// The count is 0 in a restored guest, and if neither the firmware nor the kernel prints such a line.
    fn boots(&self) -> usize {
        let lines = FIRST_KERNEL_LINES.into_iter().chain([FIRMWARE_LINE]);
        lines.map(|line| self.console.count(line)).max().unwrap_or(0)
    }

    /// Begins to watch for reboots. The image may have rebooted during its first boot.
    pub(super) fn expect_no_reboot(&mut self) {
        self.expected_boots = Some(self.boots());
    }

    /// Checks that the guest has not rebooted by itself.
    fn check_boots(&self) -> Result<()> {
        if let Some(expected) = self.expected_boots
            && self.boots() > expected
        {
            bail_guest!("the guest has rebooted by itself"; "read console.log for why it rebooted");
        }
        Ok(())
    }

    pub(super) fn kernel_has_spoken(&self) -> bool {
        FIRST_KERNEL_LINES.iter().any(|line| self.console.line_with(line).is_some())
    }

    /// Returns whether the kernel or a program of the guest has printed a line. A kernel with the parameter `quiet`
    /// prints no first line.
    pub(super) fn shows_life(&self) -> bool {
        let lines = ["systemd[", "cloud-init", "[  OK  ]", marker::STARTED];
        self.kernel_has_spoken()
            || self.can_be_entered()
            || lines.iter().any(|line| self.console.line_with(line).is_some())
    }

    /// Waits like [`Self::wait_until`] for an event of a first boot. Ends early if cloud-init will not run. If the time
    /// runs out and the kernel has printed nothing, the error says so.
    pub(super) fn wait_for_first_boot(
        &mut self,
        deadline: Deadline,
        what: &str,
        mut probe: impl FnMut(&mut Self) -> Result<Option<()>>,
    ) -> Result<()> {
        let (mut first_boot, limit) = (FirstBoot::default(), self.plan.limits.cloud_init_sign());
        let waited = self.wait_until(deadline, what, |vm| {
            if let Some(reached) = probe(vm)? {
                return Ok(Some(reached));
            }
            Ok(first_boot.check(&vm.console, limit).map(|()| None)?)
        });
        waited.map_err(|error| {
            if !deadline.is_over() || self.shows_life() {
                return error;
            }
            error.context(silent(self.console.last()))
        })
    }

    /// Waits until `probe` returns a value, at most until the end of the phase. Meanwhile watches the machine.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        probe: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        self.wait_until(self.deadline, what, probe)
    }

    /// Waits like [`Self::wait`], but at most until `deadline`.
    pub(super) fn wait_until<T>(
        &mut self,
        deadline: Deadline,
        what: &str,
        mut probe: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let hint =
            "read journal.log and console.log for what the guest did; on a slow host use --timeout-scale 2";
        Watch { ui: &self.ui.clone(), what, deadline, hint }.until(self, |vm| {
            vm.check_boots()?;
            vm.disturb()?;
            let probed = probe(vm);
            // While ssh does not forward the ports, an event that does not happen says nothing about the guest.
            let is_open =
                matches!(&probed, Ok(None)) || probed.as_ref().is_err_and(|error| failure(error).is_none());
            match vm.target.tunnel_failure().filter(|_| is_open) {
                Some(failure) => Err(failure.into()),
                None => probed,
            }
        })
    }

    /// Waits for a status that `check` accepts. Returns an error if `check` fails, if the broker refuses the device's
    /// credentials, or if the guest's systemd says that the agent's unit will never be up.
    pub(super) fn wait_for_status(
        &mut self,
        what: &str,
        mut check: impl FnMut(&ReceivedStatus) -> Result<bool, Failure>,
    ) -> Result<ReceivedStatus> {
        let refusals_before = self.broker.refusals();
        let mut asked = Instant::now();
        self.wait(what, |vm| {
            if let Some(seen) = vm.broker.latest()?
                && check(&seen)?
            {
                return Ok(Some(seen));
            }
            // One refusal is ignored, because it may come from a connection that the power cut interrupted.
            if vm.broker.refusals() >= refusals_before + 2 {
                bail_guest!(
                    "the broker refuses the device's credentials";
                    "compare [credentials] in the agent's configuration with the broker's users; \
                    nats.log lists the refusals"
                );
            }
            vm.check_guest(&mut asked)?;
            Ok(None)
        })
    }

    /// Checks the guest as root at intervals. Returns an error if the agent's unit will never be up, or if the guest's
    /// system has a fault. `looked` is the time of the last check.
    pub(super) fn check_guest(&mut self, looked: &mut Instant) -> Result<()> {
        if looked.elapsed() <= limits::GUEST_QUESTION {
            return Ok(());
        }
        let Some(view) = self.look()? else { return Ok(()) };
        *looked = Instant::now();
        super::observed::check_system(&view)?;
        Ok(view.unit.check()?)
    }

    pub(super) fn can_be_entered(&self) -> bool {
        [marker::DONE, marker::FAILED].iter().any(|sign| self.console.line_with(sign).is_some())
            || self.console.has_login_prompt()
    }

    /// Returns whether the guest says that the agent is installed, and an error if the installation failed.
    pub(super) fn provisioned(&self) -> Result<bool> {
        if let Some(reason) = self.console.after(marker::FAILED) {
            let hint = "agent/dist/install.sh failed in the guest; run it there by hand after smoke --keep";
            return Err(Failure::guest(format!("the agent did not install:{reason}"), hint).into());
        }
        Ok(self.console.line_with(marker::DONE).is_some())
    }

    /// Returns whether the guest is provisioned. A restored guest must also have installed the keys of this run.
    pub(super) fn has_keys(&self) -> Result<bool> {
        let taken = !self.is_restored() || self.console.line_with(marker::KEYS).is_some();
        Ok(self.provisioned()? && taken)
    }

    /// Returns a text about the number of seconds by which a restored guest's clock jumped. The text is empty without
    /// a snapshot. Returns an error if the clock was not set.
    pub(super) fn clock_jumped(&mut self) -> Result<String> {
        let Some(used) = &mut self.snapshot else { return Ok(String::new()) };
        let step = warm::clock_step(&self.console)?;
        used.report.clock_step_seconds = Some(step);
        Ok(format!("; its clock jumped by {step} s"))
    }

    /// Waits until the files of the machine's snapshot are hashed, and returns an error if one was changed. Without a
    /// snapshot, it returns at once.
    pub(super) fn verify_snapshot(&mut self, run: &Run<'_>) -> Result<()> {
        self.snapshot.as_mut().map_or(Ok(()), |used| used.finish_verification(run))
    }

    /// Records an event that has just happened.
    pub(super) fn record(&mut self, kind: EventKind, text: impl Into<String>) {
        self.events.push((Instant::now(), kind, text.into()));
    }

    /// Stops the broker for a while.
    pub(super) fn stop_broker(&mut self) -> Result<()> {
        self.broker.go_away()?;
        self.record(EventKind::Fault, "the broker was stopped");
        Ok(())
    }

    /// Starts the broker again.
    pub(super) fn start_broker(&mut self) -> Result<()> {
        self.broker.come_back()?;
        self.record(EventKind::End, "the broker was started again");
        Ok(())
    }

    /// Queries the state of the guest as root. Returns `None` if the guest has not answered yet.
    pub(super) fn look(&mut self) -> Result<Option<RootView>> {
        let canary = self.canary.as_ref().map(TcpListener::local_addr).transpose()?;
        RootView::look(&mut self.root, canary.map(|address| address.port()), self.plan.limits.guest_command())
    }

    /// Runs a command in the guest as root, and returns its output.
    ///
    /// # Errors
    /// Returns a failure of the guest if there is no answer within `limit`.
    pub(super) fn run_as_root(&mut self, command: &str, limit: Duration) -> Result<String> {
        let deadline = Deadline::after(limit);
        self.root.forget();
        loop {
            if let Some(output) = self.root.ask(command, limit)? {
                return Ok(output);
            }
            self.ui.check()?;
            self.check_alive("the output of a command in the guest")?;
            if deadline.is_over() {
                bail_guest!(
                    "the guest has not completed the command {command:?} within {} s", limit.as_secs();
                    "read console.log for what the guest does"
                );
            }
            std::thread::sleep(limits::POLL);
        }
    }

    /// Returns whether the guest can be expected to answer a command. A guest that reboots by itself does not answer for
    /// a while.
    pub(super) fn answers_root(&mut self) -> bool {
        self.target.condition() == Condition::Running && self.can_be_entered() && self.check_boots().is_ok()
    }

    /// Reads the guest's journal of all boots and the state of cloud-init, systemd and podman, if the guest can be
    /// entered.
    pub(super) fn fetch_state(&mut self, run: &Run<'_>, directory: &Path) {
        if !self.answers_root() {
            return;
        }
        // Commands of a guest whose disk completes no writes may wait for ever.
        if self.fault == Some(Fault::HeldWrites)
            && let Err(error) = self.limit_disk()
        {
            run.warn(&format!("the evidence is incomplete: cannot let the disk complete writes: {error:#}"));
            return;
        }
        let limit = self.plan.limits.journal();
        let state = guest_command(limit.as_secs() / 2);
        for (name, command, limit) in [(JOURNAL, JOURNAL_COMMAND, limit), (GUEST, &state, 2 * limit)] {
            match self.run_as_root(command, limit) {
                Ok(output) => run.keep(&directory.join(name), output.into_bytes()),
                Err(error) => {
                    run.warn(&format!(
                        "the evidence is incomplete: cannot read {name} in the guest: {error:#}"
                    ));
                    return;
                }
            }
        }
    }

    /// Stops the machine and then its servers.
    pub(super) fn stop(mut self) -> Result<()> {
        let destroyed = self.target.remove();
        let stopped = self.registry.as_ref().map_or(Ok(()), Registry::stop);
        self.broker.stop()?;
        stopped?;
        destroyed
    }

    /// Returns whether the machine was restored from a snapshot. Its overlay then lies over the snapshot's disk.
    pub(super) fn is_restored(&self) -> bool {
        self.files.backing.len() > 1
    }
}

/// Returns the failure of a guest whose kernel has printed nothing on the serial console.
fn silent(last: &str) -> Failure {
    Failure::guest(
        format!("the guest's kernel has printed nothing on the serial console, whose last line is {last:?}"),
        "the kernel may have another console: add console=ttyAMA0 (x86_64: console=ttyS0) to its command line in the \
         image. If it does not run, use another --cpu; on a slow host use --timeout-scale 2",
    )
}

impl Watched for RunningVm {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn check_alive(&mut self, what: &str) -> Result<()> {
        self.broker.check()?;
        self.registry.as_ref().map_or(Ok(()), Registry::check)?;
        let condition = self.target.condition();
        // If the machine is off, its QEMU will end in a moment, and a later check reports that.
        if matches!(condition, Condition::Running | Condition::Off) {
            return Ok(());
        }
        self.console.read()?;
        if condition == Condition::Gone {
            self.target.check_host(what)?;
            bail_guest!(
                "QEMU ended while waiting for {what}";
                "read QEMU's log (qemu.log in the report's directory, or /var/log/libvirt/qemu on a daemon's host); a guest that shuts \
                 down ends its QEMU too"
            );
        }
        Err(self.target.stopped(&format!("while waiting for {what}"))?.into())
    }
}
