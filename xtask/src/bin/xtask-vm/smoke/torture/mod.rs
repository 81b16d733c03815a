//! `cargo xtask torture`. [`faults`] disturbs a running device. The other files record the writes of one run, and judge
//! thousands of states in which a power cut can leave the disk, without a boot: [`script`] records, [`states`] judges, [`boots`] boots some states, and [`bundle`] keeps the
//! files with which a state that loses something can be judged and booted again.

mod boots;
mod bundle;
mod checker;
mod failing;
mod faults;
mod recorded;
mod repeat;
mod script;
mod states;
mod verdict;

use std::collections::BTreeMap;

use anyhow::{Context, Error, Result};
use xtask_core::cli::{TortureArgs, Verbosity};
use xtask_core::digest::Algorithm;
use xtask_core::error::{Failure, host_fault};
use xtask_core::format::human_bytes;
use xtask_core::host::tools;
use xtask_core::machine::HOST_FROM_GUEST;
use xtask_core::report::{Phase, TortureReport};
use xtask_core::workspace::Workspace;
use xtask_jobs::Ui;
use xtask_judge::{Judge, Recording, installed_files};

use super::options::RunOptions;
use super::proof::Proof;
use super::recorder::Recorder;
use super::run::Run;
use super::running::RunningVm;
use super::{join, on_booted, provision};
use crate::guest::workload::{IMAGE, PROGRAM, Workload};
use recorded::Recorded;
use script::{Agents, Script};
use verdict::{Boots, Torture};

/// The programs of e2fsprogs that check crash states, undo the repairs, and name the files of missing writes.
const PROGRAMS: [&str; 3] = ["e2fsck", "e2undo", "debugfs"];

/// Runs `torture`. When this function returns, the verdict is on the screen and in the report.
pub(crate) fn run(workspace: &Workspace, args: &TortureArgs, verbosity: Verbosity) -> Result<()> {
    let makes_states = args.faults.is_none() && args.schedule.is_none();
    let missing = PROGRAMS.into_iter().find(|name| tools::find(name).is_none());
    if let Some(missing) = missing.filter(|_| makes_states) {
        return Err(Failure::host(format!("torture: {missing} is not on PATH"), "install e2fsprogs").into());
    }
    let run = Run::begin(workspace, RunOptions::from(args), Ui::install(verbosity)?)?;
    let mut recorder = Recorder::new(&run);
    if !makes_states {
        let mut vm = None;
        let outcome = faults::run(&run, args, &mut recorder, &mut vm);
        return concluded(recorder.finish(outcome, vm));
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let count = args.crash_states.unwrap_or_default().into();
    recorder.report.torture = Some(TortureReport { seed, states: count, ..TortureReport::default() });
    let mut vm = None;
    if let Some(file) = &args.state {
        let outcome = repeat::repeat(&run, args, file, &mut recorder, &mut vm);
        return concluded(recorder.finish(outcome, vm));
    }
    let asked = (&args.build, args.agent.as_deref());
    let outcome = on_booted(&run, asked, &mut recorder, &mut vm, |recorder, vm, proof, (agent, workload)| {
        let agents = Agents::of(agent);
        let recording = empty_recording(&run, vm, proof, &agents, workload)?;
        let recorded = record(&run, recorder, (vm, proof), recording, &agents)?;
        let judge = judge(&recorded.recording, &agents, &workload.program)?;
        let mut torture = Torture {
            run: &run,
            recorder,
            vm,
            recorded: &recorded,
            judge: &judge,
            agents: &agents,
            workload: &workload.program,
        };
        let of_losses = args.boots_of_losses.map_or(usize::MAX, |boots| boots as usize);
        torture.judge_and_boot(seed, count, Boots { sound: args.boots.into(), of_losses })
    });
    concluded(recorder.finish(outcome, vm))
}

/// Attributes an error to the host, unless it has an attribution. In the phases of the guest, it would else be the guest's.
fn of_host(error: Error, attempted: &str) -> Error {
    host_fault(error, attempted, "see the causes; nothing is known about the agent")
}

fn concluded(code: u8) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Failure::reported(code).into()) }
}

/// Returns the judge of a recording. `workload` is the program of the workload's image.
fn judge(recording: &Recording, agents: &Agents, workload: &[u8]) -> Result<Judge> {
    let blobs = vec![agents.tested.content.clone(), agents.upgrade.content.clone(), workload.to_owned()];
    Judge::new(recording.clone(), blobs)
}

/// Returns the recording before its first event.
fn empty_recording(
    run: &Run<'_>,
    vm: &RunningVm,
    proof: &Proof<'_>,
    agents: &Agents,
    workload: &Workload,
) -> Result<Recording> {
    let (config, ca) = (vm.broker.agent_config(HOST_FROM_GUEST), vm.broker.ca().to_owned());
    let secrets = BTreeMap::from([("ca.pem".to_owned(), ca)]);
    let dist = run.workspace.root().join("agent/dist");
    let program = Algorithm::Sha256.of(&workload.program).hex().to_owned();
    let files = BTreeMap::from([(PROGRAM.to_owned(), program)]);
    Ok(Recording {
        device_id: proof.device_id.clone(),
        executables: BTreeMap::from([
            (agents.tested.sha256.clone(), "the agent under test".to_owned()),
            (agents.upgrade.sha256.clone(), "the upgrade".to_owned()),
        ]),
        files: installed_files(&dist, &config, &secrets)?,
        images: BTreeMap::from([(IMAGE.to_owned(), files)]),
        events: Vec::new(),
    })
}

/// Runs the phases *provision*, *join* and *record*. The machine is off afterwards.
fn record<'a>(
    run: &Run<'a>,
    recorder: &mut Recorder<'a>,
    (vm, proof): (&mut RunningVm, &mut Proof<'_>),
    recording: Recording,
    agents: &Agents,
) -> Result<Recorded> {
    let log = run.write_log().context("torture: nothing is recorded; this is a bug of cargo xtask")?;
    vm.expect_no_reboot();
    let limit = vm.plan.provision_limit(vm.snapshot.is_none());
    recorder.on_machine(vm, Phase::Provision, limit, provision)?;
    let limits = vm.plan.limits;
    let joined = recorder.on_machine(vm, Phase::Join, limits.join(), |vm| join(vm, proof))?;
    recorder.on_machine(vm, Phase::Record, 4 * limits.workload(), |vm| {
        let below = vm.files.backing.first().context("the machine's disk has no backing file")?.clone();
        let script =
            Script::new(vm, proof, recording, log.clone(), (joined.machine.clone(), run.options.plant))?;
        let recording = script.run(agents)?;
        vm.end_recording()?;
        run.ui.tick("unpacking the disk before the recording")?;
        let recorded = Recorded::open(&log, &below, &run.dir.work(), recording, &run.ui)
            .map_err(|error| of_host(error, "read the recorded writes"))?;
        let detail = format!(
            "{} entries in the log, {} written, {} acknowledgements",
            recorded.log.entries().len(),
            human_bytes(recorded.written_bytes()),
            recorded.moments().len()
        );
        Ok((recorded, detail))
    })
}
