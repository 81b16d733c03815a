//! Runs ssh into an instance, for `vm ssh`, `vm exec` and `vm logs`.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_parent_process_death_signal, waitpid,
};
use xtask_core::error::Failure;
use xtask_core::host::tools;
use xtask_core::runs::instance::Instance;
use xtask_core::{bail_host, limits, message};

use super::monitor::check_running;

/// Parts of ssh's messages after which another attempt would fail, too.
const FINAL: [&str; 2] = ["Permission denied", "Host key verification failed"];

/// Runs a command in an instance, or a shell if there are no words. While ssh cannot enter the guest, for example while
/// it reboots, tries again.
///
/// # Errors
/// If the command fails, returns a failure with the exit code of the command and without a message, because the command
/// has already printed its own messages. Returns a failure of the host if ssh cannot enter the guest within
/// [`limits::SSH_ENTRY`], or if the connection ends before the command does.
pub(super) fn enter(instance: &Instance, flags: &[&str], words: &[String]) -> Result<()> {
    enter_by(&tools::require("ssh")?, instance, (flags, words))
}

fn enter_by(ssh: &Path, instance: &Instance, guest: (&[&str], &[String])) -> Result<()> {
    let begun = Instant::now();
    let name = &instance.machine.name;
    let mut tried = false;
    loop {
        check_running(instance, &format!("enter {name}"))?;
        // The guest may shut down while ssh waits for its answer.
        let left = limits::SSH_ENTRY.saturating_sub(begun.elapsed());
        let limit = left.clamp(limits::SSH_AGAIN, limits::SSH_CONNECT);
        let Attempt { code, log } = Attempt::make(ssh, instance, guest, limit)?;
        if code != SSH_FAILED || log.contains(EXITED) {
            return if code == 0 { Ok(()) } else { Err(Failure::reported(code).into()) };
        }
        let reason = reason(&log);
        if log.contains(ENTERED) {
            bail_host!(
                "{name}: ssh's connection ended before the command{reason}";
                "see whether the guest runs: cargo xtask vm list, and cargo xtask vm console {name}"
            );
        }
        let is_final = FINAL.iter().any(|words| log.contains(words));
        if is_final || begun.elapsed() + limits::SSH_AGAIN > limits::SSH_ENTRY {
            bail_host!(
                "enter {name}: ssh could not log in within {} s{reason}", begun.elapsed().as_secs();
                "see what the guest does: cargo xtask vm console {name}"
            );
        }
        if !tried {
            message!("waiting for {name}: ssh cannot log in yet{reason}");
        }
        tried = true;
        std::thread::sleep(limits::SSH_AGAIN);
    }
}

/// The exit code of ssh for an error of its own (ssh(1)). A command may have this exit code, too.
const SSH_FAILED: u8 = 255;
/// The part of ssh's log that shows that ssh has logged in.
const ENTERED: &str = "Authenticated to ";
/// The part of ssh's log that shows that the guest has reported how the command ended (RFC 4254, 6.10).
const EXITED: &str = " rtype exit-";

/// One call of ssh.
struct Attempt {
    code: u8,
    /// ssh's own messages. They are not on stderr, where the command's messages are.
    log: String,
}

impl Attempt {
    /// Runs ssh on this process's terminal. `limit` is the time limit for ssh's connection.
    fn make(ssh: &Path, instance: &Instance, guest: (&[&str], &[String]), limit: Duration) -> Result<Self> {
        // The log is a file in memory, so no file is left if this process is killed.
        let log = memfd_create("ssh.log", MemfdFlags::CLOEXEC).context("make a file in memory")?;
        let mut log = File::from(log);
        let path = format!("/proc/{}/fd/{}", std::process::id(), log.as_raw_fd());
        let mut command = Command::new(ssh);
        // ssh takes the first value of an option (ssh_config(5)).
        command.args(["-oLogLevel=DEBUG1", &format!("-oConnectTimeout={}", limit.as_secs()), "-E", &path]);
        let (flags, words) = guest;
        if words.is_empty() {
            command.args(instance.ssh()?);
        } else {
            command.args(flags).args(instance.ssh()?).args(["--", &guest_line(words)]);
        }
        // A signal that ends this process ends ssh, too.
        // SAFETY: the closure runs between fork and exec and makes one system call, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?));
        }
        let child = command.spawn().with_context(|| format!("run {}", ssh.display()))?;
        let code = wait(&child)?;
        let mut text = Vec::new();
        log.rewind().and_then(|()| log.read_to_end(&mut text)).context("read ssh's log")?;
        Ok(Self { code, log: String::from_utf8_lossy(&text).into_owned() })
    }
}

/// Returns the reason in ssh's log, with a colon before it: the last line that is no message for debugging.
fn reason(log: &str) -> String {
    let is_reason = |line: &&str| {
        let other = ["debug1: ", ENTERED, "Transferred: ", "Bytes per second: ", "OpenSSH_"];
        !line.trim().is_empty() && !other.iter().any(|start| line.starts_with(start))
    };
    log.lines().rev().find(is_reason).map_or(String::new(), |line| format!(": {}", line.trim()))
}

/// Waits for the end of ssh and returns its exit code. If the user suspends ssh (`~^Z`), this process stops, too, so
/// that the user's shell notices.
fn wait(ssh: &Child) -> Result<u8> {
    let pid = Pid::from_child(ssh);
    loop {
        let waited = waitpid(Some(pid), WaitOptions::UNTRACED).context("wait for ssh")?;
        let Some((_, status)) = waited else { continue };
        if status.stopped() {
            kill_process(getpid(), Signal::STOP).context("stop with ssh")?;
        } else if let Some(signal) = status.terminating_signal() {
            return Ok(u8::try_from(128 + signal)?);
        } else if let Some(code) = status.exit_status() {
            return Ok(u8::try_from(code)?);
        }
    }
}

/// Returns the line for the login shell of the guest. ssh joins the words with spaces for this shell, so each word is
/// quoted to arrive unchanged. The guest's kernel sends SIGTERM to the command when ssh's connection ends (setpriv(1)).
/// Otherwise the command would run on after a signal has ended ssh.
fn guest_line(words: &[String]) -> String {
    let line = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    format!("exec setpriv --pdeathsig TERM -- \"$SHELL\" -c {}", quoted(&line))
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::monitor::tests::Stand;
    use xtask_core::error;
    use xtask_core::runs::instance::{DaemonRecord, Route};

    /// A program in place of ssh. Each line of the script is one call, with the log's path in `$log`.
    fn entered(stand: &Stand, calls: &str) -> (u8, String, usize) {
        let directory = stand.instance.work();
        std::fs::write(directory.join("calls"), calls).unwrap();
        let ssh = directory.join("ssh");
        let script = "#!/bin/sh\ncd \"${0%/*}\"; log=$4; echo >> count; . /dev/stdin <<CALL\n\
                      $(sed -n \"$(wc -l < count)p\" calls)\nCALL\n";
        // Another program writes the file. If this process did, a child of another test could have it open, and
        // execve(2) would fail with ETXTBSY.
        std::fs::write(directory.join("script"), script).unwrap();
        let installed =
            Command::new("install").arg("-m0700").arg(directory.join("script")).arg(&ssh).status();
        assert!(installed.unwrap().success());
        let outcome = enter_by(&ssh, &stand.instance, (&["-T"], &["true".to_owned()]));
        let count = std::fs::read_to_string(directory.join("count")).map_or(0, |count| count.len());
        match outcome {
            Ok(()) => (0, String::new(), count),
            Err(error) => (error::code(&error), format!("{error:#}"), count),
        }
    }

    #[test]
    fn ssh_is_tried_again_and_its_own_failure_is_no_exit_code_of_the_command() {
        let reset = r"printf 'debug1: Connecting\nConnection reset by peer\n' > $log; exit 255";
        let logged_in = "echo 'Authenticated to 127.0.0.1' > $log";
        let ended = "echo 'debug1: client_input_channel_req: channel 0 rtype exit-status reply 0' >> $log";
        let table = [
            (format!("{reset}\n{logged_in}; {ended}; exit 7\n"), 7, "", 2),
            (format!("{logged_in}; {ended}; exit 255\n"), 255, "", 1),
            (format!("{logged_in}; exit 0\n"), 0, "", 1),
            (format!("{logged_in}; exit 255\n"), 69, "connection ended before the command", 1),
            (
                "echo 'me@h: Permission denied (publickey).' > $log; exit 255\n".to_owned(),
                69,
                ": me@h: Perm",
                1,
            ),
            ("kill -TERM $$\n".to_owned(), 143, "", 1),
        ];
        for (calls, code, words, count) in table {
            let stand = Stand::new();
            stand.answer("running");
            let (found, message, called) = entered(&stand, &calls);
            assert_eq!((found, called), (code, count), "{calls}: {message}");
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_guest_that_does_not_run_is_not_entered() {
        for (status, words) in [("shutdown", "the machine is off"), ("io-error", "its state is io-error")] {
            let stand = Stand::new();
            stand.answer(status);
            let (code, message, called) = entered(&stand, "exit 0\n");
            assert_eq!((code, called), (69, 0), "{message}");
            assert!(message.contains(words), "{message}");
        }
    }

    /// Only libvirt knows whether a guest on a daemon runs. No QEMU of the embedded driver is looked for.
    #[test]
    fn a_guest_on_a_daemon_is_entered_by_its_route() {
        let route = Route { address: "192.168.122.2".to_owned(), port: 22, proxy_command: None };
        for (route, code, words, count) in [(Some(route), 7, "", 1), (None, 69, "the machine is off", 0)] {
            let mut stand = Stand::new();
            stand.answer("shutdown");
            stand.instance.machine.daemon = Some(DaemonRecord { uri: "qemu:///system".to_owned(), route });
            let calls = "echo 'Authenticated to 192.168.122.2, rtype exit-status' > $log; exit 7\n";
            let (found, message, called) = entered(&stand, calls);
            assert_eq!((found, called), (code, count), "{message}");
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_word_arrives_in_the_guest_as_it_was_said() {
        for word in ["plain", "two words", "it's", "$HOME;\"x\"", ""] {
            let line = guest_line(&["printf", "%s", word].map(str::to_owned));
            let output = Command::new("sh").args(["-c", &line]).env("SHELL", "/bin/sh").output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
