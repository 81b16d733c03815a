//! The faults that `torture --faults` causes, and the selection of some of them. `xtask/faults/` says how a device
//! heals from each fault.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::format::name_of;

/// A fault that a device in the field meets. A fault lasts for a time that the schedule gives, unless it is a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum DeviceFault {
    /// The device loses its power, and gets it back at the end
    PowerCut,
    /// The device's network interface has no carrier
    LinkDown,
    /// The carrier of the device's network interface comes and goes every second
    LinkFlapping,
    /// Every connection to the broker transports nothing and is never closed, even after the end
    Blackhole,
    /// Everything between the device and the broker arrives two seconds late
    HighDelay,
    /// The connection to the broker transports 2 KB in a second
    LowRate,
    /// A third of the packets of the device's network interface is lost
    PacketLoss,
    /// The device's network interface sends packets of at most 576 bytes
    SmallMtu,
    /// The device's name server answers nothing while the device must connect again
    NoNameService,
    /// A captive portal answers in place of the broker, with the certificate of another host
    CaptivePortal,
    /// The broker ends, and starts again at the end
    BrokerRestarted,
    /// SIGSTOP stops the broker, so its connections stay open and nothing is answered
    BrokerSlow,
    /// The port of the broker refuses connections, and the existing ones are closed
    BrokerRefuses,
    /// The bucket of the desired state loses all entries, and the fleet puts them again at the end
    BucketEmptied,
    /// The broker closes the device's connection and refuses the device's login
    LoginRevoked,
    /// The device's clock is set to the year 1970 while the device must connect over TLS
    #[value(name = "clock-1970")]
    #[serde(rename = "clock-1970")]
    Clock1970,
    /// The device's clock is set back by one year while the device must connect over TLS
    ClockYearBack,
    /// The device's clock is set ahead by ten years while the device must connect over TLS
    ClockTenYearsAhead,
    /// The device's clock jumps ahead by two hours, and back at the end
    ClockJumps,
    /// The disk has no space while the agent writes its state
    DiskFullState,
    /// The disk has no space while podman pulls an image
    DiskFullPull,
    /// The disk is as slow as an SD card
    DiskSlow,
    /// One request of the disk fails with EIO
    DiskError,
    /// The root file system is read-only
    DiskReadOnly,
    /// A program takes almost all of the device's memory
    MemoryPressure,
    /// The kernel kills the agent because memory has run out
    OomAgent,
    /// The kernel kills podman's service because memory has run out
    OomPodman,
    /// The kernel kills the program of a container because memory has run out
    OomContainer,
    /// SIGKILL ends the agent
    KillAgent,
    /// SIGKILL ends podman's service
    KillPodman,
    /// SIGKILL ends the program of a container
    KillContainer,
    /// QEMU stands still for 30 seconds, and the device's clock jumps by that time afterwards
    QemuStopped,
}

/// The subject of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultGroup {
    Power,
    Network,
    Broker,
    Clock,
    Disk,
    Memory,
    Processes,
}

impl DeviceFault {
    /// Returns every fault, in the order of the groups.
    pub fn all() -> &'static [Self] {
        Self::value_variants()
    }

    /// Returns the subject of this fault.
    pub fn group(self) -> FaultGroup {
        match self {
            Self::PowerCut => FaultGroup::Power,
            Self::LinkDown
            | Self::LinkFlapping
            | Self::Blackhole
            | Self::HighDelay
            | Self::LowRate
            | Self::PacketLoss
            | Self::SmallMtu
            | Self::NoNameService
            | Self::CaptivePortal => FaultGroup::Network,
            Self::BrokerRestarted
            | Self::BrokerSlow
            | Self::BrokerRefuses
            | Self::BucketEmptied
            | Self::LoginRevoked => FaultGroup::Broker,
            Self::Clock1970 | Self::ClockYearBack | Self::ClockTenYearsAhead | Self::ClockJumps => {
                FaultGroup::Clock
            }
            Self::DiskFullState
            | Self::DiskFullPull
            | Self::DiskSlow
            | Self::DiskError
            | Self::DiskReadOnly => FaultGroup::Disk,
            Self::MemoryPressure | Self::OomAgent | Self::OomPodman | Self::OomContainer => {
                FaultGroup::Memory
            }
            Self::KillAgent | Self::KillPodman | Self::KillContainer | Self::QemuStopped => {
                FaultGroup::Processes
            }
        }
    }

    /// Returns whether this fault is a moment: it has no length.
    pub fn is_moment(self) -> bool {
        matches!(
            self,
            Self::DiskError
                | Self::OomAgent
                | Self::OomPodman
                | Self::OomContainer
                | Self::KillAgent
                | Self::KillPodman
                | Self::KillContainer
        )
    }

    /// Returns one sentence about what happens to the device, without a full stop.
    pub fn explanation(self) -> String {
        let value = self.to_possible_value().expect("no fault is hidden");
        value.get_help().map(ToString::to_string).unwrap_or_default()
    }
}

impl Display for DeviceFault {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        formatter.pad(&name_of(self))
    }
}

impl FromStr for DeviceFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::all().iter().copied();
        known.into_iter().find(|fault| name_of(fault) == text).ok_or_else(|| {
            format!("there is no fault {text:?}; `cargo xtask torture --list` prints the names of all faults")
        })
    }
}

/// The value of `--faults`: each selected fault once, in the order of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultSelection(pub Vec<DeviceFault>);

impl FromStr for FaultSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(DeviceFault::all().to_vec()));
        }
        let mut selected = Vec::new();
        for name in text.split(',') {
            if name == "all" {
                return Err("`all` selects every fault, so it must be the only name".to_owned());
            }
            let fault: DeviceFault = name.parse()?;
            if selected.contains(&fault) {
                return Err(format!("{fault} is named twice; leave one out"));
            }
            selected.push(fault);
        }
        Ok(Self(selected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_a_name_for_all_formats_a_group_and_a_sentence() {
        let all = DeviceFault::all();
        for fault in all {
            assert_eq!(serde_json::to_value(fault).unwrap(), fault.to_string(), "{fault:?}");
            assert_eq!(fault.to_string().parse(), Ok(*fault));
            let explanation = fault.explanation();
            let has_verb = explanation.split(' ').count() >= 4;
            assert!(
                has_verb && explanation.starts_with(char::is_uppercase) && !explanation.ends_with('.'),
                "{fault}: {explanation}"
            );
        }
        let groups: Vec<_> = all.iter().map(|fault| fault.group()).collect();
        assert!(groups.is_sorted(), "the faults of a group stand together: {groups:?}");
        for group in FaultGroup::value_variants() {
            assert!(groups.contains(group), "{group:?}");
        }
    }

    #[test]
    fn a_selection_names_each_fault_once() {
        let all: FaultSelection = "all".parse().unwrap();
        assert_eq!(all.0, DeviceFault::all());
        let two = "oom-agent,clock-1970".parse();
        assert_eq!(two, Ok(FaultSelection(vec![DeviceFault::OomAgent, DeviceFault::Clock1970])));
        for (text, words) in [
            ("", "there is no fault \"\""),
            ("link-down,", "there is no fault \"\""),
            ("LinkDown", "there is no fault \"LinkDown\""),
            ("link-down,power-cut,link-down", "link-down is named twice"),
            ("link-down,all", "must be the only name"),
        ] {
            let error = text.parse::<FaultSelection>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
