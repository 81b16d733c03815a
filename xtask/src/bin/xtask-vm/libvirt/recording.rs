//! The recording of all writes to a guest's disk, by QEMU's block filter blklogwrites. The filter is inserted at run time
//! over QMP, so the domain's XML has no trace of it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask_core::error::host_fault;
use xtask_core::fs::write_private;

use super::Machine;

/// The path of the guest's disk in QEMU's object tree.
pub(super) const DISK: &str = "/machine/peripheral/virtio-disk0";
/// The names of the nodes of the log and of the filter.
const LOG_NODE: &str = "iot-xtask-log";
const FILTER_NODE: &str = "iot-xtask-filter";

impl Machine {
    /// Records all writes to the guest's disk from now on in the file `log`, in the format of the kernel's dm-log-writes
    /// (Linux, Documentation/admin-guide/device-mapper/log-writes.rst) with sectors of 512 bytes. QEMU logs a write when
    /// it is complete, and the number of entries in the log's superblock is up to date after each entry.
    ///
    /// # Errors
    /// Returns a failure of the host if QEMU lacks the filter or refuses it.
    pub(crate) fn record_writes(&self, log: &Path) -> Result<()> {
        self.insert_filter(log).map_err(|error| {
            let hint = "QEMU must have the block driver blklogwrites (Debian's and Ubuntu's have it), and a disk \
                        virtio-disk0; nothing is known about the agent";
            host_fault(error, "record the writes to the guest's disk", hint)
        })
    }

    fn insert_filter(&self, log: &Path) -> Result<()> {
        write_private(log, "")?;
        let log_node = json!({
            "driver": "file", "node-name": LOG_NODE, "filename": log,
            // The log must outlive QEMU, not the host. Without this, QEMU would sync the file after each write.
            "cache": { "direct": false, "no-flush": true },
        });
        self.qmp("blockdev-add", &log_node)?;
        let blocks = self.qmp("query-block", &json!({}))?;
        let disk = disk_node(&blocks).context("QEMU has no disk virtio-disk0")?;
        let filter = json!({
            "driver": "blklogwrites", "node-name": FILTER_NODE, "file": disk, "log": LOG_NODE,
            "log-sector-size": 512, "log-super-update-interval": 1,
        });
        self.qmp("blockdev-add", &filter)?;
        let property = json!({ "path": DISK, "property": "drive", "value": FILTER_NODE });
        self.qmp("qom-set", &property)?;
        let blocks = self.qmp("query-block", &json!({}))?;
        let found = disk_node(&blocks);
        ensure!(found == Some(FILTER_NODE), "the disk's node is {found:?} after the change");
        Ok(())
    }
}

/// Returns the name of the block node that the guest's disk uses, from QEMU's answer to query-block.
pub(super) fn disk_node(blocks: &Value) -> Option<&str> {
    let is_disk = |block: &&Value| block["qdev"].as_str().is_some_and(|qdev| qdev.starts_with(DISK));
    blocks.as_array()?.iter().find(is_disk)?["inserted"]["node-name"].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_of_the_disk_is_found_among_all_disks() {
        let block = |disk: u32, node: &str| {
            let qdev = format!("/machine/peripheral/virtio-disk{disk}/virtio-backend");
            json!({ "qdev": qdev, "inserted": { "node-name": node } })
        };
        let blocks =
            json!([block(1, "libvirt-2-format"), block(0, "libvirt-3-format"), { "device": "floppy0" }]);
        assert_eq!(disk_node(&blocks), Some("libvirt-3-format"));
        assert_eq!(disk_node(&json!([block(1, "libvirt-2-format")])), None);
    }
}
