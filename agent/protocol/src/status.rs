//! The status that a device reports to [`super::STATUS_BUCKET`].

use serde::{Deserialize, Serialize};

/// Upper bound for the events in a status; the oldest are dropped first.
pub const MAX_EVENTS: usize = 32;
/// Upper bound for the bytes of all events in a status. An idle device sends the same events every ten minutes.
pub const MAX_EVENTS_TEXT: usize = 3072;
/// Upper bound for the bytes of an error or an event. It makes a status with a thousand deployments fit into
/// one message.
pub const MAX_TEXT: usize = 240;

/// The status of a device. It is sent after each (re)connect, on each change, and at a long interval. Between two
/// statuses, the device sends heartbeats ([`super::Heartbeat`]).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The value of [`super::STATUS_SCHEMA`].
    pub schema: u32,
    /// The device's name in the fleet; also the KV key.
    pub device_id: String,
    pub agent_version: String,
    /// SHA-256 of the running executable, in lower-case hex.
    pub exe_sha256: String,
    /// The kernel's random id of this boot (`/proc/sys/kernel/random/boot_id`, random(4)).
    pub boot_id: String,
    /// The machine type as `uname -m` prints it: `aarch64`, `x86_64`.
    pub machine: String,
    pub os_release: OsRelease,
    /// The kernel's release as `uname -r` prints it.
    pub kernel: String,
    /// Seconds since the kernel started.
    pub uptime_seconds: u64,
    /// The number of this status, counted from 1 for each agent process. Heartbeats are counted, too.
    pub sequence: u64,
    /// The highest revision of the desired state on this device's disk; 0 before there is one. It acknowledges all
    /// changes up to this revision: they survive a power cut.
    #[serde(default)]
    pub desired_revision: u64,
    /// The reason why the device does not follow the desired state at present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub following_error: Option<String>,
    /// The number of containers in podman that belong to no known deployment, such as those of another agent. The agent
    /// leaves them alone.
    #[serde(default)]
    pub foreign_containers: u32,
    /// The space that is free for the agent's user on the disk with its state and the images, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free_mib: Option<u64>,
    /// The deployments by name. A deleted deployment is there until its deletion is carried out: if `desired_revision`
    /// is at least the revision of the deletion and the deployment is not in the list, it is gone.
    #[serde(default)]
    pub deployments: Vec<DeploymentStatus>,
    /// The number of deployments that did not fit into this document.
    #[serde(default)]
    pub deployments_omitted: u32,
    /// The latest events, oldest first, at most [`MAX_EVENTS`] with at most [`MAX_EVENTS_TEXT`] bytes.
    #[serde(default)]
    pub events: Vec<Event>,
    #[serde(default)]
    pub footprint: Option<Footprint>,
}

/// The resources that the agent's process uses, without its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    pub age_milliseconds: u64,
    /// CPU time in user and kernel mode.
    pub cpu_milliseconds: u64,
    /// Resident memory (proc_pid_status(5), VmRSS).
    pub resident_kib: u64,
}

impl DeviceStatus {
    pub fn deployment(&self, name: &str) -> Option<&DeploymentStatus> {
        self.deployments.iter().find(|deployment| deployment.name == name)
    }
}

/// The distribution: two fields of os-release(5).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsRelease {
    /// The value of `ID`: `debian`, `ubuntu`.
    pub id: String,
    /// The value of `VERSION_ID`: `12`, `24.04`. It is empty on rolling distributions.
    pub version_id: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentStatus {
    pub name: String,
    /// The revision of the document, or of its deletion.
    pub desired_revision: u64,
    pub phase: Phase,
    pub container: Option<ObservedContainer>,
    /// The revision of the document whose container this is, if it is not `desired_revision`: the desired
    /// document was refused or rolled back, or its container cannot be made yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running_revision: Option<u64>,
    /// The names of the document's limits that the container does not have, because the device cannot enforce them:
    /// `memory`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing_limits: Vec<String>,
    /// The bytes of the image that have been downloaded, while the phase is [`Phase::Pending`] for a download.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downloaded_bytes: Option<u64>,
    /// The latest error; cleared once the deployment is as desired.
    pub last_error: Option<String>,
    /// How often the agent has restarted the container since the document changed or, if that was later,
    /// since the agent started.
    pub restarts: u32,
}

/// The progress of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Nothing has been done for the deployment yet, or its image is being downloaded.
    Pending,
    Running,
    /// The container has ended as its restart policy allows.
    Completed,
    /// The device rebooted or lost its power before the container had ended. Its restart policy is `never`, so it is
    /// not started again. Whether it has done its work is unknown.
    Lost,
    /// An attempt failed (see `last_error`); the agent tries again after a pause.
    BackingOff,
    /// The agent cannot run the document (see `last_error`). The container of the last accepted document, if
    /// there is one, goes on (see `running_revision`).
    Refused,
    /// The deployment is as its last known document says, although the bucket no longer names it (see
    /// `last_error`). Only a Delete or a Purge removes it.
    Orphaned,
    /// The container of the document did not start, or ended within its probation (see `last_error`). The
    /// container of the previous document runs again (see `running_revision`).
    RolledBack,
    /// The deployment was deleted, and its container still exists.
    Removing,
    /// The deployment was deleted, and its container is gone. Only earlier agents report this phase; see
    /// [`DeviceStatus::deployments`].
    Removed,
}

/// Writes the phase as in JSON, for example `backing-off`.
impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedContainer {
    /// The first 12 characters of podman's id.
    pub id: String,
    /// Podman's name of the state: `running`, `exited`, `created`.
    pub state: String,
    /// The exit code, if the container has ended.
    pub exit_code: Option<i32>,
    /// The id of the container's image: the SHA-256 of its configuration (OCI image specification, image ID). A tag can
    /// be moved to another image. The id names one image only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The time of the event, in seconds since the kernel started. The device's clock may be wrong at boot.
    pub uptime_seconds: u64,
    /// The number of this event, counted from 1 for each agent process. A gap means that events were dropped.
    pub number: u64,
    pub what: String,
}

/// Shortens `text` to at most [`MAX_TEXT`] bytes. A text that is too long loses its middle, because an error begins
/// with what was attempted and ends with the cause.
pub fn shortened(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let half = (MAX_TEXT - '…'.len_utf8()) / 2;
    let (start, end) = (text.floor_char_boundary(half), text.ceil_char_boundary(text.len() - half));
    format!("{}…{}", &text[..start], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_lose_their_middle_between_characters() {
        assert_eq!(shortened("short"), "short");
        let error = format!("remove the container: {}: read-only file system", "/long/path".repeat(50));
        let cut = shortened(&error);
        assert!(
            cut.starts_with("remove the container: ") && cut.ends_with(": read-only file system"),
            "{cut}"
        );
        for text in ["x".repeat(MAX_TEXT + 1), "ü".repeat(MAX_TEXT), "€".repeat(MAX_TEXT)] {
            let cut = shortened(&text);
            assert!(cut.len() <= MAX_TEXT && cut.len() > MAX_TEXT - 8 && cut.contains('…'), "{cut}");
        }
    }

    #[test]
    fn a_status_without_optional_fields_is_parsed() {
        let old = r#"{"schema":1,"device_id":"d","agent_version":"0","exe_sha256":"","boot_id":"","machine":"",
            "os_release":{"id":"","version_id":""},"kernel":"","uptime_seconds":1,"sequence":1}"#;
        let status: DeviceStatus = serde_json::from_str(old).unwrap();
        assert_eq!((status.deployments.len(), status.desired_revision), (0, 0));
    }
}
