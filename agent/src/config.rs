//! The agent's TOML configuration, which is checked completely before the agent connects.

use std::path::{Path, PathBuf};

use agent_protocol::is_name;
use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use crate::credentials::{Credentials, check_mode};

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
    /// Seconds between two statuses, 1 to 3600.
    #[serde(default = "default_heartbeat")]
    pub(crate) heartbeat_seconds: u64,
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
    /// Directory of image archives for devices that reach no registry; see [`archive_name`].
    pub(crate) image_archives: PathBuf,
    /// MiB that must be free on the disk before and during a download.
    pub(crate) min_free_mib: u64,
    /// Seconds without progress after which a download fails. Podman reports nothing while it unpacks a layer.
    pub(crate) pull_silence_seconds: u64,
}

/// Returns the file name of an image's archive: the image's reference with `_` for `/`, `:` and `@`.
pub(crate) fn archive_name(reference: &str) -> String {
    format!("{}.tar", reference.replace(['/', ':', '@'], "_"))
}

impl Default for PodmanConfig {
    fn default() -> Self {
        Self {
            socket: "/run/iot-agent/podman.sock".into(),
            image_archives: "/var/lib/iot-agent/images".into(),
            min_free_mib: 128,
            pull_silence_seconds: 600,
        }
    }
}

fn default_heartbeat() -> u64 {
    5
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
        Ok(config)
    }

    /// Makes the paths of the other files relative to the directory of the configuration.
    fn resolve(&mut self, directory: &Path) {
        let NatsConfig { ca_file, certificate_file, key_file, .. } = &mut self.nats;
        let files = [ca_file, certificate_file, key_file].into_iter().flatten();
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
        let AgentConfig { device_id, heartbeat_seconds, resync_seconds, .. } = &config.agent;
        ensure!(
            is_name(device_id),
            "[agent] device_id = {device_id:?} is not a valid name: use up to 63 letters, digits, '-' and '_'"
        );
        ensure!(
            (1..=3600).contains(heartbeat_seconds),
            "[agent] heartbeat_seconds = {heartbeat_seconds} is outside 1 to 3600"
        );
        ensure!(
            (1..=86_400).contains(resync_seconds),
            "[agent] resync_seconds = {resync_seconds} is outside 1 to 86400"
        );
        let silence = config.podman.pull_silence_seconds;
        ensure!(
            (1..=86_400).contains(&silence),
            "[podman] pull_silence_seconds = {silence} is outside 1 to 86400"
        );
        config.nats.check_urls()?;
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
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [agent]
        device_id = "pi-7"
        [credentials]
        type = "toml-shared"
        username = "device"
        password = "s3cret"
        [nats]
        urls = ["tls://10.0.2.2:4222", "tls://bus.example:4222"]
    "#;

    #[test]
    fn a_good_file_is_parsed() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.agent.device_id, "pi-7");
        assert_eq!((config.agent.heartbeat_seconds, config.agent.resync_seconds), (5, 600));
        assert_eq!(config.nats.urls.len(), 2, "each URL is an element of its own");
        assert_eq!(config.podman.socket, Path::new("/run/iot-agent/podman.sock"));
    }

    #[test]
    fn the_password_is_never_printed() {
        assert!(!format!("{:?}", Config::parse(GOOD).unwrap()).contains("s3cret"));
        let pin = format!("{:#}", Config::parse(&GOOD.replace("\"s3cret\"", "7654321")).unwrap_err());
        assert!(!pin.contains("7654321") && pin.contains("expected a string"), "{pin}");
        for torn in [GOOD.replace("\"s3cret\"", "\"s3cret\"\""), GOOD.replace("\"s3cret\"", "s3cret")] {
            let error = format!("{:#}", Config::parse(&torn).unwrap_err());
            assert!(!error.contains("s3cret") && error.contains("near line"), "{error}");
        }
        for url in ["nats://me:s3cret@bus:4222", "nats://me:s3cret@"] {
            let text = GOOD.replace("tls://10.0.2.2:4222", url);
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn errors_name_the_wrong_key() {
        let known = "`toml-shared`, `user-password`, `token`, `nkey`, `creds`";
        let table = [
            (GOOD.replace("pi-7", "pi 7"), "device_id = \"pi 7\""),
            (GOOD.replace("pi-7", ""), "device_id = \"\""),
            (
                GOOD.replace("toml-shared", "zitadel"),
                &format!("near line 5: unknown variant `zitadel`, expected one of {known}"),
            ),
            (GOOD.replace("password", "pasword"), "pasword"),
            (GOOD.replace("urls = [", "urls = [] # ["), "urls is empty"),
            (GOOD.replace("tls://bus.example:4222", "tls://"), "names no host"),
            (GOOD.replace("tls://10", "tls://a:b@10"), "move the login into [credentials]"),
            (GOOD.replace("tls://10", "tls://:b@10"), "move the login into [credentials]"),
            (GOOD.replace("tls://10", "wss://10"), "neither nats://HOST:PORT nor tls://HOST:PORT"),
            (GOOD.replace("tls://10", "10"), "neither nats://HOST:PORT nor tls://HOST:PORT"),
            (GOOD.replace("tls://10", "nats://10"), "use tls:// for each"),
            (GOOD.replace("[nats]", "[nats]\nkey_file = \"x\""), "give both or neither"),
            (GOOD.replace("[nats]", "[mqtt]\n[nats]"), "mqtt"),
            (GOOD.replace("[credentials]", "heartbeat_seconds = 0\n[credentials]"), "outside 1 to 3600"),
            (format!("{GOOD}\n[podman]\npull_silence_seconds = 0"), "pull_silence_seconds = 0 is outside"),
            (GOOD.replace("[credentials]", "resync_seconds = 0\n[credentials]"), "outside 1 to 86400"),
        ];
        for (text, expected) in table {
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }

    #[test]
    fn archives_are_found_by_their_image() {
        assert_eq!(archive_name("localhost/iot-workload:1"), "localhost_iot-workload_1.tar");
        assert_eq!(archive_name("r.example:5000/a/b@sha256:00"), "r.example_5000_a_b_sha256_00.tar");
    }
}
