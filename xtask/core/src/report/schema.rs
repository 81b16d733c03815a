//! The parts of `report.json` as plain data. `xtask/docs/reports.md` documents the fields.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::digest::Digest;
use crate::format::name_of;
use crate::os_release::OsReleaseReport;

/// The machine on which the smoke ran.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostReport {
    pub os: String,
    pub kernel: String,
    pub cpus: usize,
    pub qemu: Option<String>,
    pub libvirt: Option<String>,
    pub accelerator: Option<Accelerator>,
    /// The reason why the other accelerator was not used.
    pub accelerator_note: Option<String>,
    /// True if QEMU was confined, so that the guest could reach only the run's own servers and, while it installed
    /// packages, the internet. False if this host's kernel cannot confine QEMU. `None` if no machine was made.
    #[serde(default)]
    pub guest_confined: Option<bool>,
    /// The libvirt daemon on which the guest ran; `None` for the embedded driver, which is on this host.
    #[serde(default)]
    pub daemon: Option<DaemonReport>,
}

/// The libvirt daemon on which a guest ran. QEMU and the accelerator of the report are those of its host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonReport {
    /// The URI of `--connect`.
    pub uri: String,
    /// The guest's network: `user` or `nat:NAME`.
    pub network: String,
    /// The storage pool.
    pub pool: String,
    /// The name of the daemon's host.
    pub host: Option<String>,
    pub cpus: Option<u32>,
}

/// The emulated machine that was tested.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GuestReport {
    pub arch: VmArchitecture,
    pub cpu: String,
    pub machine_type: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// The os-release of the guest, as the agent reported it.
    pub os_release: Option<OsReleaseReport>,
    pub kernel: Option<String>,
    pub image: Option<ImageReport>,
    pub firmware: Option<FirmwareReport>,
}

/// The image that was booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageReport {
    pub name: String,
    /// The value of `--image`; `None` for the default.
    pub requested: Option<String>,
    /// The name of the image that was to be tested. It differs from `name` if the fallback image was used.
    pub wanted: String,
    pub source: String,
    /// The digest of the disk as booted: `sha256:…`.
    pub digest: Digest,
    /// True if the content was checked against a pinned or given digest. A built image has no such digest, so this is
    /// false for it.
    pub verified: bool,
    /// True if this host built the image from packages.
    #[serde(default)]
    pub built: bool,
    /// The reason why the fallback image was used; `None` if the wanted image was used.
    pub fallback_reason: Option<String>,
}

/// The firmware that ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FirmwareReport {
    pub code: PathBuf,
    pub vars_template: PathBuf,
    /// `None` for the firmware of another host, whose file cannot be read here.
    pub code_sha256: Option<String>,
}

/// The snapshot from which the machine was restored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotReport {
    pub key: String,
    /// The time at which the snapshot was made, in RFC 3339, UTC.
    pub made_at: String,
    /// The age of the snapshot when the run began to use it; `None` if this host's clock was set back after the
    /// snapshot was made.
    #[serde(default)]
    pub age_seconds: Option<u64>,
    /// The id of the run that made the snapshot: this run or an earlier one.
    pub made_by: String,
    /// The names of the files of the snapshot.
    pub reused: Vec<String>,
    /// The number of seconds by which the guest's clock jumped when the agent was installed. This is about the time
    /// since the snapshot was saved.
    #[serde(default)]
    pub clock_step_seconds: Option<i64>,
}

/// The agent under test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentReport {
    pub path: PathBuf,
    pub sha256: String,
    /// The version that the agent reported when it joined.
    pub version: Option<String>,
    pub target: String,
    /// The value of `--agent FILE` as it was typed; `None` for an agent that the run built.
    #[serde(default)]
    pub given_as: Option<PathBuf>,
    /// The cargo profile of the build; `None` for a given agent.
    #[serde(default)]
    pub profile: Option<String>,
    /// The compiler flags that the build got from environment variables such as `RUSTFLAGS`. `None` if there were none,
    /// or if the agent was given by `--agent`.
    #[serde(default)]
    pub rustflags: Option<String>,
    /// The ids of the inspection's warnings.
    #[serde(default)]
    pub inspect_warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseStatus {
    Passed,
    Failed,
    Skipped,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PhaseReport {
    pub name: Phase,
    pub status: PhaseStatus,
    /// The start of the phase, in seconds after the start of the run. A phase that ran twice has its first start. `None`
    /// if the phase was not reached, and in a report of an earlier version.
    #[serde(default)]
    pub started_seconds: Option<f64>,
    pub seconds: f64,
    pub limit_seconds: Option<f64>,
    pub detail: String,
    /// The size of console.log in bytes when the phase started; `None` as for `started_seconds`.
    #[serde(default)]
    pub console_offset: Option<u64>,
}

/// The result of `torture`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TortureReport {
    /// The seed of the states. Together with the log of the writes, it determines each state.
    pub seed: u64,
    /// The number of states that were judged.
    pub states: u64,
    /// The number of states that were judged in a minute, without the checks by e2fsck.
    pub states_per_minute: f64,
    /// The number of entries in the log: writes, flushes and discards. Below, the number of entries that flush, and the
    /// bytes of all writes.
    pub log_entries: u64,
    pub log_flushes: u64,
    pub log_bytes: u64,
    /// The number of acknowledgements, each of which has a position in the log.
    pub acknowledgements: u64,
    /// The number of states whose file systems e2fsck has checked.
    pub checked: u64,
    /// The number of states that lose something.
    pub failed: u64,
    /// The first of these states, at most one for each kind of loss.
    pub failures: Vec<CrashStateReport>,
    pub boots: Vec<CrashBootReport>,
}

/// A crash state that loses something.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CrashStateReport {
    /// The number of the state. Together with the seed and the log, it determines the state.
    pub number: u64,
    /// The number of entries of the log before the power cut.
    pub point: u64,
    /// A sentence for each loss.
    pub losses: Vec<String>,
    /// A sentence for each missing write of the smallest state that still fails.
    pub missing: Vec<String>,
    /// The command that judges and boots the state again.
    pub command: String,
}

/// A crash state that was booted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CrashBootReport {
    pub number: u64,
    /// False if the device did not converge to the desired state.
    pub converged: bool,
    /// What was proven, or the error.
    pub detail: String,
}

/// A boot, a fault that the smoke caused, or the end of a fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventReport {
    /// The time in seconds after the start of the run.
    pub seconds: f64,
    pub kind: EventKind,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// The machine was switched on or restored.
    Boot,
    /// The smoke caused a fault or a disturbance.
    Fault,
    /// The smoke ended a fault.
    End,
}

/// A status that the broker stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The time of its arrival, in seconds after the start of the run.
    pub seconds: f64,
    pub kv_revision: u64,
    pub boot_id: String,
    pub exe_sha256: String,
    /// The number of this status, counted from 1 for each agent process.
    pub sequence: u64,
    pub uptime_seconds: u64,
    /// The revision of the desired state that the status acknowledges.
    pub desired_revision: u64,
    /// Each deployment with its phase: `persistent running`.
    pub deployments: Vec<String>,
}

/// The phases of a smoke and of `torture`, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Preflight,
    Build,
    Inspect,
    Image,
    Boot,
    Provision,
    Join,
    Ping,
    Workload,
    #[value(name = "power cut")]
    PowerCut,
    Rejoin,
    /// The script of `torture`, while the writes of the disk are recorded.
    Record,
    /// The judgement of crash states, without a boot.
    Judge,
    /// The boots of crash states.
    Boots,
    /// The snapshot of the machine while the workload runs.
    Freeze,
    /// The episodes of `torture --faults`.
    Episodes,
    Teardown,
}

impl Phase {
    /// Returns the phases of a smoke.
    pub fn of_smoke() -> impl Iterator<Item = Self> {
        Self::all_but(&[Self::Record, Self::Judge, Self::Boots, Self::Freeze, Self::Episodes])
    }

    /// Returns the phases of `torture --crash-states`.
    pub fn of_torture() -> impl Iterator<Item = Self> {
        use Phase::{Episodes, Freeze, Ping, PowerCut, Rejoin, Workload};
        Self::all_but(&[Ping, Workload, PowerCut, Rejoin, Freeze, Episodes])
    }

    /// Returns the phases of `torture --faults`.
    pub fn of_faults() -> impl Iterator<Item = Self> {
        Self::all_but(&[Self::Ping, Self::PowerCut, Self::Rejoin, Self::Record, Self::Judge, Self::Boots])
    }

    fn all_but(others: &'static [Self]) -> impl Iterator<Item = Self> {
        Self::value_variants().iter().copied().filter(|phase| !others.contains(phase))
    }

    /// Returns the name of the phase on the screen.
    pub fn title(self) -> String {
        name_of(&self)
    }
}

/// The evidence of a smoke, from the fleet bus and from the workload.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Evidence {
    pub join: Option<StatusEvidence>,
    pub rejoin: Option<StatusEvidence>,
    /// The workload's answer before the power cut.
    #[serde(default)]
    pub workload: Option<WorkloadEvidence>,
    /// The workload's answer after the power cut, while there was no broker.
    #[serde(default)]
    pub workload_offline: Option<WorkloadEvidence>,
    /// The workload's answer after the broker's return. Its deployment was changed while the machine was off.
    #[serde(default)]
    pub workload_rejoin: Option<WorkloadEvidence>,
    /// The resources that the agent uses, as the agent itself reported them.
    #[serde(default)]
    pub footprint: Option<FootprintEvidence>,
}

/// The resources that the agent's process uses, without its containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FootprintEvidence {
    pub executable_bytes: u64,
    pub resident_kib: u64,
    /// The time from the start of the agent's process to its first status; `None` if the first status was not received.
    pub first_status_milliseconds: Option<u64>,
    /// The time for which the agent was left idle; 0 without `--rest`.
    pub rest_milliseconds: u64,
    /// The processor time that the agent used while it was left idle.
    pub rest_cpu_milliseconds: u64,
}

/// The answer that the workload gives from inside its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadEvidence {
    /// The output of `uname -m`.
    pub machine: String,
    /// The size of the kernel's pages in bytes; `None` in a report of an earlier version.
    #[serde(default)]
    pub page_size: Option<u64>,
    pub boot_id: String,
    /// The generation of the deployment, which the document passes to the workload: 1, and 2 after the change.
    pub generation: u64,
    /// The number of starts of the workload, which it counts in a file in its volume.
    pub starts: u64,
}

/// The parts of a status that are evidence for the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusEvidence {
    pub boot_id: String,
    pub kv_revision: u64,
    pub exe_sha256: String,
    pub machine: String,
    pub agent_version: String,
}

/// The reason why the run was not verified.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FailureReport {
    pub phase: Phase,
    pub error: String,
    pub causes: Vec<String>,
    pub hint: Option<String>,
    pub console_tail: Vec<String>,
}
