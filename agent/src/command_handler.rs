//! Answers commands, each in a task of its own, so that a slow command does not delay a ping. The number of
//! tasks is limited.

use std::sync::Arc;

use agent_protocol::command::{COMMANDS, MAX_LOG_LINES, MAX_REPLY_BYTES};
use agent_protocol::{ErrorCode, LogsRequest, Reply, command_subject};
use async_nats::{Client, Message};
use tokio::sync::{Semaphore, watch};
use tracing::warn;

use crate::device_state::DeviceState;
use crate::host::DeviceIdentity;
use crate::plan;
use crate::podman::{ListedContainer, Podman};
use crate::status_report::StatusReporter;

/// Upper bound for the commands that are answered at the same time.
const MAX_CONCURRENT: usize = 8;
/// The bytes that a character takes in JSON at most: a control character is written as `\u0001`.
const MAX_BYTES_PER_CHAR: usize = 6;

pub(crate) struct CommandHandler {
    device: DeviceIdentity,
    reporter: StatusReporter,
    device_state: watch::Receiver<DeviceState>,
    podman: Podman,
    free: Semaphore,
}

impl CommandHandler {
    pub(crate) fn new(
        device: DeviceIdentity,
        reporter: StatusReporter,
        device_state: watch::Receiver<DeviceState>,
        podman: Podman,
    ) -> Self {
        Self { device, reporter, device_state, podman, free: Semaphore::new(MAX_CONCURRENT) }
    }

    /// Answers a command in a task in the background.
    pub(crate) fn serve(handler: &Arc<Self>, client: &Client, message: Message) {
        let (handler, client) = (Arc::clone(handler), client.clone());
        tokio::spawn(async move {
            let Some(inbox) = message.reply else {
                warn!(subject = %message.subject, "ignored a command without a reply subject");
                return;
            };
            let reply = match handler.free.try_acquire() {
                Ok(_permit) => handler.reply(&message.subject, &message.payload).await,
                Err(_busy) => error(
                    ErrorCode::Busy,
                    format!("the device is already answering {MAX_CONCURRENT} commands; try again"),
                ),
            };
            let document = serde_json::to_vec(&reply).expect("a reply is plain data");
            if let Err(error) = client.publish(inbox, document.into()).await {
                warn!("cannot send the reply to {}: {error:#}", message.subject);
            }
        });
    }

    async fn reply(&self, subject: &str, payload: &[u8]) -> Reply {
        let prefix = command_subject(&self.device.device_id, "");
        match subject.strip_prefix(&prefix) {
            Some("ping") => Reply::Pong {
                device_id: self.device.device_id.clone(),
                boot_id: self.device.boot_id.clone(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            Some("status") => match self.reporter.current(&self.device_state.borrow(), MAX_REPLY_BYTES) {
                Ok(status) => Reply::Status { status: Box::new(status) },
                Err(why) => error(ErrorCode::Internal, format!("{why:#}")),
            },
            Some("logs") => self.logs(payload).await.unwrap_or_else(|error| error),
            other => Reply::UnknownCommand {
                command: other.unwrap_or(subject).to_owned(),
                known: COMMANDS.map(str::to_owned).into(),
            },
        }
    }

    async fn logs(&self, payload: &[u8]) -> Result<Reply, Reply> {
        let podman_error = |why: anyhow::Error| error(ErrorCode::Podman, format!("{why:#}"));
        let LogsRequest { deployment, lines } = serde_json::from_slice(payload).map_err(|why| {
            let message = format!("the payload of logs must be {{\"deployment\", \"lines\"}}: {why}");
            error(ErrorCode::BadRequest, message)
        })?;
        if !self.device_state.borrow().deployments.iter().any(|line| line.name == deployment) {
            return Err(error(ErrorCode::NoSuchDeployment, format!("there is no deployment {deployment:?}")));
        }
        let filter = plan::device_filter(&self.device.device_id);
        let containers = self.podman.containers(&filter).await.map_err(podman_error)?;
        let own =
            |container: &&ListedContainer| container.labels.get(plan::DEPLOYMENT_LABEL) == Some(&deployment);
        // Beside the container that runs, there may be a new one or the previous one.
        let container = containers
            .iter()
            .filter(own)
            .max_by_key(|container| (container.state == "running", plan::has_ended(container)))
            .ok_or_else(|| {
                let message = format!("the deployment {deployment:?} has no container now");
                error(ErrorCode::NoContainer, message)
            })?;
        let max_lines = lines.clamp(1, MAX_LOG_LINES);
        let lines = self.podman.logs(&container.id, max_lines).await.map_err(podman_error)?;
        Ok(logs_reply(deployment, lines, max_lines as usize))
    }
}

fn error(code: ErrorCode, message: String) -> Reply {
    Reply::Error { code, message }
}

/// Builds the reply to `logs`. It contains as many of the last lines as fit. Of a last line that does not fit, it
/// contains the end.
fn logs_reply(deployment: String, lines: Vec<String>, max_lines: usize) -> Reply {
    let mut free_bytes = MAX_REPLY_BYTES;
    let mut fitting: Vec<String> = Vec::new();
    let mut truncated = lines.len() > max_lines;
    for line in lines.into_iter().rev().take(max_lines) {
        // The limit is for the JSON, in which a control character takes six bytes.
        let bytes = serde_json::to_string(&line).map_or(usize::MAX, |text| text.len() + 1);
        let Some(rest) = free_bytes.checked_sub(bytes) else {
            truncated = true;
            if fitting.is_empty() {
                let end = line.char_indices().rev().nth(free_bytes / MAX_BYTES_PER_CHAR - 2);
                fitting.extend(end.map(|(start, _)| line[start..].to_owned()));
            }
            break;
        };
        free_bytes = rest;
        fitting.push(line);
    }
    fitting.reverse();
    Reply::Logs { deployment, lines: fitting, truncated }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_bounded_in_lines_and_bytes() {
        let reply = |lines: Vec<String>, wanted| match logs_reply("web".into(), lines, wanted) {
            Reply::Logs { lines, truncated, .. } => {
                assert!(serde_json::to_string(&lines).unwrap().len() <= MAX_REPLY_BYTES);
                (lines, truncated)
            }
            other => panic!("{other:?}"),
        };
        let lines = |count: usize| (0..count).map(|number| number.to_string()).collect::<Vec<_>>();
        assert_eq!(reply(lines(3), 10), (lines(3), false));
        assert_eq!(reply(lines(5), 2), (vec!["3".into(), "4".into()], true));
        let (lines, _) = reply(vec!["\u{1}".repeat(100 << 10); 9], 500);
        assert_eq!(lines.len(), 1, "each character takes six bytes in JSON, so that not even one line fits");
        let (lines, truncated) = reply(vec!["x".repeat(100 << 10); 9], 500);
        assert!(truncated && lines.len() == 2, "{}", lines.len());
        let long = "x".repeat(MAX_REPLY_BYTES) + "end";
        let (lines, truncated) = reply(vec!["before".into(), long], 5);
        assert!(truncated && lines.len() == 1 && lines[0].ends_with("xend"), "{}", lines.len());
    }
}
