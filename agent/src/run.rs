//! Runs the reconciler, the bus client, the local status and the watchdog until SIGTERM or SIGINT. Containers
//! outlive the agent.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::bus::Bus;
use crate::command_handler::CommandHandler;
use crate::config::Config;
use crate::device_state::{Connection, DeviceState};
use crate::host::{self, DeviceIdentity};
use crate::podman::Podman;
use crate::progress::{Progress, watchdog};
use crate::rate_limiter::RateLimiter;
use crate::reconcile::Reconciler;
use crate::status_report::StatusReporter;
use crate::store::Store;

/// Upper bound for the changes of the desired state that wait for the reconciler. Further changes wait on the
/// bus.
const CHANGE_QUEUE_LENGTH: usize = 256;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Returns an error only for failures that no retry can repair: the host cannot be read, systemd cannot be
/// notified, or a task has panicked. If the bus or podman is away, slow or refuses a request, the agent logs
/// that and keeps trying.
pub async fn run(config: Config) -> Result<()> {
    let status = host::read_status(&config.agent.device_id).context("read the facts about this device")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let progress = Arc::new(Progress::default());
    let (state_tx, state) = watch::channel(DeviceState::default());
    let (changes_tx, changes) = mpsc::channel(CHANGE_QUEUE_LENGTH);
    let (connection_tx, connection) = watch::channel(Connection::default());
    let device =
        DeviceIdentity { device_id: config.agent.device_id.clone(), boot_id: status.boot_id.clone() };
    info!(
        device_id = config.agent.device_id,
        boot_id = status.boot_id,
        exe_sha256 = status.exe_sha256,
        "started"
    );
    let store = Store::new(&config.agent.state_directory, &config.agent.device_id);
    let _lock = store.lock()?;
    let reporter = StatusReporter::new(status, connection.clone(), store);
    let reconciler = Reconciler::new(&config, device.clone(), state_tx, Arc::clone(&progress));
    let podman = Podman::new(&config.podman.socket);
    let bus = Bus {
        config: config.clone(),
        reporter: reporter.clone(),
        device_state: state.clone(),
        changes: changes_tx,
        limiter: RateLimiter::default(),
        command_handler: CommandHandler::new(device, reporter.clone(), state.clone(), podman).into(),
        connection: connection_tx,
        progress: Arc::clone(&progress),
    };
    let reconciling = tokio::spawn(reconciler.run(changes));
    let serving = tokio::spawn(bus.run());
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).context("notify systemd that the agent is ready")?;
    tokio::select! {
        // These tasks end only by a panic. The process then ends too, and systemd starts it again with all
        // tasks.
        ended = reconciling => bail!("the reconciler ended: {ended:?}"),
        ended = serving => bail!("the bus client ended: {ended:?}"),
        () = write_local(&config, &reporter, state, connection) => bail!("the device state is no longer updated"),
        () = watchdog(&progress) => bail!("the watchdog ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping");
    sd_notify::notify(&[sd_notify::NotifyState::Stopping]).context("notify systemd that the agent stops")
}

/// Writes the local status on each change and on each heartbeat. The file may be on a slow card, so a thread of its own
/// writes it.
async fn write_local(
    config: &Config,
    reporter: &StatusReporter,
    mut state: watch::Receiver<DeviceState>,
    mut connection: watch::Receiver<Connection>,
) {
    let mut heartbeat = interval(Duration::from_secs(config.agent.heartbeat_seconds));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        let (current, bus) = (state.borrow_and_update().clone(), connection.borrow_and_update().clone());
        let (reporter, path) = (reporter.clone(), config.agent.status_file.clone());
        let written = spawn_blocking(move || reporter.write_local(&current, &bus, &path)).await;
        match written.context("write the local status").flatten() {
            Ok(()) => failed = false,
            // The error is logged once, since the same line at each heartbeat would flood the journal.
            Err(error) if !failed => {
                failed = true;
                warn!("{error:#}");
            }
            Err(_) => {}
        }
        tokio::select! {
            _ = heartbeat.tick() => {}
            changed = state.changed() => if changed.is_err() { return },
            changed = connection.changed() => if changed.is_err() { return },
        }
    }
}
