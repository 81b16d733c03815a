//! The checks that a device follows the desired state of the fleet. The phases of the smoke share them. A broken agent
//! cannot forge the evidence: revisions that the broker counts, digests and boot ids that must agree, and the answer of
//! the workload from inside its container.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use agent_protocol::{LogsRequest, Reply};
use anyhow::{Context, Error, Result, anyhow};
use xtask_core::build::Agent;
use xtask_core::image::Image;
use xtask_core::limits;
use xtask_core::report::{Evidence, StatusEvidence, WorkloadEvidence};
use xtask_core::{bail_guest, bail_host};
use xtask_fleet::ReceivedStatus;

use super::answer::is_slow;
use super::deployed::{ExpectedAnswer, ExpectedDeployment, FIND_LISTENER};
use super::disturbance::PlannedDisturbance;
use super::observed::{ExpectedView, check_unchanged};
use super::offline::OfflineRecovery;
use super::running::RunningVm;
use super::verify::{self, ExpectedStatus};
use crate::guest::root::RootView;
use crate::guest::watch::Deadline;

/// A deployment that is or was in the desired state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deployed {
    pub(super) name: &'static str,
    /// The port of the guest on which the deployment is published.
    pub(super) port: u16,
}

/// An observation that has begun: the fleet changes nothing, and the device must change nothing either.
pub(super) struct Observation<'a> {
    boot_id: &'a str,
    running: &'a [Deployed],
    deleted: &'a [Deployed],
    /// The state of the guest at the beginning.
    first: RootView,
    /// The end of the observation.
    until: Instant,
    /// The status at the beginning.
    status: ReceivedStatus,
}

/// The expectations for one device, and the evidence that was collected so far.
pub(super) struct Proof<'a> {
    agent: &'a Agent,
    pub(super) device_id: String,
    expected: ExpectedStatus,
    /// The evidence for the report.
    pub(super) evidence: Evidence,
    /// The status with which the device joined; `None` before it joined.
    pub(super) joined: Option<ReceivedStatus>,
    /// The first answer of the deployment that is deleted and added again; `None` before it.
    pub(super) ephemeral: Option<WorkloadEvidence>,
    /// The revision of the desired state that the agent has acknowledged before the power cut.
    acknowledged: u64,
    /// The number of times that the faults of this run may make systemd restart the agent in one boot.
    pub(super) allowed_restarts: u32,
}

impl<'a> Proof<'a> {
    /// Returns the expectations for this agent on this image, without evidence.
    pub(super) fn new(agent: &'a Agent, image: &Image, device_id: String) -> Self {
        let expected = ExpectedStatus::new(agent, image);
        Self {
            agent,
            device_id,
            expected,
            evidence: Evidence::default(),
            joined: None,
            ephemeral: None,
            acknowledged: 0,
            allowed_restarts: 0,
        }
    }

    /// Returns the digest of the executable under test.
    pub(super) fn tested_digest(&self) -> &str {
        &self.agent.sha256
    }

    /// Waits for a status of the executable under test on the requested machine.
    pub(super) fn join(&mut self, vm: &mut RunningVm) -> Result<StatusEvidence> {
        let expected = &self.expected;
        let seen = vm.wait_for_status("the agent's first status", |seen| verify::join(seen, expected))?;
        let evidence = verify::evidence(&seen);
        self.evidence.join = Some(evidence.clone());
        self.evidence.footprint = super::footprint::first(self.agent, &seen);
        self.joined = Some(seen);
        Ok(evidence)
    }

    /// Waits for a status that only a new boot of the same executable can have written after `last`. The check does
    /// not use the guest's clock.
    pub(super) fn rejoin(
        &mut self,
        vm: &mut RunningVm,
        joined: &StatusEvidence,
        last: &ReceivedStatus,
    ) -> Result<StatusEvidence> {
        let evidence = self.comes_back(vm, joined, last)?;
        self.evidence.rejoin = Some(evidence.clone());
        Ok(evidence)
    }

    /// Waits like [`Self::rejoin`], and records no evidence.
    pub(super) fn comes_back(
        &self,
        vm: &mut RunningVm,
        joined: &StatusEvidence,
        last: &ReceivedStatus,
    ) -> Result<StatusEvidence> {
        let seen = vm.wait_for_status("a status of the new boot", |seen| {
            verify::rejoin(seen, &self.expected, joined, last)
        })?;
        Ok(verify::evidence(&seen))
    }

    /// Waits for a status that was stored after `last`. The agent must reconnect without a restart, which
    /// [`Self::agrees`] checks later.
    pub(super) fn reconnects(&self, vm: &mut RunningVm, last: &ReceivedStatus) -> Result<()> {
        let mut looked = Instant::now();
        let deadline = vm.deadline.within(vm.plan.limits.removal());
        vm.wait_until(deadline, "a status after the restart of the broker", |vm| {
            if let Some(seen) = vm.broker.latest()?.filter(|seen| seen.revision > last.revision) {
                verify::continues(last, &seen)?;
                return Ok(Some(()));
            }
            vm.check_guest(&mut looked).map(|()| None)
        })
    }

    /// Waits until the broker has stored a heartbeat of the agent after the entry `revision`.
    pub(super) fn is_heard(&self, vm: &mut RunningVm, revision: u64) -> Result<()> {
        vm.wait("a heartbeat of the agent", |vm| {
            Ok(vm.broker.latest_heartbeat()?.filter(|beat| beat.revision > revision).map(drop))
        })
    }

    /// Checks for some time that the agent does not acknowledge the desired state of `revision`. Meanwhile, the disk
    /// completes no writes.
    pub(super) fn acknowledges_nothing(&self, vm: &mut RunningVm, revision: u64) -> Result<()> {
        let until = Instant::now() + vm.plan.limits.held_writes();
        vm.wait("the end of the hold of the disk's writes", |vm| {
            if Instant::now() >= until {
                return Ok(Some(()));
            }
            // An agent that waits for its disk may not answer meanwhile.
            let acknowledged = acknowledged(vm).ok().flatten();
            if acknowledged.is_some_and(|acknowledged| acknowledged >= revision) {
                bail_guest!(
                    "the agent acknowledged the revision {revision} before the desired state was on its disk, which had \
                     completed at most one write since the change";
                    "the agent must sync the file of its state and its directory (fsync) before it reports the revision"
                );
            }
            Ok(None)
        })
    }

    /// Waits until the agent says that it has stored the desired state of `revision`. Returns within milliseconds of
    /// the answer, before podman has completed the agent's next request.
    pub(super) fn acknowledges(&mut self, vm: &mut RunningVm, revision: u64) -> Result<()> {
        self.acknowledged = revision;
        vm.wait(&format!("the agent to acknowledge the revision {revision}"), |vm| {
            let until = Instant::now() + limits::POLL;
            while Instant::now() < until {
                if acknowledged(vm)?.is_some_and(|acknowledged| acknowledged >= revision) {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })
    }

    /// Waits until the state of the guest, as root sees it, agrees with the agent's reports: the agent's process and
    /// executable, the boot, all containers of `running`, and no container of `deleted`.
    pub(super) fn agrees(
        &self,
        vm: &mut RunningVm,
        boot_id: &str,
        running: &[Deployed],
        deleted: &[Deployed],
    ) -> Result<RootView> {
        let (device_id, exe_sha256) = (self.device_id.as_str(), self.agent.sha256.as_str());
        let allowed_restarts = self.allowed_restarts;
        let expected = ExpectedView { device_id, boot_id, exe_sha256, running, deleted, allowed_restarts };
        vm.root.forget();
        // The first answer has a short limit, because a guest without virtio-serial never answers. On a slow host,
        // later answers may take long, so then only a difference from the agent's reports has a short limit.
        let is_first = !vm.root.has_answered;
        let deadline = if is_first { vm.deadline.within(vm.plan.limits.removal()) } else { vm.deadline };
        let mut patience: Option<Deadline> = None;
        let agreed = vm.wait_until(deadline, "root to see in the guest what the agent says", |vm| {
            let Some(view) = vm.look()? else { return Ok(None) };
            if view.reaches_host {
                return Ok(Some(view));
            }
            let Err(difference) = expected.check(&view)? else { return Ok(Some(view)) };
            let limit = vm.plan.limits.removal();
            if patience.get_or_insert_with(|| vm.deadline.within(limit)).is_over() {
                bail_guest!(
                    "the state of the guest has differed from the agent's reports for {} s: {difference}",
                    limit.as_secs();
                    "compare the agent's statuses with journal.log and console.log"
                );
            }
            Err(Error::msg(difference))
        });
        if agreed.as_ref().is_ok_and(|view| view.reaches_host) {
            bail_host!(
                "the guest can connect to a service on this host's loopback that does not belong to the run";
                "QEMU is not confined: report this with the kernel's version; nothing is known about the agent"
            );
        }
        if agreed.is_err() && deadline.is_over() && !vm.root.has_answered {
            bail_host!(
                "the guest has never answered on its virtio-serial port iot-xtask.root";
                "use an image whose kernel has virtio_console and that has bash; nothing is known about the agent"
            );
        }
        agreed
    }

    /// Checks that the agent's process and the container of an unchanged deployment have outlived the absence of the
    /// broker.
    pub(super) fn outlived(
        &self,
        unchanged: Deployed,
        offline: &RootView,
        begun: &Observation<'_>,
    ) -> Result<()> {
        Ok(check_unchanged(&self.device_id, &[unchanged], offline, &begun.first)?)
    }

    /// Checks that the agent answers the commands `status` and `logs`. The logs of `deployed` must have the line that
    /// the workload prints.
    pub(super) fn answers_commands(
        &self,
        vm: &mut RunningVm,
        joined: &StatusEvidence,
        deployed: Deployed,
    ) -> Result<()> {
        let request = LogsRequest { deployment: deployed.name.to_owned(), lines: 10 };
        let request = serde_json::to_vec(&request).context("write the request for logs")?;
        let deadline = vm.deadline.within(vm.plan.limits.ping());
        vm.wait_until(deadline, "the agent's status as the answer to a command", |vm| {
            let reply = vm.broker.command("status", Vec::new())?;
            verify::replied_status(&reply, &self.device_id, joined)?;
            Ok(Some(()))
        })?;
        vm.wait_until(deadline, &format!("the logs of the deployment {}", deployed.name), |vm| {
            verify::replied_logs(&vm.broker.command("logs", request.clone())?, deployed.name, 2)?;
            Ok(Some(()))
        })
    }

    /// Begins an observation of the duration `observed`, with a first check as root in the guest.
    pub(super) fn observes<'o>(
        &self,
        vm: &mut RunningVm,
        boot_id: &'o str,
        (running, deleted): (&'o [Deployed], &'o [Deployed]),
        observed: Duration,
    ) -> Result<Observation<'o>> {
        let first = self.agrees(vm, boot_id, running, deleted)?;
        let status = vm.broker.latest()?.context("the device's status is gone")?;
        Ok(Observation { boot_id, running, deleted, first, until: Instant::now() + observed, status })
    }

    /// Waits until the observation ends. Then checks the guest as root again: the agent's process and the containers
    /// must be the same.
    pub(super) fn stays(&self, vm: &mut RunningVm, begun: &Observation<'_>) -> Result<RootView> {
        let Observation { boot_id, running, deleted, first, until, status } = begun;
        let mut heartbeats = BTreeSet::new();
        // A disturbance at a random moment must come, also if the smoke is short.
        vm.wait("the end of the observation", |vm| {
            heartbeats.extend(heartbeat(vm, status)?);
            let is_awaited = vm.disturbance.as_ref().is_some_and(PlannedDisturbance::is_random);
            Ok((Instant::now() >= *until && !is_awaited).then_some(()))
        })?;
        let deadline = vm.deadline.within(vm.plan.limits.ping());
        vm.wait_until(deadline, "two heartbeats of the agent", |vm| {
            heartbeats.extend(heartbeat(vm, status)?);
            Ok((heartbeats.len() >= 2).then_some(()))
        })?;
        let second = self.agrees(vm, boot_id, running, deleted)?;
        check_unchanged(&self.device_id, running, first, &second)?;
        Ok(second)
    }

    /// Waits until a deployment that was deleted at `revision` is gone: the agent has acknowledged the deletion and
    /// reports the deployment no longer, and its port no longer answers.
    pub(super) fn is_gone(&self, vm: &mut RunningVm, deployed: Deployed, revision: u64) -> Result<()> {
        let Deployed { name, port } = deployed;
        let limit = vm.plan.limits.removal();
        let deadline = vm.deadline.within(limit);
        let mut wanted = ExpectedDeployment::removed(name, revision);
        vm.wait(&format!("the deployment {name} to be gone"), |vm| {
            let seen = vm.broker.latest()?;
            let is_removed = seen.as_ref().map_or(Ok(false), |seen| wanted.check(seen))?;
            let answer = vm.answer_of(port);
            if is_removed && answer.as_ref().is_err_and(|error| !is_slow(error)) {
                return Ok(Some(()));
            }
            if !deadline.is_over() {
                return Ok(None);
            }
            let port = if answer.is_ok() { "still answers" } else { "is silent" };
            let status = wanted.describe(seen.as_ref());
            bail_guest!(
                "the deployment {name} was deleted at revision {revision}; {} s later its port {port} \
                and the status {status}", limit.as_secs();
                "the agent must stop and remove the container of a deleted deployment"
            )
        })
    }

    /// Waits until the workload runs again after the power cut, in a new boot and with its volume. There is no broker,
    /// so the device must start it from its own disk.
    pub(super) fn runs_offline(
        &mut self,
        vm: &mut RunningVm,
        deployed: Deployed,
        before: &WorkloadEvidence,
    ) -> Result<WorkloadEvidence> {
        let wanted =
            ExpectedAnswer { machine: &before.machine, generation: before.generation, before: Some(before) };
        let answer = self.answers_offline(vm, deployed, &wanted)?;
        if answer.boot_id == before.boot_id {
            bail_guest!(
                "after the power cut the workload still reports the boot id {} from before",
                answer.boot_id;
                "{FIND_LISTENER}"
            );
        }
        self.evidence.workload_offline = Some(answer.clone());
        Ok(answer)
    }

    /// Waits for the answer of a deployment that the device must start from its own disk.
    pub(super) fn answers_offline(
        &self,
        vm: &mut RunningVm,
        Deployed { name, port }: Deployed,
        wanted: &ExpectedAnswer<'_>,
    ) -> Result<WorkloadEvidence> {
        let what =
            format!("the answer of the deployment {name} after the power cut, with no broker in reach");
        let mut waited = OfflineRecovery::of(self.acknowledged);
        vm.wait(&what, |vm| {
            let error = match vm.answer_of(port) {
                Ok(answer) if wanted.check(&answer)? => return Ok(Some(answer)),
                Ok(answer) => anyhow!("the workload answers as generation {}", answer.generation),
                Err(error) => error,
            };
            vm.check_workload(name, &mut waited)?;
            Err(error)
        })
    }
}

/// Checks that the container of the workload and the agent run in the same boot of the kernel.
pub(super) fn same_boot(answer: &WorkloadEvidence, status: &StatusEvidence) -> Result<()> {
    if answer.boot_id == status.boot_id {
        return Ok(());
    }
    bail_guest!(
        "the workload runs in the boot {}, the agent in {}", answer.boot_id, status.boot_id;
        "{FIND_LISTENER}"
    )
}

/// Returns the revision of the latest heartbeat, if it came after `begun` and continues the latest status.
fn heartbeat(vm: &RunningVm, begun: &ReceivedStatus) -> Result<Option<u64>> {
    // The heartbeat is read first, so that no status can come between the two.
    let beat = vm.broker.latest_heartbeat()?.filter(|beat| beat.revision > begun.revision);
    let Some(status) = vm.broker.latest()? else { return Ok(None) };
    verify::continues(begun, &status)?;
    let Some(beat) = beat else { return Ok(None) };
    Ok(verify::beats(&status, &beat)?.then_some(beat.revision))
}

/// Returns the revision of the desired state that the agent has stored, by its answer to the command `status`. The
/// agent limits how often it writes its status to the bucket, but answers commands at once.
fn acknowledged(vm: &RunningVm) -> Result<Option<u64>> {
    match vm.broker.command_within("status", Vec::new(), limits::ACKNOWLEDGEMENT)? {
        Reply::Status { status } => Ok(Some(status.desired_revision)),
        _ => Ok(None),
    }
}
