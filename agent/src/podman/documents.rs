//! What podman answers, with those fields alone that the agent reads.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A container, as podman lists it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListedContainer {
    /// Its id.
    pub id: String,
    /// Its names; the first is its own.
    #[serde(deserialize_with = "or_default")]
    pub names: Vec<String>,
    /// `created`, `running`, `exited`, …
    pub state: String,
    /// Of one that has ended.
    pub exit_code: i32,
    /// Its labels.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
}

/// A volume, as podman lists it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
pub struct ListedVolume {
    /// Its name.
    pub name: String,
    /// Its labels.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
}

/// An image that is here.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Image {
    /// Its id.
    pub id: String,
    /// As Go names it: `arm64`, `amd64`.
    #[serde(default)]
    pub architecture: String,
}

/// Go writes an empty list as null.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::http::read;
    use super::*;

    #[test]
    fn listings_are_read_with_gos_nulls_and_words_of_later_versions() {
        let text = r#"[{"Id":"a","Names":["x"],"State":"running","Labels":{"k":"v"},"ExitCode":0,"New":1},
                       {"Id":"b","Names":null,"State":"a-new-word","Labels":null,"ExitCode":137}]"#;
        let listed: Vec<ListedContainer> = read(text.as_bytes()).unwrap();
        assert_eq!((listed[0].labels["k"].as_str(), listed[1].state.as_str()), ("v", "a-new-word"));
        assert!(listed[1].names.is_empty());
    }
}
