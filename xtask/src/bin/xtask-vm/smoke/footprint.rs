//! The resources that the agent uses, as it reports them. They are part of each report; with `--rest`, the report also
//! has the processor time of an idle agent.

use std::time::{Duration, Instant};

use agent_protocol::{Footprint, Reply};
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
    let then = current(vm)?;
    let end = Instant::now() + rest;
    let mut looked = Instant::now();
    vm.wait("the end of the time for which the agent is left alone", |vm| {
        vm.check_guest(&mut looked)?;
        Ok((Instant::now() >= end).then_some(()))
    })?;
    let now = current(vm)?;
    if let (Some(then), Some(now), Some(footprint)) = (then, now, &mut proof.evidence.footprint) {
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

/// Returns the footprint in the agent's answer to the command `status`. An idle agent stores a status only every ten
/// minutes.
fn current(vm: &mut RunningVm) -> Result<Option<Footprint>> {
    let deadline = vm.deadline.within(vm.plan.limits.ping());
    vm.wait_until(deadline, "the agent's status as the answer to a command", |vm| {
        match vm.broker.command("status", Vec::new())? {
            Reply::Status { status } => Ok(Some(status.footprint)),
            _ => Ok(None),
        }
    })
}
