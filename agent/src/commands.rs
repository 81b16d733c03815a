//! Answers commands. Each in a task of its own, so that a slow one holds up no ping; only so many at a time.

use std::sync::Arc;

use async_nats::{Client, Message};
use tokio::sync::{Semaphore, watch};
use tracing::warn;

use crate::plan;
use crate::podman::Podman;
use crate::protocol::command::{COMMANDS, MOST_LOG_BYTES, MOST_LOG_LINES};
use crate::protocol::{ErrorCode, LogsRequest, Reply, command_subject};
use crate::status::Author;
use crate::view::View;

/// Commands that are answered at the same time.
const AT_ONCE: usize = 8;

/// Where commands are answered.
pub struct Desk {
    device_id: String,
    boot_id: String,
    author: Author,
    view: watch::Receiver<View>,
    podman: Podman,
    free: Semaphore,
}

impl Desk {
    /// With all that an answer may need.
    pub fn new(
        device_id: &str,
        boot_id: &str,
        author: Author,
        view: watch::Receiver<View>,
        podman: Podman,
    ) -> Self {
        let (device_id, boot_id) = (device_id.to_owned(), boot_id.to_owned());
        Self { device_id, boot_id, author, view, podman, free: Semaphore::new(AT_ONCE) }
    }

    /// Answers in the background.
    pub fn serve(desk: &Arc<Self>, client: &Client, message: Message) {
        let (desk, client) = (Arc::clone(desk), client.clone());
        tokio::spawn(async move {
            let Some(inbox) = message.reply else {
                warn!(subject = %message.subject, "a command without a reply subject is dropped");
                return;
            };
            let reply = match desk.free.try_acquire() {
                Ok(_permit) => desk.reply(&message.subject, &message.payload).await,
                Err(_busy) => error(ErrorCode::Busy, format!("{AT_ONCE} commands are being answered")),
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
            Some("status") => match self.author.current(&self.view.borrow(), MOST_LOG_BYTES) {
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
        let known = self.view.borrow().deployments.iter().any(|line| line.name == name);
        if !known {
            return error(ErrorCode::NoSuchDeployment, format!("there is no deployment {name:?}"));
        }
        let containers = match self.podman.containers(&plan::own(&self.device_id)).await {
            Ok(containers) => containers,
            Err(why) => return error(ErrorCode::Podman, format!("{why:#}")),
        };
        let own =
            |container: &&crate::podman::Listed| container.labels.get(plan::DEPLOYMENT_LABEL) == Some(&name);
        let Some(container) = containers.iter().find(own) else {
            return error(ErrorCode::NoContainer, format!("{name:?} has no container now"));
        };
        let wanted = request.lines.clamp(1, MOST_LOG_LINES);
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
    let mut room = MOST_LOG_BYTES;
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
        assert_eq!(reply(vec!["x".repeat(MOST_LOG_BYTES)], 5), (Vec::<String>::new(), true));
    }
}
