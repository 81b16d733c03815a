//! The findings about the services of this host that the guest can reach.

use super::finding::Finding;
use crate::host::facts::Facts;
use crate::host::tools::release;

/// The first kernel whose Landlock has rules about connections (Documentation/userspace-api/landlock.rst, ABI 4).
const CONFINES: (u32, u32) = (6, 7);

pub(super) fn evaluate(facts: &Facts) -> Option<Finding> {
    if facts.host.supervises || facts.is_on_daemon {
        return None;
    }
    unconfined(facts).or_else(|| loopback(facts))
}

/// Returns a finding if a guest with internet access can use services of this host's loopback.
fn loopback(facts: &Facts) -> Option<Finding> {
    let evidence = "QEMU may use these TCP ports and all of UDP, because the guest needs them for the internet. On this host, \
                    cargo xtask cannot decide about single connections: that needs Linux 5.5 or newer, user_notif in \
                    kernel.seccomp.actions_avail, and the right to read QEMU's memory (kernel.yama.ptrace_scope of at \
                    most 1). To close a port, stop its service";
    let sentence = facts.host.loopback_services.sentence()?;
    Some(Finding::informs("loopback-services", sentence, evidence))
}

/// Returns a finding if this kernel is too old for Landlock to confine QEMU, or has no Landlock. The run itself tries
/// Landlock and the supervisor, which a container may forbid. If neither works, it prints a note, and the report has
/// `guest_confined`.
fn unconfined(facts: &Facts) -> Option<Finding> {
    let (kernel, modules) = (&facts.host.kernel, facts.host.security_modules.as_deref());
    let evidence = if release(kernel) < CONFINES {
        format!("Linux {kernel}; Landlock confines connections since Linux 6.7")
    } else {
        let modules = modules?.trim();
        if modules.split(',').any(|module| module == "landlock") {
            return None;
        }
        format!("/sys/kernel/security/lsm names no landlock: {modules}")
    };
    let sentence =
        "the guest can connect to every TCP port of this host, because this kernel cannot confine QEMU";
    let remedy = "use a host with Linux 6.7 or newer and with landlock in its kernel parameter lsm; \
                  or run no image and no agent that you do not trust";
    Some(Finding::degrades("guest-network", sentence, evidence, remedy))
}
