//! Tests snapshots and instances (machines that were kept) on real machines. The tests share one snapshot, because
//! making it takes a whole boot. The first test makes it. The tests run one at a time and in any order, and each
//! leaves the snapshot unchanged. `cargo xtask ci` runs them after a preflight. Of [`long`] and [`trouble`] it runs the
//! third that the commit draws.

use std::ops::Deref;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::process::Pid;
use xtask_core::digest::Algorithm;
use xtask_core::error::Verdict;
use xtask_core::fs::directories;
use xtask_core::processes::processes_naming;
use xtask_core::report::Report;
use xtask_core::snapshot::{BAD, FILES, MANIFEST, SnapshotManifest};

use crate::scratch::{Scratch, XTASK, XTASK_VM, assert_code, message};

mod long;
mod trouble;

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
