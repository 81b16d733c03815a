//! The parts of `report.json`, as plain data. `xtask/docs/smoke.md` documents the fields.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::digest::Digest;
use crate::format::name_of;
use crate::os_release::OsReleaseReport;

/// The machine that ran it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostReport {
    pub os: String,
    pub kernel: String,
    pub cpus: usize,
    pub qemu: Option<String>,
    pub libvirt: Option<String>,
    pub accelerator: Option<Accelerator>,
    /// Why not the other one.
    pub accelerator_note: Option<String>,
}

/// The machine that was tested.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GuestReport {
    pub arch: VmArchitecture,
    pub cpu: String,
    pub machine_type: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// As the guest itself said.
    pub os_release: Option<OsReleaseReport>,
    pub kernel: Option<String>,
    pub image: Option<ImageReport>,
    pub firmware: Option<FirmwareReport>,
}

/// Which image was booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageReport {
    pub name: String,
    /// What `--image` said, `None` for the default.
    pub requested: Option<String>,
    /// The image that would have been tested without a fallback.
    pub wanted: String,
    pub source: String,
    /// `sha256:…` of the disk as booted.
    pub digest: Digest,
    /// Whether its content was checked against a digest that somebody vouches for.
    pub verified: bool,
    /// Why it is not the image that was wanted.
    pub fallback_reason: Option<String>,
}

/// Which firmware ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FirmwareReport {
    pub code: PathBuf,
    pub vars_template: PathBuf,
    pub code_sha256: String,
}

/// The snapshot that the machine came out of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotReport {
    pub key: String,
    /// RFC 3339, UTC.
    pub made_at: String,
    /// The run that made it: this one, or an earlier one.
    pub made_by: String,
    /// Its files.
    pub reused: Vec<String>,
    /// By how many seconds the guest's clock jumped once its agent ran: what has passed since the snapshot was saved.
    #[serde(default)]
    pub clock_step_seconds: Option<i64>,
}

/// The subject.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentReport {
    pub path: PathBuf,
    pub sha256: String,
    /// As the agent itself said, once it joined.
    pub version: Option<String>,
    pub target: String,
}

/// How a phase ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseStatus {
    Passed,
    Failed,
    Skipped,
}

/// One phase.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PhaseReport {
    pub name: Phase,
    pub status: PhaseStatus,
    pub seconds: f64,
    pub limit_seconds: Option<f64>,
    pub detail: String,
}

/// The phases of a smoke, in order.
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
    Teardown,
}

impl Phase {
    /// Every phase, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::value_variants().iter().copied()
    }

    /// As people read it.
    pub fn title(self) -> String {
        name_of(&self)
    }
}

/// What the fleet bus showed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Evidence {
    pub join: Option<StatusEvidence>,
    pub rejoin: Option<StatusEvidence>,
    /// Before the power cut.
    #[serde(default)]
    pub workload: Option<WorkloadEvidence>,
    /// After it, while there was no broker.
    #[serde(default)]
    pub workload_offline: Option<WorkloadEvidence>,
    /// As it was changed while the machine was off.
    #[serde(default)]
    pub workload_rejoin: Option<WorkloadEvidence>,
    /// What the agent takes of the device, by its own word.
    #[serde(default)]
    pub footprint: Option<FootprintEvidence>,
}

/// What the agent's process takes, its containers not included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FootprintEvidence {
    pub executable_bytes: u64,
    pub resident_kib: u64,
    /// From the process' start to its first status, where that was seen.
    pub first_status_milliseconds: Option<u64>,
    /// How long it was left alone (`--rest`), and the processor time that it used meanwhile.
    pub rest_milliseconds: u64,
    pub rest_cpu_milliseconds: u64,
}

/// What the workload said from inside its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadEvidence {
    /// `uname -m`.
    pub machine: String,
    pub boot_id: String,
    /// Of what the fleet desires: 1, and 2 after the change.
    pub generation: u64,
    /// Counted in its volume.
    pub starts: u64,
}

/// The parts of one status that prove something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusEvidence {
    pub boot_id: String,
    pub kv_revision: u64,
    pub exe_sha256: String,
    pub machine: String,
    pub agent_version: String,
}

/// Why it was not verified.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FailureReport {
    pub phase: Phase,
    pub error: String,
    pub causes: Vec<String>,
    pub hint: Option<String>,
    pub console_tail: Vec<String>,
}
