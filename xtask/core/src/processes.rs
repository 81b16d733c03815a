//! Records and ends the processes of a run. Each child adds itself to a record in the run's directory before it
//! executes its program. Only these processes are ended: those in the record, the other members of their process
//! groups, and the QEMUs that pid files in the run's directory name. No process is chosen by a pattern in its command
//! line.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, openat};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use crate::fs::entries;
use crate::limits;

/// The name of the record in a run's directory. Each line describes a process: the id of the host's boot, the inode of
/// the record, and the pid and the start time of the process. A pid alone is not enough, because the kernel reuses pids
/// (pidfd_open(2)). The inode distinguishes the record from a copy of it, which owns no processes.
pub const RECORD: &str = "processes";
/// The environment variable with the path of the record. It is set in each recorded process, and the children of the
/// process inherit it.
pub const VARIABLE: &str = "IOT_XTASK_PROCESSES";
/// The pid file that libvirt's embedded driver writes for the run's QEMU, below the run's working directory.
const EMULATOR_PID_FILE: &str = "v/run/qemu/vm.pid";
/// The directory in which libvirt probes QEMU's capabilities, below the run's working directory. Each probe has a
/// directory of its own there, with the pid file `qmp.pid`. The QEMU of a probe is a daemon. It has left the run's
/// process groups, and its environment lacks the run's variables, so only this pid file identifies it.
const PROBES: &str = "v/lib/qemu";

/// A process, identified by its pid and its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// The pid in this process's PID namespace.
    pub pid: Pid,
    /// Clock ticks from the host's boot to the start of the process (proc_pid_stat(5), field 22).
    start: u64,
}

/// An open record. A child can add itself to it between fork and exec.
#[derive(Debug)]
struct Record {
    file: File,
    inode: u64,
    boot: String,
}

/// The fields of `/proc/PID/stat` that are used here.
struct Stat {
    is_dead: bool,
    group: i32,
    start: u64,
}

impl Stat {
    fn of(pid: Pid) -> Option<Self> {
        Self::parse(&std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?)
    }

    /// The second field of the line is the name of the program in parentheses. The name may contain any byte. Therefore
    /// the field ends at the last parenthesis of the line.
    fn parse(line: &[u8]) -> Option<Self> {
        let end = line.iter().rposition(|byte| *byte == b')')?;
        let mut fields = std::str::from_utf8(&line[end + 1..]).ok()?.split_ascii_whitespace();
        let state = fields.next()?;
        let group = fields.nth(1)?.parse().ok()?;
        let start = fields.nth(16)?.parse().ok()?;
        Some(Self { is_dead: matches!(state, "Z" | "X"), group, start })
    }
}

impl Record {
    /// Opens the record of `directory`, and creates it if it does not exist.
    fn open(directory: &Path) -> Result<Self> {
        use fs_err::os::unix::fs::OpenOptionsExt as _;
        let mut options = fs_err::OpenOptions::new();
        let file = options.create(true).append(true).mode(0o600).open(directory.join(RECORD))?;
        let file = file.into_file();
        Ok(Self { inode: file.metadata()?.ino(), file, boot: boot_id()? })
    }

    /// Adds the calling process to the record. Between fork and exec, only async-signal-safe functions are allowed
    /// (signal-safety(7)). Therefore this function makes only system calls and allocates no memory.
    fn add_this_process(&self) -> io::Result<()> {
        let mut line = [0; 1024];
        let stat =
            openat(rustix::fs::CWD, c"/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let length = rustix::io::read(&stat, &mut line)?;
        let stat = Stat::parse(&line[..length]).ok_or(rustix::io::Errno::PROTO)?;
        self.write(getpid(), stat.start)
    }

    /// Writes a line to the record. The record is open for appending and a line is one write of less than a page, so
    /// the lines of two writers do not mix.
    fn write(&self, pid: Pid, start: u64) -> io::Result<()> {
        let mut line = [0; 128];
        let mut rest = &mut line[..];
        writeln!(rest, "{} {} {} {start}", self.boot, self.inode, pid.as_raw_nonzero())?;
        let length = 128 - rest.len();
        (&self.file).write_all(&line[..length])
    }
}

/// Changes `command` so that the child adds itself to the record of `directory` before it executes its program.
///
/// # Errors
/// Returns an error if the record cannot be opened. If the child cannot add itself, it does not execute its program.
pub fn record_child(command: &mut Command, directory: &Path) -> Result<()> {
    let record = Record::open(directory)?;
    command.env(VARIABLE, directory.join(RECORD));
    // SAFETY: the closure runs between fork and exec and makes only system calls, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || record.add_this_process());
    }
    Ok(())
}

/// Returns the id of this host's boot (random(4)).
///
/// # Errors
/// Returns an error if the kernel's file with the id cannot be read.
pub fn boot_id() -> Result<String> {
    Ok(fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Returns the live processes that belong to the working directory `directory` of a run: those in its record, the other
/// members of the process groups that they lead, and the QEMUs that pid files in the directory name.
pub fn owned(directory: &Path) -> Vec<Process> {
    let recorded = recorded(directory);
    let probes = entries(&directory.join(PROBES)).filter_map(|probe| holder(&probe.join("qmp.pid")));
    let mut owned: Vec<_> = emulator(directory).into_iter().chain(probes).collect();
    owned.extend(recorded.iter().filter(|process| process.is_there()));
    if !recorded.is_empty() {
        owned.extend(every_process().filter(|process| is_left_of(process, &recorded, directory)));
    }
    owned.sort_by_key(|process| process.pid.as_raw_nonzero());
    owned.dedup();
    owned
}

/// Returns the processes that were added to the record since this host's boot, whether they are alive or not.
fn recorded(directory: &Path) -> Vec<Process> {
    let path = directory.join(RECORD);
    let (Ok(bytes), Ok(about), Ok(boot)) = (std::fs::read(&path), path.metadata(), boot_id()) else {
        return Vec::new();
    };
    let own = [boot, about.ino().to_string()];
    let parse = |line: &str| {
        let mut words = line.split(' ');
        if own.iter().any(|expected| words.next() != Some(expected)) {
            return None;
        }
        Some(Process { pid: parse_pid(words.next()?)?, start: words.next()?.parse().ok()? })
    };
    String::from_utf8_lossy(&bytes).lines().filter_map(parse).collect()
}

/// Returns the QEMU of a run; `directory` is the run's working directory.
pub fn emulator(directory: &Path) -> Option<Process> {
    holder(&directory.join(EMULATOR_PID_FILE))
}

/// Returns the QEMU that a libvirt daemon of this host has started, by the daemon's pid file. Returns `None` if this
/// user may not read the file or the list of the process's files. Also returns `None` if /proc is that of another PID
/// namespace, because the pid in the file then means another process here.
pub fn emulator_of_daemon(pid_file: &Path) -> Option<Process> {
    let own = std::fs::read_link("/proc/self").ok()?;
    let is_ours = own.to_str() == Some(&getpid().as_raw_nonzero().to_string());
    if is_ours { holder(pid_file) } else { None }
}

/// Returns the process that a pid file names, if this process has the file open. QEMU keeps its pid file open and
/// locked until it ends, whether libvirt (virCommandSetPidFile) or QEMU itself (`-pidfile`) has written the file. Both
/// conditions are needed: a later process with the same pid does not have the file open, and the file does not name a
/// process that merely opened it.
fn holder(pid_file: &Path) -> Option<Process> {
    let pid = parse_pid(std::fs::read_to_string(pid_file).ok()?.trim())?;
    let start = Stat::of(pid)?.start;
    let about = pid_file.metadata().ok()?;
    let is_it = |descriptor: PathBuf| {
        descriptor.metadata().is_ok_and(|open| (open.dev(), open.ino()) == (about.dev(), about.ino()))
    };
    let mut open = entries(Path::new(&format!("/proc/{}/fd", pid.as_raw_nonzero())));
    open.any(is_it).then_some(Process { pid, start })
}

fn parse_pid(text: &str) -> Option<Pid> {
    text.parse().ok().filter(|pid| *pid > 0).and_then(Pid::from_raw)
}

fn every_process() -> impl Iterator<Item = Process> {
    entries(Path::new("/proc")).filter_map(|path| {
        let pid = parse_pid(path.file_name()?.to_str()?)?;
        Some(Process { pid, start: Stat::of(pid)?.start })
    })
}

/// Returns whether `process` is in the process group of a recorded process, its leader. If the leader has ended, its
/// pid may now be the number of another group. In that case, the environment of `process` must also name this record.
fn is_left_of(process: &Process, recorded: &[Process], directory: &Path) -> bool {
    let Some(stat) = Stat::of(process.pid).filter(|stat| stat.start == process.start && !stat.is_dead) else {
        return false;
    };
    recorded.iter().any(|leader| {
        leader.pid.as_raw_nonzero().get() == stat.group
            && match Stat::of(leader.pid) {
                Some(now) => now.start == leader.start,
                None => names_record(process.pid, directory),
            }
    })
}

fn names_record(pid: Pid, directory: &Path) -> bool {
    let wanted = [VARIABLE.as_bytes(), b"=", directory.join(RECORD).as_os_str().as_bytes()].concat();
    let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == wanted)
}

impl Process {
    fn is_there(&self) -> bool {
        Stat::of(self.pid).is_some_and(|stat| stat.start == self.start && !stat.is_dead)
    }

    /// Sends SIGKILL like [`Self::signal`].
    ///
    /// # Errors
    /// Returns an error if the process cannot be killed.
    pub fn kill(&self) -> Result<bool> {
        self.signal(Signal::KILL)
    }

    /// Sends a signal, and returns whether the process still existed. The descriptor is opened before the start time is
    /// compared, so the signal cannot reach a later process with the same pid.
    ///
    /// # Errors
    /// Returns an error if the signal cannot be sent.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let pid = self.pid.as_raw_nonzero();
        let opened = match pidfd_open(self.pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            opened => opened.with_context(|| format!("open process {pid}"))?,
        };
        if !self.is_there() {
            return Ok(false);
        }
        match pidfd_send_signal(opened, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(false),
            sent => sent.map(|()| true).with_context(|| format!("send {signal:?} to process {pid}")),
        }
    }
}

/// Kills the processes that belong to `directory`, waits until all of them have ended, and returns their number.
///
/// # Errors
/// Returns an error if a process cannot be killed or is still alive after [`limits::QEMU_STOP`].
pub fn end_processes(directory: &Path) -> Result<usize> {
    let attempt = || format!("end the processes of {}", directory.display());
    let deadline = Instant::now() + limits::QEMU_STOP;
    let mut ended = Vec::new();
    loop {
        let owned = owned(directory);
        if owned.is_empty() {
            return Ok(ended.len());
        }
        for process in owned {
            // A process that was killed in an earlier round may not have ended yet. It is killed again, but counted
            // once.
            if process.kill().with_context(attempt)? && !ended.contains(&process) {
                ended.push(process);
            }
        }
        if Instant::now() > deadline {
            bail!("{}: some are still alive after SIGKILL", attempt());
        }
        std::thread::sleep(limits::CHILD_POLL);
    }
}

/// Returns every process whose command line names a path below `directory`. The result is for messages only. Never end
/// these processes: they may be an editor or a pager of the user.
pub fn processes_naming(directory: &Path) -> Vec<Pid> {
    let needle = [directory.as_os_str().as_bytes(), b"/"].concat();
    let own = getpid();
    let names = |process: &Process| {
        // If the process is a zombie or has just ended, its command line is empty.
        let path = format!("/proc/{}/cmdline", process.pid.as_raw_nonzero());
        let line = std::fs::read(path).unwrap_or_default();
        line.windows(needle.len()).any(|window| window == needle)
    };
    every_process()
        .filter(|process| process.pid != own && names(process))
        .map(|process| process.pid)
        .collect()
}

#[cfg(test)]
mod tests;
