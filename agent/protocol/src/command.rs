//! Requests to a device and its replies, on `device-commands.<device_id>.<command>`.

use serde::{Deserialize, Serialize};

use super::status::DeviceStatus;

/// The commands that an agent of this version knows.
pub const COMMANDS: [&str; 3] = ["ping", "status", "logs"];

/// The most lines that `logs` answers with.
pub const MAX_LOG_LINES: u32 = 500;
/// The most bytes of those lines as JSON, and of a status in a reply, so that it fits into a message (nats-server's default is
/// 1 MiB).
pub const MAX_LOG_BYTES: usize = 256 << 10;

/// The subject on which the device answers `command`, for example `device-commands.pi-7.ping`.
pub fn command_subject(device_id: &str, command: &str) -> String {
    format!("device-commands.{device_id}.{command}")
}

/// The subject that covers every command for the device.
pub fn command_wildcard(device_id: &str) -> String {
    command_subject(device_id, ">")
}

/// The payload of `logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsRequest {
    /// Whose container's.
    pub deployment: String,
    /// How many lines from the end, at most [`MAX_LOG_LINES`].
    #[serde(default = "default_lines")]
    pub lines: u32,
}

fn default_lines() -> u32 {
    100
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
    /// To `status`.
    Status {
        /// The device as it is now, whether or not that is in the bucket yet.
        status: Box<DeviceStatus>,
    },
    /// To `logs`.
    Logs {
        /// Whose container's.
        deployment: String,
        /// The last lines, oldest first, of stdout and stderr.
        lines: Vec<String>,
        /// Whether lines were left out to keep the reply small.
        truncated: bool,
    },
    /// To a command that this agent does not know.
    UnknownCommand {
        /// What was asked.
        command: String,
        /// What can be asked.
        known: Vec<String>,
    },
    /// To a command that could not be carried out.
    Error {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
}

/// Why a command could not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The payload is not what the command takes.
    BadRequest,
    /// The device has no such deployment.
    NoSuchDeployment,
    /// The deployment has no container now.
    NoContainer,
    /// Podman does not answer, or refuses.
    Podman,
    /// The device cannot tell, for a reason of its own.
    Internal,
    /// It answers as many commands as it can already.
    Busy,
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
        let error = Reply::Error { code: ErrorCode::NoSuchDeployment, message: "no web".into() };
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(json, r#"{"kind":"error","code":"no-such-deployment","message":"no web"}"#);
    }
}
