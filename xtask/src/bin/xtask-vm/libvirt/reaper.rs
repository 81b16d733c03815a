//! Reaps QEMUs that have ended. libvirt's driver daemonizes them, so that they belong to the host's init, and where it has to see the
//! end of one it asks until the process is gone, zombies included. An init that reaps now and then alone, as in many containers,
//! makes each end of a QEMU last 1 to 2 s: two in a smoke, and one to three where libvirt probes an emulator.
//!
//! libvirt has children of its own that it waits for, QEMUs among them (a probed one first starts in the foreground, and
//! puts itself into the background). Those are in this process' session; a daemon has left it.

use std::sync::Once;
use std::sync::mpsc::{self, RecvTimeoutError};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use xtask_core::limits;

/// The kernel keeps 15 bytes of a process' name, `qemu-system-aar`.
const NAME: &str = "qemu-system-";

/// From now on what is daemonized below this process becomes its child, as long as it lives. A QEMU that ends by itself, or is killed,
/// is reaped by a thread that looks now and then: libvirt waits for the end of that one too, and does not say meanwhile that it has
/// ended (9.0: seen for 80 s).
pub(crate) fn adopt_daemons() -> Result<()> {
    static STARTED: Once = Once::new();
    set_child_subreaper(Some(getpid())).context("become the parent of libvirt's daemons")?;
    STARTED.call_once(|| {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(limits::POLL);
                reap();
            }
        });
    });
    Ok(())
}

/// Calls libvirt, which may wait for a QEMU's end; meanwhile those that have ended are looked for all the time.
pub(crate) fn reaping<T>(call: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        // Dropped where the call panics too: the scope waits for its thread.
        let (_call, end) = mpsc::channel::<()>();
        scope.spawn(move || {
            while end.recv_timeout(limits::REAP) == Err(RecvTimeoutError::Timeout) {
                reap();
            }
        });
        call()
    })
}

fn reap() {
    for pid in dead_emulators() {
        // Somebody else may have been faster.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// This process' children. A kernel without `children` (CONFIG_PROC_CHILDREN) has none: libvirt then waits for init, as it
/// does without this.
pub(crate) fn children() -> Vec<Pid> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids = lists.collect::<Vec<_>>().join(" ");
    pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Those children that are zombies and were QEMU daemons.
fn dead_emulators() -> Vec<Pid> {
    let Some(own_session) = stat("self").as_deref().and_then(|own| Some(named(own)?.session)) else {
        return Vec::new();
    };
    let is_dead = |pid: &Pid| {
        stat(&pid.as_raw_nonzero().to_string()).is_some_and(|stat| is_dead_daemon(&stat, own_session))
    };
    children().into_iter().filter(is_dead).collect()
}

fn stat(pid: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()
}

/// What a line of `/proc/PID/stat` says: `25510 (qemu-system-aar) Z PARENT GROUP SESSION …` (proc(5)).
#[derive(Debug, PartialEq)]
struct Named<'a> {
    name: &'a str,
    state: &'a str,
    /// 0 where the session began outside of this PID namespace, as that of a command run in a container does; rustix 1.1.6's
    /// `getsid` panics there, so the line is read instead.
    session: u32,
}

fn named(stat: &str) -> Option<Named<'_>> {
    let (head, rest) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    let mut fields = rest.split(' ');
    Some(Named { name, state: fields.next()?, session: fields.nth(2)?.parse().ok()? })
}

fn is_dead_daemon(stat: &str, own_session: u32) -> bool {
    named(stat).is_some_and(|process| {
        process.name.starts_with(NAME) && process.state == "Z" && process.session != own_session
    })
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn only_a_daemon_that_has_ended_is_reaped() {
        let own = 100;
        assert!(is_dead_daemon("25510 (qemu-system-aar) Z 90 25510 25510 0 -1", own));
        assert!(!is_dead_daemon("25510 (qemu-system-aar) S 90 25510 25510 0 -1", own), "it lives");
        assert!(
            !is_dead_daemon("25510 (qemu-system-aar) Z 90 90 100 0 -1", own),
            "somebody here waits for it"
        );
        assert!(!is_dead_daemon("25510 (nats-server) Z 90 25510 25510 0 -1", own));
        assert!(!is_dead_daemon("", own));
    }

    #[test]
    fn a_session_may_have_begun_outside_of_the_namespace() {
        let outside = named("7 (a (b) c) S 0 0 0 0 -1").unwrap();
        assert_eq!(outside, Named { name: "a (b) c", state: "S", session: 0 });
        assert!(is_dead_daemon("25510 (qemu-system-aar) Z 7 25510 25510 0 -1", outside.session));
        assert!(!is_dead_daemon("25510 (qemu-system-aar) Z 7 7 0 0 -1", outside.session), "of this session");
        assert_eq!(named("7 (sh) S 0 0"), None);
    }

    /// A program with the name of a QEMU.
    fn emulator(directory: &Path) -> PathBuf {
        let program = directory.join("qemu-system-none");
        std::fs::copy(xtask_core::host::tools::require("sleep").unwrap(), &program).unwrap();
        program
    }

    /// One that has left this session, with its own parent, `sh`, gone, and that ends by itself; whether it is there.
    fn daemon(program: &Path) -> impl Fn() -> bool + use<> {
        let line = "setsid \"$0\" 0.2 & echo $!";
        let started = Command::new("sh").arg("-c").arg(line).arg(program).output().unwrap();
        let pid = String::from_utf8(started.stdout).unwrap().trim().to_owned();
        move || Path::new("/proc").join(&pid).exists()
    }

    fn within_a_moment(over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limits::CHILD_STOP;
        while !over() && Instant::now() < deadline {
            std::thread::sleep(limits::REAP);
        }
        over()
    }

    /// One after the other: the second would be reaped by the first one's call, too.
    #[test]
    fn daemons_are_reaped_in_calls_and_outside_of_them_and_what_somebody_waits_for_is_left_to_them() {
        set_child_subreaper(Some(getpid())).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let program = emulator(directory.path());
        let mut awaited = Command::new(&program).arg("0").spawn().unwrap();
        let there = daemon(&program);
        assert!(reaping(|| within_a_moment(|| !there())), "the daemon was not reaped");
        assert!(awaited.wait().unwrap().success(), "the awaited child was reaped by another");

        adopt_daemons().unwrap();
        let there = daemon(&program);
        assert!(within_a_moment(|| !there()), "one that ends while nobody calls libvirt is still there");
    }
}
