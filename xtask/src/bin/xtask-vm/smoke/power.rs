//! The power of a running machine: the cut, the end of a recording, and the switch-on.

use anyhow::Result;
use xtask_core::report::EventKind;

use super::running::RunningVm;

/// The addition to the event of a power cut if this user may not kill QEMU.
const SOFT_CUT: &str = "; this user may not kill QEMU, so libvirt ended it, and QEMU first flushed its disks";

impl RunningVm {
    /// Cuts the power: the guest does not shut down, and nothing is flushed.
    pub(super) fn cut_power(&mut self) -> Result<()> {
        let how = if self.target.cut_power()? { "" } else { SOFT_CUT };
        self.record(EventKind::Fault, format!("the power was cut{how}"));
        self.root.close();
        self.expected_boots = Some(1);
        self.console.new_boot()
    }

    /// Ends the machine whose writes were recorded. QEMU first completes the writes that it has begun, so that the log is
    /// whole.
    pub(super) fn end_recording(&mut self) -> Result<()> {
        self.target.stop_guest()?;
        self.target.power_off()?;
        self.record(EventKind::Fault, "the power was cut at the end of the recording");
        self.root.close();
        self.expected_boots = Some(1);
        self.console.new_boot()
    }

    /// Switches the machine on again after a power cut.
    pub(super) fn switch_on(&mut self) -> Result<()> {
        self.target.power_on(&self.files)?;
        self.record(EventKind::Boot, "the machine was switched on again");
        if let Some(route) = self.target.ssh_route()? {
            self.target.open_tunnel(&route);
        }
        self.root.connect();
        self.limit_disk()
    }
}
