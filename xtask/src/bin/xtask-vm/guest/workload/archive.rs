//! Packs a container image of one file as an OCI archive (OCI image specification 1.0: image-layout, manifest, config).
//! The same input always gives the same bytes.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask_core::digest::Algorithm;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The path of the program in the image, without the leading slash.
pub(crate) const PROGRAM: &str = "workload";

/// Makes the archive of an image that runs `program`. `reference` is the image's name. `architecture` is in Go's names,
/// which are the same as Debian's here.
pub(super) fn oci(reference: &str, architecture: &str, program: &[u8]) -> Result<Vec<u8>> {
    let layer = tar_of(&[(PROGRAM.to_owned(), 0o755, program)])?;
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Entrypoint": [format!("/{PROGRAM}")] },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config),
        "layers": [descriptor(LAYER, &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor(MANIFEST, &manifest);
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": reference });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string();
    let layout = json!({ "imageLayoutVersion": "1.0.0" }).to_string();
    let blobs = [&layer, &config, &manifest].map(|blob| (blob_path(blob), 0o644, blob.as_slice()));
    let mut files = vec![
        ("oci-layout".to_owned(), 0o644, layout.as_bytes()),
        ("index.json".to_owned(), 0o644, index.as_bytes()),
    ];
    files.extend(blobs);
    tar_of(&files)
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
fn tar_of(files: &[(String, u32, &[u8])]) -> Result<Vec<u8>> {
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
