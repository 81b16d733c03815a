//! The configuration of a container image (OCI image-spec, config.md; docker's is the same).

use serde::{Deserialize, Deserializer};
use xtask_core::arch::VmArchitecture;
use xtask_core::digest::Digest;

/// The command, the environment and the platform of an image's containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// The architecture in the notation of Go: `amd64`, `arm64`, `arm`.
    pub architecture: String,
    /// The variant of the architecture, such as `v8`, or empty.
    pub variant: String,
    pub os: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// The environment: `NAME=value`.
    pub env: Vec<String>,
    /// The working directory. If it is empty, the container starts in `/`.
    pub working_directory: String,
    pub user: String,
}

impl ImageConfig {
    /// Returns the command that a container runs: the entrypoint with its arguments.
    pub fn command(&self) -> impl Iterator<Item = &str> {
        self.entrypoint.iter().chain(&self.cmd).map(String::as_str)
    }

    /// Returns the architecture of the image, or `None` if no device here has it.
    pub fn arch(&self) -> Option<VmArchitecture> {
        // Debian and Go have the same names for these architectures.
        VmArchitecture::ALL.into_iter().find(|arch| arch.profile().debian_arch == self.architecture)
    }
}

/// The configuration as an image stores it, in JSON.
#[derive(Debug, Deserialize)]
pub(crate) struct Document {
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    variant: String,
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    config: Process,
    pub(crate) rootfs: RootFs,
    #[serde(default, deserialize_with = "nullable")]
    history: Vec<Step>,
}

/// The digests of the uncompressed layers.
#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    #[serde(deserialize_with = "nullable")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    env: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    working_dir: String,
    #[serde(deserialize_with = "nullable")]
    user: String,
}

#[derive(Debug, Deserialize)]
struct Step {
    #[serde(default, deserialize_with = "nullable")]
    created_by: String,
    #[serde(default, deserialize_with = "nullable")]
    empty_layer: bool,
}

/// Go writes `null` for an empty list or object.
fn nullable<'d, T: Default + Deserialize<'d>, D: Deserializer<'d>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Document {
    /// Returns the command that made each layer, as far as the document records it.
    pub(crate) fn layer_commands(&self) -> impl Iterator<Item = &str> {
        self.history.iter().filter(|step| !step.empty_layer).map(|step| step.created_by.as_str())
    }

    /// Returns the platform for a message: `linux/arm64`.
    pub(crate) fn platform(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }

    pub(crate) fn variant(&self) -> &str {
        &self.variant
    }

    pub(crate) fn is_for(&self, os: &str, architecture: &str) -> bool {
        self.os == os && self.architecture == architecture
    }

    pub(crate) fn image_config(&self) -> ImageConfig {
        let process = &self.config;
        ImageConfig {
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
            os: self.os.clone(),
            entrypoint: process.entrypoint.clone(),
            cmd: process.cmd.clone(),
            env: process.env.clone(),
            working_directory: process.working_dir.clone(),
            user: process.user.clone(),
        }
    }
}
