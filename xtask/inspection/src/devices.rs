//! Finds the architecture and the device that a file or a name stands for.

use inspect::device::{self, Device};
use inspect::elf::Ident;
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::InspectArgs;
use xtask_core::error::Failure;

use crate::isa;

/// Returns the architecture for which a file was built, by its first bytes.
pub fn arch_of_file(start: &[u8]) -> Option<VmArchitecture> {
    let machine = Ident::read(start).ok()?.machine;
    VmArchitecture::ALL.into_iter().find(|arch| isa(*arch).elf_machine() == machine)
}

/// Returns the device with this name, and its architecture. If both architectures have such a device, as for `max`, the
/// one for aarch64 is returned.
///
/// # Errors
/// Returns a usage error if no architecture has a device with this name.
pub fn device_named(name: &str) -> Result<(VmArchitecture, Device), Failure> {
    let arch = arch_of_device(name).unwrap_or(VmArchitecture::Aarch64);
    let device = device::find(isa(arch), name).ok_or_else(|| unknown_device(arch, name))?;
    Ok((arch, device))
}

/// Returns the architecture that the flags request: that of `--arch`, or that of the device. Returns `None` if both flags
/// are missing, or if both architectures have the device.
pub fn requested_arch(args: &InspectArgs) -> Option<VmArchitecture> {
    args.arch.or_else(|| args.device.as_deref().and_then(arch_of_device))
}

/// Returns the architecture that has a device with this name or, if no device has it, with this core, if there is
/// exactly one. `max` is a device of aarch64, and also QEMU's name of a core of x86_64.
fn arch_of_device(name: &str) -> Option<VmArchitecture> {
    let found = VmArchitecture::ALL.map(|arch| (arch, device::find(isa(arch), name)));
    let only = |is_it: fn(&Device, &str) -> bool| {
        let mut having = found.iter().filter(|(_, device)| device.as_ref().is_some_and(|it| is_it(it, name)));
        having.next().filter(|_| having.next().is_none()).map(|(arch, _)| *arch)
    };
    only(|device, name| device.name == name).or_else(|| only(|_, _| true))
}

pub(crate) fn unknown_device(arch: VmArchitecture, name: &str) -> Failure {
    let devices = device::built_in().into_iter().filter(|device| device.isa == isa(arch));
    let names: Vec<_> = devices.map(|device| device.name).collect();
    Failure::usage(format!("--device {name}: no such device for {arch}; there are: {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_names_the_architecture() {
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        for (machine, arch) in
            [(183, Some(VmArchitecture::Aarch64)), (62, Some(VmArchitecture::X86_64)), (40, None)]
        {
            header[18] = machine;
            assert_eq!(arch_of_file(&header), arch);
        }
        assert_eq!(arch_of_file(b"#!/bin/sh"), None);
    }

    #[test]
    fn the_name_of_a_device_counts_before_that_of_a_core() {
        let arch = |name: &str| arch_of_device(name);
        assert_eq!(arch("max"), Some(VmArchitecture::Aarch64));
        assert_eq!(arch("max-x86"), Some(VmArchitecture::X86_64));
        assert_eq!(arch("cortex-a76"), Some(VmArchitecture::Aarch64));
        assert_eq!(arch("nothing"), None);
    }
}
