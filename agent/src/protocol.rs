//! What the agent and the fleet say to each other: bucket and subject names, and the documents. Pure data, so
//! that a verifier can read a status without linking the agent.

use serde::{Deserialize, Serialize};

/// The JetStream KV bucket that holds one [`DeviceStatus`] per device, under the key `<device_id>`.
pub const STATUS_BUCKET: &str = "agent-status";

/// The schema number of [`DeviceStatus`]; a reader refuses one that it does not know.
pub const STATUS_SCHEMA: u32 = 1;

/// The subject on which the device answers `command`, for example `device-commands.pi-7.ping`.
pub fn command_subject(device_id: &str, command: &str) -> String {
    format!("device-commands.{device_id}.{command}")
}

/// The subject that covers every command for the device.
pub fn command_wildcard(device_id: &str) -> String {
    command_subject(device_id, ">")
}

/// What a device says of itself, every few seconds and at once after each (re)connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// [`STATUS_SCHEMA`].
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
}

/// The two fields of os-release(5) that name a distribution.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsRelease {
    /// `ID`: `debian`, `ubuntu`.
    pub id: String,
    /// `VERSION_ID`: `12`, `24.04`; empty on rolling distributions.
    pub version_id: String,
}

/// The reply to any command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Reply {
    /// To `ping`.
    Pong {
        /// The device that answers.
        device_id: String,
        /// Its boot, as in [`DeviceStatus::boot_id`].
        boot_id: String,
        /// Its agent's version.
        agent_version: String,
    },
    /// To a command that this agent does not know.
    UnknownCommand {
        /// What was asked.
        command: String,
        /// What can be asked.
        known: Vec<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_the_fleets() {
        assert_eq!(command_subject("pi-7", "ping"), "device-commands.pi-7.ping");
        assert_eq!(command_wildcard("pi-7"), "device-commands.pi-7.>");
    }

    #[test]
    fn replies_carry_their_kind() {
        let reply = Reply::UnknownCommand { command: "dance".into(), known: vec!["ping".into()] };
        let json = serde_json::to_string(&reply).unwrap();
        assert_eq!(json, r#"{"kind":"unknown-command","command":"dance","known":["ping"]}"#);
        assert_eq!(serde_json::from_str::<Reply>(&json).unwrap(), reply);
    }
}
