//! Follows the desired state of this device in the bucket. Each connection begins with a reading of all entries,
//! and then gets each change. The reading is repeated at an interval, in case a message was lost.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use agent_protocol::{DESIRED_BUCKET, desired_key};
use anyhow::{Context, Result, anyhow, ensure};
use async_nats::Client;
use async_nats::jetstream::consumer::{Consumer, DeliverPolicy, push};
use async_nats::jetstream::{self, Message, stream};
use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::bucket::Stream;
use crate::bus::Bus;
use crate::desired::{Change, Update};
use crate::markers;
use crate::reconnect::jitter;

/// Time for the requests to JetStream before a reading.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// The shortest pause before the desired state is read again after an error.
const RETRY_PAUSE: Duration = Duration::from_secs(3);

impl Bus {
    /// Passes the desired state to the reconciler. Begins again after each error. Returns only if it cannot go
    /// on, with the reason.
    pub(crate) async fn follow(&self, client: &Client) -> String {
        let prefix = format!("$KV.{DESIRED_BUCKET}.{}", desired_key(&self.config.agent.device_id, ""));
        loop {
            match self.follow_once(client, &prefix).await {
                Ok(true) => debug!("reading the complete desired state again"),
                Ok(false) => return "the reconciler ended".to_owned(),
                Err(error) => {
                    self.set_following_error(Some(format!("{error:#}")));
                    sleep(RETRY_PAUSE + jitter(RETRY_PAUSE)).await;
                }
            }
        }
    }

    /// Records why the desired state is not followed. Only a new reason is logged, since a line every few
    /// seconds would flood the journal.
    fn set_following_error(&self, error: Option<String>) {
        self.connection.send_if_modified(|connection| {
            let modified = connection.following_error != error;
            if modified && let Some(error) = &error {
                warn!("cannot follow the desired state: {error}");
            }
            connection.following_error = error;
            modified
        });
    }

    /// Passes a reading and then each change, until the next reading is due. Returns false if the reconciler
    /// has ended.
    async fn follow_once(&self, client: &Client, prefix: &str) -> Result<bool> {
        let opened = timeout(OPEN_TIMEOUT, open(self.jetstream(client), client.new_inbox(), prefix)).await;
        let (stream, consumer) = opened
            .with_context(|| format!("open the bucket {DESIRED_BUCKET}: JetStream does not answer"))??;
        let interval = Duration::from_secs(self.config.agent.resync_seconds);
        // Without the random part, a fleet would read at the same time after each restart of the broker.
        let due = Instant::now() + interval - jitter(interval / 10);
        let mut pending = consumer.cached_info().num_pending;
        let mut messages = consumer.messages().await.context("subscribe to the consumer")?;
        let mut updates = Vec::new();
        while pending > 0 {
            let (update, left) = received(messages.next().await, prefix)?;
            updates.extend(update);
            pending = left;
        }
        let mut change = Some(Change::Snapshot(stream, updates));
        loop {
            if let Some(change) = change
                && self.changes.send(change).await.is_err()
            {
                return Ok(false);
            }
            self.set_following_error(None);
            let Ok(message) = timeout_at(due, messages.next()).await else { return Ok(true) };
            change = received(message, prefix)?.0.map(Change::Update);
        }
    }
}

/// Opens the bucket, and creates a consumer of the newest entry of each key below `prefix`. Messages are delivered to
/// `inbox`.
async fn open(
    jetstream: jetstream::Context,
    inbox: String,
    prefix: &str,
) -> Result<(Stream, Consumer<push::OrderedConfig>)> {
    let opening = || format!("open the bucket {DESIRED_BUCKET}");
    let mut stream = jetstream.get_stream(format!("KV_{DESIRED_BUCKET}")).await.with_context(opening)?;
    let known = identify(stream.cached_info());
    let consumer = stream
        .create_consumer(push::OrderedConfig {
            // If a consumer has a name, the subject of the request that creates it contains the filter. A
            // broker can therefore check the filter.
            name: Some(format!("{:016x}", RandomState::new().hash_one(()))),
            deliver_subject: inbox,
            filter_subject: format!("{prefix}>"),
            deliver_policy: DeliverPolicy::LastPerSubject,
            ..push::OrderedConfig::default()
        })
        .await
        .context("create the consumer")?;
    // The stream could have been recreated before the consumer was created.
    let current = identify(stream.info().await.with_context(opening)?);
    ensure!(current.created == known.created, "the bucket {DESIRED_BUCKET} is being recreated");
    Ok((known, consumer))
}

fn identify(info: &stream::Info) -> Stream {
    // The number of nanoseconds exceeds 64 bits before the year 1678 and after the year 2262.
    let created = i64::try_from(info.created.unix_timestamp_nanos()).unwrap_or_default();
    Stream { created, last_sequence: info.state.last_sequence }
}

/// Returns the update in a message, and the number of messages that the consumer has still to deliver.
fn received<E>(message: Option<Result<Message, E>>, prefix: &str) -> Result<(Option<Update>, u64)>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let message = message.context("the broker ended the consumer")?.context("receive a message")?;
    let info = message.info().map_err(|error| anyhow!("{error}"))?;
    let name = message.subject.strip_prefix(prefix).unwrap_or_default().to_owned();
    let operation = markers::operation(message.headers.as_ref(), &message.payload);
    if operation.is_none() {
        warn!("ignored the entry {}: its headers name no known operation", message.subject);
    }
    let revision = info.stream_sequence;
    Ok((operation.map(|operation| Update { name, revision, operation }), info.pending))
}
