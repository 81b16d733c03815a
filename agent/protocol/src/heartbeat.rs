//! The heartbeat: a small document that shows between two statuses that the device is alive and connected.

use serde::{Deserialize, Serialize};

use super::DeviceStatus;

/// A heartbeat of a device. A device stores one under [`super::heartbeat_key`] at an interval. The fields have the
/// meaning of those of [`DeviceStatus`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The value of [`super::STATUS_SCHEMA`].
    pub schema: u32,
    pub device_id: String,
    pub boot_id: String,
    pub exe_sha256: String,
    pub uptime_seconds: u64,
    /// The number of this document. Heartbeats and statuses are counted together.
    pub sequence: u64,
    pub desired_revision: u64,
}

impl From<DeviceStatus> for Heartbeat {
    fn from(status: DeviceStatus) -> Self {
        let DeviceStatus { schema, device_id, boot_id, exe_sha256, .. } = status;
        let DeviceStatus { uptime_seconds, sequence, desired_revision, .. } = status;
        Self { schema, device_id, boot_id, exe_sha256, uptime_seconds, sequence, desired_revision }
    }
}
