//! `cargo xtask vm`, as far as it needs no libvirt: finding machines, entering them, taking their power away, removing them.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use xtask_core::cache::Cache;
use xtask_core::cli::VmCommand;
use xtask_core::error::Failure;
use xtask_core::host::tools;
use xtask_core::processes::{end_processes, owned};
use xtask_core::runs;
use xtask_core::runs::instance::{self, ConsoleLog, Instance};

pub(super) fn run(command: &VmCommand) -> Result<()> {
    let cache = Cache::from_env()?;
    match command {
        VmCommand::List { json } => list(&cache, *json),
        VmCommand::Ssh(args) => {
            let instance = instance::find(&cache, args.machine.as_deref())?;
            enter(&instance, &["-t"], &args.rest)
        }
        VmCommand::Exec { machine, command } => {
            if machine.is_none()
                && let [first, rest @ ..] = &**command
                && instance::all(&cache).iter().any(|instance| instance.machine.name == *first)
            {
                let rest = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest).join(" ");
                let error = format!("vm exec: name the machine by a flag: --machine {first} -- {rest}");
                return Err(Failure::usage(error).into());
            }
            let instance = instance::find(&cache, machine.as_deref())?;
            enter(&instance, &["-T"], command)
        }
        VmCommand::Logs(args) => {
            let instance = instance::find(&cache, args.machine.as_deref())?;
            let journal = ["sudo", "-n", "journalctl", "--no-pager"].map(str::to_owned);
            let words: Vec<_> = journal.into_iter().chain(args.rest.iter().cloned()).collect();
            enter(&instance, &["-T"], &words)
        }
        VmCommand::Console { machine, no_follow: true } => {
            let instance = instance::find(&cache, machine.as_deref())?;
            ConsoleLog::open(&instance.machine.console)?.show().map(drop)
        }
        VmCommand::PowerCut(args) => power_cut(&instance::find(&cache, args.machine.as_deref())?),
        VmCommand::Rm(args) => {
            let instance = instance::find(&cache, args.machine.as_deref())?;
            let processes = instance::remove(&instance)?;
            eprintln!("removed {}: ended {processes} process(es), deleted its disk", instance.machine.name);
            Ok(())
        }
        VmCommand::Gc { dry_run, json } => gc(&cache, *dry_run, *json),
        VmCommand::Up(_) | VmCommand::Start(_) | VmCommand::Stop(_) | VmCommand::Console { .. } => {
            unreachable!("xtask-vm runs it")
        }
    }
}

fn list(cache: &Cache, as_json: bool) -> Result<()> {
    let instances = instance::all(cache);
    if as_json {
        let machines: Vec<_> = instances
            .iter()
            .map(|instance| {
                let mut machine = json!(instance.machine);
                machine["running"] = json!(instance.is_running());
                machine
            })
            .collect();
        println!("{:#}", json!({ "schema": instance::SCHEMA, "machines": machines }));
        return Ok(());
    }
    for one in &instances {
        let machine = &one.machine;
        let state = if one.is_running() { "running" } else { "off" };
        println!(
            "{:<20} {state:<8} {:<8} {:<14} made {}",
            machine.name,
            machine.arch.to_string(),
            machine.image,
            machine.made_at
        );
    }
    Ok(())
}

/// Becomes ssh: its terminal, its signals and its exit code, which is the command's.
fn enter(instance: &Instance, flags: &[&str], words: &[String]) -> Result<()> {
    let ssh = tools::require("ssh")?;
    let mut command = Command::new(&ssh);
    if !words.is_empty() {
        command.args(flags);
    }
    command.args(instance.ssh()?);
    if !words.is_empty() {
        // ssh joins its words by spaces for the guest's shell: each is quoted to arrive as it is.
        command.arg("--").arg(words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "));
    }
    Err(command.exec()).with_context(|| format!("run {}", ssh.display()))
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// SIGKILL: QEMU flushes nothing and the guest hears nothing.
fn power_cut(instance: &Instance) -> Result<()> {
    let _lock = instance.lock()?;
    let processes = end_processes(&instance.work())?;
    let name = &instance.machine.name;
    match processes {
        0 => eprintln!("{name} was already off"),
        _ => eprintln!("{name} is off; boot it with cargo xtask vm start {name}"),
    }
    Ok(())
}

fn gc(cache: &Cache, dry_run: bool, as_json: bool) -> Result<()> {
    let collected: Vec<(String, usize)> = if dry_run {
        let work = |id: &str| owned(&cache.runs().join(id).join("w")).len();
        runs::dead(cache).into_iter().map(|id| (id.clone(), work(&id))).collect()
    } else {
        runs::gc(cache)?.into_iter().map(|dead| (dead.id, dead.processes)).collect()
    };
    if as_json {
        let runs: Vec<_> =
            collected.iter().map(|(id, processes)| json!({ "run": id, "processes": processes })).collect();
        println!("{:#}", json!({ "schema": instance::SCHEMA, "collected": !dry_run, "runs": runs }));
        return Ok(());
    }
    let what = if dry_run { "would collect" } else { "collected" };
    for (id, processes) in &collected {
        println!("{what} {id}: {processes} process(es)");
    }
    if collected.is_empty() {
        eprintln!("no dead run has left files");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_arrives_in_the_guest_as_it_was_said() {
        for word in ["plain", "two words", "it's", "$HOME;\"x\"", ""] {
            let output =
                Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(word))).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
