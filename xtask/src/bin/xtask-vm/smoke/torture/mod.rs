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
use xtask_fleet::REGISTRY_PROGRAM;
use xtask_jobs::Ui;
use xtask_judge::{Judge, Recording, installed_files};

use super::options::RunOptions;
use super::proof::Proof;
use super::recorder::Recorder;
use super::run::Run;
use super::running::RunningVm;
use super::{join, on_booted, provision};
use crate::guest::workload::{IMAGE, PROGRAM, PULLED_FILE, Workload, in_registry};
use recorded::Recorded;
use script::{Agents, Script, Setting};
use verdict::{Boots, Torture};

/// The programs that only `torture` needs, and their packages. Those of e2fsprogs check crash states, undo the repairs, and
/// name the files of missing writes. The device pulls an image from the registry.
const PROGRAMS: [(&str, &str); 4] = [
    ("e2fsck", "e2fsprogs"),
    ("e2undo", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    (REGISTRY_PROGRAM, REGISTRY_PROGRAM),
];

/// Runs `torture`. When this function returns, the verdict is on the screen and in the report.
pub(crate) fn run(workspace: &Workspace, args: &TortureArgs, verbosity: Verbosity) -> Result<()> {
    let is_needed = |name: &str| {
        if name == REGISTRY_PROGRAM { args.boots_machines() } else { !args.causes_faults() }
    };
    let is_missing = |(name, _): &(&str, _)| is_needed(name) && tools::find(name).is_none();
    if let Some((missing, package)) = PROGRAMS.into_iter().find(is_missing) {
        let text = format!("torture: {missing} is neither on PATH nor in the system directories");
        return Err(Failure::host(text, format!("install the package {package}")).into());
    }
    let run = Run::begin(workspace, RunOptions::from(args), Ui::install(verbosity)?)?;
    let mut recorder = Recorder::new(&run);
    if args.causes_faults() {
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
        let pulled = fill_registry(&run, vm, &workload.program)?;
        let recording = empty_recording(&run, vm, proof, &agents, (workload, &pulled))?;
        let recorded = record(&run, recorder, (vm, proof), (recording, pulled), &agents)?;
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
    let (tested, upgrade) = (agents.tested.content.clone(), agents.upgrade.content.clone());
    Judge::new(recording.clone(), vec![tested, upgrade, workload.to_owned(), PULLED_FILE.1.to_owned()])
}

/// Puts the image with this program into the registry of the run. Returns the reference by which the guest pulls it.
fn fill_registry(run: &Run<'_>, vm: &RunningVm, program: &[u8]) -> Result<String> {
    let registry =
        vm.registry.as_ref().context("torture: there is no registry; this is a bug of cargo xtask")?;
    let image = in_registry(run.options.arch, program)?;
    registry.add(&image)?;
    Ok(image.reference(HOST_FROM_GUEST, registry.port()))
}

/// Returns the recording before its first event.
fn empty_recording(
    run: &Run<'_>,
    vm: &RunningVm,
    proof: &Proof<'_>,
    agents: &Agents,
    (workload, pulled): (&Workload, &str),
) -> Result<Recording> {
    let (config, ca) = (vm.broker.agent_config(HOST_FROM_GUEST), vm.broker.ca().to_owned());
    let secrets = BTreeMap::from([("ca.pem".to_owned(), ca)]);
    let dist = run.workspace.root().join("agent/dist");
    let file = |name: &str, content: &[u8]| (name.to_owned(), Algorithm::Sha256.of(content).hex().to_owned());
    let program = file(PROGRAM, &workload.program);
    let of_registry = BTreeMap::from([program.clone(), file(PULLED_FILE.0, PULLED_FILE.1)]);
    Ok(Recording {
        device_id: proof.device_id.clone(),
        executables: BTreeMap::from([
            (agents.tested.sha256.clone(), "the agent under test".to_owned()),
            (agents.upgrade.sha256.clone(), "the upgrade".to_owned()),
        ]),
        files: installed_files(&dist, &config, &secrets)?,
        images: BTreeMap::from([
            (IMAGE.to_owned(), BTreeMap::from([program])),
            (pulled.to_owned(), of_registry),
        ]),
        events: Vec::new(),
    })
}

/// Runs the phases *provision*, *join* and *record*. The machine is off afterwards.
fn record<'a>(
    run: &Run<'a>,
    recorder: &mut Recorder<'a>,
    (vm, proof): (&mut RunningVm, &mut Proof<'_>),
    (recording, pulled): (Recording, String),
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
        let (machine, plant) = (joined.machine.clone(), run.options.plant);
        let setting = Setting { log: log.clone(), machine, plant, pulled };
        let script = Script::new(vm, proof, recording, setting)?;
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
