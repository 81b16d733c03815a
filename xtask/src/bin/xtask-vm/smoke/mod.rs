//! `cargo xtask smoke` and `cargo xtask vm up`. This module contains the phases in order; `vm up` runs only the first
//! of them. [`recorder`] times and records a phase. [`target`] runs a guest, [`fault`] has the faults of a running
//! device, and [`proof`] has the checks that the device follows the desired state.

mod answer;
mod archive;
mod boot;
mod cause;
pub(crate) mod compare;
mod cuts;
mod deployed;
mod disturbance;
mod fault;
mod footprint;
mod image;
mod inspect;
mod keep;
mod observed;
mod offline;
mod on_daemon;
mod options;
mod planned;
mod power;
mod prepare;
mod proof;
mod publish;
mod recorder;
mod run;
mod running;
mod secrets;
mod starts;
mod target;
mod teardown;
mod times;
pub(crate) mod torture;
mod used;
mod verify;
mod warm;
mod warm_here;
mod warm_on_daemon;
mod workload;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use xshell::Shell;
use xtask_core::arch::VmArchitecture;
use xtask_core::bail_guest;
use xtask_core::build::origin::Origin;
use xtask_core::build::{self, Agent};
use xtask_core::cli::{BuildArgs, DurabilityFault, Sabotage, SmokeArgs, Until, UpArgs, Verbosity};
use xtask_core::error::{self, Failure};
use xtask_core::format::{human_seconds, name_of};
use xtask_core::limits::INVENTORY;
use xtask_core::message;
use xtask_core::output::{print, print_json};
use xtask_core::report::{Phase, Report, StatusEvidence, WorkloadEvidence};
use xtask_core::workspace::Workspace;
use xtask_fleet::ReceivedStatus;
use xtask_inspection::check_agent;
use xtask_jobs::Ui;

use crate::guest::workload::{Program, Workload};
use cuts::PowerCuts;
use disturbance::PlannedDisturbance;
use fault::Fault;
use image::ComingImage;
pub(crate) use image::ensure_or_fall_back;
use on_daemon::Leasing;
use options::RunOptions;
use planned::planned;
pub(crate) use prepare::make_writable_files;
use proof::{Proof, same_boot};
use recorder::Recorder;
use run::Run;
use running::RunningVm;
use workload::{Changes, EPHEMERAL, PERSISTENT, RETIRED};

/// Runs the smoke. When this function returns, the verdict is on the screen and in the report.
pub(crate) fn run(workspace: &Workspace, args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    args.check_places()?;
    if args.verify_cold && args.half.is_none() {
        return compare::run(args, verbosity)
            .map_err(|error| error::host_fault(error, "compare a warm and a cold smoke", "see the causes"));
    }
    let begun = Ui::install(verbosity).and_then(|ui| Run::begin(workspace, RunOptions::from(args), ui));
    let run = begun.inspect_err(|error| report_before_run(args, error))?;
    let mut recorder = Recorder::new(&run);
    recorder.report.until = (args.until != Until::End).then(|| name_of(&args.until));
    let mut vm = None;
    let outcome = smoke(&run, args, &mut recorder, &mut vm);
    let code = recorder.finish(outcome, vm);
    if args.announce {
        print(run.dir.path().display())?;
    }
    match code {
        0 => Ok(()),
        code => Err(Failure::reported(code).into()),
    }
}

/// Writes the report of a smoke that failed before it had a directory in the cache, if `--report` is given.
fn report_before_run(args: &SmokeArgs, error: &Error) {
    let Some(directory) = &args.report else { return };
    if let Err(error) = Report::before_run(args.build.arch, error).write(directory) {
        message!("warning: {error:#}");
    }
}

fn smoke(
    run: &Run<'_>,
    args: &SmokeArgs,
    recorder: &mut Recorder<'_>,
    slot: &mut Option<RunningVm>,
) -> Result<()> {
    let asked = (&args.build, args.agent.as_deref());
    on_booted(run, asked, recorder, slot, |recorder, vm, proof, _| prove(run, args, recorder, vm, proof))
}

/// Runs the phases up to *boot*, and then `test` on the machine. `asked` says how the agent is built, or which executable
/// is tested. The machine is in `slot` as soon as it exists, for the teardown.
fn on_booted<'a>(
    run: &Run<'_>,
    asked: (&BuildArgs, Option<&Path>),
    recorder: &mut Recorder<'a>,
    slot: &mut Option<RunningVm>,
    test: impl FnOnce(&mut Recorder<'a>, &mut RunningVm, &mut Proof<'_>, (&Agent, &Workload)) -> Result<()>,
) -> Result<()> {
    let mut plan = planned(run, recorder)?;
    let (agent, workload, known, image) = std::thread::scope(|scope| {
        let image = ComingImage::start(scope, run, &plan);
        let (agent, workload) = recorder.phase(Phase::Build, None, || build(run, asked))?;
        recorder.agent(&agent);
        let known = inspect::phase(run, recorder, &plan, (&agent, &workload), inspect::NOT_FETCHED)?;
        anyhow::Ok((agent, workload, known, image.phase(recorder, &mut plan)?))
    })?;
    if known != Some(image.digest.to_string()) {
        inspect::phase(run, recorder, &plan, (&agent, &workload), inspect::NOT_READ)?;
    }
    let subject = Some((&agent, &*workload.archive));
    let limit = plan.limits.boot();
    let booted = recorder.phase(Phase::Boot, Some(limit), || {
        boot::boot(run, &mut plan, &image, subject, slot).map(|(_, detail)| ((), detail))
    });
    recorder.plan(&plan);
    if let Some(vm) = slot {
        recorder.machine(vm);
    }
    booted?;
    let vm = slot.as_mut().context("boot: there is no machine; this is a bug of cargo xtask")?;
    let mut proof = Proof::new(&agent, &plan.image, run.device_id());
    let outcome = test(recorder, vm, &mut proof, (&agent, &workload));
    recorder.machine(vm);
    recorder.proof(&proof);
    // If the snapshot was changed, the result of the run does not count.
    vm.verify_snapshot(run).and(outcome)
}

/// Runs the phases that test the agent on a booted machine.
fn prove(
    run: &Run<'_>,
    args: &SmokeArgs,
    recorder: &mut Recorder<'_>,
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
) -> Result<()> {
    let (limits, observed) = (vm.plan.limits, run.options.observed(vm.snapshot.is_none()));
    let checked = if run.options.fsck { run.ui.scaled(INVENTORY) } else { Duration::ZERO };
    vm.expect_no_reboot();
    vm.disturbance = args.disturb.map(|disturb| PlannedDisturbance::plan(disturb, vm)).transpose()?;
    let limit = vm.plan.provision_limit(vm.snapshot.is_none());
    recorder.on_machine(vm, Phase::Provision, limit, provision)?;
    let joined = recorder.on_machine(vm, Phase::Join, limits.join(), |vm| join(vm, proof))?;
    if args.until == Until::Join {
        return Ok(());
    }
    recorder.on_machine(vm, Phase::Ping, limits.ping(), |vm| ping(run, vm, &joined))?;
    footprint::rest(vm, args.rest, proof)?;
    let workload = recorder
        .on_machine(vm, Phase::Workload, limits.workload(), |vm| workload::run(vm, proof, &joined))?;
    let (last, changes) = recorder.on_machine(vm, Phase::PowerCut, limits.power_cut() + checked, |vm| {
        power_cut(run, vm, proof, &joined)
    })?;
    let before = Before { joined, workload, last, changes };
    recorder
        .on_machine(vm, Phase::Rejoin, limits.rejoin() + observed, |vm| rejoin(run, vm, proof, &before))?;
    vm.expect_disturbed()?;
    cut_again(args, recorder, vm, proof)?;
    let Some(sabotage) = run.options.sabotage else { return Ok(()) };
    bail_guest!(
        "the smoke did not find the planted fault {}", name_of(&sabotage);
        "a check of cargo xtask does not work; that is a bug of cargo xtask, not of the agent"
    )
}

/// Runs `vm up`: the phases of a smoke up to a machine that can be entered. The machine is left running under its
/// name.
pub(crate) fn up(workspace: &Workspace, up: &UpArgs, verbosity: Verbosity) -> Result<()> {
    let run = Run::begin(workspace, RunOptions::from(up), Ui::install(verbosity)?)?;
    let mut recorder = Recorder::new(&run);
    let mut vm = None;
    let outcome = machine_alone(&run, &mut recorder, &mut vm);
    let instance = recorder.hand_over(outcome, vm, up.name.as_deref())?;
    if up.json { print_json(&serde_json::to_value(&instance)?) } else { print(instance.name) }
}

fn machine_alone(run: &Run<'_>, recorder: &mut Recorder<'_>, slot: &mut Option<RunningVm>) -> Result<()> {
    let mut plan = planned(run, recorder)?;
    let image = std::thread::scope(|scope| ComingImage::start(scope, run, &plan).phase(recorder, &mut plan))?;
    let limit = plan.limits.boot();
    let vm = recorder.phase(Phase::Boot, Some(limit), || boot::boot(run, &mut plan, &image, None, slot))?;
    let limit = vm.plan.provision_limit(vm.snapshot.is_none());
    let entered = recorder.on_machine(vm, Phase::Provision, limit, |vm| {
        vm.wait("the guest to take its keys", |vm| Ok(vm.has_keys()?.then_some(())))?;
        Ok(((), format!("it can be entered{}", vm.clock_jumped()?)))
    });
    vm.verify_snapshot(run).and(entered)
}

/// Builds or reads the executable under test. Returns it together with the workload.
fn build(run: &Run<'_>, (args, agent): (&BuildArgs, Option<&Path>)) -> Result<((Agent, Workload), String)> {
    let arch = args.arch;
    let agent = match agent {
        Some(given) => {
            let path = given
                .canonicalize()
                .map_err(|error| Failure::usage(format!("--agent {}: {error}", given.display())))?;
            Agent::read(&path, arch, Origin::Given(given.to_owned()))
                .map_err(|error| Failure::usage(format!("--agent: {error:#}")))?
        }
        None => {
            let shell = Shell::new().context("start a shell of commands")?;
            run.ui.pause();
            let built = build::build(&shell, run.workspace, args);
            // If Ctrl-C ended the compiler, the run was interrupted and the build did not fail.
            run.ui.check()?;
            built?
        }
    };
    check_agent(&agent)?;
    let other = VmArchitecture::ALL.into_iter().find(|other| *other != arch).unwrap_or(arch);
    let foreign = run.options.sabotage == Some(Sabotage::ForeignImage);
    let guest = if foreign { other } else { arch };
    let program = match (run.options.sabotage, run.options.plant) {
        (Some(Sabotage::SmallPages), _) => Program::SmallPages,
        (_, Some(DurabilityFault::UnsyncedVolume)) => Program::UnsyncedVolume,
        _ => Program::Sound,
    };
    let made = crate::guest::workload::made(run.workspace, &run.cache, guest, program);
    let workload = made.map_err(|error| {
        let hint = "a static executable needs the C library's archive, libc.a: cargo xtask preflight --fix";
        error::host_fault(error, format!("make the smoke's workload for {guest}"), hint)
    })?;
    let detail = agent.describe();
    Ok(((agent, workload), detail))
}

/// Waits until the guest reports the outcome of the agent's installation.
fn provision(vm: &mut RunningVm) -> Result<((), String)> {
    vm.wait("the guest to install the agent", |vm| Ok(vm.provisioned()?.then_some(())))?;
    if vm.is_restored() {
        // Only now does the guest's sshd have the keys of this run.
        vm.connect_tunnel(Leasing::default())?;
    }
    Ok(((), format!("agent/dist/install.sh succeeded in the guest{}", vm.clock_jumped()?)))
}

/// Waits for a status of the executable under test on the requested machine. Checks as root in the guest that the
/// agent's unit runs this executable.
fn join(vm: &mut RunningVm, proof: &mut Proof<'_>) -> Result<(StatusEvidence, String)> {
    let evidence = proof.join(vm)?;
    proof.agrees(vm, &evidence.boot_id, &[], &[])?;
    let kernel = proof.joined.as_ref().map(|seen| seen.status.kernel.clone()).unwrap_or_default();
    let detail = format!("{} {}, {kernel}", evidence.machine, short(&evidence));
    Ok((evidence, detail))
}

/// Sends a ping, and checks that the agent that joined answers it.
fn ping(run: &Run<'_>, vm: &mut RunningVm, joined: &StatusEvidence) -> Result<((), String)> {
    let started = Instant::now();
    let deadline = vm.deadline.within(vm.plan.limits.ping());
    let reply = vm.wait_until(deadline, "the agent's answer to a ping", |vm| {
        vm.broker.command("ping", Vec::new()).map(Some)
    })?;
    verify::pong(&reply, &run.device_id(), joined)?;
    Ok(((), format!("answered in {}", human_seconds(started.elapsed().as_secs_f64()))))
}

/// The evidence from before the power cut, and the changes of the desired state around it.
struct Before {
    joined: StatusEvidence,
    workload: WorkloadEvidence,
    /// The last status that was written before the power cut.
    last: ReceivedStatus,
    changes: Changes,
}

/// Cuts the power as soon as the agent has acknowledged two changes of the desired state. Makes one more change, stops
/// the broker, and starts the same machine again. Returns the last status from before the power cut, and the changes.
fn power_cut(
    run: &Run<'_>,
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
    joined: &StatusEvidence,
) -> Result<((ReceivedStatus, Changes), String)> {
    proof.agrees(vm, &joined.boot_id, &[PERSISTENT, RETIRED], &[EPHEMERAL])?;
    let (added, deleted) = workload::change_before_cut(vm, proof)?;
    let ongoing = Fault::PowerCut.begin(vm)?;
    let changes = Changes { added, deleted, updated: workload::change_while_off(vm)? };
    // The check is made before the next boot, because a boot may repair the file systems.
    let checked = run.check_disk(&vm.files.overlay)?;
    let last = ongoing.end(vm)?;
    run.ui.detail("QEMU was killed and the domain started again; the broker is away");
    let detail =
        format!("power cut after revision {}, started again without a broker{checked}", last.revision);
    Ok(((last, changes), detail))
}

/// Waits for the workload while there is no broker. Then starts the broker and waits for a status that only a new boot
/// of the same executable can have written, and for the changed workload. Then observes the device, which must answer
/// commands and change nothing.
fn rejoin(run: &Run<'_>, vm: &mut RunningVm, proof: &mut Proof<'_>, before: &Before) -> Result<((), String)> {
    let started = Instant::now();
    let (offline, view) = workload::recovered(vm, proof, &before.workload)?;
    let alone = human_seconds(started.elapsed().as_secs_f64());
    vm.start_broker()?;
    let rejoined = proof.rejoin(vm, &before.joined, &before.last)?;
    if rejoined.boot_id != offline.boot_id {
        bail_guest!(
            "the guest has rebooted by itself: without a broker it was in the boot {}, and it rejoined in the boot {}",
            offline.boot_id, rejoined.boot_id;
            "read console.log for why it rebooted"
        );
    }
    let changed = workload::changed(vm, proof, before.changes, &offline)?;
    same_boot(&changed, &rejoined)?;
    let (running, observed) = (&[PERSISTENT, EPHEMERAL], run.options.observed(vm.snapshot.is_none()));
    let observation = proof.observes(vm, &rejoined.boot_id, (running, &[RETIRED]), observed)?;
    proof.outlived(EPHEMERAL, &view, &observation)?;
    ping(run, vm, &rejoined)?;
    proof.answers_commands(vm, &rejoined, PERSISTENT)?;
    let view = proof.stays(vm, &observation)?;
    let detail = format!(
        "{}; the workload without a broker after {alone}, then generation {}, started {} times; the process {} for {} at rest",
        short(&rejoined),
        changed.generation,
        changed.starts,
        view.main_pid,
        human_seconds(observed.as_secs_f64())
    );
    Ok(((), detail))
}

/// Cuts the power as often as `--power-cuts` says.
fn cut_again(
    args: &SmokeArgs,
    recorder: &mut Recorder<'_>,
    vm: &mut RunningVm,
    proof: &Proof<'_>,
) -> Result<()> {
    if args.power_cuts == 0 {
        return Ok(());
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    vm.ui.note(&format!("--power-cuts {} --seed {seed}", args.power_cuts));
    let mut cuts = PowerCuts::new(proof, seed);
    for _ in 0..args.power_cuts {
        recorder.on_machine(vm, Phase::PowerCut, vm.plan.limits.rejoin(), |vm| cuts.next(vm, proof))?;
    }
    Ok(())
}

fn short(evidence: &StatusEvidence) -> String {
    let boot: String = evidence.boot_id.chars().take(8).collect();
    format!("revision {}, boot {boot}, sha256 {}…", evidence.kv_revision, &evidence.exe_sha256[..12])
}
