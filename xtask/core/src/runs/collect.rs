//! The collection of dead runs, and of the oldest finished runs.

use std::io::ErrorKind;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::fs::{MARKER, directories, is_own, read_if_there, remove_tree, try_lock, write_private};
use crate::processes::{boot_id, end_processes};

/// The name of the file that makes a run's directory an instance. [`super::instance`] defines the content of the file.
pub(crate) const KEPT: &str = "kept";

/// The number of finished runs whose reports are kept.
pub(super) const FINISHED_RUNS_KEPT: usize = 20;

/// The name of the file with the id of the boot and the name of the run's host.
pub const HOST: &str = "host";

/// A run whose processes were ended and whose files were deleted, or a run that could not be collected.
#[derive(Debug)]
pub struct Collected {
    pub id: String,
    /// The number of processes that were ended, or the reason why the run was not collected.
    pub processes: Result<usize, String>,
}

impl std::fmt::Display for Collected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id = &self.id;
        match &self.processes {
            Ok(count) => {
                write!(
                    f,
                    "collected the run {id}, which died: {count} process(es) ended, its directory deleted"
                )
            }
            Err(reason) => write!(f, "skipped the run {id}, which cannot be collected: {reason}"),
        }
    }
}

/// Collects the dead runs, and deletes the oldest finished runs. Instances are not touched. Other programs also use
/// directories with the name `runs`, so only directories that `cargo xtask` has made are touched. A run that cannot be
/// collected, for example because another user owns it, is skipped.
pub(super) fn collect(runs: &Path) -> Vec<Collected> {
    let mut collected = Vec::new();
    let mut finished = Vec::new();
    for path in directories(runs) {
        let Some(id) = id_of(&path).filter(|id| has_form_of_id(id)) else { continue };
        match collect_one(&path) {
            Ok(Ended::Nothing) => {}
            Ok(Ended::Dead(processes)) => collected.push(Collected { id, processes: Ok(processes) }),
            Ok(Ended::Finished(started)) => finished.push((started, path)),
            Err(error) => collected.push(Collected { id, processes: Err(format!("{error:#}")) }),
        }
    }
    // The runs are sorted by their start and not by their names, because a name contains no year.
    finished.sort();
    let old = finished.len().saturating_sub(FINISHED_RUNS_KEPT);
    for (_, path) in &finished[..old] {
        if let (Err(error), Some(id)) = (remove_tree(path), id_of(path)) {
            collected.push(Collected { id, processes: Err(format!("{error:#}")) });
        }
    }
    collected
}

/// The state of a run's directory after [`collect_one`].
enum Ended {
    /// The directory is not that of a run, or the run is alive, or the run is an instance.
    Nothing,
    /// The run was dead and was collected. The number says how many processes were ended.
    Dead(usize),
    /// The run has finished. The time is that of the run's start.
    Finished(SystemTime),
}

fn collect_one(path: &Path) -> Result<Ended> {
    if let Err(error) = fs_err::symlink_metadata(path.join(MARKER)) {
        return if error.kind() == ErrorKind::NotFound { Ok(Ended::Nothing) } else { Err(error.into()) };
    }
    let is_kept = || path.join(KEPT).exists();
    // The lock of an instance is not taken here, because commands that use the instance would then find it taken.
    if !is_run(path) || is_kept() {
        return Ok(Ended::Nothing);
    }
    // The run may have become an instance just before its lock was taken here, so this is checked again. The lock is
    // held until the end of this function.
    let lock = path.join("lock");
    let Some(_lock) = try_lock(&lock)?.filter(|_| !is_kept()) else { return Ok(Ended::Nothing) };
    let work = path.join("w");
    if !work.exists() {
        // The lock file is made at the start of the run and never written to, so its modification time is the run's
        // start.
        return Ok(Ended::Finished(fs_err::metadata(&lock)?.modified()?));
    }
    if let Some(host) = other_host(path)? {
        bail!("it may still run on the host {host}; if it has ended, delete {}", path.display());
    }
    let processes = end_processes(&work)?;
    remove_tree(path)?;
    Ok(Ended::Dead(processes))
}

/// Records this host in the directory of a run or of a build. Several hosts may share a cache on a network file system
/// that does not share its locks (nfs(5), local_lock).
///
/// # Errors
/// Returns an error if this host's boot id cannot be read or the record cannot be written.
pub fn record_host(directory: &Path) -> Result<()> {
    write_private(&directory.join(HOST), Host::this()?.to_string())
}

/// Returns the name of the host that is recorded in `directory` if it is another host than this one. The recorded host
/// is this one if the boot id is the same, as in every container on this host, or if the name is the same.
///
/// # Errors
/// Returns an error if the record exists and cannot be read.
pub fn other_host(directory: &Path) -> Result<Option<String>> {
    let Some(recorded) = read_if_there(&directory.join(HOST))? else { return Ok(None) };
    let recorded = String::from_utf8_lossy(&recorded).into_owned();
    let (boot, name) = recorded.trim().split_once(' ').context("read the record of the host")?;
    let this = Host::this()?;
    Ok((boot != this.boot && name != this.name).then(|| name.to_owned()))
}

/// A host, as it is recorded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) boot: String,
    pub(super) name: String,
}

impl Host {
    pub(super) fn this() -> Result<Self> {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Ok(Self { boot: boot_id()?, name })
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} {}", self.boot, self.name)
    }
}

/// Returns whether a directory is that of a run: it has the marker, and its name has the form of an id.
pub(super) fn is_run(path: &Path) -> bool {
    is_own(path) && id_of(path).is_some_and(|id| has_form_of_id(&id))
}

/// Returns whether a name has the form of a run's id: `1124-100000-00ab`.
pub fn has_form_of_id(name: &str) -> bool {
    let parts: Vec<_> = name.split('-').collect();
    let digits =
        |part: &str, count: usize, radix| part.len() == count && part.chars().all(|c| c.is_digit(radix));
    matches!(parts[..], [day, time, random] if digits(day, 4, 10) && digits(time, 6, 10) && digits(random, 4, 16))
}

pub(super) fn id_of(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}
