//! What a device says of itself, in [`super::STATUS_BUCKET`].

use serde::{Deserialize, Serialize};

/// Events that a status holds at most; the oldest leave first.
pub const MAX_EVENTS: usize = 32;
/// Bytes of an error or event that a status holds at most, so that a thousand deployments fit into one message.
pub const MAX_TEXT: usize = 240;

/// What a device says of itself: at once after each (re)connect, on change, and every few seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// [`super::STATUS_SCHEMA`].
    pub schema: u32,
    /// The device's name in the fleet; also the KV key.
    pub device_id: String,
    /// The agent's own version.
    pub agent_version: String,
    /// SHA-256 of the executable that is running, in lower-case hex.
    pub exe_sha256: String,
    /// The kernel's random id of this boot (`/proc/sys/kernel/random/boot_id`, random(4)).
    pub boot_id: String,
    /// `uname -m`: `aarch64`, `x86_64`.
    pub machine: String,
    /// The distribution, from os-release(5).
    pub os_release: OsRelease,
    /// `uname -r`.
    pub kernel: String,
    /// Seconds since the kernel started.
    pub uptime_seconds: u64,
    /// Counts the statuses of this agent process, from 1.
    pub sequence: u64,
    /// The highest revision of the desired state that this device knows of; 0 before it knows of any.
    #[serde(default)]
    pub desired_revision: u64,
    /// Its deployments, by name; those that were deleted too, until they are purged.
    #[serde(default)]
    pub deployments: Vec<DeploymentStatus>,
    /// How many deployments did not fit into this document.
    #[serde(default)]
    pub deployments_omitted: u32,
    /// What happened last, oldest first, at most [`MAX_EVENTS`].
    #[serde(default)]
    pub events: Vec<Event>,
    /// What the agent itself takes of the device.
    #[serde(default)]
    pub footprint: Option<Footprint>,
}

/// What the agent's process takes, its containers not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// How long it has run.
    pub age_milliseconds: u64,
    /// Processor time that it has used, of user and kernel.
    pub cpu_milliseconds: u64,
    /// Memory that it has in RAM (proc_pid_status(5), VmRSS).
    pub resident_kib: u64,
}

impl DeviceStatus {
    /// The deployment of this name.
    pub fn deployment(&self, name: &str) -> Option<&DeploymentStatus> {
        self.deployments.iter().find(|deployment| deployment.name == name)
    }
}

/// The two fields of os-release(5) that name a distribution.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsRelease {
    /// `ID`: `debian`, `ubuntu`.
    pub id: String,
    /// `VERSION_ID`: `12`, `24.04`; empty on rolling distributions.
    pub version_id: String,
}

/// One deployment as it is on the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentStatus {
    /// Its name.
    pub name: String,
    /// The revision of the desired state that this line is about: of the document, or of its deletion.
    pub desired_revision: u64,
    /// How far it is.
    pub phase: Phase,
    /// Its container, where there is one.
    pub container: Option<ObservedContainer>,
    /// What went wrong last; gone once it has been put right.
    pub last_error: Option<String>,
    /// How often the agent has started its container again, since this document or since the agent's start.
    pub restarts: u32,
}

/// How far a deployment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Desired, and nothing done for it yet.
    Pending,
    /// Its container runs, as desired.
    Running,
    /// Its container has ended, as its restart policy allows.
    Completed,
    /// Something failed, see `last_error`; it is tried again after a pause.
    BackingOff,
    /// This agent cannot run such a document, see `last_error`; what ran before has been stopped.
    Refused,
    /// Deleted, and its container is not gone yet.
    Removing,
    /// Deleted: no container, its volumes are there.
    Removed,
}

/// A container as podman shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedContainer {
    /// Podman's id.
    pub id: String,
    /// Podman's word: `running`, `exited`, `created`.
    pub state: String,
    /// The exit code of one that has ended.
    pub exit_code: Option<i32>,
}

/// Something that happened on the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the kernel started: a device's clock may be wrong at boot, this is not.
    pub uptime_seconds: u64,
    /// Counts the events of this agent process, from 1; a reader sees by it what the ring has lost.
    pub number: u64,
    /// In words.
    pub what: String,
}

/// `text`, at most [`MAX_TEXT`] bytes of it.
pub fn shortened(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let mut end = MAX_TEXT - '…'.len_utf8();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shortened("short"), "short");
        for text in ["x".repeat(MAX_TEXT + 1), "ü".repeat(MAX_TEXT), "€".repeat(MAX_TEXT)] {
            let cut = shortened(&text);
            assert!(cut.len() <= MAX_TEXT && cut.ends_with('…'), "{cut}");
        }
    }

    #[test]
    fn a_status_of_an_agent_without_deployments_is_read() {
        let old = r#"{"schema":1,"device_id":"d","agent_version":"0","exe_sha256":"","boot_id":"","machine":"",
            "os_release":{"id":"","version_id":""},"kernel":"","uptime_seconds":1,"sequence":1}"#;
        let status: DeviceStatus = serde_json::from_str(old).unwrap();
        assert_eq!((status.deployments.len(), status.desired_revision), (0, 0));
    }
}
