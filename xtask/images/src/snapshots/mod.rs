//! Snapshots in the cache. A snapshot is found by its key. It is made in the run's own directory, made read-only, and
//! renamed. Every run that uses a snapshot hashes it again.
//!
//! ```text
//! snapshots/<key>.<run>/          snapshot.json, disk.qcow2, ram.save, nvram.fd, seed.img; `bad` if it was changed
//! snapshots/<key>.<run>.deleting/ a snapshot that is being deleted
//! snapshots/<key>.lock            held while a process looks for, makes or deletes the snapshot
//! ```
//!
//! The name of a snapshot's directory contains the run that made the snapshot, so no other snapshot ever gets this
//! path. The overlays of machines refer to their snapshot by its path.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use fs_err as fs;
use xtask_core::cache::Cache;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::fs::{directories, is_own, lock_holder, make_private_dir, mark, remove_tree, write_private};
use xtask_core::snapshot::{BAD, Ingredients, MANIFEST, SavedFile, SnapshotManifest};
use xtask_core::{bail_host, runs};

pub use check::Verification;

use crate::store::{idle_seconds, name_of, touch, wait_for_lock};
use xtask_jobs::Ui;

mod check;

/// The ending of the name of a directory that is being deleted.
const DELETING: &str = ".deleting";

/// A snapshot in the cache.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub directory: PathBuf,
    pub manifest: SnapshotManifest,
}

impl Snapshot {
    /// Returns the path of one of the snapshot's files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns the name of the snapshot's directory.
    pub fn name(&self) -> String {
        name_of(&self.directory)
    }
}

/// Returns the snapshot below the machine of a run; `None` if the machine was not restored from a snapshot.
pub fn under(work: &Path) -> Result<Option<Snapshot>> {
    let Some(directory) = runs::snapshot_of(work)? else { return Ok(None) };
    let manifest = SnapshotManifest::read(&directory)?;
    Ok(Some(Snapshot { directory, manifest }))
}

/// Locks a snapshot. While the lock is held, no other process makes or deletes the snapshot. If another run is making
/// it, the wait ends with an error after `limit`.
pub fn lock(cache: &Cache, key: &str, limit: Duration, ui: &Ui) -> Result<File> {
    make_private_dir(&cache.snapshots())?;
    let path = cache.snapshots().join(format!("{key}.lock"));
    wait_for_lock(&path, ui, |waited| {
        // Show the seconds, because no guest of this run can show a sign of life yet.
        let seconds = waited.as_secs();
        ui.tick(&format!(
            "waiting {seconds} s so far for {}, which makes this snapshot or restores from it",
            lock_holder(&path)
        ))?;
        if waited > limit {
            bail_host!(
                "wait for the snapshot {key}: {} has held {} for {} s", lock_holder(&path), path.display(), limit.as_secs();
                "wait for that process, or end it; --cold needs no snapshot"
            );
        }
        Ok(())
    })
}

/// Returns the snapshot that has this key and these ingredients. Any other snapshot with this key was found to be
/// changed, cannot be read, or has other ingredients. It is deleted, unless a run or an instance (a machine that was
/// kept) uses it. The caller holds the key's lock.
pub fn find(cache: &Cache, key: &str, wanted: &Ingredients, ui: &Ui) -> Result<Option<Snapshot>> {
    let prefix = format!("{key}.");
    let own = all(cache).into_iter().filter(|found| name_of(&found.directory).starts_with(&prefix));
    let mut usable = None;
    for found in own {
        match found.manifest {
            Some(manifest) if found.is_good && manifest.ingredients == *wanted => {
                usable = Some(Snapshot { directory: found.directory, manifest });
            }
            _ if found.users.is_empty() => {
                ui.note(&format!("deleting the snapshot {}, which will not be used again", found.name()));
                remove(&found.directory)?;
            }
            _ => {}
        }
    }
    if let Some(kept) = &usable {
        touch(&kept.directory)?;
    }
    Ok(usable)
}

/// Makes the files of these names in `made` a snapshot under this key. The caller holds the key's lock.
pub fn keep(
    cache: &Cache,
    key: &str,
    (made, names): (&Path, &[&str]),
    mut manifest: SnapshotManifest,
) -> Result<Snapshot> {
    // Delete all other files: those of the seed, an empty disk, and any that a later version of this program may
    // leave.
    for entry in fs::read_dir(made)? {
        let path = entry?.path();
        if !names.iter().any(|name| path.ends_with(name)) {
            if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
        }
    }
    let mut files = BTreeMap::new();
    for name in names {
        let path = made.join(name);
        let file = fs::File::open(&path)?;
        file.sync_all()?;
        file.set_permissions(Permissions::from_mode(0o400))?;
        let bytes = file.metadata()?.len();
        files.insert((*name).to_owned(), SavedFile { digest: digest(&path)?, bytes });
    }
    manifest.files = files;
    mark(made)?;
    write_private(&made.join(MANIFEST), serde_json::to_string_pretty(&manifest)?)?;
    let directory = cache.snapshots().join(format!("{key}.{}", manifest.made_by));
    fs::rename(made, &directory)?;
    touch(&directory)?;
    Ok(Snapshot { directory, manifest })
}

/// A directory among the snapshots.
pub struct Found {
    pub directory: PathBuf,
    /// The manifest, or `None` if it cannot be read. It is then of another version, damaged, or half deleted.
    pub manifest: Option<SnapshotManifest>,
    /// True if no run has found the snapshot changed and no process is deleting it.
    pub is_good: bool,
    /// The runs and instances that use the snapshot.
    pub users: Vec<String>,
}

impl Found {
    /// Returns the name of the directory.
    pub fn name(&self) -> String {
        name_of(&self.directory)
    }

    /// Returns the key, under which other processes lock the snapshot.
    pub fn key(&self) -> String {
        let name = self.name();
        let name = name.strip_suffix(DELETING).unwrap_or(&name);
        name.rsplit_once('.').map_or(name, |(key, _)| key).to_owned()
    }

    /// Returns the size on disk in bytes; 0 if it is unknown.
    pub fn bytes(&self) -> u64 {
        self.manifest.as_ref().map_or(0, SnapshotManifest::bytes)
    }

    /// Returns the seconds since the snapshot was last used.
    pub fn idle_seconds(&self) -> u64 {
        idle_seconds(&self.directory)
    }
}

/// Returns every snapshot with its users, including damaged and half-deleted ones. A directory is left out if its name
/// has another form, or if it has neither the marker nor a readable manifest.
pub fn all(cache: &Cache) -> Vec<Found> {
    let mut found: Vec<_> = directories(&cache.snapshots())
        .into_iter()
        .filter(|directory| has_form(&name_of(directory)))
        .filter(|directory| is_own(directory) || SnapshotManifest::read(directory).is_ok())
        .map(|directory| {
            let is_good = !name_of(&directory).ends_with(DELETING) && !directory.join(BAD).exists();
            let users = runs::users_of(cache, &directory);
            Found { manifest: SnapshotManifest::read(&directory).ok(), is_good, users, directory }
        })
        .collect();
    found.sort_by(|one, other| one.directory.cmp(&other.directory));
    found
}

/// Returns whether a directory's name has the form of a snapshot's name, `KEY.RUN`. A user's copy has another name.
fn has_form(name: &str) -> bool {
    let name = name.strip_suffix(DELETING).unwrap_or(name);
    name.rsplit_once('.').is_some_and(|(_, run)| runs::has_form_of_id(run))
}

/// Deletes a snapshot. Its directory is renamed first, so that no process takes the half-deleted directory for a
/// snapshot. The caller holds the key's lock.
pub fn remove(directory: &Path) -> Result<()> {
    let name = name_of(directory);
    if name.ends_with(DELETING) {
        return remove_tree(directory);
    }
    let aside = directory.with_file_name(format!("{name}{DELETING}"));
    fs::rename(directory, &aside)?;
    remove_tree(&aside)
}

fn digest(path: &Path) -> Result<Digest> {
    Algorithm::Sha256.of_file(path, |_, _| Ok(()))
}

#[cfg(test)]
mod tests;
