//! Faults of a running device. Each fault has a beginning and an end.

use anyhow::{Context, Result};
use xtask_core::limits;
use xtask_core::report::EventKind;
use xtask_fleet::ReceivedStatus;

use super::running::RunningVm;

/// A fault that occurs on real devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A power cut: the guest does not shut down, and its unwritten data is lost.
    PowerCut,
    /// The disk completes no writes until the end of the fault. Processes in the guest wait for their writes.
    HeldWrites,
    /// The broker is stopped. It refuses connections until the end of the fault.
    NoBroker,
}

/// A fault that has begun.
pub(super) struct OngoingFault {
    fault: Fault,
    /// The last status from before the fault. A status with a higher revision was stored later.
    last: ReceivedStatus,
}

impl Fault {
    /// Begins the fault, and keeps the last status from before it.
    pub(super) fn begin(self, vm: &mut RunningVm) -> Result<OngoingFault> {
        vm.fault = Some(self);
        let last = match self {
            Self::PowerCut => {
                vm.cut_power()?;
                // After this pause, the broker has stored the statuses that the guest had sent before the fault.
                std::thread::sleep(limits::BROKER_SETTLE);
                status(vm)?
            }
            Self::HeldWrites => {
                vm.target.limit_writes(1, 1)?;
                vm.record(EventKind::Fault, "the disk completes no writes");
                status(vm)?
            }
            Self::NoBroker => {
                let last = status(vm)?;
                vm.stop_broker()?;
                last
            }
        };
        Ok(OngoingFault { fault: self, last })
    }
}

fn status(vm: &RunningVm) -> Result<ReceivedStatus> {
    vm.broker.latest()?.context("the status from before the fault is gone")
}

impl OngoingFault {
    /// Ends the fault. Returns the last status from before its end.
    pub(super) fn end(self, vm: &mut RunningVm) -> Result<ReceivedStatus> {
        vm.fault = None;
        match self.fault {
            Fault::PowerCut => vm.switch_on()?,
            Fault::HeldWrites => {
                vm.limit_disk()?;
                vm.record(EventKind::End, "the disk completes writes again");
            }
            Fault::NoBroker => {
                vm.start_broker()?;
                // The broker may have stored statuses between the look at the last one and its end.
                return status(vm);
            }
        }
        Ok(self.last)
    }
}
