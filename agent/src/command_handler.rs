//! Answers commands. Each in a task of its own, so that a slow one holds up no ping; only so many at a time.

use std::sync::Arc;

use async_nats::{Client, Message};
use tokio::sync::{Semaphore, watch};
use tracing::warn;

use crate::device_state::DeviceState;
use crate::plan;
use crate::podman::Podman;
use crate::status_report::StatusReporter;
use agent_protocol::command::{COMMANDS, MAX_LOG_LINES, MAX_REPLY_BYTES};
use agent_protocol::{ErrorCode, LogsRequest, Reply, command_subject};

/// Commands that are answered at the same time.
const MAX_CONCURRENT: usize = 8;

/// Where commands are answered.
pub struct CommandHandler {
    device_id: String,
    boot_id: String,
    reporter: StatusReporter,
    device_state: watch::Receiver<DeviceState>,
    podman: Podman,
    free: Semaphore,
}

impl CommandHandler {
    /// With all that an answer may need.
    pub fn new(
        device_id: &str,
        boot_id: &str,
        reporter: StatusReporter,
        device_state: watch::Receiver<DeviceState>,
        podman: Podman,
    ) -> Self {
        let (device_id, boot_id) = (device_id.to_owned(), boot_id.to_owned());
        Self { device_id, boot_id, reporter, device_state, podman, free: Semaphore::new(MAX_CONCURRENT) }
    }

    /// Answers in the background.
    pub fn serve(command_handler: &Arc<Self>, client: &Client, message: Message) {
        let (command_handler, client) = (Arc::clone(command_handler), client.clone());
        tokio::spawn(async move {
            let Some(inbox) = message.reply else {
                warn!(subject = %message.subject, "a command without a reply subject is dropped");
                return;
            };
            let reply = match command_handler.free.try_acquire() {
                Ok(_permit) => command_handler.reply(&message.subject, &message.payload).await,
                Err(_busy) => error(ErrorCode::Busy, format!("{MAX_CONCURRENT} commands are being answered")),
            };
            let document = serde_json::to_vec(&reply).expect("a reply is plain data");
            if let Err(error) = client.publish(inbox, document.into()).await {
                warn!("reply to {} not sent: {error:#}", message.subject);
            }
        });
    }

    async fn reply(&self, subject: &str, payload: &[u8]) -> Reply {
        let prefix = command_subject(&self.device_id, "");
        match subject.strip_prefix(&prefix) {
            Some("ping") => Reply::Pong {
                device_id: self.device_id.clone(),
                boot_id: self.boot_id.clone(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            Some("status") => match self.reporter.current(&self.device_state.borrow(), MAX_REPLY_BYTES) {
                Ok(status) => Reply::Status { status: Box::new(status) },
                Err(why) => error(ErrorCode::Internal, format!("{why:#}")),
            },
            Some("logs") => self.logs(payload).await,
            other => Reply::UnknownCommand {
                command: other.unwrap_or(subject).to_owned(),
                known: COMMANDS.map(str::to_owned).into(),
            },
        }
    }

    async fn logs(&self, payload: &[u8]) -> Reply {
        let request: LogsRequest = match serde_json::from_slice(payload) {
            Ok(request) => request,
            Err(why) => {
                return error(
                    ErrorCode::BadRequest,
                    format!("logs takes {{\"deployment\", \"lines\"}}: {why}"),
                );
            }
        };
        let name = request.deployment;
        let known = self.device_state.borrow().deployments.iter().any(|line| line.name == name);
        if !known {
            return error(ErrorCode::NoSuchDeployment, format!("there is no deployment {name:?}"));
        }
        let containers = match self.podman.containers(&plan::own(&self.device_id)).await {
            Ok(containers) => containers,
            Err(why) => return error(ErrorCode::Podman, format!("{why:#}")),
        };
        let own = |container: &&crate::podman::ListedContainer| {
            container.labels.get(plan::DEPLOYMENT_LABEL) == Some(&name)
        };
        let Some(container) = containers.iter().find(own) else {
            return error(ErrorCode::NoContainer, format!("{name:?} has no container now"));
        };
        let wanted = request.lines.clamp(1, MAX_LOG_LINES);
        match self.podman.logs(&container.id, wanted).await {
            Ok(lines) => bounded(name, lines, wanted as usize),
            Err(why) => error(ErrorCode::Podman, format!("{why:#}")),
        }
    }
}

fn error(code: ErrorCode, message: String) -> Reply {
    Reply::Error { code, message }
}

/// The last of the lines, as many as fit.
fn bounded(deployment: String, lines: Vec<String>, wanted: usize) -> Reply {
    let mut room = MAX_REPLY_BYTES;
    let mut kept: Vec<String> = Vec::new();
    let count = lines.len();
    for line in lines.into_iter().rev().take(wanted) {
        // As it will be written: a control character is six.
        let written = serde_json::to_string(&line).map_or(usize::MAX, |text| text.len() + 1);
        let Some(left) = room.checked_sub(written) else { break };
        room = left;
        kept.push(line);
    }
    kept.reverse();
    let truncated = kept.len() < count;
    Reply::Logs { deployment, lines: kept, truncated }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_bounded_in_lines_and_bytes() {
        let reply = |lines: Vec<String>, wanted| match bounded("web".into(), lines, wanted) {
            Reply::Logs { lines, truncated, .. } => (lines, truncated),
            other => panic!("{other:?}"),
        };
        let lines = |count: usize| (0..count).map(|number| number.to_string()).collect::<Vec<_>>();
        assert_eq!(reply(lines(3), 10), (lines(3), false));
        assert_eq!(reply(lines(5), 2), (vec!["3".into(), "4".into()], true));
        let (kept, _) = reply(vec!["\u{1}".repeat(100 << 10); 9], 500);
        assert!(kept.is_empty(), "six times as long on the way");
        let (kept, truncated) = reply(vec!["x".repeat(100 << 10); 9], 500);
        assert!(truncated && kept.len() == 2, "{}", kept.len());
        assert_eq!(reply(vec!["x".repeat(MAX_REPLY_BYTES)], 5), (Vec::<String>::new(), true));
    }
}
