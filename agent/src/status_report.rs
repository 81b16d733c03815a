//! Writes statuses and heartbeats for the bus, and statuses for `iot-agent status` on the device.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use agent_protocol::status::shortened;
use agent_protocol::{DeviceStatus, Heartbeat};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::device_state::{Connection, DeviceState};
use crate::files;
use crate::host::{footprint, uptime_seconds};
use crate::store::Store;

/// Writes the statuses and the heartbeats of this process and numbers them.
#[derive(Debug, Clone)]
pub(crate) struct StatusReporter {
    /// The parts of the status that do not change while the process runs.
    template: DeviceStatus,
    connection: watch::Receiver<Connection>,
    /// The store of the state, on the disk whose free space is reported.
    store: Store,
    sequence: Arc<AtomicU64>,
}

/// The document that `iot-agent status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocalStatus {
    pub(crate) pid: u32,
    pub(crate) bus: Connection,
    /// The status in the form that the bus gets. Its `uptime_seconds` tells when this document was written.
    pub(crate) status: DeviceStatus,
}

impl StatusReporter {
    pub(crate) fn new(template: DeviceStatus, connection: watch::Receiver<Connection>, store: Store) -> Self {
        Self { template, connection, store, sequence: Arc::default() }
    }

    fn status(&self, device_state: &DeviceState, sequence: u64) -> Result<DeviceStatus> {
        let DeviceState { desired_revision, foreign_containers, deployments, events } = device_state.clone();
        Ok(DeviceStatus {
            sequence,
            uptime_seconds: uptime_seconds()?,
            footprint: Some(footprint()?),
            desired_revision,
            following_error: self.connection.borrow().following_error.as_deref().map(shortened),
            foreign_containers,
            disk_free_mib: self.store.free_mib().ok(),
            deployments,
            events,
            ..self.template.clone()
        })
    }

    /// Builds the current status in at most `max_bytes`. Its number is that of the last written document.
    pub(crate) fn current(&self, device_state: &DeviceState, max_bytes: usize) -> Result<DeviceStatus> {
        fit(self.status(device_state, self.sequence.load(Ordering::Relaxed))?, max_bytes)
            .map(|(status, _)| status)
    }

    /// Builds the next status in at most `max_bytes`. Deployments that do not fit are omitted and counted.
    pub(crate) fn write(&self, device_state: &DeviceState, max_bytes: usize) -> Result<Vec<u8>> {
        fit(self.status(device_state, self.next())?, max_bytes).map(|(_, document)| document)
    }

    /// Builds the next heartbeat.
    pub(crate) fn heartbeat(&self, device_state: &DeviceState) -> Result<Vec<u8>> {
        let heartbeat = Heartbeat {
            sequence: self.next(),
            uptime_seconds: uptime_seconds()?,
            desired_revision: device_state.desired_revision,
            ..self.template.clone().into()
        };
        serde_json::to_vec(&heartbeat).context("serialise the heartbeat")
    }

    /// Returns the number of the next document.
    fn next(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Writes the current status for `iot-agent status` to the file `path`, which only its owner can read.
    pub(crate) fn write_local(
        &self,
        device_state: &DeviceState,
        bus: &Connection,
        path: &Path,
    ) -> Result<()> {
        let local = LocalStatus {
            pid: std::process::id(),
            bus: bus.clone(),
            status: self.current(device_state, usize::MAX)?,
        };
        let text = serde_json::to_vec_pretty(&local).context("serialise the local status")?;
        files::replace(path, &text).with_context(|| format!("write the local status {}", path.display()))
    }
}

/// Omits deployments from the end until the document fits.
fn fit(mut status: DeviceStatus, max_bytes: usize) -> Result<(DeviceStatus, Vec<u8>)> {
    loop {
        let document = serde_json::to_vec(&status).context("serialise the status")?;
        if document.len() <= max_bytes || status.deployments.is_empty() {
            return Ok((status, document));
        }
        let keep = status.deployments.len() * max_bytes / (document.len() + 1);
        let keep = keep.min(status.deployments.len() - 1);
        status.deployments_omitted += (status.deployments.len() - keep) as u32;
        status.deployments.truncate(keep);
    }
}

/// Returns the text that `iot-agent status` prints, and whether the agent is running, connected, and
/// follows the desired state.
///
/// # Errors
/// Returns an error if the file at `path` is missing or is no local status.
pub fn describe(path: &Path) -> Result<(String, bool)> {
    let text = fs::read(path).with_context(|| {
        format!(
            "read the local status {}; is the agent running? See systemctl status iot-agent",
            path.display()
        )
    })?;
    let local: LocalStatus = serde_json::from_slice(&text)
        .with_context(|| format!("parse the local status {}", path.display()))?;
    let status = &local.status;
    let alive = Path::new("/proc").join(local.pid.to_string()).exists();
    let age = uptime_seconds()?.saturating_sub(status.uptime_seconds);
    let (device_id, version, pid) = (&status.device_id, &status.agent_version, local.pid);
    let ended = if alive { "" } else { ", which has ended" };
    let mut lines = vec![format!("{device_id} {version}, process {pid}{ended}, {age} s ago")];
    lines.push(match (&local.bus.connected, &local.bus.error) {
        (true, _) => "bus: connected".to_owned(),
        (false, None) => "bus: not connected yet".to_owned(),
        (false, Some(error)) => format!("bus: not connected: {error}"),
    });
    let error = local.bus.following_error.as_ref();
    let followed = error.map_or(String::new(), |error| format!(", not followed: {error}"));
    lines.push(format!("desired state: revision {}{followed}", status.desired_revision));
    for line in &status.deployments {
        let container =
            line.container.as_ref().map_or(String::new(), |c| format!(", container {} {}", c.id, c.state));
        let running =
            line.running_revision.map_or(String::new(), |revision| format!(" of revision {revision}"));
        let missing = line.missing_limits.join(", ");
        let missing = if missing.is_empty() { missing } else { format!(", without its limit of: {missing}") };
        let error = line.last_error.as_ref().map_or(String::new(), |error| format!(": {error}"));
        lines.push(format!(
            "  {} revision {} {}{container}{running}{missing}, {} restarts{error}",
            line.name, line.desired_revision, line.phase, line.restarts
        ));
    }
    if status.foreign_containers > 0 {
        lines.push(format!("containers of others: {}, left alone", status.foreign_containers));
    }
    for event in &status.events {
        lines.push(format!("  {:>8} s  {}", event.uptime_seconds, event.what));
    }
    Ok((lines.join("\n"), alive && local.bus.connected && error.is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::read_status;
    use agent_protocol::status::{DeploymentStatus, Phase};

    fn state_of(count: usize) -> DeviceState {
        let line = |number: usize| DeploymentStatus {
            name: format!("web-{number}"),
            desired_revision: 7,
            phase: Phase::Running,
            container: None,
            running_revision: None,
            missing_limits: Vec::new(),
            downloaded_bytes: None,
            last_error: Some("x".repeat(200)),
            restarts: 0,
        };
        let deployments = (0..count).map(line).collect();
        DeviceState { desired_revision: 7, deployments, ..DeviceState::default() }
    }

    #[test]
    fn a_status_of_too_many_deployments_counts_the_omitted_ones() {
        let (_tx, connection) = watch::channel(Connection::default());
        let reporter =
            StatusReporter::new(read_status("pi-7").unwrap(), connection, Store::new(Path::new("/"), "pi-7"));
        let max_bytes = (1 << 20) - 4096;
        for (count, all) in [(1000, true), (10_000, false)] {
            let document = reporter.write(&state_of(count), max_bytes).unwrap();
            assert!(document.len() <= max_bytes);
            let status: DeviceStatus = serde_json::from_slice(&document).unwrap();
            assert_eq!(status.deployments_omitted == 0, all);
            assert_eq!(status.deployments.len() + status.deployments_omitted as usize, count);
        }
        assert_eq!(
            reporter.current(&state_of(0), usize::MAX).unwrap().sequence,
            2,
            "each document has its own number"
        );
        let heartbeat: Heartbeat =
            serde_json::from_slice(&reporter.heartbeat(&state_of(9)).unwrap()).unwrap();
        let status = reporter.current(&state_of(0), usize::MAX).unwrap();
        assert_eq!((heartbeat.sequence, heartbeat.desired_revision), (3, 7));
        assert_eq!(heartbeat, Heartbeat { uptime_seconds: heartbeat.uptime_seconds, ..status.into() });
    }

    #[test]
    fn the_local_status_is_described() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("status.json");
        assert!(describe(&path).unwrap_err().to_string().contains("is the agent running?"));
        let (tx, connection) = watch::channel(Connection::default());
        let reporter =
            StatusReporter::new(read_status("pi-7").unwrap(), connection, Store::new(Path::new("/"), "pi-7"));
        let away = Connection { error: Some("no route".into()), ..Connection::default() };
        reporter.write_local(&state_of(1), &away, &path).unwrap();
        let (text, healthy) = describe(&path).unwrap();
        assert!(
            !healthy
                && text.contains("bus: not connected: no route")
                && text.contains("web-0 revision 7 running"),
            "{text}"
        );
        let connected = Connection { connected: true, ..Connection::default() };
        reporter.write_local(&state_of(1), &connected, &path).unwrap();
        assert!(describe(&path).unwrap().1);
        let deaf = Connection { following_error: Some("no such bucket".into()), ..connected };
        tx.send_replace(deaf.clone());
        reporter.write_local(&state_of(1), &deaf, &path).unwrap();
        let (text, healthy) = describe(&path).unwrap();
        assert!(!healthy && text.contains("revision 7, not followed: no such bucket"), "{text}");
        let told: DeviceStatus =
            serde_json::from_slice(&reporter.write(&state_of(1), usize::MAX).unwrap()).unwrap();
        assert_eq!(told.following_error.as_deref(), Some("no such bucket"));
    }
}
