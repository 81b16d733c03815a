//! The episodes of a run, the shrinking of those that fail, and the verdict.

use std::time::Instant;

use anyhow::Result;
use xtask_core::bail_guest;
use xtask_core::cli::{Schedule, TortureArgs};
use xtask_core::error::Kind;
use xtask_core::format::{human_seconds, name_of, round, shell_word};
use xtask_core::fs::make_private_dir;
use xtask_core::report::{EpisodeReport, Phase};
use xtask_faults::{Healed, bound_of, shrink, statistics, table};

use super::super::super::proof::Proof;
use super::super::super::recorder::Recorder;
use super::super::super::run::Run;
use super::super::super::running::RunningVm;
use super::super::bundle::flags;
use super::episode::{self, Baseline, Episode};
use super::frozen::Frozen;

/// The directory, in the run's directory, with the evidence of the episodes that failed.
const EVIDENCE: &str = "episodes";
/// The number of failed episodes after which a run ends. Each of them is repeated several times with fewer faults.
const MAX_FAILED: usize = 3;
/// The maximum number of episodes with which the faults of a failed one are reduced.
const MAX_REPETITIONS: usize = 12;

/// The episodes of a run.
pub(super) struct Episodes<'r, 'a, 'p> {
    pub(super) run: &'r Run<'r>,
    pub(super) args: &'r TortureArgs,
    pub(super) recorder: &'r mut Recorder<'a>,
    pub(super) vm: &'r mut RunningVm,
    pub(super) proof: &'r mut Proof<'p>,
    pub(super) frozen: &'r Frozen,
    pub(super) baseline: &'r Baseline,
}

impl Episodes<'_, '_, '_> {
    /// Runs one episode after the other.
    ///
    /// # Errors
    /// Returns a failure of the guest if an episode fails.
    pub(super) fn all(&mut self, schedules: &[Schedule]) -> Result<()> {
        let outcome = self.each(schedules);
        self.show_times();
        outcome
    }

    fn each(&mut self, schedules: &[Schedule]) -> Result<()> {
        let begun = Instant::now();
        let mut failed = Vec::new();
        for (number, schedule) in schedules.iter().enumerate() {
            let left =
                begun.elapsed().as_secs_f64() / number.max(1) as f64 * (schedules.len() - number) as f64;
            let left =
                if number == 0 { String::new() } else { format!(", about {} left", human_seconds(left)) };
            self.run.ui.note(&format!("episode {} of {}: {schedule}{left}", number + 1, schedules.len()));
            let report = self.one(number as u64 + 1, schedule)?;
            if !report.is_sound() {
                failed.push(report);
            }
            if failed.len() >= MAX_FAILED {
                break;
            }
        }
        let Some(first) = failed.first() else { return self.nothing_found() };
        bail_guest!(
            "{} of the episodes failed; the first one was the episode {}: {}", failed.len(), first.number, first.detail;
            "read the directory {EVIDENCE} of the report; repeat it with: {}",
            first.command.as_deref().unwrap_or_default()
        )
    }

    /// Puts the healing times into the report, and shows them.
    fn show_times(&mut self) {
        let Some(faults) = &mut self.recorder.report.faults else { return };
        let healed = |episode: &EpisodeReport| {
            Some(Healed {
                episode: usize::try_from(episode.number).ok()?,
                schedule: episode.schedule.parse().ok()?,
                seconds: episode.healing_seconds?,
                bound_seconds: episode.bound_seconds,
            })
        };
        let healed: Vec<_> = faults.episodes.iter().filter_map(healed).collect();
        faults.healing = statistics(&healed);
        if !healed.is_empty() {
            table(&faults.healing).lines().for_each(|line| self.run.ui.line(line));
        }
    }

    /// Returns a failure of the guest if a planted fault was not found.
    fn nothing_found(&self) -> Result<()> {
        let Some(fault) = &self.args.sabotage else { return Ok(()) };
        bail_guest!(
            "no episode shows the planted fault {}", name_of(fault);
            "a check of cargo xtask does not work, or the episodes lack the fault that shows it; that says nothing about the \
             agent"
        )
    }

    /// Runs an episode, and puts its result into the report. If it fails, repeats it with fewer faults.
    fn one(&mut self, number: u64, schedule: &Schedule) -> Result<EpisodeReport> {
        let begun = Instant::now();
        let bound = episode::bound(schedule, self.vm);
        let mut report = EpisodeReport {
            number,
            schedule: schedule.to_string(),
            boots: bound_of(schedule).boot,
            bound_seconds: bound.as_secs_f64(),
            ..EpisodeReport::default()
        };
        match self.course(schedule)? {
            Ok(healing) => {
                report.healing_seconds = Some(healing);
                report.detail = format!("healed in {healing} s");
            }
            Err(detail) => {
                self.keep_evidence(number);
                report.detail = detail;
                report.command = Some(self.repetition(schedule)?);
            }
        }
        report.seconds = round(begun.elapsed().as_secs_f64());
        if let Some(faults) = &mut self.recorder.report.faults {
            faults.episodes.push(report.clone());
        }
        Ok(report)
    }

    /// Runs the course of an episode. Returns the seconds of the healing, or the failure of the guest.
    fn course(&mut self, schedule: &Schedule) -> Result<Result<f64, String>> {
        let Self { run, recorder, vm, proof, frozen, baseline, .. } = self;
        let limit = episode::bound(schedule, vm) + schedule.end().duration() + vm.plan.limits.join();
        recorder.on_machine(vm, Phase::Episodes, limit, |vm| {
            let mut episode = Episode { run, vm, proof, frozen, baseline };
            match episode.course(schedule) {
                Ok(healing) => {
                    let healing = round(healing.as_secs_f64());
                    Ok((Ok(healing), format!("{schedule}: healed in {healing} s")))
                }
                Err(error) if Kind::Guest.is(&error) => {
                    let error = format!("{error:#}");
                    Ok((Err(error.clone()), format!("{schedule}: FAILED: {error}")))
                }
                Err(error) => Err(error),
            }
        })
    }

    /// Reads the guest's journal and the logs of the run into a directory of the episode.
    fn keep_evidence(&mut self, number: u64) {
        let directory = self.run.dir.path().join(EVIDENCE).join(number.to_string());
        if let Err(error) = make_private_dir(&directory) {
            self.run.warn(&format!("the evidence of the episode {number} is not kept: {error:#}"));
            return;
        }
        self.vm.fetch_state(self.run, &directory);
        self.run.copy_evidence(&directory);
    }

    /// Returns the command that repeats a failed episode. If its faults cannot be reduced, the command has all of them.
    fn repetition(&mut self, schedule: &Schedule) -> Result<String> {
        match self.shrunk(schedule) {
            Err(error) if !Kind::Interrupted.is(&error) => {
                self.run.warn(&format!("the faults of the episode could not be reduced: {error:#}"));
                Ok(self.command(schedule))
            }
            reduced => reduced,
        }
    }

    /// Returns the command that repeats a failed episode with the fewest faults that still fail.
    fn shrunk(&mut self, schedule: &Schedule) -> Result<String> {
        let smallest = shrink(schedule, MAX_REPETITIONS, |fewer| {
            self.run.ui.note(&format!("repeating the episode with fewer faults: {fewer}"));
            self.course(fewer).map(|outcome| outcome.is_err())
        })?;
        // An episode that fails without any fault is repeated with its faults.
        Ok(self.command(if smallest.faults().is_empty() { schedule } else { &smallest }))
    }

    /// Returns the command that runs one schedule on the same machine.
    fn command(&self, schedule: &Schedule) -> String {
        let options = &self.run.options;
        let mut words = ["cargo", "xtask", "torture", "--arch"].map(str::to_owned).to_vec();
        words.push(options.arch.to_string());
        words.extend(flags(options.machine, options.timeout_scale));
        if let Some(agent) = &self.args.agent {
            words.extend(["--agent".to_owned(), agent.display().to_string()]);
        }
        if let Some(fault) = &self.args.sabotage {
            words.extend(["--sabotage".to_owned(), name_of(fault)]);
        }
        words.extend(["--schedule".to_owned(), schedule.to_string()]);
        words.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
    }
}
