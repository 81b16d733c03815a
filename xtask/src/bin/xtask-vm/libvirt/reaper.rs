//! Reaps QEMUs that have ended. libvirt daemonizes them, so init is their parent. To wait for the end of a QEMU,
//! libvirt polls until the process no longer exists, not even as a zombie. If init reaps only now and then, as in many
//! containers, each end of a QEMU takes seconds. A QEMU ends twice in a smoke, and one to three times while libvirt
//! probes an emulator. Only daemons are reaped here; they have left the session of this process. libvirt itself waits
//! for the children that are still in the session, for example for a QEMU that it probes, until that QEMU goes to the
//! background.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, Once, PoisonError};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use xtask_core::limits;

/// The beginning of the process name of a QEMU. The kernel keeps 15 bytes of a name: `qemu-system-aar`.
const NAME: &str = "qemu-system-";

/// Makes this process the parent of all daemons that are started below it, for as long as it lives. Also starts a
/// thread that periodically reaps the QEMUs that ended by themselves or were killed. Until such a QEMU is reaped,
/// libvirt reports it as running (seen with libvirt 9.0).
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

/// Calls libvirt, and frequently reaps ended QEMUs during the call, because the call may wait for the end of a QEMU.
pub(crate) fn reaping<T>(call: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        // The sender is dropped even if the call panics. This ends the thread, for which the scope waits.
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
        // Another thread may already have reaped it.
        if let Ok(Some((pid, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
            note(pid, status.terminating_signal());
        }
    }
}

/// The reaped QEMUs that a signal ended, with the signal.
static KILLED: Mutex<Vec<(Pid, i32)>> = Mutex::new(Vec::new());

fn note(pid: Pid, signal: Option<i32>) {
    let mut killed = KILLED.lock().unwrap_or_else(PoisonError::into_inner);
    // The kernel gives the pid of an ended process to a later one.
    killed.retain(|(earlier, _)| *earlier != pid);
    killed.extend(signal.map(|signal| (pid, signal)));
}

/// Returns the signal that ended a reaped QEMU; `None` if it ended by itself, or has not been reaped.
pub(crate) fn signal_that_ended(qemu: Pid) -> Option<i32> {
    let killed = KILLED.lock().unwrap_or_else(PoisonError::into_inner);
    killed.iter().find(|(pid, _)| *pid == qemu).map(|(_, signal)| *signal)
}

/// Returns the children of this process. On a kernel without `children` (CONFIG_PROC_CHILDREN), the list is empty, and
/// libvirt waits for init, as it does without this module.
pub(crate) fn children() -> Vec<Pid> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids = lists.collect::<Vec<_>>().join(" ");
    pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Ends the children that are not in `before`. libvirt itself ends the ssh that it has started only when its call
/// returns.
pub(crate) fn end_children_since(before: &[Pid]) {
    for child in children().into_iter().filter(|child| !before.contains(child)) {
        // An error means that the process has already ended by itself.
        let _ = kill_process(child, Signal::TERM);
    }
}

/// Returns the children that are zombies of QEMU daemons.
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

/// The fields that are needed from a line of `/proc/PID/stat` (proc(5)):
/// `25510 (qemu-system-aar) Z PARENT GROUP SESSION …`.
#[derive(Debug, PartialEq)]
struct Named<'a> {
    name: &'a str,
    state: &'a str,
    /// The session. It is 0 if it began outside of this PID namespace, as for a command that is run in a container.
    /// `getsid` of rustix 1.1.6 panics in this case, so the line is read instead.
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
        assert!(!is_dead_daemon("25510 (qemu-system-aar) S 90 25510 25510 0 -1", own), "the QEMU still runs");
        assert!(
            !is_dead_daemon("25510 (qemu-system-aar) Z 90 90 100 0 -1", own),
            "libvirt itself waits for a child in this session"
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

    /// Makes a program with the name of a QEMU.
    fn emulator(directory: &Path) -> PathBuf {
        let program = directory.join("qemu-system-none");
        std::fs::copy(xtask_core::host::tools::require("sleep").unwrap(), &program).unwrap();
        program
    }

    /// Starts a daemon: a process outside of this session, whose parent `sh` has ended. It ends by itself after 1 s.
    /// Returns its pid, and a function that tells whether the process still exists.
    fn daemon(program: &Path) -> (Pid, impl Fn() -> bool + use<>) {
        // `output` waits for every process that has one of its pipes.
        let line = "setsid \"$0\" 1 > /dev/null 2>&1 & echo $!";
        let started = Command::new("sh").arg("-c").arg(line).arg(program).output().unwrap();
        let pid = String::from_utf8(started.stdout).unwrap().trim().to_owned();
        (Pid::from_raw(pid.parse().unwrap()).unwrap(), move || Path::new("/proc").join(&pid).exists())
    }

    fn within_a_moment(over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limits::CHILD_STOP;
        while !over() && Instant::now() < deadline {
            std::thread::sleep(limits::REAP);
        }
        over()
    }

    /// Both cases are in one test. In parallel tests, the first case's call would also reap the second case's daemon.
    #[test]
    fn daemons_are_reaped_in_calls_and_outside_of_them_and_what_somebody_waits_for_is_left_to_them() {
        set_child_subreaper(Some(getpid())).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let program = emulator(directory.path());
        let mut awaited = Command::new(&program).arg("0").spawn().unwrap();
        let (by_itself, there) = daemon(&program);
        assert!(reaping(|| within_a_moment(|| !there())), "the daemon was not reaped");
        assert!(awaited.wait().unwrap().success(), "the awaited child was reaped by another");

        adopt_daemons().unwrap();
        let (killed, there) = daemon(&program);
        // Before the child calls exec, it has another name, and is not reaped.
        assert!(within_a_moment(|| stat(&killed.as_raw_nonzero().to_string()).unwrap().contains(NAME)));
        kill_process(killed, Signal::KILL).unwrap();
        assert!(within_a_moment(|| !there()), "a daemon that ended outside of a call was not reaped");
        assert_eq!((signal_that_ended(by_itself), signal_that_ended(killed)), (None, Some(9)));
    }
}
