//! A real registry (Debian's docker-registry) on loopback, from which the device of a run pulls images. Its storage is
//! written as files, in the layout of its driver `filesystem`. The registry itself is read-only.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use xtask_core::digest::Algorithm;
use xtask_core::error::host_fault;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::tools;
use xtask_core::{bail_host, limits};
use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job, last_lines};

/// The name of the program, and of its package on Debian.
pub const REGISTRY_PROGRAM: &str = "docker-registry";

/// The log of the registry, below the directory of the run.
pub const REGISTRY_LOG: &str = "registry/registry.log";

/// The directory of the storage's files, below its root (distribution, `registry/storage/paths.go`).
const LAYOUT: &str = "docker/registry/v2";

/// The part of the registry's log before the address on which it listens.
const LISTENING: &str = "listening on 127.0.0.1:";

/// The number of lines at the end of the log among which this line is looked for.
const LINES: usize = 30;

/// An image, as a registry stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryImage {
    /// The name without the registry and the tag.
    pub repository: String,
    pub tag: String,
    pub manifest: Vec<u8>,
    /// The configuration and the layers that the manifest names.
    pub blobs: Vec<Vec<u8>>,
}

impl RegistryImage {
    /// Returns the reference by which podman pulls the image from the registry with this address.
    pub fn reference(&self, host: &str, port: u16) -> String {
        format!("{host}:{port}/{}:{}", self.repository, self.tag)
    }
}

/// A registry, which ends when this value is dropped.
pub struct Registry {
    child: Child,
    port: u16,
    /// The root of the storage.
    storage: PathBuf,
    log: PathBuf,
}

impl Registry {
    /// Starts an empty registry with its files in `work`: on this port, or on a free one. The process is recorded in
    /// `work`, so that a later run can end it.
    ///
    /// # Errors
    /// Returns a failure of the host if the program is missing, ends, or does not listen in time.
    pub fn start(work: &Path, port: Option<u16>, ui: &Ui) -> Result<Self> {
        Self::started(work, port, ui).map_err(|error| {
            let hint =
                "see the causes: the port may belong to another process. Nothing is known about the agent";
            host_fault(error, "start the registry on this host", hint)
        })
    }

    fn started(work: &Path, port: Option<u16>, ui: &Ui) -> Result<Self> {
        let log = work.join(REGISTRY_LOG);
        let directory = log.parent().context("the log has no directory")?;
        let storage = directory.join("storage");
        make_private_dir(directory)?;
        make_private_dir(&storage)?;
        let config = directory.join("config.yml");
        write_private(&config, configuration(&storage, port))?;
        let program = tools::require(REGISTRY_PROGRAM)?;
        let job = Job {
            program: &program,
            owner: work,
            arguments: vec!["serve".into(), config.into()],
            log: log.clone(),
            environment: Vec::new(),
        };
        let child = Child::start(&job)?;
        let port = wait_for_port(&child, &log, ui)?;
        Ok(Self { child, port, storage, log })
    }

    /// Returns the port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns podman's configuration (containers-registries.conf(5)) for a device that reaches this host as `host`: the
    /// registry speaks HTTP.
    pub fn podman_configuration(&self, host: &str) -> String {
        format!("[[registry]]\nlocation = \"{host}:{}\"\ninsecure = true\n", self.port)
    }

    /// Writes an image into the storage. The registry reads its files again for each request.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn add(&self, image: &RegistryImage) -> Result<()> {
        for (path, content) in stored_files(image) {
            let path = self.storage.join(path);
            let directory = path.parent().context("a file of the storage has no directory")?;
            make_private_dir(directory)?;
            write_private(&path, content)?;
        }
        Ok(())
    }

    /// Checks that the registry runs.
    ///
    /// # Errors
    /// Returns a failure of the host if the registry has ended.
    pub fn check(&self) -> Result<()> {
        let ended = self.child.ended().map_err(|error| {
            host_fault(error, "look whether the registry runs", "run again; nothing is known about the agent")
        })?;
        if let Some(status) = ended {
            bail_host!(
                "the registry ended: {status}; its last output: {}", last_lines(&self.log, 3).join(" | ");
                "read registry.log in the report's directory, and the host's kernel log if it was killed; \
                 nothing is known about the agent"
            );
        }
        Ok(())
    }

    /// Ends the registry.
    ///
    /// # Errors
    /// Returns an error if it does not end.
    pub fn stop(&self) -> Result<()> {
        self.child.stop()
    }
}

/// Returns the registry's configuration. JSON is valid YAML.
fn configuration(storage: &Path, port: Option<u16>) -> String {
    let configuration = json!({
        "version": "0.1",
        "log": { "level": "info" },
        "storage": {
            "filesystem": { "rootdirectory": storage },
            "maintenance": { "readonly": { "enabled": true } },
        },
        "http": { "addr": format!("127.0.0.1:{}", port.unwrap_or_default()) },
    });
    configuration.to_string()
}

/// Returns the files of an image, with their paths below the root of the storage: the blobs, the links of the repository
/// to its blobs, and those of the tag to the manifest.
fn stored_files(image: &RegistryImage) -> Vec<(String, Vec<u8>)> {
    let digest = |blob: &[u8]| Algorithm::Sha256.of(blob);
    let stored = |blob: &[u8]| {
        let digest = digest(blob);
        let hex = digest.hex();
        (format!("{LAYOUT}/blobs/sha256/{}/{hex}/data", &hex[..2]), blob.to_owned())
    };
    let of_repository = format!("{LAYOUT}/repositories/{}", image.repository);
    let link = |directory: String, blob: &[u8]| {
        (format!("{of_repository}/{directory}/link"), digest(blob).to_string().into_bytes())
    };
    let named = |blob: &[u8]| format!("sha256/{}", digest(blob).hex());
    let RegistryImage { tag, manifest, blobs, .. } = image;
    let mut files = vec![
        stored(manifest),
        link(format!("_manifests/revisions/{}", named(manifest)), manifest),
        link(format!("_manifests/tags/{tag}/current"), manifest),
        link(format!("_manifests/tags/{tag}/index/{}", named(manifest)), manifest),
    ];
    for blob in blobs {
        files.push(stored(blob));
        files.push(link(format!("_layers/{}", named(blob)), blob));
    }
    files
}

/// Waits until the registry listens, and returns its port, which the registry writes to its log.
fn wait_for_port(child: &Child, log: &Path, ui: &Ui) -> Result<u16> {
    let limit = ui.scaled(limits::SERVER_START);
    let deadline = Instant::now() + limit;
    let output = || last_lines(log, 5).join(" | ");
    loop {
        ui.check()?;
        if let Some(port) = last_lines(log, LINES).iter().rev().find_map(|line| port_in(line)) {
            return Ok(port);
        }
        if let Some(status) = child.ended()? {
            bail!("it ended at once with {status}; its output: {}", output());
        }
        ensure!(
            Instant::now() < deadline,
            "it does not listen after {} s; its output: {}",
            limit.as_secs(),
            output()
        );
        std::thread::sleep(limits::RETRY);
    }
}

/// Returns the port in a line of the log such as `… msg="listening on 127.0.0.1:40123" …`. A line that is not completely
/// written has no end of the text.
fn port_in(line: &str) -> Option<u16> {
    line.split_once(LISTENING)?.1.split_once('"')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_a_whole_line_of_the_log() {
        let line = r#"time="2026-12-01T11:00:00Z" level=info msg="listening on 127.0.0.1:40123" version=2.8"#;
        assert_eq!(port_in(line), Some(40123));
        assert_eq!(port_in(line.split_once("23\"").unwrap().0), None);
        assert_eq!(port_in(r#"level=info msg="listening on [::]:5000""#), None);
    }

    #[test]
    fn an_image_is_stored_in_the_layout_of_the_driver() {
        let image = RegistryImage {
            repository: "a/b".to_owned(),
            tag: "1".to_owned(),
            manifest: b"manifest".to_vec(),
            blobs: vec![b"layer".to_vec()],
        };
        assert_eq!(image.reference("10.0.2.2", 5000), "10.0.2.2:5000/a/b:1");
        let [manifest, layer] = ["manifest", "layer"].map(|text| Algorithm::Sha256.of(text.as_bytes()));
        let [of_manifest, of_layer] = [manifest.hex(), layer.hex()];
        let v2 = "docker/registry/v2";
        let of_tag = format!("{v2}/repositories/a/b/_manifests/tags/1");
        let expected = [
            (format!("{v2}/blobs/sha256/{}/{of_manifest}/data", &of_manifest[..2]), "manifest".to_owned()),
            (
                format!("{v2}/repositories/a/b/_manifests/revisions/sha256/{of_manifest}/link"),
                manifest.to_string(),
            ),
            (format!("{of_tag}/current/link"), manifest.to_string()),
            (format!("{of_tag}/index/sha256/{of_manifest}/link"), manifest.to_string()),
            (format!("{v2}/blobs/sha256/{}/{of_layer}/data", &of_layer[..2]), "layer".to_owned()),
            (format!("{v2}/repositories/a/b/_layers/sha256/{of_layer}/link"), layer.to_string()),
        ];
        let text = |(path, content): (String, Vec<u8>)| (path, String::from_utf8(content).unwrap());
        assert_eq!(stored_files(&image).into_iter().map(text).collect::<Vec<_>>(), expected);
    }
}
