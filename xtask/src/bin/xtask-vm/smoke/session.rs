//! One run from its first line to its verdict: the phases timed and kept, the report filled, everything torn down in
//! order whatever happened.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask::cli::{SmokeArgs, Voice};
use xtask::exit;
use xtask::host::facts::Facts;
use xtask::paths::Cache;
use xtask::report::{
    Failure, HostReport, Phase, PhaseReport, PhaseStatus, Report, Verdict, now_rfc3339, round,
};
use xtask::workspace::Workspace;

use super::RunningVm;
use crate::history::History;
use crate::interrupt::Interrupt;
use crate::plan::Plan;
use crate::run_dir::RunDir;
use crate::screen::Screen;

/// A run.
pub(crate) struct Session<'a> {
    /// The workspace under test.
    pub(crate) workspace: &'a Workspace,
    /// What was asked.
    pub(crate) args: &'a SmokeArgs,
    /// Ctrl-C.
    pub(crate) interrupt: Interrupt,
    /// What a person sees.
    pub(crate) screen: Screen,
    /// What will be in report.json.
    pub(crate) report: Report,
    /// The cache.
    pub(crate) cache: Cache,
    /// The run's directory.
    pub(crate) run: RunDir,
    /// The machine, once it is up: teardown's.
    pub(crate) vm: Option<RunningVm>,
    /// The limit of the phase that runs; another accelerator changes it.
    pub(crate) limit: Option<Duration>,
    history: Option<History>,
    phase: Phase,
    started: Instant,
}

impl<'a> Session<'a> {
    /// Collects what dead runs left, says so, and makes this run's directory.
    pub(crate) fn begin(workspace: &'a Workspace, args: &'a SmokeArgs, voice: Voice) -> Result<Self> {
        let interrupt = Interrupt::install()?;
        let screen = Screen::new(voice);
        let cache = Cache::from_env()?;
        let (run, collected) = RunDir::create(&cache)?;
        for dead in collected {
            screen.line(&format!(
                "collected the run {}, which died: {} process(es) ended, its directory deleted",
                dead.id, dead.processes
            ));
        }
        let mut report = Report::begin(run.id(), &now_rfc3339(), args.build.arch);
        report.sabotage = args.sabotage.map(|fault| fault.name());
        let phase = Phase::Preflight;
        let started = Instant::now();
        Ok(Self {
            workspace,
            args,
            interrupt,
            screen,
            report,
            cache,
            run,
            vm: None,
            limit: None,
            history: None,
            phase,
            started,
        })
    }

    /// Runs one phase: its name first, then its time, its outcome and its detail.
    pub(crate) fn phase<T>(
        &mut self,
        phase: Phase,
        limit: Option<Duration>,
        body: impl FnOnce(&mut Self) -> Result<(T, String)>,
    ) -> Result<T> {
        self.phase = phase;
        self.limit = limit;
        let last_time = self.history.as_ref().and_then(|history| history.of(phase));
        self.screen.start(phase.title(), last_time);
        let started = Instant::now();
        let outcome = self.interrupt.check().and_then(|()| body(self));
        let (status, detail) = match &outcome {
            Ok((_, detail)) => (PhaseStatus::Passed, detail.clone()),
            Err(error) => (PhaseStatus::Failed, error.to_string()),
        };
        self.screen.end(status, &detail);
        self.report.phases.push(PhaseReport {
            name: phase,
            status,
            seconds: round(started.elapsed().as_secs_f64()),
            limit_seconds: self.limit.map(|limit| limit.as_secs_f64()),
            detail,
        });
        outcome.map(|(value, _)| value)
    }

    /// The host's and the guest's parts of the report, once they are known.
    pub(crate) fn describe_host(&mut self, facts: &Facts, plan: &Plan) -> Result<()> {
        self.report.host = HostReport {
            os: facts.os.clone(),
            kernel: facts.kernel.clone(),
            cpus: facts.cpus,
            qemu: Some(plan.qemu_version.clone()),
            libvirt: facts.libvirt.clone().ok(),
            accelerator: None,
            accelerator_note: None,
        };
        self.report.guest.vcpus = plan.spec.vcpus;
        self.report.guest.memory_mib = plan.spec.memory_mib;
        self.report.guest.machine_type = plan.spec.architecture.profile().machine_type.to_owned();
        self.describe_accelerator(plan);
        Ok(())
    }

    /// Again when KVM gave way to emulation.
    pub(crate) fn describe_accelerator(&mut self, plan: &Plan) {
        self.report.host.accelerator = Some(plan.accelerator);
        self.report.host.accelerator_note.clone_from(&plan.accelerator_note);
        let cpu = plan.spec.cpu.as_deref();
        self.report.guest.cpu =
            xtask::domain::cpu::Cpu::resolve(plan.spec.architecture, plan.accelerator, cpu).describe();
        self.history = Some(History::load(&self.cache, &plan.kind()));
    }

    /// Tears down, concludes, writes the report, shows the verdict; the exit code.
    pub(crate) fn finish(mut self, outcome: Result<()>) -> Result<u8> {
        let mut verdict = match &outcome {
            Ok(()) => Verdict::Verified,
            Err(error) => {
                let tail = self.vm.as_ref().map(|vm| vm.console.tail()).unwrap_or_default();
                self.report.failure.get_or_insert_with(|| Failure::new(self.phase, error, tail));
                exit::verdict(error)
            }
        };
        let directory = self.args.report.clone().unwrap_or_else(|| self.run.path().to_owned());
        let torn_down = self.teardown(&directory, verdict);
        if let Err(error) = torn_down {
            verdict = if verdict == Verdict::Verified { Verdict::Failed } else { verdict };
            self.report.failure.get_or_insert_with(|| Failure::new(Phase::Teardown, &error, Vec::new()));
        }
        self.report.conclude(verdict, self.started.elapsed().as_secs_f64());
        if let (None, Some(history)) = (&self.args.sabotage, &mut self.history)
            && let Err(error) = history.keep(&self.cache, &self.report.phases)
        {
            self.screen.note(&format!("warning: the phases' times are not kept: {error:#}"));
        }
        let path = self.report.write(&directory)?;
        if let Some(failure) = &self.report.failure {
            for line in failure.lines() {
                self.screen.line(&line);
            }
        }
        self.screen.line(&format!("report: {}", path.display()));
        self.screen.verdict(&self.report.verdict_line(), verdict == Verdict::Verified);
        // A flag that could only be judged here is still a usage error for whoever called.
        let usage = outcome.err().filter(|error| error.is::<exit::Usage>());
        Ok(usage.map_or(verdict.exit_code(), |error| exit::code(&error)))
    }

    /// In order: the journal while the guest lives, the machine, the broker, the files.
    fn teardown(&mut self, directory: &Path, verdict: Verdict) -> Result<()> {
        let vm = self.vm.take();
        let keep = self.args.keep && vm.is_some();
        self.phase = Phase::Teardown;
        self.screen.start(Phase::Teardown.title(), None);
        let started = Instant::now();
        let result = self.collect_evidence(directory, verdict, vm.as_ref()).and_then(|()| match vm {
            Some(vm) if keep => {
                let how = vm.release(&self.run)?;
                self.screen.line(&how);
                Ok("the machine is kept".to_owned())
            }
            vm => {
                let stopped = vm.map_or(Ok(()), RunningVm::stop);
                // Also where stopping failed: this ends what names the run's directory.
                self.run.clean()?;
                stopped.map(|()| "nothing is left running".to_owned())
            }
        });
        let (status, detail) = match &result {
            Ok(detail) => (PhaseStatus::Passed, detail.clone()),
            Err(error) => (PhaseStatus::Failed, error.to_string()),
        };
        self.screen.end(status, &detail);
        let seconds = round(started.elapsed().as_secs_f64());
        let report = PhaseReport { name: Phase::Teardown, status, seconds, limit_seconds: None, detail };
        self.report.phases.push(report);
        result.map(|_| ())
    }

    /// Into the report's directory: the console always, the rest where something failed.
    fn collect_evidence(&mut self, directory: &Path, verdict: Verdict, vm: Option<&RunningVm>) -> Result<()> {
        xtask::paths::make_private_dir(directory)?;
        let own = self.run.path().join("console.log");
        if own.exists() && directory != self.run.path() {
            copy(&own, &directory.join("console.log"))?;
        }
        if verdict == Verdict::Failed {
            let work = self.run.work();
            for (from, to) in [
                (work.join("domain.xml"), "domain.xml"),
                (work.join("nats/nats.log"), "nats.log"),
                (work.join("v/log/qemu/vm.log"), "qemu.log"),
            ] {
                if from.exists() {
                    copy(&from, &directory.join(to))?;
                }
            }
            if let Some(vm) = vm {
                vm.fetch_journal(&directory.join("journal.log"), &mut self.screen);
            }
        }
        Ok(())
    }
}

fn copy(from: &Path, to: &PathBuf) -> Result<()> {
    std::fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
