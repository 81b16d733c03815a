//! The agent's TOML configuration: parsed from text, checked whole, before anything connects.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use crate::credentials::Credentials;
use agent_protocol::is_name;

/// The whole file, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The device's name in the fleet: letters, digits, `-` and `_`, since it is a KV key and a subject token.
    pub device_id: String,
    /// Seconds between two statuses, 1 to 3600; 30 in a minute are the most that are sent.
    pub heartbeat_seconds: u64,
    /// How to log in to the bus.
    pub credentials: Credentials,
    /// The bus, tried in an order of the agent's own: `nats://HOST:PORT`, `tls://HOST:PORT`.
    pub urls: Vec<String>,
    /// Certificates that the bus' own must descend from, PEM; without it, the system's.
    pub ca_file: Option<PathBuf>,
    /// Where podman listens.
    pub podman_socket: PathBuf,
    /// Where image archives lie, for devices that reach no registry; see [`archive_name`].
    pub image_archives: PathBuf,
    /// What must survive a power cut is kept here.
    pub state_directory: PathBuf,
    /// What `iot-agent status` reads.
    pub status_file: PathBuf,
}

/// The file name of an image's archive: its reference, with `/`, `:` and `@` replaced.
pub fn archive_name(reference: &str) -> String {
    format!("{}.tar", reference.replace(['/', ':', '@'], "_"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    agent: RawAgent,
    credentials: toml::Table,
    nats: RawNats,
    #[serde(default)]
    podman: RawPodman,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAgent {
    device_id: String,
    #[serde(default = "default_heartbeat")]
    heartbeat_seconds: u64,
    state_directory: Option<PathBuf>,
    #[serde(default = "default_status_file")]
    status_file: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNats {
    urls: Vec<String>,
    ca_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPodman {
    socket: PathBuf,
    image_archives: PathBuf,
}

impl Default for RawPodman {
    fn default() -> Self {
        Self {
            socket: "/run/iot-agent/podman.sock".into(),
            image_archives: "/var/lib/iot-agent/images".into(),
        }
    }
}

fn default_heartbeat() -> u64 {
    5
}

/// Where `iot-agent status` looks.
pub fn default_status_file() -> PathBuf {
    "/run/iot-agent/status.json".into()
}

/// systemd says where a unit's StateDirectory= is.
fn default_state_directory() -> PathBuf {
    std::env::var_os("STATE_DIRECTORY").map_or_else(|| "/var/lib/iot-agent".into(), PathBuf::from)
}

impl Config {
    /// Reads and checks the file at `path`, and that its secrets are where it says and nobody else's to read.
    ///
    /// # Errors
    /// Names the file, and what in it does not hold.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the agent's configuration {}", path.display()))?;
        let config = Self::parse(&text)
            .with_context(|| format!("check the agent's configuration {}", path.display()))?;
        config.credentials.check(path)?;
        if let Some(ca) = &config.ca_file {
            let pem = std::fs::read_to_string(ca)
                .with_context(|| format!("read [nats] ca_file {}", ca.display()))?;
            ensure!(
                pem.contains("-----BEGIN CERTIFICATE-----"),
                "[nats] ca_file {} holds no certificate in PEM",
                ca.display()
            );
        }
        Ok(config)
    }

    /// Parses and checks the text of a configuration file.
    ///
    /// # Errors
    /// Names the first table or key that does not hold, and what would.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| without_content(&error, text))?;
        let RawAgent { device_id, heartbeat_seconds, state_directory, status_file } = raw.agent;
        ensure!(
            is_name(&device_id),
            "[agent] device_id = {device_id:?} is not a KV key: use up to 63 letters, digits, '-' and '_'"
        );
        ensure!(
            (1..=3600).contains(&heartbeat_seconds),
            "[agent] heartbeat_seconds = {heartbeat_seconds} is outside 1 to 3600"
        );
        ensure!(!raw.nats.urls.is_empty(), "[nats] urls is empty: list at least one nats://HOST:PORT");
        for url in &raw.nats.urls {
            let parsed = url.parse::<async_nats::ServerAddr>().with_context(|| {
                format!("[nats] urls holds {:?}, which is not nats://HOST:PORT", without_login(url))
            })?;
            ensure!(
                !parsed.has_user_pass(),
                "[nats] urls holds {:?} with a login in it: that belongs into [credentials]",
                without_login(url)
            );
        }
        Ok(Self {
            device_id,
            heartbeat_seconds,
            credentials: Credentials::parse(raw.credentials)?,
            urls: raw.nats.urls,
            ca_file: raw.nats.ca_file,
            podman_socket: raw.podman.socket,
            image_archives: raw.podman.image_archives,
            state_directory: state_directory.unwrap_or_else(default_state_directory),
            status_file,
        })
    }
}

/// A URL may hold a password, and errors end up in logs.
fn without_login(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => url.to_owned(),
    }
}

/// toml's own display shows the line that is wrong, which may be the password's.
fn without_content(error: &toml::de::Error, text: &str) -> anyhow::Error {
    let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
    anyhow!("near line {line}: {}", error.message())
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
        urls = ["nats://10.0.2.2:4222", "tls://bus.example:4222"]
    "#;

    #[test]
    fn a_good_file_is_read_whole() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.device_id, "pi-7");
        assert_eq!(config.heartbeat_seconds, 5);
        assert_eq!(config.urls.len(), 2, "a list stays a list, it is not joined with commas");
        assert_eq!(config.podman_socket, Path::new("/run/iot-agent/podman.sock"));
    }

    #[test]
    fn the_password_is_never_printed() {
        assert!(!format!("{:?}", Config::parse(GOOD).unwrap()).contains("s3cret"));
        for torn in [GOOD.replace("\"s3cret\"", "\"s3cret\"\""), GOOD.replace("\"s3cret\"", "s3cret")] {
            let error = format!("{:#}", Config::parse(&torn).unwrap_err());
            assert!(!error.contains("s3cret") && error.contains("near line"), "{error}");
        }
        for url in ["nats://me:s3cret@bus:4222", "nats://me:s3cret@"] {
            let text = GOOD.replace("nats://10.0.2.2:4222", url);
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let known = "known types: toml-shared, user-password, token, nkey, creds";
        let table = [
            (GOOD.replace("pi-7", "pi 7"), "device_id = \"pi 7\""),
            (GOOD.replace("pi-7", ""), "device_id = \"\""),
            (GOOD.replace("toml-shared", "zitadel"), &format!("type = \"zitadel\" is unknown; {known}")),
            (GOOD.replace("password", "pasword"), "pasword"),
            (GOOD.replace("urls = [", "urls = [] # ["), "urls is empty"),
            (GOOD.replace("tls://bus.example:4222", "://"), "is not nats://HOST:PORT"),
            (GOOD.replace("nats://10", "nats://a:b@10"), "belongs into [credentials]"),
            (GOOD.replace("[nats]", "[mqtt]\n[nats]"), "mqtt"),
            (GOOD.replace("[credentials]", "heartbeat_seconds = 0\n[credentials]"), "outside 1 to 3600"),
        ];
        for (text, expected) in table {
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }

    #[test]
    fn archives_are_found_by_their_image() {
        assert_eq!(archive_name("localhost/iot-workload:1"), "localhost_iot-workload_1.tar");
        assert_eq!(archive_name("r.example:5000/a/b@sha256:00"), "r.example_5000_a_b_sha256_00.tar");
    }
}
