//! The binary `xtask-report` of `cargo xtask report`. It makes the page, JUnit and the summary of an earlier run again,
//! from the run's `report.json`.

use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use xtask_core::cache::Cache;
use xtask_core::cli::{Cli, Command, LightCommand, ReportArgs, ReportFormat};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::{directories, write_private};
use xtask_core::host::tools;
use xtask_core::output::{conclude, print, write};
use xtask_core::report::past::past_runs;
use xtask_core::report::{HTML, JUNIT, REPORT, Report};
use xtask_reports::{Evidence, html, junit, markdown};

fn main() -> ExitCode {
    conclude(&execute(&Cli::parse()))
}

fn execute(cli: &Cli) -> Result<()> {
    let Command::Light(LightCommand::Report(args)) = &cli.command else {
        return Err(Failure::usage("xtask-report does not run this task; run it as cargo xtask").into());
    };
    let cache = Cache::from_env()?;
    let directory = find(&cache, args.run.as_deref())?;
    let hint = "give the directory of a run, which has a report.json of this version of cargo xtask";
    show(args, &cache, &directory)
        .map_err(|error| host_fault(error, format!("make the report of {}", directory.display()), hint))
}

fn show(args: &ReportArgs, cache: &Cache, directory: &Path) -> Result<()> {
    let report = Report::read(directory)?;
    let page = || anyhow::Ok(html(&report, &Evidence::read(directory, past_runs(cache))?));
    match args.format {
        Some(ReportFormat::Html) => write(page()?.as_bytes()).map(drop),
        Some(ReportFormat::Junit) => write(junit(&report)?.as_bytes()).map(drop),
        Some(ReportFormat::Markdown) => write(markdown(&report).as_bytes()).map(drop),
        Some(ReportFormat::Json) => write(report.to_json().as_bytes()).map(drop),
        None => {
            let path = directory.join(HTML);
            write_private(&path, page()?)?;
            write_private(&directory.join(JUNIT), junit(&report)?)?;
            print(path.display())?;
            if args.open { open(&path) } else { Ok(()) }
        }
    }
}

/// Returns the directory of a run: the newest one, the one with this id or beginning of an id, or a directory that the
/// user named.
fn find(cache: &Cache, run: Option<&Path>) -> Result<PathBuf> {
    let mut runs = directories(&cache.runs());
    runs.retain(|run| run.join(REPORT).is_file());
    // The ids do not have the year.
    runs.sort_by_key(|run| run.join(REPORT).metadata().and_then(|file| file.modified()).ok());
    let Some(run) = run else {
        let none = || {
            Failure::host(
                format!("no run in {} has a report", cache.runs().display()),
                "run cargo xtask smoke",
            )
        };
        return Ok(runs.pop().ok_or_else(none)?);
    };
    if run.join(REPORT).is_file() {
        return Ok(run.to_owned());
    }
    if run.file_name().is_some_and(|name| name == REPORT) && run.is_file() {
        return Ok(run.parent().unwrap_or(run).to_owned());
    }
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
    let browser = tools::require("xdg-open")?;
    let status = Process::new(&browser).arg(path).status();
    let status = status.with_context(|| format!("run {}", browser.display()))?;
    anyhow::ensure!(status.success(), "xdg-open {}: {status}", path.display());
    Ok(())
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
        assert_eq!(find(&cache, Some(&old)).unwrap(), old);
        assert_eq!(find(&cache, Some(&old.join(REPORT))).unwrap(), old);
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
        show(&args, &cache, &run).unwrap();
        assert!(std::fs::read_to_string(run.join(HTML)).unwrap().contains("INTERRUPTED"));
        assert!(run.join(JUNIT).is_file());
        std::fs::write(run.join(REPORT), "{}").unwrap();
        assert!(format!("{:#}", show(&args, &cache, &run).unwrap_err()).contains(REPORT));
    }
}
