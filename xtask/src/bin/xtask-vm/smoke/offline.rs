//! The diagnosis of a workload that does not come back after the power cut. The guest is asked for the reason, and
//! whether the workload can still start.

use std::time::Instant;

use agent_protocol::DeviceStatus;
use anyhow::{Result, bail};
use xtask_core::bail_guest;
use xtask_core::limits;

use super::running::RunningVm;

/// The advice if the agent's process does not start.
const BEFORE_START: &str = "the agent must start without the bus: guest.txt has the unit with its drop-in files, its \
    state and systemd's jobs";
/// The advice if the agent runs without the desired state that it had acknowledged.
const LOST_STATE: &str = "the desired state must be on the disk before the agent acknowledges it, and nothing else may \
    replace the state's files";

/// The state of a wait for the workload after the power cut.
#[derive(Default)]
pub(super) struct OfflineRecovery {
    /// The revision of the desired state that the agent had acknowledged before the power cut.
    acknowledged: u64,
    /// The time at which the wait began.
    begun: Option<Instant>,
    /// The time at which the console first had a prompt, or at which it should have had one.
    prompted: Option<Instant>,
    /// The time of root's first answer. The service that answers starts with the same target as the agent.
    up: Option<Instant>,
    /// The time at which the guest was last asked.
    asked: Option<Instant>,
    /// The number of consecutive answers in which the agent knew of no such deployment.
    unknown: u32,
}

impl OfflineRecovery {
    /// Returns a wait that has not begun.
    pub(super) fn of(acknowledged: u64) -> Self {
        Self { acknowledged, ..Self::default() }
    }
}

impl RunningVm {
    /// Asks the guest at intervals why the workload does not run. Returns a failure of the guest in two cases, in which
    /// the workload will never run: the agent runs and does not know the deployment, or the agent does not run long
    /// after the rest of the guest is up.
    pub(super) fn check_workload(&mut self, deployment: &str, waited: &mut OfflineRecovery) -> Result<()> {
        // A guest whose console has no prompt may be up all the same.
        let begun = waited.begun.get_or_insert_with(Instant::now).elapsed();
        if !self.can_be_entered() && begun <= self.plan.limits.login_prompt() {
            return Ok(());
        }
        let prompted = waited.prompted.get_or_insert_with(Instant::now).elapsed();
        // Each question costs an emulated guest seconds in which it starts nothing else. Pauses between the questions
        // therefore keep them from delaying a workload that is only slow.
        if waited
            .asked
            .map_or(prompted <= limits::OFFLINE_RECOVERY, |asked| asked.elapsed() <= limits::GUEST_QUESTION)
        {
            return Ok(());
        }
        let Some(view) = self.look()? else { return Ok(()) };
        waited.asked = Some(Instant::now());
        let up = waited.up.get_or_insert_with(Instant::now).elapsed();
        view.unit.check()?;
        super::observed::check_system(&view)?;
        let late = up > self.plan.limits.agent_after_boot();
        let (reason, hint, hopeless) = match view.unit.active.as_str() {
            "active" => {
                let (reason, unknown) = local_reason(&view.local_status, deployment, waited.acknowledged);
                waited.unknown = if unknown { waited.unknown + 1 } else { 0 };
                // The agent may write its first status before it first reads its disk.
                (reason, LOST_STATE, waited.unknown > 1)
            }
            other => {
                let reason = format!("iot-agent.service is {other}: it waits for something before it starts");
                (reason, BEFORE_START, late)
            }
        };
        if !hopeless {
            bail!("{reason}");
        }
        bail_guest!(
            "without a broker, the workload did not run within {} s after the guest was up: {reason}",
            up.as_secs();
            "{hint}"
        )
    }
}

/// Returns what the agent's status on the device (`/run/iot-agent/status.json`) says of a deployment, and whether the
/// deployment will never run. If an agent without a bus does not know a deployment, or has an older desired state than it
/// had acknowledged, it has not stored the change.
fn local_reason(text: &str, deployment: &str, acknowledged: u64) -> (String, bool) {
    #[derive(serde::Deserialize)]
    struct Local {
        status: DeviceStatus,
    }
    let Ok(Local { status }) = serde_json::from_str(text) else {
        return (format!("its agent has written no status on the device: {text:?}"), false);
    };
    // Revision 0 means that the agent has no desired state at all.
    let revision = status.desired_revision;
    if (1..acknowledged).contains(&revision) {
        let reason = format!(
            "its agent has the desired state of revision {revision}, and had acknowledged the revision {acknowledged} \
             before the power cut"
        );
        return (reason, true);
    }
    let Some(line) = status.deployment(deployment) else {
        let reason = "the desired state did not survive the power cut";
        return (format!("its agent knows of no deployment {deployment}: {reason}"), true);
    };
    let phase = super::deployed::word(line.phase);
    let error = line.last_error.as_ref().map_or(String::new(), |error| format!(", {error}"));
    (format!("its agent reports {deployment}: {phase}{error}"), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agent_that_has_looked_and_knows_nothing_is_hopeless() {
        let local = |revision: u64, deployments: &str| {
            format!(
                r#"{{"pid":1,"bus":{{}},"status":{{"schema":1,"device_id":"d","agent_version":"0","exe_sha256":"","boot_id":"",
                "machine":"","os_release":{{"id":"","version_id":""}},"kernel":"","uptime_seconds":1,"sequence":1,
                "desired_revision":{revision},"deployments":[{deployments}]}}}}"#
            )
        };
        let line = r#"{"name":"persistent","desired_revision":3,"phase":"backing-off","container":null,
            "last_error":"podman is away","restarts":0}"#;
        let table = [
            (String::new(), "no status on the device", false),
            (local(0, ""), "knows of no deployment persistent", true),
            (local(3, ""), "knows of no deployment persistent", true),
            // An older state that lacks the deployment, too.
            (local(2, ""), "had acknowledged the revision 3", true),
            (local(3, line), "reports persistent: backing-off, podman is away", false),
            (local(2, line), "had acknowledged the revision 3", true),
        ];
        for (text, words, hopeless) in table {
            let (reason, found) = local_reason(&text, "persistent", 3);
            assert!(reason.contains(words), "{reason}");
            assert_eq!(found, hopeless, "{reason}");
        }
    }
}
