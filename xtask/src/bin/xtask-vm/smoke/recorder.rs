//! The record of a run: the times of its phases and its report. At the end of the run, [`Recorder`] does the teardown
//! and determines the verdict.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Error, Result, bail};
use xtask_core::build::Agent;
use xtask_core::build::origin::Origin;
use xtask_core::error::{self, Failure, Kind, Verdict};
use xtask_core::format::{human_seconds, name_of, now_rfc3339, round};
use xtask_core::git::Commit;
use xtask_core::host::facts::Facts;
use xtask_core::plan::Plan;
use xtask_core::report::{
    AgentReport, CONSOLE, DaemonReport, EventReport, FailureReport, HostReport, MAX_STATUSES, Phase,
    PhaseReport, PhaseStatus, Report, StatusReport,
};
use xtask_core::runs::instance::InstanceRecord;
use xtask_fleet::{Arrival, ReceivedStatus};

use super::cause;
use super::proof::Proof;
use super::publish::publish;
use super::run::Run;
use super::running::RunningVm;
use super::teardown;

/// The recorder of one run.
pub(super) struct Recorder<'a> {
    run: &'a Run<'a>,
    /// The content of report.json.
    pub(super) report: Report,
    phase: Phase,
    started: Instant,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(run: &'a Run<'a>) -> Self {
        let mut report = Report::begin(run.dir.id(), &now_rfc3339(), run.options.arch);
        report.workspace = Commit::of(run.workspace.root());
        let plant = run.options.plant.as_ref().map(name_of).or(run.options.agent_fault.as_ref().map(name_of));
        report.sabotage = run.options.sabotage.as_ref().map(name_of).or(plant);
        report.disturbance = run.options.disturb.map(|disturb| name_of(&disturb.disturbance));
        Self { run, report, phase: Phase::Preflight, started: Instant::now() }
    }

    /// Runs one phase. Shows its name at the start, and records its time, its outcome and its detail at the end.
    pub(super) fn phase<T>(
        &mut self,
        phase: Phase,
        limit: Option<Duration>,
        body: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<T> {
        let ui = self.run.ui.clone();
        self.timed(phase, limit, true, || ui.check().and_then(|()| body()))
    }

    /// Runs a phase on a machine. Its limit holds for all waits of the phase together. Later runs do not learn the time of
    /// a phase that has already run.
    pub(super) fn on_machine<T>(
        &mut self,
        vm: &mut RunningVm,
        phase: Phase,
        limit: Duration,
        body: impl FnOnce(&mut RunningVm) -> Result<(T, String)>,
    ) -> Result<T> {
        let (times, ui) = (&self.run.times, self.run.ui.clone());
        let is_first = self.report.phases.iter().all(|done| done.name != phase);
        self.timed(phase, Some(limit), is_first, || {
            ui.check()?;
            vm.deadline = times.deadline();
            let outcome = body(vm);
            cause::explained(vm, outcome)
        })
    }

    /// Runs a phase like `phase`, but does not check for Ctrl-C first. If `teaches` is true and the phase passes, its
    /// time is recorded for later runs.
    fn timed<T>(
        &mut self,
        phase: Phase,
        limit: Option<Duration>,
        teaches: bool,
        body: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<T> {
        let run = self.run;
        self.phase = phase;
        run.ui.start(&phase.title(), run.times.begin(phase, limit));
        let (started, offset) = (Instant::now(), self.console_size());
        let outcome = body().map_err(|error| attributed(phase, error));
        let silent = run.ui.longest_silence();
        self.end(phase, (started, offset), outcome.as_ref().map(|(_, detail)| detail.as_str()));
        if outcome.is_ok() && teaches {
            self.warn_of(run.times.note(phase, started.elapsed(), silent));
        }
        outcome.map(|(value, _)| value)
    }

    /// Returns the size of the console's log, which does not exist before the machine does.
    fn console_size(&self) -> u64 {
        std::fs::metadata(self.run.dir.path().join(CONSOLE)).map_or(0, |file| file.len())
    }

    /// Records the end of a phase that started at a time and at an offset of the console. A phase that runs twice, such
    /// as *inspect*, has one entry with the first start, the sum of the times and the last outcome.
    fn end(
        &mut self,
        phase: Phase,
        (started, offset): (Instant, u64),
        outcome: Result<&str, &anyhow::Error>,
    ) {
        let (status, detail) = match outcome {
            Ok(detail) => (PhaseStatus::Passed, detail.to_owned()),
            Err(error) => (PhaseStatus::Failed, error.to_string()),
        };
        self.run.ui.end(status, &detail);
        let before = self.report.phases.iter().position(|done| done.name == phase);
        let before = before.map(|at| self.report.phases.remove(at));
        let (earlier, first) = before.map_or((0.0, None), |phase| (phase.seconds, phase.started_seconds));
        self.report.phases.push(PhaseReport {
            name: phase,
            status,
            started_seconds: first.or_else(|| Some(self.seconds(started))),
            seconds: round(earlier + started.elapsed().as_secs_f64()),
            limit_seconds: self.run.times.limit().map(|limit| limit.as_secs_f64()),
            detail,
            console_offset: Some(offset),
        });
    }

    /// Shows a warning if the times could not be recorded. This error does not fail the run.
    fn warn_of(&self, recorded: Result<()>) {
        if let Err(error) = recorded {
            self.run.ui.note(&format!("warning: cannot record the phases' times: {error:#}"));
        }
    }

    pub(super) fn host(&mut self, facts: &Facts, daemon: Option<DaemonReport>) {
        self.report.host = HostReport {
            os: facts.host.os.name.clone(),
            kernel: facts.host.kernel.clone(),
            cpus: facts.host.cpus,
            libvirt: facts.host.libvirt.clone().ok(),
            daemon,
            ..HostReport::default()
        };
    }

    /// Records the current plan. Another image or another accelerator leads to another plan.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let (host, guest) = (&mut self.report.host, &mut self.report.guest);
        host.qemu = Some(plan.qemu_version.clone());
        host.accelerator = Some(plan.accelerator());
        host.accelerator_note = plan.accelerator_note().map(str::to_owned);
        guest.cpu = plan.cpu.describe();
        guest.vcpus = plan.spec.vcpus;
        guest.memory_mib = plan.spec.memory_mib;
        plan.spec.architecture.profile().machine_type.clone_into(&mut guest.machine_type);
        self.run.times.set_kind(plan.kind());
    }

    pub(super) fn agent(&mut self, agent: &Agent) {
        // A path may not be UTF-8, but a string in JSON must be.
        let readable = |path: &Path| PathBuf::from(path.to_string_lossy().into_owned());
        let (given_as, profile, rustflags) = match agent.origin.clone() {
            Origin::Given(path) => (Some(readable(&path)), None, None),
            Origin::Built { profile, rustflags } => (None, Some(profile), rustflags),
        };
        self.report.agent = Some(AgentReport {
            path: readable(&agent.path),
            sha256: agent.sha256.clone(),
            version: None,
            target: agent.arch.profile().triple.to_owned(),
            given_as,
            profile,
            rustflags,
            inspect_warnings: Vec::new(),
        });
    }

    /// Records the ids of inspect's warnings.
    pub(super) fn warned(&mut self, ids: Vec<String>) {
        if let Some(agent) = &mut self.report.agent {
            agent.inspect_warnings = ids;
        }
    }

    /// Records the libvirt version, the snapshot, the events and the statuses of a machine, also if its boot failed.
    pub(super) fn machine(&mut self, vm: &RunningVm) {
        self.report.host.libvirt = Some(vm.libvirt_version.clone());
        self.report.host.guest_confined =
            Some(vm.target.is_confined() && (vm.canary.is_some() || vm.plan.place.connect.is_some()));
        self.report.guest.firmware = vm.firmware.clone().or_else(|| self.report.guest.firmware.take());
        self.report.snapshot = vm.snapshot.as_ref().map(|used| used.report.clone());
        self.report.events = vm
            .events
            .iter()
            .map(|(at, kind, text)| EventReport {
                seconds: self.seconds(*at),
                kind: *kind,
                text: text.clone(),
            })
            .collect();
        self.report.statuses = shortened(vm.broker.arrivals().iter().map(|seen| self.status(seen)).collect());
    }

    /// Returns the seconds from the start of the run to `at`.
    fn seconds(&self, at: Instant) -> f64 {
        round(at.saturating_duration_since(self.started).as_secs_f64())
    }

    fn status(&self, arrival: &Arrival) -> StatusReport {
        let ReceivedStatus { revision, status } = &arrival.received;
        StatusReport {
            seconds: self.seconds(arrival.at),
            kv_revision: *revision,
            boot_id: status.boot_id.clone(),
            exe_sha256: status.exe_sha256.clone(),
            sequence: status.sequence,
            uptime_seconds: status.uptime_seconds,
            desired_revision: status.desired_revision,
            deployments: status.deployments.iter().map(|one| format!("{} {}", one.name, one.phase)).collect(),
        }
    }

    /// Records the evidence from the machine.
    pub(super) fn proof(&mut self, proof: &Proof<'_>) {
        self.report.evidence = proof.evidence.clone();
        if let Some(joined) = &proof.joined {
            self.report.guest.kernel = Some(joined.status.kernel.clone());
            self.report.guest.os_release = Some(super::verify::os_release(joined));
            if let Some(agent) = &mut self.report.agent {
                agent.version = Some(joined.status.agent_version.clone());
            }
        }
    }

    /// Does the teardown, sets the verdict, writes the report and shows the verdict. Returns the exit code.
    pub(super) fn finish(mut self, outcome: Result<()>, vm: Option<RunningVm>) -> u8 {
        let mut verdict = Verdict::Verified;
        if let Err(error) = &outcome {
            let console = vm.as_ref().map(|vm| vm.console.tail()).unwrap_or_default();
            self.report.failure = Some(FailureReport::new(self.phase, error, console));
            verdict = error::kind(error).verdict();
        }
        let run = self.run;
        let directory = run.options.report.unwrap_or_else(|| run.dir.path());
        let teaches = verdict == Verdict::Verified && !run.options.keep.applies(verdict);
        let torn_down =
            self.timed(Phase::Teardown, None, teaches, || teardown::all(run, directory, verdict, vm));
        // Of the teardown's steps, only the check of the guest's file systems changes a verdict here.
        if let Err(error) = torn_down {
            verdict = if verdict == Verdict::Verified { error::kind(&error).verdict() } else { verdict };
            let failure = FailureReport::new(Phase::Teardown, &error, Vec::new());
            self.report.failure.get_or_insert(failure);
        }
        self.report.conclude(verdict, self.started.elapsed().as_secs_f64());
        // Some flags can be checked only during the run. The exit code is then that of a usage error.
        if let Some(error) = outcome.err().filter(|error| Kind::Usage.is(error)) {
            self.report.exit_code = error::code(&error);
        }
        self.warn_of(run.times.keep());
        publish(run, &mut self.report, directory);
        self.report.exit_code
    }

    /// Leaves a machine running for the user, under its name. If an error occurred before, stops the machine and the
    /// broker.
    pub(super) fn hand_over(
        self,
        outcome: Result<()>,
        vm: Option<RunningVm>,
        name: Option<&str>,
    ) -> Result<InstanceRecord> {
        let Run { ui, dir, times, .. } = self.run;
        let console = vm.as_ref().map(|vm| vm.console.tail()).unwrap_or_default();
        let released = match (outcome, vm) {
            (Ok(()), Some(vm)) => vm
                .release(self.run, name)
                .map_err(|error| error::host_fault(error, "leave the machine running", "see the causes")),
            (outcome, vm) => {
                if let Some(Err(error)) = vm.map(RunningVm::stop) {
                    ui.line(&format!("warning: the machine or the broker did not end: {error:#}"));
                }
                outcome.and_then(|()| bail!("no machine was started"))
            }
        };
        let error = match released {
            Ok(instance) => {
                self.warn_of(times.keep());
                let (name, seconds) = (&instance.name, human_seconds(self.started.elapsed().as_secs_f64()));
                ui.note(&format!(
                    "{name} is up after {seconds}. Enter it: cargo xtask vm ssh {name}. \
                     Remove it: cargo xtask vm rm {name}"
                ));
                return Ok(instance);
            }
            Err(error) => error,
        };
        for line in FailureReport::new(self.phase, &error, console).lines() {
            ui.line(&line);
        }
        if let Err(error) = dir.clean() {
            ui.line(&format!("warning: a process or a file of the run is left: {error:#}"));
        }
        Err(Failure::reported(error::code(&error)).into())
    }
}

/// Attributes an error of a phase that has no attribution yet. Until the guest runs, and while its power is cut, only
/// the host acts, so the error is the host's. If the agent or the guest is at fault in such a phase, the error already
/// has this attribution.
fn attributed(phase: Phase, error: Error) -> Error {
    if phase > Phase::Boot && !matches!(phase, Phase::PowerCut | Phase::Judge | Phase::Teardown) {
        return error;
    }
    let hint = "see the causes; nothing is known about the agent. Check this host with cargo xtask preflight";
    error::host_fault(error, format!("complete the phase {} on this host", phase.title()), hint)
}

/// Returns at most [`MAX_STATUSES`] statuses: the first and the last ones.
fn shortened(mut statuses: Vec<StatusReport>) -> Vec<StatusReport> {
    if let Some(surplus) = statuses.len().checked_sub(MAX_STATUSES) {
        statuses.drain(MAX_STATUSES / 2..MAX_STATUSES / 2 + surplus);
    }
    statuses
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use xtask_core::cache::Cache;
    use xtask_core::cli::{Cli, Command, HeavyCommand};
    use xtask_core::runs::RunDir;
    use xtask_core::workspace::Workspace;
    use xtask_jobs::Ui;

    use super::*;

    /// Ends a run without a machine and with this console, and returns its exit code and its report.
    fn finished(outcome: Result<()>, report: &Path, written_to: impl Fn(&RunDir) -> PathBuf) -> (u8, Report) {
        let line = ["xtask", "smoke", "--arch", "aarch64", "--report", report.to_str().unwrap()];
        let Command::Heavy(HeavyCommand::Smoke(args)) = Cli::try_parse_from(line).unwrap().command else {
            unreachable!("it is a smoke")
        };
        let directory = tempfile::tempdir().unwrap();
        let (cache, workspace) = (Cache::at(directory.path()), Workspace::find().unwrap());
        let run = Run::in_cache(cache, &workspace, (&*args).into(), Ui::quiet()).unwrap();
        std::fs::write(run.dir.path().join("console.log"), "Linux version").unwrap();
        let code = Recorder::new(&run).finish(outcome, None);
        let report = std::fs::read(written_to(&run.dir).join("report.json")).unwrap();
        (code, serde_json::from_slice(&report).unwrap())
    }

    #[test]
    fn evidence_that_cannot_be_copied_does_not_change_a_verdict() {
        let directory = tempfile::tempdir().unwrap();
        let report = directory.path().join("report");
        std::fs::create_dir_all(report.join("console.log/in-the-way")).unwrap();
        let of_guest = || Err(Failure::guest("no status", "read its journal").into());
        for (outcome, code, verdict) in [(Ok(()), 0, Verdict::Verified), (of_guest(), 1, Verdict::Failed)] {
            let (ended, written) = finished(outcome, &report, |_| report.clone());
            assert_eq!((ended, written.exit_code, written.verdict), (code, code, verdict));
            assert!(written.warnings[0].contains("console.log"), "{:?}", written.warnings);
            assert_eq!(written.failure.is_some(), code == 1);
        }
    }

    #[test]
    fn a_report_whose_directory_is_lost_is_in_the_runs_directory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let (code, written) = finished(Ok(()), &file.join("report"), |dir| dir.path().to_owned());
        assert_eq!((code, written.verdict), (0, Verdict::Verified));
        assert_eq!(written.warnings.len(), 2, "{:?}", written.warnings);
    }

    #[test]
    fn an_error_of_a_phase_in_which_only_the_host_acts_is_the_hosts() {
        for phase in Phase::of_smoke() {
            let plain = anyhow::anyhow!("open /c/x: permission denied");
            let code = error::code(&attributed(phase, plain));
            let of_guest = [Phase::Provision, Phase::Join, Phase::Ping, Phase::Workload, Phase::Rejoin];
            assert_eq!(code, if of_guest.contains(&phase) { 1 } else { 69 }, "{phase:?}");
            let judged = attributed(phase, Failure::guest("the kernel panicked", "read console.log").into());
            assert_eq!(error::code(&judged), 1, "{phase:?}");
        }
    }
}
