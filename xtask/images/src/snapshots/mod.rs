//! Snapshots in the cache: found by their key, made beside in the run's own directory and renamed, read-only, and hashed again
//! by every run that uses one.
//!
//! ```text
//! snapshots/<key>.<run>/          snapshot.json, disk.qcow2, ram.save, nvram.fd, seed.img; `bad` in one that was found changed
//! snapshots/<key>.<run>.deleting/ what is being deleted
//! snapshots/<key>.lock            held by whoever looks for it, makes it or deletes it
//! ```
//!
//! The run that made it is part of the name: what lies on a snapshot names its path, which is never another one's.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use fs_err as fs;
use xtask_core::cache::Cache;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::fs::{directories, is_own, make_private_dir, mark, remove_tree, write_private};
use xtask_core::snapshot::{BAD, FILES, Ingredients, MANIFEST, SavedFile, SnapshotManifest};
use xtask_core::{bail_host, runs};

pub use check::Verification;

use crate::store::{idle_seconds, name_of, touch, wait_for_lock};
use xtask_jobs::Ui;

mod check;

/// The ending of what is being deleted.
const DELETING: &str = ".deleting";

/// A snapshot in the cache.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its directory.
    pub directory: PathBuf,
    /// What it says of itself.
    pub manifest: SnapshotManifest,
}

impl Snapshot {
    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Its directory's name.
    pub fn name(&self) -> String {
        name_of(&self.directory)
    }
}

/// The snapshot that a run's machine lies on; `None` where it lies on its image alone.
pub fn under(work: &Path) -> Result<Option<Snapshot>> {
    let Some(directory) = runs::snapshot_of(work)? else { return Ok(None) };
    let manifest = SnapshotManifest::read(&directory)?;
    Ok(Some(Snapshot { directory, manifest }))
}

/// Nobody else makes or deletes this snapshot while it is held. Another run may take `limit` to make it.
pub fn lock(cache: &Cache, key: &str, limit: Duration, ui: &Ui) -> Result<File> {
    make_private_dir(&cache.snapshots())?;
    let path = cache.snapshots().join(format!("{key}.lock"));
    wait_for_lock(&path, ui, |waited| {
        // The seconds are the sign of life: no guest of this run could give one yet.
        let seconds = waited.as_secs();
        ui.tick(&format!(
            "another run is making this snapshot, or restoring from it, for {seconds} s so far"
        ))?;
        if waited > limit {
            bail_host!(
                "wait for the snapshot {key}: another run has held {} for {} s", path.display(), limit.as_secs();
                "wait for that run, or end it: it has the file open (see fuser); --cold needs no snapshot"
            );
        }
        Ok(())
    })
}

/// The snapshot with this key. What is bad, or of another version, is deleted where nothing lies on it. Whoever calls holds its lock.
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
                ui.line(&format!("deleting the snapshot {}, which will not be used again", found.name()));
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

/// Saves what is in `made` and gives it its name. Whoever calls holds the lock of its key.
pub fn keep(cache: &Cache, key: &str, made: &Path, mut manifest: SnapshotManifest) -> Result<Snapshot> {
    // The seed's files, an empty disk; and whatever else the making of it may come to leave there.
    for entry in fs::read_dir(made)? {
        let path = entry?.path();
        if !FILES.iter().any(|name| path.ends_with(name)) {
            if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
        }
    }
    let mut files = BTreeMap::new();
    for name in FILES {
        let path = made.join(name);
        let file = fs::File::open(&path)?;
        file.sync_all()?;
        file.set_permissions(Permissions::from_mode(0o400))?;
        let bytes = file.metadata()?.len();
        files.insert(name.to_owned(), SavedFile { digest: digest(&path)?, bytes });
    }
    manifest.files = files;
    mark(made)?;
    write_private(&made.join(MANIFEST), serde_json::to_string_pretty(&manifest)?)?;
    let directory = cache.snapshots().join(format!("{key}.{}", manifest.made_by));
    fs::rename(made, &directory)?;
    touch(&directory)?;
    Ok(Snapshot { directory, manifest })
}

/// What is in the directory of snapshots.
pub struct Found {
    pub directory: PathBuf,
    /// `None` where its manifest cannot be read: of another version, damaged, or half deleted.
    pub manifest: Option<SnapshotManifest>,
    /// Whether nobody has found it changed, and nobody deletes it.
    pub is_good: bool,
    /// The runs and kept machines that lie on it.
    pub users: Vec<String>,
}

impl Found {
    /// Its directory's name.
    pub fn name(&self) -> String {
        name_of(&self.directory)
    }

    /// Under which others lock it.
    pub fn key(&self) -> String {
        let name = self.name();
        let name = name.strip_suffix(DELETING).unwrap_or(&name);
        name.rsplit_once('.').map_or(name, |(key, _)| key).to_owned()
    }

    /// Bytes on disk, as far as that is known.
    pub fn bytes(&self) -> u64 {
        self.manifest.as_ref().map_or(0, SnapshotManifest::bytes)
    }

    /// Seconds since it was last used.
    pub fn idle_seconds(&self) -> u64 {
        idle_seconds(&self.directory)
    }
}

/// Every snapshot, and who uses it; also what is none any more. What was not made here is left alone.
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

/// Whether a directory's name has the form of a snapshot's, `KEY.RUN`. A copy that somebody made has another name.
fn has_form(name: &str) -> bool {
    let name = name.strip_suffix(DELETING).unwrap_or(name);
    name.rsplit_once('.').is_some_and(|(_, run)| runs::has_form_of_id(run))
}

/// Aside first: a directory that is being deleted is no snapshot any more. Whoever calls holds its lock.
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
