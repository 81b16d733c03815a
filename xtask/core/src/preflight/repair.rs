//! Runs the commands that repair findings. Afterwards, disables the units that the new packages have enabled.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::host::local::LocalHost;
use crate::host::packages::PackageManager;
use crate::host::tools;
use crate::{bail_host, limits, message};

/// The variable that keeps apt from asking questions (debconf(7)).
const QUIET_APT: &str = "DEBIAN_FRONTEND=noninteractive";
/// A unit that may stay enabled: it registers the emulators with the kernel at each boot and then ends at once.
const MAY_STAY_ENABLED: &str = "binfmt-support.service";
/// The file that apt locks while it updates its lists. apt's option `DPkg::Lock::Timeout` does not concern this lock.
const LISTS_LOCK: &str = "/var/lib/apt/lists/lock";

/// Runs the commands one after the other, until one of them fails. Then disables the units that the new packages have
/// enabled, because an installation may have succeeded before another command failed. Debian's packages enable a
/// nats-server for the whole machine and the sockets of libvirt's daemon. `cargo xtask` uses neither.
///
/// # Errors
/// Returns a failure of the host if a command fails. A failure of `apt-get update` is only shown.
pub(super) fn run_all(host: &LocalHost, commands: &[Vec<String>]) -> Result<()> {
    let (before, mut added) = (enabled_units(host)?, BTreeSet::new());
    let ran = commands.iter().try_for_each(|command| {
        let manager = host.package_manager.filter(|manager| host.systemd && manager.is_install(command));
        match manager {
            _ if PackageManager::is_update(command) => update(command, Path::new(LISTS_LOCK)),
            Some(manager) => install(manager, command, &mut added),
            None => run(command),
        }
    });
    let after = enabled_units(host)?;
    let new = after.difference(&before).filter(|unit| is_of(host, unit, &added));
    if let Some(command) = switch_off(host, new) {
        run(&command)?;
    }
    ran
}

/// Runs an installation, and adds the names of the new packages to `added`. A package that was only upgraded is not
/// new. For apt, the names come from a simulation. Otherwise, packages that another apt installs at the same time would
/// count as well.
fn install(manager: PackageManager, command: &[String], added: &mut BTreeSet<String>) -> Result<()> {
    let before = manager.names(command)?;
    let ran = run(command);
    match manager {
        PackageManager::Apt => added.extend(before),
        _ => added.extend(manager.names(command)?.difference(&before).cloned()),
    }
    ran
}

/// Runs `apt-get update`. While another process holds the lock of the lists, repeats the command for up to
/// [`limits::PACKAGE_LOCK`]. A failure is only shown, because the source that failed may have none of the needed
/// packages. The installation then shows whether they are available.
fn update(command: &[String], lock: &Path) -> Result<()> {
    let deadline = Instant::now() + limits::PACKAGE_LOCK;
    while let Err(error) = run(command) {
        if !is_locked(lock)? || Instant::now() > deadline {
            message!("warning: {error:#}; the packages are installed from the existing lists");
            return Ok(());
        }
        message!("waiting until another process releases {}", lock.display());
        while is_locked(lock)? && Instant::now() < deadline {
            sleep(limits::POLL);
        }
    }
    Ok(())
}

/// Returns whether a process holds a record lock of the file (proc(5), `/proc/locks`).
fn is_locked(file: &Path) -> Result<bool> {
    let Ok(metadata) = file.metadata() else { return Ok(false) };
    let locks = fs_err::read_to_string("/proc/locks")?;
    let inode = format!(":{}", metadata.ino());
    let is_file = |line: &str| line.split_whitespace().nth(5).is_some_and(|id| id.ends_with(&inode));
    Ok(locks.lines().any(is_file))
}

/// Returns the enabled units. Returns none if systemd does not run.
fn enabled_units(host: &LocalHost) -> Result<BTreeSet<String>> {
    if !host.systemd {
        return Ok(BTreeSet::new());
    }
    let words = ["list-unit-files", "--state=enabled", "--no-legend", "--plain"];
    Ok(units_in(&tools::read(&tools::require("systemctl")?, &words)?))
}

/// Returns the names of the units in systemctl's list, without the unit that may stay enabled.
fn units_in(list: &str) -> BTreeSet<String> {
    let units = list.lines().filter_map(|line| line.split_whitespace().next());
    units.filter(|unit| *unit != MAY_STAY_ENABLED).map(str::to_owned).collect()
}

/// Returns whether one of the packages contains the unit. Returns false if no package contains it.
fn is_of(host: &LocalHost, unit: &str, packages: &BTreeSet<String>) -> bool {
    let owners = host.package_manager.and_then(|manager| manager.owners(unit).ok());
    owners.is_some_and(|owners| !owners.is_disjoint(packages))
}

/// Returns the command that stops and disables the units; `None` if there are none.
fn switch_off<'a>(host: &LocalHost, units: impl Iterator<Item = &'a String>) -> Option<Vec<String>> {
    let mut command: Vec<_> = ["systemctl", "disable", "--now"].map(str::to_owned).to_vec();
    command.extend(units.cloned());
    (command.len() > 3).then(|| escalate(host, command))
}

/// Returns the command as this user runs it: with `sudo` or `doas`, unless this process is root.
pub(super) fn escalate(host: &LocalHost, command: Vec<String>) -> Vec<String> {
    match &host.escalation {
        Ok(program) if !host.root => {
            // `env` sets the variable, because neither sudo nor doas passes it on. Without the variable, a package
            // could ask a question and wait for an answer.
            let quiet = command.first().is_some_and(|first| first == "apt-get");
            let variable = quiet.then(|| ["env", QUIET_APT].map(str::to_owned)).into_iter().flatten();
            std::iter::once(program.display().to_string()).chain(variable).chain(command).collect()
        }
        _ => command,
    }
}

/// Returns why `sudo` or `doas` cannot make this process root; `None` if it can, or if it can ask for a password on the
/// terminal.
pub(super) fn refuses(host: &LocalHost, has_terminal: bool) -> Option<&'static str> {
    let program = host.escalation.as_ref().ok()?;
    let permitted = host.root || has_terminal || tools::read(program, &["-n", "true"]).is_ok();
    (!permitted).then_some("sudo or doas refuses or asks for a password, and there is no terminal")
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
    let as_root = match Path::new(program).file_name().and_then(OsStr::to_str) {
        Some("sudo" | "doas") => {
            format!("; if {program} does not permit it, run as root: {}", arguments.join(" "))
        }
        _ => String::new(),
    };
    bail_host!("{error}"; "run it by hand to see why: {line}{as_root}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::findings::tests::sound;

    #[test]
    fn only_named_units_are_switched_off() {
        let list = "nats-server.service enabled enabled\nssh.service enabled enabled\nbinfmt-support.service enabled -\n";
        let units = units_in(list);
        assert_eq!(units.iter().collect::<Vec<_>>(), ["nats-server.service", "ssh.service"]);
        let mut host = sound().host;
        (host.root, host.escalation) = (false, Ok("/usr/bin/sudo".into()));
        let command = switch_off(&host, units.iter().take(1)).unwrap().join(" ");
        assert_eq!(command, "/usr/bin/sudo systemctl disable --now nats-server.service");
        assert_eq!(switch_off(&host, BTreeSet::new().iter()), None);
    }

    #[test]
    fn a_sudo_that_refuses_is_told() {
        let mut host = sound().host;
        for (root, program, terminal, refused) in [
            (false, "false", false, true),
            (false, "false", true, false),
            (false, "true", false, false),
            (true, "false", false, false),
        ] {
            (host.root, host.escalation) = (root, Ok(tools::find(program).unwrap()));
            assert_eq!(refuses(&host, terminal).is_some(), refused, "{root} {program} {terminal}");
        }
        let directory = tempfile::tempdir().unwrap();
        let sudo = directory.path().join("sudo");
        std::os::unix::fs::symlink(tools::find("false").unwrap(), &sudo).unwrap();
        let error = run(&[sudo.to_str().unwrap(), "mount", "x"].map(str::to_owned)).unwrap_err();
        let hint = crate::error::hint(&error).unwrap();
        assert!(hint.ends_with("does not permit it, run as root: mount x"), "{hint}");
    }

    /// The first update fails while another process holds the lock. The second one succeeds.
    #[test]
    fn an_update_waits_for_the_lock_of_the_lists() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let lock = std::fs::File::create(path("lock")).unwrap();
        rustix::fs::fcntl_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let script =
            format!("cd '{}'; mkdir second 2>/dev/null || exit 0; exit 100", directory.path().display());
        let command = ["sh", "-c", &script].map(str::to_owned);
        std::thread::scope(|scope| {
            let updating = scope.spawn(|| update(&command, &path("lock")));
            while !path("second").exists() {
                sleep(limits::RETRY);
            }
            assert!(is_locked(&path("lock")).unwrap() && !updating.is_finished());
            drop(lock);
            updating.join().unwrap().unwrap();
        });
        assert!(!is_locked(&path("lock")).unwrap() && !is_locked(&path("none")).unwrap());
    }
}
