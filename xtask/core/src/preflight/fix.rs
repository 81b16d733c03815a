//! Runs the commands that repair findings. The commands are shown first. On a terminal, the user must then agree,
//! unless `--yes` is given. All packages are installed in one transaction of the package manager.

use std::collections::BTreeSet;
use std::io::{BufRead as _, IsTerminal as _};
use std::process::Command;

use anyhow::{Context, Result};

use super::findings::{Finding, Remedy};
use super::{Preflight, PreflightRequest};
use crate::bail_host;
use crate::cli::FixArgs;
use crate::error::Failure;
use crate::host::facts::Facts;
use crate::host::tools;
use crate::message;
use crate::output::write_message;
use crate::workspace::Workspace;

/// The variable that keeps apt from asking questions (debconf(7)).
const QUIET_APT: &str = "DEBIAN_FRONTEND=noninteractive";
/// A unit that may stay enabled: it registers the emulators with the kernel at each boot and then ends at once.
const MAY_STAY_ENABLED: &str = "binfmt-support.service";

/// The maximum number of rounds. A round consists of a check and the repairs that are then possible. One repair can
/// make another one possible: after the installation of an emulator, the emulator may still have to be registered. A
/// repair can also make another one necessary: to install a package, the package manager may remove a newer
/// `qemu-utils`, and `qemu-img` is then missing.
const ROUNDS: usize = 3;

/// Runs the commands that repair blocking findings. Returns the result of the check after the repairs.
///
/// # Errors
/// Returns an error if the check fails, if a command fails, or if the user declines. Also returns an error if a command
/// needs root and this process cannot become root.
pub fn fix(workspace: &Workspace, asked: &PreflightRequest<'_>, args: FixArgs) -> Result<Preflight> {
    let mut preflight = Preflight::check(workspace, asked)?;
    let mut done = Vec::new();
    for _ in 0..ROUNDS {
        let commands = runnable(&preflight);
        // Commands that were run in the previous round did not help, so they are not repeated.
        if commands.is_empty() || commands == done {
            break;
        }
        show(&commands, preflight.facts.first().is_some_and(|facts| facts.host.systemd));
        if !args.yes && std::io::stdin().is_terminal() {
            ask()?;
        }
        let before = enabled_units(&preflight)?;
        let ran = commands.iter().try_for_each(|command| run(command));
        // Disable the units even if one of the commands failed, because another one may already have installed
        // packages.
        if let Some(command) = switch_off(&preflight, &before, &enabled_units(&preflight)?) {
            run(&command)?;
        }
        ran?;
        done = commands;
        preflight = Preflight::check(workspace, asked)?;
    }
    root_was_not_needed(&preflight)?;
    Ok(preflight)
}

/// Returns the enabled units. Returns none if systemd does not run.
fn enabled_units(preflight: &Preflight) -> Result<BTreeSet<String>> {
    match preflight.facts.first() {
        Some(facts) if facts.host.systemd => {
            let words = ["list-unit-files", "--state=enabled", "--no-legend", "--plain"];
            Ok(units_in(&tools::read(&tools::require("systemctl")?, &words)?))
        }
        _ => Ok(BTreeSet::new()),
    }
}

/// Returns the names of the units in systemctl's list, without the unit that may stay enabled.
fn units_in(list: &str) -> BTreeSet<String> {
    let units = list.lines().filter_map(|line| line.split_whitespace().next());
    units.filter(|unit| *unit != MAY_STAY_ENABLED).map(str::to_owned).collect()
}

/// Returns the command that stops and disables the units that are in `after` and not in `before`, because the packages
/// have enabled them. Debian's packages enable a nats-server for the whole machine and the sockets of libvirt's daemon.
/// `cargo xtask` uses neither.
fn switch_off(
    preflight: &Preflight,
    before: &BTreeSet<String>,
    after: &BTreeSet<String>,
) -> Option<Vec<String>> {
    let (facts, new) = (preflight.facts.first()?, after.difference(before));
    let mut command: Vec<_> = ["systemctl", "disable", "--now"].map(str::to_owned).to_vec();
    command.extend(new.cloned());
    (command.len() > 3).then(|| escalate(facts, command))
}

/// The commands of one round. Those for root run first, and then those for the user.
#[derive(Debug, Default)]
struct Steps {
    root: Vec<Vec<String>>,
    own: Vec<Vec<String>>,
}

/// Returns the commands that repair the blocking findings, in order. If packages must be installed, no other commands
/// for root are returned; they wait for the next round.
pub fn plan(preflight: &Preflight) -> Vec<Vec<String>> {
    commands(preflight, preflight.blocking())
}

/// Returns the commands that carry out the remedies of `findings` on this machine.
pub fn commands<'a>(
    preflight: &Preflight,
    findings: impl IntoIterator<Item = &'a Finding>,
) -> Vec<Vec<String>> {
    let Some(facts) = preflight.facts.first() else { return Vec::new() };
    let Steps { root, own } = steps(facts, findings);
    root.into_iter().map(|command| escalate(facts, command)).chain(own).collect()
}

/// Returns the commands that this process cannot run: those for root, if this process is not root and cannot become
/// root.
pub fn beyond_reach(preflight: &Preflight) -> Vec<Vec<String>> {
    let barred = preflight.facts.first().filter(|facts| !facts.host.root && facts.host.escalation.is_none());
    barred.map_or_else(Vec::new, |facts| steps(facts, preflight.blocking()).root)
}

/// Returns the commands of the plan that this process can run.
fn runnable(preflight: &Preflight) -> Vec<Vec<String>> {
    let beyond = beyond_reach(preflight).len();
    plan(preflight).split_off(beyond)
}

/// Returns an error if blocking findings need root and this process cannot become root. The hint is a command line that
/// root can paste.
fn root_was_not_needed(preflight: &Preflight) -> Result<()> {
    let commands: Vec<_> = beyond_reach(preflight).iter().map(|command| command.join(" ")).collect();
    if commands.is_empty() {
        return Ok(());
    }
    let missing: Vec<_> = preflight.blocking().map(|finding| finding.sentence.as_str()).collect();
    bail_host!(
        "making this machine ready needs root, but neither sudo nor doas is installed: {}", missing.join("; ");
        "run as root: {}; then, as yourself: cargo xtask preflight --fix", commands.join(" && ")
    )
}

fn steps<'a>(facts: &Facts, findings: impl IntoIterator<Item = &'a Finding>) -> Steps {
    let mut packages = BTreeSet::new();
    let mut steps = Steps::default();
    for finding in findings {
        match &finding.remedy {
            Some(Remedy::Install(need, arch)) => {
                packages.extend(facts.host.package_manager.iter().flat_map(|pm| pm.packages(*need, *arch)));
            }
            Some(Remedy::RunAsRoot(commands)) => steps.root.extend(commands.iter().cloned()),
            Some(Remedy::Run(command)) => steps.own.push(command.clone()),
            Some(Remedy::Manual(_)) | None => {}
        }
    }
    if let Some(manager) = facts.host.package_manager.filter(|_| !packages.is_empty()) {
        // The packages may do what other commands for root would do, and these commands would then fail. On Debian 13,
        // the package of libvirt's driver creates the account that libvirt needs. If systemd runs, the package of an
        // emulator also registers the emulator. Therefore the other commands wait for the next round.
        let names: Vec<_> = packages.into_iter().collect();
        steps.root = manager.install(&names);
    }
    // The findings for two architectures may need the same command, such as `mount`. It runs only once.
    let mut seen = BTreeSet::new();
    steps.root.retain(|command| seen.insert(command.clone()));
    steps
}

fn escalate(facts: &Facts, command: Vec<String>) -> Vec<String> {
    match &facts.host.escalation {
        Some(program) if !facts.host.root => {
            // `env` sets the variable, because neither sudo nor doas passes it on. Without the variable, a package
            // could ask a question and wait for an answer.
            let quiet = command.first().is_some_and(|first| first == "apt-get");
            let variable = quiet.then(|| ["env", QUIET_APT].map(str::to_owned)).into_iter().flatten();
            std::iter::once(program.display().to_string()).chain(variable).chain(command).collect()
        }
        _ => command,
    }
}

fn show(commands: &[Vec<String>], systemd: bool) {
    message!("to make this machine ready, these commands run:");
    for command in commands {
        message!("    {}", command.join(" "));
    }
    if systemd {
        message!("(services that the packages enable are disabled again)");
    }
}

fn ask() -> Result<()> {
    write_message("run them? [Y/n] ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer).context("read the answer from the terminal")?;
    // If the input has ended, the user has not agreed.
    match answer.trim().to_lowercase().as_str() {
        "" | "y" | "yes" if read > 0 => Ok(()),
        _ => Err(Failure::interrupted().into()),
    }
}

/// Runs a command. If the command fails, returns a failure of the host. The command's output goes to stderr, because
/// stdout is only for results.
fn run(command: &[String]) -> Result<()> {
    let line = command.join(" ");
    message!("$ {line}");
    let (program, arguments) = command.split_first().context("an empty command")?;
    let status = Command::new(program)
        .args(arguments)
        .envs(QUIET_APT.split_once('='))
        .stdout(std::io::stderr())
        .status();
    let error = match status {
        Ok(status) if status.success() => return Ok(()),
        Ok(status) => format!("{line}: {status}; see its messages above"),
        Err(error) => format!("run {line}: {error}"),
    };
    bail_host!("{error}"; "run it by hand to see why: {line}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::local::When;
    use crate::host::packages::Need;
    use crate::preflight::findings::tests::sound;

    fn seen(change: impl FnOnce(&mut Facts)) -> Preflight {
        let mut facts = sound();
        change(&mut facts);
        Preflight::evaluate(vec![facts])
    }

    fn lines(commands: &[Vec<String>]) -> Vec<String> {
        commands.iter().map(|command| command.join(" ")).collect()
    }

    fn planned(change: impl FnOnce(&mut Facts)) -> Vec<String> {
        lines(&plan(&seen(change)))
    }

    #[test]
    fn packages_come_in_one_transaction() {
        let commands = planned(|facts| {
            facts.emulator = None;
            facts.host.missing_programs =
                [("mcopy", Need::Mtools), ("ssh", Need::Ssh), ("ssh-keygen", Need::Ssh)]
                    .map(|(name, need)| (name, need, When::Always))
                    .to_vec();
            (facts.runs_guest_programs, facts.user_emulator) = (false, false);
            facts.rust_target = Ok(false);
        });
        assert_eq!(
            commands,
            [
                "apt-get update",
                "apt-get install --yes --no-install-recommends binfmt-support mount mtools openssh-client qemu-system-arm \
                 qemu-user-static",
                "rustup target add aarch64-unknown-linux-gnu",
            ]
        );
    }

    #[test]
    fn what_the_packages_make_possible_is_the_next_rounds() {
        let commands =
            planned(|facts| (facts.runs_guest_programs, facts.host.binfmt_mounted) = (false, false));
        assert_eq!(
            commands,
            [
                "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc",
                "/usr/sbin/update-binfmts --enable qemu-aarch64",
            ]
        );
        let systemds = planned(|facts| {
            facts.runs_guest_programs = false;
            facts.registers_handler =
                Some(["/usr/lib/systemd/systemd-binfmt", "qemu-aarch64.conf"].map(str::to_owned).to_vec());
        });
        assert_eq!(systemds, ["/usr/lib/systemd/systemd-binfmt qemu-aarch64.conf"]);
    }

    #[test]
    fn what_packages_may_do_themselves_waits_for_them() {
        let account = |facts: &mut Facts| facts.host.missing_libvirt_user = Some("libvirt-qemu");
        assert!(planned(account)[0].starts_with("useradd "), "{:?}", planned(account));
        let both = planned(|facts| {
            account(facts);
            facts.host.libvirt_driver = None;
        });
        assert_eq!(both.len(), 2, "{both:?}");
        assert!(both.iter().all(|command| command.starts_with("apt-get ")), "{both:?}");
    }

    #[test]
    fn whoever_cannot_become_root_is_told_what_root_is_to_run() {
        let lacks = |facts: &mut Facts| {
            facts.emulator = None;
            facts.rust_target = Ok(false);
        };
        let barred = seen(|facts| {
            lacks(facts);
            facts.host.root = false;
        });
        assert!(!beyond_reach(&barred).is_empty());
        assert_eq!(lines(&runnable(&barred)), ["rustup target add aarch64-unknown-linux-gnu"]);
        let error = root_was_not_needed(&barred).unwrap_err();
        assert_eq!(crate::error::code(&error), 69);
        assert!(error.to_string().contains("qemu-system-aarch64 is missing"), "{error}");
        let hint = crate::error::hint(&error).unwrap();
        let paste = "run as root: apt-get update && apt-get install --yes --no-install-recommends qemu-system-arm; then";
        assert!(hint.starts_with(paste), "{hint}");

        for able in [
            seen(lacks),
            seen(|facts| {
                lacks(facts);
                (facts.host.root, facts.host.escalation) = (false, Some("/usr/bin/sudo".into()));
            }),
            seen(|facts| (facts.host.root, facts.rust_target) = (false, Ok(false))),
        ] {
            assert_eq!(runnable(&able), plan(&able));
            assert!(root_was_not_needed(&able).is_ok());
        }
    }

    #[test]
    fn what_packages_enable_is_switched_off_again() {
        let list = "nats-server.service enabled enabled\nssh.service enabled enabled\nbinfmt-support.service enabled -\n";
        let after = units_in(list);
        assert_eq!(after.iter().collect::<Vec<_>>(), ["nats-server.service", "ssh.service"]);
        let before = BTreeSet::from(["ssh.service".to_owned()]);
        let as_user = seen(|facts| {
            facts.host.root = false;
            facts.host.escalation = Some("/usr/bin/sudo".into());
        });
        let command = switch_off(&as_user, &before, &after).unwrap().join(" ");
        assert_eq!(command, "/usr/bin/sudo systemctl disable --now nats-server.service");
        assert_eq!(switch_off(&as_user, &after, &after), None);
    }

    #[test]
    fn nothing_runs_where_nothing_blocks() {
        assert_eq!(planned(|_| {}), Vec::<String>::new());
        assert_eq!(
            planned(|facts| facts.host.free_memory = Some(1)),
            Vec::<String>::new(),
            "a finding that only degrades is not repaired"
        );
    }

    #[test]
    fn an_ordinary_user_escalates_as_the_machine_offers() {
        let commands = planned(|facts| {
            facts.host.root = false;
            facts.host.escalation = Some("/usr/bin/doas".into());
            facts.emulator = None;
            facts.rust_target = Ok(false);
        });
        assert_eq!(commands[0], "/usr/bin/doas env DEBIAN_FRONTEND=noninteractive apt-get update");
        assert_eq!(commands[2], "rustup target add aarch64-unknown-linux-gnu", "never as root");
    }
}
