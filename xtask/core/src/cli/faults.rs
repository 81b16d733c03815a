//! The faults that a smoke must find, and the disturbances that a sound agent survives.

use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::format::name_of;
use crate::report::{Phase, Report};

/// The value of `--disturb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disturb {
    pub disturbance: Disturbance,
    /// The seconds from the end of the boot; `None` for a random moment.
    pub seconds: Option<u64>,
}

/// An event that a sound agent survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disturbance {
    /// Set the guest's clock back by one year
    ClockYearBack,
    /// Stop QEMU for 20 seconds
    QemuStopped,
    /// Restart the broker
    BrokerRestarted,
    /// Limit the guest's disk to 8 MB and 500 write requests per second
    SlowDisk,
}

impl FromStr for Disturb {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, seconds) = match text.split_once('@') {
            None => (text, None),
            Some((name, seconds)) => {
                let parsed = seconds.parse().ok().filter(|seconds| *seconds <= 600);
                (
                    name,
                    Some(parsed.ok_or_else(|| format!("{seconds:?} is no number of seconds from 0 to 600"))?),
                )
            }
        };
        let known = Disturbance::value_variants();
        let disturbance = known.iter().copied().find(|known| name_of(known) == name).ok_or_else(|| {
            let names: Vec<_> = known.iter().map(name_of).collect();
            format!("there is no disturbance {name:?}; there are: {}", names.join(", "))
        })?;
        Ok(Self { disturbance, seconds })
    }
}

/// The faults that `--sabotage` causes on purpose, and that the smoke must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sabotage {
    /// Start the agent's unit without enabling it at boot
    UnitNotEnabled,
    /// Keep publishing the boot id of the first boot
    StaleBootId,
    /// After the power cut, keep the boot id of the first boot in the agent's heartbeats
    StaleHeartbeat,
    /// Install another executable than the one built
    OtherDigest,
    /// Make the guest's kernel panic while booting
    KernelPanic,
    /// Kill QEMU while the guest boots
    KillQemu,
    /// Make the broker refuse the device's password
    BrokerRefuses,
    /// Ignore the requests that stop or remove a container
    IgnoresDeletes,
    /// Delete the agent's state before each of its starts
    LosesState,
    /// Start the agent only once the bus can be reached
    WaitsForBus,
    /// Use a workload image for the other architecture
    ForeignImage,
    /// Use a workload whose allocator was compiled for pages of 4 KiB (needs an image with larger pages)
    SmallPages,
    /// Have systemd end the agent every 8 seconds
    CrashLoop,
    /// Bring back the agent's state from before a deletion at its next boot
    ForgetsDeletions,
    /// Power the guest off after a deployment was removed
    PowersOff,
    /// Delete the start counter in the workload's volume before each start of the agent
    LosesVolume,
    /// Let the agent acknowledge a change that it has not written to the disk
    NoFsync,
    /// Allow the agent one connection to the broker in each boot
    LosesBus,
    /// After the power cut, hide from the agent what was desired before
    WatchesOnlyNew,
    /// After the power cut, keep all commands from the agent
    DeafAfterRejoin,
    /// After the power cut, delete the containers every 30 seconds (needs `--observe 40` or `--cold`)
    Recreates,
    /// Reboot the guest once after it has joined again
    RebootsItself,
    /// Make the root file system read-only after the device has joined again
    ReadOnlyRoot,
    /// Give podman's user no memory controller, as a kernel with cgroup_disable=memory
    NoMemoryCgroup,
    /// Stop the agent and let another program write the device's status
    ForgedStatus,
    /// Let the guest reach the services on this host's loopback
    OpenNetwork,
    /// Open a restored machine's disk without the snapshot's layer
    StaleChain,
    /// With `--verify-cold`, make the guest's kernel panic in the cold run only
    ColdPanics,
}

/// How a smoke finds a planted fault.
#[derive(Debug, Clone, Copy)]
pub struct Detection {
    /// The phases in which the smoke may fail.
    pub phases: &'static [Phase],
    /// Texts, of which the error must contain at least one.
    pub words: &'static [&'static str],
    /// The kind of smoke that can find the fault.
    pub by: FoundBy,
    /// The arguments that name a machine with the fault; empty if every machine has it.
    pub machine: &'static [&'static str],
    /// The additional arguments that a warm smoke needs to find the fault.
    pub arguments: &'static [&'static str],
    /// The exit code of the smoke.
    pub exit_code: u8,
}

impl Detection {
    /// Checks the report of a smoke with the fault.
    ///
    /// # Errors
    /// Returns the reason why the report does not show that the smoke has found the fault.
    pub fn check(&self, report: &Report) -> Result<(), String> {
        let failure = report.failure.as_ref().ok_or("the report has no failure")?;
        let described = format!("{} {}", failure.error, failure.causes.join(" "));
        if report.exit_code != self.exit_code {
            return Err(format!(
                "the exit code is {} and not {}: {described}",
                report.exit_code, self.exit_code
            ));
        }
        if !self.phases.contains(&failure.phase) {
            return Err(format!("found in the phase {}: {described}", failure.phase.title()));
        }
        if !self.words.iter().any(|words| described.contains(words)) {
            return Err(format!("the error does not name the fault: {described}"));
        }
        Ok(())
    }
}

/// The kind of smoke that can find a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    WarmAndCold,
    Warm,
    /// A smoke that boots cold, because the fault acts during the first boot.
    Cold,
}

impl Sabotage {
    /// Returns how a smoke finds this fault; `None` for a fault that only `--verify-cold` can find.
    pub fn detection(self) -> Option<Detection> {
        use Phase::{Boot, Join, PowerCut, Rejoin, Workload};
        let (phases, words): (&[Phase], &[&str]) = match self {
            Self::UnitNotEnabled => (&[Rejoin], &["disabled at boot"]),
            Self::StaleBootId => (&[Rejoin], &["still reports the boot id"]),
            Self::StaleHeartbeat => (&[Rejoin], &["the agent's heartbeat has the boot id"]),
            Self::OtherDigest => (&[Join], &["the agent in the guest has the digest"]),
            Self::KernelPanic => (&[Boot], &["kernel panicked"]),
            Self::KillQemu => (&[Boot], &["QEMU ended"]),
            Self::BrokerRefuses => (&[Join], &["refuses the device's credentials"]),
            Self::IgnoresDeletes => (&[Workload], &["its port still answers"]),
            Self::LosesState => (&[Rejoin], &["the desired state did not survive the power cut"]),
            Self::WaitsForBus => (&[Rejoin], &["iot-agent.service is activating: it waits for something"]),
            Self::ForeignImage => (&[Workload], &["is made for"]),
            Self::SmallPages => (&[Workload], &["<jemalloc>: Unsupported system page size"]),
            Self::CrashLoop => {
                (&[Join, Workload, PowerCut, Rejoin], &["systemd has restarted the agent", "keeps ending"])
            }
            Self::ForgetsDeletions => {
                (&[Rejoin], &["had acknowledged the revision", "the deployment retired was deleted"])
            }
            Self::PowersOff => (&[Workload, PowerCut], &["QEMU ended", "the guest was not running"]),
            Self::LosesVolume => (&[Rejoin], &["it lost its volume"]),
            Self::NoFsync => (&[PowerCut], &["before the desired state was on its disk"]),
            Self::LosesBus => (&[Workload], &["a status after the restart of the broker"]),
            Self::WatchesOnlyNew => (&[Rejoin], &["is desired at revision"]),
            Self::DeafAfterRejoin => (&[Rejoin], &["the agent's answer to a ping"]),
            Self::Recreates => (&[Rejoin], &["was started or made again"]),
            Self::RebootsItself => (&[Rejoin], &["the guest has rebooted by itself"]),
            Self::ReadOnlyRoot => (&[Rejoin], &["root cannot write"]),
            Self::NoMemoryCgroup => (&[Workload], &["append cgroup_enable=memory"]),
            Self::ForgedStatus => (&[Join], &["another client of the bus has written"]),
            Self::OpenNetwork => (&[Join], &["that does not belong to the run"]),
            Self::StaleChain => (&[Boot], &["lies on"]),
            Self::ColdPanics => return None,
        };
        let by = match self {
            Self::KernelPanic | Self::KillQemu => FoundBy::Cold,
            Self::StaleChain => FoundBy::Warm,
            _ => FoundBy::WarmAndCold,
        };
        let machine: &[&str] = match self {
            Self::SmallPages => &["--image", "debian-13-16k", "--cpu", "pi5"],
            _ => &[],
        };
        let arguments: &[&str] = match self {
            Self::Recreates => &["--observe", "40"],
            // The smoke finds these faults when a limit has passed. A smaller limit saves time.
            Self::LosesBus | Self::WatchesOnlyNew => &["--timeout-scale", "0.5"],
            _ => &[],
        };
        let exit_code = if matches!(self, Self::StaleChain | Self::OpenNetwork) { 69 } else { 1 };
        Some(Detection { phases, words, by, machine, arguments, exit_code })
    }

    /// Returns the id of the finding for which `inspect` refuses the workload; `None` if the fault is not in the
    /// workload.
    pub fn refused_for(self) -> Option<&'static str> {
        match self {
            Self::ForeignImage => Some("elf-machine"),
            Self::SmallPages => Some("allocator-page-size"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;
    use crate::error::Failure;

    #[test]
    fn a_disturbance_has_a_name_and_perhaps_a_moment() {
        let slow = Disturb { disturbance: Disturbance::SlowDisk, seconds: None };
        assert_eq!("slow-disk".parse(), Ok(slow));
        assert_eq!("slow-disk@7".parse(), Ok(Disturb { seconds: Some(7), ..slow }));
        for (text, words) in
            [("slow", "there are: clock-year-back"), ("slow-disk@x", "0 to 600"), ("slow-disk@601", "601")]
        {
            let error = text.parse::<Disturb>().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_fault_is_found_by_its_phase_its_words_and_its_exit_code() {
        let detection = Sabotage::NoFsync.detection().unwrap();
        let report = |phase, words: &str, exit_code| {
            let error = Failure::guest(words, "sync it").into();
            let mut report = Report::before_run(VmArchitecture::Aarch64, &error);
            report.failure.as_mut().unwrap().phase = phase;
            report.exit_code = exit_code;
            report
        };
        let words = "acknowledged before the desired state was on its disk";
        assert_eq!(detection.check(&report(Phase::PowerCut, words, 1)), Ok(()));
        for (report, reason) in [
            (report(Phase::Rejoin, words, 1), "in the phase rejoin"),
            (report(Phase::PowerCut, "timed out", 1), "does not name the fault"),
            (report(Phase::PowerCut, words, 69), "exit code is 69"),
        ] {
            let found = detection.check(&report).unwrap_err();
            assert!(found.contains(reason), "{found}");
        }
    }
}
