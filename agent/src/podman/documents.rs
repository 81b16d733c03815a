//! The documents of podman's API, with the fields that the agent reads.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ListedContainer {
    pub(crate) id: String,
    /// The names. The first one is the container's own name.
    #[serde(deserialize_with = "or_default")]
    pub(crate) names: Vec<String>,
    /// The state, such as `created`, `running` or `exited`.
    pub(crate) state: String,
    /// The id of the image.
    #[serde(rename = "ImageID")]
    pub(crate) image_id: String,
    /// The exit code, which is valid only if the container has ended.
    pub(crate) exit_code: i32,
    #[serde(deserialize_with = "or_default")]
    pub(crate) labels: BTreeMap<String, String>,
    /// The published ports.
    #[serde(deserialize_with = "or_default")]
    pub(crate) ports: Vec<ListedPort>,
}

impl ListedContainer {
    /// Returns whether the container publishes this port of the device.
    pub(crate) fn holds_port(&self, number: u16) -> bool {
        let covers = |port: &ListedPort| {
            (port.host_port..=port.host_port.saturating_add(port.range.max(1) - 1)).contains(&number)
        };
        self.ports.iter().any(covers)
    }
}

/// A published port, or as many consecutive ones as `range` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct ListedPort {
    pub(crate) host_port: u16,
    pub(crate) range: u16,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Info {
    pub(crate) host: HostInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct HostInfo {
    cgroup_version: String,
    cgroup_controllers: Option<Vec<String>>,
}

impl HostInfo {
    /// Returns the controllers of the user's part of cgroups v2.
    pub(crate) fn controllers(self) -> Option<Vec<String>> {
        // Go writes an empty list as null.
        (self.cgroup_version == "v2").then(|| self.cgroup_controllers.unwrap_or_default())
    }
}

/// The details of a container that its listing does not have.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ContainerDetails {
    /// The id of the image.
    pub(crate) image: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) mounts: Vec<Mount>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Mount {
    /// The kind, such as `volume` or `bind`.
    #[serde(rename = "Type")]
    pub(crate) kind: String,
    /// The name of the volume.
    pub(crate) name: String,
    pub(crate) destination: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ListedVolume {
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Image {
    pub(crate) id: String,
    /// Go's name of the architecture: `arm64`, `amd64`.
    pub(crate) architecture: String,
}

/// Deserializes null as the default, since Go writes an empty list or map as null.
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
    fn listings_may_contain_null_and_unknown_values() {
        let text = r#"[{"Id":"a","Names":["x"],"State":"running","Labels":{"k":"v"},"ExitCode":0,"New":1,
                        "Ports":[{"host_ip":"","container_port":80,"host_port":8080,"range":1,"protocol":"tcp"}]},
                       {"Id":"b","Names":null,"State":"a-new-word","Labels":null,"ExitCode":137,"Ports":null}]"#;
        let listed: Vec<ListedContainer> = read(text.as_bytes()).unwrap();
        assert_eq!((listed[0].labels["k"].as_str(), listed[1].state.as_str()), ("v", "a-new-word"));
        assert!(listed[1].names.is_empty() && listed[1].ports.is_empty());
        assert_eq!(listed[0].ports, [ListedPort { host_port: 8080, range: 1 }]);
        assert!(listed[0].holds_port(8080) && !listed[0].holds_port(8081));
    }
}
