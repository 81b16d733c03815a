//! Backups of a stream, made and restored over JetStream's API as `nats stream backup` and `nats stream restore` do.

use async_nats::Client;
use futures_util::StreamExt as _;
use serde_json::{Value, json};

/// A backup of a stream.
pub(crate) struct Backup {
    /// The stream's configuration and state, which a restore must repeat.
    description: Value,
    chunks: Vec<async_nats::Message>,
}

/// Sends a request to JetStream's API and returns the answer, which must not be an error.
pub(crate) async fn jetstream(client: &Client, operation: &str, body: &Value) -> Value {
    attempt(client, operation, body).await.unwrap()
}

/// Sends a request to JetStream's API and returns the answer.
///
/// # Errors
/// Returns the error in the answer.
pub(crate) async fn attempt(client: &Client, operation: &str, body: &Value) -> Result<Value, String> {
    let subject = format!("$JS.API.{operation}");
    // Some operations refuse a body.
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = client.request(subject, body.into()).await.map_err(|error| error.to_string())?;
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    if answer["error"].is_null() { Ok(answer) } else { Err(format!("{operation}: {answer}")) }
}

impl Backup {
    pub(crate) async fn of(client: &Client, stream: &str) -> Self {
        let inbox = client.new_inbox();
        let mut messages = client.subscribe(inbox.clone()).await.unwrap();
        let request = json!({ "deliver_subject": inbox, "no_consumers": true });
        let answer = jetstream(client, &format!("STREAM.SNAPSHOT.{stream}"), &request).await;
        let description = json!({ "config": answer["config"], "state": answer["state"] });
        let mut chunks = Vec::new();
        // An empty message ends the backup.
        while let Some(message) = messages.next().await.filter(|message| !message.payload.is_empty()) {
            if let Some(acknowledge) = message.reply.clone() {
                client.publish(acknowledge, "".into()).await.unwrap();
            }
            chunks.push(message);
        }
        Self { description, chunks }
    }

    /// Restores the stream, which must not exist.
    pub(crate) async fn restore(self, client: &Client, stream: &str) {
        let answer = jetstream(client, &format!("STREAM.RESTORE.{stream}"), &self.description).await;
        let subject = answer["deliver_subject"].as_str().unwrap().to_owned();
        for chunk in self.chunks {
            client.request(subject.clone(), chunk.payload).await.unwrap();
        }
        let end = client.request(subject, "".into()).await.unwrap();
        let end: Value = serde_json::from_slice(&end.payload).unwrap();
        assert!(end["error"].is_null(), "{end}");
    }
}
