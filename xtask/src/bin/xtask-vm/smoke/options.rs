//! The options of a run. `smoke` and `vm up` share them, because `vm up` makes a machine in the same way and leaves it
//! running.

use std::path::Path;
use std::time::Duration;

use xtask_core::arch::VmArchitecture;
use xtask_core::cli::{
    AgentFault, Disturb, DurabilityFault, Half, MachineArgs, PlaceArgs, Sabotage, SmokeArgs, TortureArgs,
    UpArgs,
};
use xtask_core::error::Verdict;
use xtask_core::limits::{OBSERVED, OBSERVED_COLD};

/// The options that a smoke and `vm up` have in common. `vm up` has no flag for most of them.
#[derive(Clone, Copy)]
pub(crate) struct RunOptions<'a> {
    pub(crate) arch: VmArchitecture,
    pub(crate) machine: &'a MachineArgs,
    pub(crate) place: &'a PlaceArgs,
    /// The factor for the guest's time limits.
    pub(crate) timeout_scale: f64,
    /// True if the run uses no snapshot.
    pub(crate) cold: bool,
    /// True if a run that cannot use a snapshot must fail.
    pub(crate) warm: bool,
    /// True if the guest's file systems are checked at the end.
    pub(crate) fsck: bool,
    /// The verdicts after which the machine is left running after a smoke.
    pub(crate) keep: Keep,
    pub(crate) sabotage: Option<Sabotage>,
    /// The fault of durability to plant (`torture --plant`).
    pub(crate) plant: Option<DurabilityFault>,
    /// The fault of the agent to plant (`torture --sabotage`).
    pub(crate) agent_fault: Option<AgentFault>,
    /// True if the device reaches the broker through a line that faults can disturb (`torture --faults`).
    pub(crate) has_line: bool,
    pub(crate) disturb: Option<Disturb>,
    /// The number of seconds for which the device is watched at the end; `None` for the default.
    pub(crate) observe: Option<u64>,
    /// The directory for the report; `None` for the run's own directory.
    pub(crate) report: Option<&'a Path>,
    /// True if all writes to the guest's disk are recorded until the first power cut (`torture`).
    pub(crate) records: bool,
    /// True if the run makes an instance for the user (`vm up`).
    pub(crate) is_instance: bool,
}

impl<'a> From<&'a SmokeArgs> for RunOptions<'a> {
    fn from(args: &'a SmokeArgs) -> Self {
        Self {
            arch: args.build.arch,
            machine: &args.machine,
            place: &args.place,
            timeout_scale: args.timeout_scale,
            cold: args.cold || args.half == Some(Half::Cold),
            warm: args.warm && args.half != Some(Half::Cold),
            fsck: args.fsck,
            keep: match (args.keep, args.keep_on_failure) {
                (true, _) => Keep::Always,
                (false, true) => Keep::OnFailure,
                (false, false) => Keep::Never,
            },
            sabotage: planted(args),
            plant: None,
            agent_fault: None,
            has_line: false,
            disturb: args.disturb,
            observe: args.observe,
            report: args.report.as_deref(),
            records: false,
            is_instance: false,
        }
    }
}

impl<'a> From<&'a TortureArgs> for RunOptions<'a> {
    fn from(args: &'a TortureArgs) -> Self {
        Self {
            arch: args.build.arch,
            machine: &args.machine,
            place: &args.place,
            timeout_scale: args.timeout_scale,
            cold: false,
            warm: false,
            fsck: false,
            keep: Keep::Never,
            sabotage: None,
            plant: args.plant,
            agent_fault: args.sabotage,
            has_line: args.causes_faults(),
            disturb: None,
            observe: None,
            report: args.report.as_deref(),
            records: args.crash_states.is_some(),
            is_instance: false,
        }
    }
}

/// Returns the fault to plant in this run. `cold-panics` is planted only in the cold run of `--verify-cold`.
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
            place: &args.place,
            timeout_scale: 1.0,
            cold: false,
            warm: false,
            fsck: false,
            keep: Keep::Never,
            sabotage: None,
            plant: None,
            agent_fault: None,
            has_line: false,
            disturb: None,
            observe: None,
            report: None,
            records: false,
            is_instance: true,
        }
    }
}

/// The verdicts after which the machine of a smoke is left running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    Never,
    OnFailure,
    Always,
}

impl Keep {
    pub(super) fn applies(self, verdict: Verdict) -> bool {
        match self {
            Self::Never => false,
            Self::OnFailure => matches!(verdict, Verdict::Failed | Verdict::Unavailable),
            Self::Always => verdict != Verdict::Interrupted,
        }
    }
}

impl RunOptions<'_> {
    /// Returns the duration for which the device is watched at rest at the end. A run without a snapshot watches
    /// longer, to find rare events.
    pub(super) fn observed(&self, is_cold: bool) -> Duration {
        self.observe.map_or(if is_cold { OBSERVED_COLD } else { OBSERVED }, Duration::from_secs)
    }
}
