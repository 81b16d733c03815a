//! The directories of the runs. The directory of a run records the files and processes that the run owns. The run holds
//! the lock of its directory while it lives. If the lock is free, but working files exist and there is no file `kept`,
//! the run is dead. The next run then *collects* the dead run: it ends the processes and deletes the files.
//!
//! ```text
//! runs/<id>/.iot-xtask     the marker; a directory without it is never collected
//! runs/<id>/lock           held while the run lives
//! runs/<id>/host           the host of the run; another host does not collect it
//! runs/<id>/kept           the record of an instance, for `cargo xtask vm`
//! runs/<id>/report.json    and console.log …: the files that remain
//! runs/<id>/w/             the files that are deleted: disks, NVRAM, keys, the broker's store
//! runs/<id>/w/processes    the record of the run's processes, which a collection ends
//! runs/<id>/w/v/           libvirt's embedded root
//! runs/.id                 a random id, which the records of ownership on libvirt daemons name
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::format::now_rfc3339;
use crate::fs::{
    directories, lock, make_own_dir, make_private_dir, read_if_there, remove_file, remove_tree, try_lock,
    write_atomically,
};
use crate::processes::end_processes;

mod collect;
pub mod instance;
pub mod listing;
pub mod owner;

pub(crate) use collect::KEPT;
pub use collect::{Collected, HOST, has_form_of_id, other_host, record_host};
use collect::{collect, id_of, is_run};

/// The names of two files in a run's working directory. The first one contains the path of the image's directory, the
/// second one that of the snapshot's directory. The second name is `frozen`, because existing caches use this name.
const IMAGE: &str = "image";
const SNAPSHOT: &str = "frozen";

/// The lock file in the directory of the runs. It is held while a run's directory is made or deleted.
pub(crate) const GUARD: &str = ".lock";

/// The directory of a live run.
#[derive(Debug)]
pub struct RunDir {
    id: String,
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Collects dead runs, then makes the directory of a new run. `check` can end the wait for another process that
    /// collects or makes a run.
    ///
    /// # Errors
    /// Returns an error if the cache cannot be written, or the error of `check`.
    pub fn create(cache: &Cache, check: impl Fn() -> Result<()>) -> Result<(Self, Vec<Collected>)> {
        let runs = cache.runs();
        make_private_dir(&runs)?;
        // Every process holds this lock while it makes or deletes directories of runs. Therefore no other run can
        // collect the new directory before it is complete.
        let _guard = lock(&runs.join(GUARD), check)?;
        let collected = collect(&runs);
        let id = new_id()?;
        let path = runs.join(&id);
        make_own_dir(&path)?;
        record_host(&path)?;
        make_private_dir(&path.join("w/v"))?;
        let lock = try_lock(&path.join("lock"))?.context("lock a directory that was just made")?;
        Ok((Self { id, path, _lock: lock }, collected))
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the run's directory, which has the report.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the working directory, which is deleted at the end of the run.
    pub fn work(&self) -> PathBuf {
        self.path.join("w")
    }

    /// Returns libvirt's embedded root.
    pub fn libvirt_root(&self) -> PathBuf {
        self.work().join("v")
    }

    /// Records that the run uses the image, so that the image is not deleted.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be written.
    pub fn uses_image(&self, image: &Path) -> Result<()> {
        self.uses(IMAGE, image)
    }

    /// Records that the run uses the snapshot, so that the snapshot is not deleted.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be written.
    pub fn uses_snapshot(&self, snapshot: &Path) -> Result<()> {
        self.uses(SNAPSHOT, snapshot)
    }

    fn uses(&self, what: &str, directory: &Path) -> Result<()> {
        write_atomically(&self.work().join(what), directory.as_os_str().as_encoded_bytes())
    }

    /// Ends the remaining processes and deletes the working files.
    ///
    /// # Errors
    /// Returns an error if a process cannot be ended or a file cannot be deleted.
    pub fn clean(&self) -> Result<()> {
        end_processes(&self.work())?;
        remove_file(&self.path.join(KEPT))?;
        remove_tree(&self.work())
    }

    /// Deletes the whole directory of a run that has no report. `check` can end the wait for another process that
    /// collects or makes a run.
    ///
    /// # Errors
    /// Returns an error if a process cannot be ended or a file cannot be deleted, or the error of `check`.
    pub fn discard(self, check: impl Fn() -> Result<()>) -> Result<()> {
        self.clean()?;
        // No other command may read the directories while one of them is deleted.
        let _guard = self.path.parent().map(|runs| lock(&runs.join(GUARD), check)).transpose()?;
        remove_tree(&self.path)
    }
}

/// Returns the ids of the runs that use the image or the snapshot in `directory`. They are live runs, instances, and
/// dead runs that were not collected yet.
pub fn users_of(cache: &Cache, directory: &Path) -> Vec<String> {
    let names =
        |file: PathBuf| fs::read(file).is_ok_and(|path| path == directory.as_os_str().as_encoded_bytes());
    let uses = |run: &Path| [IMAGE, SNAPSHOT].iter().any(|what| names(run.join("w").join(what)));
    directories(&cache.runs()).iter().filter(|run| uses(run)).filter_map(|run| id_of(run)).collect()
}

/// Returns the directory of the snapshot that the run with this working directory uses; `None` if it uses no snapshot.
///
/// # Errors
/// Returns an error that names the file if it exists and cannot be read.
pub fn snapshot_of(work: &Path) -> Result<Option<PathBuf>> {
    Ok(read_if_there(&work.join(SNAPSHOT))?.map(|name| OsString::from_vec(name).into()))
}

/// Returns the ids of the dead runs that were not collected yet. The list is empty while another process makes or
/// collects runs.
pub fn dead(cache: &Cache) -> Vec<String> {
    // A new run makes its directory first and takes the lock of this directory afterwards. In between, it holds the
    // lock `.lock`.
    let guard = cache.runs().join(GUARD);
    if !guard.exists() {
        // There was no run yet.
        return Vec::new();
    }
    // Without the lock, the list could name a run that is being made. If another process holds the lock, that process
    // collects the dead runs now.
    let Ok(Some(_guard)) = try_lock(&guard) else { return Vec::new() };
    let is_dead = |path: &Path| {
        is_run(path)
            && path.join("w").exists()
            && !path.join(KEPT).exists()
            && other_host(path).is_ok_and(|other| other.is_none())
            // If the run has no lock file, or if the lock cannot be queried, the run does not count as dead.
            && File::open(path.join("lock"))
                .is_ok_and(|file| file.try_lock().is_ok())
    };
    directories(&cache.runs()).iter().filter(|path| is_dead(path)).filter_map(|path| id_of(path)).collect()
}

/// Collects the dead runs, and returns them.
///
/// # Errors
/// Returns the errors of [`RunDir::create`].
pub fn gc(cache: &Cache) -> Result<Vec<Collected>> {
    let runs = cache.runs();
    make_private_dir(&runs)?;
    let _guard = lock(&runs.join(GUARD), || Ok(()))?;
    Ok(collect(&runs))
}

/// Returns the id of a new run: month and day, time of day, and a random number that distinguishes runs of the same
/// second.
fn new_id() -> Result<String> {
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random number")?;
    let digits: String = now_rfc3339().chars().filter(char::is_ascii_digit).collect();
    Ok(format!("{}-{}-{:04x}", &digits[4..8], &digits[8..14], u16::from_le_bytes(random)))
}

#[cfg(test)]
mod tests {
    use super::collect::{FINISHED_RUNS_KEPT, Host};
    use super::*;
    use crate::fs::mark;
    use crate::limits;
    use crate::processes::record_child;
    use std::process::Command;

    fn dead_run(runs: &Path, id: &str) -> PathBuf {
        let path = runs.join(id);
        fs::create_dir_all(path.join("w/v")).unwrap();
        mark(&path).unwrap();
        fs::write(path.join("lock"), "").unwrap();
        path
    }

    /// Other programs, for example for machine learning, also call their output directory `runs`. A user may set the
    /// cache to a directory that contains it.
    #[test]
    fn a_directory_that_is_not_a_runs_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let runs = directory.path();
        let mut foreign = Vec::new();
        for number in 0..FINISHED_RUNS_KEPT + 5 {
            let path = runs.join(format!("exp{number:02}"));
            fs::create_dir_all(path.join("weights")).unwrap();
            foreign.push(path);
        }
        // The first directory has the marker, but its name is not an id. The name of the second one is an id, but it
        // has no marker.
        let renamed = dead_run(runs, "my-own-copy");
        let unmarked = runs.join("0101-000000-000a");
        fs::create_dir_all(unmarked.join("w")).unwrap();
        foreign.extend([renamed, unmarked]);
        assert!(collect(runs).is_empty());
        for path in foreign {
            let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            assert!(!names.is_empty(), "{} was emptied", path.display());
            assert!(
                path.ends_with("my-own-copy") || !path.join("lock").exists(),
                "{} was written to",
                path.display()
            );
        }
    }

    #[test]
    fn a_dead_run_is_collected_with_its_processes_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let runs = &cache.runs();
        let dead = dead_run(runs, "0101-000000-0001");
        File::create(runs.join(".lock")).unwrap();
        let live = dead_run(runs, "0101-000000-0002");
        let _held = try_lock(&live.join("lock")).unwrap().unwrap();
        assert_eq!(super::dead(&cache), ["0101-000000-0001"]);
        let guard = try_lock(&runs.join(GUARD)).unwrap().unwrap();
        assert!(super::dead(&cache).is_empty(), "another process collects the dead runs");
        drop(guard);
        let mut left = Command::new("sleep");
        record_child(left.arg("600"), &dead.join("w")).unwrap();
        let mut left = left.spawn().unwrap();

        let collected = collect(runs);
        assert_eq!(collected.len(), 1);
        assert_eq!((collected[0].id.as_str(), &collected[0].processes), ("0101-000000-0001", &Ok(1)));
        assert!(!dead.exists() && live.exists());
        assert!(!left.wait().unwrap().success(), "killed");
    }

    #[test]
    fn a_run_that_cannot_be_collected_is_named_and_stops_no_other_collection() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let runs = &cache.runs();
        let of_host = |id: &str, host: &str| {
            let run = dead_run(runs, id);
            fs::write(run.join(HOST), host).unwrap();
            run
        };
        let this = Host::this().unwrap();
        let elsewhere = of_host("0101-000000-0001", "another-boot another-host\n");
        // The lock of this run cannot be opened, as if the run belonged to another user.
        let blocked = dead_run(runs, "0101-000000-0002");
        fs::remove_file(blocked.join("lock")).unwrap();
        std::os::unix::fs::symlink(directory.path().join("missing"), blocked.join("lock")).unwrap();
        let dead = [
            of_host("0101-000000-0003", &format!("another-boot {}\n", this.name)),
            of_host("0101-000000-0004", &format!("{} a-container\n", this.boot)),
            dead_run(runs, "0101-000000-0005"),
        ];
        File::create(runs.join(GUARD)).unwrap();
        assert_eq!(super::dead(&cache).len(), dead.len());
        let (run, collected) = RunDir::create(&cache, || Ok(())).unwrap();
        assert_eq!(fs::read_to_string(run.path().join(HOST)).unwrap(), this.to_string());
        let skipped: Vec<_> = collected.iter().filter(|one| one.processes.is_err()).collect();
        let [first, second] = skipped[..] else { panic!("{skipped:?}") };
        let text = [first, second].map(ToString::to_string).concat();
        assert!(text.contains("another-host") && text.contains("0101-000000-0002"), "{text}");
        assert!(elsewhere.exists() && blocked.exists() && dead.iter().all(|run| !run.exists()));
    }

    #[test]
    fn finished_runs_stay_until_there_are_too_many() {
        let directory = tempfile::tempdir().unwrap();
        let begin = std::time::SystemTime::now() - limits::BARE_BOOT;
        for number in 0..FINISHED_RUNS_KEPT + 3 {
            // The runs start in the reverse order of their names, as at the turn of a year.
            let path = directory.path().join(format!("0101-0000{:02}-0000", 99 - number));
            fs::create_dir(&path).unwrap();
            mark(&path).unwrap();
            let lock = File::create(path.join("lock")).unwrap();
            lock.set_modified(begin + limits::POLL * u32::try_from(number).unwrap()).unwrap();
        }
        assert!(collect(directory.path()).is_empty());
        let left = directories(directory.path());
        assert_eq!(left.len(), FINISHED_RUNS_KEPT);
        assert!(!directory.path().join("0101-000099-0000").exists(), "the oldest go first");
    }

    /// An instance belongs to the user. After its QEMU has ended, its disk can be booted again.
    #[test]
    fn a_kept_machine_is_collected_by_nobody_even_when_its_qemu_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = dead_run(directory.path(), "0101-000000-0003");
        fs::write(path.join(KEPT), "{}").unwrap();
        assert!(collect(directory.path()).is_empty());
        assert!(path.join("w").exists());
    }
}
