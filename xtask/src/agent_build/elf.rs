//! The ELF header of what was built, read back: a build that made the wrong thing must not reach a guest.

use anyhow::{Context, Result, ensure};
use object::Endianness;
use object::elf::{ET_DYN, ET_EXEC, FileHeader64};
use object::read::elf::FileHeader as _;

use crate::arch::VmArchitecture;
use crate::exit::Diagnosis;

/// Refuses anything but a 64-bit little-endian executable for `arch`.
///
/// # Errors
/// Says what was found and what the target needs.
pub fn check(bytes: &[u8], arch: VmArchitecture) -> Result<()> {
    let machine = arch.profile();
    let header = FileHeader64::<Endianness>::parse(bytes)
        .map_err(anyhow::Error::from)
        .with_context(|| format!("it is no 64-bit ELF file; the target needs one for {arch}"))?;
    let endian = header.endian().context("read the ELF byte order")?;
    ensure!(endian == Endianness::Little, "it is big-endian; {arch} needs a little-endian executable");
    let found = header.e_machine(endian).0;
    if found != machine.elf_machine {
        let name = VmArchitecture::ALL
            .into_iter()
            .find(|other| other.profile().elf_machine == found)
            .map_or_else(|| format!("ELF machine {found}"), |other| other.to_string());
        return Err(Diagnosis::new(
            format!("it is built for {name}, and the device is {arch}"),
            format!("build it for the device: cargo xtask build --arch {arch}"),
        )
        .into());
    }
    let kind = header.e_type(endian);
    ensure!(kind == ET_EXEC || kind == ET_DYN, "its ELF type is {kind:?}, not an executable");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of 64 bytes as the gABI lays it out, and nothing behind it.
    fn header(class: u8, data: u8, kind: u16, machine: u16) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, data, 1]);
        let half = |value: u16| if data == 2 { value.to_be_bytes() } else { value.to_le_bytes() };
        bytes[16..18].copy_from_slice(&half(kind));
        bytes[18..20].copy_from_slice(&half(machine));
        bytes[20] = 1;
        bytes
    }

    #[test]
    fn only_what_fits_the_device_passes() {
        check(&header(2, 1, 3, 183), VmArchitecture::Aarch64).unwrap();
        check(&header(2, 1, 2, 62), VmArchitecture::X86_64).unwrap();
        let table: &[(Vec<u8>, &str)] = &[
            (header(2, 1, 3, 62), "built for x86_64, and the device is aarch64"),
            (header(2, 1, 3, 243), "built for ELF machine 243"),
            (header(1, 1, 3, 40), "no 64-bit ELF file"),
            (header(2, 2, 3, 183), "big-endian"),
            (header(2, 1, 1, 183), "not an executable"),
            (b"#!/bin/sh\n".to_vec(), "no 64-bit ELF file"),
            (Vec::new(), "no 64-bit ELF file"),
        ];
        for (bytes, expected) in table {
            let error = format!("{:#}", check(bytes, VmArchitecture::Aarch64).unwrap_err());
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }

    #[test]
    fn this_very_test_is_an_executable_for_this_host() {
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for arch in VmArchitecture::ALL {
            assert_eq!(check(&exe, arch).is_ok(), Some(arch) == VmArchitecture::of_host());
        }
    }
}
