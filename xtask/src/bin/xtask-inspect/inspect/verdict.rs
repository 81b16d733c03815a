//! Judges the files of a collection on all processors, and says which of them fail.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use inspect::finding::{Finding, Report, Severity};
use xtask_core::limits;
use xtask_inspection::Judge;
use xtask_jobs::Ui;

use super::collection::{Collection, Content, Subject};
use super::policy::{Accepted, Policy};

/// A file with its findings.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) name: String,
    pub(super) report: Report,
    accepted: Vec<Option<Accepted>>,
    /// True if a finding that counts fails the file.
    pub(super) fails: bool,
}

impl Judged {
    pub(super) fn new(name: String, report: Report, policy: &Policy) -> Self {
        let accepted: Vec<_> = report.findings.iter().map(|finding| policy.accepts(&name, finding)).collect();
        let mut judged = Self { name, report, accepted, fails: false };
        judged.decide(policy);
        judged
    }

    fn decide(&mut self, policy: &Policy) {
        let limit = policy.denied.unwrap_or(Severity::Refused);
        let counts = |(finding, accepted): (&Finding, Option<Accepted>)| {
            finding.severity >= limit && accepted.is_none()
        };
        let fails = self.findings().any(counts);
        self.fails = fails;
    }

    /// Adds the finding of a run of the program. The run refutes the warnings with the ids `refuted`.
    pub(super) fn add(&mut self, finding: Finding, refuted: &[&str], policy: &Policy) {
        let mut report = self.report.clone();
        report.add([finding]);
        *self = Self::new(std::mem::take(&mut self.name), report, policy);
        for (finding, accepted) in self.report.findings.iter().zip(&mut self.accepted) {
            if finding.severity == Severity::Warned && refuted.contains(&finding.id) {
                accepted.get_or_insert(Accepted::Try);
            }
        }
        self.decide(policy);
    }

    /// Returns the findings, the worst first, with the flag that accepts them.
    pub(super) fn findings(&self) -> impl Iterator<Item = (&Finding, Option<Accepted>)> {
        self.report.findings.iter().zip(self.accepted.iter().copied())
    }

    /// Returns `refused` if a refusal fails the file, `denied` if only `--deny` does, and otherwise `sound`.
    pub(super) fn verdict(&self) -> &'static str {
        match self.worst() {
            Severity::Refused => "refused",
            _ if self.fails => "denied",
            _ => "sound",
        }
    }

    /// Returns the worst severity of the findings that no flag accepts.
    pub(super) fn worst(&self) -> Severity {
        let counted = self.findings().filter(|(_, accepted)| accepted.is_none());
        counted.map(|(finding, _)| finding.severity).max().unwrap_or(Severity::Informs)
    }
}

/// Returns the verdict about all files: that of the worst one. It is `incomplete` if none fails and some could not be
/// read.
pub(super) fn verdict(judged: &[Judged], collection: &Collection) -> &'static str {
    let of_one = |verdict| judged.iter().any(|judged| judged.verdict() == verdict);
    let complete = if collection.unreadable.is_empty() { "sound" } else { "incomplete" };
    ["refused", "denied"].into_iter().find(|verdict| of_one(*verdict)).unwrap_or(complete)
}

/// Judges each file of the collection. The order is that of the subjects.
///
/// # Errors
/// Returns the error of a file that can no longer be read, or of [`Ui::check`] after an interrupt.
pub(super) fn judge(collection: &Collection, policy: &Policy, ui: &Ui) -> Result<Vec<Judged>> {
    let subjects = &collection.subjects;
    if let [subject] = subjects.as_slice() {
        let report = one(subject, &collection.judges[subject.judge])?;
        return Ok(vec![Judged::new(subject.name.clone(), report, policy)]);
    }
    let next = AtomicUsize::new(0);
    let judged: Mutex<Vec<(usize, Result<Report>)>> = Mutex::default();
    let work = || {
        while let Some((index, subject)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            subjects.get(index).map(|subject| (index, subject))
        } {
            if ui.check().is_err() {
                break;
            }
            let report = one(subject, &collection.judges[subject.judge]);
            judged.lock().expect("a judge does not panic").push((index, report));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(subjects.len());
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            let done = judged.lock().expect("a judge does not panic").len();
            ui.tick(&format!("{done} of {} files", subjects.len()))?;
            std::thread::sleep(limits::RETRY);
        }
        Ok(())
    })?;
    ui.check()?;
    let mut judged = judged.into_inner().expect("a judge does not panic");
    judged.sort_by_key(|(index, _)| *index);
    let named = subjects.iter().zip(judged);
    named.map(|(subject, (_, report))| Ok(Judged::new(subject.name.clone(), report?, policy))).collect()
}

/// The checks that a file for another machine or another system does not pass.
const PLATFORM: [&str; 4] = ["elf-class", "elf-endianness", "elf-machine", "elf-osabi"];

/// Lowers the severity of findings about another platform.
fn with_severity(mut report: Report, foreign: Severity) -> Report {
    for finding in report.findings.iter_mut().filter(|finding| PLATFORM.contains(&finding.id)) {
        finding.severity = foreign;
        if foreign == Severity::Warned {
            finding.found.push_str("; it is in PATH, so a script of the image may start it");
        }
    }
    report
}

fn one(subject: &Subject, judge: &Judge) -> Result<Report> {
    let candidate = match &subject.content {
        Content::Judged(report) => return Ok(report.clone()),
        Content::File(candidate) => candidate,
    };
    if let Some(report) = judge.inspection.header(&candidate.start) {
        return Ok(with_severity(report, subject.foreign));
    }
    let bytes = candidate.read()?;
    let mut report = judge.judge(&candidate.path, &bytes);
    let preloaded = subject.preloaded.iter();
    report.add(preloaded.filter_map(|(name, place)| judge.preloaded(&bytes, name, place)));
    Ok(report)
}
