//! What a cached image offers an executable, as `xtask-vm` wrote it down beside the disk: once for each digest, since it
//! takes seconds to read out of a file system.

use std::path::{Path, PathBuf};

use inspect::inventory::Inventory;

use xtask_core::cache::Cache;
use xtask_core::image::Image;
use xtask_core::image::manifest::Manifest;

/// Its name in an image's directory.
pub const FILE: &str = "inventory.json";

/// That of the directory of an image; `None` where there is none, or one of another disk or of an older format.
pub fn read(directory: &Path, manifest: &Manifest) -> Option<Inventory> {
    let text = std::fs::read(directory.join(FILE)).ok()?;
    let inventory = Inventory::from_json(&text)?;
    (inventory.source == manifest.digest.to_string()).then_some(inventory)
}

/// That of a named image, where it is in the cache: of several of that name the newest.
pub fn cached(cache: &Cache, image: &Image) -> Option<Inventory> {
    let directories = xtask_core::fs::directories(&cache.images());
    let mut found: Vec<(PathBuf, Manifest)> = directories.into_iter().filter_map(manifest).collect();
    found.retain(|(_, manifest)| manifest.name == image.name && manifest.arch == image.arch);
    let (directory, manifest) = found.into_iter().max_by(|one, other| one.1.made_at.cmp(&other.1.made_at))?;
    read(&directory, &manifest)
}

/// What is no image, or is being made, has no manifest.
fn manifest(directory: PathBuf) -> Option<(PathBuf, Manifest)> {
    let text = std::fs::read(directory.join("manifest.json")).ok()?;
    let manifest = serde_json::from_slice(&text).ok()?;
    // `<key>.building` and its kin have a dot behind the digest.
    let beside = ["building", "deleting", "fetching"];
    let whole = directory
        .extension()
        .and_then(|ending| ending.to_str())
        .is_none_or(|ending| !beside.contains(&ending));
    whole.then_some((directory, manifest))
}
