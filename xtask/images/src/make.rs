//! Makes an image that is not in the cache. The image is built or fetched in a directory beside its final one,
//! examined, and renamed when it is complete. The caller holds the image's lock.

use std::path::Path;

use anyhow::{Context, Result};
use fs_err as fs;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::error::Kind;
use xtask_core::format::now_rfc3339;
use xtask_core::fs::{make_own_dir, remove_file, remove_if_empty};
use xtask_core::host::tools;
use xtask_core::image::manifest::{Contents, Manifest, Stamp};
use xtask_core::image::{DownloadSource, Format, Image, Recipe, shown};
use xtask_core::processes::RECORD;
use xtask_core::runs::{HOST, record_host};

use crate::fetch::{self, FetchRequest, RetryPolicy};
use crate::store::{self, DISK, ReadyImage, Store};
use crate::{build, probe};

/// An image that is complete but not yet in its final directory.
pub(crate) struct Made {
    /// The disk's format, and the size of the guest's disk.
    pub(crate) disk: (Format, u64),
    pub(crate) sha256: Digest,
    pub(crate) source: String,
    pub(crate) contents: Option<Contents>,
}

/// Builds an image from packages.
pub(crate) fn build(store: &Store<'_>, image: &Image, recipe: &Recipe, key: &str) -> Result<ReadyImage> {
    store.collect_dead_builds(key)?;
    let beside = store.directory(&format!("{key}.building"));
    make_own_dir(&beside)?;
    record_host(&beside)?;
    let error = match build_in(store, image, recipe, key, &beside) {
        Ok(ready) => return Ok(ReadyImage { how: "built", ..ready }),
        Err(error) => error,
    };
    let kept = keep_log(store, key, &beside);
    crate::discard::discard(&beside, &store.ui.uninterruptible())?;
    if Kind::Interrupted.is(&error) {
        return Err(error);
    }
    Err(error.context(kept).context(format!("build the image {} for {}", image.name, image.arch)))
}

fn build_in(
    store: &Store<'_>,
    image: &Image,
    recipe: &Recipe,
    key: &str,
    beside: &Path,
) -> Result<ReadyImage> {
    let source = build::build(store, beside, image, recipe)?;
    let contents =
        Contents::read(&beside.join("manifest")).context("read the contents of the built image")?;
    contents.check(image)?;
    let sha256 = store.digest(&beside.join(DISK), Algorithm::Sha256)?;
    let disk = probe::look_at(&beside.join(DISK), image, store.ui)?;
    finish(store, image, beside, key, Made { disk, sha256, source, contents: Some(contents) })
}

/// Keeps the log of the step that failed. Returns a sentence that names the log.
fn keep_log(store: &Store<'_>, key: &str, beside: &Path) -> String {
    let kept = store.directory(&format!("{key}.failed.log"));
    let logs = ["convert.log", "assemble.log", "root.tar.log", "tools.tar.log"];
    let last = logs.iter().map(|name| beside.join(name)).find(|path| path.exists());
    match last.map(|log| fs::rename(log, &kept)) {
        Some(Ok(())) => format!("the whole log is {}", kept.display()),
        _ => "it failed before it wrote a log".to_owned(),
    }
}

/// Fetches an image from its publisher. Bytes that have arrived stay for the next attempt.
pub(crate) fn fetch(
    store: &Store<'_>,
    image: &Image,
    download: &DownloadSource,
    key: &str,
    retry_policy: RetryPolicy,
) -> Result<ReadyImage> {
    // A missing qemu-img is reported now, and not after hundreds of megabytes were downloaded.
    tools::require("qemu-img")?;
    let beside = store.directory(&format!("{key}.fetching"));
    make_own_dir(&beside)?;
    let target = beside.join(DISK);
    let wanted = FetchRequest { source: download, target: &target, retry_policy };
    let fetched = fetch::fetch(&wanted, store.ui).inspect_err(|_| {
        // This deletes an empty directory only: bytes that have arrived stay.
        remove_if_empty(&beside);
    })?;
    let disk = match probe::examine(&target, image, store.ui)? {
        Ok(disk) => disk,
        Err(no_disk) => {
            // The file has the requested digest and still is no disk, so there is nothing to resume.
            crate::discard::discard(&beside, store.ui)?;
            return Err(no_disk);
        }
    };
    let made = Made { disk, sha256: fetched.sha256, source: shown(&download.url), contents: None };
    Ok(ReadyImage { how: "fetched", ..finish(store, image, &beside, key, made)? })
}

/// Makes the disk read-only, writes the manifest, syncs both, and renames the directory.
pub(crate) fn finish(
    store: &Store<'_>,
    image: &Image,
    beside: &Path,
    key: &str,
    made: Made,
) -> Result<ReadyImage> {
    let disk = beside.join(DISK);
    let mut permissions = fs::metadata(&disk)?.permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&disk, permissions)?;
    let (format, virtual_bytes) = made.disk;
    let manifest = Manifest {
        name: image.name.clone(),
        arch: image.arch,
        format,
        virtual_bytes,
        digest: made.sha256,
        source: made.source,
        verified: image.is_verified(),
        made_at: now_rfc3339(),
        stamp: Stamp::of(&disk)?,
        contents: made.contents,
    };
    remove_file(&beside.join(RECORD))?;
    remove_file(&beside.join(HOST))?;
    store::write_manifest(beside, &manifest)?;
    let directory = store.directory(key);
    store::flush(&[&disk, beside])?;
    store.remove(key)?;
    fs::rename(beside, &directory)?;
    store::flush(&[&store.cache.images()])?;
    Ok(ReadyImage::new(directory.join(DISK), manifest, "made"))
}
