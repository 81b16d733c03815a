//! `torture --state FILE`: judges a state that an earlier run has kept, and boots it.

use std::path::Path;

use anyhow::{Context, Result};
use xtask_core::bail_guest;
use xtask_core::cli::TortureArgs;
use xtask_core::error::{self, Failure, Kind};
use xtask_core::format::name_of;
use xtask_core::fs::write_private;
use xtask_core::machine::RunFiles;
use xtask_core::plan::Plan;
use xtask_core::report::{CrashBootReport, CrashStateReport, EventKind, Phase, TortureReport};
use xtask_fleet::{Broker, Registry};
use xtask_judge::Judgement;

use super::super::image::ComingImage;
use super::super::planned::planned;
use super::super::prepare::{Parts, Prepared, not_started, reach};
use super::super::proof::Proof;
use super::super::recorder::Recorder;
use super::super::run::Run;
use super::super::running::RunningVm;
use super::super::target::Domain;
use super::boots::{converges, put_overlay, write_disk};
use super::bundle::{self, BROKER, LOG, NVRAM, OpenedBundle, SEED};
use super::checker::Checker;
use super::recorded::Recorded;
use super::script::Agents;
use super::states;
use crate::guest::media;
use crate::guest::workload::in_registry;

/// The size in bytes of the payload's disk, which the guest no longer reads.
const PAYLOAD_BYTES: u64 = 1 << 20;

pub(super) fn repeat(
    run: &Run<'_>,
    args: &TortureArgs,
    file: &Path,
    recorder: &mut Recorder<'_>,
    slot: &mut Option<RunningVm>,
) -> Result<()> {
    let kept = bundle::read(file)?;
    recorder.report.sabotage = kept.bundle.plant.as_ref().map(name_of);
    let mut plan = planned(run, recorder)?;
    let image = std::thread::scope(|scope| ComingImage::start(scope, run, &plan).phase(recorder, &mut plan))?;
    if image.digest != kept.bundle.image {
        let text = format!("--state {}: it was recorded on the image {}", file.display(), kept.bundle.image);
        return Err(Failure::usage(text).into());
    }
    let agents = Agents::of(&kept.agent(run)?);
    let (recorded, judgement) = judged(run, file, &kept, &agents, recorder)?;
    let losses: Vec<_> = judgement.losses.iter().map(|loss| loss.text.clone()).collect();
    let mut report = TortureReport {
        seed: kept.bundle.seed,
        states: 1,
        failed: u64::from(!losses.is_empty()),
        ..TortureReport::default()
    };
    report.failures.push(CrashStateReport {
        number: kept.saved.number,
        point: kept.saved.state.point as u64,
        losses: losses.clone(),
        missing: kept.saved.missing.clone(),
        command: bundle::command(run, &std::path::absolute(file)?),
    });
    recorder.report.torture = Some(report);
    let booted = match args.boot {
        true => {
            boot(run, recorder, (&kept, &recorded, &plan), (&agents, judgement.executable.as_deref()), slot)
        }
        false => Ok(()),
    };
    let is_interrupted = booted.as_ref().is_err_and(|error| Kind::Interrupted.is(error));
    if !losses.is_empty() && !is_interrupted {
        let missing = match kept.saved.missing.join("; ") {
            none if none.is_empty() => "no write of the log is missing".to_owned(),
            some => format!("the missing writes: {some}"),
        };
        bail_guest!(
            "the crash state {} loses something: {}", kept.saved.number, losses.join("; ");
            "{missing}"
        );
    }
    booted?;
    if let Some(plant) = &kept.bundle.plant {
        bail_guest!(
            "the crash state {} does not show the planted fault {}", kept.saved.number, name_of(plant);
            "a check of cargo xtask does not work; that says nothing about the agent"
        );
    }
    Ok(())
}

/// Boots the state, and puts the result into the report.
fn boot(
    run: &Run<'_>,
    recorder: &mut Recorder<'_>,
    (kept, recorded, plan): (&OpenedBundle, &Recorded, &Plan),
    (agents, executable): (&Agents, Option<&str>),
    slot: &mut Option<RunningVm>,
) -> Result<()> {
    let agent = agents.with_digest(executable);
    let proof = Proof::new(agent, &plan.image, kept.bundle.recording.device_id.clone());
    let limit = plan.limits.rejoin();
    let booted = recorder.phase(Phase::Boots, Some(limit), || {
        let vm = slot.insert(started(run, plan, recorded, kept).map_err(not_started)?);
        vm.deadline = run.times.deadline();
        let before = vm.broker.latest()?.context("the device's status is gone")?;
        let detail = converges(vm, &proof, recorded, &before)?;
        Ok((detail.clone(), detail))
    });
    let result = match &booted {
        Ok(detail) => Some((true, detail.clone())),
        // If this host has failed, the state was not booted.
        Err(error) => (error::kind(error) == Kind::Guest).then(|| (false, format!("{error:#}"))),
    };
    if let (Some(report), Some((converged, detail))) = (&mut recorder.report.torture, result) {
        report.boots.push(CrashBootReport { number: kept.saved.number, converged, detail });
    }
    booted.map(drop)
}

/// Judges the state, and lets e2fsck check its file system.
fn judged(
    run: &Run<'_>,
    file: &Path,
    kept: &OpenedBundle,
    agents: &Agents,
    recorder: &mut Recorder<'_>,
) -> Result<(Recorded, Judgement)> {
    recorder.phase(Phase::Judge, None, || {
        let log = kept.directory.join(LOG);
        let recording = kept.bundle.recording.clone();
        let recorded = Recorded::open(&log, &kept.bundle.below, &run.dir.work(), recording, &run.ui)?;
        let state = &kept.saved.state;
        state.check(&recorded.log).map_err(|reason| {
            Failure::usage(format!("--state {}: no power cut leaves this state: {reason}", file.display()))
        })?;
        let judge = super::judge(&recorded.recording, agents, &kept.workload)?;
        let mut judgement = states::judge(&recorded, &judge, state)?;
        let found = Checker::new(&recorded, &run.dir.work(), &run.ui)?.losses(state, &judge)?;
        for loss in found {
            if !judgement.losses.contains(&loss) {
                judgement.losses.push(loss);
            }
        }
        let detail = format!("the state loses {} thing(s)", judgement.losses.len());
        Ok(((recorded, judgement), detail))
    })
}

/// Starts a machine whose disk is in the crash state, with the broker and the registry of the recording.
fn started(run: &Run<'_>, plan: &Plan, recorded: &Recorded, kept: &OpenedBundle) -> Result<RunningVm> {
    let (work, bundle) = (run.dir.work(), &kept.bundle);
    let disk = write_disk(run, recorded, &kept.saved.state)?;
    let mut files = RunFiles::of_run(&work, run.dir.path().join("console.log"))?;
    files.seed = kept.directory.join(SEED);
    files.uuid.clone_from(&bundle.uuid);
    media::make_blank(&files.payload, PAYLOAD_BYTES)?;
    write_private(&files.nvram, fs_err::read(kept.directory.join(NVRAM))?)?;
    put_overlay(run, &mut files, disk)?;
    let broker = Broker::resume(&work, &kept.directory.join(BROKER), &run.ui)?;
    let registry = Registry::start(&work, Some(bundle.registry_port), &run.ui)?;
    registry.add(&in_registry(run.options.arch, &kept.workload)?)?;
    let prepared = Prepared::of(run, Parts::with_servers(run, plan, broker, Some(registry))?)?;
    let reach = reach(run, plan, prepared.parts.access());
    let domain = Domain::write(plan, &files, &work, reach)?;
    let machine = domain.start(&prepared.hypervisor)?;
    let mut vm = prepared.with(plan.clone(), files, domain, machine);
    vm.record(EventKind::Boot, "the machine was switched on in a crash state");
    Ok(vm)
}
