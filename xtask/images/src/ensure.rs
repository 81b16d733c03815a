//! Provides images: from the cache, built by [`build`], fetched from their publisher by `fetch`, or a user's own file
//! in its place. The crate's documentation lists the directories.

use anyhow::{Context, Result, ensure};
use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::format::name_of;
use xtask_core::image::manifest::{Manifest, Stamp};
use xtask_core::image::{Image, LocalFile, Recipe, Source};
use xtask_core::runs::RunDir;

use crate::fetch::RetryPolicy;
use crate::probe::look_at;
use crate::store::{self, Base, DISK, ReadyImage, Store};
use crate::{build, inventory, make};
use xtask_jobs::Ui;

/// A function that makes an image under a key.
type Making<'a> = dyn Fn(&str) -> Result<ReadyImage> + 'a;

/// Returns the image from the cache, or makes or fetches it. The store's run is recorded as a user of the image before
/// another process can get the lock.
pub fn ensure(store: &Store<'_>, image: &Image, retry_policy: RetryPolicy) -> Result<ReadyImage> {
    let make: Box<Making<'_>> = match &image.source {
        Source::File(file) => return own_file(store, image, file),
        Source::Packages(recipe) => Box::new(|key| make::build(store, image, recipe, key)),
        Source::Download(download) => Box::new(|key| make::fetch(store, image, download, key, retry_policy)),
    };
    let key = image.key(build::SCRIPTS);
    let _lock = store.lock(&key)?;
    let ready = match cached(store, &key)? {
        Some(ready) => ready,
        None if store.offline => bail_host!(
            "the image {} for {} is not in the cache, and --offline forbids the network", image.name, image.arch;
            "run once without --offline, or cargo xtask image fetch"
        ),
        None => make(&key)?,
    };
    let directory = store.directory(&key);
    inventory::keep(store, image, &directory)?;
    if !image.is_verified() {
        let (name, how, directory) = (&image.name, ready.how, directory.display());
        store.ui.line(&format!("{name} is UNVERIFIED, {how}; to fetch it again, delete {directory}"));
    }
    if let Some(run) = store.run {
        run.uses_image(&directory)?;
    }
    Ok(ready)
}

/// Returns the image if it is in the cache.
pub fn find(store: &Store<'_>, image: &Image) -> Result<Option<ReadyImage>> {
    let key = image.key(build::SCRIPTS);
    let _lock = store.lock(&key)?;
    cached(store, &key)
}

/// Returns the image's disk without locking or hashing it, which is enough for a domain that is only examined. Returns
/// `None` if the disk is not in the cache yet. The run is recorded as a user of the image.
pub fn glance(cache: &Cache, run: &RunDir, image: &Image, ui: &Ui) -> Result<Option<Base>> {
    if let Source::File(file) = &image.source {
        let (format, virtual_bytes) = look_at(&file.path, image, ui)?;
        return Ok(Some(Base { disk: file.path.clone(), format, virtual_bytes }));
    }
    let directory = cache.images().join(image.key(build::SCRIPTS));
    run.uses_image(&directory)?;
    let disk = directory.join(DISK);
    if !disk.exists() {
        return Ok(None);
    }
    let Manifest { format, virtual_bytes, .. } = store::read_manifest(&directory)?;
    Ok(Some(Base { disk, format, virtual_bytes }))
}

/// Builds the image even if it is in the cache. Returns the digest of the old image, and the new image, which replaces
/// the old one when it is complete.
pub fn rebuild(store: &Store<'_>, image: &Image, recipe: &Recipe) -> Result<(Option<Digest>, ReadyImage)> {
    let key = image.key(build::SCRIPTS);
    let _lock = store.lock(&key)?;
    store.refuse_used(&key)?;
    let before = cached(store, &key).unwrap_or_else(|error| {
        store.ui.line(&format!("{error:#}"));
        None
    });
    let ready = make::build(store, image, recipe, &key)?;
    inventory::keep(store, image, &store.directory(&key))?;
    Ok((before.map(|image| image.digest), ready))
}

/// Returns the image that an earlier run made. It is hashed again only if the file's size, inode or modification time
/// has changed.
fn cached(store: &Store<'_>, key: &str) -> Result<Option<ReadyImage>> {
    let directory = store.directory(key);
    if !directory.exists() {
        return Ok(None);
    }
    let mut manifest = store::read_manifest(&directory)?;
    let disk = directory.join(DISK);
    let remedy = || format!("delete {} and run again", directory.display());
    let stamp = Stamp::of(&disk).with_context(remedy)?;
    if stamp != manifest.stamp {
        let found = store.digest(&disk, Algorithm::Sha256)?;
        ensure!(
            found == manifest.digest,
            "the cached image {} was changed: it has {found}, expected {}; {}",
            disk.display(),
            manifest.digest,
            remedy()
        );
        // The file was copied or restored: another file with the same bytes.
        manifest.stamp = stamp;
        store::write_manifest(&directory, &manifest)?;
    }
    store::touch(&directory)?;
    Ok(Some(ReadyImage::new(disk, manifest, "cached")))
}

/// Returns the image in a user's own file. It is hashed once, and again only if the file's size, inode or modification
/// time has changed.
fn own_file(store: &Store<'_>, image: &Image, file: &LocalFile) -> Result<ReadyImage> {
    let (format, virtual_bytes) = look_at(&file.path, image, store.ui)?;
    let sha256 = store.remembered_digest(&file.path, Algorithm::Sha256)?;
    if let Some(wanted) = &file.digest {
        let found = store.remembered_digest(&file.path, wanted.algorithm())?;
        if found != *wanted {
            bail_host!(
                "the image {} has {found}, and --image-digest is {wanted}", file.path.display();
                "it is another file or was changed: fetch it again, or correct the digest"
            );
        }
    }
    let source = file.path.display().to_string();
    store.ui.detail(&format!("{} is {}", image.name, name_of(&format)));
    Ok(ReadyImage { disk: file.path.clone(), format, virtual_bytes, digest: sha256, source, how: "as it is" })
}

#[cfg(all(test, feature = "real"))]
mod tests {
    use xtask_core::fs::make_own_dir;
    use xtask_core::image::catalogue::Catalogue;

    use super::*;

    const KEY: &str = "debian-12-aarch64-0123456789abcdef";

    /// Returns a raw disk with the signature of a partition table, and no partitions.
    fn disk_of(byte: u8) -> Vec<u8> {
        let mut disk = vec![byte; 4096];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk
    }

    /// Returns a cache with one image in it, and the image's key.
    fn made(directory: &tempfile::TempDir) -> (Cache, &'static str) {
        let cache = Cache::at(directory.path());
        let beside = cache.images().join(format!("{KEY}.building"));
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(beside.join(DISK), disk_of(7)).unwrap();
        let image = Image {
            expected: None,
            ..Catalogue::built_in().find("debian-12", xtask_core::arch::VmArchitecture::Aarch64).unwrap()
        };
        with(&cache, |store| {
            let sha256 = store.digest(&beside.join(DISK), Algorithm::Sha256).unwrap();
            let disk = look_at(&beside.join(DISK), &image, store.ui).unwrap();
            let made = make::Made { disk, sha256, source: "a test".to_owned(), contents: None };
            make::finish(store, &image, &beside, KEY, made).unwrap();
        });
        (cache, KEY)
    }

    fn with<T>(cache: &Cache, body: impl FnOnce(&Store<'_>) -> T) -> T {
        let ui = Ui::quiet();
        body(&Store { cache, ui: &ui, offline: true, run: None })
    }

    #[test]
    fn what_was_finished_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        let image = with(&cache, |store| cached(store, key)).unwrap().unwrap();
        assert_eq!(
            (image.source.as_str(), image.format, image.virtual_bytes),
            ("a test", xtask_core::image::Format::Raw, 4096)
        );
        assert!(image.disk.metadata().unwrap().permissions().readonly());
        // A user's copy is marked too, but its name is not a key.
        make_own_dir(&cache.images().join("my-own-copy")).unwrap();
        assert_eq!(with(&cache, |store| store.kept()).len(), 1);
    }

    #[test]
    fn a_changed_disk_is_refused_and_a_touched_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        let disk = cache.images().join(key).join(DISK);
        std::fs::remove_file(&disk).unwrap();
        std::fs::write(&disk, disk_of(7)).unwrap();
        with(&cache, |store| cached(store, key)).unwrap();
        std::fs::write(&disk, disk_of(8)).unwrap();
        let error = with(&cache, |store| cached(store, key)).unwrap_err().to_string();
        assert!(error.contains("was changed") && error.contains("delete"), "{error}");
        assert!(with(&cache, |store| store.refuse_used(key)).is_ok());
    }

    #[test]
    fn what_a_run_uses_is_not_pruned() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        let args = xtask_core::cli::PruneArgs { keep: Some(0), unnamed: true, ..Default::default() };
        let prune = || with(&cache, |store| crate::prune::prune(store, &args, &[])).unwrap();
        let (run, _) = xtask_core::runs::RunDir::create(&cache).unwrap();
        run.uses_image(&cache.images().join(key)).unwrap();
        assert_eq!(prune(), []);
        assert!(with(&cache, |store| store.refuse_used(key)).is_err());
        run.clean().unwrap();
        assert_eq!(prune().len(), 1);
        assert!(!cache.images().join(key).exists());
        for left in ["y.building", "y.deleting", "y.fetching", "debian-12-x86_64-fedcba9876543210"] {
            make_own_dir(&cache.images().join(left)).unwrap();
        }
        // Other programs use the name `images` too, and also these endings.
        let foreign = ["holiday", "x.building", "x.fetching"].map(|name| cache.images().join(name));
        for directory in &foreign {
            std::fs::create_dir(directory).unwrap();
        }
        // If another test starts a program meanwhile, that program has this process' locks until its exec.
        let left = || {
            prune();
            let mut left = xtask_core::fs::directories(&cache.images());
            left.retain(|directory| !foreign.contains(directory));
            left
        };
        let emptied = (0..100).any(|_| left().is_empty() || sleep_a_moment());
        assert!(emptied, "{:?}", left());
        assert!(
            foreign.iter().all(|directory| directory.exists()),
            "a directory of another program was deleted"
        );
    }

    fn sleep_a_moment() -> bool {
        std::thread::sleep(xtask_core::limits::RETRY);
        false
    }

    #[test]
    fn offline_fetches_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let image =
            Catalogue::built_in().find("ubuntu-24.04", xtask_core::arch::VmArchitecture::Aarch64).unwrap();
        let error = with(&cache, |store| ensure(store, &image, RetryPolicy::Full)).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 69);
        assert!(error.to_string().contains("--offline"), "{error}");
    }
}
