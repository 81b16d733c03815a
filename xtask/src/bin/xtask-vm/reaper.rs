//! Reaps QEMUs while libvirt waits for their end. libvirt's driver daemonizes them, so that they belong to the host's init, and
//! asks until the process is gone, zombies included. An init that reaps now and then alone, as in many containers, makes
//! each end of a QEMU last 1 to 2 s: two in a smoke, and one to three where libvirt probes an emulator.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use xtask::limits;

/// The kernel keeps 15 bytes of a process' name, `qemu-system-aar`.
const NAME: &str = "qemu-system-";

/// From now on what is daemonized below this process becomes its child, as long as it lives.
pub(crate) fn adopt_daemons() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("become the parent of libvirt's daemons")
}

/// Calls libvirt; meanwhile adopted QEMUs that have ended are reaped. This program's own QEMU (`bench boot`) does not run
/// while a libvirt is open.
pub(crate) fn reaping<T>(call: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for pid in dead_emulators() {
                    // Somebody else may have been faster.
                    let _ = waitpid(Some(pid), WaitOptions::NOHANG);
                }
                std::thread::sleep(limits::REAP);
            }
        });
        // Also where the call panics: the scope waits for its thread.
        let _end = SetAtEnd(&done);
        call()
    })
}

struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// This process' children that are zombies and were QEMU. A kernel without `children` (CONFIG_PROC_CHILDREN) has none:
/// libvirt then waits for init, as it does without this.
fn dead_emulators() -> Vec<Pid> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<_> = children
        .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            is_dead_emulator(&stat)
        })
        .collect();
    pids.iter().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// `25510 (qemu-system-aar) Z 1 …` (proc(5)).
fn is_dead_emulator(stat: &str) -> bool {
    let name = stat.split_once('(').is_some_and(|(_, rest)| rest.starts_with(NAME));
    name && stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_qemu_that_has_ended_is_reaped() {
        assert!(is_dead_emulator("25510 (qemu-system-aar) Z 1 25510 0"));
        assert!(!is_dead_emulator("25510 (qemu-system-aar) S 1 25510 0"));
        assert!(!is_dead_emulator("25510 (nats-server) Z 1 25510 0"));
        assert!(!is_dead_emulator(""));
    }
}
