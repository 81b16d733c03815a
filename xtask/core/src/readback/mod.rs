//! The rehearsal, as far as it is pure: what a domain should become ([`ExpectedMachine`]), what QEMU says that it became
//! ([`observed`]), and the difference ([`diff`]). `xtask-vm` starts the domain paused and asks QEMU; no guest code runs.

pub mod diff;
pub mod observed;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::machine::{Disk, DomainXmlParams, VmSpec};

/// What a domain should become, from the parameters that its XML is written from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExpectedMachine {
    /// The guest's architecture.
    pub architecture: VmArchitecture,
    /// How its instructions run.
    pub accelerator: Accelerator,
    /// QEMU's name of the CPU model, such as `max`.
    pub cpu_model: String,
    /// CPU properties (QEMU's, QOM) and what they must be.
    pub cpu_properties: Vec<(String, bool)>,
    pub vcpus: usize,
    /// Whether each has a thread of its own even where it is emulated.
    pub own_threads: bool,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// UEFI; `None` boots by BIOS.
    pub flash: Option<ExpectedFlash>,
    /// The disks in the guest's order.
    pub disks: Vec<Disk>,
}

/// The flash with the firmware's code and the one with the domain's variables.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExpectedFlash {
    /// The code's file, shared and so read-only.
    pub code: PathBuf,
    /// The size that the code's flash must have, in bytes.
    pub code_bytes: u64,
    /// This domain's variables, which it writes.
    pub nvram: PathBuf,
    /// What those were copied from, which no domain may write.
    pub template: PathBuf,
    /// The size of both, in bytes.
    pub vars_bytes: u64,
}

impl ExpectedMachine {
    /// What the domain with these parameters should become.
    ///
    /// # Errors
    /// Names the firmware's file whose size cannot be had.
    pub fn of(params: &DomainXmlParams) -> Result<Self> {
        Self::with_sizes(params, |path| Ok(fs_err::metadata(path)?.len()))
    }

    /// `size_of` has the bytes of a firmware file, where the flash device takes files of many sizes.
    fn with_sizes(params: &DomainXmlParams, size_of: impl Fn(&Path) -> Result<u64>) -> Result<Self> {
        let VmSpec { architecture, vcpus, memory_mib, .. } = params.spec;
        let profile = architecture.profile();
        let size = |path: &Path| profile.flash_bytes.map_or_else(|| size_of(path), Ok);
        let flash = params.firmware.as_ref().map(|pair| -> Result<_> {
            Ok(ExpectedFlash {
                code: pair.code.clone(),
                code_bytes: size(&pair.code)?,
                nvram: params.files.nvram.clone(),
                template: pair.vars_template.clone(),
                vars_bytes: size(&pair.vars_template)?,
            })
        });
        // QEMU itself gives up on threads where the guest relies on an order of memory accesses that the host does not
        // keep (QEMU, docs/devel/multi-thread-tcg.rst).
        let host_is_strong = VmArchitecture::of_host().is_some_and(|host| host.profile().strong_memory_order);
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
        })
    }
}

/// What was switched off, and what `-global TYPE.PROPERTY=VALUE` says.
fn cpu_properties(params: &DomainXmlParams) -> Vec<(String, bool)> {
    let off = params.cpu.disabled_features.iter().map(|feature| (feature.clone(), false));
    off.chain(params.cpu.globals.iter().map(|global| (global.property.to_owned(), global.value))).collect()
}
