//! Chooses the commands that repair findings, and has them run. The commands are shown first. On a terminal, the user
//! must then agree, unless `--yes` is given. All packages are installed in one transaction of the package manager.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead as _, IsTerminal as _};

use anyhow::{Context, Result};

use super::findings::{Finding, Remedy};
use super::{Preflight, PreflightRequest, repair};
use crate::bail_host;
use crate::cli::FixArgs;
use crate::error::{Failure, host_fault};
use crate::host::facts::Facts;
use crate::host::packages::PackageManager;
use crate::message;
use crate::output::write_message;
use crate::workspace::Workspace;

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
    let mut preflight = check(workspace, asked)?;
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
        if let Some(facts) = preflight.facts.first() {
            repair::run_all(&facts.host, &commands).map_err(|error| {
                host_fault(error, "make this machine ready", "run the command by hand to see why")
            })?;
        }
        done = commands;
        preflight = check(workspace, asked)?;
        preflight.tried.clone_from(&done);
    }
    root_was_not_needed(&preflight)?;
    Ok(preflight)
}

/// Checks this machine. If commands must run as root, also checks whether `sudo` or `doas` permits this. Other commands
/// than `--fix` do not check this, because sudo reports each refused user to the administrator.
fn check(workspace: &Workspace, asked: &PreflightRequest<'_>) -> Result<Preflight> {
    let mut preflight = Preflight::check(workspace, asked)?;
    let needs_root = |facts: &Facts| !steps(facts, preflight.blocking()).root.is_empty();
    if let Some(facts) = preflight.facts.first().filter(|facts| needs_root(facts))
        && let Some(why) = repair::refuses(&facts.host, File::open("/dev/tty").is_ok())
    {
        preflight.facts.iter_mut().for_each(|facts| facts.host.escalation = Err(why));
    }
    Ok(preflight)
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

/// Returns whether `--fix` has just run all commands of the plan. The findings have then not changed, and `--fix` would
/// run the same commands again.
pub fn was_in_vain(preflight: &Preflight) -> bool {
    let plan = plan(preflight);
    !plan.is_empty() && plan.iter().all(|command| preflight.tried.contains(command))
}

/// Returns the commands that carry out the remedies of `findings` on this machine.
pub fn commands<'a>(
    preflight: &Preflight,
    findings: impl IntoIterator<Item = &'a Finding>,
) -> Vec<Vec<String>> {
    let Some(facts) = preflight.facts.first() else { return Vec::new() };
    let Steps { root, own } = steps(facts, findings);
    root.into_iter().map(|command| repair::escalate(&facts.host, command)).chain(own).collect()
}

/// Returns the commands that this process cannot run: those for root, if this process is not root and cannot become
/// root.
pub fn beyond_reach(preflight: &Preflight) -> Vec<Vec<String>> {
    let barred = barred(preflight);
    barred.map_or_else(Vec::new, |facts| steps(facts, preflight.blocking()).root)
}

/// Returns the facts about this machine if this process is not root and cannot become root.
fn barred(preflight: &Preflight) -> Option<&Facts> {
    preflight.facts.first().filter(|facts| !facts.host.root && facts.host.escalation.is_err())
}

/// Returns the lines that show the commands to a person. If this process cannot become root, the lines say which
/// commands are for root.
pub fn lines<'a>(preflight: &Preflight, findings: impl IntoIterator<Item = &'a Finding>) -> Vec<String> {
    let Some(facts) = preflight.facts.first() else { return Vec::new() };
    let Steps { root, own } = steps(facts, findings);
    let prefix = if barred(preflight).is_some() { "as root: " } else { "" };
    let root = root.into_iter().map(|command| repair::escalate(&facts.host, command));
    // The command that updates the list of packages is not shown for each finding, because it runs once for all.
    let root = root.filter(|command| !PackageManager::is_update(command));
    let own = own.iter().map(|command| command.join(" "));
    root.map(|command| format!("{prefix}{}", command.join(" "))).chain(own).collect()
}

/// Returns the commands of the plan that this process can run.
fn runnable(preflight: &Preflight) -> Vec<Vec<String>> {
    let beyond = beyond_reach(preflight).len();
    plan(preflight).split_off(beyond)
}

/// Returns an error if blocking findings need root and this process cannot become root. The hint is a command line that
/// root can paste.
fn root_was_not_needed(preflight: &Preflight) -> Result<()> {
    let Some((why, hint)) = for_root(preflight) else { return Ok(()) };
    let missing: Vec<_> = preflight.blocking().map(|finding| finding.sentence.as_str()).collect();
    bail_host!("making this machine ready needs root, but {why}: {}", missing.join("; "); "{hint}")
}

/// Returns why this process cannot become root, and a line with the commands that root must run; `None` if it can, or
/// if no command needs root.
pub fn for_root(preflight: &Preflight) -> Option<(&'static str, String)> {
    let why = preflight.facts.first()?.host.escalation.as_ref().err()?;
    let commands = beyond_reach(preflight);
    let line = one_line(&commands);
    (!commands.is_empty())
        .then(|| (*why, format!("run as root: {line}; then, as yourself: cargo xtask preflight --fix")))
}

/// Returns the commands as one line for a shell. As with `--fix`, packages are also installed after a failed update.
fn one_line(commands: &[Vec<String>]) -> String {
    let mut line = String::new();
    for (index, command) in commands.iter().enumerate() {
        let after = if PackageManager::is_update(command) { "; " } else { " && " };
        line += &command.join(" ");
        line += if index + 1 < commands.len() { after } else { "" };
    }
    line
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

fn show(commands: &[Vec<String>], systemd: bool) {
    message!("to make this machine ready, these commands run:");
    for command in commands {
        message!("    {}", command.join(" "));
    }
    if systemd {
        message!("(units that the new packages enable are disabled afterwards)");
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
                "apt-get install --yes --no-install-recommends --option=DPkg::Lock::Timeout=300 binfmt-support mtools openssh-client qemu-system-arm \
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
        let account = |facts: &mut Facts| facts.host.missing_libvirt_user = Ok(Some("libvirt-qemu"));
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
        let advised = barred.verdict().unwrap_err();
        assert!(
            crate::error::hint(&advised)
                .unwrap()
                .starts_with("run as root: apt-get update; apt-get install ")
        );
        assert_eq!(lines(&runnable(&barred)), ["rustup target add aarch64-unknown-linux-gnu"]);
        let error = root_was_not_needed(&barred).unwrap_err();
        assert_eq!(crate::error::code(&error), 69);
        assert!(error.to_string().contains("qemu-system-aarch64 is missing"), "{error}");
        let hint = crate::error::hint(&error).unwrap();
        let paste = "run as root: apt-get update; apt-get install --yes --no-install-recommends --option=DPkg::Lock::Timeout=300 qemu-system-arm; then";
        assert!(hint.starts_with(paste), "{hint}");

        for able in [
            seen(lacks),
            seen(|facts| {
                lacks(facts);
                (facts.host.root, facts.host.escalation) = (false, Ok("/usr/bin/sudo".into()));
            }),
            seen(|facts| (facts.host.root, facts.rust_target) = (false, Ok(false))),
        ] {
            assert_eq!(runnable(&able), plan(&able));
            assert!(root_was_not_needed(&able).is_ok());
        }
    }

    #[test]
    fn what_did_not_help_is_not_advised_again() {
        let mut preflight = seen(|facts| facts.emulator = None);
        let hint =
            |preflight: &Preflight| crate::error::hint(&preflight.verdict().unwrap_err()).unwrap().to_owned();
        assert_eq!(hint(&preflight), "cargo xtask preflight --arch aarch64 --fix");
        preflight.tried = plan(&preflight);
        assert!(hint(&preflight).starts_with("the commands of --fix have changed nothing"), "{preflight}");
        assert!(preflight.to_string().contains("--fix has run these"), "{preflight}");
    }

    #[test]
    fn nothing_runs_where_nothing_blocks() {
        assert_eq!(planned(|_| {}), Vec::<String>::new());
        assert_eq!(
            planned(|facts| facts.host.direct_io = Err("EINVAL".into())),
            Vec::<String>::new(),
            "a finding without a command is not repaired"
        );
    }

    #[test]
    fn an_ordinary_user_escalates_as_the_machine_offers() {
        let commands = planned(|facts| {
            facts.host.root = false;
            facts.host.escalation = Ok("/usr/bin/doas".into());
            facts.emulator = None;
            facts.rust_target = Ok(false);
        });
        assert_eq!(commands[0], "/usr/bin/doas env DEBIAN_FRONTEND=noninteractive apt-get update");
        assert_eq!(commands[2], "rustup target add aarch64-unknown-linux-gnu", "never as root");
    }
}
