//! The resources that the agent uses, as it reports them. They are part of each report; with `--rest`, the report also
//! has the processor time of an idle agent.

use std::time::Duration;

use agent_protocol::Footprint;
use anyhow::Result;
use xtask_core::bail_guest;
use xtask_core::build::Agent;
use xtask_core::report::FootprintEvidence;

use xtask_fleet::ReceivedStatus;

use super::proof::Proof;
use super::running::RunningVm;
use crate::guest::watch::Deadline;

/// Returns the footprint in the first status that was received.
pub(super) fn first(agent: &Agent, seen: &ReceivedStatus) -> Option<FootprintEvidence> {
    let footprint = seen.status.footprint?;
    Some(FootprintEvidence {
        executable_bytes: agent.content.len() as u64,
        resident_kib: footprint.resident_kib,
        // Only the first status shows the time to the first status.
        first_status_milliseconds: (seen.status.sequence == 1).then_some(footprint.age_milliseconds),
        rest_milliseconds: 0,
        rest_cpu_milliseconds: 0,
    })
}

/// Leaves the agent idle for the given number of seconds, and adds the processor time that it used meanwhile to the
/// evidence. Returns at once if `seconds` is 0.
pub(super) fn rest(vm: &mut RunningVm, seconds: u64, proof: &mut Proof<'_>) -> Result<()> {
    if seconds == 0 {
        return Ok(());
    }
    let rest = Duration::from_secs(seconds);
    vm.deadline = Deadline::after(rest + vm.plan.limits.join());
    vm.ui.detail(&format!("the agent is left alone for {seconds} s"));
    let mut begun: Option<Footprint> = None;
    let mut rested = None;
    vm.wait_for_status("a status after the agent was left alone", |seen| {
        let Some(now) = seen.status.footprint else { return Ok(false) };
        let then = *begun.get_or_insert(now);
        let age = now.age_milliseconds.saturating_sub(then.age_milliseconds);
        if u128::from(age) < rest.as_millis() {
            return Ok(false);
        }
        rested = Some((then, now));
        Ok(true)
    })?;
    if let (Some((then, now)), Some(footprint)) = (rested, &mut proof.evidence.footprint) {
        let spent = (
            now.age_milliseconds.checked_sub(then.age_milliseconds),
            now.cpu_milliseconds.checked_sub(then.cpu_milliseconds),
        );
        let (Some(age), Some(cpu)) = spent else {
            bail_guest!(
                "the agent has started again by itself while it was left alone";
                "read the agent's journal in the report's directory for why it started again"
            );
        };
        (footprint.resident_kib, footprint.rest_milliseconds, footprint.rest_cpu_milliseconds) =
            (now.resident_kib, age, cpu);
    }
    Ok(())
}
