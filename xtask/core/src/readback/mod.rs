//! Compares the machine that QEMU has made with the requested one: the expected machine ([`ExpectedMachine`]), the
//! machine that QEMU reports ([`observed`]), and the differences ([`diff`]). The rehearsal and each boot of a smoke
//! make this comparison. `xtask-vm` starts the domain paused, and sends the queries to QEMU. For a libvirt that passes
//! no queries to QEMU, [`live`] compares the domain's live XML instead.

pub mod diff;
pub mod live;
pub mod observed;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::Network;
use crate::machine::{DaemonDomain, Disk, DomainXmlParams, FORWARDED_PORTS, SSH_PORT, VmSpec};

/// The machine that QEMU should make of a domain. It is derived from the parameters of the domain's XML.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExpectedMachine {
    pub architecture: VmArchitecture,
    pub accelerator: Accelerator,
    /// QEMU's name of the CPU model, such as `max`.
    pub cpu_model: String,
    /// The names of CPU properties (in QEMU's object model) with their expected values.
    pub cpu_properties: Vec<(String, bool)>,
    pub vcpus: usize,
    /// True if each processor of the guest must have a thread of its own.
    pub own_threads: bool,
    /// The memory in bytes.
    pub memory_bytes: u64,
    /// The flash of the UEFI firmware; `None` if the machine boots by BIOS.
    pub flash: Option<ExpectedFlash>,
    /// The disks in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// The ports of the guest that QEMU forwards from the loopback of its host.
    #[serde(default = "forwarded_ports")]
    pub forwarded_ports: Vec<u16>,
}

fn forwarded_ports() -> Vec<u16> {
    FORWARDED_PORTS.to_vec()
}

/// The expected flash devices: one with the firmware's code, and one with the domain's variables.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExpectedFlash {
    /// The file with the firmware's code. All domains share it, so it must be read-only.
    pub code: PathBuf,
    /// The required size of the code's flash in bytes; `None` if it is not known.
    pub code_bytes: Option<u64>,
    /// The file with this domain's variables, which must be writable.
    pub nvram: PathBuf,
    /// The template of the variables, which the domain must not use.
    pub template: PathBuf,
    /// The required size of the variables' flash in bytes; `None` if it is not known.
    pub vars_bytes: Option<u64>,
}

impl ExpectedMachine {
    /// Returns the machine that QEMU should make of the domain with these parameters.
    ///
    /// # Errors
    /// Returns an error that names the firmware file whose size cannot be read.
    pub fn of(params: &DomainXmlParams) -> Result<Self> {
        Self::with_sizes(params, |path| Ok(fs_err::metadata(path)?.len()))
    }

    /// Returns the expected machine like [`Self::of`]. The function `size_of` returns the size of a firmware file. It
    /// is called only for a flash device without a fixed size.
    fn with_sizes(params: &DomainXmlParams, size_of: impl Fn(&Path) -> Result<u64>) -> Result<Self> {
        let VmSpec { architecture, vcpus, memory_mib, .. } = params.spec;
        let profile = architecture.profile();
        let size = |path: &Path| profile.flash_bytes.map_or_else(|| size_of(path), Ok);
        let flash = params.firmware.as_ref().map(|pair| -> Result<_> {
            Ok(ExpectedFlash {
                code: pair.code.clone(),
                code_bytes: Some(size(&pair.code)?),
                nvram: params.files.nvram.clone(),
                template: pair.vars_template.clone(),
                vars_bytes: Some(size(&pair.vars_template)?),
            })
        });
        // Under emulation, QEMU runs all processors on one thread if the guest relies on a stronger memory order than
        // the host has (QEMU, docs/devel/multi-thread-tcg.rst).
        let host = params.daemon.as_ref().map_or_else(VmArchitecture::of_host, |daemon| daemon.host);
        let host_is_strong = host.is_some_and(|host| host.profile().strong_memory_order);
        Ok(Self {
            architecture,
            accelerator: params.accelerator,
            cpu_model: params.cpu.model.name().to_owned(),
            cpu_properties: cpu_properties(params),
            vcpus: usize::try_from(vcpus).context("count the processors")?,
            own_threads: host_is_strong || !profile.strong_memory_order,
            memory_bytes: memory_mib << 20,
            flash: flash.transpose()?,
            disks: params.disks().to_vec(),
            forwarded_ports: match &params.daemon {
                None => forwarded_ports(),
                Some(DaemonDomain { network: Network::User, .. }) => vec![SSH_PORT],
                Some(_) => Vec::new(),
            },
        })
    }
}

impl ExpectedFlash {
    /// Returns the flash of a daemon's domain. libvirt has selected the firmware, and its XML of the running domain
    /// names the files.
    pub fn selected(architecture: VmArchitecture, code: PathBuf, template: PathBuf, nvram: PathBuf) -> Self {
        let bytes = architecture.profile().flash_bytes;
        Self { code, code_bytes: bytes, nvram, template, vars_bytes: bytes }
    }
}

/// Returns the expected CPU properties: the disabled features are off, and the properties of `-global` have the values
/// that it sets.
fn cpu_properties(params: &DomainXmlParams) -> Vec<(String, bool)> {
    let off = params.cpu.disabled_features.iter().map(|feature| (feature.clone(), false));
    off.chain(params.cpu.globals.iter().map(|global| (global.property.to_owned(), global.value))).collect()
}
