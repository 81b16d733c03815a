//! One run from its first line to its verdict: the phases timed and kept, the report filled, everything torn down in
//! order whatever happened.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask_core::cache::Cache;
use xtask_core::cli::{SmokeArgs, Until, Verbosity};
use xtask_core::error;
use xtask_core::error::{Failure, Kind, Verdict};
use xtask_core::format::{human_seconds, now_rfc3339, round};
use xtask_core::host::facts::Facts;
use xtask_core::limits;
use xtask_core::report::{
    FailureReport, HostReport, Phase, PhaseReport, PhaseStatus, Report, SnapshotReport,
};
use xtask_core::runs::instance::InstanceRecord;
use xtask_core::workspace::Workspace;

use super::RunningVm;
use super::times::Times;
use crate::guest::filesystem;
use crate::libvirt::paused::{TRANSCRIPT, XML};
use xtask_core::plan::Plan;
use xtask_core::runs::RunDir;
use xtask_images::snapshots::{Snapshot, Verification};
use xtask_jobs::{Step, Ui};

/// A run.
pub(crate) struct Session<'a> {
    /// The workspace under test.
    pub(crate) workspace: &'a Workspace,
    /// What was asked.
    pub(crate) args: &'a SmokeArgs,
    pub(crate) ui: Ui,
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
    snapshot: Option<Verification>,
    /// Whether the machine is left to whoever asked for it.
    keeps: bool,
    /// What is usual of its phases.
    pub(super) times: Times,
    phase: Phase,
    started: Instant,
}

impl<'a> Session<'a> {
    /// Collects what dead runs left, says so, and makes this run's directory.
    pub(crate) fn begin(workspace: &'a Workspace, args: &'a SmokeArgs, verbosity: Verbosity) -> Result<Self> {
        let ui = Ui::install(verbosity)?;
        let cache = Cache::from_env()?;
        let (run, collected) = RunDir::create(&cache)?;
        for dead in collected {
            ui.line(&dead.to_string());
        }
        let mut report = Report::begin(run.id(), &now_rfc3339(), args.build.arch);
        report.sabotage = args.sabotage.map(|fault| fault.name());
        report.until = (args.until != Until::End).then(|| args.until.name());
        let times = Times::new(&cache, args.sabotage.is_some());
        let phase = Phase::Preflight;
        let started = Instant::now();
        Ok(Self {
            workspace,
            args,
            ui,
            report,
            cache,
            run,
            vm: None,
            limit: None,
            snapshot: None,
            keeps: args.keep,
            times,
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
        let usual = self.times.begin(phase);
        self.ui.start(phase.title(), usual);
        let started = Instant::now();
        let outcome = self.ui.check().and_then(|()| body(self));
        let (status, detail) = match &outcome {
            Ok((_, detail)) => (PhaseStatus::Passed, detail.clone()),
            Err(error) => (PhaseStatus::Failed, error.to_string()),
        };
        let silent = self.ui.longest_silence();
        self.ui.end(status, &detail);
        // A phase that is gone through again, as the inspection with the image's own libraries, is one: as it ended.
        let before = self.report.phases.iter().position(|done| done.name == phase);
        let before = before.map_or(0.0, |at| self.report.phases.remove(at).seconds);
        self.report.phases.push(PhaseReport {
            name: phase,
            status,
            seconds: round(before + started.elapsed().as_secs_f64()),
            limit_seconds: self.limit.map(|limit| limit.as_secs_f64()),
            detail,
        });
        if outcome.is_ok() {
            let noted = self.times.note(phase, started.elapsed(), silent);
            self.warn_of(noted);
        }
        outcome.map(|(value, _)| value)
    }

    /// Times only inform.
    fn warn_of(&self, kept: Result<()>) {
        if let Err(error) = kept {
            self.ui.note(&format!("warning: cannot record the phases' times: {error:#}"));
        }
    }

    /// The phase that runs makes a snapshot: another time than that of a boot is usual of it.
    pub(super) fn makes_a_snapshot(&mut self) {
        self.ui.expect(self.times.usual_of_making(self.phase));
    }

    /// The host's and the guest's parts of the report, once they are known.
    pub(crate) fn describe_host(&mut self, facts: &Facts, plan: &Plan) -> Result<()> {
        self.report.host = HostReport {
            os: facts.host.os.name.clone(),
            kernel: facts.host.kernel.clone(),
            cpus: facts.host.cpus,
            qemu: Some(plan.qemu_version.clone()),
            libvirt: facts.host.libvirt.clone().ok(),
            accelerator: None,
            accelerator_note: None,
        };
        self.report.guest.vcpus = plan.spec.vcpus;
        self.report.guest.memory_mib = plan.spec.memory_mib;
        self.report.guest.machine_type = plan.spec.architecture.profile().machine_type.to_owned();
        self.describe_accelerator(plan);
        Ok(())
    }

    /// The run's machine comes out of this snapshot, whose files are hashed from now on, beside the run.
    pub(crate) fn use_snapshot(&mut self, kept: &Snapshot, installs: bool) {
        self.report.snapshot = Some(SnapshotReport {
            key: kept.name(),
            made_at: kept.manifest.made_at.clone(),
            made_by: kept.manifest.made_by.clone(),
            reused: kept.manifest.files.keys().cloned().collect(),
            clock_step_seconds: None,
        });
        self.snapshot = Some(kept.verify());
        let made = kept.manifest.made_by == self.run.id();
        let kept = self.times.are_warm(made, installs);
        self.warn_of(kept);
        if !made {
            self.ui.expect(self.times.usual(self.phase));
        }
    }

    /// Waits for that to end; an error where a file is not what was saved.
    pub(crate) fn snapshot_is_sound(&mut self) -> Result<()> {
        let Some(verification) = self.snapshot.take() else { return Ok(()) };
        let sound = if verification.is_finished() {
            verification.conclude()
        } else {
            let (cache, ui) = (&self.cache, &self.ui);
            ui.step(cache, Step { kind: "snapshot", what: "hash", title: "snapshot" }, || {
                while !verification.is_finished() {
                    ui.tick("hashing the snapshot and its image")?;
                    std::thread::sleep(limits::POLL);
                }
                verification.conclude().map(|()| ((), "is unchanged".to_owned()))
            })
        };
        self.keeps &= sound.is_ok();
        sound
    }

    /// Again when KVM gave way to emulation.
    pub(crate) fn describe_accelerator(&mut self, plan: &Plan) {
        self.report.host.accelerator = Some(plan.accelerator());
        self.report.host.accelerator_note = plan.accelerator_note().map(str::to_owned);
        self.report.guest.cpu = plan.cpu.describe();
        self.times.are_of(plan.kind());
    }

    /// Tears down, concludes, writes the report, shows the verdict; the exit code.
    pub(crate) fn finish(mut self, outcome: Result<()>) -> u8 {
        let mut verdict = match &outcome {
            Ok(()) => Verdict::Verified,
            Err(error) => {
                let tail = self.vm.as_ref().map(|vm| vm.console.tail()).unwrap_or_default();
                self.report.failure = Some(FailureReport::new(self.phase, error, tail));
                error::verdict(error)
            }
        };
        let directory = self.args.report.clone().unwrap_or_else(|| self.run.path().to_owned());
        if let Err(error) = self.teardown(&directory, verdict) {
            verdict = if verdict == Verdict::Verified { error::verdict(&error) } else { verdict };
            self.report
                .failure
                .get_or_insert_with(|| FailureReport::new(Phase::Teardown, &error, Vec::new()));
        }
        self.report.conclude(verdict, self.started.elapsed().as_secs_f64());
        // A flag that could only be judged here is a usage error for whoever called.
        if let Some(error) = outcome.err().filter(|error| Kind::Usage.is(error)) {
            self.report.exit_code = error::code(&error);
        }
        self.warn_of(self.times.keep());
        self.show(&directory, verdict);
        self.report.exit_code
    }

    /// The machine under its name, left to whoever asked for it; where it did not come up, all of it is ended.
    pub(crate) fn hand_over(mut self, outcome: Result<()>, name: Option<&str>) -> Result<InstanceRecord> {
        let released = outcome.and_then(|()| {
            let vm = self.vm.take().context("the machine that was started")?;
            vm.release(&self.run, &self.cache, name, &self.ui)
        });
        let error = match released {
            Ok(kept) => {
                self.warn_of(self.times.keep());
                let name = &kept.name;
                let seconds = human_seconds(self.started.elapsed().as_secs_f64());
                self.ui
                    .note(&format!("{name} is up after {seconds}; cargo xtask vm ssh {name}, vm rm {name}"));
                return Ok(kept);
            }
            Err(error) => error,
        };
        let failure = FailureReport::new(
            self.phase,
            &error,
            self.vm.as_ref().map(|vm| vm.console.tail()).unwrap_or_default(),
        );
        let stopped = self.vm.take().map_or(Ok(()), RunningVm::stop);
        for line in failure.lines() {
            self.ui.line(&line);
        }
        let code = error::code(&error);
        stopped.and(self.run.clean())?;
        Err(Failure::reported(code).into())
    }

    /// The failure first, whatever becomes of the report's file.
    fn show(&self, directory: &Path, verdict: Verdict) {
        for line in self.report.failure.iter().flat_map(FailureReport::lines) {
            self.ui.line(&line);
        }
        let written = self.report.write(directory).or_else(|error| {
            self.ui.line(&format!("warning: {error:#}"));
            self.report.write(self.run.path())
        });
        match written {
            Ok(path) => self.ui.line(&format!("report: {}", path.display())),
            Err(error) => self.ui.line(&format!("warning: {error:#}")),
        }
        self.ui.verdict(&self.report.verdict_line(), verdict == Verdict::Verified);
    }

    /// In order: the journal while the guest lives, the machine, the broker, the files. Every step is made, whatever
    /// became of the one before.
    fn teardown(&mut self, directory: &Path, verdict: Verdict) -> Result<()> {
        let mut vm = self.vm.take();
        self.phase = Phase::Teardown;
        let usual = self.times.begin(Phase::Teardown);
        self.ui.start(Phase::Teardown.title(), usual);
        let started = Instant::now();
        let evidence = self.collect_evidence(directory, verdict, vm.as_mut());
        let gone = self.release_or_stop(vm, verdict);
        let result = gone.and_then(|detail| evidence.map(|()| detail));
        let (status, detail) = match &result {
            Ok(detail) => (PhaseStatus::Passed, detail.clone()),
            Err(error) => (PhaseStatus::Failed, error.to_string()),
        };
        let silent = self.ui.longest_silence();
        self.ui.end(status, &detail);
        let elapsed = started.elapsed();
        let seconds = round(elapsed.as_secs_f64());
        if result.is_ok() && verdict == Verdict::Verified && !self.keeps {
            let noted = self.times.note(Phase::Teardown, elapsed, silent);
            self.warn_of(noted);
        }
        let report = PhaseReport { name: Phase::Teardown, status, seconds, limit_seconds: None, detail };
        self.report.phases.push(report);
        result.map(drop)
    }

    /// Leaves the machine where `--keep` asks for it and it can be left; else ends all there is.
    fn release_or_stop(&mut self, vm: Option<RunningVm>, verdict: Verdict) -> Result<String> {
        let stopped = match vm {
            Some(vm) if self.keeps && verdict != Verdict::Interrupted => {
                match vm.release(&self.run, &self.cache, None, &self.ui) {
                    Ok(InstanceRecord { name, .. }) => {
                        self.ui.line(&format!(
                        "kept: {name}\n  enter:   cargo xtask vm ssh {name}\n  console: cargo xtask vm console {name}\n  \
                         remove:  cargo xtask vm rm {name}\n  the broker has ended: the agent in the machine is offline"
                    ));
                        return Ok("the machine is kept".to_owned());
                    }
                    Err(error) => Err(error),
                }
            }
            Some(vm) => {
                let disk = vm.files.overlay.clone();
                let interrupted = verdict == Verdict::Interrupted;
                vm.stop().and_then(|()| if interrupted { Ok(String::new()) } else { self.check_disk(&disk) })
            }
            None => Ok(String::new()),
        };
        // Also where stopping failed: this ends what names the run's working directory.
        self.run.clean()?;
        stopped.map(|checked| format!("nothing is left running{checked}"))
    }

    /// For `--fsck`, of a machine without power; what there is to say of it. One that is damaged is kept in the run's directory, with
    /// what its domain was.
    pub(super) fn check_disk(&mut self, disk: &Path) -> Result<String> {
        if !self.args.fsck {
            return Ok(String::new());
        }
        self.ui.tick("checking the guest's file systems")?;
        match filesystem::check(disk, &self.run.work(), &self.ui) {
            Ok(count) => Ok(format!("; {count} file system(s) of the guest checked, no damage")),
            Err(error) => {
                if Kind::Guest.is(&error) {
                    let kept = self.run.path().join(DAMAGED);
                    std::fs::rename(disk, &kept).with_context(|| format!("keep {}", kept.display()))?;
                    self.copy_evidence(self.run.path())?;
                }
                Err(error)
            }
        }
    }

    /// What the machine was, and what its broker and its QEMU said.
    fn copy_evidence(&self, directory: &Path) -> Result<()> {
        let work = self.run.work();
        for (from, to) in [
            (work.join(XML), XML),
            (work.join(TRANSCRIPT), TRANSCRIPT),
            (work.join("nats/nats.log"), "nats.log"),
            (work.join("v/log/qemu/vm.log"), "qemu.log"),
        ] {
            if from.exists() {
                copy(&from, &directory.join(to))?;
            }
        }
        Ok(())
    }

    /// Into the report's directory: the console always, the rest where something failed.
    fn collect_evidence(
        &mut self,
        directory: &Path,
        verdict: Verdict,
        vm: Option<&mut RunningVm>,
    ) -> Result<()> {
        xtask_core::fs::make_private_dir(directory)?;
        let own = self.run.path().join("console.log");
        if own.exists() && directory != self.run.path() {
            copy(&own, &directory.join("console.log"))?;
        }
        if verdict == Verdict::Failed {
            self.copy_evidence(directory)?;
            if let Some(vm) = vm {
                vm.fetch_journal(&directory.join("journal.log"), &self.ui);
            }
        }
        Ok(())
    }
}

/// Where a disk whose file system is damaged is kept, in the run's directory.
const DAMAGED: &str = "damaged.qcow2";

fn copy(from: &Path, to: &PathBuf) -> Result<()> {
    std::fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
