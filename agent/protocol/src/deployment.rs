//! The desired state of one deployment: a versioned document. Its `kind` determines the form of its `spec`.
//!
//! ```json
//! {"version": 1, "kind": "podman-container", "spec": {"image": "localhost/web:3", "restart": "always"}}
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{form, is_name};

/// The version of the documents that the agent can read.
pub const VERSION: u64 = 1;
/// The kinds of deployments that the agent can run.
pub const KINDS: [&str; 1] = ["podman-container"];
/// Upper bound for [`ContainerSpec::stop_seconds`], in seconds. A stop (this value and 30 s) and a
/// start (120 s) must fit into the 300 s of the agent's watchdog.
pub const MAX_STOP_SECONDS: u32 = 120;
/// Upper bound for [`ContainerSpec::probation_seconds`].
pub const MAX_PROBATION_SECONDS: u32 = 3600;
const DEFAULT_PROBATION_SECONDS: u32 = 60;

/// A document of [`super::DESIRED_BUCKET`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The version of the document, which must be [`VERSION`].
    pub version: u64,
    #[serde(flatten)]
    pub deployment: Deployment,
}

/// The fields `kind` and `spec` of a document (serde's adjacently tagged form).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "spec", rename_all = "kebab-case")]
pub enum Deployment {
    /// One container, which podman runs as the agent's user.
    PodmanContainer(ContainerSpec),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// The reference of the image. It names a registry or begins with `localhost/`, and it has a tag or a
    /// digest.
    pub image: String,
    /// When the registry is asked for the image.
    #[serde(default, skip_serializing_if = "PullPolicy::is_default")]
    pub pull: PullPolicy,
    /// The command that replaces the image's command. If it is empty, the image's own command is used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Named volumes of this deployment. Paths of the device cannot be mounted, so that write access to the
    /// bus gives no access to the device's file system.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// The signal that asks the container to stop; by default, the image's own signal, or else SIGTERM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<StopSignal>,
    /// Seconds between the stop signal and SIGKILL, at most [`MAX_STOP_SECONDS`]; 10 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_seconds: Option<u32>,
    /// Seconds that a new container must run before the container of the previous document is removed, at most
    /// [`MAX_PROBATION_SECONDS`]; 60 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probation_seconds: Option<u32>,
}

/// When the agent asks the registry for the image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// The agent asks only if the device does not have the image.
    #[default]
    Missing,
    /// The agent also asks if the document is new, if the agent has started, and at intervals. If the tag has moved to
    /// another image, that image replaces the running one.
    Always,
}

impl PullPolicy {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A signal that asks a container to stop (signal(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum StopSignal {
    Sighup,
    Sigint,
    Sigquit,
    Sigkill,
    Sigusr1,
    Sigusr2,
    Sigterm,
    Sigwinch,
    /// The signal that shuts systemd down.
    #[serde(rename = "SIGRTMIN+3")]
    SigrtminPlus3,
}

impl StopSignal {
    /// Returns the signal's number, which is the same on aarch64 and x86_64.
    pub fn number(self) -> u32 {
        match self {
            Self::Sighup => 1,
            Self::Sigint => 2,
            Self::Sigquit => 3,
            Self::Sigkill => 9,
            Self::Sigusr1 => 10,
            Self::Sigusr2 => 12,
            Self::Sigterm => 15,
            Self::Sigwinch => 28,
            Self::SigrtminPlus3 => 37,
        }
    }
}

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The port on the device. Ports below 1024 need a privileged user.
    pub host: u16,
    /// The port in the container.
    pub container: u16,
    /// The address on the device; by default, all addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    #[serde(default)]
    pub protocol: Protocol,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// A named volume, which exists until the deployment is purged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The volume's name within the deployment.
    pub name: String,
    /// An absolute path in the container.
    pub mount: String,
    #[serde(default)]
    pub read_only: bool,
}

/// What the agent does after a container has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// The container is restarted after a pause, which grows with each restart.
    #[default]
    Always,
    /// The container is restarted if its exit code is not 0.
    OnFailure,
    Never,
}

/// Resource limits of a container. An absent field means no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory in MiB, at least 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// CPU time in thousandths of one processor, at least 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub millicpus: Option<u32>,
    /// Processes and threads, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    /// Open files of each process (RLIMIT_NOFILE), at least 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u32>,
}

impl Limits {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The reason why a document cannot be run. Only the fleet can correct the document, so the agent does not
/// try again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub String);

impl Document {
    pub fn of(deployment: Deployment) -> Self {
        Self { version: VERSION, deployment }
    }

    /// Parses and checks a document.
    ///
    /// # Errors
    /// Returns an error if the agent does not know the version or the kind, or if the spec is invalid. The error names
    /// the path of a field and the expected type. It has no value of the document, since a value can be a secret.
    pub fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let refuse = |text: String| Refusal(super::status::shortened(&text));
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| refuse(format!("the document is not JSON: {error}")))?;
        form::check(&value).map_err(refuse)?;
        // The form has been checked, and serde's error could contain a value.
        let document: Self = serde_json::from_value(value)
            .map_err(|_error| refuse("spec: expected the form of version 1".to_owned()))?;
        let Deployment::PodmanContainer(spec) = &document.deployment;
        spec.check().map_err(refuse)?;
        Ok(document)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a document is plain data")
    }
}

impl ContainerSpec {
    /// Returns a container of `image` with defaults for all other fields.
    pub fn of(image: &str) -> Self {
        Self { image: image.to_owned(), ..Self::default() }
    }

    /// Returns whether the agent follows the tag of the image. A reference with a digest has only one image.
    pub fn follows_tag(&self) -> bool {
        self.pull == PullPolicy::Always && !self.image.contains('@')
    }

    /// Returns the time that a new container must run before it replaces its predecessor for good.
    pub fn probation(&self) -> Duration {
        Duration::from_secs(self.probation_seconds.unwrap_or(DEFAULT_PROBATION_SECONDS).into())
    }

    /// Checks the rules that serde does not enforce.
    fn check(&self) -> Result<(), String> {
        self.check_image()?;
        for (index, (name, value)) in self.env.iter().enumerate() {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(format!(
                    "spec.env[{index}]: a name must not be empty or contain '=', and neither name nor value may contain NUL"
                ));
            }
        }
        if let Some(index) = self.command.iter().position(|word| word.contains('\0')) {
            return Err(format!("spec.command[{index}]: must not contain NUL"));
        }
        let mut taken = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            if port.host == 0 || port.container == 0 {
                return Err(format!("spec.ports[{index}]: 0 is not a valid port"));
            }
            if !taken.insert((port.host, port.protocol)) {
                return Err(format!("spec.ports[{index}].host: an earlier port has the same number"));
            }
        }
        let (mut names, mut mounts) = (BTreeSet::new(), BTreeSet::new());
        for (index, Volume { name, mount, .. }) in self.volumes.iter().enumerate() {
            let path = format!("spec.volumes[{index}]");
            if !is_name(name) {
                return Err(format!(
                    "{path}.name: expected up to 63 letters, digits, '-' and '_', without '-' at the beginning"
                ));
            }
            let below_root = mount.strip_prefix('/').is_some_and(|path| !path.is_empty());
            if !below_root || mount.contains(['\0', ':']) || mount.split('/').any(|part| part == "..") {
                return Err(format!("{path}.mount: expected an absolute path below /, without ':' and '..'"));
            }
            if !names.insert(name) || !mounts.insert(mount) {
                return Err(format!("{path}: an earlier volume has the same name or the same path"));
            }
        }
        let at_most = [
            ("stop_seconds", self.stop_seconds, MAX_STOP_SECONDS),
            ("probation_seconds", self.probation_seconds, MAX_PROBATION_SECONDS),
        ];
        for (name, value, most) in at_most {
            if value.is_some_and(|value| value > most) {
                return Err(format!("spec.{name}: must be at most {most}"));
            }
        }
        self.limits.check()
    }

    /// Checks the image's reference. Without a registry, podman would look for the image in the registries of
    /// the device's configuration.
    fn check_image(&self) -> Result<(), String> {
        let image = &self.image;
        let plain = image.len() <= 512 && image.chars().all(|c| c.is_ascii_graphic());
        let (registry, rest) = image.split_once('/').unwrap_or_default();
        // An address or a login in place of a registry would be shown in the errors about the image.
        let is_host = registry.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c));
        let named =
            registry == "localhost" || registry.contains(['.', ':']) && is_host && !rest.starts_with('/');
        let last = rest.rsplit('/').next().unwrap_or_default();
        let fixed = rest.contains('@') || last.split_once(':').is_some_and(|(_, tag)| !tag.is_empty());
        if plain && named && fixed {
            return Ok(());
        }
        let expected = "spec.image: must name its registry (or localhost/) and a tag or a digest, for example \
                        registry.example/web:3";
        Err(expected.to_owned())
    }
}

impl Limits {
    fn check(&self) -> Result<(), String> {
        let at_least = [
            ("memory_mib", self.memory_mib, 4),
            ("millicpus", self.millicpus, 10),
            ("processes", self.processes, 1),
            ("open_files", self.open_files, 16),
        ];
        for (name, value, least) in at_least {
            if value.is_some_and(|value| value < least) {
                return Err(format!("spec.limits.{name}: must be at least {least}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
