//! Chooses an image, and unpacks its layers in their order.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use xtask_core::arch::VmArchitecture;
use xtask_core::digest::Digest;
use xtask_core::error::Failure;

use crate::config::{Document, ImageConfig};
use crate::meter::AGAIN;
use crate::oci::wrong_digest;
use crate::slice::Slice;
use crate::store::Store;
use crate::stream::{BUFFER, decoder, limited};
use crate::tarball::{self, Content};
use crate::tree::Tree;

/// A container image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The names of the image, separated by commas, or empty.
    pub name: String,
    pub config: ImageConfig,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
}

/// A layer of a container image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest that the image has for the layer: of the blob for OCI, of the uncompressed layer for docker.
    pub digest: Digest,
    /// The command of the build that made the layer, or empty.
    pub created_by: String,
    /// The files and links that the layer added or replaced, relative to the root directory. A later layer may have
    /// replaced or removed them.
    pub files: Vec<PathBuf>,
}

/// An image of an archive.
pub(crate) struct Candidate {
    pub(crate) name: String,
    /// The variant of the architecture in the index; empty if the index has none.
    pub(crate) variant: String,
    pub(crate) config: Document,
    pub(crate) layers: Vec<LayerSource>,
}

impl Candidate {
    fn variant(&self) -> &str {
        if self.variant.is_empty() { self.config.variant() } else { &self.variant }
    }
}

/// A layer that is not unpacked yet.
pub(crate) struct LayerSource {
    pub(crate) name: String,
    pub(crate) digest: Digest,
    pub(crate) hashed: Hashed,
}

/// The bytes from which the digest of a layer is calculated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hashed {
    /// The bytes in the archive.
    Blob,
    /// The decompressed bytes.
    Content,
}

/// Returns the image for an architecture. If there is only one image, it is chosen whatever its architecture is.
///
/// # Errors
/// Returns an error that names the images if none or several are for the architecture.
pub(crate) fn choose(
    mut all: Vec<Candidate>,
    arch: Option<VmArchitecture>,
    store: &Store,
) -> Result<Candidate> {
    let shown = store.shown();
    if all.is_empty() {
        let message = format!("read {shown}: it contains no image");
        return Err(Failure::guest(message, AGAIN).into());
    }
    if all.len() > 1 {
        let platforms: BTreeSet<_> = all.iter().map(|one| one.config.platform()).collect();
        let platforms = platforms.into_iter().collect::<Vec<_>>().join(", ");
        let Some(arch) = arch else {
            let message = format!(
                "read {shown}: it contains images for {platforms}; name the architecture with --arch"
            );
            return Err(Failure::usage(message).into());
        };
        // Debian and Go have the same names for these architectures.
        let wanted = arch.profile().debian_arch;
        all.retain(|one| one.config.is_for("linux", wanted));
        if all.is_empty() {
            let message =
                format!("read {shown}: it contains images for {platforms}, and none for linux/{wanted}");
            return Err(Failure::guest(
                message,
                "save the image of this platform, or name another architecture",
            )
            .into());
        }
    }
    let all = most_general(all);
    match <[Candidate; 1]>::try_from(all) {
        Ok([one]) => Ok(one),
        Err(several) => {
            let names: Vec<_> = several.iter().map(|one| format!("{:?}", one.name)).collect();
            let message = format!("read {shown}: it contains {} images: {}", names.len(), names.join(", "));
            Err(Failure::guest(message, "save one image in an archive of its own").into())
        }
    }
}

/// If the images differ only in the variant of their architecture, returns the one with the lowest variant, which runs
/// on each core of the architecture. An image without a variant runs on all of them (containerd, platforms).
fn most_general(mut all: Vec<Candidate>) -> Vec<Candidate> {
    let variants: BTreeSet<_> = all.iter().map(|one| one.variant().to_owned()).collect();
    let names: BTreeSet<_> = all.iter().map(|one| one.name.as_str()).collect();
    if variants.len() == all.len()
        && names.len() == 1
        && let Some(lowest) = all.iter().map(|one| rank(one.variant())).min()
    {
        all.retain(|one| rank(one.variant()) == lowest);
    }
    all
}

/// Returns the order of variants: `v8` before `v9`, `v8.1` before `v8.2`.
fn rank(variant: &str) -> Vec<u32> {
    let numbers = variant.strip_prefix('v').unwrap_or_default().split('.');
    numbers.map_while(|number| number.parse().ok()).collect()
}

/// Unpacks the layers of an image.
pub(crate) fn unpack(store: &Store, candidate: Candidate, tree: &mut Tree<'_>) -> Result<Image> {
    let Candidate { name, config, layers, .. } = candidate;
    let mut sources = Vec::new();
    for layer in layers {
        let slice = store.needed(&layer.name)?;
        sources.push((layer, slice));
    }
    tree.meter.restart(sources.iter().map(|(_, slice)| slice.len()).sum());
    let mut commands = config.layer_commands();
    let mut layers = Vec::new();
    for (layer, slice) in sources {
        unpack_layer(store, &layer, &slice, tree)
            .with_context(|| format!("unpack the layer {}", layer.digest.short()))?;
        let created_by = commands.next().unwrap_or_default().to_owned();
        layers.push(Layer { digest: layer.digest, created_by, files: tree.end_layer() });
    }
    Ok(Image { name, config: config.image_config(), layers })
}

/// Unpacks a layer, and calculates its digest in another thread. A layer with a wrong digest is an error even if it can
/// be unpacked.
fn unpack_layer(store: &Store, layer: &LayerSource, slice: &Slice, tree: &mut Tree<'_>) -> Result<()> {
    let stop = AtomicBool::new(false);
    let (unpacked, found) = std::thread::scope(|scope| {
        let hash = scope.spawn(|| digest(layer, slice, &stop));
        let unpacked = unpack_blob(slice, tree);
        if unpacked.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        (unpacked, hash.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    unpacked?;
    let found =
        found.with_context(|| Failure::guest(format!("read {} in {}", layer.name, store.shown()), AGAIN))?;
    if found == layer.digest { Ok(()) } else { Err(wrong_digest(store, &layer.name, &found)) }
}

fn unpack_blob(slice: &Slice, tree: &mut Tree<'_>) -> Result<()> {
    let meter = tree.meter;
    let stream = limited(slice, meter).map_err(|error| meter.broken(None, error))?;
    tarball::unpack(stream, tree, Content::Layer)
}

fn digest(layer: &LayerSource, slice: &Slice, stop: &AtomicBool) -> io::Result<Digest> {
    let mut content: Box<dyn Read> = match layer.hashed {
        Hashed::Blob => Box::new(slice.clone()),
        Hashed::Content => decoder(slice, slice.clone())?,
    };
    let mut hash = layer.digest.algorithm().hasher();
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = content.read(&mut buffer)?;
        if count == 0 || stop.load(Ordering::Relaxed) {
            return Ok(hash.finish());
        }
        hash.update(&buffer[..count]);
    }
}
