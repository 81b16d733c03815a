//! Commands to a device and their replies. A command is a request on the subject
//! `device-commands.<device_id>.<command>`.

use serde::{Deserialize, Serialize};

use super::status::DeviceStatus;

/// The commands that this version of the agent can answer.
pub const COMMANDS: [&str; 3] = ["ping", "status", "logs"];

/// Upper bound for the lines in a reply to `logs`.
pub const MAX_LOG_LINES: u32 = 500;
/// Upper bound, in bytes, for the JSON of the log lines or of the status in a reply. A reply of this size
/// fits into a message of nats-server, which allows 1 MiB by default.
pub const MAX_REPLY_BYTES: usize = 256 << 10;

/// Returns the subject of a command, for example `device-commands.pi-7.ping`.
pub fn command_subject(device_id: &str, command: &str) -> String {
    format!("device-commands.{device_id}.{command}")
}

/// Returns the subject of all commands for a device.
pub fn command_wildcard(device_id: &str) -> String {
    command_subject(device_id, ">")
}

/// The payload of `logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsRequest {
    pub deployment: String,
    /// The number of lines to return, counted from the end of the output; at most [`MAX_LOG_LINES`].
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
    /// The reply to `ping`.
    Pong {
        device_id: String,
        /// See [`DeviceStatus::boot_id`].
        boot_id: String,
        agent_version: String,
    },
    /// The reply to `status`.
    Status {
        /// The current status, which may be newer than the status in the bucket.
        status: Box<DeviceStatus>,
    },
    /// The reply to `logs`.
    Logs {
        deployment: String,
        /// The last lines, oldest first, of stdout and stderr.
        lines: Vec<String>,
        /// True if lines were omitted to keep the reply small.
        truncated: bool,
    },
    UnknownCommand {
        command: String,
        known: Vec<String>,
    },
    Error {
        code: ErrorCode,
        message: String,
    },
}

/// The reason why a command failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The payload is not valid for the command.
    BadRequest,
    NoSuchDeployment,
    NoContainer,
    /// Podman does not answer, or refuses the request.
    Podman,
    /// The agent failed.
    Internal,
    /// The agent is answering as many other commands as it can.
    Busy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_contain_the_device() {
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
