//! The agent at work: connect for ever, report on a heartbeat and after each connect, answer commands, stop
//! when asked.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::{self, kv};
use async_nats::{Client, ConnectOptions, Event, Message, Subscriber};
use futures_util::StreamExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use crate::config::{Config, Credentials};
use crate::host::Host;
use crate::protocol::{self, Reply};

/// The longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// How long one status may take to be stored before the next attempt; a Pi's bus may be a slow mobile link.
const PUT_LIMIT: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Only for what can never work: the host cannot be read, the configuration cannot make a client. A bus that is
/// away, slow or refuses the login is logged and tried again, for ever.
pub async fn run(config: Config) -> Result<()> {
    let host = Host::read().context("read what this device is")?;
    let (connected_tx, mut connected) = mpsc::unbounded_channel();
    let client = connect(&config, connected_tx).await?;
    let mut commands = client
        .subscribe(protocol::command_wildcard(&config.device_id))
        .await
        .context("subscribe to the device's commands")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut heartbeat = interval(Duration::from_secs(config.heartbeat_seconds));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);

    // Of its own: a store that hangs must hold up neither an answer to a command nor a shutdown.
    let due = Arc::new(Notify::new());
    let reporter = Reporter {
        client: client.clone(),
        device_id: config.device_id.clone(),
        host: host.clone(),
        sequence: 0,
        bucket: None,
    };
    let reporting = tokio::spawn(reporter.report_whenever(Arc::clone(&due)));
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).context("tell systemd that the agent is ready")?;
    info!(device_id = config.device_id, boot_id = host.boot_id, exe_sha256 = host.exe_sha256, "started");
    loop {
        tokio::select! {
            _ = heartbeat.tick() => due.notify_one(),
            Some(()) = connected.recv() => {
                due.notify_one();
                heartbeat.reset();
            }
            message = commands.next() => match message {
                Some(message) => answer(&client, &config, &host, message).await,
                None => commands = resubscribe(&client, &config).await?,
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    info!("stopping");
    reporting.abort();
    sd_notify::notify(&[sd_notify::NotifyState::Stopping]).context("tell systemd that the agent stops")?;
    // A bus that is away must not hold up a shutdown.
    if timeout(Duration::from_secs(2), client.flush()).await.is_err() {
        warn!("the bus did not take the last messages in time");
    }
    Ok(())
}

async fn connect(config: &Config, connected: mpsc::UnboundedSender<()>) -> Result<Client> {
    let Credentials::TomlShared { username, password } = &config.credentials;
    ConnectOptions::with_user_and_password(username.clone(), password.clone())
        .name(format!("iot-agent {}", config.device_id))
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_pause)
        .event_callback(move |event| {
            match &event {
                // The receiver lives as long as the loop does; at shutdown nobody needs the event.
                Event::Connected => drop(connected.send(())),
                _ => warn!(%event, "bus"),
            }
            std::future::ready(())
        })
        .connect(&config.urls)
        .await
        .context("make the bus client")
}

/// Doubling from a quarter of a second up to [`LONGEST_PAUSE`], minus up to half at random so that a fleet
/// does not come back as one after the broker's restart.
fn reconnect_pause(attempts: usize) -> Duration {
    if attempts == 0 {
        return Duration::ZERO;
    }
    let full = Duration::from_millis(250 << attempts.min(6)).min(LONGEST_PAUSE);
    // A fresh RandomState is keyed at random by the standard library; no generator of our own is needed.
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), attempts) as u32;
    full - full.mul_f64(0.5 * f64::from(random) / f64::from(u32::MAX))
}

async fn resubscribe(client: &Client, config: &Config) -> Result<Subscriber> {
    client
        .subscribe(protocol::command_wildcard(&config.device_id))
        .await
        .context("subscribe to the device's commands again")
}

/// Writes statuses, and remembers the number of the last one.
struct Reporter {
    client: Client,
    device_id: String,
    host: Host,
    sequence: u64,
    /// Kept over reconnects: it names a bucket, not a connection.
    bucket: Option<kv::Store>,
}

impl Reporter {
    /// A status whenever one is due; those that come due meanwhile are one.
    async fn report_whenever(mut self, due: Arc<Notify>) {
        loop {
            due.notified().await;
            self.report().await;
        }
    }

    async fn report(&mut self) {
        match timeout(PUT_LIMIT, self.put()).await {
            Ok(Ok(revision)) => tracing::debug!(revision, sequence = self.sequence, "status stored"),
            Ok(Err(error)) => warn!("status {} not stored: {error:#}", self.sequence),
            Err(_elapsed) => warn!("status {} not stored within {PUT_LIMIT:?}", self.sequence),
        }
    }

    async fn put(&mut self) -> Result<u64> {
        self.sequence += 1;
        let status = self.host.status(&self.device_id, self.sequence)?;
        let document = serde_json::to_vec(&status).context("serialise the status")?;
        let bucket = match self.bucket.take() {
            Some(bucket) => bucket,
            // The fleet makes the bucket; a device has no right to.
            None => jetstream::new(self.client.clone())
                .get_key_value(protocol::STATUS_BUCKET)
                .await
                .with_context(|| format!("open the bucket {}", protocol::STATUS_BUCKET))?,
        };
        let revision = bucket
            .put(&self.device_id, document.into())
            .await
            .with_context(|| format!("put the status into {}", protocol::STATUS_BUCKET))?;
        self.bucket = Some(bucket);
        Ok(revision)
    }
}

async fn answer(client: &Client, config: &Config, host: &Host, message: Message) {
    let Some(inbox) = message.reply else {
        warn!(subject = %message.subject, "a command without a reply subject is dropped");
        return;
    };
    let prefix = protocol::command_subject(&config.device_id, "");
    let reply = match message.subject.strip_prefix(&prefix) {
        Some("ping") => Reply::Pong {
            device_id: config.device_id.clone(),
            boot_id: host.boot_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        other => Reply::UnknownCommand {
            command: other.unwrap_or(&message.subject).to_owned(),
            known: vec!["ping".to_owned()],
        },
    };
    let document = serde_json::to_vec(&reply).expect("a reply is plain data");
    if let Err(error) = client.publish(inbox, document.into()).await {
        warn!("reply to {} not sent: {error:#}", message.subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reconnect_pause_grows_and_never_passes_its_bound() {
        assert_eq!(reconnect_pause(0), Duration::ZERO);
        for attempts in 1..100 {
            let pause = reconnect_pause(attempts);
            assert!(pause <= LONGEST_PAUSE, "{attempts}: {pause:?}");
            assert!(pause >= Duration::from_millis(250), "{attempts}: {pause:?}");
        }
        assert!((0..20).map(|_| reconnect_pause(5)).collect::<std::collections::HashSet<_>>().len() > 1);
    }
}
