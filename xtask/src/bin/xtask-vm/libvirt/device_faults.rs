//! Faults of a guest's devices, over QEMU's monitor: the link of its network card, and an error of its disk. The domain's
//! XML has no trace of them.

use anyhow::{Context, Result};
use serde_json::json;

use super::Machine;
use super::recording::{DISK, disk_node};

/// The name of the guest's network card in QEMU.
const CARD: &str = "net0";
/// The name of the block node that fails a request.
const ERROR_NODE: &str = "iot-xtask-error";
/// The number of the error EIO.
const EIO: i32 = 5;

impl Machine {
    /// Connects the guest's network card with its network, or takes the cable out.
    pub(crate) fn set_link(&self, is_up: bool) -> Result<()> {
        let arguments = json!({ "name": CARD, "up": is_up });
        self.qmp("set_link", &arguments).map(drop).context("change the link of the guest's network card")
    }

    /// Lets the next write to the guest's disk fail with EIO. Later requests succeed again.
    pub(crate) fn fail_next_write(&self) -> Result<()> {
        let blocks = self.qmp("query-block", &json!({}))?;
        let disk = disk_node(&blocks).context("QEMU has no disk virtio-disk0")?;
        let filter = json!({
            "driver": "blkdebug", "node-name": ERROR_NODE, "image": disk,
            "inject-error": [{ "event": "none", "iotype": "write", "errno": EIO, "once": true }],
        });
        self.qmp("blockdev-add", &filter).context("make a disk that fails one write")?;
        let property = json!({ "path": DISK, "property": "drive", "value": ERROR_NODE });
        self.qmp("qom-set", &property).map(drop).context("let the next write to the guest's disk fail")
    }
}
