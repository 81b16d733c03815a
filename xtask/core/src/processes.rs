//! The processes that a run starts. Each is written down in the run's own directory before its program executes, and only
//! what is written down there is ever ended: nothing is found by a pattern in a command line.
//!
//! A line of the record names the host's boot, the inode of the record, the pid and the start time of a process. A pid
//! alone is given to another process later (pidfd_open(2)). The inode tells a record from a copy of it, whose processes
//! belong to the original.

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

/// The record's name in a directory.
pub const RECORD: &str = "processes";
/// In the environment of each recorded process: the path of its record. Its children inherit it.
pub const VARIABLE: &str = "IOT_XTASK_PROCESSES";
/// Below a run's working directory: the pid file that libvirt's embedded driver writes for the run's QEMU.
const EMULATOR_PID_FILE: &str = "v/run/qemu/vm.pid";
/// Below a run's working directory: libvirt asks each QEMU for its capabilities in a directory of its own there, with a
/// `qmp.pid`. Such a QEMU is a daemon: it has left the process group and the environment of the run.
const PROBES: &str = "v/lib/qemu";

/// A process, identified by pid and start time, because pids are reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its pid in this PID namespace.
    pub pid: Pid,
    /// Clock ticks from the host's boot to its start (proc_pid_stat(5), field 22).
    start: u64,
}

/// A record that is open, so that a child can add itself between fork and exec.
#[derive(Debug)]
struct Record {
    file: File,
    inode: u64,
    boot: String,
}

/// What is needed of a line of `/proc/PID/stat`.
struct Stat {
    is_dead: bool,
    group: i32,
    start: u64,
}

impl Stat {
    fn of(pid: Pid) -> Option<Self> {
        Self::parse(&std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?)
    }

    /// The name, the second field, is in parentheses and may hold any byte; the last parenthesis ends it.
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
    /// Opens the record of `directory`, and makes it where there is none.
    fn open(directory: &Path) -> Result<Self> {
        use fs_err::os::unix::fs::OpenOptionsExt as _;
        let mut options = fs_err::OpenOptions::new();
        let file = options.create(true).append(true).mode(0o600).open(directory.join(RECORD))?;
        let file = file.into_file();
        Ok(Self { inode: file.metadata()?.ino(), file, boot: boot_id()? })
    }

    /// Adds the calling process. Between fork and exec only async-signal-safe calls are allowed (signal-safety(7)): this
    /// makes system calls alone and allocates nothing.
    fn add_this_process(&self) -> io::Result<()> {
        let mut line = [0; 1024];
        let stat =
            openat(rustix::fs::CWD, c"/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let length = rustix::io::read(&stat, &mut line)?;
        let stat = Stat::parse(&line[..length]).ok_or(rustix::io::Errno::PROTO)?;
        self.write(getpid(), stat.start)
    }

    /// One write of less than a page to a file opened for appending: two writers do not mix their lines.
    fn write(&self, pid: Pid, start: u64) -> io::Result<()> {
        let mut line = [0; 128];
        let mut rest = &mut line[..];
        writeln!(rest, "{} {} {} {start}", self.boot, self.inode, pid.as_raw_nonzero())?;
        let length = 128 - rest.len();
        (&self.file).write_all(&line[..length])
    }
}

/// Has the child that `command` starts write itself down in the record of `directory` before its program executes.
///
/// # Errors
/// Where the record cannot be opened. A child that cannot write itself down does not execute.
pub fn record_child(command: &mut Command, directory: &Path) -> Result<()> {
    let record = Record::open(directory)?;
    command.env(VARIABLE, directory.join(RECORD));
    // SAFETY: the closure runs between fork and exec and makes system calls alone, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || record.add_this_process());
    }
    Ok(())
}

/// The id of this host's boot (random(4)).
///
/// # Errors
/// Where the kernel has no such file.
pub fn boot_id() -> Result<String> {
    Ok(fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The processes of `directory` that are there: those in its record, the rest of the process groups that they lead, and
/// the QEMUs whose pid files are below it.
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

/// The lines of the record that were written since this host was booted.
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

/// The QEMU of a run, by its working directory.
pub fn emulator(directory: &Path) -> Option<Process> {
    holder(&directory.join(EMULATOR_PID_FILE))
}

/// The process that a pid file names, if it has that file open. A QEMU keeps its pid file open and locked until it ends,
/// whether libvirt (virCommandSetPidFile) or QEMU itself (`-pidfile`) wrote it. A later process with the pid, and any
/// other process that opens or locks the file, is not its holder.
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

/// Whether a process is in the group of a recorded one. Where that one has ended, its pid may have led another group
/// since, and the environment must name this record too.
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

    /// Sends SIGKILL; whether the process was there. The descriptor is opened before the start time is compared, so that
    /// the signal goes to the process that was compared and to no later one.
    ///
    /// # Errors
    /// Where the process cannot be killed.
    pub fn kill(&self) -> Result<bool> {
        let pid = self.pid.as_raw_nonzero();
        let opened = match pidfd_open(self.pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            opened => opened.with_context(|| format!("open process {pid}"))?,
        };
        if !self.is_there() {
            return Ok(false);
        }
        match pidfd_send_signal(opened, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => Ok(false),
            sent => sent.map(|()| true).with_context(|| format!("kill process {pid}")),
        }
    }
}

/// Kills every process that `directory` owns and waits until they are gone; how many there were.
///
/// # Errors
/// Where one cannot be killed or outlives that.
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
            // A process that was killed a moment ago is killed again: it may take its time to go.
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

/// Every process whose command line names something below `directory`. For looking alone: an editor or a pager names
/// files too, and nothing that is found here is ever ended.
pub fn processes_naming(directory: &Path) -> Vec<Pid> {
    let needle = [directory.as_os_str().as_bytes(), b"/"].concat();
    let own = getpid();
    let names = |process: &Process| {
        // A process that ends meanwhile has no command line any more, and neither has a zombie.
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
mod tests {
    use std::process::{Child, Stdio};

    use super::*;

    /// A shell line as a job runs one: in a group of its own, recorded before it executes.
    fn start(directory: &Path, line: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", line, "sh"]).arg(directory.join("names-the-directory"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        record_child(&mut command, directory).unwrap();
        command.process_group(0).spawn().unwrap()
    }

    #[test]
    fn what_is_recorded_is_ended_with_its_group_and_a_reader_of_its_files_is_not() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("domain.xml"), "").unwrap();
        let mut reader = Command::new("tail");
        reader.arg("-f").arg(directory.path().join("domain.xml")).stdout(Stdio::null());
        let mut reader = reader.spawn().unwrap();
        let mut child = start(directory.path(), "sleep 600 & sleep 600");
        while owned(directory.path()).len() < 3 {
            std::thread::sleep(limits::RETRY);
        }
        assert!(end_processes(directory.path()).unwrap() >= 3);
        assert!(!child.wait().unwrap().success(), "killed");
        assert_eq!(owned(directory.path()), []);
        assert!(reader.try_wait().unwrap().is_none(), "a reader of the directory's files was killed");
        reader.kill().unwrap();
        reader.wait().unwrap();
    }

    #[test]
    fn the_rest_of_a_group_is_ended_when_its_leader_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), "sleep 600 & exit 0");
        assert!(child.wait().unwrap().success());
        let left = owned(directory.path());
        assert_eq!(left.len(), 1, "{left:?}");
        // The group of another record's process: the same pids, and an environment that names neither.
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(directory.path().join(RECORD), other.path().join(RECORD)).unwrap();
        assert_eq!(owned(other.path()), []);
        assert_eq!(end_processes(directory.path()).unwrap(), 1);
        assert_eq!(owned(directory.path()), []);
    }

    #[test]
    fn a_later_process_with_a_recorded_pid_is_not_ended() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        let start = Stat::of(pid).unwrap().start;
        let record = Record::open(directory.path()).unwrap();
        record.write(pid, start - 1).unwrap();
        assert_eq!(end_processes(directory.path()).unwrap(), 0);
        Record { boot: "another-boot".to_owned(), ..record }.write(pid, start).unwrap();
        assert_eq!(end_processes(directory.path()).unwrap(), 0);
        assert!(!Process { pid, start: start - 1 }.kill().unwrap());
        assert!(child.try_wait().unwrap().is_none(), "another process with the pid was killed");
        Record::open(directory.path()).unwrap().write(pid, start).unwrap();
        assert_eq!(end_processes(directory.path()).unwrap(), 1);
        child.wait().unwrap();
    }

    #[test]
    fn a_copy_of_a_record_and_its_damaged_lines_end_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = start(directory.path(), "exec sleep 600");
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(directory.path().join(RECORD), copy.path().join(RECORD)).unwrap();
        assert_eq!(end_processes(copy.path()).unwrap(), 0);
        assert!(child.try_wait().unwrap().is_none(), "a process of the original was killed");
        let record = Record::open(directory.path()).unwrap();
        let mut damaged = format!("{} {} -5 123\n", record.boot, record.inode).into_bytes();
        damaged.extend(b"\xff\n");
        (&record.file).write_all(&damaged).unwrap();
        assert_eq!(end_processes(directory.path()).unwrap(), 1);
        child.wait().unwrap();
    }

    /// libvirt's probe of a QEMU is a daemon, so neither its group nor its environment leads to it.
    #[test]
    fn the_holder_of_a_pid_file_is_ended_and_one_that_only_opens_or_locks_it_is_not() {
        let directory = tempfile::tempdir().unwrap();
        for file in [format!("{PROBES}/qmp-a/qmp.pid"), EMULATOR_PID_FILE.to_owned()] {
            let file = directory.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            let open = |line: &str| {
                let mut command = Command::new("sleep");
                command.arg(line).stdin(File::open(&file).unwrap()).spawn().unwrap()
            };
            let (mut daemon, mut reader) = (open("600"), open("601"));
            std::fs::write(&file, format!("{}\n", daemon.id())).unwrap();
            assert_eq!(end_processes(directory.path()).unwrap(), 1);
            daemon.wait().unwrap();
            assert!(reader.try_wait().unwrap().is_none(), "a reader of the pid file was killed");
            reader.kill().unwrap();
            reader.wait().unwrap();
            let mut other = Command::new("sleep").arg("602").spawn().unwrap();
            std::fs::write(&file, format!("{}\n", other.id())).unwrap();
            assert_eq!(owned(directory.path()), [], "a later process with the pid");
            other.kill().unwrap();
            other.wait().unwrap();
        }
    }

    #[test]
    fn the_name_of_a_process_may_hold_anything() {
        let mut line = b"7 (a) Z (b\xff) S 1 42 43 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 ".to_vec();
        line.extend(b"123456 0 0");
        let stat = Stat::parse(&line).unwrap();
        assert_eq!((stat.is_dead, stat.group, stat.start), (false, 42, 123_456));
        assert!(Stat::parse(b"7 (sh").is_none());
    }
}
