//! Doing what the findings' remedies say: shown first, asked on a terminal, one transaction of the package manager.

use std::collections::BTreeSet;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::findings::{Finding, Remedy, Severity};
use super::{Asked, Preflight, facts::Facts};
use crate::cli::FixArgs;
use crate::exit::{Interrupted, Unavailable};
use crate::workspace::Workspace;

/// One change uncovers another: what a package brings must still be registered, and a package manager that replaces a newer `qemu-utils` by removing it leaves
/// `qemu-img` for the second round.
const ROUNDS: usize = 3;

/// Fixes what can be fixed and looks again; the result says what is left.
///
/// # Errors
/// Where a command fails, or the person says no.
pub fn fix(workspace: &Workspace, asked: &Asked<'_>, args: FixArgs) -> Result<Preflight> {
    let mut preflight = Preflight::check(workspace, asked)?;
    for _ in 0..ROUNDS {
        let commands = plan(&preflight);
        if commands.is_empty() {
            break;
        }
        show(&commands);
        if !args.yes && std::io::stdin().is_terminal() {
            ask()?;
        }
        for command in &commands {
            run_or_unavailable(command)?;
        }
        preflight = Preflight::check(workspace, asked)?;
    }
    Ok(preflight)
}

/// The commands, in order: packages in one transaction, then what the packages make possible.
pub fn plan(preflight: &Preflight) -> Vec<Vec<String>> {
    let Some(facts) = preflight.facts.first() else { return Vec::new() };
    commands(facts, preflight.findings.iter().filter(|finding| finding.severity == Severity::Blocks))
}

/// What does the remedies of `findings`, as commands for this machine.
pub fn commands<'a>(facts: &Facts, findings: impl Iterator<Item = &'a Finding>) -> Vec<Vec<String>> {
    let mut packages = BTreeSet::new();
    let (mut as_root, mut as_self) = (Vec::new(), Vec::new());
    for finding in findings {
        match &finding.remedy {
            Some(Remedy::Install(need, arch)) => {
                let names = facts.host.package_manager.map_or(&[][..], |pm| pm.packages(*need, *arch));
                packages.extend(names.iter().copied());
            }
            Some(Remedy::RunAsRoot(commands)) => as_root.extend(commands.iter().cloned()),
            Some(Remedy::Run(command)) => as_self.push(command.clone()),
            Some(Remedy::Manual(_)) | None => {}
        }
    }
    let mut commands = Vec::new();
    if let Some(manager) = facts.host.package_manager.filter(|_| !packages.is_empty()) {
        let names: Vec<_> = packages.into_iter().collect();
        commands.extend(manager.install(&names).into_iter().map(|command| escalate(facts, command)));
    }
    // `mount` of something that two architectures both want is wanted once.
    let mut seen = BTreeSet::new();
    as_root.retain(|command| seen.insert(command.clone()));
    commands.extend(as_root.into_iter().map(|command| escalate(facts, command)));
    commands.extend(as_self);
    commands
}

fn escalate(facts: &Facts, command: Vec<String>) -> Vec<String> {
    match &facts.host.escalation {
        Some(program) if !facts.host.root => {
            std::iter::once(program.display().to_string()).chain(command).collect()
        }
        _ => command,
    }
}

fn show(commands: &[Vec<String>]) {
    eprintln!("to make this machine ready, these commands run:");
    for command in commands {
        eprintln!("    {}", command.join(" "));
    }
}

fn ask() -> Result<()> {
    eprint!("run them? [Y/n] ");
    std::io::stderr().flush().context("ask on the terminal")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("read the answer from the terminal")?;
    match answer.trim().to_lowercase().as_str() {
        "" | "y" | "yes" => Ok(()),
        _ => Err(Interrupted.into()),
    }
}

/// A command that fails leaves a machine that is not ready, which is what the exit code says.
fn run_or_unavailable(command: &[String]) -> Result<()> {
    run(command).map_err(|error| {
        let hint = format!("run it by hand to see why: {}", command.join(" "));
        Unavailable { error: format!("{error:#}"), hint }.into()
    })
}

/// The command's own output is its progress; it goes to stderr, as everything that is no result.
fn run(command: &[String]) -> Result<()> {
    let line = command.join(" ");
    eprintln!("$ {line}");
    let (program, arguments) = command.split_first().context("an empty command")?;
    let status = Command::new(program)
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("run {line}"))?;
    ensure!(status.success(), "{line}: {status}; its own messages are above");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::findings::tests::sound;
    use crate::host::packages::Need;
    use crate::host::surroundings::When;

    fn planned(change: impl FnOnce(&mut Facts)) -> Vec<String> {
        let mut facts = sound();
        change(&mut facts);
        plan(&Preflight::judge(vec![facts])).iter().map(|command| command.join(" ")).collect()
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
            facts.registers_handlers = Some("/usr/lib/systemd/systemd-binfmt".into());
        });
        assert_eq!(systemds, ["/usr/lib/systemd/systemd-binfmt"]);
    }

    #[test]
    fn nothing_runs_where_nothing_blocks() {
        assert_eq!(planned(|_| {}), Vec::<String>::new());
        assert_eq!(
            planned(|facts| facts.host.free_memory = Some(1)),
            Vec::<String>::new(),
            "a degradation is only told"
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
        assert_eq!(commands[0], "/usr/bin/doas apt-get update");
        assert_eq!(commands[2], "rustup target add aarch64-unknown-linux-gnu", "never as root");
    }
}
