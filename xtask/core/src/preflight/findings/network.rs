//! The finding about the services of this host that the guest can reach.

use super::finding::Finding;
use crate::host::facts::Facts;
use crate::host::tools::release;

/// The first kernel whose Landlock has rules about connections (Documentation/userspace-api/landlock.rst, ABI 4).
const CONFINES: (u32, u32) = (6, 7);

/// Returns a finding if this kernel is too old to confine QEMU. Landlock may also be missing in a newer kernel, so the
/// run itself asks the kernel. The report says whether QEMU was confined.
pub(super) fn evaluate(facts: &Facts) -> Option<Finding> {
    let kernel = &facts.host.kernel;
    let sentence = "the guest can connect to every service on this host's loopback, because this kernel cannot confine QEMU";
    let remedy = "use a host with Linux 6.7 or newer; or run no image and no agent that you do not trust";
    let evidence = format!("Linux {kernel}; Landlock confines connections since Linux 6.7");
    (release(kernel) < CONFINES).then(|| Finding::degrades("guest-network", sentence, evidence, remedy))
}
