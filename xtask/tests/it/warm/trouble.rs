//! Tests snapshots that were damaged, and a guest that pauses.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use xtask_core::digest::Algorithm;
use xtask_core::processes::processes_naming;
use xtask_core::snapshot::{BAD, DISK, MANIFEST, RAM, SnapshotManifest};

use super::{SMOKE, Warm, turn};
use crate::scratch::{XTASK_VM, assert_code, message};

#[test]
fn a_disk_that_lies_on_another_snapshot_is_found() {
    let warm = turn();
    let (output, past) = warm.smoke(&["--sabotage", "stale-chain"]);
    assert_code(&output, 69);
    let failure = past.failure.unwrap();
    let described = format!("{} {}", failure.error, failure.causes.join(" "));
    assert!(described.contains("has the backing files") && described.contains(DISK), "{described}");
}

/// If a snapshot is unchanged but cannot be restored, the host is at fault and not the agent, and no later run uses
/// the snapshot.
#[test]
fn a_snapshot_of_which_no_machine_comes_is_not_used_again() {
    let warm = turn();
    let garbage = b"no memory of a machine";
    let mut snapshot = SnapshotManifest::read(&warm.snapshot()).unwrap();
    snapshot.files.get_mut(RAM).unwrap().digest = Algorithm::Sha256.of(garbage);
    let _memory = warm.replace(RAM, garbage);
    let _manifest = warm.replace(MANIFEST, serde_json::to_string(&snapshot).unwrap().as_bytes());
    let (output, past) = warm.smoke(&["--until", "join"]);
    assert_code(&output, 69);
    let failure = past.failure.unwrap();
    assert!(failure.error.contains("restore the machine from the snapshot"), "{failure:?}");
    let listed = message(&warm.scratch.run(XTASK_VM, &["image", "list"]));
    assert!(listed.contains("a snapshot that will not be used again"), "{listed}");
}

#[test]
fn a_snapshot_that_was_changed_is_not_trusted() {
    let warm = turn();
    let directory = warm.snapshot();
    let mut memory = std::fs::read(directory.join(RAM)).unwrap();
    let metadata = directory.join(RAM).metadata().unwrap();
    let middle = memory.len() / 2;
    memory[middle] ^= 1;
    let _memory = warm.replace(RAM, &memory);
    // Restore the old mode and time, so that only the content shows the change.
    let file = std::fs::File::options().write(true).open(directory.join(RAM)).unwrap();
    file.set_modified(metadata.modified().unwrap()).unwrap();
    file.set_permissions(metadata.permissions()).unwrap();
    let (output, changed) = warm.smoke(&["--until", "join"]);
    assert_code(&output, 69);
    let failure = changed.failure.unwrap();
    assert!(failure.error.contains("was changed in ram.save"), "{failure:?}");
    // Another run may still read the snapshot, so it is not deleted yet. No run uses it again, and a later run deletes
    // it.
    assert_eq!(warm.snapshot(), directory);
    assert!(std::fs::read_to_string(directory.join(BAD)).unwrap().contains("expected sha256:"));
}

/// If a guest prints nothing for much longer than in earlier runs, the screen says that it may be stuck. The run goes
/// on, and passes if the guest continues.
#[test]
fn a_guest_that_is_silent_may_be_stuck_and_may_go_on() {
    let warm = turn();
    let mut child = warm
        .scratch
        .xtask_vm(&[&SMOKE[..], &["--warm", "--until", "join"]].concat())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut until = |wanted: &str| {
        let mut seen = Vec::new();
        for line in lines.by_ref() {
            seen.push(line);
            if seen.last().is_some_and(|line| line.contains(wanted)) {
                break;
            }
        }
        seen.join("\n")
    };
    until("boot       ok");
    let emulator = emulator(&warm);
    kill_process(emulator, Signal::STOP).unwrap();
    let before = until("provision may be stuck");
    kill_process(emulator, Signal::CONT).unwrap();
    let after = until("VERIFIED");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{before}\n{after}");
    // The limit is 30 s, and the screen is updated each second.
    assert!(before.contains("may be stuck: no output for 3"), "{before}");
}

/// Returns the QEMU of the only run.
fn emulator(warm: &Warm) -> Pid {
    let named = processes_naming(&warm.scratch.cache().join("runs"));
    let is_emulator = |pid: &Pid| {
        let name =
            std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
        name.starts_with("qemu-system")
    };
    let [emulator] = named.into_iter().filter(is_emulator).collect::<Vec<_>>().try_into().unwrap();
    emulator
}
