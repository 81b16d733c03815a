//! The inventory of a cached image: the libraries that the image offers an executable. `xtask-vm` writes it beside the
//! disk, once for each digest, because reading the libraries from a file system takes seconds.

use std::path::{Path, PathBuf};

use inspect::inventory::Inventory;

use xtask_core::cache::Cache;
use xtask_core::image::Image;
use xtask_core::image::manifest::Manifest;

/// The file name in an image's directory.
pub const FILE: &str = "inventory.json";

/// Returns the inventory in an image's directory. Returns `None` if there is none, or if it belongs to another disk or
/// has an older format.
pub fn read(directory: &Path, manifest: &Manifest) -> Option<Inventory> {
    let text = std::fs::read(directory.join(FILE)).ok()?;
    let inventory = Inventory::from_json(&text)?;
    (inventory.source == manifest.digest.to_string()).then_some(inventory)
}

/// Returns the inventory of a named image if the image is in the cache. If several images have that name, the newest
/// one is used.
pub fn cached(cache: &Cache, image: &Image) -> Option<Inventory> {
    let CachedDisk { directory, manifest, .. } = disk_of(cache, image)?;
    read(&directory, &manifest)
}

/// The disk of an image in the cache.
#[derive(Debug)]
pub struct CachedDisk {
    /// The directory of the image.
    pub directory: PathBuf,
    pub manifest: Manifest,
    /// The disk, in the format that the manifest names.
    pub disk: PathBuf,
}

/// Returns the disk of a named image if the image is in the cache. If several images have that name, the newest one is
/// used.
pub fn disk_of(cache: &Cache, image: &Image) -> Option<CachedDisk> {
    let directories = xtask_core::fs::directories(&cache.images());
    let mut found: Vec<(PathBuf, Manifest)> = directories.into_iter().filter_map(manifest).collect();
    found.retain(|(_, manifest)| manifest.name == image.name && manifest.arch == image.arch);
    let (directory, manifest) = found.into_iter().max_by(|one, other| one.1.made_at.cmp(&other.1.made_at))?;
    let disk = directory.join("disk");
    Some(CachedDisk { directory, manifest, disk })
}

/// Returns the directory with its manifest. A directory without a manifest is no image or is incomplete.
fn manifest(directory: PathBuf) -> Option<(PathBuf, Manifest)> {
    let text = std::fs::read(directory.join("manifest.json")).ok()?;
    let manifest = serde_json::from_slice(&text).ok()?;
    // The directory of an incomplete image is named `<key>.building`, `<key>.deleting` or `<key>.fetching`.
    let beside = ["building", "deleting", "fetching"];
    let whole = directory
        .extension()
        .and_then(|ending| ending.to_str())
        .is_none_or(|ending| !beside.contains(&ending));
    whole.then_some((directory, manifest))
}
