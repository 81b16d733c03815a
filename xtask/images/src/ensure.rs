//! Provides images. An image comes from the cache, or [`build`] builds it, or `fetch` gets it from its publisher. A
//! user's own file is used in its place. The crate's documentation lists the directories.

use std::path::Path;

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

/// Returns the image from the cache, or makes or fetches it. The lock is held until the store's run is recorded as a
/// user of the image, so that no other process deletes the image before that.
pub fn ensure(store: &Store<'_>, image: &Image, retry_policy: RetryPolicy) -> Result<ReadyImage> {
    let make: Box<Making<'_>> = match &image.source {
        Source::File(file) => return own_file(store, image, file),
        Source::Packages(recipe) => Box::new(|key| make::build(store, image, recipe, key)),
        Source::Download(download) => Box::new(|key| make::fetch(store, image, download, key, retry_policy)),
    };
    let key = image.key(build::SCRIPTS);
    let _lock = store.lock(&key)?;
    let ready = match cached(store, image, &key)? {
        Some(ready) => ready,
        None if store.offline => bail_host!(
            "the image {} for {} is not in the cache, and --offline forbids the network", image.name, image.arch;
            "run once without --offline, or cargo xtask image fetch"
        ),
        None => make(&key)?,
    };
    let directory = store.directory(&key);
    inventory::keep(store, image, &directory)?;
    if !image.is_verified() && !image.is_built() {
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
    cached(store, image, &key)
}

/// Returns the image's disk, but does not lock or hash it. This is enough for a domain that is only examined and never
/// boots. Returns `None` if the disk is not in the cache yet. The run is recorded as a user of the image.
pub fn locate(cache: &Cache, run: &RunDir, image: &Image, ui: &Ui) -> Result<Option<Base>> {
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

/// Builds the image even if it is in the cache. The new image replaces the old one when it is complete. Returns the
/// digest of the old image, if there was one, and the new image.
pub fn rebuild(store: &Store<'_>, image: &Image, recipe: &Recipe) -> Result<(Option<Digest>, ReadyImage)> {
    let key = image.key(build::SCRIPTS);
    let _lock = store.lock(&key)?;
    store.refuse_used(&key)?;
    let before = cached(store, image, &key).unwrap_or_else(|error| {
        store.ui.line(&format!("{error:#}"));
        None
    });
    let ready = make::build(store, image, recipe, &key)?;
    inventory::keep(store, image, &store.directory(&key))?;
    Ok((before.map(|image| image.digest), ready))
}

/// Returns the image that an earlier run put into the cache, if there is one. The file is hashed again only if it was
/// replaced or modified. Returns an error if its digest differs from the recorded digest or from the pin.
fn cached(store: &Store<'_>, image: &Image, key: &str) -> Result<Option<ReadyImage>> {
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
        // The file was copied or restored: it is another file with the same bytes.
        manifest.stamp = stamp;
        store::write_manifest(&directory, &manifest)?;
    }
    check_pin(store, image, &disk, &manifest.digest)?;
    store::touch(&directory)?;
    Ok(Some(ReadyImage::new(disk, manifest, "cached")))
}

/// Compares a cached disk, whose SHA-256 is `recorded`, with the pin. The digest in the manifest alone proves nothing,
/// because a program that replaces the disk can replace the manifest too, for example when it restores a cache.
fn check_pin(store: &Store<'_>, image: &Image, disk: &Path, recorded: &Digest) -> Result<()> {
    let Some(pinned) = image.pin() else { return Ok(()) };
    let found = match pinned.algorithm() {
        Algorithm::Sha256 => recorded.clone(),
        other => store.remembered_digest(disk, other)?,
    };
    if found != *pinned {
        bail_host!(
            "the cached image {} of {} has {found}, but its pinned digest is {pinned}", disk.display(), image.name;
            "delete {} and run again, which fetches it anew", disk.parent().unwrap_or(disk).display()
        );
    }
    Ok(())
}

/// Returns the user's own file as an image. The file is hashed once, and again only if it was replaced or modified.
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
    use xtask_core::image::DownloadSource;
    use xtask_core::image::catalogue::Catalogue;

    use super::*;

    const KEY: &str = "debian-12-aarch64-0123456789abcdef";

    /// Returns a raw disk that has the signature of a partition table but no partitions.
    fn disk_of(byte: u8) -> Vec<u8> {
        let mut disk = vec![byte; 4096];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk
    }

    fn image() -> Image {
        let arch = xtask_core::arch::VmArchitecture::Aarch64;
        Image { expected: None, ..Catalogue::built_in().find("debian-12", arch).unwrap() }
    }

    /// Returns a cache with one image, and the key of that image.
    fn made(directory: &tempfile::TempDir) -> (Cache, &'static str) {
        let cache = Cache::at(directory.path());
        let beside = cache.images().join(format!("{KEY}.building"));
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(beside.join(DISK), disk_of(7)).unwrap();
        let image = image();
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
        let image = with(&cache, |store| cached(store, &image(), key)).unwrap().unwrap();
        assert_eq!(
            (image.source.as_str(), image.format, image.virtual_bytes),
            ("a test", xtask_core::image::Format::Raw, 4096)
        );
        assert!(image.disk.metadata().unwrap().permissions().readonly());
        // A user's copy of an image contains the marker too, but the name of its directory is not a key.
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
        with(&cache, |store| cached(store, &image(), key)).unwrap();
        std::fs::write(&disk, disk_of(8)).unwrap();
        let error = with(&cache, |store| cached(store, &image(), key)).unwrap_err().to_string();
        assert!(error.contains("was changed") && error.contains("delete"), "{error}");
        assert!(with(&cache, |store| store.refuse_used(key)).is_ok());
    }

    /// Writes other content of the same size into the file, and sets its modification time back.
    fn change_and_hide(disk: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let modified = disk.metadata().unwrap().modified().unwrap();
        std::fs::set_permissions(disk, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(disk, disk_of(8)).unwrap();
        std::fs::File::options().write(true).open(disk).unwrap().set_modified(modified).unwrap();
    }

    #[test]
    fn a_change_is_found_although_the_modification_time_was_set_back() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        change_and_hide(&cache.images().join(key).join(DISK));
        let error = with(&cache, |store| cached(store, &image(), key)).unwrap_err().to_string();
        assert!(error.contains("was changed"), "{error}");
    }

    #[test]
    fn an_image_of_an_earlier_version_is_hashed_once() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        let place = cache.images().join(key);
        let forget = || {
            let path = place.join("manifest.json");
            let mut manifest: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            manifest["stamp"].as_object_mut().unwrap().remove("changed").unwrap();
            std::fs::write(&path, manifest.to_string()).unwrap();
        };
        forget();
        with(&cache, |store| cached(store, &image(), key)).unwrap().unwrap();
        assert_eq!(store::read_manifest(&place).unwrap().stamp, Stamp::of(&place.join(DISK)).unwrap());
        change_and_hide(&place.join(DISK));
        forget();
        let error = with(&cache, |store| cached(store, &image(), key)).unwrap_err().to_string();
        assert!(error.contains("was changed"), "{error}");
    }

    /// Another program has replaced both the disk and its manifest, and the two agree.
    #[test]
    fn a_cached_image_has_its_pinned_digest() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let with_pin = |digest: Digest| {
                let url = "https://host/disk".to_owned();
                let source = Source::Download(DownloadSource { url, digest: Some(digest), bytes: None });
                let pinned = Image { source, ..image() };
                with(&cache, |store| cached(store, &pinned, key))
            };
            with_pin(algorithm.of(&disk_of(7))).unwrap().unwrap();
            let error = with_pin(algorithm.of(&disk_of(8))).unwrap_err();
            assert_eq!(xtask_core::error::code(&error), 69, "{error:#}");
            assert!(error.to_string().contains("pinned digest"), "{error:#}");
            assert!(xtask_core::error::hint(&error).unwrap().starts_with("delete "));
        }
    }

    #[test]
    fn what_a_run_uses_is_not_pruned() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, key) = made(&directory);
        let args = xtask_core::cli::PruneArgs { keep: Some(0), unnamed: true, ..Default::default() };
        let prune = || with(&cache, |store| crate::prune::prune(store, &args, &[])).unwrap();
        let (run, _) = xtask_core::runs::RunDir::create(&cache, || Ok(())).unwrap();
        run.uses_image(&cache.images().join(key)).unwrap();
        assert_eq!(prune(), []);
        assert!(with(&cache, |store| store.refuse_used(key)).is_err());
        run.clean().unwrap();
        assert_eq!(prune().len(), 1);
        assert!(!cache.images().join(key).exists());
        for left in ["y.building", "y.deleting", "y.fetching", "debian-12-x86_64-fedcba9876543210"] {
            make_own_dir(&cache.images().join(left)).unwrap();
        }
        // Other programs use a directory called `images` too, and these endings.
        let foreign = ["holiday", "x.building", "x.fetching"].map(|name| cache.images().join(name));
        for directory in &foreign {
            std::fs::create_dir(directory).unwrap();
        }
        // If another test starts a program meanwhile, that program holds the locks of this process until it calls
        // exec.
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
