//! Several smokes of one call: `--arch` or `--image` more than once, or `--host`. Each smoke is a process of its own
//! ([`child`]). They are spread over this machine or over the hosts of `--host` ([`hosts`]) as their processors and
//! their memory allow. A table at the end has a row for each smoke.

mod child;
mod hosts;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use xshell::Shell;
use xtask_core::build;
use xtask_core::cache::Cache;
use xtask_core::cli::{BuildArgs, SmokeArgs, Verbosity};
use xtask_core::error::{Failure, Kind, host_fault, kind};
use xtask_core::fs::make_private_dir;
use xtask_core::image::choice::Choice;
use xtask_core::image::shown;
use xtask_core::report::past::past_runs;
use xtask_core::report::{Report, remove_earlier};
use xtask_core::spread::table::{Row, exit_code, lines};
use xtask_core::spread::{Queue, Start, expected, shared_arguments};
use xtask_core::workspace::Workspace;
use xtask_core::{limits, message};
use xtask_jobs::Ui;

use child::Running;
use hosts::Host;

/// Runs the smokes of a call. When this function returns, the table is on the screen.
pub(crate) fn run(workspace: &Workspace, args: &SmokeArgs, verbosity: Verbosity) -> Result<()> {
    let outcome = Ui::install(verbosity).and_then(|ui| all(workspace, args, &ui)).map_err(|error| {
        host_fault(error, "run the smokes", "see the causes; nothing is known about the agent")
    });
    outcome.inspect_err(|error| report_before_smokes(args, error))
}

/// Writes the report of a call that failed by itself, if `--report` is given. A smoke writes its own report.
fn report_before_smokes(args: &SmokeArgs, error: &anyhow::Error) {
    let Some(directory) = args.report.as_ref().filter(|_| !matches!(kind(error), Kind::Reported(_))) else {
        return;
    };
    if let Err(error) = Report::before_run(args.build.arch, error).write(directory) {
        message!("warning: {error:#}");
    }
}

fn all(workspace: &Workspace, args: &SmokeArgs, ui: &Ui) -> Result<()> {
    args.check_several()?;
    args.check_places()?;
    let smokes = Smoke::of(args)?;
    let hosts = hosts::check(args, ui)?;
    build_all(workspace, args, ui)?;
    let rows = run_all(&smokes, &hosts, ui)?;
    for line in lines(&rows) {
        ui.line(&line);
    }
    match exit_code(&rows) {
        0 => Ok(()),
        code => Err(Failure::reported(code).into()),
    }
}

/// One smoke of the call.
struct Smoke {
    args: SmokeArgs,
    image: String,
    /// The directory of its report, below the one of `--report`.
    report: Option<PathBuf>,
}

impl Smoke {
    /// Returns the smokes of a call.
    ///
    /// # Errors
    /// Returns a usage error if an image does not exist for an architecture.
    fn of(args: &SmokeArgs) -> Result<Vec<Self>> {
        let mut smokes = Vec::<Self>::new();
        for args in args.smokes() {
            let image = Choice::from_args(&args.machine.image, args.build.arch)?.image.name;
            // Files in different directories may have the same name.
            let is_taken = |smoke: &Self| (smoke.args.build.arch, &smoke.image) == (args.build.arch, &image);
            let image = match &args.machine.image.image {
                Some(wanted) if smokes.iter().any(is_taken) => shown(wanted),
                _ => image,
            };
            let report = args.report.as_ref().map(|directory| {
                let name = format!("{}-{image}", args.build.arch);
                directory.join(name.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c), "_"))
            });
            smokes.push(Self { args, image, report });
        }
        Ok(smokes)
    }

    /// Returns the name of the smoke on this host in the messages.
    fn name(&self, host: &Host) -> String {
        let there = host.uri.as_ref().map_or(String::new(), |uri| format!("@{uri}"));
        format!("{}/{}{there}", self.args.build.arch, self.image)
    }

    /// Returns the row of a smoke that was not started.
    fn row(&self) -> Row {
        Row {
            arch: self.args.build.arch,
            image: self.image.clone(),
            host: "-".to_owned(),
            exit_code: None,
            seconds: 0.0,
            reason: None,
            report: None,
        }
    }

    /// Returns this command with the flags of a single smoke on this host.
    fn command(&self, host: &Host) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("find the path of this program")?);
        command.args(shared_arguments(std::env::args_os().skip(1))).args(self.arguments(host));
        if let Some(directory) = &self.report {
            make_private_dir(directory)?;
            remove_earlier(directory)?;
        }
        Ok(command)
    }

    /// Returns the flags that only this smoke has.
    fn arguments(&self, host: &Host) -> Vec<OsString> {
        let mut arguments =
            vec!["--announce".into(), "--arch".into(), self.args.build.arch.to_string().into()];
        let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
        if let Some(image) = &self.args.machine.image.image {
            add("--image", image.into());
        }
        if let Some(uri) = &host.uri {
            add("--connect", uri.to_string().into());
        }
        if let Some(directory) = &self.report {
            add("--report", directory.into());
        }
        arguments
    }
}

/// Builds the agent for each architecture, so that the smokes do not wait for each other's cargo.
fn build_all(workspace: &Workspace, args: &SmokeArgs, ui: &Ui) -> Result<()> {
    if args.agent.is_some() {
        return Ok(());
    }
    let shell = Shell::new().context("start a shell of commands")?;
    for arch in &args.repeated.arches {
        ui.check()?;
        ui.note(&format!("build the agent for {arch}"));
        let built = build::build(&shell, workspace, &BuildArgs { arch: *arch, ..args.build.clone() });
        // If Ctrl-C ended the compiler, the call was interrupted and the build did not fail.
        ui.check()?;
        built?;
    }
    Ok(())
}

/// Runs all smokes, and returns their rows of the table. After Ctrl-C, no other smoke is started, and the smokes that
/// run are interrupted.
fn run_all(smokes: &[Smoke], hosts: &[Host], ui: &Ui) -> Result<Vec<Row>> {
    let past = Cache::from_env().map(|cache| past_runs(&cache)).unwrap_or_default();
    let usual: Vec<_> =
        smokes.iter().map(|smoke| expected(&past, smoke.args.build.arch, &smoke.image)).collect();
    let capacities: Vec<_> = hosts.iter().map(|host| host.capacity).collect();
    let mut queue = Queue::new(&usual, &capacities);
    let mut rows: Vec<_> = smokes.iter().map(Smoke::row).collect();
    let mut running = Vec::<(Start, Running)>::new();
    let mut is_interrupted = false;
    loop {
        while !is_interrupted && let Some(start) = queue.take() {
            let (smoke, host) = (&smokes[start.smoke], &hosts[start.host]);
            let name = smoke.name(host);
            ui.note(&format!("start {name}"));
            rows[start.smoke].host = host.name();
            running.push((start, Running::start(smoke.command(host)?, &name, ui)?));
        }
        if running.is_empty() {
            return Ok(rows);
        }
        std::thread::sleep(limits::CHILD_POLL);
        if !is_interrupted && ui.check().is_err() {
            is_interrupted = true;
            for (_, child) in &running {
                child.interrupt()?;
            }
        }
        let mut left = Vec::new();
        for (start, mut child) in running {
            match child.ended()? {
                None => left.push((start, child)),
                Some(status) => {
                    child.conclude(status, smokes[start.smoke].report.as_deref(), &mut rows[start.smoke]);
                    queue.ended(start.host);
                }
            }
        }
        running = left;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use xtask_core::cli::{Cli, Command as Subcommand, HeavyCommand};

    use super::*;

    fn parsed<S: Into<OsString> + Clone>(line: impl IntoIterator<Item = S>) -> SmokeArgs {
        let Subcommand::Heavy(HeavyCommand::Smoke(args)) = Cli::parse_from(line).command else {
            panic!("smoke")
        };
        *args
    }

    #[test]
    fn each_smoke_has_its_own_flags_and_those_of_the_call() {
        let words =
            "xtask smoke --arch aarch64 --image debian-12 --arch x86_64 --image debian-13 --fsck --report r";
        let line: Vec<_> = words.split(' ').map(OsString::from).collect();
        let here = Host { uri: None, capacity: 1 };
        let mut seen = Vec::new();
        for smoke in Smoke::of(&parsed(&line)).unwrap() {
            let child = [shared_arguments(line.clone()), smoke.arguments(&here)].concat();
            let args = parsed(&child);
            assert!(args.announce && args.fsck && !args.is_several(), "{child:?}");
            let image = args.machine.image.image.unwrap();
            seen.push(format!("{}/{image} {}", args.build.arch, args.report.unwrap().display()));
            assert!(seen.last().unwrap().starts_with(&smoke.name(&here)));
        }
        assert_eq!(
            seen,
            [
                "aarch64/debian-12 r/aarch64-debian-12",
                "aarch64/debian-13 r/aarch64-debian-13",
                "x86_64/debian-12 r/x86_64-debian-12",
                "x86_64/debian-13 r/x86_64-debian-13",
            ]
        );
    }

    #[test]
    fn a_smoke_on_another_host_names_it() {
        let smoke = Smoke::of(&parsed(["xtask", "smoke", "--arch", "aarch64"])).unwrap().remove(0);
        let there = Host { uri: Some("qemu+ssh://me@far/system".parse().unwrap()), capacity: 1 };
        assert_eq!(smoke.name(&there), "aarch64/ubuntu-24.04@qemu+ssh://me@far/system");
        let arguments = smoke.arguments(&there);
        assert_eq!(arguments[1..], ["--arch", "aarch64", "--connect", "qemu+ssh://me@far/system"]);
    }

    #[test]
    fn two_files_of_one_name_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let mut line: Vec<_> = ["xtask", "smoke", "--unverified", "--report", "r"].map(OsString::from).into();
        for name in ["a", "b"] {
            let path = directory.path().join(name).join("disk.raw");
            std::fs::create_dir(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            line.extend(["--image".into(), path.into()]);
        }
        let smokes = Smoke::of(&parsed(line)).unwrap();
        assert_ne!(smokes[0].image, smokes[1].image);
        assert_ne!(smokes[0].report, smokes[1].report);
    }
}
