//! The judgement of crash states, the boots of some of them, and the verdict.

use anyhow::{Context, Error, Result};
use fastrand::Rng;
use xtask_core::bail_guest;
use xtask_core::error::{Failure, Kind};
use xtask_core::format::name_of;
use xtask_core::report::{CrashBootReport, Phase};
use xtask_crash::{CrashState, Generator};
use xtask_judge::Judge;

use super::super::proof::Proof;
use super::super::recorder::Recorder;
use super::super::run::Run;
use super::super::running::RunningVm;
use super::boots;
use super::bundle::{self, Bundle};
use super::failing::{self, Failing};
use super::recorded::Recorded;
use super::script::Agents;
use super::states::{self, Tally};

/// The number of states whose file systems e2fsck checks, besides the odd ones.
const CHECKED: u64 = 5;

/// The values that the judgement and the boots of crash states share. The machine is off.
pub(super) struct Torture<'r, 'a> {
    pub(super) run: &'r Run<'a>,
    pub(super) recorder: &'r mut Recorder<'a>,
    pub(super) vm: &'r mut RunningVm,
    pub(super) recorded: &'r Recorded,
    pub(super) judge: &'r Judge,
    pub(super) agents: &'r Agents,
    /// The program of the workload's image.
    pub(super) workload: &'r [u8],
}

/// The numbers of states that are booted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Boots {
    /// The number of states that lose nothing.
    pub(super) sound: u64,
    /// The maximum number of states that lose something.
    pub(super) of_losses: usize,
}

impl Torture<'_, '_> {
    /// Judges `count` states, boots the ones that lose something and some others, and puts the results into the report.
    ///
    /// # Errors
    /// Returns a failure of the guest if a state loses something, or if a booted one does not converge.
    pub(super) fn judge_and_boot(&mut self, seed: u64, count: u64, boots: Boots) -> Result<()> {
        let generator = Generator::new(&self.recorded.log, seed, &self.recorded.moments());
        let tally = self.judge_states(&generator, count)?;
        self.note(&tally, &[]);
        let failing = self.explain(&tally).map_err(|error| unexplained(error, &tally))?;
        // Without an agent, a device does nothing. Only the first boot of the recorded machine installs one.
        let installed = |number: &u64| generator.state(*number).point >= self.recorded.installed();
        let explained: Vec<_> = failing.iter().map(|failed| failed.number).collect();
        let others =
            tally.failed.iter().map(|judged| judged.number).filter(|number| !explained.contains(number));
        let lossy = explained.iter().copied().chain(others).filter(installed).take(boots.of_losses);
        let sound = tally.sound(boots.sound, &mut Rng::with_seed(seed), installed);
        let numbers: Vec<_> = lossy.chain(sound).collect();
        let booted = self.boot(&generator, &numbers);
        if let (Some(first), false) =
            (failing.first(), booted.as_ref().is_err_and(|error| Kind::Interrupted.is(error)))
        {
            if let Err(error) = &booted {
                self.run.warn(&format!("not all states were booted: {error:#}"));
            }
            bail_guest!(
                "{} of {count} crash states lose something: {}", tally.failed.len(), first.losses.join("; ");
                "the report names the missing writes; judge and boot the state again with: {}", first.command
            );
        }
        if let Some(CrashBootReport { number, detail, .. }) = booted? {
            let again = self.keep_stray(number, generator.state(number));
            bail_guest!(
                "the crash state {number} loses nothing, but its device does not converge: {detail}";
                "read console.log; {again}"
            );
        }
        if let Some(plant) = self.run.options.plant {
            bail_guest!(
                "none of {count} crash states shows the planted fault {}", name_of(&plant);
                "a check of cargo xtask does not work, or the states are too few; that says nothing about the agent"
            );
        }
        Ok(())
    }

    /// Explains the states that lose something, and keeps the files with which they are repeated.
    fn explain(&mut self, tally: &Tally) -> Result<Vec<Failing>> {
        let failing = failing::explain(self.run, self.recorded, self.judge, tally)?;
        self.note(tally, &failing);
        if !failing.is_empty() {
            self.keep(&failing)?;
        }
        Ok(failing)
    }

    fn judge_states(&mut self, generator: &Generator<'_>, count: u64) -> Result<Tally> {
        let Self { run, recorded, judge, .. } = *self;
        self.recorder.phase(Phase::Judge, None, || {
            let mut tally = states::judge_all(recorded, judge, generator, count, &run.ui)?;
            states::check_file_systems(run, recorded, judge, (generator, CHECKED), &mut tally)?;
            let (failed, rate, checked) = (tally.failed.len(), tally.rate(), tally.checked);
            let detail = format!(
                "{failed} of {count} lose something; {rate:.0} states a minute; {checked} file systems checked"
            );
            Ok((tally, detail))
        })
    }

    /// Puts the result of the judgement into the report.
    fn note(&mut self, tally: &Tally, failing: &[Failing]) {
        let entries = self.recorded.log.entries();
        let Some(report) = &mut self.recorder.report.torture else { return };
        report.states_per_minute = tally.rate().round();
        report.log_entries = entries.len() as u64;
        report.log_flushes = entries.iter().filter(|entry| entry.flushes).count() as u64;
        report.log_bytes = self.recorded.written_bytes();
        report.acknowledgements = self.recorded.moments().len() as u64;
        report.checked = tally.checked as u64;
        report.failed = tally.failed.len() as u64;
        report.failures = failing.iter().map(Failing::report).collect();
    }

    /// Keeps the files with which the failing states are repeated.
    fn keep(&mut self, failing: &[Failing]) -> Result<()> {
        let image = self.recorder.report.guest.image.as_ref().context("the report has no image")?;
        let registry = self.vm.registry.as_ref().context("there is no registry")?;
        let bundle = Bundle {
            below: self.recorded.below.clone(),
            image: image.digest.clone(),
            uuid: self.vm.files.uuid.clone(),
            registry_port: registry.port(),
            seed: self.recorder.report.torture.as_ref().map_or(0, |torture| torture.seed),
            plant: self.run.options.plant,
            recording: self.recorded.recording.clone(),
        };
        bundle::keep(self.run, self.vm, self.agents, self.workload, (&bundle, failing))
    }

    /// Keeps a state that loses nothing. Returns how it is repeated.
    fn keep_stray(&mut self, number: u64, state: CrashState) -> String {
        let command = bundle::command(self.run, &bundle::file(self.run, number));
        let again = format!("judge and boot the state again with: {command}");
        let stray = Failing { number, state, losses: Vec::new(), missing: Vec::new(), command };
        self.keep(&[stray]).map_or_else(|error| format!("the state could not be kept: {error:#}"), |()| again)
    }

    /// Boots states, and puts the results into the report. Returns the first result of a device that did not converge.
    fn boot(&mut self, generator: &Generator<'_>, numbers: &[u64]) -> Result<Option<CrashBootReport>> {
        let Self { run, recorded, judge, agents, .. } = *self;
        let (limit, image) = (self.vm.plan.limits.rejoin(), self.vm.plan.image.clone());
        let mut not_converged = None;
        for (done, number) in numbers.iter().enumerate() {
            let state = generator.state(*number);
            let judgement = states::judge(recorded, judge, &state)?;
            let agent = agents.with_digest(judgement.executable.as_deref());
            let proof = Proof::new(agent, &image, recorded.recording.device_id.clone());
            let booted = self.recorder.on_machine(self.vm, Phase::Boots, limit, |vm| {
                let booted = boots::boot(run, vm, &proof, recorded, &state);
                let (converged, detail) = match booted {
                    Ok(detail) => (true, detail),
                    Err(error) if Kind::Guest.is(&error) => (false, format!("{error:#}")),
                    Err(error) => return Err(error),
                };
                let title = format!("{} of {}, state {number}: {detail}", done + 1, numbers.len());
                Ok((CrashBootReport { number: *number, converged, detail }, title))
            })?;
            if !booted.converged {
                not_converged.get_or_insert(booted.clone());
            }
            if let Some(report) = &mut self.recorder.report.torture {
                report.boots.push(booted);
            }
        }
        Ok(not_converged)
    }
}

/// Returns the failure of a run whose states lose something, but could not be explained or kept.
fn unexplained(error: Error, tally: &Tally) -> Error {
    let lost = tally.failed.first().and_then(|judged| judged.judgement.losses.first());
    let Some(loss) = lost.filter(|_| !Kind::Interrupted.is(&error)) else { return error };
    let text =
        format!("{} of {} crash states lose something: {}", tally.failed.len(), tally.count, loss.text);
    error.context(Failure::guest(text, "the states could not be explained or kept; see the causes"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use xtask_core::error;
    use xtask_judge::{Judgement, Loss, Rule};

    use super::*;

    #[test]
    fn a_loss_stays_the_verdict_if_it_cannot_be_explained() {
        let loss =
            Loss { rule: Rule::StateWhole, path: "/state".to_owned(), text: "/state is empty.".to_owned() };
        let judgement = Judgement { losses: vec![loss], ..Judgement::default() };
        let judged =
            states::Judged { number: 3, state: CrashState { point: 1, missing: Vec::new() }, judgement };
        let tally =
            Tally { count: 300, elapsed: Duration::ZERO, failed: vec![judged], odd: Vec::new(), checked: 0 };
        for host in [Error::msg("No space left on device"), Failure::host("no debugfs", "install it").into()]
        {
            let error = unexplained(host, &tally);
            assert_eq!(error::code(&error), 1);
            assert_eq!(error.to_string(), "1 of 300 crash states lose something: /state is empty.");
        }
        assert_eq!(error::code(&unexplained(Failure::interrupted().into(), &tally)), 130);
    }
}
