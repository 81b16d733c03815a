//! Tests with a real docker-registry, from which a real podman pulls.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use xtask_core::digest::Algorithm;
use xtask_core::error::Kind;
use xtask_jobs::Ui;

use crate::{Registry, RegistryImage};

/// The content of the only file of the image.
const CONTENT: &str = "pulled from a registry";

fn image() -> RegistryImage {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(CONTENT.len() as u64);
    layer.append_data(&mut header, "file", CONTENT.as_bytes()).unwrap();
    let layer = layer.into_inner().unwrap();
    let digest = |blob: &[u8]| Algorithm::Sha256.of(blob).to_string();
    let rootfs = json!({ "type": "layers", "diff_ids": [digest(&layer)] });
    let config = json!({ "architecture": "arm64", "os": "linux", "rootfs": rootfs }).to_string().into_bytes();
    let descriptor = |kind: &str, blob: &[u8]| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(blob), "size": blob.len() });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config),
        "layers": [descriptor("layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    RegistryImage { repository: "a/b".to_owned(), tag: "1".to_owned(), manifest, blobs: vec![config, layer] }
}

/// Runs podman with a storage of its own, in which it trusts the registry.
fn podman(directory: &Path, registry: &Registry, arguments: &[&str]) -> Output {
    let configuration = directory.join("registries.conf");
    std::fs::write(&configuration, registry.podman_configuration("127.0.0.1")).unwrap();
    let mut podman = Command::new("podman");
    podman.env("CONTAINERS_REGISTRIES_CONF", configuration).arg("--root").arg(directory.join("root"));
    podman.arg("--runroot").arg(directory.join("runroot")).args(["--storage-driver", "vfs"]);
    podman.args(arguments).output().expect("run podman; cargo xtask ci --fix installs it")
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

#[test]
fn a_real_podman_pulls_an_image_that_was_stored_as_files() {
    let (work, storage) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(work.path(), None, &Ui::quiet()).unwrap();
    let image = image();
    let reference = image.reference("127.0.0.1", registry.port());
    let run = |arguments: &[&str]| podman(storage.path(), &registry, arguments);
    let unknown = run(&["pull", "--quiet", &reference]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("unknown"), "{unknown:?}");
    registry.add(&image).unwrap();
    let id = said(&run(&["pull", "--quiet", &reference]));
    assert_eq!(id, Algorithm::Sha256.of(&image.blobs[0]).hex());
    let mounted = said(&run(&["image", "mount", &reference]));
    assert_eq!(std::fs::read_to_string(Path::new(&mounted).join("file")).unwrap(), CONTENT);
    said(&run(&["image", "unmount", &reference]));
    let pushed = run(&["push", "--quiet", &reference, &reference.replace("/b:1", "/c:1")]);
    assert!(!pushed.status.success(), "a device cannot write to the registry: {pushed:?}");
    said(&run(&["rmi", "--force", &reference]));
    registry.stop().unwrap();
}

#[test]
fn a_registry_is_recorded_starts_again_on_its_port_and_its_end_is_noticed() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(first.path(), None, &Ui::quiet()).unwrap();
    registry.check().unwrap();
    assert_eq!(xtask_core::processes::owned(first.path()).len(), 1, "it is recorded");
    let port = registry.port();
    let taken = Registry::start(second.path(), Some(port), &Ui::quiet()).err().expect("the port is taken");
    assert!(Kind::Host.is(&taken) && format!("{taken:#}").contains("address already in use"), "{taken:#}");
    registry.stop().unwrap();
    assert!(xtask_core::processes::processes_naming(first.path()).is_empty());
    let ended = registry.check().unwrap_err();
    assert!(Kind::Host.is(&ended) && format!("{ended:#}").contains("the registry ended"), "{ended:#}");
    let third = tempfile::tempdir().unwrap();
    let again = Registry::start(third.path(), Some(port), &Ui::quiet()).unwrap();
    assert_eq!(again.port(), port);
    again.stop().unwrap();
}
