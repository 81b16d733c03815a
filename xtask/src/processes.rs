//! Processes of a run, found by what their command lines name: also those whose parents are gone.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::limits;

/// Every process of this user whose command line names something below `directory`. Asked for a run's working
/// directory, these are its QEMU and its broker: what people look at, the console's log, is not in there.
pub fn processes_naming(directory: &Path) -> Vec<Pid> {
    use std::os::unix::ffi::OsStrExt as _;
    let needle = [directory.as_os_str().as_bytes(), b"/"].concat();
    let own = rustix::process::getpid();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| *pid != own && is_mine(*pid))
        .filter(|pid| {
            // A process that ends meanwhile has no command line any more, and neither has a zombie.
            let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            line.windows(needle.len()).any(|window| window == needle)
        })
        .collect()
}

fn is_mine(pid: Pid) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    process.metadata().is_ok_and(|meta| meta.uid() == rustix::process::geteuid().as_raw())
}

/// By its name (proc_pid_comm(5)).
fn is_ssh(pid: Pid) -> bool {
    std::fs::read(format!("/proc/{}/comm", pid.as_raw_nonzero())).is_ok_and(|name| name == b"ssh\n")
}

/// Kills every process that names something below `directory` on its command line, with its group where it leads one:
/// a run's QEMU and broker name its working directory, an image's build the directory it builds in. ssh into a guest, which
/// names its keys, is left alone. How many there were.
///
/// # Errors
/// Where one cannot be killed or outlives that.
pub fn end_processes(directory: &Path) -> Result<usize> {
    // Somebody's terminal, with all that he has piped it into; it ends by itself, as its connection does.
    let doomed = || processes_naming(directory).into_iter().filter(|pid| !is_ssh(*pid)).collect::<Vec<_>>();
    let found = doomed();
    for pid in &found {
        kill(*pid)
            .with_context(|| format!("end process {} of {}", pid.as_raw_nonzero(), directory.display()))?;
    }
    let deadline = Instant::now() + limits::QEMU_STOP;
    while !doomed().is_empty() {
        if Instant::now() > deadline {
            bail!("end the processes of {}: some outlive SIGKILL", directory.display());
        }
        std::thread::sleep(limits::CHILD_POLL);
    }
    Ok(found.len())
}

fn kill(pid: Pid) -> Result<()> {
    // Where it leads no group there is none of that number.
    let killed = match kill_process_group(pid, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => kill_process(pid, Signal::KILL),
        killed => killed,
    };
    match killed {
        // It ended by itself meanwhile.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    #[test]
    fn whoever_has_entered_a_guest_is_not_killed_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let start = |program: &Path| -> Child {
            let mut command = Command::new(program);
            command.args(["-f", "/dev/null"]).arg(directory.path().join("user_key")).stderr(Stdio::null());
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let ssh = directory.path().join("ssh");
        std::fs::copy("/usr/bin/tail", &ssh).unwrap();
        let mut children = [Path::new("/usr/bin/tail"), &ssh].map(start);
        // Between fork and exec a child has this test's own command line and name.
        while processes_naming(directory.path()).len() < 2
            || !processes_naming(directory.path()).into_iter().any(is_ssh)
        {
            std::thread::sleep(limits::RETRY);
        }
        assert_eq!(end_processes(directory.path()).unwrap(), 1);
        assert!(!children[0].wait().unwrap().success(), "killed");
        assert!(children[1].try_wait().unwrap().is_none(), "it ends by itself");
        children[1].kill().unwrap();
        children[1].wait().unwrap();
    }
}
