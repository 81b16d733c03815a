//! Writes statuses: for the bus, and for `iot-agent status` on the device itself.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::device_state::{Connection, DeviceState};
use crate::host::{Host, uptime_seconds};
use agent_protocol::DeviceStatus;

/// Numbers and writes this process' statuses.
#[derive(Debug, Clone)]
pub struct StatusReporter {
    device_id: String,
    host: Host,
    sequence: Arc<AtomicU64>,
}

/// What `iot-agent status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalStatus {
    /// The agent's process.
    pub pid: u32,
    /// Its connection to the bus.
    pub bus: Connection,
    /// As the bus gets it; its uptime tells when this was written.
    pub status: DeviceStatus,
}

impl StatusReporter {
    /// For this device.
    pub fn new(device_id: &str, host: Host) -> Self {
        Self { device_id: device_id.to_owned(), host, sequence: Arc::default() }
    }

    /// A status of now, with the number `sequence`.
    fn status(&self, device_state: &DeviceState, sequence: u64) -> Result<DeviceStatus> {
        let mut status = self.host.status(&self.device_id, sequence)?;
        status.desired_revision = device_state.desired_revision;
        status.deployments.clone_from(&device_state.deployments);
        status.events.clone_from(&device_state.events);
        Ok(status)
    }

    /// The status of now, without a number of its own, as far as it fits into `longest` bytes.
    ///
    /// # Errors
    /// When procfs cannot be read.
    pub fn current(&self, device_state: &DeviceState, longest: usize) -> Result<DeviceStatus> {
        fit(self.status(device_state, self.sequence.load(Ordering::Relaxed))?, longest)
            .map(|(status, _)| status)
    }

    /// The next status' document, at most `longest` bytes: deployments that do not fit are counted.
    ///
    /// # Errors
    /// When the uptime cannot be read.
    pub fn write(&self, device_state: &DeviceState, longest: usize) -> Result<Vec<u8>> {
        let status = self.status(device_state, self.sequence.fetch_add(1, Ordering::Relaxed) + 1)?;
        fit(status, longest).map(|(_, document)| document)
    }

    /// Writes the local status, beside and renamed; its file is nobody else's to read.
    ///
    /// # Errors
    /// Names the file.
    pub fn write_local(&self, device_state: &DeviceState, bus: &Connection, path: &Path) -> Result<()> {
        let local = LocalStatus {
            pid: std::process::id(),
            bus: bus.clone(),
            status: self.current(device_state, usize::MAX)?,
        };
        let text = serde_json::to_vec_pretty(&local).context("serialise the local status")?;
        let beside = path.with_extension("new");
        let written = || -> std::io::Result<()> {
            let mut file =
                File::options().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
            file.write_all(&text)?;
            fs::rename(&beside, path)
        };
        written().with_context(|| format!("write the local status {}", path.display()))
    }
}

/// Leaves deployments out from the end until it fits.
fn fit(mut status: DeviceStatus, longest: usize) -> Result<(DeviceStatus, Vec<u8>)> {
    loop {
        let document = serde_json::to_vec(&status).context("serialise the status")?;
        if document.len() <= longest || status.deployments.is_empty() {
            return Ok((status, document));
        }
        let keep = status.deployments.len() * longest / (document.len() + 1);
        let keep = keep.min(status.deployments.len() - 1);
        status.deployments_omitted += (status.deployments.len() - keep) as u32;
        status.deployments.truncate(keep);
    }
}

/// What `iot-agent status` prints, and whether the agent is well: alive, and connected.
///
/// # Errors
/// Names the file; says what to do where there is none.
pub fn describe(path: &Path) -> Result<(String, bool)> {
    let text = fs::read(path).with_context(|| {
        format!("read {}; is the agent running? systemctl status iot-agent", path.display())
    })?;
    let local: LocalStatus =
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    let status = &local.status;
    let alive = Path::new("/proc").join(local.pid.to_string()).exists();
    let age = uptime_seconds()?.saturating_sub(status.uptime_seconds);
    let mut lines = vec![format!(
        "{} {}, process {}{}, {age} s ago",
        status.device_id,
        status.agent_version,
        local.pid,
        if alive { "" } else { ", which has ended" },
    )];
    lines.push(match (&local.bus.connected, &local.bus.error) {
        (true, _) => "bus: connected".to_owned(),
        (false, None) => "bus: not connected yet".to_owned(),
        (false, Some(error)) => format!("bus: not connected: {error}"),
    });
    lines.push(format!("desired state: revision {}", status.desired_revision));
    for line in &status.deployments {
        let container =
            line.container.as_ref().map_or(String::new(), |c| format!(", container {} {}", c.id, c.state));
        let error = line.last_error.as_ref().map_or(String::new(), |error| format!(": {error}"));
        let phase = serde_json::to_value(line.phase).context("name a phase")?;
        let phase = phase.as_str().unwrap_or_default();
        lines.push(format!(
            "  {} revision {} {phase}{container}, {} restarts{error}",
            line.name, line.desired_revision, line.restarts
        ));
    }
    for event in &status.events {
        lines.push(format!("  {:>8} s  {}", event.uptime_seconds, event.what));
    }
    Ok((lines.join("\n"), alive && local.bus.connected))
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::status::{DeploymentStatus, Phase};

    fn device_state(count: usize) -> DeviceState {
        let line = |number: usize| DeploymentStatus {
            name: format!("web-{number}"),
            desired_revision: 7,
            phase: Phase::Running,
            container: None,
            last_error: Some("x".repeat(200)),
            restarts: 0,
        };
        DeviceState { desired_revision: 7, deployments: (0..count).map(line).collect(), events: Vec::new() }
    }

    #[test]
    fn a_thousand_deployments_fit_into_a_message_and_ten_thousand_are_counted() {
        let reporter = StatusReporter::new("pi-7", Host::read().unwrap());
        let longest = (1 << 20) - 4096;
        for (count, all) in [(1000, true), (10_000, false)] {
            let document = reporter.write(&device_state(count), longest).unwrap();
            assert!(document.len() <= longest);
            let status: DeviceStatus = serde_json::from_slice(&document).unwrap();
            assert_eq!(status.deployments_omitted == 0, all);
            assert_eq!(status.deployments.len() + status.deployments_omitted as usize, count);
        }
        assert_eq!(
            reporter.current(&device_state(0), usize::MAX).unwrap().sequence,
            2,
            "each document has its number"
        );
    }

    #[test]
    fn the_local_status_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("status.json");
        assert!(describe(&path).unwrap_err().to_string().contains("is the agent running?"));
        let reporter = StatusReporter::new("pi-7", Host::read().unwrap());
        let away = Connection { connected: false, error: Some("no route".into()) };
        reporter.write_local(&device_state(1), &away, &path).unwrap();
        let (text, well) = describe(&path).unwrap();
        assert!(
            !well
                && text.contains("bus: not connected: no route")
                && text.contains("web-0 revision 7 running"),
            "{text}"
        );
        reporter.write_local(&device_state(1), &Connection { connected: true, error: None }, &path).unwrap();
        assert!(describe(&path).unwrap().1);
    }
}
