//! The table of the faults: how long a fault lasts, by which means it is caused, from what the device must heal, and
//! what must hold during it.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use xtask_core::cli::{DeviceFault, Schedule};
use xtask_core::limits::{CHANGES, HEALING, QEMU_STANDS_STILL};

use crate::causes::{
    CONNECT, CONSUMER, CONTAINER, Cause, DEPLOYMENT, DHCP, DOWNLOAD, FOLLOW, HANG, MAX_FULL_PULL, MAX_OUTAGE,
    MAX_REVOCATION, MAX_SHORTAGE, PINGS, PODMAN, PODMAN_START, RECONNECT, REFUSAL, RESOLVER, RETRANSMISSION,
    SERVICE, STATUS,
};

/// What a fault does to a device, and what is expected of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// The lengths in seconds from which a schedule draws; `None` for a moment.
    pub lengths: Option<RangeInclusive<u32>>,
    pub means: Means,
    /// Whether the device boots before it has healed.
    pub boots: bool,
    /// The parts of the healing, one after the other in the worst case. The boot is not among them.
    pub causes: &'static [Cause],
    /// What must hold from the beginning of the fault until the device has healed.
    pub holds: &'static [Invariant],
}

impl Effect {
    /// Returns the bound of the healing from this fault alone.
    pub fn bound(&self) -> Bound {
        Bound { boot: self.boots, own: self.causes.iter().map(|cause| cause.time).sum() }
    }
}

/// The time in which a device must heal, counted from the end of the last fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Whether a boot is a part of the healing.
    pub boot: bool,
    /// The sum of the other causes.
    pub own: Duration,
}

impl Bound {
    /// Returns the whole time, in which the device also follows the changes of the fleet. `boot` is the limit of a boot of
    /// this machine, until the agent's unit is up.
    pub fn with_boot(self, boot: Duration) -> Duration {
        let boot = if self.boot { boot } else { Duration::ZERO };
        boot + self.own + CHANGES + HEALING
    }
}

/// The means by which a fault is caused, ordered by what they need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Means {
    /// The broker, the proxy before it, or the process of QEMU. Needs no running machine.
    Host,
    /// A command to QEMU (QMP). Needs a running QEMU.
    Machine,
    /// A command in the guest. Needs a booted guest.
    Guest,
}

/// Something that must hold during a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Each container runs on, with the same `StartedAt`.
    ContainersRunOn,
    /// The agent's process stays.
    AgentStays,
    /// No deletion is undone: a deployment that was acknowledged as deleted does not run again.
    DeletionsStay,
    /// No wish is lost: `desired_revision` never falls below an acknowledged revision.
    WishesStay,
}

impl Invariant {
    /// Returns the invariant as a clause of a sentence.
    pub fn text(self) -> &'static str {
        match self {
            Self::ContainersRunOn => "the containers run on (StartedAt)",
            Self::AgentStays => "the agent's process stays",
            Self::DeletionsStay => "no deletion is undone",
            Self::WishesStay => "no wish is lost",
        }
    }
}

/// Returns the row of the table for a fault.
pub fn effect_of(fault: DeviceFault) -> Effect {
    Effect {
        lengths: lengths(fault),
        means: means(fault),
        // A failed write of ext4's journal leaves the file system read-only until a boot.
        boots: matches!(fault, DeviceFault::PowerCut | DeviceFault::DiskError),
        causes: causes(fault),
        holds: holds(fault),
    }
}

/// Returns the bound for a schedule: the sum of the causes of its faults, because one fault can delay the healing from
/// another one.
pub fn bound_of(schedule: &Schedule) -> Bound {
    let bounds = schedule.faults().iter().map(|one| effect_of(one.fault).bound());
    bounds.fold(Bound { boot: false, own: Duration::ZERO }, |sum, one| Bound {
        boot: sum.boot || one.boot,
        own: sum.own + one.own,
    })
}

/// Returns what must hold during a schedule: what must hold during each of its faults.
pub fn invariants_of(schedule: &Schedule) -> BTreeSet<Invariant> {
    let all = BTreeSet::from_iter(ALL.iter().copied());
    schedule.faults().iter().fold(all, |left, one| {
        left.into_iter().filter(|invariant| effect_of(one.fault).holds.contains(invariant)).collect()
    })
}

const ALL: &[Invariant] =
    &[Invariant::ContainersRunOn, Invariant::AgentStays, Invariant::DeletionsStay, Invariant::WishesStay];

fn lengths(fault: DeviceFault) -> Option<RangeInclusive<u32>> {
    use DeviceFault as F;
    match fault {
        F::PowerCut => Some(1..=6),
        F::LinkDown | F::Blackhole | F::HighDelay | F::LowRate | F::PacketLoss | F::SmallMtu => {
            Some(4..=MAX_OUTAGE)
        }
        // Each time, the link is down for one second and up for another.
        F::LinkFlapping => Some(6..=MAX_OUTAGE),
        F::NoNameService | F::CaptivePortal => Some(4..=MAX_OUTAGE),
        F::BrokerRestarted | F::BrokerRefuses | F::BucketEmptied => Some(2..=10),
        F::BrokerSlow => Some(4..=MAX_OUTAGE),
        F::LoginRevoked => Some(2..=MAX_REVOCATION),
        F::Clock1970 | F::ClockYearBack | F::ClockTenYearsAhead | F::ClockJumps => Some(3..=10),
        F::DiskFullPull => Some(3..=MAX_FULL_PULL),
        F::DiskFullState | F::DiskReadOnly | F::DiskSlow | F::MemoryPressure => Some(4..=MAX_SHORTAGE),
        F::QemuStopped => {
            let seconds = QEMU_STANDS_STILL.as_secs() as u32;
            Some(seconds..=seconds)
        }
        F::DiskError
        | F::OomAgent
        | F::OomPodman
        | F::OomContainer
        | F::KillAgent
        | F::KillPodman
        | F::KillContainer => None,
    }
}

fn means(fault: DeviceFault) -> Means {
    use DeviceFault as F;
    match fault {
        F::PowerCut
        | F::Blackhole
        | F::HighDelay
        | F::LowRate
        | F::CaptivePortal
        | F::BrokerRestarted
        | F::BrokerSlow
        | F::BrokerRefuses
        | F::BucketEmptied
        | F::LoginRevoked => Means::Host,
        F::LinkDown | F::LinkFlapping | F::DiskSlow | F::DiskError | F::QemuStopped => Means::Machine,
        F::PacketLoss
        | F::SmallMtu
        | F::NoNameService
        | F::Clock1970
        | F::ClockYearBack
        | F::ClockTenYearsAhead
        | F::ClockJumps
        | F::DiskFullState
        | F::DiskFullPull
        | F::DiskReadOnly
        | F::MemoryPressure
        | F::OomAgent
        | F::OomPodman
        | F::OomContainer
        | F::KillAgent
        | F::KillPodman
        | F::KillContainer => Means::Guest,
    }
}

fn causes(fault: DeviceFault) -> &'static [Cause] {
    use DeviceFault as F;
    match fault {
        F::PowerCut | F::DiskError => &[PODMAN_START, RECONNECT],
        F::LinkDown | F::LinkFlapping => &[DHCP, RETRANSMISSION, FOLLOW],
        // The frozen connection stays frozen, so the pings must end it. They count from before the fault.
        F::Blackhole => &[PINGS, RECONNECT],
        F::PacketLoss | F::SmallMtu => &[RETRANSMISSION, FOLLOW],
        F::HighDelay | F::LowRate | F::BrokerSlow => &[FOLLOW, STATUS],
        F::NoNameService => &[RESOLVER, RECONNECT],
        F::CaptivePortal => &[CONNECT, RECONNECT],
        F::BrokerRestarted => &[RECONNECT, FOLLOW],
        F::BrokerRefuses => &[RECONNECT],
        F::BucketEmptied => &[FOLLOW],
        F::LoginRevoked => &[REFUSAL],
        F::Clock1970 | F::ClockYearBack | F::ClockTenYearsAhead | F::ClockJumps => &[RECONNECT],
        F::DiskFullState | F::DiskSlow | F::MemoryPressure => &[PODMAN, DEPLOYMENT],
        F::DiskReadOnly => &[HANG, PODMAN_START, PODMAN, DEPLOYMENT],
        F::DiskFullPull => &[DOWNLOAD, CONTAINER],
        F::OomAgent | F::KillAgent => &[SERVICE],
        F::OomPodman | F::KillPodman => &[PODMAN, PODMAN_START],
        F::OomContainer | F::KillContainer => &[CONTAINER, PODMAN_START],
        F::QemuStopped => &[CONSUMER, FOLLOW, RECONNECT],
    }
}

fn holds(fault: DeviceFault) -> &'static [Invariant] {
    use DeviceFault as F;
    use Invariant::{AgentStays, ContainersRunOn, DeletionsStay, WishesStay};
    match fault {
        F::PowerCut | F::DiskError => &[DeletionsStay, WishesStay],
        F::OomAgent | F::KillAgent => &[ContainersRunOn, DeletionsStay, WishesStay],
        F::OomContainer | F::KillContainer => &[AgentStays, DeletionsStay, WishesStay],
        _ => ALL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_lengths_unless_it_is_a_moment() {
        for fault in DeviceFault::all().iter().copied() {
            let effect = effect_of(fault);
            assert_eq!(effect.lengths.is_none(), fault.is_moment(), "{fault}");
            assert!(
                effect.lengths.is_none_or(|lengths| *lengths.start() >= 1 && !lengths.is_empty()),
                "{fault}"
            );
            assert!(!effect.causes.is_empty(), "{fault}");
            assert!(effect.holds.contains(&Invariant::WishesStay), "{fault}");
            assert!(effect.holds.contains(&Invariant::DeletionsStay), "{fault}");
        }
    }

    #[test]
    fn a_bound_is_the_sum_of_the_causes_the_changes_and_ten_seconds_and_perhaps_a_boot() {
        let boot = Duration::from_secs(60);
        let seconds = |fault| effect_of(fault).bound().with_boot(boot).as_secs();
        assert_eq!(seconds(DeviceFault::BrokerRefuses), 2 + 15 + 10);
        assert_eq!(seconds(DeviceFault::Blackhole), 30 + 2 + 15 + 10);
        assert_eq!(seconds(DeviceFault::PowerCut), 60 + 10 + 2 + 15 + 10);
        let pair: Schedule = "link-down@0+8,power-cut@2+4".parse().unwrap();
        assert_eq!(bound_of(&pair), Bound { boot: true, own: Duration::from_secs(26 + 12) });
        assert_eq!(bound_of(&Schedule::default()), Bound { boot: false, own: Duration::ZERO });
    }

    #[test]
    fn a_lost_network_restarts_nothing_and_a_pair_keeps_what_both_keep() {
        let of = |text: &str| invariants_of(&text.parse().unwrap()).into_iter().collect::<Vec<_>>();
        assert_eq!(of("link-down@0+8"), ALL);
        assert_eq!(of("kill-agent@0,link-down@1+8").first(), Some(&Invariant::ContainersRunOn));
        assert_eq!(
            of("kill-agent@0,kill-container@1"),
            [Invariant::DeletionsStay, Invariant::WishesStay],
            "neither the agent nor the containers stay"
        );
    }
}
