//! The fleet bus: connect, for ever; while connected report, follow what is desired, and answer. A connection that ends takes all
//! of that with it, and the next one begins anew: nothing is carried over that could be stale. (async-nats itself goes once more
//! over the servers in the background before it gives the old connection up.)

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_nats::jetstream::consumer::{DeliverPolicy, push};
use async_nats::jetstream::{self, kv};
use async_nats::{Client, Event, HeaderMap};
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::command_handler::CommandHandler;
use crate::config::Config;
use crate::desired::{Change, Operation, Update};
use crate::device_state::{Connection, DeviceState};
use crate::progress::{Loop, Progress};
use crate::rate_limiter::RateLimiter;
use crate::status_report::StatusReporter;
use agent_protocol as protocol;

/// The longest pause between two attempts to connect: where the broker's host refuses meanwhile, a device is back so soon after it.
const MAX_RECONNECT_PAUSE: Duration = Duration::from_secs(2);
/// How long one server may take for TCP, TLS and login.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long all of them may take, look-ups of names included.
const CONNECT_ALL_TIMEOUT: Duration = Duration::from_secs(120);
/// A connection that lasted for so long was none that fails at once.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// How often the broker is asked for a sign of life; two that fail to come end the connection. async-nats' own 60 s would
/// leave a device deaf for three minutes whose mobile link has dropped the flow.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// So many statuses in a row that cannot be stored in time end it too.
const MAX_LOST_PUTS: u32 = 3;
/// The loop comes round so often, whatever the heartbeat.
const LOOP_INTERVAL: Duration = Duration::from_secs(30);
/// How long one status may take to be stored before the next attempt; a Pi's bus may be a slow mobile link.
const PUT_TIMEOUT: Duration = Duration::from_secs(10);
/// One answer of JetStream's.
const JETSTREAM_TIMEOUT: Duration = Duration::from_secs(15);
/// The desired state is read whole again so often, should a message have been lost on the way.
const RESYNC_INTERVAL: Duration = Duration::from_secs(600);
/// The pause after the desired state could not be followed.
const WATCH_RETRY_PAUSE: Duration = Duration::from_secs(3);
/// What a status may be short of the server's limit: the message's headers and subject.
const MESSAGE_OVERHEAD: usize = 4096;

/// The agent's side of the bus.
pub struct Bus {
    /// The agent's configuration.
    pub config: Config,
    /// Writes the statuses.
    pub reporter: StatusReporter,
    /// What is to be told.
    pub device_state: watch::Receiver<DeviceState>,
    /// Where what the fleet desires go.
    pub changes: mpsc::Sender<Change>,
    /// Answers commands.
    pub command_handler: Arc<CommandHandler>,
    /// Where it is told how the connection is.
    pub connection: watch::Sender<Connection>,
    /// The watchdog's evidence.
    pub progress: Arc<Progress>,
    /// Of statuses, whatever the connection.
    pub limiter: RateLimiter,
}

impl Bus {
    /// For ever.
    pub async fn run(mut self) {
        let (mut attempts, mut last) = (0, String::new());
        loop {
            self.progress.tick(Loop::Bus);
            let connected = timeout(CONNECT_ALL_TIMEOUT, self.connect()).await;
            match connected
                .unwrap_or_else(|_elapsed| bail!("connect to the bus: no server in {CONNECT_ALL_TIMEOUT:?}"))
            {
                Ok((client, gone)) => {
                    let begun = Instant::now();
                    info!(server = client.server_info().server_name, "connected to the bus");
                    last.clear();
                    self.connection.send_replace(Connection { connected: true, error: None });
                    let why = self.serve(&client, gone).await;
                    if begun.elapsed() >= STABLE_AFTER {
                        attempts = 0;
                    }
                    warn!("the connection to the bus ended: {why}");
                    self.connection.send_replace(Connection { connected: false, error: Some(why) });
                }
                Err(error) => {
                    let why = describe_connect_error(&error);
                    // The journal is no place for the same line every two seconds.
                    if why == last {
                        debug!("the bus is not reached, attempt {}: {why}", attempts + 1);
                    } else {
                        warn!("the bus is not reached, attempt {}: {why}", attempts + 1);
                    }
                    last.clone_from(&why);
                    self.connection.send_replace(Connection { connected: false, error: Some(why) });
                }
            }
            attempts += 1;
            sleep(reconnect_pause(attempts)).await;
        }
    }

    async fn connect(&self) -> Result<(Client, mpsc::UnboundedReceiver<Event>)> {
        let (events_tx, events) = mpsc::unbounded_channel();
        let mut options = self
            .config
            .credentials
            .login()?
            .name(format!("iot-agent {}", self.config.device_id))
            // So that a broker can keep devices from reading each other's answers.
            .custom_inbox_prefix(format!("_INBOX.{}", self.config.device_id))
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            // One round over the servers; what comes after that is this loop's.
            .max_reconnects(Some(self.config.urls.len()))
            .event_callback(move |event| {
                // Without a receiver the connection is over already.
                drop(events_tx.send(event));
                std::future::ready(())
            });
        if let Some(ca) = &self.config.ca_file {
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        let client = options.connect(&self.config.urls).await.context("connect to the bus")?;
        Ok((client, events))
    }

    /// Until the connection is gone; why it is.
    async fn serve(&mut self, client: &Client, mut events: mpsc::UnboundedReceiver<Event>) -> String {
        let gone = async {
            loop {
                match events.recv().await {
                    Some(Event::Connected) => {}
                    Some(event @ (Event::Disconnected | Event::Closed)) => return event.to_string(),
                    // A permission that is missing, a slow consumer: told, and survived.
                    Some(event) => warn!("bus: {event}"),
                    None => return "its client ended".to_owned(),
                }
            }
        };
        let mut limiter = self.limiter;
        let bus = &*self;
        let why = tokio::select! {
            why = gone => why,
            error = bus.report(client, &mut limiter) => error,
            error = bus.watch_desired(client) => error,
            error = bus.answer(client) => error,
        };
        self.limiter = limiter;
        why
    }

    /// A status at once, on every change, and on the heartbeat.
    async fn report(&self, client: &Client, limiter: &mut RateLimiter) -> String {
        let mut device_state = self.device_state.clone();
        device_state.mark_changed();
        let mut heartbeat = interval(Duration::from_secs(self.config.heartbeat_seconds));
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut bucket, mut lost) = (None, 0);
        loop {
            self.progress.tick(Loop::Bus);
            if let Some(next) = limiter.next() {
                sleep_until(next).await;
            }
            tokio::select! {
                _ = heartbeat.tick() => {}
                () = sleep(LOOP_INTERVAL) => continue,
                changed = device_state.changed() => if changed.is_err() { return "the reconciler ended".to_owned() },
            }
            let current = device_state.borrow_and_update().clone();
            limiter.sent(Instant::now());
            match timeout(PUT_TIMEOUT, self.put(client, &mut bucket, &current)).await {
                Ok(Ok(revision)) => {
                    lost = 0;
                    debug!(revision, "status stored");
                }
                Ok(Err(error)) => {
                    bucket = None;
                    warn!("status not stored: {error:#}");
                }
                Err(_elapsed) => {
                    lost += 1;
                    warn!("status not stored within {PUT_TIMEOUT:?}");
                    if lost == MAX_LOST_PUTS {
                        return format!("{lost} statuses in a row were not stored in time");
                    }
                }
            }
        }
    }

    async fn put(
        &self,
        client: &Client,
        bucket: &mut Option<kv::Store>,
        device_state: &DeviceState,
    ) -> Result<u64> {
        let longest = client.server_info().max_payload.saturating_sub(MESSAGE_OVERHEAD);
        let document = self.reporter.write(device_state, longest)?;
        let store = match bucket.take() {
            Some(store) => store,
            // The fleet makes the bucket; a device has no right to.
            None => jetstream::new(client.clone())
                .get_key_value(protocol::STATUS_BUCKET)
                .await
                .with_context(|| format!("open the bucket {}", protocol::STATUS_BUCKET))?,
        };
        let revision = store
            .put(&self.config.device_id, document.into())
            .await
            .with_context(|| format!("put the status into {}", protocol::STATUS_BUCKET))?;
        *bucket = Some(store);
        Ok(revision)
    }

    /// The desired state: whole, then as it changes; whole again now and then, and after any trouble.
    async fn watch_desired(&self, client: &Client) -> String {
        loop {
            match timeout(RESYNC_INTERVAL, self.watch_desired_once(client)).await {
                Err(_elapsed) => debug!("the desired state is read again"),
                Ok(Ok(())) => return "the reconciler ended".to_owned(),
                Ok(Err(error)) => {
                    warn!("the desired state is not followed: {error:#}");
                    sleep(WATCH_RETRY_PAUSE + jitter(WATCH_RETRY_PAUSE)).await;
                }
            }
        }
    }

    async fn watch_desired_once(&self, client: &Client) -> Result<()> {
        let bucket = protocol::DESIRED_BUCKET;
        let prefix = format!("$KV.{bucket}.{}", protocol::desired_key(&self.config.device_id, ""));
        let consumer = async {
            jetstream::new(client.clone())
                .get_stream_no_info(format!("KV_{bucket}"))
                .await
                .with_context(|| format!("open the bucket {bucket}"))?
                .create_consumer(push::OrderedConfig {
                    // With a name, the request's subject has the filter in it, and a broker can tell whose that is.
                    name: Some(format!("{:016x}", RandomState::new().hash_one(()))),
                    deliver_subject: client.new_inbox(),
                    filter_subject: format!("{prefix}>"),
                    deliver_policy: DeliverPolicy::LastPerSubject,
                    ..push::OrderedConfig::default()
                })
                .await
                .with_context(|| format!("watch {prefix}>"))
        };
        let consumer = timeout(JETSTREAM_TIMEOUT, consumer)
            .await
            .with_context(|| format!("watch {prefix}>: no answer"))??;
        let mut whole = (consumer.cached_info().num_pending > 0).then(Vec::new);
        if whole.is_none() && self.changes.send(Change::Snapshot(Vec::new())).await.is_err() {
            return Ok(());
        }
        let mut messages = consumer.messages().await.with_context(|| format!("watch {prefix}>"))?;
        while let Some(message) = messages.next().await {
            let message = message.with_context(|| format!("watch {prefix}>"))?;
            let info = message.info().map_err(|error| anyhow::anyhow!("{error}"))?;
            let name = message.subject.strip_prefix(&prefix).unwrap_or_default().to_owned();
            let operation = kv_operation(message.headers.as_ref(), &message.payload);
            let (update, pending) =
                (Update { name, revision: info.stream_sequence, operation }, info.pending);
            let change = match whole.take() {
                None => Change::Update(update),
                Some(mut updates) => {
                    updates.push(update);
                    if pending > 0 {
                        whole = Some(updates);
                        continue;
                    }
                    Change::Snapshot(updates)
                }
            };
            if self.changes.send(change).await.is_err() {
                return Ok(());
            }
        }
        bail!("watch {prefix}>: the broker ended it")
    }

    async fn answer(&self, client: &Client) -> String {
        let subject = protocol::command_wildcard(&self.config.device_id);
        let mut commands = match client.subscribe(subject.clone()).await {
            Ok(commands) => commands,
            Err(error) => return format!("subscribe to {subject}: {error}"),
        };
        while let Some(message) = commands.next().await {
            CommandHandler::serve(&self.command_handler, client, message);
        }
        format!("the subscription to {subject} ended")
    }
}

/// A KV entry says in a header what it is, where it is no Put (NATS ADR-8).
fn kv_operation(headers: Option<&HeaderMap>, payload: &[u8]) -> Operation {
    match headers.and_then(|headers| headers.get("KV-Operation")).map(|operation| operation.as_str()) {
        Some("DEL") => Operation::Delete,
        Some("PURGE") => Operation::Purge,
        _ => Operation::Put(String::from_utf8_lossy(payload).into_owned()),
    }
}

/// Why the bus is not reached, for people. A device without a battery for its clock boots in the past.
fn describe_connect_error(error: &anyhow::Error) -> String {
    // async-nats' errors say what their causes say, and rustls' are causes twice.
    let text = error.chain().take(2).map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if ["NotValidYet", "not valid yet"].iter().any(|words| text.contains(words)) {
        return format!(
            "its certificate is not valid yet by this device's clock, which is probably not set; tried again until it is ({text})"
        );
    }
    text
}

/// Doubling from a quarter of a second up to [`MAX_RECONNECT_PAUSE`], minus up to half at random so that a fleet
/// does not come back as one after the broker's restart.
fn reconnect_pause(attempts: u32) -> Duration {
    let full = Duration::from_millis(250 << attempts.min(6)).min(MAX_RECONNECT_PAUSE);
    full - jitter(full / 2)
}

/// Up to `most`, at random. A fresh RandomState is keyed at random by the standard library; no generator of our own is needed.
fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().hash_one(()) as u32;
    most.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reconnect_pause_grows_and_never_passes_its_bound() {
        for attempts in 1..100 {
            let pause = reconnect_pause(attempts);
            assert!(pause <= MAX_RECONNECT_PAUSE, "{attempts}: {pause:?}");
            assert!(pause >= Duration::from_millis(250), "{attempts}: {pause:?}");
        }
        assert!((0..20).map(|_| reconnect_pause(5)).collect::<std::collections::HashSet<_>>().len() > 1);
    }

    #[test]
    fn an_entry_says_what_it_is() {
        let header = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("KV-Operation", value);
            headers
        };
        assert_eq!(kv_operation(None, b"{}"), Operation::Put("{}".into()));
        assert_eq!(kv_operation(Some(&header("DEL")), b""), Operation::Delete);
        assert_eq!(kv_operation(Some(&header("PURGE")), b""), Operation::Purge);
        assert_eq!(kv_operation(Some(&HeaderMap::new()), b"x"), Operation::Put("x".into()));
    }
}
