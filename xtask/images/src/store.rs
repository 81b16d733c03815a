//! The cache's directory of images: locks, manifests, digests, and the runs that use an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fs_err as fs;
use xtask_core::cache::Cache;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::error::Kind;
use xtask_core::format::human_bytes;
use xtask_core::fs::{
    directories, is_own, lock_holder, make_private_dir, try_lock, write_atomically, write_private,
};
use xtask_core::image::Format;
use xtask_core::image::manifest::{Manifest, Stamp};
use xtask_core::processes::end_processes;
use xtask_core::runs::{self, RunDir};
use xtask_core::{bail_host, limits};

use xtask_jobs::Ui;

/// The manifest's name in an image's directory.
const MANIFEST: &str = "manifest.json";
/// The endings of the names of directories in which an image is being built, deleted or fetched. Such a directory is no
/// image.
const BUILDING: &str = ".building";
const DELETING: &str = ".deleting";
pub(crate) const FETCHING: &str = ".fetching";
/// A file whose modification time is the time of the last use of the image or the snapshot.
const USED: &str = "used";
/// The file with the digests of the users' own files.
const REMEMBERED: &str = "own-files.json";

/// The disk's name in its directory.
pub(crate) const DISK: &str = "disk";

/// An image that can be booted.
#[derive(Debug, Clone)]
pub struct ReadyImage {
    /// The image's file, which is read-only.
    pub disk: PathBuf,
    pub format: Format,
    /// The size of the guest's disk.
    pub virtual_bytes: u64,
    /// SHA-256 of the file.
    pub digest: Digest,
    /// The source of the image, for the report.
    pub source: String,
    /// How the image was obtained, for messages: cached, built, fetched.
    pub how: &'static str,
}

/// The disk on which an overlay is based.
#[derive(Debug, Clone)]
pub struct Base {
    pub disk: PathBuf,
    pub format: Format,
    /// The size of the guest's disk.
    pub virtual_bytes: u64,
}

impl ReadyImage {
    /// Returns the disk, as the base of an overlay.
    pub fn base(&self) -> Base {
        Base { disk: self.disk.clone(), format: self.format, virtual_bytes: self.virtual_bytes }
    }

    pub(crate) fn new(disk: PathBuf, manifest: Manifest, how: &'static str) -> Self {
        let Manifest { format, virtual_bytes, digest, source, .. } = manifest;
        Self { disk, format, virtual_bytes, digest, source, how }
    }
}

/// The images of one cache, and the screen on which waits are shown.
pub struct Store<'a> {
    pub cache: &'a Cache,
    pub ui: &'a Ui,
    /// True if the network is forbidden.
    pub offline: bool,
    /// The run that uses the requested images.
    pub run: Option<&'a RunDir>,
}

/// One image in the cache.
#[derive(Debug, Clone)]
pub struct CachedImage {
    pub key: String,
    pub directory: PathBuf,
    /// The manifest, or `None` if it cannot be read. It is then of an older version or damaged.
    pub manifest: Option<Manifest>,
    /// The seconds since the image was last used.
    pub idle_seconds: u64,
    /// The runs that use the image.
    pub used_by: Vec<String>,
}

impl Store<'_> {
    /// Returns the directory of an image, or of an image that is being made.
    pub fn directory(&self, name: &str) -> PathBuf {
        self.cache.images().join(name)
    }

    /// Locks an image. While the lock is held, no other process makes or deletes the image.
    pub fn lock(&self, key: &str) -> Result<File> {
        make_private_dir(&self.cache.images())?;
        let path = self.directory(&format!("{key}.lock"));
        wait_for_lock(&path, self.ui, |_| {
            self.ui.tick(&format!("{} is making or deleting this image", lock_holder(&path)))
        })
    }

    /// Returns a file's digest, and shows the progress.
    pub fn digest(&self, path: &Path, algorithm: Algorithm) -> Result<Digest> {
        algorithm.of_file(path, |read, total| {
            self.ui.tick(&format!("hashing, {} of {}", human_bytes(read), human_bytes(total)))
        })
    }

    /// Returns a file's digest and stores it. The file is hashed again only if its size, inode or modification time has
    /// changed.
    pub fn remembered_digest(&self, path: &Path, algorithm: Algorithm) -> Result<Digest> {
        let memory = self.directory(REMEMBERED);
        make_private_dir(&self.cache.images())?;
        let known = fs::read(&memory).ok().and_then(|text| serde_json::from_slice(&text).ok());
        // If the remembered digests cannot be read, the file is hashed again.
        let mut known: BTreeMap<String, (Stamp, Digest)> = known.unwrap_or_default();
        let name = format!("{} {}", algorithm.name(), path.display());
        let stamp = Stamp::of(path)?;
        if let Some((_, digest)) = known.get(&name).filter(|(at, _)| *at == stamp) {
            return Ok(digest.clone());
        }
        let digest = self.digest(path, algorithm)?;
        known.insert(name, (stamp, digest.clone()));
        write_atomically(&memory, serde_json::to_string_pretty(&known)?)?;
        Ok(digest)
    }

    /// Returns every image, sorted by key. A directory is left out if its name is no key, or if it has neither the
    /// marker nor a readable manifest.
    pub fn kept(&self) -> Vec<CachedImage> {
        let mut kept = Vec::new();
        for directory in directories(&self.cache.images()) {
            let key = name_of(&directory);
            let manifest = read_manifest(&directory).ok();
            if !has_form_of_key(&key) || manifest.is_none() && !is_own(&directory) {
                continue;
            }
            let used_by = runs::users_of(self.cache, &directory);
            let idle_seconds = idle_seconds(&directory);
            kept.push(CachedImage { manifest, key, directory, idle_seconds, used_by });
        }
        kept.sort_by(|a, b| a.key.cmp(&b.key));
        kept
    }

    /// Deletes the image if it exists. The directory is renamed first, so that no process takes the half-deleted
    /// directory for an image. The caller holds the image's lock.
    pub(crate) fn remove(&self, key: &str) -> Result<()> {
        let (directory, aside) = (self.directory(key), self.directory(&format!("{key}{DELETING}")));
        if aside.exists() {
            crate::discard::discard(&aside, self.ui)?;
        }
        if directory.exists() {
            fs::rename(&directory, &aside)?;
            crate::discard::discard(&aside, self.ui)?;
        }
        Ok(())
    }

    /// Ends the processes of builds that were killed, and deletes their directories. This includes the build of `own`,
    /// whose lock the caller holds. A directory that cannot be deleted is named and skipped, except that of `own`.
    pub(crate) fn collect_dead_builds(&self, own: &str) -> Result<()> {
        for directory in directories(&self.cache.images()).into_iter().filter(|path| is_own(path)) {
            let name = name_of(&directory);
            let Some(key) = name.strip_suffix(BUILDING).or_else(|| name.strip_suffix(DELETING)) else {
                continue;
            };
            match self.collect_dead_build(&directory, key, own) {
                Err(error) if key != own && !Kind::Interrupted.is(&error) => {
                    self.ui.line(&format!("skipped {name}, which cannot be collected: {error:#}"));
                }
                collected => collected?,
            }
        }
        Ok(())
    }

    fn collect_dead_build(&self, directory: &Path, key: &str, own: &str) -> Result<()> {
        let lock = try_lock(&self.directory(&format!("{key}.lock")))?;
        if lock.is_none() && key != own {
            return Ok(());
        }
        if let Some(host) = runs::other_host(directory)? {
            bail_host!(
                "the build may be in progress on the host {host}";
                "if it is not, delete {}", directory.display()
            );
        }
        // The kernel sends SIGTERM to mmdebstrap when its run dies, but mmdebstrap may need some time to end.
        let processes = end_processes(directory)?;
        let name = name_of(directory);
        self.ui.note(&format!("collected {name}, whose run died: {processes} process(es) ended"));
        crate::discard::discard(directory, self.ui)
    }

    /// Returns an error if a run uses the image.
    pub fn refuse_used(&self, key: &str) -> Result<()> {
        let users = runs::users_of(self.cache, &self.directory(key));
        if !users.is_empty() {
            bail_host!(
                "the image {key} is used by {}", users.join(", ");
                "wait for the run; cargo xtask vm rm RUN removes a machine that was kept, and the next smoke \
                 collects a run that died"
            );
        }
        Ok(())
    }
}

/// Writes the manifest to a file beside it, which is renamed.
pub(crate) fn write_manifest(directory: &Path, manifest: &Manifest) -> Result<()> {
    let (path, beside) = (directory.join(MANIFEST), directory.join("manifest.json.new"));
    write_private(&beside, serde_json::to_string_pretty(manifest)?)?;
    flush(&[&beside])?;
    Ok(fs::rename(&beside, &path)?)
}

/// Reads the manifest, which is beside the disk.
pub fn read_manifest(directory: &Path) -> Result<Manifest> {
    let path = directory.join(MANIFEST);
    let remedy = || format!("delete {} and run again", directory.display());
    let text = fs::read(&path).with_context(remedy)?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display())).with_context(remedy)
}

/// Records that the image or the snapshot was used now.
pub(crate) fn touch(directory: &Path) -> Result<()> {
    write_private(&directory.join(USED), "")
}

/// Returns the name of an image's or a snapshot's directory.
pub(crate) fn name_of(directory: &Path) -> String {
    directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Waits for a lock. `waiting` gets the time that has passed so far, and may end the wait with an error.
pub(crate) fn wait_for_lock(path: &Path, ui: &Ui, waiting: impl Fn(Duration) -> Result<()>) -> Result<File> {
    let started = Instant::now();
    loop {
        ui.check()?;
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        waiting(started.elapsed())?;
        std::thread::sleep(limits::POLL);
    }
}

/// Returns the seconds since the last use. An unknown time counts as now, so that nothing is pruned because of it.
pub(crate) fn idle_seconds(directory: &Path) -> u64 {
    // This is `None` if the file does not exist, or if its time is in the future.
    let since = |name: &str| directory.join(name).metadata().ok()?.modified().ok()?.elapsed().ok();
    since(USED).or_else(|| since(MANIFEST)).map_or(0, |since| since.as_secs())
}

/// Syncs files and directories (fsync(2)).
pub(crate) fn flush(paths: &[&Path]) -> Result<()> {
    for path in paths {
        fs::File::open(path)?.sync_all()?;
    }
    Ok(())
}

/// Returns whether a directory's name has the form of an image's key, `NAME-ARCH-0123456789abcdef`. A user's copy of an
/// image and an image that is being made or deleted have the marker too, but names of another form.
fn has_form_of_key(name: &str) -> bool {
    let hash = name.rsplit_once('-').map_or("", |(_, hash)| hash);
    hash.len() == 16 && hash.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use xtask_core::fs::make_own_dir;

    use super::*;

    #[test]
    fn a_build_that_cannot_be_collected_stops_no_other_collection() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, ui) = (Cache::at(directory.path()), Ui::quiet());
        let [elsewhere, dead] = ["a.building", "b.building"].map(|name| {
            let build = cache.images().join(name);
            make_own_dir(&build).unwrap();
            build
        });
        fs::write(elsewhere.join(runs::HOST), "another-boot another-host\n").unwrap();
        let store = Store { cache: &cache, ui: &ui, offline: true, run: None };
        store.collect_dead_builds("own").unwrap();
        assert!(elsewhere.exists() && !dead.exists());
        let error = store.collect_dead_builds("a").unwrap_err();
        assert!(error.to_string().contains("another-host"), "{error:#}");
    }
}
