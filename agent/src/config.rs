//! The agent's TOML configuration, which is checked completely before the agent connects.

use std::path::{Path, PathBuf};

use agent_protocol::is_name;
use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use crate::credentials::{Credentials, check_mode};
use crate::digest;
use crate::registry_logins::RegistryLogins;

/// The schemes of a bus address without and with TLS.
const PLAIN: &str = "nats://";
const TLS: &str = "tls://";

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub agent: AgentConfig,
    pub(crate) credentials: Credentials,
    pub nats: NatsConfig,
    #[serde(default)]
    pub(crate) podman: PodmanConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The device's name in the fleet. It is a KV key and a subject token: letters, digits, `-` and `_`.
    pub device_id: String,
    /// Seconds between two heartbeats, 1 to 3600.
    #[serde(default = "default_heartbeat")]
    pub(crate) heartbeat_seconds: u64,
    /// The most seconds between two statuses, 1 to 86400.
    #[serde(default = "default_status")]
    pub(crate) status_seconds: u64,
    /// The most seconds between two complete readings of the desired state, 1 to 86400.
    #[serde(default = "default_resync")]
    pub(crate) resync_seconds: u64,
    /// Directory of the state that must survive a power cut.
    #[serde(default = "default_state_directory")]
    pub(crate) state_directory: PathBuf,
    /// The file that `iot-agent status` reads.
    #[serde(default = "default_status_file")]
    pub(crate) status_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsConfig {
    /// Servers of the bus, all `nats://HOST:PORT` or all `tls://HOST:PORT`, tried in random order.
    pub urls: Vec<String>,
    /// The JetStream domain with the buckets; by default, that of the server. A device on a leaf node with a domain of
    /// its own names the domain of the hub.
    pub(crate) jetstream_domain: Option<String>,
    /// PEM file of the certificate authorities that the agent trusts; by default, it trusts those of the
    /// system.
    pub(crate) ca_file: Option<PathBuf>,
    /// PEM file of the device's certificate, for mutual TLS.
    pub(crate) certificate_file: Option<PathBuf>,
    /// PEM file of the certificate's private key. Others cannot read it ([`check_mode`]).
    pub(crate) key_file: Option<PathBuf>,
}

impl NatsConfig {
    /// Returns whether each connection must use TLS before the agent sends its login.
    pub(crate) fn requires_tls(&self) -> bool {
        self.ca_file.is_some()
            || self.certificate_file.is_some()
            || self.urls.iter().any(|url| url.starts_with(TLS))
    }

    /// Returns the PEM files of the device's certificate and of its key.
    pub(crate) fn client_certificate(&self) -> Option<(&Path, &Path)> {
        self.certificate_file.as_deref().zip(self.key_file.as_deref())
    }

    fn check_domain(&self) -> Result<()> {
        // The domain becomes a token of subjects.
        ensure!(
            self.jetstream_domain.as_deref().is_none_or(is_name),
            "[nats] jetstream_domain = {:?} is not a valid name: use up to 63 letters, digits, '-' and '_'",
            self.jetstream_domain.as_deref().unwrap_or_default()
        );
        Ok(())
    }

    fn check_urls(&self) -> Result<()> {
        ensure!(!self.urls.is_empty(), "[nats] urls is empty: list at least one nats://HOST:PORT");
        for url in &self.urls {
            let shown = without_login(url);
            // async-nats also parses addresses of WebSockets. Without its feature for them, it would send the login to
            // such an address without TLS.
            ensure!(
                url.starts_with(PLAIN) || url.starts_with(TLS),
                "[nats] urls contains {shown:?}, which is neither nats://HOST:PORT nor tls://HOST:PORT"
            );
            let parsed = url.parse::<async_nats::ServerAddr>();
            ensure!(
                parsed.is_ok_and(|address| !address.host().is_empty()),
                "[nats] urls contains {shown:?}, which names no host: write nats://HOST:PORT or tls://HOST:PORT"
            );
            ensure!(
                !url.contains('@'),
                "[nats] urls contains {shown:?} with a login: move the login into [credentials]"
            );
        }
        ensure!(
            self.urls.iter().all(|url| url.starts_with(PLAIN))
                || self.urls.iter().all(|url| url.starts_with(TLS)),
            "[nats] urls contains nats:// and tls://: use tls:// for each, or the login may be sent without TLS"
        );
        ensure!(
            self.certificate_file.is_some() == self.key_file.is_some(),
            "[nats] certificate_file and key_file belong together: give both or neither"
        );
        Ok(())
    }

    /// Checks that the files can be read and contain what their names say.
    fn check_files(&self) -> Result<()> {
        if let Some(key) = &self.key_file {
            check_mode(key)?;
        }
        for (name, path, label) in [
            ("ca_file", &self.ca_file, "CERTIFICATE"),
            ("certificate_file", &self.certificate_file, "CERTIFICATE"),
            ("key_file", &self.key_file, "PRIVATE KEY"),
        ] {
            let Some(path) = path else { continue };
            let pem = std::fs::read_to_string(path)
                .with_context(|| format!("read [nats] {name} {}", path.display()))?;
            ensure!(
                pem.lines()
                    .any(|line| line.starts_with("-----BEGIN ") && line.ends_with(&format!("{label}-----"))),
                "[nats] {name} {} contains no PEM {}",
                path.display(),
                label.to_lowercase()
            );
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PodmanConfig {
    pub(crate) socket: PathBuf,
    /// Directory of image archives for devices that reach no registry; see [`archive_names`].
    pub(crate) image_archives: PathBuf,
    /// MiB that must be free on the disk before and during a download.
    pub(crate) min_free_mib: u64,
    /// Seconds without progress after which a download fails. Podman reports nothing while it unpacks a layer.
    pub(crate) pull_silence_seconds: u64,
    pub(crate) without_memory_limits: WithoutMemoryLimits,
    /// Seconds between two questions to a registry about a tag that a document follows, 1 to 604800.
    pub(crate) tag_check_seconds: u64,
    /// The file with the logins to registries ([`RegistryLogins`]).
    pub(crate) registry_auth_file: Option<PathBuf>,
}

/// What the agent does with a document that limits the memory, if the device cannot enforce the limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WithoutMemoryLimits {
    /// Refuse the document.
    #[default]
    Refuse,
    /// Run the container without the limit.
    Run,
}

/// Returns the two possible file names of an image's archive: the SHA-256 of the image's reference, and the reference
/// with `_` for `/`, `:` and `@`. Several references can have the same second name, and it can be too long for a file.
pub(crate) fn archive_names(reference: &str) -> [String; 2] {
    let readable = reference.replace(['/', ':', '@'], "_");
    [digest::of_bytes(reference.as_bytes()), readable].map(|name| format!("{name}.tar"))
}

impl Default for PodmanConfig {
    fn default() -> Self {
        Self {
            socket: "/run/iot-agent/podman.sock".into(),
            image_archives: "/var/lib/iot-agent/images".into(),
            min_free_mib: 128,
            pull_silence_seconds: 600,
            without_memory_limits: WithoutMemoryLimits::default(),
            tag_check_seconds: 3600,
            registry_auth_file: None,
        }
    }
}

fn default_heartbeat() -> u64 {
    30
}

fn default_status() -> u64 {
    600
}

fn default_resync() -> u64 {
    600
}

/// Returns the default of `[agent] status_file` and of `iot-agent status --file`.
pub fn default_status_file() -> PathBuf {
    "/run/iot-agent/status.json".into()
}

/// Returns STATE_DIRECTORY, which systemd sets from the unit's StateDirectory=, or else `/var/lib/iot-agent`.
fn default_state_directory() -> PathBuf {
    std::env::var_os("STATE_DIRECTORY").map_or_else(|| "/var/lib/iot-agent".into(), PathBuf::from)
}

impl Config {
    /// Reads and checks the file at `path`. The file that contains the secret must be readable by its owner
    /// alone.
    ///
    /// # Errors
    /// Returns an error that names the file and the first table or key that is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the configuration {}", path.display()))?;
        let mut config =
            Self::parse(&text).with_context(|| format!("check the configuration {}", path.display()))?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        config.credentials.check(path)?;
        config.nats.check_files()?;
        if let Some(logins) = &config.podman.registry_auth_file {
            RegistryLogins::read(logins)?;
        }
        Ok(config)
    }

    /// Makes the paths of the other files relative to the directory of the configuration.
    fn resolve(&mut self, directory: &Path) {
        let NatsConfig { ca_file, certificate_file, key_file, .. } = &mut self.nats;
        let logins = &mut self.podman.registry_auth_file;
        let files = [ca_file, certificate_file, key_file, logins].into_iter().flatten();
        for path in files.chain(self.credentials.secret_file_mut()) {
            *path = directory.join(&*path);
        }
    }

    /// Parses and checks the text of a configuration file.
    ///
    /// # Errors
    /// Returns an error that names the first wrong table or key and says which values are valid.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| without_content(&error, text))?;
        let AgentConfig { device_id, heartbeat_seconds, status_seconds, resync_seconds, .. } = &config.agent;
        ensure!(
            is_name(device_id),
            "[agent] device_id = {device_id:?} is not a valid name: use up to 63 letters, digits, '-' and '_'"
        );
        ensure!(
            (1..=3600).contains(heartbeat_seconds),
            "[agent] heartbeat_seconds = {heartbeat_seconds} is outside 1 to 3600"
        );
        for (key, seconds) in [("status_seconds", status_seconds), ("resync_seconds", resync_seconds)] {
            ensure!((1..=86_400).contains(seconds), "[agent] {key} = {seconds} is outside 1 to 86400");
        }
        let silence = config.podman.pull_silence_seconds;
        ensure!(
            (1..=86_400).contains(&silence),
            "[podman] pull_silence_seconds = {silence} is outside 1 to 86400"
        );
        let interval = config.podman.tag_check_seconds;
        ensure!(
            (1..=604_800).contains(&interval),
            "[podman] tag_check_seconds = {interval} is outside 1 to 604800"
        );
        config.nats.check_urls()?;
        config.nats.check_domain()?;
        Ok(config)
    }
}

/// Removes the login from a URL. Errors show the URL, and the agent logs its errors.
fn without_login(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => url.to_owned(),
    }
}

/// Builds an error from the error of toml, without the text of the wrong line. toml would show this line,
/// which may contain the password.
fn without_content(error: &toml::de::Error, text: &str) -> anyhow::Error {
    let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
    // The message of a wrong type begins with the value, which may be the password.
    let message = error.message();
    let is_of_type = ["invalid type: ", "invalid value: "].iter().any(|words| message.starts_with(words));
    let expected = message.rsplit_once(", expected ").filter(|_| is_of_type);
    let shown = expected.map_or_else(|| message.to_owned(), |(_, expected)| format!("expected {expected}"));
    anyhow!("near line {line}: {shown}")
}

#[cfg(test)]
mod tests;
