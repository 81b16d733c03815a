//! The disturbances of `--disturb`. A sound agent survives each of them, so the smoke must verify it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use xtask_core::bail_host;
use xtask_core::cli::{Disturb, Disturbance};
use xtask_core::error::host_fault;
use xtask_core::format::name_of;
use xtask_core::limits;
use xtask_core::report::EventKind;

use super::running::RunningVm;

/// The limits of a slow disk: bytes and requests per second.
const SLOW_DISK: (u64, u64) = (8_000_000, 500);

/// A disturbance, with the time at which it happens.
pub(super) struct PlannedDisturbance {
    disturbance: Disturbance,
    at: Instant,
    is_random: bool,
}

impl PlannedDisturbance {
    /// Plans a disturbance; its seconds are counted from now. Prints the value for `--disturb` that repeats it.
    pub(super) fn plan(disturb: Disturb, vm: &RunningVm) -> Result<Self> {
        let Disturb { disturbance, seconds } = disturb;
        let is_random = seconds.is_none();
        let seconds = seconds.map_or_else(|| random_seconds(disturbance), Ok)?;
        vm.ui.note(&format!("--disturb {}@{seconds}", name_of(&disturbance)));
        Ok(Self { disturbance, at: Instant::now() + Duration::from_secs(seconds), is_random })
    }

    /// Returns whether the moment was drawn at random, and not given.
    pub(super) fn is_random(&self) -> bool {
        self.is_random
    }
}

/// Returns a random number of seconds. A slow disk is slow from the beginning, so its number is 0.
fn random_seconds(disturbance: Disturbance) -> Result<u64> {
    if disturbance == Disturbance::SlowDisk {
        return Ok(0);
    }
    let mut bytes = [0; 1];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random moment")?;
    Ok(u64::from(bytes[0]) * limits::DISTURBED.as_secs() / 256)
}

impl RunningVm {
    /// Disturbs the device if the moment has come. The moment is postponed during a fault of the smoke. The restart of the
    /// broker is also postponed while the broker is stopped.
    pub(super) fn disturb(&mut self) -> Result<()> {
        let Some(planned) = &self.disturbance else { return Ok(()) };
        let disturbance = planned.disturbance;
        let needs_broker = disturbance == Disturbance::BrokerRestarted;
        if Instant::now() < planned.at || self.fault.is_some() || (needs_broker && !self.broker.is_there()) {
            return Ok(());
        }
        self.ui.note(&format!("disturbing the device: {}", name_of(&disturbance)));
        self.record(EventKind::Fault, format!("disturbance {}", name_of(&disturbance)));
        let disturbed = match disturbance {
            Disturbance::ClockYearBack => self.set_clock_back(),
            Disturbance::QemuStopped => self.stop_for_a_while(),
            Disturbance::BrokerRestarted => {
                self.stop_broker()?;
                self.start_broker()
            }
            Disturbance::SlowDisk => {
                self.disk_limits = SLOW_DISK;
                self.limit_disk()
            }
        };
        disturbed
            .map_err(|error| host_fault(error, "disturb the device", "see the causes, and run again"))?;
        self.disturbance = None;
        Ok(())
    }

    /// Checks that the planned disturbance has come.
    pub(super) fn expect_disturbed(&self) -> Result<()> {
        if self.disturbance.is_some() {
            bail_host!(
                "--disturb: the smoke has ended before the moment of the disturbance";
                "give an earlier moment: DISTURBANCE@SECONDS"
            );
        }
        Ok(())
    }

    /// Sets the limits of the disk again, after a fault has replaced them or a power cut has removed them.
    pub(super) fn limit_disk(&self) -> Result<()> {
        let (bytes, requests) = self.disk_limits;
        self.target.limit_writes(bytes, requests)
    }

    fn set_clock_back(&mut self) -> Result<()> {
        let command = "date --set \"-1 year\" > /dev/null && date +%Y";
        let year = self.run_as_root(command, self.plan.limits.login_prompt())?;
        self.ui.note(&format!("the guest's clock shows the year {}", year.trim()));
        Ok(())
    }

    /// Stops QEMU with SIGSTOP for a while. A pause over QMP would stop the guest's clock, too, and the guest would not
    /// notice the pause.
    fn stop_for_a_while(&self) -> Result<()> {
        let qemu = self.target.emulator().context("find the run's QEMU to stop it")?;
        qemu.signal(Signal::STOP).context("stop QEMU")?;
        let until = Instant::now() + limits::STOPPED;
        let mut waited = Ok(());
        while waited.is_ok() && Instant::now() < until {
            std::thread::sleep(limits::POLL);
            waited = self.ui.check();
        }
        qemu.signal(Signal::CONT).context("let QEMU go on")?;
        waited
    }
}
