//! The agent's TOML configuration: parsed from text, checked whole, before anything connects.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;

/// The credential types this agent knows, for the refusal of any other.
const KNOWN_CREDENTIAL_TYPES: &[&str] = &["toml-shared"];

/// The whole file, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The device's name in the fleet: letters, digits, `-` and `_`, since it is a KV key and a subject token.
    pub device_id: String,
    /// Seconds between two statuses, 1 to 3600.
    pub heartbeat_seconds: u64,
    /// How to log in to the bus.
    pub credentials: Credentials,
    /// The bus, tried in turn: `nats://HOST:PORT`.
    pub urls: Vec<String>,
}

/// How the agent logs in to the bus.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// `type = "toml-shared"`: user and password stand in the configuration file itself.
    TomlShared {
        /// The bus user.
        username: String,
        /// Its password.
        password: String,
    },
}

/// Never prints the password: a configuration ends up in logs.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TomlShared { username, .. } => write!(f, "TomlShared {{ username: {username:?}, .. }}"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    agent: RawAgent,
    credentials: toml::Table,
    nats: RawNats,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAgent {
    device_id: String,
    #[serde(default = "default_heartbeat")]
    heartbeat_seconds: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNats {
    urls: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTomlShared {
    #[serde(rename = "type")]
    _type: String,
    username: String,
    password: String,
}

fn default_heartbeat() -> u64 {
    5
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// Names the file, and what in it does not hold.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the agent's configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("check the agent's configuration {}", path.display()))
    }

    /// Parses and checks the text of a configuration file.
    ///
    /// # Errors
    /// Names the first table or key that does not hold, and what would.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| without_content(&error, text))?;
        let RawAgent { device_id, heartbeat_seconds } = raw.agent;
        ensure!(
            !device_id.is_empty()
                && device_id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_'),
            "[agent] device_id = {device_id:?} is not a KV key: use letters, digits, '-' and '_'"
        );
        ensure!(
            (1..=3600).contains(&heartbeat_seconds),
            "[agent] heartbeat_seconds = {heartbeat_seconds} is outside 1 to 3600"
        );
        ensure!(!raw.nats.urls.is_empty(), "[nats] urls is empty: list at least one nats://HOST:PORT");
        for url in &raw.nats.urls {
            url.parse::<async_nats::ServerAddr>()
                .with_context(|| format!("[nats] urls holds {url:?}, which is not nats://HOST:PORT"))?;
        }
        let credentials = parse_credentials(raw.credentials)?;
        Ok(Self { device_id, heartbeat_seconds, credentials, urls: raw.nats.urls })
    }
}

/// toml's own display shows the line that is wrong, which may be the password's.
fn without_content(error: &toml::de::Error, text: &str) -> anyhow::Error {
    let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
    anyhow!("near line {line}: {}", error.message())
}

fn parse_credentials(table: toml::Table) -> Result<Credentials> {
    let kind = table.get("type").and_then(toml::Value::as_str).unwrap_or_default().to_owned();
    match kind.as_str() {
        "toml-shared" => {
            let raw: RawTomlShared = table.try_into().map_err(|error: toml::de::Error| {
                anyhow!("[credentials] of type \"toml-shared\": {}", error.message())
            })?;
            Ok(Credentials::TomlShared { username: raw.username, password: raw.password })
        }
        other => bail!(
            "[credentials] type = {other:?} is unknown; known types: {}",
            KNOWN_CREDENTIAL_TYPES.join(", ")
        ),
    }
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
        urls = ["nats://10.0.2.2:4222", "nats://bus.example:4222"]
    "#;

    #[test]
    fn a_good_file_is_read_whole() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.device_id, "pi-7");
        assert_eq!(config.heartbeat_seconds, 5);
        assert_eq!(config.urls.len(), 2, "a list stays a list, it is not joined with commas");
    }

    #[test]
    fn the_password_is_never_printed() {
        assert!(!format!("{:?}", Config::parse(GOOD).unwrap()).contains("s3cret"));
        for torn in [GOOD.replace("\"s3cret\"", "\"s3cret\"\""), GOOD.replace("\"s3cret\"", "s3cret")] {
            let error = format!("{:#}", Config::parse(&torn).unwrap_err());
            assert!(!error.contains("s3cret") && error.contains("near line"), "{error}");
        }
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let table = [
            (GOOD.replace("pi-7", "pi 7"), "device_id = \"pi 7\""),
            (GOOD.replace("pi-7", ""), "device_id = \"\""),
            (
                GOOD.replace("toml-shared", "zitadel"),
                "type = \"zitadel\" is unknown; known types: toml-shared",
            ),
            (GOOD.replace("password", "pasword"), "pasword"),
            (GOOD.replace("urls = [", "urls = [] # ["), "urls is empty"),
            (GOOD.replace("nats://bus.example:4222", "://"), "is not nats://HOST:PORT"),
            (GOOD.replace("[nats]", "[mqtt]\n[nats]"), "mqtt"),
            (GOOD.replace("[credentials]", "heartbeat_seconds = 0\n[credentials]"), "outside 1 to 3600"),
        ];
        for (text, expected) in table {
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }
}
