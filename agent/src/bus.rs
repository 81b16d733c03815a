//! The client of the fleet bus: connects, and then reports statuses, follows the desired state and answers
//! commands until the connection ends. The next connection starts from scratch, so that nothing stale is
//! carried over. (Before async-nats gives a connection up, it tries each server once more in the background.)

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_protocol::command_wildcard;
use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use async_nats::{Client, Event};
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::command_handler::CommandHandler;
use crate::config::Config;
use crate::desired::Change;
use crate::device_state::{Connection, DeviceState};
use crate::progress::{Loop, Progress};
use crate::rate_limiter::RateLimiter;
use crate::reconnect::Attempts;
use crate::status_report::StatusReporter;

/// Interval at which the agent looks for a new secret after the broker has refused the login.
const SECRET_POLL: Duration = Duration::from_secs(5);
/// Time for TCP, TLS and login with one server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for all servers, including DNS look-ups.
const CONNECT_ALL_TIMEOUT: Duration = Duration::from_secs(120);
/// After a connection of this length, the pauses start from the shortest one again.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Interval of pings to the broker. Two pings without an answer end the connection. With async-nats' default
/// of 60 s, a device would get no messages for three minutes after a mobile network has dropped the
/// connection.
const PING_INTERVAL: Duration = Duration::from_secs(10);

pub(crate) struct Bus {
    pub(crate) config: Config,
    pub(crate) reporter: StatusReporter,
    pub(crate) device_state: watch::Receiver<DeviceState>,
    /// The queue of changes of the desired state, which the reconciler reads.
    pub(crate) changes: mpsc::Sender<Change>,
    pub(crate) command_handler: Arc<CommandHandler>,
    /// The state of the connection, which the local status shows.
    pub(crate) connection: watch::Sender<Connection>,
    pub(crate) progress: Arc<Progress>,
    /// Limits how often a status is sent, across all connections.
    pub(crate) limiter: RateLimiter,
}

impl Bus {
    /// Connects again and again; never returns.
    pub(crate) async fn run(mut self) {
        let (mut attempts, mut last_error) = (Attempts::default(), String::new());
        loop {
            self.progress.tick(Loop::Bus);
            // The secret is read during the attempt. A later change must end the pause after a refusal.
            let secret = self.config.credentials.modified();
            let connected = timeout(CONNECT_ALL_TIMEOUT, self.connect()).await;
            let connected = connected.unwrap_or_else(|_elapsed| {
                bail!("connect to the bus: no server has answered within {CONNECT_ALL_TIMEOUT:?}")
            });
            let (error, (pause, is_refusal)) = match connected {
                Ok((client, events)) => {
                    let begun = Instant::now();
                    info!(server = client.server_info().server_name, "connected to the bus");
                    last_error.clear();
                    self.connection.send_replace(Connection { connected: true, ..Connection::default() });
                    let reason = self.serve(&client, events).await;
                    if begun.elapsed() >= STABLE_AFTER {
                        attempts = Attempts::default();
                    }
                    warn!("the connection to the bus ended: {reason}");
                    (reason, attempts.failed(None))
                }
                Err(error) => {
                    let pause = attempts.failed(Some(&error));
                    let error = describe_connect_error(&error);
                    // Only a new error is a warning, since a line every two seconds would flood the journal.
                    if error == last_error {
                        debug!("cannot connect to the bus, attempt {}: {error}", attempts.count);
                    } else {
                        warn!("cannot connect to the bus, attempt {}: {error}", attempts.count);
                    }
                    last_error.clone_from(&error);
                    (error, pause)
                }
            };
            self.connection.send_replace(Connection { error: Some(error), ..Connection::default() });
            self.pause(pause, is_refusal.then_some(secret)).await;
        }
    }

    /// Waits before the next attempt to connect. After a refused login, `refused` is the state of the file with the
    /// secret before the login, and the pause ends when the file has changed.
    async fn pause(&self, pause: Duration, refused: Option<Option<(SystemTime, u64)>>) {
        let end = Instant::now() + pause;
        while Instant::now() < end {
            self.progress.tick(Loop::Bus);
            sleep_until(end.min(Instant::now() + SECRET_POLL)).await;
            if refused.is_some_and(|before| self.config.credentials.modified() != before) {
                return;
            }
        }
    }

    async fn connect(&self) -> Result<(Client, mpsc::UnboundedReceiver<Event>)> {
        let (events_tx, events) = mpsc::unbounded_channel();
        // The secret may be on a slow card.
        let credentials = self.config.credentials.clone();
        let login = spawn_blocking(move || credentials.login()).await.context("read the secret")??;
        let mut options = login
            .name(format!("iot-agent {}", self.config.agent.device_id))
            // A broker can restrict each device to the answers below its own prefix.
            .custom_inbox_prefix(format!("_INBOX.{}", self.config.agent.device_id))
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            // Each server is tried once; the loop in `run` makes the later attempts.
            .max_reconnects(Some(self.config.nats.urls.len()))
            // The addresses of discovered servers have no scheme, and the configuration says nothing about them.
            .ignore_discovered_servers()
            .require_tls(self.config.nats.requires_tls())
            .event_callback(move |event| {
                // Sending fails only if the connection has been given up.
                drop(events_tx.send(event));
                std::future::ready(())
            });
        if let Some(ca) = &self.config.nats.ca_file {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((certificate, key)) = self.config.nats.client_certificate() {
            options = options.add_client_certificate(certificate.to_owned(), key.to_owned());
        }
        let client = options.connect(&self.config.nats.urls).await.context("connect to the bus")?;
        Ok((client, events))
    }

    /// Uses the connection until it ends, and returns the reason for the end.
    async fn serve(&mut self, client: &Client, mut events: mpsc::UnboundedReceiver<Event>) -> String {
        let ended = async {
            loop {
                match events.recv().await {
                    Some(Event::Connected) => {}
                    Some(event @ (Event::Disconnected | Event::Closed)) => return event.to_string(),
                    // Examples are a missing permission and a slow consumer. These events do not end the
                    // connection.
                    Some(event) => warn!("bus: {event}"),
                    None => return "the client ended".to_owned(),
                }
            }
        };
        let mut limiter = self.limiter;
        let bus = &*self;
        let reason = tokio::select! {
            reason = ended => reason,
            reason = bus.report(client, &mut limiter) => reason,
            reason = bus.follow(client) => reason,
            reason = bus.answer(client) => reason,
        };
        self.limiter = limiter;
        reason
    }

    /// Returns JetStream in the configured domain.
    pub(crate) fn jetstream(&self, client: &Client) -> jetstream::Context {
        match &self.config.nats.jetstream_domain {
            Some(domain) => jetstream::with_domain(client.clone(), domain),
            None => jetstream::new(client.clone()),
        }
    }

    /// Answers commands. Returns only if it cannot go on, with the reason.
    async fn answer(&self, client: &Client) -> String {
        let subject = command_wildcard(&self.config.agent.device_id);
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

/// Describes a failed attempt to connect. After a boot, the clock of a device without a battery is in the
/// past, so a certificate that is not valid yet gets an explanation.
fn describe_connect_error(error: &anyhow::Error) -> String {
    // The message of an async-nats error contains its causes, so further causes would repeat it.
    let text = error.chain().take(2).map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if ["NotValidYet", "not valid yet"].iter().any(|words| text.contains(words)) {
        return format!(
            "the broker's certificate is not valid yet by this device's clock, which is probably not set; the agent keeps trying ({text})"
        );
    }
    text
}
