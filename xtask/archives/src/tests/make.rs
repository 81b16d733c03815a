//! Makes the archives of the tests, with the libraries that read them.

use std::io::Write as _;
use std::path::Path;

use tar::{Builder, EntryType, Header};
use xtask_core::digest::Algorithm;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A tar archive.
pub(super) struct Tarball {
    builder: Builder<Vec<u8>>,
    mode: u32,
}

impl Tarball {
    pub(super) fn new() -> Self {
        Self { builder: Builder::new(Vec::new()), mode: 0o644 }
    }

    /// Sets the permissions of the next entry.
    pub(super) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// Adds an entry. Names and targets are written as they are, so they can be hostile.
    pub(super) fn entry(mut self, kind: EntryType, name: &str, target: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(self.mode);
        self.mode = 0o644;
        header.set_size(content.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.builder.append(&header, content).unwrap();
        self
    }

    pub(super) fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes())
    }

    pub(super) fn bytes_file(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, "", content)
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    pub(super) fn link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    /// Adds a file whose name is longer than a header's field, with the library's own extension for it.
    pub(super) fn long(mut self, name: &str, content: &str) -> Self {
        let mut header = Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        self.builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        self
    }

    pub(super) fn done(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }

    /// Returns the entries without the blocks that end an archive.
    pub(super) fn without_end(self) -> Vec<u8> {
        let mut bytes = self.done();
        bytes.truncate(bytes.len() - 1024);
        bytes
    }
}

/// Returns content that does not compress, so that each part of an archive has content.
pub(super) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(step).collect()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

pub(super) fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Makes an archive of `ar` from names and contents.
pub(super) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, content) in members {
        writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len()).unwrap();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    }
    bytes
}

pub(super) fn deb(data_name: &str, data: &[u8]) -> Vec<u8> {
    let control = gzip(&Tarball::new().file("./control", "Package: x\n").done());
    ar(&[("debian-binary", b"2.0\n"), ("control.tar.gz", &control), (data_name, data)])
}

/// Makes a package of Alpine Linux: three streams of gzip, of which only the last has the end of a tar archive.
pub(super) fn apk(data: Tarball) -> Vec<u8> {
    let signature = Tarball::new().file(".SIGN.RSA.key", "signature").without_end();
    let control =
        Tarball::new().file(".PKGINFO", "pkgname = x\n").file(".post-install", "#!/bin/sh\n").without_end();
    [gzip(&signature), gzip(&control), gzip(&data.done())].concat()
}

/// Makes a zip archive from names, modes and contents. The modes contain the type of the file.
pub(super) fn zip(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, mode, content) in entries {
        let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        let options = options.unix_permissions(*mode & 0o7777);
        match mode & 0o17_0000 {
            0o12_0000 => writer.add_symlink(*name, std::str::from_utf8(content).unwrap(), options).unwrap(),
            0o4_0000 => writer.add_directory(*name, options).unwrap(),
            _ => {
                writer.start_file(*name, options).unwrap();
                writer.write_all(content).unwrap();
            }
        }
    }
    writer.finish().unwrap().into_inner()
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    Algorithm::Sha256.of(bytes).to_string()
}

fn hex(digest: &str) -> &str {
    digest.trim_start_matches("sha256:")
}

/// A container image: its architecture and its layers, as tar archives and as blobs.
pub(super) struct Built {
    pub(super) architecture: &'static str,
    pub(super) variant: Option<&'static str>,
    pub(super) layers: Vec<Vec<u8>>,
    pub(super) blobs: Vec<Vec<u8>>,
}

impl Built {
    /// Makes an image whose blobs are the layers themselves.
    pub(super) fn plain(layers: &[Vec<u8>]) -> Self {
        Self { architecture: "arm64", variant: None, layers: layers.to_vec(), blobs: layers.to_vec() }
    }

    /// Makes an image whose blobs are compressed.
    pub(super) fn compressed(layers: &[Vec<u8>], compress: fn(&[u8]) -> Vec<u8>) -> Self {
        let blobs = layers.iter().map(|layer| compress(layer)).collect();
        Self { blobs, ..Self::plain(layers) }
    }

    pub(super) fn config(&self) -> String {
        let digests: Vec<_> = self.layers.iter().map(|layer| sha256(layer)).collect();
        let steps = (0..digests.len()).map(|at| serde_json::json!({ "created_by": format!("step {at}") }));
        let steps: Vec<_> =
            steps.chain([serde_json::json!({ "created_by": "ENV", "empty_layer": true })]).collect();
        serde_json::json!({
            "architecture": self.architecture, "os": "linux", "variant": self.variant,
            "config": { "Entrypoint": ["/usr/bin/app"], "Cmd": ["--serve"], "Env": ["PATH=/usr/bin:/bin"],
                        "WorkingDir": "/srv", "User": null },
            "rootfs": { "type": "layers", "diff_ids": digests },
            "history": steps,
        })
        .to_string()
    }

    /// Returns the archive of `docker save`, in the format before docker 25.
    pub(super) fn docker(&self) -> Vec<u8> {
        docker(&[self])
    }

    /// Returns the members of an OCI layout but the index, and the descriptor of the manifest.
    fn oci_blobs(&self) -> (Vec<(String, Vec<u8>)>, serde_json::Value) {
        let config = self.config().into_bytes();
        let described = |kind: &str, bytes: &[u8]| serde_json::json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": sha256(bytes), "size": bytes.len() });
        let layers: Vec<_> = self.blobs.iter().map(|blob| described("layer.v1.tar", blob)).collect();
        let manifest = serde_json::json!({ "schemaVersion": 2, "config": described("config.v1+json", &config), "layers": layers });
        let manifest = manifest.to_string().into_bytes();
        let described = described("manifest.v1+json", &manifest);
        let blobs = self.blobs.iter().cloned().chain([config, manifest]);
        (blobs.map(|blob| (format!("blobs/sha256/{}", hex(&sha256(&blob))), blob)).collect(), described)
    }
}

/// Returns an archive of `docker save` with several images.
pub(super) fn docker(images: &[&Built]) -> Vec<u8> {
    let (mut archive, mut manifest) = (Tarball::new(), Vec::new());
    for (at, image) in images.iter().enumerate() {
        let config = image.config();
        let config_name = format!("{}.json", hex(&sha256(config.as_bytes())));
        let mut names = Vec::new();
        for (layer, blob) in image.layers.iter().zip(&image.blobs) {
            let (id, digest) = (format!("{at}{}", &hex(&sha256(layer))[1..]), sha256(layer));
            // podman stores the content by its digest, and links to it.
            archive = archive.bytes_file(&format!("{}.tar", hex(&digest)), blob);
            archive = archive.symlink(&format!("{id}/layer.tar"), &format!("../{}.tar", hex(&digest)));
            names.push(format!("{id}/layer.tar"));
        }
        archive = archive.file(&config_name, &config);
        let tags = [format!("example/app:{at}")];
        manifest.push(serde_json::json!({ "Config": config_name, "RepoTags": tags, "Layers": names }));
    }
    archive.file("manifest.json", &serde_json::Value::from(manifest).to_string()).done()
}

/// Returns the members of an OCI layout with several images, in an index of an index.
pub(super) fn oci_members(images: &[&Built]) -> Vec<(String, Vec<u8>)> {
    let (mut members, mut inner) = (Vec::new(), Vec::new());
    for image in images {
        let (blobs, descriptor) = image.oci_blobs();
        members.extend(blobs);
        inner.push(descriptor);
    }
    inner.push(serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": sha256(b"provenance"), "size": 10,
        "annotations": { "vnd.docker.reference.type": "attestation-manifest" },
    }));
    let inner = serde_json::json!({ "schemaVersion": 2, "manifests": inner }).to_string().into_bytes();
    let outer = serde_json::json!({
        "digest": sha256(&inner), "size": inner.len(), "mediaType": "application/vnd.oci.image.index.v1+json",
        "annotations": { "org.opencontainers.image.ref.name": "example/app:1" },
    });
    let outer = serde_json::json!({ "schemaVersion": 2, "manifests": [outer] }).to_string();
    members.push((format!("blobs/sha256/{}", hex(&sha256(&inner))), inner));
    members.push(("index.json".to_owned(), outer.into_bytes()));
    members.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    members
}

pub(super) fn oci(images: &[&Built]) -> Vec<u8> {
    let archive = Tarball::new().directory("blobs/").directory("blobs/sha256/");
    oci_members(images)
        .iter()
        .fold(archive, |archive, (name, content)| archive.bytes_file(name, content))
        .done()
}

/// Writes an OCI layout into a directory.
pub(super) fn oci_layout(directory: &Path, images: &[&Built]) {
    for (name, content) in oci_members(images) {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}
