//! Makes the inventory of an image: the list of the libraries and loaders that the image offers an executable. The
//! inventory is read from the image's file system once for each digest, without a boot or root's rights. It is stored
//! beside the disk, for `inspect` and the smoke.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ext4_view::{Ext4, Ext4Read};
use fs_err::File;
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use inspect::inventory::{Inventory, Tree};
use xtask_core::cache::Cache;
use xtask_core::error::Kind;
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::image::Image;
use xtask_core::image::manifest::Manifest;
use xtask_core::limits;
use xtask_inspection::inventory;

use crate::store::{self, DISK, Store};
use xtask_jobs::{Ui, child};

/// The name of the unpacked disk while it is read. The file is sparse.
const RAW: &str = "inventory.raw";

/// Writes the inventory if it is missing. If the libraries cannot be read, a message says so, but this is no error:
/// the image can be booted even so.
///
/// # Errors
/// Returns an error only after Ctrl-C.
pub(crate) fn keep(store: &Store<'_>, image: &Image, directory: &Path) -> Result<()> {
    let made = store::read_manifest(directory).and_then(|manifest| {
        if inventory::read(directory, &manifest).is_none() {
            make(store, image, directory, &manifest)?;
        }
        Ok(())
    });
    match made {
        Err(error) if Kind::Interrupted.is(&error) => Err(error),
        Err(error) => {
            store.ui.line(&format!("cannot read the libraries of {}: {error:#}", image.name));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Returns the inventory of the image that a run would boot, if it is in the cache. Another image of the same name does
/// not count.
pub fn of_image(cache: &Cache, image: &Image) -> Option<Inventory> {
    let directory = cache.images().join(image.key(crate::build::SCRIPTS));
    inventory::read(&directory, &store::read_manifest(&directory).ok()?)
}

fn make(store: &Store<'_>, image: &Image, directory: &Path, manifest: &Manifest) -> Result<()> {
    store.ui.tick("reading the image's libraries")?;
    let raw = directory.join(RAW);
    let unpacked = unpack(&directory.join(DISK), &raw, store.ui);
    let read = unpacked.and_then(|()| of_disk(&raw, &manifest.digest.to_string(), image));
    let removed = fs_err::remove_file(&raw);
    let inventory = read.with_context(|| format!("read the libraries of {}", image.name))?;
    removed?;
    write_private(&directory.join(inventory::FILE), serde_json::to_string(&inventory)?)
}

/// Writes the content of a disk and its backing files to one sparse raw file.
pub fn unpack(disk: &Path, raw: &Path, ui: &Ui) -> Result<()> {
    File::create(raw)?;
    let words = ["convert", "-O", "raw"].map(Into::into);
    let arguments: Vec<_> = words.into_iter().chain([disk.into(), raw.into()]).collect();
    child::read(&tools::require("qemu-img")?, &arguments, limits::INVENTORY, ui)
        .with_context(|| format!("unpack {}", disk.display()))?;
    Ok(())
}

/// Reads the inventory from the root partition: the first one that has an os-release(5).
fn of_disk(raw: &Path, source: &str, image: &Image) -> Result<Inventory> {
    for Partition { start, .. } in partitions(raw).context("read its partitions")? {
        let disk = File::open(raw)?;
        // A partition without an ext4, such as an ESP, is not the root.
        let Ok(tree) = Ext4::load(Box::new(From { disk, start })).map(Files) else { continue };
        if tree.read("/etc/os-release").is_some() || tree.read("/usr/lib/os-release").is_some() {
            let inventory = Inventory::of_tree(&tree, source, image.arch.profile().multiarch);
            ensure!(!inventory.libraries.is_empty(), "its root file system has no library");
            return Ok(inventory);
        }
    }
    anyhow::bail!("none of its partitions is an ext4 file system with an os-release")
}

/// The start and the length of a partition, in bytes.
pub struct Partition {
    pub start: u64,
    pub bytes: u64,
}

/// Returns the partitions of a raw disk with a GPT.
pub fn partitions(raw: &Path) -> Result<Vec<Partition>> {
    let sector = LogicalBlockSize::Lb512;
    let disk = GptConfig::new().logical_block_size(sector).open(raw)?;
    let partitions = disk.partitions().values();
    partitions
        .map(|one| Ok(Partition { start: one.bytes_start(sector)?, bytes: one.bytes_len(sector)? }))
        .collect()
}

/// A raw disk from the byte `start` on.
struct From {
    disk: File,
    start: u64,
}

impl Ext4Read for From {
    fn read(
        &mut self,
        at: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.disk.seek(SeekFrom::Start(self.start.saturating_add(at)))?;
        Ok(self.disk.read_exact(into)?)
    }
}

/// An ext4 file system as a tree.
struct Files(Ext4);

impl Tree for Files {
    fn list(&self, directory: &str) -> Vec<String> {
        let entries = self.0.read_dir(directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().as_str().map(str::to_owned).ok());
        let mut names: Vec<String> = names.filter(|name| name != "." && name != "..").collect();
        names.sort();
        names
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.0.read(path).ok()
    }
}
