//! Which faults make a pair, and in which order. A pair makes sense under three conditions:
//!
//! 1. The two faults act on different things ([`things_of`]). Two faults on one thing replace each other: after the clock
//!    was set to 1970 and then back by a year, only the second fault exists, and its end also ends the first one.
//! 2. The second fault can begin ([`Means`]). While the machine is off or stands still, only a fault outside of it can
//!    begin. While the machine boots, no command in the guest can cause a fault.
//! 3. A fault that overlaps another one begins before the other one ends. Therefore the first fault of an overlapping
//!    pair is not a moment.

use serde::{Deserialize, Serialize};
use xtask_core::cli::DeviceFault;

use crate::effect::{Means, effect_of};

/// The form of an episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// One fault.
    Single,
    /// The second fault begins before the first one ends.
    Overlapping,
    /// The second fault begins when the first one has just ended.
    DuringHealing,
}

/// Something that a fault replaces or needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thing {
    /// The process of QEMU.
    Machine,
    /// The carrier of the network interface.
    Carrier,
    /// The program that answers at the broker's address.
    Address,
    /// The process of the broker. A stopped broker loses no bucket and revokes no login.
    Broker,
    Clock,
    /// The root file system. Nothing fills a file system that is read-only.
    FileSystem,
    Agent,
    Podman,
    Container,
}

/// Returns the things on which a fault acts. A fault with none of them can be combined with any other.
pub fn things_of(fault: DeviceFault) -> &'static [Thing] {
    use DeviceFault as F;
    match fault {
        F::PowerCut => &[Thing::Machine],
        F::QemuStopped => &[Thing::Machine, Thing::Clock],
        F::LinkDown | F::LinkFlapping => &[Thing::Carrier],
        F::Blackhole | F::CaptivePortal | F::BrokerRefuses => &[Thing::Address],
        F::BrokerRestarted | F::BrokerSlow | F::BucketEmptied | F::LoginRevoked => &[Thing::Broker],
        F::Clock1970 | F::ClockYearBack | F::ClockTenYearsAhead | F::ClockJumps => &[Thing::Clock],
        F::DiskFullState | F::DiskFullPull | F::DiskReadOnly => &[Thing::FileSystem],
        F::OomAgent | F::KillAgent => &[Thing::Agent],
        F::OomPodman | F::KillPodman => &[Thing::Podman],
        F::OomContainer | F::KillContainer => &[Thing::Container],
        F::HighDelay
        | F::LowRate
        | F::PacketLoss
        | F::SmallMtu
        | F::NoNameService
        | F::DiskSlow
        | F::DiskError
        | F::MemoryPressure => &[],
    }
}

/// Returns whether two faults make a pair of this form, in this order. [`Form::Single`] has no pairs.
pub fn can_pair(form: Form, first: DeviceFault, second: DeviceFault) -> bool {
    let shares = things_of(first).iter().any(|thing| things_of(second).contains(thing));
    if first == second || shares {
        return false;
    }
    let least = match form {
        Form::Single => return false,
        Form::Overlapping if first.is_moment() => return false,
        Form::Overlapping if things_of(first).contains(&Thing::Machine) => Means::Host,
        Form::Overlapping => Means::Guest,
        Form::DuringHealing if effect_of(first).boots => Means::Machine,
        Form::DuringHealing => Means::Guest,
    };
    effect_of(second).means <= least
}

#[cfg(test)]
mod tests {
    use super::*;
    use DeviceFault as F;

    #[test]
    fn pairs_that_make_no_sense_are_excluded() {
        use Form::{DuringHealing, Overlapping};
        for (form, first, second, is_pair) in [
            (Overlapping, F::LinkDown, F::PowerCut, true),
            (Overlapping, F::LinkDown, F::LinkDown, false),
            (Overlapping, F::LinkDown, F::LinkFlapping, false),
            (Overlapping, F::Clock1970, F::ClockJumps, false),
            (DuringHealing, F::Clock1970, F::ClockJumps, false),
            (Overlapping, F::BrokerSlow, F::BucketEmptied, false),
            (DuringHealing, F::DiskReadOnly, F::DiskFullState, false),
            (Overlapping, F::PowerCut, F::BrokerRestarted, true),
            (Overlapping, F::PowerCut, F::DiskSlow, false),
            (Overlapping, F::PowerCut, F::KillAgent, false),
            (DuringHealing, F::PowerCut, F::DiskSlow, true),
            (DuringHealing, F::PowerCut, F::KillAgent, false),
            (Overlapping, F::QemuStopped, F::KillAgent, false),
            (DuringHealing, F::QemuStopped, F::KillAgent, true),
            (DuringHealing, F::QemuStopped, F::PowerCut, false),
            (Overlapping, F::KillAgent, F::LinkDown, false),
            (DuringHealing, F::KillAgent, F::LinkDown, true),
            (DuringHealing, F::DiskError, F::KillAgent, false),
            (Form::Single, F::LinkDown, F::PowerCut, false),
        ] {
            assert_eq!(can_pair(form, first, second), is_pair, "{form:?}: {first}, {second}");
        }
    }

    #[test]
    fn each_fault_has_many_partners_in_both_forms() {
        let all = F::all();
        for fault in all.iter().copied() {
            for form in [Form::Overlapping, Form::DuringHealing] {
                let is_partner = |other: &F| can_pair(form, fault, *other) || can_pair(form, *other, fault);
                let partners = all.iter().filter(|other| is_partner(other)).count();
                assert!(partners >= 15, "{fault} has {partners} partners {form:?}");
            }
        }
    }
}
