//! Images in the cache: one directory per content key, built behind a lock, beside, and renamed when whole.

mod build;
pub(crate) mod bump;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xtask::agent_build::hex;
use xtask::exit::Interrupted;
use xtask::image::{Image, Source};
use xtask::limits;
use xtask::paths::{Cache, make_private_dir, write_private};

use crate::interrupt::Interrupt;
use crate::screen::Screen;
use xtask::run_dir::{end_processes, try_lock};

/// The disk's name in its directory.
const DISK: &str = "disk.qcow2";

/// An image that can be booted.
#[derive(Debug, Clone)]
pub(crate) struct ReadyImage {
    /// The qcow2 file, read-only.
    pub(crate) disk: PathBuf,
    /// `sha256:…` of the file.
    pub(crate) digest: String,
    /// Where it came from, for the report.
    pub(crate) source: String,
    /// For a person: cached, or built.
    pub(crate) how: &'static str,
}

/// What stands beside the disk. The stamp spares hashing a file that nobody touched.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    digest: String,
    source: String,
    stamp: Stamp,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    inode: u64,
    modified_seconds: i64,
    modified_nanoseconds: i64,
}

impl Stamp {
    fn of(path: &Path) -> Result<Self> {
        let meta = path.metadata().with_context(|| format!("look at {}", path.display()))?;
        Ok(Self {
            bytes: meta.len(),
            inode: meta.ino(),
            modified_seconds: meta.mtime(),
            modified_nanoseconds: meta.mtime_nsec(),
        })
    }
}

/// The image from the cache, made where it is not there.
pub(crate) fn ensure(
    cache: &Cache,
    image: &Image,
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<ReadyImage> {
    let Source::Packages(recipe) = &image.source;
    let key = image.key(build::SCRIPTS);
    let images = cache.images();
    make_private_dir(&images)?;
    let directory = images.join(&key);
    let _lock = loop {
        interrupt.check()?;
        match try_lock(&images.join(format!("{key}.lock")))? {
            Some(lock) => break lock,
            None => screen.alive("another run makes this image"),
        }
        std::thread::sleep(limits::POLL);
    };
    if directory.exists() {
        return cached(&directory);
    }
    let beside = images.join(format!("{key}.building"));
    // Of a build that was killed. The kernel tells mmdebstrap, which may take its time.
    if beside.exists() {
        let processes = end_processes(&beside)?;
        screen.line(&format!("collected a build of this image that died: {processes} process(es) ended"));
        build::discard(&beside, interrupt)?;
    }
    make_private_dir(&beside)?;
    let built = build::build(&beside, image, recipe, interrupt, screen);
    if built.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        build::discard(&beside, &Interrupt::default())?;
        return Err(Interrupted.into());
    }
    if let Err(error) = built {
        let log = beside.join("mmdebstrap.log");
        let kept = images.join(format!("{key}.failed.log"));
        let hint = match std::fs::rename(&log, &kept) {
            Ok(()) => format!("the whole log is {}", kept.display()),
            Err(_no_log) => "it failed before its log began".to_owned(),
        };
        build::discard(&beside, interrupt)?;
        return Err(error)
            .context(hint)
            .with_context(|| format!("build the image {} for {}", image.name, image.arch));
    }
    finish(&beside, &directory, &built?)
}

/// Digest, manifest, read-only, on disk, renamed.
fn finish(beside: &Path, directory: &Path, source: &str) -> Result<ReadyImage> {
    let disk = beside.join(DISK);
    let digest = digest(&disk)?;
    let mut permissions =
        disk.metadata().with_context(|| format!("look at {}", disk.display()))?.permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&disk, permissions).with_context(|| format!("protect {}", disk.display()))?;
    let manifest = Manifest { digest, source: source.to_owned(), stamp: Stamp::of(&disk)? };
    write_private(&beside.join("manifest.json"), serde_json::to_string_pretty(&manifest)?)?;
    for path in [&disk, &beside.join("manifest.json"), beside] {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("flush {}", path.display()))?;
    }
    std::fs::rename(beside, directory)
        .with_context(|| format!("rename {} to {}", beside.display(), directory.display()))?;
    let disk = directory.join(DISK);
    Ok(ReadyImage { disk, digest: manifest.digest, source: manifest.source, how: "built" })
}

/// What an earlier run made; hashed again only where the file has been touched.
fn cached(directory: &Path) -> Result<ReadyImage> {
    let (disk, path) = (directory.join(DISK), directory.join("manifest.json"));
    let remedy = || format!("delete {} and run again", directory.display());
    let text =
        std::fs::read(&path).with_context(|| format!("read {}", path.display())).with_context(remedy)?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .with_context(|| format!("parse {}", path.display()))
        .with_context(remedy)?;
    if Stamp::of(&disk).with_context(remedy)? != manifest.stamp {
        let found = digest(&disk)?;
        ensure!(
            found == manifest.digest,
            "the cached image {} was changed: it has {found}, and {} was built; {}",
            disk.display(),
            manifest.digest,
            remedy()
        );
    }
    Ok(ReadyImage { disk, digest: manifest.digest, source: manifest.source, how: "cached" })
}

/// `sha256:…` of a file.
pub(crate) fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("read {}", path.display()))?;
        if count == 0 {
            return Ok(format!("sha256:{}", hex(&hash.finalize())));
        }
        hash.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (tempfile::TempDir, PathBuf) {
        let cache = tempfile::tempdir().unwrap();
        let beside = cache.path().join("x.building");
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(beside.join(DISK), b"a disk").unwrap();
        let directory = cache.path().join("x");
        finish(&beside, &directory, "a test").unwrap();
        (cache, directory)
    }

    #[test]
    fn what_was_finished_is_found_again() {
        let (_cache, directory) = made();
        let image = cached(&directory).unwrap();
        assert_eq!(image.source, "a test");
        assert_eq!(image.digest, format!("sha256:{}", hex(&Sha256::digest(b"a disk"))));
        assert!(image.disk.metadata().unwrap().permissions().readonly());
    }

    #[test]
    fn a_changed_disk_is_refused_and_a_touched_one_is_not() {
        let (_cache, directory) = made();
        let disk = directory.join(DISK);
        std::fs::remove_file(&disk).unwrap();
        std::fs::write(&disk, b"a disk").unwrap();
        cached(&directory).unwrap();
        std::fs::write(&disk, b"a dusk").unwrap();
        let error = cached(&directory).unwrap_err().to_string();
        assert!(error.contains("was changed") && error.contains("delete"), "{error}");
    }
}
