//! The agent at work: the reconciler, the bus, the local status and the watchdog, until it is asked to stop. Containers go on
//! without it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::bus::Bus;
use crate::command_handler::CommandHandler;
use crate::config::Config;
use crate::device_state::{Connection, DeviceState};
use crate::host::Host;
use crate::podman::Podman;
use crate::progress::{Progress, watchdog};
use crate::rate_limiter::RateLimiter;
use crate::reconcile::Reconciler;
use crate::status_report::StatusReporter;

/// Changes that may wait for the reconciler; what is more waits on the bus.
const CHANGE_QUEUE_LENGTH: usize = 256;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Only for what can never work: the host cannot be read, systemd cannot be told. A bus that is
/// away, slow or refuses the login is logged and tried again, for ever, and so is podman.
pub async fn run(config: Config) -> Result<()> {
    let host = Host::read().context("read what this device is")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let progress = Arc::new(Progress::default());
    let (state_tx, device_state) = watch::channel(DeviceState::default());
    let (changes_tx, changes) = mpsc::channel(CHANGE_QUEUE_LENGTH);
    let (connection_tx, connection) = watch::channel(Connection::default());
    let reconciler = Reconciler::begin(&config, &host.boot_id, state_tx, Arc::clone(&progress));
    let reporter = StatusReporter::new(&config.device_id, host.clone());
    let podman = Podman::new(&config.podman_socket);
    let command_handler = Arc::new(CommandHandler::new(
        &config.device_id,
        &host.boot_id,
        reporter.clone(),
        device_state.clone(),
        podman,
    ));
    let bus = Bus {
        config: config.clone(),
        reporter: reporter.clone(),
        device_state: device_state.clone(),
        changes: changes_tx,
        limiter: RateLimiter::default(),
        command_handler,
        connection: connection_tx,
        progress: Arc::clone(&progress),
    };
    info!(device_id = config.device_id, boot_id = host.boot_id, exe_sha256 = host.exe_sha256, "started");
    let reconciling = tokio::spawn(reconciler.run(changes));
    let serving = tokio::spawn(bus.run());
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).context("tell systemd that the agent is ready")?;
    tokio::select! {
        // These end by a panic alone, and a process that lost a half of itself is better started again.
        ended = reconciling => bail!("the reconciler ended: {ended:?}"),
        ended = serving => bail!("the bus' side ended: {ended:?}"),
        () = write_local(&config, &reporter, device_state, connection) => bail!("nothing is left to tell"),
        () = watchdog(&progress) => bail!("the watchdog ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping");
    sd_notify::notify(&[sd_notify::NotifyState::Stopping]).context("tell systemd that the agent stops")
}

/// The local status, on each change and on the heartbeat.
async fn write_local(
    config: &Config,
    reporter: &StatusReporter,
    mut device_state: watch::Receiver<DeviceState>,
    mut connection: watch::Receiver<Connection>,
) {
    let mut heartbeat = interval(Duration::from_secs(config.heartbeat_seconds));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        let (current, bus) =
            (device_state.borrow_and_update().clone(), connection.borrow_and_update().clone());
        match reporter.write_local(&current, &bus, &config.status_file) {
            Ok(()) => failed = false,
            // Once: it is the device's own convenience, and the journal is no place for the same line every 5 s.
            Err(error) if !failed => {
                failed = true;
                warn!("{error:#}");
            }
            Err(_) => {}
        }
        tokio::select! {
            _ = heartbeat.tick() => {}
            changed = device_state.changed() => if changed.is_err() { return },
            changed = connection.changed() => if changed.is_err() { return },
        }
    }
}
