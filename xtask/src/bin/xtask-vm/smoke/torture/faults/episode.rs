//! One episode: the device is restored, disturbed and healed, and the Proof is asked. Meanwhile, the fleet changes its
//! wishes. The deployment [`PERSISTENT`] is never changed, so its container shows what the faults did to it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask_core::bail_guest;
use xtask_core::cli::{DeviceFault, Schedule};
use xtask_core::limits;
use xtask_core::report::{StatusEvidence, WorkloadEvidence};
use xtask_faults::{Invariant, bound_of, invariants_of};
use xtask_fleet::ReceivedStatus;

use super::super::super::deployed::ExpectedAnswer;
use super::super::super::observed::{agent_stays, container_stays};
use super::super::super::proof::Proof;
use super::super::super::run::Run;
use super::super::super::running::RunningVm;
use super::super::super::workload::{EPHEMERAL, PERSISTENT, RETIRED, document_with};
use super::actions;
use super::frozen::Frozen;
use crate::guest::root::RootView;
use crate::guest::watch::Deadline;
use crate::guest::workload::IMAGE;
use crate::libvirt::Condition;

/// The pause between the change of a link that flaps.
const FLAP: Duration = Duration::from_secs(1);
/// The time from the beginning of the first fault until the fleet changes its wishes.
const WISH: Duration = Duration::from_millis(300);

/// The probation of the changed deployment, in seconds. During this time, the device has the previous container, too.
const PROBATION: u32 = 1;
/// The number of connections that a device may make in an episode, and in each second of it.
const FREE_CONNECTIONS: u64 = 10;
const CONNECTIONS_PER_SECOND: u64 = 1;

/// The number of restarts of the agent that a lack of memory may cause.
const UNDER_PRESSURE: u32 = 3;

/// The device at the beginning of each episode.
pub(super) struct Baseline {
    pub(super) joined: StatusEvidence,
    /// The answer of [`PERSISTENT`].
    pub(super) answer: WorkloadEvidence,
    /// The revision of [`PERSISTENT`].
    pub(super) revision: u64,
    /// The reference of the image that only the registry has.
    pub(super) pulled: String,
}

/// A step of an episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Begin(DeviceFault),
    /// The link of [`DeviceFault::LinkFlapping`] goes up or down.
    Flap(bool),
    Wish,
    End(DeviceFault),
}

/// The revisions of the wishes of an episode.
struct Wishes {
    /// The revision of the next generation of [`EPHEMERAL`].
    changed: u64,
    /// The revision of the deletion of [`RETIRED`].
    deleted: u64,
}

/// The course of an episode that was begun.
pub(super) struct Episode<'e, 'p> {
    pub(super) run: &'e Run<'e>,
    pub(super) vm: &'e mut RunningVm,
    pub(super) proof: &'e mut Proof<'p>,
    pub(super) frozen: &'e Frozen,
    pub(super) baseline: &'e Baseline,
}

impl Episode<'_, '_> {
    /// Runs the schedule. Returns the time from the end of the last fault until the device had reached the desired state.
    pub(super) fn course(&mut self, schedule: &Schedule) -> Result<Duration> {
        let (before, first) = self.begin(schedule)?;
        let (begun, accepted) = (Instant::now(), self.connections()?);
        let wishes = self.disturb(schedule)?;
        let ended = Instant::now();
        self.vm.deadline = Deadline::after(bound(schedule, self.vm));
        let last = self.converge(schedule, &before, &wishes)?;
        let healing = ended.elapsed();
        check_connections(self.connections()? - accepted, begun.elapsed())?;
        let held = invariants_of(schedule);
        if held.contains(&Invariant::ContainersRunOn) {
            container_stays(&self.proof.device_id, PERSISTENT, &first, &last)?;
        }
        if held.contains(&Invariant::AgentStays) {
            agent_stays(&first, &last)?;
        }
        Ok(healing)
    }

    /// Returns the number of connections that the line before the broker has accepted.
    fn connections(&self) -> Result<u64> {
        let line = self.vm.broker.line().context("there is no line before the broker")?;
        Ok(line.accepted())
    }

    /// Restores the device, and waits until its agent has found the broker.
    fn begin(&mut self, schedule: &Schedule) -> Result<(ReceivedStatus, RootView)> {
        let Self { run, vm, proof, frozen, baseline } = self;
        proof.allowed_restarts = 0;
        frozen.restore(run, vm)?;
        let before = vm.broker.latest()?.context("the status from before the snapshot is gone")?;
        let last = last_heard(vm, &before)?;
        proof.is_heard(vm, last)?;
        let all = [PERSISTENT, EPHEMERAL, RETIRED];
        let first = proof.agrees(vm, &baseline.joined.boot_id, &all, &[])?;
        proof.allowed_restarts = restarts(schedule);
        Ok((before, first))
    }

    /// Begins and ends the faults, and changes the wishes of the fleet.
    fn disturb(&mut self, schedule: &Schedule) -> Result<Wishes> {
        let begun = Instant::now();
        let (mut wishes, mut late) = (None, Vec::new());
        for (at, step) in steps(schedule) {
            while begun.elapsed() < at {
                self.vm.ui.check()?;
                std::thread::sleep(limits::POLL.min(at.saturating_sub(begun.elapsed())));
            }
            self.run.ui.tick(&format!("{step:?}"))?;
            match step {
                Step::Begin(fault) => actions::begin(self.vm, fault)?,
                // While the machine is off, nothing can be done in the guest.
                Step::End(fault) if self.is_off() && !switches_on(fault) => late.push(fault),
                Step::End(fault) => {
                    actions::end(self.vm, fault)?;
                    if switches_on(fault) {
                        late.drain(..).try_for_each(|fault| actions::end(self.vm, fault))?;
                    }
                }
                Step::Flap(is_up) => self.vm.target.set_link(is_up)?,
                Step::Wish => wishes = Some(self.wish(schedule)?),
            }
        }
        wishes.map_or_else(|| self.wish(schedule), Ok)
    }

    fn is_off(&self) -> bool {
        self.vm.target.condition() == Condition::Gone
    }

    /// Changes the wishes of the fleet. If the disk has no space for a pull, the changed deployment needs one.
    fn wish(&self, schedule: &Schedule) -> Result<Wishes> {
        let broker = &self.vm.broker;
        let pulls = schedule.faults().iter().any(|planned| planned.fault == DeviceFault::DiskFullPull);
        let image = if pulls { &self.baseline.pulled } else { IMAGE };
        Ok(Wishes {
            changed: broker.desire(EPHEMERAL.name, &document_with(image, 2, EPHEMERAL.port, PROBATION))?,
            deleted: broker.desire_no_more(RETIRED.name)?,
        })
    }

    /// Waits until the device has reached the desired state.
    fn converge(
        &mut self,
        schedule: &Schedule,
        before: &ReceivedStatus,
        wishes: &Wishes,
    ) -> Result<RootView> {
        let Self { vm, proof, baseline, .. } = self;
        let joined = if bound_of(schedule).boot {
            proof.comes_back(vm, &baseline.joined, before)?
        } else {
            let last = last_heard(vm, before)?;
            proof.is_heard(vm, last)?;
            baseline.joined.clone()
        };
        proof.runs(vm, PERSISTENT, baseline.revision)?;
        proof.runs(vm, EPHEMERAL, wishes.changed)?;
        proof.is_gone(vm, RETIRED, wishes.deleted)?;
        let wanted = |generation, before| ExpectedAnswer { machine: &joined.machine, generation, before };
        // A container that was started again must have its volume with the counted starts.
        let runs_on = invariants_of(schedule).contains(&Invariant::ContainersRunOn);
        let earlier = (!runs_on).then_some(&baseline.answer);
        proof.answers(vm, PERSISTENT, &wanted(baseline.answer.generation, earlier))?;
        proof.answers(vm, EPHEMERAL, &wanted(2, None))?;
        proof.agrees(vm, &joined.boot_id, &[PERSISTENT, EPHEMERAL], &[RETIRED])
    }
}

/// Returns the revision of the last heartbeat, or of the status `before` if there is none.
fn last_heard(vm: &RunningVm, before: &ReceivedStatus) -> Result<u64> {
    Ok(vm.broker.latest_heartbeat()?.map_or(before.revision, |beat| beat.revision))
}

/// Checks that the device has not connected to the broker without pauses.
fn check_connections(count: u64, time: Duration) -> Result<()> {
    let limit = FREE_CONNECTIONS + time.as_secs() * CONNECTIONS_PER_SECOND;
    if count > limit {
        bail_guest!(
            "the device has connected to the broker {count} times in {} s, at most {limit} are expected", time.as_secs();
            "an agent must wait between two attempts, and longer after each failed one"
        );
    }
    Ok(())
}

/// Returns the steps of a schedule in order, with their times after the beginning of the episode.
fn steps(schedule: &Schedule) -> Vec<(Duration, Step)> {
    let mut steps = Vec::new();
    for planned in schedule.faults() {
        let (begin, end) = (planned.begin.duration(), planned.end().duration());
        steps.push((begin, Step::Begin(planned.fault)));
        if planned.fault == DeviceFault::LinkFlapping {
            let flaps = (1..).map(|number| (begin + FLAP * number, Step::Flap(number % 2 == 1)));
            steps.extend(flaps.take_while(|(at, _)| *at < end));
        }
        steps.push((end, Step::End(planned.fault)));
    }
    let first = schedule.faults().first().map_or(Duration::ZERO, |planned| planned.begin.duration());
    if !schedule.faults().iter().any(|planned| keeps_fleet_away(planned.fault)) {
        steps.push((first + WISH, Step::Wish));
    }
    // At the same time, a fault begins before the wish, and another one ends after it.
    steps.sort_by_key(|(at, step)| (*at, matches!(step, Step::Wish), matches!(step, Step::End(_))));
    steps
}

/// Returns the time in which the device must heal from a schedule.
pub(super) fn bound(schedule: &Schedule, vm: &RunningVm) -> Duration {
    bound_of(schedule).with_boot(vm.plan.limits.boot_of_device()).mul_f64(vm.plan.limits.scale())
}

/// Returns how many times the faults may make systemd restart the agent in one boot.
fn restarts(schedule: &Schedule) -> u32 {
    let of = |fault| match fault {
        DeviceFault::KillAgent | DeviceFault::OomAgent => 1,
        // The kernel may end any process.
        DeviceFault::MemoryPressure => UNDER_PRESSURE,
        _ => 0,
    };
    schedule.faults().iter().map(|planned| of(planned.fault)).sum()
}

/// Returns whether the end of a fault switches the machine on.
fn switches_on(fault: DeviceFault) -> bool {
    matches!(fault, DeviceFault::PowerCut | DeviceFault::DiskError)
}

/// Returns whether the fleet cannot change its wishes during a fault.
fn keeps_fleet_away(fault: DeviceFault) -> bool {
    use DeviceFault::{BrokerRestarted, BrokerSlow, BucketEmptied};
    matches!(fault, BrokerRestarted | BrokerSlow | BucketEmptied)
}
