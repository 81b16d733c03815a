//! The part of `cargo xtask vm` that needs no libvirt: lists instances, enters them, cuts their power and removes
//! them.

use anyhow::Result;
use serde_json::json;

use xtask_core::cache::Cache;
use xtask_core::cli::{GcArgs, HeavyVmCommand, LightVmCommand, OneArgs, Verbosity};
use xtask_core::error::{Failure, Verdict};
use xtask_core::image::choice::Choice;
use xtask_core::message;
use xtask_core::output::{print, print_json};
use xtask_core::processes::{end_processes, owned};
use xtask_core::report::Report;
use xtask_core::runs::instance::{self, ConsoleLog, Instance};
use xtask_core::runs::listing;
use xtask_core::runs::{self, Collected};
use xtask_core::workspace::Workspace;

use super::enter::enter;
use super::monitor::{State, state};

/// Makes the checks of a command that do not need `xtask-vm`.
pub(super) fn prepare(workspace: &Workspace, command: &HeavyVmCommand, verbosity: Verbosity) -> Result<()> {
    match command {
        HeavyVmCommand::Up(args) => {
            Choice::from_args(&args.machine.image, args.arch)?;
            if let Some(name) = &args.name {
                instance::check_name(&Cache::open()?, name)?;
            }
            args.place.check_to_run()?;
            let asked = (&args.machine, &args.place);
            super::ready_for(workspace, args.arch, asked, args.fix, verbosity).map(drop)
        }
        HeavyVmCommand::Start(OneArgs { machine })
        | HeavyVmCommand::Stop(OneArgs { machine })
        | HeavyVmCommand::Console { machine, .. } => {
            instance::find(&Cache::open()?, machine.as_deref())?;
            Ok(())
        }
        HeavyVmCommand::Supervise { .. } | HeavyVmCommand::KeepLog { .. } => {
            Err(Failure::usage("this command is only for the use of vm up, vm start and smoke").into())
        }
    }
}

/// Prints the output of an instance's serial console so far.
pub(super) fn show_console(machine: Option<&str>) -> Result<()> {
    let instance = instance::find(&Cache::open()?, machine)?;
    ConsoleLog::open(&instance.machine.console)?.show().map(drop)
}

/// Runs a command. If it needs a libvirt daemon, replaces this process with `xtask-vm`.
pub(super) fn run(command: &LightVmCommand, verbosity: Verbosity) -> Result<()> {
    let cache = Cache::open()?;
    if let LightVmCommand::Gc(args) = command {
        args.place().check()?;
    }
    if needs_daemon(&cache, command)? {
        match (Workspace::find(), command) {
            (Ok(workspace), _) => return super::become_xtask_vm(&workspace, verbosity, None),
            (Err(_), LightVmCommand::List { .. }) => {
                message!(
                    "note: outside the workspace, no libvirt daemon is asked for the states of its machines"
                );
            }
            (Err(error), _) => return Err(error),
        }
    }
    let find = |machine: &Option<String>| instance::find(&cache, machine.as_deref());
    match command {
        LightVmCommand::List { json } => listing::show(&instance::all(&cache), *json, state),
        LightVmCommand::Ssh(args) => enter(&find(&args.machine)?, &["-t"], &args.rest),
        LightVmCommand::Open { run } => open(&cache, run),
        LightVmCommand::Exec { machine, command } => {
            if machine.is_none()
                && let [first, rest @ ..] = &**command
                && instance::all(&cache).iter().any(|instance| instance.machine.name == *first)
            {
                let rest = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest).join(" ");
                let error = format!("vm exec: name the machine by a flag: --machine {first} -- {rest}");
                return Err(Failure::usage(error).into());
            }
            enter(&find(machine)?, &["-T"], command)
        }
        LightVmCommand::Logs(args) => {
            let instance = find(&args.machine)?;
            let journal = ["sudo", "-n", "journalctl", "--no-pager"].map(str::to_owned);
            let words: Vec<_> = journal.into_iter().chain(args.rest.iter().cloned()).collect();
            enter(&instance, &["-T"], &words)
        }
        LightVmCommand::PowerCut(args) => power_cut(&find(&args.machine)?),
        LightVmCommand::Rm(args) => {
            let instance = find(&args.machine)?;
            let processes = instance::remove(&instance, || Ok(()))?;
            message!("removed {}: ended {processes} process(es), deleted its disk", instance.machine.name);
            Ok(())
        }
        LightVmCommand::Gc(GcArgs { dry_run, json, .. }) => gc(&cache, *dry_run, *json),
    }
}

/// Returns whether a command needs the libvirt daemon that runs a machine.
fn needs_daemon(cache: &Cache, command: &LightVmCommand) -> Result<bool> {
    let is_on_daemon = |instance: &Instance| instance.machine.daemon.is_some();
    Ok(match command {
        LightVmCommand::List { .. } => instance::all(cache).iter().any(is_on_daemon),
        LightVmCommand::PowerCut(args) | LightVmCommand::Rm(args) => {
            is_on_daemon(&instance::find(cache, args.machine.as_deref())?)
        }
        LightVmCommand::Gc(args) => args.connect.is_some(),
        LightVmCommand::Ssh(_)
        | LightVmCommand::Open { .. }
        | LightVmCommand::Exec { .. }
        | LightVmCommand::Logs(_) => false,
    })
}

/// Enters the machine of a run. If the machine was not kept, the error says which smoke keeps it.
fn open(cache: &Cache, run: &str) -> Result<()> {
    match instance::find(cache, Some(run)) {
        Ok(instance) => enter(&instance, &["-t"], &[]),
        Err(unknown) => Err(not_kept(cache, run).unwrap_or(unknown).into()),
    }
}

/// Returns the failure for a run that has a report and no machine; `None` if there is no such run.
fn not_kept(cache: &Cache, run: &str) -> Option<Failure> {
    let report = Report::read(&cache.runs().join(run)).ok().filter(|report| report.run_id == run)?;
    let keep = if report.verdict == Verdict::Verified { "--keep" } else { "--keep-on-failure" };
    let mut again = format!("cargo xtask smoke --arch {} {keep}", report.guest.arch);
    let image = report.guest.image.and_then(|image| image.requested);
    let agent = report.agent.and_then(|agent| agent.given_as);
    let flags = [
        ("--image", image),
        ("--agent", agent.map(|path| path.display().to_string())),
        ("--sabotage", report.sabotage),
        ("--disturb", report.disturbance),
        ("--until", report.until),
    ];
    for (flag, value) in flags.into_iter().filter_map(|(flag, value)| Some((flag, value?))) {
        again.push_str(&format!(" {flag} {value}"));
    }
    Some(Failure::host(
        format!(
            "enter the machine of the run {run}: it was not kept, so its disk and its memory were deleted"
        ),
        format!(
            "make it again, with the other flags of the run: {again}; what is left of the run: cargo xtask report {run}"
        ),
    ))
}

/// Ends QEMU with SIGKILL: QEMU flushes nothing, and the guest is not notified. If the guest is already off, this is an
/// error, because the guest has then written everything.
fn power_cut(instance: &Instance) -> Result<()> {
    let _lock = instance.lock()?;
    let name = &instance.machine.name;
    if state(instance) == State::Off {
        return Err(instance.off(&format!("cut the power of {name}")).into());
    }
    end_processes(&instance.work())?;
    message!("{name} is off; boot it with cargo xtask vm start {name}");
    Ok(())
}

fn gc(cache: &Cache, dry_run: bool, as_json: bool) -> Result<()> {
    let all: Vec<_> = if dry_run {
        let work = |id: &str| owned(&cache.runs().join(id).join("w")).len();
        runs::dead(cache).into_iter().map(|id| Collected { processes: Ok(work(&id)), id }).collect()
    } else {
        runs::gc(cache)?
    };
    all.iter().filter(|one| one.processes.is_err()).for_each(|skipped| message!("{skipped}"));
    let collected: Vec<_> =
        all.iter().filter_map(|one| Some((&one.id, *one.processes.as_ref().ok()?))).collect();
    if as_json {
        let runs: Vec<_> =
            collected.iter().map(|(id, processes)| json!({ "run": id, "processes": processes })).collect();
        let outcome = json!({ "schema": instance::SCHEMA, "collected": !dry_run, "runs": runs });
        return print_json(&outcome);
    }
    let what = if dry_run { "would collect" } else { "collected" };
    for (id, processes) in &collected {
        print(format_args!("{what} {id}: {processes} process(es)"))?;
    }
    if collected.is_empty() {
        message!("no dead run has left files");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::monitor::tests::Stand;
    use clap::Parser as _;
    use xtask_core::cli::{Cli, Command, VmCommand};
    use xtask_core::error;
    use xtask_core::runs::instance::DaemonRecord;

    #[test]
    fn a_run_whose_machine_was_not_kept_says_how_to_make_it_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", Default::default());
        report.sabotage = Some("crash-loop".to_owned());
        report.write(&cache.runs().join("1122-101500-0a0b")).unwrap();
        let error = open(&cache, "1122-101500-0a0b").unwrap_err();
        assert_eq!(error::code(&error), 69, "{error:#}");
        let hint = error::hint(&error).unwrap();
        assert!(hint.contains("smoke --arch x86_64 --keep-on-failure --sabotage crash-loop;"), "{hint}");
        assert_eq!(error::code(&open(&cache, "1122-101500-ffff").unwrap_err()), 2);
        assert_eq!(error::code(&open(&cache, "..").unwrap_err()), 2);
    }

    #[test]
    fn a_command_for_a_machine_on_a_daemon_needs_libvirt() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let keep = |name: &str, id: &str, uri: Option<&str>| {
            let mut instance = Stand::new().instance.clone();
            instance.directory = cache.runs().join(id);
            std::fs::create_dir_all(instance.work()).unwrap();
            (instance.machine.name, instance.machine.id) = (name.to_owned(), id.to_owned());
            instance.machine.daemon = uri.map(|uri| DaemonRecord { uri: uri.to_owned(), route: None });
            instance.save().unwrap();
        };
        let needs = |line: &str| {
            let cli = Cli::try_parse_from(["xtask", "vm"].into_iter().chain(line.split(' '))).unwrap();
            let Command::Vm(VmCommand::Light(command)) = cli.command else { panic!("{line}") };
            needs_daemon(&cache, &command).unwrap()
        };
        keep("here", "1124-100000-0001", None);
        assert!(!needs("list") && !needs("rm"));
        keep("there", "1124-100000-0002", Some("qemu:///system"));
        for (line, expected) in [
            ("list", true),
            ("list --json", true),
            ("rm here", false),
            ("rm there", true),
            ("power-cut here", false),
            ("power-cut there", true),
            ("exec -m there true", false),
            ("gc", false),
            ("gc --connect qemu:///system --images", true),
        ] {
            assert_eq!(needs(line), expected, "{line}");
        }
        assert!(needs_daemon(&cache, &LightVmCommand::Rm(OneArgs { machine: None })).is_err());
    }

    #[test]
    fn the_power_of_a_guest_that_is_off_is_not_cut() {
        let stand = Stand::new();
        stand.answer("shutdown");
        let error = power_cut(&stand.instance).unwrap_err();
        assert_eq!((error::code(&error), stand.instance.has_processes()), (69, true), "{error:#}");
        assert!(error.to_string().contains("the machine is off"), "{error:#}");
        let stand = Stand::new();
        stand.answer("running");
        power_cut(&stand.instance).unwrap();
        assert!(!stand.instance.has_processes());
    }
}
