//! Faults of a running device, each with a begin and an end.

use anyhow::{Context, Result};
use xtask_core::limits;
use xtask_fleet::ReceivedStatus;

use super::running::RunningVm;

/// Something that devices meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The power goes: no shutdown, and nothing of the guest's memory is written.
    PowerCut,
}

/// A fault that has begun.
pub(super) struct OngoingFault {
    fault: Fault,
    /// The last status from before it: what has a higher revision was stored since.
    last: ReceivedStatus,
}

impl Fault {
    /// Begins it.
    pub(super) fn begin(self, vm: &mut RunningVm) -> Result<OngoingFault> {
        match self {
            Self::PowerCut => vm.cut_power()?,
        }
        // What the guest had sent before is stored by now.
        std::thread::sleep(limits::BROKER_SETTLE);
        let last = vm.broker.latest()?.context("the status from before the fault is gone")?;
        Ok(OngoingFault { fault: self, last })
    }
}

impl OngoingFault {
    /// Ends it; returns the last status from before it began.
    pub(super) fn end(self, vm: &mut RunningVm) -> Result<ReceivedStatus> {
        match self.fault {
            Fault::PowerCut => vm.target.power_on()?,
        }
        Ok(self.last)
    }
}
