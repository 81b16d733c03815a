//! `cargo xtask smoke`: the phases, readable as prose. [`session`] runs and times a phase, [`inspect`] looks at the executable, [`image`] gets the disk, [`boot`] gets the machine up and [`warm`] restores one, [`running`] is the machine
//! while it runs, [`workload`] has it run containers, [`verify`] and [`deployed`] judge what the fleet bus shows.

mod boot;
mod compare;
mod deployed;
mod footprint;
mod image;
mod inspect;
mod offline;
mod running;
mod session;
mod times;
mod verify;
mod warm;
mod workload;

use std::time::Instant;

use anyhow::{Context, Result};
use xshell::Shell;
use xtask_core::arch::VmArchitecture;
use xtask_core::build::{self, Agent};
use xtask_core::cli::{Sabotage, SmokeArgs, Until, UpArgs, Verbosity};
use xtask_core::error::{self, Failure};
use xtask_core::format::human_seconds;
use xtask_core::host::tools;
use xtask_core::inspect_target::check_agent;
use xtask_core::limits;
use xtask_core::os_release::OsReleaseReport;
use xtask_core::preflight::{Preflight, PreflightRequest};
use xtask_core::report::{AgentReport, Phase, StatusEvidence, WorkloadEvidence};
use xtask_core::workspace::Workspace;

use crate::guest::filesystem::CHECKER;
use boot::Payload;
pub(crate) use boot::make_writable_files;
pub(crate) use image::ensure_or_fall_back;
use image::ready_image;
pub(crate) use running::RunningVm;
pub(crate) use session::Session;
use verify::ExpectedStatus;
use xtask_core::plan::Plan;
use xtask_fleet::ReceivedStatus;

/// Runs the smoke; the verdict is on the screen and in the report when this returns.
pub(crate) fn run(workspace: &Workspace, args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    if args.verify_cold {
        return compare::run(args, verbosity);
    }
    let mut session = Session::begin(workspace, args, verbosity)?;
    let outcome = phases(&mut session);
    match session.finish(outcome) {
        0 => Ok(()),
        code => Err(Failure::reported(code).into()),
    }
}

fn phases(session: &mut Session<'_>) -> Result<()> {
    let plan = session.phase(Phase::Preflight, None, preflight)?;
    let (agent, workload) = session.phase(Phase::Build, None, |session| {
        let (agent, detail) = build(session)?;
        Ok(((agent, workload_image(session)?), detail))
    })?;
    let complete =
        session.phase(Phase::Inspect, None, |session| inspect::before_image(session, &plan, &agent))?;
    let (plan, image) = session.phase(Phase::Image, None, |session| ready_image(session, plan))?;
    if complete != Some(image.digest.to_string()) {
        session.phase(Phase::Inspect, None, |session| inspect::with_image(session, &plan, &agent))?;
    }
    let booted = session.phase(Phase::Boot, Some(plan.limits.boot()), |session| {
        RunningVm::boot(session, plan, &image, &Payload::Agent(&agent, &workload))
    });
    let mut vm = match booted {
        Ok(vm) => vm,
        // A machine that does not come out of a damaged snapshot says nothing of the agent.
        Err(error) => return session.snapshot_is_sound().and(Err(error)),
    };
    let outcome = prove(session, &mut vm, &agent);
    // What was seen on a snapshot that is not what was saved counts for nothing, whatever it was.
    let outcome = session.snapshot_is_sound().and(outcome);
    // Whatever came of it, teardown owns the machine from here.
    session.vm = Some(vm);
    outcome
}

/// The proof itself, on a machine that is up.
fn prove(session: &mut Session<'_>, vm: &mut RunningVm, agent: &Agent) -> Result<()> {
    let limits = vm.limits();
    session.phase(Phase::Provision, Some(limits.provision()), |session| provision(session, vm))?;
    let joined = session.phase(Phase::Join, Some(limits.join()), |session| join(session, vm, agent))?;
    if session.args.until == Until::Join {
        return Ok(());
    }
    session.phase(Phase::Ping, Some(limits.ping()), |session| ping(session, vm, &joined))?;
    footprint::rest(session, vm)?;
    let workload = session
        .phase(Phase::Workload, Some(limits.workload()), |session| workload::run(session, vm, &joined))?;
    let cut = session.phase(Phase::PowerCut, None, |session| power_cut(session, vm))?;
    let before = Before { joined, workload, cut };
    session.phase(Phase::Rejoin, Some(limits.rejoin()), |session| rejoin(session, vm, agent, &before))?;
    match session.args.sabotage {
        None => Ok(()),
        Some(fault) => Err(Failure::guest(
            format!("the smoke did not find the planted fault {}", fault.name()),
            "a check of cargo xtask does not work; that is a bug of cargo xtask, not of the agent",
        )
        .into()),
    }
}

/// `vm up`: the phases of a smoke up to a machine that can be entered, which is left under its name.
pub(crate) fn up(workspace: &Workspace, up: &UpArgs, verbosity: Verbosity) -> Result<()> {
    let args = SmokeArgs::for_machine(up.arch, &up.machine);
    let mut session = Session::begin(workspace, &args, verbosity)?;
    let outcome = machine_alone(&mut session);
    let outcome = session.snapshot_is_sound().and(outcome);
    let kept = session.hand_over(outcome, up.name.as_deref())?;
    if up.json {
        println!("{}", serde_json::to_string_pretty(&kept)?);
    } else {
        println!("{}", kept.name);
    }
    Ok(())
}

fn machine_alone(session: &mut Session<'_>) -> Result<()> {
    let plan = session.phase(Phase::Preflight, None, preflight)?;
    let (plan, image) = session.phase(Phase::Image, None, |session| ready_image(session, plan))?;
    let vm = session.phase(Phase::Boot, Some(plan.limits.boot()), |session| {
        RunningVm::boot(session, plan, &image, &Payload::Nothing)
    })?;
    let vm = session.vm.insert(vm);
    let limit = vm.limits().provision();
    session.phase(Phase::Provision, Some(limit), |session| {
        let mut vm = session.vm.take().context("the machine that was just started")?;
        let ready = vm.wait(session, "the guest to take its keys", limit, |vm| vm.has_keys());
        let ready = ready.and_then(|()| clock_jumped(session, &vm));
        session.vm = Some(vm);
        ready.map(|clock| ((), format!("it can be entered{clock}")))
    })
}

/// What was asked, resolved on what this machine has.
fn preflight(session: &mut Session<'_>) -> Result<(Plan, String)> {
    let args = session.args;
    let asked = PreflightRequest { architectures: &[args.build.arch], machine: &args.machine, for_ci: false };
    let preflight = Preflight::check(session.workspace, &asked)?;
    preflight.verdict()?;
    if args.fsck && tools::find(CHECKER).is_none() {
        let (error, hint) = (format!("--fsck: {CHECKER} is not on PATH"), "install e2fsprogs".to_owned());
        return Err(Failure::host(error, hint).into());
    }
    let facts = preflight.facts.first().context("one architecture was asked for")?;
    let plan = Plan::resolve(facts, args.timeout_scale)?;
    warm::check_flags(args, &plan)?;
    session.describe_host(facts, &plan)?;
    let why = plan.accelerator_note().map_or(String::new(), |note| format!(" ({note})"));
    let detail = format!("QEMU {}, {}{why}", plan.qemu_version, plan.accelerator());
    Ok((plan, detail))
}

/// The executable under test: built, or as given.
fn build(session: &mut Session<'_>) -> Result<(Agent, String)> {
    let args = session.args;
    let agent = match &args.agent {
        Some(path) => {
            let path = path
                .canonicalize()
                .map_err(|error| Failure::usage(format!("--agent {}: {error}", path.display())))?;
            Agent::read(&path, args.build.arch)?
        }
        None => {
            let shell = Shell::new().context("start a shell of commands")?;
            session.ui.pause();
            let built = build::build(&shell, session.workspace, &args.build);
            // A compiler that the Ctrl-C ended is no failure of its own.
            session.ui.check()?;
            built?
        }
    };
    check_agent(&agent)?;
    session.report.agent = Some(AgentReport {
        path: agent.path.clone(),
        sha256: agent.sha256.clone(),
        version: None,
        target: args.build.arch.profile().triple.to_owned(),
    });
    let detail = agent.describe();
    Ok((agent, detail))
}

/// What the fleet will have the device run; nothing is known about the agent where it cannot be made.
fn workload_image(session: &Session<'_>) -> Result<Vec<u8>> {
    let own = session.args.build.arch;
    let arch = match session.args.sabotage {
        Some(Sabotage::ForeignImage) => {
            VmArchitecture::ALL.into_iter().find(|arch| *arch != own).unwrap_or(own)
        }
        _ => own,
    };
    crate::guest::workload::image(session.workspace, &session.cache, arch).map_err(|error| {
        let hint = "a static executable needs the C library's archive, libc.a: cargo xtask preflight --fix";
        error::host_fault(error, format!("make the smoke's workload for {arch}"), hint)
    })
}

/// The guest says itself how its installation ended.
fn provision(session: &mut Session<'_>, vm: &mut RunningVm) -> Result<((), String)> {
    let limit = vm.limits().provision();
    vm.wait(session, "the guest to install the agent", limit, |vm| vm.provisioned())?;
    Ok(((), format!("agent/dist/install.sh succeeded in the guest{}", clock_jumped(session, vm)?)))
}

/// What there is to say of a restored guest's clock, once it is provisioned; an error where it was not set.
fn clock_jumped(session: &mut Session<'_>, vm: &RunningVm) -> Result<String> {
    let Some(snapshot) = &mut session.report.snapshot else { return Ok(String::new()) };
    let step = warm::clock_step(&vm.console)?;
    snapshot.clock_step_seconds = Some(step);
    Ok(format!("; its clock jumped by {step} s"))
}

/// A status of the very executable that was built, on the very machine that was asked for.
fn join(session: &mut Session<'_>, vm: &mut RunningVm, agent: &Agent) -> Result<(StatusEvidence, String)> {
    let expected = ExpectedStatus::new(agent, vm.image());
    let seen = vm.wait_for_status(session, "the agent's first status", vm.limits().join(), |seen| {
        verify::join(seen, &expected)
    })?;
    let evidence = verify::evidence(&seen);
    session.report.evidence.join = Some(evidence.clone());
    session.report.evidence.footprint = footprint::first(agent, &seen);
    session.report.guest.kernel = Some(seen.status.kernel.clone());
    session.report.guest.os_release = Some(OsReleaseReport {
        id: seen.status.os_release.id.clone(),
        version_id: seen.status.os_release.version_id.clone(),
    });
    if let Some(agent) = &mut session.report.agent {
        agent.version = Some(seen.status.agent_version.clone());
    }
    let detail = format!("{} {}, {}", seen.status.machine, short(&evidence), seen.status.kernel);
    Ok((evidence, detail))
}

/// The agent answers a command, and it is the one that joined.
fn ping(session: &mut Session<'_>, vm: &mut RunningVm, joined: &StatusEvidence) -> Result<((), String)> {
    let started = Instant::now();
    let limit = vm.limits().ping();
    let reply = vm.wait(session, "the agent's answer to a ping", limit, |vm| vm.broker.ping().map(Some))?;
    verify::pong(&reply, vm.device_id(), joined)?;
    Ok(((), format!("answered in {}", human_seconds(started.elapsed().as_secs_f64()))))
}

/// What a machine with power had proven.
struct Before {
    joined: StatusEvidence,
    workload: WorkloadEvidence,
    cut: Cut,
}

/// What the bus had when the machine had no power.
struct Cut {
    /// The last status of before.
    last: ReceivedStatus,
    /// The revision of what the fleet desires since.
    changed: u64,
}

/// virDomainDestroy, no shutdown; then start, without a broker and with something new desired.
fn power_cut(session: &mut Session<'_>, vm: &mut RunningVm) -> Result<(Cut, String)> {
    vm.cut_power()?;
    // What the guest had sent before it died is stored by now, and nothing more can come.
    std::thread::sleep(limits::BROKER_SETTLE);
    let last = vm.broker.latest()?.context("the status from before the power cut is gone")?;
    let changed = workload::change_while_off(vm)?;
    // Before its next boot repairs what it may.
    let disk = vm.files.overlay.clone();
    let checked = session.check_disk(&disk)?;
    vm.power_on()?;
    session.ui.detail("the domain was destroyed and started again; the broker is away");
    let detail =
        format!("power cut after revision {}, started again without a broker{checked}", last.revision);
    Ok((Cut { last, changed }, detail))
}

/// The workload before there is a broker; then a status that only a new boot of the same executable can have written; then
/// the workload as it was changed meanwhile. The guest's clock plays no part.
fn rejoin(
    session: &mut Session<'_>,
    vm: &mut RunningVm,
    agent: &Agent,
    before: &Before,
) -> Result<((), String)> {
    let Before { joined, workload, cut } = before;
    let started = Instant::now();
    let offline = workload::back_without_broker(session, vm, workload)?;
    let alone = human_seconds(started.elapsed().as_secs_f64());
    vm.broker.come_back(&session.ui)?;
    let expected = ExpectedStatus::new(agent, vm.image());
    let seen = vm.wait_for_status(session, "a status of the new boot", vm.limits().rejoin(), |seen| {
        verify::rejoin(seen, &expected, joined, &cut.last)
    })?;
    let evidence = verify::evidence(&seen);
    session.report.evidence.rejoin = Some(evidence.clone());
    let changed = workload::changed(session, vm, cut.changed, &offline, &evidence)?;
    let detail = format!(
        "{}; the workload without a broker after {alone}, then generation {}, started {} times",
        short(&evidence),
        changed.generation,
        changed.starts
    );
    Ok(((), detail))
}

fn short(evidence: &StatusEvidence) -> String {
    let boot: String = evidence.boot_id.chars().take(8).collect();
    format!("revision {}, boot {boot}, sha256 {}…", evidence.kv_revision, &evidence.exe_sha256[..12])
}
