//! The processes of a run are ended, and no other process is.

use std::process::{Child, Stdio};

use super::*;

/// Starts a shell line as a job does: in a process group of its own, and recorded before it executes.
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
    // The copy of the record names the same pids, but the processes do not belong to it: their environment names
    // the original record.
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

/// The QEMU of a libvirt probe is a daemon. It cannot be found by its process group or its environment.
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
