//! Memory limits on a device that cannot enforce them. The firmware of a Raspberry Pi passes
//! `cgroup_disable=memory` to the kernel, which then has no memory controller.

use std::sync::atomic::{AtomicBool, Ordering};

use agent_protocol::ContainerSpec;
use anyhow::Result;

use super::Reconciler;
use crate::config::WithoutMemoryLimits;

/// The error of a document that this device cannot run.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unsupported(pub(super) String);

const REASON: &str = "limits.memory_mib: the device has no memory controller: append cgroup_enable=memory to the kernel's \
                      command line (/boot/firmware/cmdline.txt) and reboot";

#[derive(Debug)]
pub(super) struct Memory {
    policy: WithoutMemoryLimits,
    /// True as soon as podman has named the controller. The kernel keeps it until the next boot.
    is_limited: AtomicBool,
}

impl Memory {
    pub(super) fn new(policy: WithoutMemoryLimits) -> Self {
        Self { policy, is_limited: AtomicBool::new(false) }
    }

    /// Returns whether the container of a document must be made without its memory limit. `controllers` are the
    /// controllers that podman's user has; `None` if podman does not report them.
    fn judge(&self, controllers: Option<&[String]>) -> Result<bool, Unsupported> {
        let is_limited = controllers.is_none_or(|names| names.iter().any(|name| name == "memory"));
        self.is_limited.store(is_limited, Ordering::Relaxed);
        match self.policy {
            _ if is_limited => Ok(false),
            WithoutMemoryLimits::Run => Ok(true),
            WithoutMemoryLimits::Refuse => Err(Unsupported(format!(
                "{REASON}; or allow it with [podman] without_memory_limits = \"run\""
            ))),
        }
    }
}

impl Reconciler {
    /// Returns whether the container of a document must be made without its memory limit.
    ///
    /// # Errors
    /// Returns [`Unsupported`] if the configuration refuses such a document.
    pub(super) async fn must_omit_memory(&self, spec: &ContainerSpec) -> Result<bool> {
        if spec.limits.memory_mib.is_none() || self.memory.is_limited.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // Podman is asked, because containers have only the controllers that systemd delegates to podman's user. The
        // agent's own unit is in another part of the cgroup tree.
        let controllers = self.podman.controllers().await?;
        Ok(self.memory.judge(controllers.as_deref())?)
    }

    pub(super) fn record_omitted_memory(&self, name: &str) {
        self.record(&format!("{name}: its container was made without its memory limit; {REASON}"));
    }

    /// Returns whether a memory limit can be enforced now.
    pub(super) async fn can_limit_memory(&self) -> Result<bool> {
        let controllers = self.podman.controllers().await?;
        Ok(matches!(self.memory.judge(controllers.as_deref()), Ok(false)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_refused_or_omitted() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (with, without) = (names(&["cpu", "memory", "pids"]), names(&["cpu", "pids"]));
        for (policy, controllers, expected) in [
            (WithoutMemoryLimits::Refuse, Some(&with[..]), Some(false)),
            (WithoutMemoryLimits::Run, Some(&with[..]), Some(false)),
            (WithoutMemoryLimits::Refuse, None, Some(false)),
            (WithoutMemoryLimits::Run, Some(&without[..]), Some(true)),
            (WithoutMemoryLimits::Refuse, Some(&without[..]), None),
            (WithoutMemoryLimits::Refuse, Some(&[][..]), None),
        ] {
            let memory = Memory::new(policy);
            let judged = memory.judge(controllers);
            assert_eq!(judged.as_ref().ok(), expected.as_ref(), "{policy:?} {controllers:?}");
            assert_eq!(memory.is_limited.load(Ordering::Relaxed), expected == Some(false));
            if let Err(error) = judged {
                assert!(error.to_string().contains("append cgroup_enable=memory"), "{error}");
            }
        }
    }
}
