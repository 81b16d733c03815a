//! Tests snapshots and instances (machines that were kept) on real machines. The tests share one snapshot, because
//! making it takes a whole boot. The first test makes it. The tests run one at a time and in any order, and each
//! leaves the snapshot unchanged. `cargo xtask ci` runs them after a preflight.

use std::io::{BufRead as _, BufReader};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use xtask_core::digest::Algorithm;
use xtask_core::error::Verdict;
use xtask_core::fs::directories;
use xtask_core::processes::processes_naming;
use xtask_core::report::{Phase, PhaseStatus, Report};
use xtask_core::snapshot::{BAD, DISK, FILES, MANIFEST, RAM, SnapshotManifest};

use crate::scratch::{Scratch, XTASK, XTASK_VM, assert_code, message};

mod installer;
mod instance;

/// A cache with one snapshot, and the output and report of the smoke that made it.
struct Warm {
    scratch: Scratch,
    output: Output,
    made: Report,
}

/// The right of one test to use the shared cache, which no other test has at the same time.
struct Turn {
    warm: &'static Warm,
    _alone: MutexGuard<'static, ()>,
}

impl Deref for Turn {
    type Target = Warm;

    fn deref(&self) -> &Warm {
        self.warm
    }
}

/// Waits for this test's turn. If the smoke that makes the snapshot fails, it is not repeated. Each test then fails
/// with the output of that smoke.
fn turn() -> Turn {
    static ALONE: Mutex<()> = Mutex::new(());
    static WARM: OnceLock<Result<Warm, String>> = OnceLock::new();
    // The lock may be poisoned by a test that failed. That test has still put back the files that it had replaced.
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let warm = WARM.get_or_init(Warm::make).as_ref();
    Turn { warm: warm.unwrap_or_else(|message| panic!("no snapshot was made: {message}")), _alone: alone }
}

impl Warm {
    fn make() -> Result<Self, String> {
        let scratch = Scratch::with_images().until_exit();
        let output = scratch.run(XTASK_VM, &[&SMOKE[..], &["--until", "join"]].concat());
        match report(&output) {
            Some(made) if output.status.success() => Ok(Self { scratch, output, made }),
            _ => Err(message(&output)),
        }
    }

    /// Runs a smoke and reads its report. Checks that nothing of the run is left.
    fn smoke(&self, arguments: &[&str]) -> (Output, Report) {
        let output = self.scratch.run(XTASK_VM, &[&SMOKE, arguments].concat());
        let report = report(&output).unwrap_or_else(|| panic!("{}", message(&output)));
        self.assert_nothing_left(&output, &report);
        (output, report)
    }

    fn assert_nothing_left(&self, output: &Output, report: &Report) {
        let message = message(output);
        let work = self.scratch.cache().join("runs").join(&report.run_id).join("w");
        assert_eq!(processes_naming(&work), Vec::<Pid>::new(), "{message}");
        assert!(!work.exists(), "{} is left: {message}", work.display());
        if report.verdict == Verdict::Verified {
            let teardown = &report.phases.last().unwrap().detail;
            assert!(teardown.contains("1 file system(s) of the guest checked, no damage"), "{teardown}");
        }
    }

    fn vm(&self, arguments: &[&str]) -> Output {
        self.scratch.run(XTASK, &[&["vm"], arguments].concat())
    }

    /// Returns the directory of the only snapshot.
    fn snapshot(&self) -> PathBuf {
        let [snapshot] = directories(&self.scratch.cache().join("snapshots")).try_into().unwrap();
        snapshot
    }

    /// Replaces a file of the snapshot until the end of the test.
    fn replace(&self, name: &str, content: &[u8]) -> Replaced {
        let path = self.snapshot().join(name);
        let aside = self.scratch.path().join(name);
        std::fs::rename(&path, &aside).unwrap();
        std::fs::write(&path, content).unwrap();
        Replaced { path, aside }
    }
}

const SMOKE: [&str; 6] = ["smoke", "--fsck", "--arch", "aarch64", "--image", "debian-12"];

fn report(output: &Output) -> Option<Report> {
    let message = message(output);
    let path = message.lines().find_map(|line| line.strip_prefix("report: "))?;
    Report::read(Path::new(path).parent()?).ok()
}

/// A replaced file of the snapshot. Dropping this value puts the original back and removes the mark `bad` of the
/// snapshot.
struct Replaced {
    path: PathBuf,
    aside: PathBuf,
}

impl Drop for Replaced {
    fn drop(&mut self) {
        std::fs::rename(&self.aside, &self.path).unwrap();
        let bad = self.path.with_file_name(BAD);
        if bad.exists() {
            std::fs::remove_file(bad).unwrap();
        }
    }
}

#[test]
fn a_first_smoke_makes_a_snapshot() {
    let warm = turn();
    warm.assert_nothing_left(&warm.output, &warm.made);
    let snapshot = warm.made.snapshot.as_ref().unwrap();
    assert_eq!(
        (warm.made.verdict, snapshot.made_by.as_str()),
        (Verdict::Verified, warm.made.run_id.as_str())
    );
    let message = message(&warm.output);
    assert!(message.contains(", warm, ") && message.contains(", only until join"), "{message}");
    assert_saved(&warm.snapshot());
}

/// Checks that the snapshot's files match its manifest and are read-only.
fn assert_saved(directory: &Path) {
    let snapshot = SnapshotManifest::read(directory).unwrap();
    assert_eq!(snapshot.files.len(), FILES.len());
    for (name, file) in &snapshot.files {
        let path = directory.join(name);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o400, "{name}");
        let found = Algorithm::Sha256.of(&std::fs::read(&path).unwrap());
        assert_eq!(found, file.digest, "{name}");
    }
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let mut expected = [&FILES[..], &[MANIFEST, ".iot-xtask", "used"]].concat();
    names.sort();
    expected.sort_unstable();
    assert_eq!(names, expected);
}

#[test]
fn a_warm_run_and_a_cold_one_agree() {
    let warm = turn();
    let compared = compare(&warm);
    let (made, restored) = (warm.made.snapshot.as_ref().unwrap(), compared.snapshot.as_ref().unwrap());
    assert!(made.age_seconds < restored.age_seconds, "{:?} {:?}", made.age_seconds, restored.age_seconds);
    assert_eq!(restored.made_by, warm.made.run_id, "restored, not made again");
    // Each restored guest begins with the time at which the snapshot was saved. The guest reaches no time server
    // before its clock is set.
    let (first, later) = (made.clock_step_seconds.unwrap(), restored.clock_step_seconds.unwrap());
    assert!(first < later, "{first} s and, later, {later} s");
    assert!(compared.phases.iter().all(|phase| phase.status == PhaseStatus::Passed), "{:?}", compared.phases);
    let evidence = &compared.evidence;
    let (join, rejoin) = (evidence.join.as_ref().unwrap(), evidence.rejoin.as_ref().unwrap());
    assert!(join.boot_id != rejoin.boot_id && join.exe_sha256 == rejoin.exe_sha256);
    assert!(evidence.workload_offline.is_some() && evidence.workload_rejoin.is_some());
    // The runs wrote only to their own overlays, so the shared snapshot is unchanged.
    assert_saved(&warm.snapshot());
}

/// Checks that a warm run and a cold run agree, and that the comparison fails if the cold run fails. Returns the warm
/// run's report.
fn compare(warm: &Warm) -> Report {
    let smoke = |arguments: &[&str]| {
        warm.scratch.run(XTASK_VM, &[&SMOKE, &["--verify-cold", "--warm"][..], arguments].concat())
    };
    let output = smoke(&["--until", "join"]);
    assert_code(&output, 0);
    assert!(message(&output).contains("the warm run and the cold one agree"), "{}", message(&output));
    let output = smoke(&["--sabotage", "cold-panics"]);
    assert_code(&output, 1);
    let differs = "the verdict: warm verified, cold failed";
    assert!(message(&output).contains(differs), "{}", message(&output));
    let report = |name| {
        let path = warm.scratch.cache().join("compared").join(name).join("report.json");
        serde_json::from_slice::<Report>(&std::fs::read(path).unwrap()).unwrap()
    };
    let cold = report("cold");
    assert_eq!(cold.failure.unwrap().phase, Phase::Boot);
    assert!(cold.host.libvirt.is_some(), "the report of a failed boot has no libvirt");
    report("warm")
}

#[test]
fn a_disk_that_lies_on_another_snapshot_is_found() {
    let warm = turn();
    let (output, past) = warm.smoke(&["--sabotage", "stale-chain"]);
    assert_code(&output, 69);
    let failure = past.failure.unwrap();
    let described = format!("{} {}", failure.error, failure.causes.join(" "));
    assert!(described.contains("has the backing files") && described.contains(DISK), "{described}");
}

#[test]
fn a_snapshot_stays_as_long_as_its_image_and_its_qemu_and_there_is_room() {
    let warm = turn();
    let directory = warm.snapshot();
    let would_for = |criterion: [&str; 2]| {
        let output = warm.scratch.run(XTASK_VM, &[&["image", "prune", "--dry-run"][..], &criterion].concat());
        assert_code(&output, 0);
        message(&output)
    };
    let name = directory.file_name().unwrap().to_str().unwrap();
    assert!(!would_for(["--keep", "100G"]).contains(name));
    assert!(would_for(["--keep", "1M"]).contains(&format!("would delete {name}")));
    let would = || would_for(["--older-than", "999"]);
    assert!(!would().contains("snapshot"), "{}", would());
    let manifest = std::fs::read_to_string(directory.join(MANIFEST)).unwrap();
    let made_of = SnapshotManifest::read(&directory).unwrap().ingredients;
    for (digest, reason) in
        [(&made_of.emulator, "of a QEMU that is no longer"), (&made_of.image, "of an image that no longer")]
    {
        let other = Algorithm::Sha256.of(b"another").to_string();
        let _replaced = warm.replace(MANIFEST, manifest.replace(&digest.to_string(), &other).as_bytes());
        assert!(would().contains(reason), "{reason}: {}", would());
    }
    assert!(directory.exists() && !would().contains("snapshot"));
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
