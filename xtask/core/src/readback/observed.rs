//! What QEMU says of a domain, over its machine protocol (QEMU, qemu-qmp-ref). Whoever reads hands in how to ask, so that
//! the tests read what was recorded of real ones.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ExpectedMachine;

/// A domain as QEMU describes it.
#[derive(Debug, Clone)]
pub struct Observed {
    /// `query-status`.
    pub status: RunStatus,
    /// `query-kvm`.
    pub kvm: KvmInUse,
    /// The machine's QOM type, such as `virt-7.2-machine`.
    pub machine: String,
    /// `query-memory-size-summary`, in bytes.
    pub memory_bytes: u64,
    /// `query-cpus-fast`.
    pub vcpus: Vec<Vcpu>,
    /// The first processor's QOM type, such as `max-arm-cpu`.
    pub cpu_type: String,
    /// Of each property that was asked for, what the first processor that is not as asked has, else the first one; `Err` where
    /// QEMU has no such property, in its words.
    pub cpu_properties: Vec<(String, Result<bool, String>)>,
    /// The flash devices: code, variables.
    pub flashes: Vec<Flash>,
    /// `query-block`: what the guest's devices have.
    pub devices: Vec<BlockDevice>,
    /// `query-named-block-nodes`: every layer of every disk.
    pub layers: Vec<Layer>,
    /// `info usernet`, which the machine protocol does not have.
    pub forwarding: String,
}

/// Whether the guest runs.
#[derive(Debug, Clone, Deserialize)]
pub struct RunStatus {
    /// Whether its processors do.
    pub running: bool,
    /// `prelaunch`, `paused` and so on.
    pub status: String,
}

/// KVM, as far as this domain goes.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct KvmInUse {
    /// Whether it runs the guest.
    pub enabled: bool,
}

/// A processor of the guest.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Vcpu {
    /// The thread of this host that runs it.
    pub thread_id: u64,
    /// Where it is in QEMU's tree of objects.
    pub qom_path: String,
}

/// A flash device.
#[derive(Debug, Clone)]
pub struct Flash {
    /// Where it is in QEMU's tree of objects.
    pub qom_path: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// What is in it.
    pub layer: Layer,
}

/// A device of the guest that has, or takes, a medium.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockDevice {
    /// Where it is in QEMU's tree of objects.
    #[serde(default)]
    pub qdev: String,
    /// What is in it.
    pub inserted: Option<Layer>,
}

/// A node of QEMU's block layer.
#[derive(Debug, Clone, Deserialize)]
pub struct Layer {
    /// The file that it ends in.
    pub file: String,
    /// Whether it refuses writes.
    pub ro: bool,
    /// How it treats this host's page cache.
    pub cache: CacheMode,
    /// The image that is in it, with what that lies on.
    pub image: Option<ImageInfo>,
}

/// A disk image as QEMU has opened it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Its file.
    pub filename: String,
    /// What it reads where it has nothing itself.
    pub backing_image: Option<Box<ImageInfo>>,
}

impl ImageInfo {
    /// The files that it lies on, from the next layer down.
    pub fn backing(&self) -> Vec<&str> {
        let mut files = Vec::new();
        let mut below = self.backing_image.as_deref();
        while let Some(image) = below {
            files.push(image.filename.as_str());
            below = image.backing_image.as_deref();
        }
        files
    }
}

/// How a block node treats this host's page cache.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheMode {
    /// Past it (O_DIRECT).
    pub direct: bool,
    /// The guest's flushes are ignored.
    pub no_flush: bool,
}

impl Layer {
    /// Whether it is about `path`. Where QEMU cannot say a node as a file name it says it as `json:{…}`.
    pub fn is_of(&self, path: &Path) -> bool {
        let path = path.to_string_lossy();
        self.file == path || (self.file.starts_with("json:") && self.file.contains(&format!("\"{path}\"")))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Memory {
    base_memory: u64,
    plugged_memory: Option<u64>,
}

/// Asks QEMU a command with its arguments.
pub type Ask<'a> = dyn FnMut(&str, &Value) -> Result<Value> + 'a;

impl Observed {
    /// Everything that can be compared with `expected`.
    ///
    /// # Errors
    /// Where QEMU refuses a command, or answers what cannot be read; both name the command.
    pub fn read(expected: &ExpectedMachine, ask: &mut Ask<'_>) -> Result<Self> {
        let memory: Memory = get(ask, "query-memory-size-summary", &json!({}))?;
        let vcpus: Vec<Vcpu> = get(ask, "query-cpus-fast", &json!({}))?;
        let first = vcpus.first().context("QEMU has made no processor")?.qom_path.clone();
        let mut cpu_properties = Vec::new();
        for (name, wanted) in &expected.cpu_properties {
            cpu_properties.push((name.clone(), cpu_property(ask, &vcpus, name, *wanted)));
        }
        let devices: Vec<BlockDevice> = get(ask, "query-block", &json!({}))?;
        let mut flashes = Vec::new();
        for unit in ["flash0", "flash1"] {
            // `/machine/virt.flash0`, `/machine/system.flash0`.
            let device = devices.iter().find(|device| device.qdev.ends_with(unit));
            if let Some((device, layer)) = device.and_then(|device| Some((device, device.inserted.clone()?)))
            {
                let blocks: u64 = property(ask, &device.qdev, "num-blocks")?;
                let block_bytes: u64 = property(ask, &device.qdev, "sector-length")?;
                flashes.push(Flash { qom_path: device.qdev.clone(), bytes: blocks * block_bytes, layer });
            }
        }
        Ok(Self {
            status: get(ask, "query-status", &json!({}))?,
            kvm: get(ask, "query-kvm", &json!({}))?,
            machine: property(ask, "/machine", "type")?,
            memory_bytes: memory.base_memory + memory.plugged_memory.unwrap_or(0),
            cpu_type: property(ask, &first, "type")?,
            vcpus,
            cpu_properties,
            flashes,
            devices,
            layers: get(ask, "query-named-block-nodes", &json!({ "flat": true }))?,
            forwarding: get(ask, "human-monitor-command", &json!({ "command-line": "info usernet" }))?,
        })
    }
}

/// A property that QEMU does not have is an answer, and not the end of the reading.
fn cpu_property(ask: &mut Ask<'_>, vcpus: &[Vcpu], name: &str, wanted: bool) -> Result<bool, String> {
    for vcpu in vcpus {
        let value: bool =
            property(ask, &vcpu.qom_path, name).map_err(|error| error.root_cause().to_string())?;
        if value != wanted {
            return Ok(value);
        }
    }
    Ok(wanted)
}

fn property<T: DeserializeOwned>(ask: &mut Ask<'_>, path: &str, name: &str) -> Result<T> {
    get(ask, "qom-get", &json!({ "path": path, "property": name }))
}

fn get<T: DeserializeOwned>(ask: &mut Ask<'_>, command: &str, arguments: &Value) -> Result<T> {
    let answer = ask(command, arguments)?;
    serde_json::from_value(answer).with_context(|| format!("read QEMU's answer to {command} {arguments}"))
}
