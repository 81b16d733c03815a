//! What an image offers an executable, read out of its file system and kept beside its disk, for `inspect` and the smoke:
//! without booting it, without root, once for each digest.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ext4_view::{Ext4, Ext4Read};
use fs_err::File;
use inspect::inventory::{Inventory, Tree};
use xtask_core::cache::Cache;
use xtask_core::error::Kind;
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::image::Image;
use xtask_core::image::inventory;
use xtask_core::image::manifest::Manifest;
use xtask_core::limits;

use crate::store::{self, DISK, Store};
use xtask_jobs::{Ui, child};

/// The unpacked disk's name, while it is read. The file is sparse.
const RAW: &str = "inventory.raw";
/// Of a GPT: the unit of its addresses, and its entries' size (UEFI 2.10, 5.3.2).
const SECTOR: u64 = 512;
const SMALLEST_ENTRY: u64 = 128;
const MOST_ENTRIES: u64 = 256;

/// Writes it, where it is not there. What cannot be read is said: the image can be booted all the same.
///
/// # Errors
/// Only for a Ctrl-C.
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

/// That of the image that a run would boot, where it is in the cache; not of another one of its name.
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

/// A disk and what it lies on as one sparse file of nothing but the guest's bytes.
pub fn unpack(disk: &Path, raw: &Path, ui: &Ui) -> Result<()> {
    File::create(raw)?;
    let words = ["convert", "-O", "raw"].map(Into::into);
    let arguments: Vec<_> = words.into_iter().chain([disk.into(), raw.into()]).collect();
    child::read(&tools::require("qemu-img")?, &arguments, limits::INVENTORY, ui)
        .with_context(|| format!("unpack {}", disk.display()))?;
    Ok(())
}

/// The partition that has an os-release(5) is the root.
fn of_disk(raw: &Path, source: &str, image: &Image) -> Result<Inventory> {
    for Partition { start, .. } in partitions(raw).context("read its partitions")? {
        let disk = File::open(raw)?;
        // What is no ext4 (an ESP) is another partition's business.
        let Ok(tree) = Ext4::load(Box::new(From { disk, start })).map(Files) else { continue };
        if tree.read("/etc/os-release").is_some() || tree.read("/usr/lib/os-release").is_some() {
            let inventory = Inventory::of_tree(&tree, source, image.arch.profile().multiarch);
            ensure!(!inventory.libraries.is_empty(), "its root file system has no library");
            return Ok(inventory);
        }
    }
    anyhow::bail!("none of its partitions is an ext4 file system with an os-release")
}

/// Where a partition begins and how long it is, in bytes.
pub struct Partition {
    pub start: u64,
    pub bytes: u64,
}

/// The partitions of a raw disk with a GPT.
pub fn partitions(raw: &Path) -> Result<Vec<Partition>> {
    let mut disk = File::open(raw)?;
    let mut header = [0; SECTOR as usize];
    disk.seek(SeekFrom::Start(SECTOR))?;
    disk.read_exact(&mut header)?;
    ensure!(header.starts_with(b"EFI PART"), "it has no GPT");
    let (at, count, size) =
        (long(&header, 72), long(&header, 80) & 0xffff_ffff, long(&header, 84) & 0xffff_ffff);
    ensure!((SMALLEST_ENTRY..=SECTOR * 8).contains(&size), "its GPT's entries have {size} bytes");
    let mut found = Vec::new();
    for index in 0..count.min(MOST_ENTRIES) {
        let mut entry = [0; SMALLEST_ENTRY as usize];
        disk.seek(SeekFrom::Start(at.saturating_mul(SECTOR).saturating_add(index * size)))?;
        disk.read_exact(&mut entry)?;
        if entry[..16] != [0; 16] {
            let (first, last) = (long(&entry, 32), long(&entry, 40));
            let bytes = last.saturating_sub(first).saturating_add(1).saturating_mul(SECTOR);
            found.push(Partition { start: first.saturating_mul(SECTOR), bytes });
        }
    }
    Ok(found)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes)
}

/// A raw disk from some byte on.
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
