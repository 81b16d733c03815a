//! Packs a container image as an OCI archive (OCI image specification 1.0: image-layout, manifest, config), or as the blobs
//! that a registry stores. The same input always gives the same bytes.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask_core::digest::Algorithm;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The path of the program in the image, without the leading slash.
pub(crate) const PROGRAM: &str = "workload";

/// A file of an image: its path without the leading slash, its mode and its content.
pub(super) type ImageFile<'a> = (String, u32, &'a [u8]);

/// The parts of an image.
pub(super) struct Packed {
    pub(super) manifest: Vec<u8>,
    pub(super) config: Vec<u8>,
    /// The layers in their order, the lowest first.
    pub(super) layers: Vec<Vec<u8>>,
}

impl Packed {
    /// Packs an image that runs [`PROGRAM`], with a layer for each of these lists of files. `architecture` is in Go's
    /// names, which are the same as Debian's here.
    pub(super) fn new(architecture: &str, layers: &[&[ImageFile<'_>]]) -> Result<Self> {
        let layers = layers.iter().map(|files| tar_of(files)).collect::<Result<Vec<_>>>()?;
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": { "Entrypoint": [format!("/{PROGRAM}")] },
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| digest(layer)).collect::<Vec<_>>(),
            },
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": layers.iter().map(|layer| descriptor(LAYER, layer)).collect::<Vec<_>>(),
        });
        Ok(Self { manifest: manifest.to_string().into_bytes(), config, layers })
    }

    /// Returns the archive in which the image has the name `reference`.
    pub(super) fn archive(&self, reference: &str) -> Result<Vec<u8>> {
        let Self { manifest, config, layers } = self;
        let mut entry = descriptor(MANIFEST, manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": reference });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string();
        let layout = json!({ "imageLayoutVersion": "1.0.0" }).to_string();
        let mut files = vec![
            ("oci-layout".to_owned(), 0o644, layout.as_bytes()),
            ("index.json".to_owned(), 0o644, index.as_bytes()),
        ];
        let blobs = layers.iter().chain([config, manifest]);
        files.extend(blobs.map(|blob| (blob_path(blob), 0o644, blob.as_slice())));
        tar_of(&files)
    }
}

fn digest(bytes: &[u8]) -> String {
    Algorithm::Sha256.of(bytes).to_string()
}

fn blob_path(bytes: &[u8]) -> String {
    format!("blobs/{}", digest(bytes).replace(':', "/"))
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

/// Packs files, each with name, mode and content, as a tar archive without times and users.
fn tar_of(files: &[ImageFile<'_>]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, mode, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(*mode);
        header.set_size(content.len().try_into().context("read the size of a file")?);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        archive.append_data(&mut header, name, *content).with_context(|| format!("pack {name}"))?;
    }
    archive.into_inner().context("finish the archive")
}
