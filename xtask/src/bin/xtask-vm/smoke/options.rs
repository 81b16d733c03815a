//! What is asked of a run: by `smoke`, or by `vm up`, which makes a machine as a smoke does and leaves it.

use std::path::Path;
use std::time::Duration;

use xtask_core::arch::VmArchitecture;
use xtask_core::cli::{Half, MachineArgs, Sabotage, SmokeArgs, UpArgs};
use xtask_core::limits::{OBSERVED, OBSERVED_COLD};

/// The options that a smoke and `vm up` have in common. `vm up` has no flag for most of them.
#[derive(Clone, Copy)]
pub(crate) struct RunOptions<'a> {
    pub(crate) arch: VmArchitecture,
    pub(crate) machine: &'a MachineArgs,
    /// Multiplies the guest's limits.
    pub(crate) timeout_scale: f64,
    /// Use no snapshot.
    pub(crate) cold: bool,
    /// Fail where no snapshot can be used.
    pub(crate) warm: bool,
    /// Check the guest's file systems at the end.
    pub(crate) fsck: bool,
    /// Leave the machine after a smoke.
    pub(crate) keep: bool,
    pub(crate) sabotage: Option<Sabotage>,
    /// How long the device is watched at rest, in seconds.
    pub(crate) observe: Option<u64>,
    /// The directory for the report; `None`: the run's own.
    pub(crate) report: Option<&'a Path>,
}

impl<'a> From<&'a SmokeArgs> for RunOptions<'a> {
    fn from(args: &'a SmokeArgs) -> Self {
        Self {
            arch: args.build.arch,
            machine: &args.machine,
            timeout_scale: args.timeout_scale,
            cold: args.cold || args.half == Some(Half::Cold),
            warm: args.warm && args.half != Some(Half::Cold),
            fsck: args.fsck,
            keep: args.keep,
            sabotage: planted(args),
            observe: args.observe,
            report: args.report.as_deref(),
        }
    }
}

/// Returns the fault of this run: `cold-panics` is one of the cold run alone.
fn planted(args: &SmokeArgs) -> Option<Sabotage> {
    match (args.half, args.sabotage) {
        (Some(Half::Warm), Some(Sabotage::ColdPanics)) => None,
        (Some(Half::Cold), Some(Sabotage::ColdPanics)) => Some(Sabotage::KernelPanic),
        (_, sabotage) => sabotage,
    }
}

impl<'a> From<&'a UpArgs> for RunOptions<'a> {
    fn from(args: &'a UpArgs) -> Self {
        Self {
            arch: args.arch,
            machine: &args.machine,
            timeout_scale: 1.0,
            cold: false,
            warm: false,
            fsck: false,
            keep: false,
            sabotage: None,
            observe: None,
            report: None,
        }
    }
}

impl RunOptions<'_> {
    /// How long the device is watched at rest at the end. A cold run takes the time to find what happens now and then.
    pub(super) fn observed(&self) -> Duration {
        self.observe.map_or(if self.cold { OBSERVED_COLD } else { OBSERVED }, Duration::from_secs)
    }
}
