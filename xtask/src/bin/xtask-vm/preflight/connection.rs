//! The libvirt that `preflight --connect` names: its daemon, what this user may do there, its network and its host.

use anyhow::Result;
use xtask::arch::VmArchitecture;
use xtask::host::findings::Finding;

/// What the libvirt at `uri` offers for guests of `architectures`, judged.
pub(super) fn findings(uri: &str, _architectures: &[VmArchitecture]) -> Result<Vec<Finding>> {
    anyhow::bail!("connect to {uri}: not there yet")
}
