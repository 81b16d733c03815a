//! The end of a run for people and for CI: the last lines on the screen, `report.json`, and the files that are made from
//! it. A file that cannot be written is a warning and does not change the verdict.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use xtask_core::error::Verdict;
use xtask_core::fs::write_private;
use xtask_core::report::past::{self, remember};
use xtask_core::report::{FailureReport, HTML, JUNIT, Report};
use xtask_reports::{Evidence, annotations, html, junit, markdown};

use super::archive;
use super::run::Run;

/// The variable with the path of the file to which a job on GitHub or Gitea appends its summary.
const SUMMARY: &str = "GITHUB_STEP_SUMMARY";
/// The variables that are `true` in a job on GitHub or Gitea.
const ACTIONS: [&str; 2] = ["GITHUB_ACTIONS", "GITEA_ACTIONS"];

/// Writes all reports, and shows the failure, the path of the report and the verdict. If the report cannot be written
/// into `directory`, all reports are written into the run's directory.
pub(super) fn publish(run: &Run<'_>, report: &mut Report, directory: &Path) {
    let ui = &run.ui;
    for line in report.failure.iter().flat_map(FailureReport::lines) {
        ui.line(&line);
    }
    report.warnings = run.take_warnings();
    let written = report.write(directory).map(|path| (path, directory)).or_else(|error| {
        run.warn(&format!("the report is in the run's directory: {error:#}"));
        report.warnings.extend(run.take_warnings());
        report.write(run.dir.path()).map(|path| (path, run.dir.path()))
    });
    let good = report.verdict == Verdict::Verified;
    match written {
        Ok((path, directory)) => {
            let made = derive(run, report, directory);
            for warning in made.iter().filter_map(|made| made.as_ref().err()) {
                ui.line(&format!("warning: {warning:#}"));
            }
            let archive = made.into_iter().filter_map(Result::ok).flatten().next();
            let show = |text: String| if good { ui.note(&text) } else { ui.line(&text) };
            show(format!("report: {}", path.with_file_name(HTML).display()));
            if let Some(archive) = archive {
                show(format!("everything about the failure: {}", archive.display()));
            }
        }
        Err(error) => ui.line(&format!("warning: {error:#}")),
    }
    ui.verdict(&report.verdict_line(), good);
}

/// Makes everything that is made from the report. Returns the results, of which one may be the path of an archive.
fn derive(run: &Run<'_>, report: &Report, directory: &Path) -> Vec<Result<Option<PathBuf>>> {
    // A run that was interrupted says nothing about the times and outcomes.
    let past = match report.verdict {
        Verdict::Interrupted => Ok(past::past_runs(&run.cache)),
        _ => remember(&run.cache, report).context("remember the outcome of the run"),
    };
    let mut made = Vec::new();
    let past = past.unwrap_or_else(|error| {
        made.push(Err(error));
        Vec::new()
    });
    made.push(write_page(report, directory, past).map(|()| None));
    made.push(write_junit(report, directory).map(|()| None));
    made.push(summarise(run, report).map(|()| None));
    if matches!(report.verdict, Verdict::Failed | Verdict::Unavailable) {
        made.push(archive::write(directory).map(Some).context("archive the evidence of the failure"));
    }
    made
}

fn write_page(report: &Report, directory: &Path, past: Vec<past::PastRun>) -> Result<()> {
    let evidence = Evidence::read(directory, past)?;
    write_private(&directory.join(HTML), html(report, &evidence))
}

fn write_junit(report: &Report, directory: &Path) -> Result<()> {
    write_private(&directory.join(JUNIT), junit(report)?)
}

/// Adds the summary and the annotations to the page of a CI job. Elsewhere, `cargo xtask report --format markdown`
/// prints the summary.
fn summarise(run: &Run<'_>, report: &Report) -> Result<()> {
    if !ACTIONS.iter().any(|name| std::env::var_os(name).is_some_and(|value| value == "true")) {
        return Ok(());
    }
    for annotation in annotations(report) {
        run.ui.line(&annotation);
    }
    let Some(path) = std::env::var_os(SUMMARY) else { return Ok(()) };
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("open {SUMMARY}, {}", path.display()))?;
    writeln!(file, "{}", markdown(report)).with_context(|| format!("write {}", path.display()))
}
