//! Unpacks what people ship into a directory: container images, packages, and archives. The directory can be read like
//! that of a device.
//!
//! An archive is not trusted. No entry is written outside of the directory, and nothing needs root. The limits of
//! [`Limits`] stop a decompression bomb. The links of an archive are kept as they are, and can lead to files of this
//! host. Therefore read the files of the directory only through [`resolve`].

mod config;
mod deb;
mod docker;
mod image;
mod kind;
mod meter;
mod oci;
mod program;
mod slice;
mod start;
mod store;
mod stream;
mod tarball;
#[cfg(test)]
mod tests;
mod tree;
mod walk;
mod whiteouts;
mod zipped;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;

pub use config::ImageConfig;
pub use image::{Image, Layer};
pub use kind::Kind;
pub use meter::Limits;
pub use program::{MAX_SCRIPTS, PATH, Program};
pub use start::Start;
pub use tree::{LeftOut, Progress};
pub use walk::resolve;

use meter::Meter;
use slice::Slice;
use store::Store;
use tarball::Content;
use tree::Tree;
use walk::Scope;

/// How to unpack an archive.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    pub limits: Limits,
    /// The kind, if [`Kind::of`] has returned it already. A compressed archive may have to be decompressed to recognise
    /// it.
    pub kind: Option<Kind>,
    /// The architecture to choose if an archive contains an image for several platforms.
    pub arch: Option<VmArchitecture>,
}

/// An unpacked archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    pub kind: Kind,
    /// The directory with the files. A container image has the files that remain after its last layer.
    pub root: PathBuf,
    /// The container image, if the archive is one.
    pub image: Option<Image>,
    /// The devices and FIFOs of the archive, which are not in the directory.
    pub left_out: Vec<LeftOut>,
}

impl Unpacked {
    /// Returns the layer that each file of the directory comes from, by the file's path. The path is relative to the
    /// root and contains no link. Files of lower layers that were replaced or removed are also listed.
    pub fn layers_by_file(&self) -> HashMap<&Path, &Layer> {
        let layers = self.image.iter().flat_map(|image| &image.layers);
        // The map keeps the last of the layers that have a file.
        layers.flat_map(|layer| layer.files.iter().map(move |file| (file.as_path(), layer))).collect()
    }
}

/// Unpacks the archive at `path` into the directory `into`, which is made if it does not exist. The files belong to
/// this user, who can read and delete all of them. Owners, times, extended attributes and setuid bits are not kept.
///
/// # Errors
/// Returns an error that names the archive and the entry if the archive is damaged or incomplete, contains an entry
/// that leads outside, or exceeds a limit; if `into` is not empty; or if `progress` returns an error. The directory
/// then has the entries that were unpacked before.
pub fn unpack(path: &Path, into: &Path, request: &Request, progress: &mut Progress<'_>) -> Result<Unpacked> {
    let kind = request.kind.map_or_else(|| Kind::of(path), |kind| Ok(Some(kind)))?;
    let Some(kind) = kind else {
        let message = format!("unpack {}: it is no archive of a known kind", path.display());
        let hint = "name a container image (OCI or docker archive), a .deb, .apk, .whl, .zip or .tar, plain or compressed";
        return Err(Failure::guest(message, hint).into());
    };
    let total = if kind == Kind::OciLayout { 0 } else { Slice::open(path)?.len() };
    let meter = Meter::new(path, total, request.limits);
    let scope = match kind {
        Kind::Tar | Kind::Zip | Kind::Wheel => Scope::Directory,
        _ => Scope::System,
    };
    let mut tree = Tree::new(into, scope, &meter, progress)?;
    let image = if kind.is_image() {
        Some(unpack_image(path, kind, request.arch, &mut tree)?)
    } else {
        unpack_files(path, kind, &mut tree)?;
        None
    };
    let left_out = std::mem::take(&mut tree.left_out);
    Ok(Unpacked { kind, root: into.to_owned(), image, left_out })
}

fn unpack_image(path: &Path, kind: Kind, arch: Option<VmArchitecture>, tree: &mut Tree<'_>) -> Result<Image> {
    let store = match kind {
        Kind::OciLayout => Store::directory(path),
        _ => Store::archive(path, tree)?,
    };
    let candidates = match kind {
        Kind::DockerArchive => docker::candidates(&store)?,
        _ => oci::candidates(&store)?,
    };
    let candidate = image::choose(candidates, arch, &store)?;
    image::unpack(&store, candidate, tree)
}

fn unpack_files(path: &Path, kind: Kind, tree: &mut Tree<'_>) -> Result<()> {
    let slice = Slice::open(path)?;
    let content = match kind {
        Kind::Deb => return deb::unpack(&slice, tree),
        Kind::Zip | Kind::Wheel => return zipped::unpack(&slice, tree),
        Kind::Squashfs => {
            let message = format!("unpack {}: it is a squashfs file system", path.display());
            let hint = format!(
                "unpack it with: unsquashfs -d DIRECTORY {}; then name the directory",
                path.display()
            );
            return Err(Failure::guest(message, hint).into());
        }
        Kind::Apk => Content::Package,
        _ => Content::Files,
    };
    let stream = stream::limited(&slice, tree.meter).map_err(|error| tree.meter.broken(None, error))?;
    tarball::unpack(stream, tree, content)
}
