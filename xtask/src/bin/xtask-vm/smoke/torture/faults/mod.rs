//! `cargo xtask torture --faults`: restores a device whose workload runs, disturbs it, and asks the Proof whether it has
//! healed. [`frozen`] has the snapshot from which each episode begins, [`episode`] the course of an episode, [`actions`]
//! the faults, and [`verdict`] the results. The crate `xtask_faults` has the schedules and the limits.

mod actions;
mod episode;
mod frozen;
mod in_guest;
mod verdict;

use anyhow::Result;
use xtask_core::cli::{Schedule, TortureArgs};
use xtask_core::report::{FaultsReport, Phase, StatusEvidence};
use xtask_faults::{default_episodes, schedule};

use super::super::deployed::ExpectedAnswer;
use super::super::proof::Proof;
use super::super::recorder::Recorder;
use super::super::run::Run;
use super::super::running::RunningVm;
use super::super::workload::{EPHEMERAL, PERSISTENT, RETIRED, document};
use super::super::{join, on_booted, provision};
use super::fill_registry;
use episode::Baseline;
use frozen::Frozen;
use verdict::Episodes;

/// Runs the episodes of the arguments.
pub(super) fn run(
    run: &Run<'_>,
    args: &TortureArgs,
    recorder: &mut Recorder<'_>,
    slot: &mut Option<RunningVm>,
) -> Result<()> {
    let (seed, schedules) = planned(args);
    recorder.report.faults =
        Some(FaultsReport { seed, planned: schedules.len() as u64, ..FaultsReport::default() });
    let asked = (&args.build, args.agent.as_deref());
    on_booted(run, asked, recorder, slot, |recorder, vm, proof, (_, workload)| {
        let pulled = fill_registry(run, vm, &workload.program)?;
        let (baseline, frozen) = freeze(run, recorder, (vm, proof), pulled)?;
        let mut episodes = Episodes { run, args, recorder, vm, proof, frozen: &frozen, baseline: &baseline };
        episodes.all(&schedules)
    })
}

/// Returns the seed and the schedules of the episodes. The seed is `None` if the schedule is given.
fn planned(args: &TortureArgs) -> (Option<u64>, Vec<Schedule>) {
    if let Some(schedule) = &args.schedule {
        return (None, vec![schedule.clone()]);
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let kinds = args.faults.as_ref().map_or(&[][..], |faults| &faults.0);
    let count = args.episodes.map_or_else(|| default_episodes(kinds.len()), |episodes| episodes as usize);
    let drawn = schedule(seed, kinds, count);
    (Some(seed), drawn.into_iter().map(|episode| episode.schedule).collect())
}

/// Runs the phases up to a device whose workload runs, and saves its machine.
fn freeze(
    run: &Run<'_>,
    recorder: &mut Recorder<'_>,
    (vm, proof): (&mut RunningVm, &mut Proof<'_>),
    pulled: String,
) -> Result<(Baseline, Frozen)> {
    vm.expect_no_reboot();
    let (limits, limit) = (vm.plan.limits, vm.plan.provision_limit(vm.snapshot.is_none()));
    recorder.on_machine(vm, Phase::Provision, limit, provision)?;
    let joined = recorder.on_machine(vm, Phase::Join, limits.join(), |vm| join(vm, proof))?;
    let baseline = recorder
        .on_machine(vm, Phase::Workload, limits.workload(), |vm| settle(vm, proof, joined, pulled))?;
    let frozen = recorder.on_machine(vm, Phase::Freeze, limits.provision(), |vm| {
        let frozen = Frozen::save(run, vm)?;
        Ok((frozen, "the machine was saved while its workload runs".to_owned()))
    })?;
    Ok((baseline, frozen))
}

/// Gives the broker a name, and waits until three deployments run.
fn settle(
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
    joined: StatusEvidence,
    pulled: String,
) -> Result<(Baseline, String)> {
    in_guest::name_broker(vm)?;
    let mut revisions = Vec::new();
    for deployed in [PERSISTENT, EPHEMERAL, RETIRED] {
        revisions.push((deployed, vm.broker.desire(deployed.name, &document(1, deployed.port))?));
    }
    for (deployed, revision) in &revisions {
        proof.runs(vm, *deployed, *revision)?;
    }
    let wanted = ExpectedAnswer { machine: &joined.machine, generation: 1, before: None };
    let answer = proof.answers(vm, PERSISTENT, &wanted)?;
    proof.agrees(vm, &joined.boot_id, &[PERSISTENT, EPHEMERAL, RETIRED], &[])?;
    let detail = format!("{} deployments run", revisions.len());
    Ok((Baseline { joined, answer, revision: revisions[0].1, pulled }, detail))
}
