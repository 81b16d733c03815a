//! Reads the machine that QEMU reports over QMP (QEMU, qemu-qmp-ref). The caller passes a function that sends a query
//! and returns the response, so that the tests can use recorded responses of real QEMUs.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ExpectedMachine;

/// A machine as QEMU describes it.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The response to `query-status`.
    pub status: RunStatus,
    /// The response to `query-kvm`.
    pub kvm: KvmInUse,
    /// The QOM type of the machine, such as `virt-7.2-machine`.
    pub machine: String,
    /// The memory in bytes, from `query-memory-size-summary`.
    pub memory_bytes: u64,
    /// The response to `query-cpus-fast`.
    pub vcpus: Vec<Vcpu>,
    /// The QOM type of the first processor, such as `max-arm-cpu`.
    pub cpu_type: String,
    /// The CPU properties of [`ExpectedMachine`], with their values in QEMU. If the processors differ, this is the
    /// value of the first processor that does not have the expected value. If the CPU has no such property, `Err`
    /// contains QEMU's message.
    pub cpu_properties: Vec<(String, Result<bool, String>)>,
    /// The flash devices: first the code, then the variables.
    pub flashes: Vec<Flash>,
    /// The response to `query-block`: the guest's devices.
    pub devices: Vec<BlockDevice>,
    /// The response to `query-named-block-nodes`: every file of every disk.
    pub layers: Vec<Layer>,
    /// The output of the monitor's command `info usernet`. There is no QMP command for it.
    pub forwarding: String,
}

/// The response to `query-status`.
#[derive(Debug, Clone, Deserialize)]
pub struct RunStatus {
    /// True if the guest's processors run.
    pub running: bool,
    /// The state's name, such as `prelaunch` or `paused`.
    pub status: String,
}

/// The response to `query-kvm`.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct KvmInUse {
    /// True if KVM runs the guest.
    pub enabled: bool,
}

/// A processor of the guest.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Vcpu {
    /// The id of the host's thread that runs the processor.
    pub thread_id: u64,
    /// The path in QEMU's object tree.
    pub qom_path: String,
}

/// A flash device.
#[derive(Debug, Clone)]
pub struct Flash {
    /// The path in QEMU's object tree.
    pub qom_path: String,
    /// The size in bytes.
    pub bytes: u64,
    /// The medium in the device.
    pub layer: Layer,
}

/// A device of the guest that contains a medium, such as a disk image, or can take one.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockDevice {
    /// The path in QEMU's object tree.
    #[serde(default)]
    pub qdev: String,
    /// The medium in the device.
    pub inserted: Option<Layer>,
}

/// A node of QEMU's block layer.
#[derive(Debug, Clone, Deserialize)]
pub struct Layer {
    /// The file below the node.
    pub file: String,
    /// True if the node refuses writes.
    pub ro: bool,
    /// The cache mode of the node.
    pub cache: CacheMode,
    /// The disk image in the file, with its backing images.
    pub image: Option<ImageInfo>,
}

/// A disk image as QEMU has opened it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    pub filename: String,
    /// The image from which QEMU reads the data that this image does not contain.
    pub backing_image: Option<Box<ImageInfo>>,
}

impl ImageInfo {
    /// Returns the backing files, from top to bottom.
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

/// The cache mode of a block node: whether the node uses this host's page cache.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheMode {
    /// The node bypasses the page cache (O_DIRECT).
    pub direct: bool,
    /// The node ignores the guest's flushes.
    pub no_flush: bool,
}

impl Layer {
    /// Returns whether the node's file is `path`. QEMU describes some nodes by `json:{…}` instead of by a path; the
    /// path is then searched in this text.
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

/// A function that sends a QMP command with its arguments and returns the response.
pub type Ask<'a> = dyn FnMut(&str, &Value) -> Result<Value> + 'a;

impl Observed {
    /// Reads the values that are compared with `expected`.
    ///
    /// # Errors
    /// If QEMU refuses a command or its response cannot be parsed, returns an error that names the command.
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
            // The flash device is `/machine/virt.flash0` on Arm and `/machine/system.flash0` on x86.
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

/// Returns the value of a CPU property, as [`Observed::cpu_properties`] describes. If the CPU does not have the
/// property, returns QEMU's message.
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
