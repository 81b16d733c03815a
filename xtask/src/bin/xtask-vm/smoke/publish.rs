//! The end of a run for people and for CI: the last lines on the screen, `report.json`, and the files that are made from
//! it. A file that cannot be written is a warning and does not change the verdict.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use xtask_core::error::Verdict;
use xtask_core::fs::write_atomically;
use xtask_core::job;
use xtask_core::output::write_message;
use xtask_core::report::past::{past_runs, remember};
use xtask_core::report::{FailureReport, HTML, JUNIT, Report};
use xtask_reports::{Evidence, annotations, html, junit, markdown};

use super::archive;
use super::run::Run;

/// Writes all reports, and shows the failure, the path of the page and the verdict. If the report cannot be written into
/// `directory`, all reports are written into the run's directory.
pub(super) fn publish(run: &Run<'_>, report: &mut Report, directory: &Path) {
    let ui = &run.ui;
    run.hide_in_logs();
    report.warnings = run.take_warnings();
    *report = without_secrets(run, report);
    for line in report.failure.iter().flat_map(FailureReport::lines) {
        ui.line(&line);
    }
    let written = report.write(directory).map(|path| (path, directory)).or_else(|error| {
        run.warn(&format!("the report is in the run's directory: {error:#}"));
        report.warnings.extend(run.take_warnings());
        report.write(run.dir.path()).map(|path| (path, run.dir.path()))
    });
    let good = report.verdict == Verdict::Verified;
    let show = |text: String| if good { ui.note(&text) } else { ui.line(&text) };
    match written {
        Ok((path, directory)) => {
            // `report` and `vm open` find a run by its id in the run's directory.
            warned(run, report.write(run.dir.path()));
            let page = warned(run, write_page(run, report, directory));
            show(format!("report: {}", page.unwrap_or(path).display()));
            warned(run, write_junit(report, directory));
            warned(run, summarise(report));
            if !good && report.verdict != Verdict::Interrupted {
                let archived = archive::write(directory, &run.secrets());
                if let Some(archive) = warned(run, archived.context("archive the evidence of the failure")) {
                    show(format!("everything about the failure: {}", archive.display()));
                }
            }
        }
        Err(error) => ui.line(&format!("warning: {error:#}")),
    }
    ui.verdict(&report.verdict_line(), good);
}

/// Shows an error as a warning.
fn warned<T>(run: &Run<'_>, made: Result<T>) -> Option<T> {
    made.inspect_err(|error| run.warn(&format!("{error:#}"))).ok()
}

/// Returns the report without the secrets that the guest may have printed.
fn without_secrets(run: &Run<'_>, report: &Report) -> Report {
    let text = run.secrets().hide(report.to_json().into_bytes());
    serde_json::from_slice(&text).expect("a report without the secrets is a report")
}

/// Writes the page, and remembers the outcome of the run. An interrupted run is not remembered, because it says nothing
/// about the agent or the usual times.
fn write_page(run: &Run<'_>, report: &Report, directory: &Path) -> Result<PathBuf> {
    let past = match report.verdict {
        Verdict::Interrupted => Ok(past_runs(&run.cache)),
        _ => remember(&run.cache, report).context("remember the outcome of the run"),
    };
    let (evidence, unread) = Evidence::read(directory, warned(run, past).unwrap_or_default());
    for error in unread {
        run.warn(&format!("a part of the page is missing: {error:#}"));
    }
    let path = directory.join(HTML);
    write_atomically(&path, html(report, &evidence))?;
    Ok(path)
}

fn write_junit(report: &Report, directory: &Path) -> Result<()> {
    write_atomically(&directory.join(JUNIT), junit(report)?)
}

/// Adds the summary and the annotations to the page of a CI job. Elsewhere, `cargo xtask report --format markdown`
/// prints the summary.
fn summarise(report: &Report) -> Result<()> {
    if !job::is_in_job() {
        return Ok(());
    }
    for annotation in annotations(report) {
        write_message(&format!("{annotation}\n"));
    }
    let Some(path) = std::env::var_os(job::SUMMARY) else { return Ok(()) };
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let mut file = file.with_context(|| format!("open {}, {}", job::SUMMARY, path.display()))?;
    writeln!(file, "{}", markdown(report)).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use xtask_core::cache::Cache;
    use xtask_core::cli::{Cli, Command, HeavyCommand};
    use xtask_core::error::Failure;
    use xtask_core::fs::entries;
    use xtask_core::report::{ARCHIVE, CONSOLE, Phase, REPORT};
    use xtask_core::workspace::Workspace;
    use xtask_jobs::Ui;

    use super::*;

    const CANARY: &str = "a-password-that-nobody-may-see";

    /// Ends a run with this verdict, whose guest has printed a secret. Returns the files that it leaves, by name.
    fn left_by(verdict: Verdict, is_given: bool) -> Vec<(String, Vec<u8>)> {
        use clap::Parser as _;
        let directory = tempfile::tempdir().unwrap();
        let given = directory.path().join("given");
        let mut line = vec!["xtask", "smoke", "--report", given.to_str().unwrap()];
        line.truncate(if is_given { 4 } else { 2 });
        let Command::Heavy(HeavyCommand::Smoke(args)) = Cli::try_parse_from(line).unwrap().command else {
            unreachable!("it is a smoke")
        };
        let (cache, workspace) = (Cache::at(&directory.path().join("cache")), Workspace::find().unwrap());
        let run = Run::in_cache(cache, &workspace, (&*args).into(), Ui::quiet()).unwrap();
        run.hide([CANARY]);
        let output = format!("the console shows {CANARY}\n");
        std::fs::write(run.dir.path().join(CONSOLE), &output).unwrap();
        let target = run.options.report.unwrap_or_else(|| run.dir.path()).to_owned();
        std::fs::create_dir_all(&target).unwrap();
        if is_given {
            run.copy(&run.dir.path().join(CONSOLE), &target.join(CONSOLE));
        }
        run.keep(&target.join("journal.log"), output.clone().into_bytes());
        let mut report = Report::begin(run.dir.id(), "2026-11-22T10:15:00Z", args.build.arch);
        if verdict != Verdict::Verified {
            let error = Failure::guest(format!("it says {CANARY}"), "read it");
            report.failure = Some(FailureReport::new(Phase::Join, &error.into(), vec![output]));
        }
        report.conclude(verdict, 1.0);
        publish(&run, &mut report, &target);
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        entries(&target)
            .filter(|path| path.is_file())
            .map(|path| (name(&path), std::fs::read(&path).unwrap()))
            .collect()
    }

    #[test]
    fn a_failed_run_leaves_all_reports_and_no_secret() {
        for is_given in [true, false] {
            let left = left_by(Verdict::Failed, is_given);
            for name in [REPORT, HTML, JUNIT, ARCHIVE, "journal.log"] {
                assert!(left.iter().any(|(found, _)| found == name), "{name} is missing");
            }
            for (name, content) in left {
                let content = match name.as_str() {
                    ARCHIVE => zstd::decode_all(content.as_slice()).unwrap(),
                    _ => content,
                };
                let text = String::from_utf8_lossy(&content);
                assert!(!text.contains(CANARY), "{name}: {text}");
                let shows = [REPORT, HTML, ARCHIVE, "journal.log"].contains(&name.as_str());
                assert!(!shows || text.contains("[secret]"), "{name} has nothing of the output: {text}");
            }
        }
    }

    #[test]
    fn a_verified_run_leaves_a_page_and_no_archive() {
        let left = left_by(Verdict::Verified, true);
        let has = |name: &str| left.iter().any(|(found, _)| found == name);
        assert!(has(HTML) && has(JUNIT) && !has(ARCHIVE));
    }

    #[test]
    fn an_archive_is_read_as_a_tar() {
        let left = left_by(Verdict::Unavailable, true);
        let (_, archive) = left.iter().find(|(name, _)| name == ARCHIVE).unwrap();
        let mut archive = tar::Archive::new(zstd::Decoder::new(archive.as_slice()).unwrap());
        let mut report = archive
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .find(|entry| entry.path().unwrap().ends_with(REPORT));
        let mut text = String::new();
        report.as_mut().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap().exit_code, 69);
    }
}
