//! Limits of a disk (virDomainSetBlockIoTune), which the crate virt 0.5 does not wrap.

use anyhow::{Context, Result};
use virt::error::Error;
use xtask_core::error::host_fault;

use super::Machine;

/// The target of the guest's disk in the domain's XML.
const DISK: &std::ffi::CStr = c"vda";

impl Machine {
    /// Limits the writes to the guest's disk, in bytes and in requests per second. 0 means no limit.
    pub(crate) fn limit_writes(&self, bytes: u64, requests: u64) -> Result<()> {
        self.tune(bytes, requests).context("limit the writes to the guest's disk").map_err(|error| {
            let hint = "see the cause, and run again; nothing is known about the agent";
            host_fault(error, "limit the writes to the guest's disk on this libvirt", hint)
        })
    }

    fn tune(&self, bytes: u64, requests: u64) -> Result<()> {
        let (mut params, mut count, mut capacity) = (std::ptr::null_mut(), 0, 0);
        let limits = [
            (virt::sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_BYTES_SEC, bytes),
            (virt::sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC, requests),
        ];
        let added = limits.into_iter().all(|(name, value)| {
            // SAFETY: libvirt allocates the list and copies the name.
            let added = unsafe {
                virt::sys::virTypedParamsAddULLong(
                    &raw mut params,
                    &raw mut count,
                    &raw mut capacity,
                    name.as_ptr(),
                    value,
                )
            };
            added == 0
        });
        let live = virt::sys::VIR_DOMAIN_AFFECT_LIVE;
        // SAFETY: the domain lives as long as `self`, and `params` has `count` entries, which libvirt only reads.
        let tuned = added
            && unsafe {
                virt::sys::virDomainSetBlockIoTune(self.domain.as_ptr(), DISK.as_ptr(), params, count, live)
                    == 0
            };
        let error = (!tuned).then(Error::last_error);
        // SAFETY: libvirt has allocated the list, and nothing uses it any more.
        unsafe { virt::sys::virTypedParamsFree(params, count) };
        error.map_or(Ok(()), |error| Err(error.into()))
    }
}
