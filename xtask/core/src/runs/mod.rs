//! A run's directory is its ownership record: whoever holds its lock owns what is in it, and a directory whose lock is
//! free belongs to a dead run, which the next one collects.
//!
//! ```text
//! runs/<id>/.iot-xtask     the marker without which nobody collects the directory
//! runs/<id>/lock           held while the run lives
//! runs/<id>/kept           of a machine that somebody keeps: what `cargo xtask vm` knows of it
//! runs/<id>/report.json    and console.log …: what stays
//! runs/<id>/w/             what does not: disks, NVRAM, keys, the broker's store
//! runs/<id>/w/processes    the run's processes, which whoever collects it ends
//! runs/<id>/w/v/           libvirt's embedded root
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::format::now_rfc3339;
use crate::fs::{
    directories, is_own, lock, make_own_dir, make_private_dir, read_if_there, remove_file, remove_tree,
    try_lock, write_atomically,
};
use crate::processes::end_processes;

pub mod instance;

/// Files in a run's working directory: the path of the image's directory, and the path of the snapshot. Caches that
/// exist call the second one `frozen`.
const IMAGE: &str = "image";
const SNAPSHOT: &str = "frozen";

/// In the directory of a run whose machine somebody keeps; its content is [`instance`]'s.
pub(crate) const KEPT: &str = "kept";

/// Finished runs whose reports are kept.
const FINISHED_RUNS_KEPT: usize = 20;

/// A live run's directory.
#[derive(Debug)]
pub struct RunDir {
    id: String,
    path: PathBuf,
    _lock: File,
}

/// What a dead run left, and is gone now.
#[derive(Debug)]
pub struct Collected {
    pub id: String,
    /// How many processes it had left.
    pub processes: usize,
}

impl std::fmt::Display for Collected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { id, processes } = self;
        write!(f, "collected the run {id}, which died: {processes} process(es) ended, its directory deleted")
    }
}

impl RunDir {
    /// Collects what dead runs left, then makes a directory of its own.
    ///
    /// # Errors
    /// Where the cache cannot be written, or what a dead run left cannot be ended or deleted.
    pub fn create(cache: &Cache) -> Result<(Self, Vec<Collected>)> {
        let runs = cache.runs();
        make_private_dir(&runs)?;
        // Held while directories appear and disappear, so that nobody collects one that is just being made.
        let _guard = lock(&runs.join(".lock"))?;
        let collected = collect(&runs)?;
        let id = new_id()?;
        let path = runs.join(&id);
        make_own_dir(&path)?;
        make_private_dir(&path.join("w/v"))?;
        let lock = try_lock(&path.join("lock"))?.context("lock a directory that was just made")?;
        Ok((Self { id, path, _lock: lock }, collected))
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the report goes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where everything goes that ends with the run.
    pub fn work(&self) -> PathBuf {
        self.path.join("w")
    }

    /// libvirt's embedded root.
    pub fn libvirt_root(&self) -> PathBuf {
        self.work().join("v")
    }

    /// Records that the run uses the image, which is then not deleted.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn uses_image(&self, image: &Path) -> Result<()> {
        self.uses(IMAGE, image)
    }

    /// Records that the run uses the snapshot, which is then not deleted.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn uses_snapshot(&self, snapshot: &Path) -> Result<()> {
        self.uses(SNAPSHOT, snapshot)
    }

    fn uses(&self, what: &str, directory: &Path) -> Result<()> {
        write_atomically(&self.work().join(what), directory.as_os_str().as_encoded_bytes())
    }

    /// Ends what processes are left and deletes the working files.
    ///
    /// # Errors
    /// Where a process cannot be ended or a file not deleted.
    pub fn clean(&self) -> Result<()> {
        end_processes(&self.work())?;
        remove_file(&self.path.join(KEPT))?;
        remove_tree(&self.work())
    }

    /// Leaves nothing at all: of a run that has no report.
    ///
    /// # Errors
    /// Where a process cannot be ended or a file not deleted.
    pub fn discard(self) -> Result<()> {
        self.clean()?;
        // Nobody looks at the directories while one of them goes.
        let _guard = self.path.parent().map(|runs| lock(&runs.join(".lock"))).transpose()?;
        remove_tree(&self.path)
    }
}

/// The runs (alive, kept or not collected yet) whose machine's disk depends on the image or snapshot in `directory`.
pub fn users_of(cache: &Cache, directory: &Path) -> Vec<String> {
    let names =
        |file: PathBuf| fs::read(file).is_ok_and(|path| path == directory.as_os_str().as_encoded_bytes());
    let uses = |run: &Path| [IMAGE, SNAPSHOT].iter().any(|what| names(run.join("w").join(what)));
    directories(&cache.runs()).iter().filter(|run| uses(run)).filter_map(|run| id_of(run)).collect()
}

/// The snapshot that the machine of this working directory depends on.
///
/// # Errors
/// Names the file that cannot be read.
pub fn snapshot_of(work: &Path) -> Result<Option<PathBuf>> {
    Ok(read_if_there(&work.join(SNAPSHOT))?.map(|name| OsString::from_vec(name).into()))
}

/// Runs that died and are not collected yet: nobody holds their lock, nobody keeps them, and their working files are there.
pub fn dead(cache: &Cache) -> Vec<String> {
    // A run that is just being made has a directory before it has its lock, and holds this one for a moment.
    let guard = File::open(cache.runs().join(".lock"));
    let Ok(_guard) = guard.and_then(|file| file.lock().map(|()| file)) else {
        // Without it there was no run yet.
        return Vec::new();
    };
    let is_dead = |path: &Path| {
        is_run(path)
            && path.join("w").exists()
            && !path.join(KEPT).exists()
            // Without its file there is no lock, and one that cannot be asked is not called free.
            && File::open(path.join("lock"))
                .is_ok_and(|file| file.try_lock().is_ok())
    };
    directories(&cache.runs()).iter().filter(|path| is_dead(path)).filter_map(|path| id_of(path)).collect()
}

/// Collects what dead runs left.
///
/// # Errors
/// As [`RunDir::create`].
pub fn gc(cache: &Cache) -> Result<Vec<Collected>> {
    let runs = cache.runs();
    make_private_dir(&runs)?;
    let _guard = lock(&runs.join(".lock"))?;
    collect(&runs)
}

/// Every run whose lock is free and that nobody keeps. `runs` is a name that other programs use too: a directory that
/// this workflow did not make is left alone.
fn collect(runs: &Path) -> Result<Vec<Collected>> {
    let mut collected = Vec::new();
    let mut finished = Vec::new();
    for path in directories(runs) {
        let Some(id) = id_of(&path).filter(|_| is_run(&path)) else { continue };
        let is_kept = || path.join(KEPT).exists();
        // Nobody's command on a kept machine finds its lock taken by this look.
        if is_kept() {
            continue;
        }
        // The lock's handle is kept until the directory is dealt with. Its command may have ended meanwhile, and left it.
        let Some(_lock) = try_lock(&path.join("lock"))?.filter(|_| !is_kept()) else { continue };
        let work = path.join("w");
        if work.exists() {
            let processes = end_processes(&work)?;
            remove_tree(&path)?;
            collected.push(Collected { id, processes });
        } else {
            // The lock is made when the run begins and never written.
            finished.push((fs_err::metadata(path.join("lock"))?.modified()?, path));
        }
    }
    // By age, not by name: a name has no year.
    finished.sort();
    let old = finished.len().saturating_sub(FINISHED_RUNS_KEPT);
    for (_, path) in &finished[..old] {
        remove_tree(path)?;
    }
    Ok(collected)
}

/// Whether a directory is a run's: by its marker and by the form of its name.
fn is_run(path: &Path) -> bool {
    is_own(path) && id_of(path).is_some_and(|id| has_form_of_id(&id))
}

/// Whether a name has the form that [`new_id`] gives: `1124-100000-00ab`.
pub fn has_form_of_id(name: &str) -> bool {
    let parts: Vec<_> = name.split('-').collect();
    let digits =
        |part: &str, count: usize, radix| part.len() == count && part.chars().all(|c| c.is_digit(radix));
    matches!(parts[..], [day, time, random] if digits(day, 4, 10) && digits(time, 6, 10) && digits(random, 4, 16))
}

fn id_of(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

/// The time of day in the name sorts the runs; the random part keeps two of one second apart.
fn new_id() -> Result<String> {
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random number")?;
    let digits: String = now_rfc3339().chars().filter(char::is_ascii_digit).collect();
    Ok(format!("{}-{}-{:04x}", &digits[4..8], &digits[8..14], u16::from_le_bytes(random)))
}

#[cfg(test)]
mod tests {
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

    /// Training programs call their outputs `runs` too, and somebody may point the cache at their directory.
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
        // Our marker and not our name's form, and the other way round.
        let renamed = dead_run(runs, "my-own-copy");
        let unmarked = runs.join("0101-000000-000a");
        fs::create_dir_all(unmarked.join("w")).unwrap();
        foreign.extend([renamed, unmarked]);
        assert!(collect(runs).unwrap().is_empty());
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
        let mut left = Command::new("sleep");
        record_child(left.arg("600"), &dead.join("w")).unwrap();
        let mut left = left.spawn().unwrap();

        let collected = collect(runs).unwrap();
        assert_eq!(collected.len(), 1);
        assert_eq!((collected[0].id.as_str(), collected[0].processes), ("0101-000000-0001", 1));
        assert!(!dead.exists() && live.exists());
        assert!(!left.wait().unwrap().success(), "killed");
    }

    #[test]
    fn finished_runs_stay_until_there_are_too_many() {
        let directory = tempfile::tempdir().unwrap();
        let begin = std::time::SystemTime::now() - limits::BARE_BOOT;
        for number in 0..FINISHED_RUNS_KEPT + 3 {
            // By name the other way round: New Year's runs sort before last year's.
            let path = directory.path().join(format!("0101-0000{:02}-0000", 99 - number));
            fs::create_dir(&path).unwrap();
            mark(&path).unwrap();
            let lock = File::create(path.join("lock")).unwrap();
            lock.set_modified(begin + limits::POLL * u32::try_from(number).unwrap()).unwrap();
        }
        assert!(collect(directory.path()).unwrap().is_empty());
        let left = directories(directory.path());
        assert_eq!(left.len(), FINISHED_RUNS_KEPT);
        assert!(!directory.path().join("0101-000099-0000").exists(), "the oldest go first");
    }

    /// It is somebody's, and has a disk that can be booted again.
    #[test]
    fn a_kept_machine_is_collected_by_nobody_even_when_its_qemu_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = dead_run(directory.path(), "0101-000000-0003");
        fs::write(path.join(KEPT), "{}").unwrap();
        assert!(collect(directory.path()).unwrap().is_empty());
        assert!(path.join("w").exists());
    }
}
