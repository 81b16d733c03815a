//! The binary `xtask-report` of `cargo xtask report`. It makes the page, JUnit and the summary of an earlier run again,
//! from the run's `report.json`.

use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::cli::{Cli, Command, ReportArgs, ReportFormat};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::{directories, write_atomically};
use xtask_core::host::tools;
use xtask_core::message;
use xtask_core::output::{conclude, print, write};
use xtask_core::report::past::{PastRun, past_runs};
use xtask_core::report::{HTML, JUNIT, REPORT, Report, SCHEMA};
use xtask_reports::{Evidence, html, junit, markdown};

fn main() -> ExitCode {
    conclude(&execute(&Cli::parse()))
}

fn execute(cli: &Cli) -> Result<()> {
    let Command::Report(args) = &cli.command else {
        return Err(Failure::usage("xtask-report does not run this task; run it as cargo xtask").into());
    };
    let directory = match args.run.as_deref().and_then(named_directory) {
        Some(directory) => directory,
        None => find(&Cache::open()?, args.run.as_deref())?,
    };
    // A report of a directory needs no cache.
    let past = Cache::from_env().map(|cache| past_runs(&cache)).unwrap_or_default();
    show(args, past, &directory).map_err(|error| {
        let hint = "see the causes; --format html prints the page and writes nothing";
        host_fault(error, format!("make the report of {}", directory.display()), hint)
    })
}

fn show(args: &ReportArgs, past: Vec<PastRun>, directory: &Path) -> Result<()> {
    let report = read(directory)?;
    let page = || {
        let (evidence, unread) = Evidence::read(directory, past);
        unread.iter().for_each(|error| message!("warning: a part of the page is missing: {error:#}"));
        html(&report, &evidence)
    };
    match args.format {
        Some(ReportFormat::Html) => write(page().as_bytes()).map(drop),
        Some(ReportFormat::Junit) => write(junit(&report)?.as_bytes()).map(drop),
        Some(ReportFormat::Markdown) => write(markdown(&report).as_bytes()).map(drop),
        Some(ReportFormat::Json) => write(report.to_json().as_bytes()).map(drop),
        None => {
            let path = directory.join(HTML);
            write_atomically(&path, page())?;
            write_atomically(&directory.join(JUNIT), junit(&report)?)?;
            print(path.display())?;
            if args.open { open(&path) } else { Ok(()) }
        }
    }
}

/// Reads the report of a run.
fn read(directory: &Path) -> Result<Report> {
    let hint = "give the directory of a run of this version of cargo xtask";
    let report = Report::read(directory).map_err(|error| host_fault(error, "read the report", hint))?;
    if report.schema != SCHEMA {
        bail_host!("{}: it has the schema {}, and this is {SCHEMA}", directory.join(REPORT).display(), report.schema; "{hint}");
    }
    Ok(report)
}

/// Returns the directory that the user named by its path or by that of its report; `None` if there is no report.
fn named_directory(run: &Path) -> Option<PathBuf> {
    if run.file_name().is_some_and(|name| name == REPORT) && run.is_file() {
        return Some(run.with_file_name(""));
    }
    run.join(REPORT).is_file().then(|| run.to_owned())
}

/// Returns the directory of a run in the cache: the newest one, or the one with this id or beginning of an id.
fn find(cache: &Cache, run: Option<&Path>) -> Result<PathBuf> {
    let mut runs = directories(&cache.runs());
    runs.retain(|run| run.join(REPORT).is_file());
    // The ids do not have the year.
    runs.sort_by_cached_key(|run| run.join(REPORT).metadata().and_then(|file| file.modified()).ok());
    let Some(run) = run else {
        let none = || {
            Failure::host(
                format!("no run in {} has a report", cache.runs().display()),
                "run cargo xtask smoke",
            )
        };
        return Ok(runs.pop().ok_or_else(none)?);
    };
    let name = |run: &Path| run.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let wanted = run.to_string_lossy();
    let found: Vec<_> = runs.iter().filter(|run| name(run).starts_with(&*wanted)).collect();
    if let [one] = found[..] {
        return Ok(one.clone());
    }
    let problem =
        if found.is_empty() { "no run has this id and a report" } else { "several runs have such an id" };
    let known: Vec<_> = runs.iter().rev().take(5).map(|run| name(run)).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(Failure::usage(format!("RUN {wanted}: {problem}; the newest runs with a report: {known}")).into())
}

fn open(path: &Path) -> Result<()> {
    let hint = format!("open {} in a browser", path.display());
    let opened = tools::require("xdg-open").and_then(|program| {
        let status = Process::new(&program).arg(path).stdout(std::io::stderr()).status();
        let status = status.with_context(|| format!("run {}", program.display()))?;
        ensure!(status.success(), "{} {}: {status}", program.display(), path.display());
        Ok(())
    });
    opened.map_err(|error| host_fault(error, "open the page", hint))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use xtask_core::arch::VmArchitecture;
    use xtask_core::error::{Kind, code};

    use super::*;

    fn run_in(cache: &Cache, id: &str, age: u64) -> PathBuf {
        let directory = cache.runs().join(id);
        let report = Report::begin(id, "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        let path = report.write(&directory).unwrap();
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        directory
    }

    #[test]
    fn a_run_is_found_by_its_age_its_id_and_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        assert!(Kind::Host.is(&find(&cache, None).unwrap_err()));
        let old = run_in(&cache, "1231-235900-0a0b", 600);
        let new = run_in(&cache, "0101-000100-0a0b", 60);
        std::fs::create_dir(cache.runs().join("0102-000000-0a0b")).unwrap();
        assert_eq!(find(&cache, None).unwrap(), new);
        assert_eq!(find(&cache, Some("1231".as_ref())).unwrap(), old);
        assert_eq!(named_directory(&old).unwrap(), old);
        assert_eq!(named_directory(&old.join(REPORT)).unwrap(), old.join(""));
        assert_eq!(named_directory(&cache.runs()), None);
        for (wanted, problem) in [("0102", "no run has this id"), ("", "several runs")] {
            let error = find(&cache, Some(wanted.as_ref())).unwrap_err();
            assert!(code(&error) == 2 && error.to_string().contains(problem), "{error:#}");
            assert!(error.to_string().contains("0101-000100-0a0b, 1231-235900-0a0b"), "{error:#}");
        }
    }

    #[test]
    fn the_files_of_a_run_are_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let run = run_in(&cache, "1231-235900-0a0b", 1);
        let args = ReportArgs { run: None, format: None, open: false };
        show(&args, Vec::new(), &run).unwrap();
        assert!(std::fs::read_to_string(run.join(HTML)).unwrap().contains("INTERRUPTED"));
        assert!(run.join(JUNIT).is_file());
        std::fs::write(run.join(REPORT), "{}").unwrap();
        assert!(format!("{:#}", show(&args, Vec::new(), &run).unwrap_err()).contains(REPORT));
    }
}
