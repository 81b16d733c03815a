//! The table of all values that depend on an architecture. Other modules do not distinguish architectures. They read
//! the values from a [`MachineProfile`].

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The architecture of a guest or of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VmArchitecture {
    /// 64-bit x86.
    #[default]
    #[value(name = "x86_64", alias = "amd64")]
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit Arm, such as the Raspberry Pi 5.
    #[value(name = "aarch64", alias = "arm64")]
    Aarch64,
}

/// The accelerator that runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's own processor, through `/dev/kvm`.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The properties of an architecture.
#[derive(Debug)]
pub struct MachineProfile {
    /// The architecture that this row describes.
    pub arch: VmArchitecture,
    /// The name that `uname -m`, libvirt and QEMU use.
    pub machine: &'static str,
    /// Rust's target triple.
    pub triple: &'static str,
    /// Debian's name for the architecture.
    pub debian_arch: &'static str,
    /// The file name of the full-system emulator.
    pub emulator: &'static str,
    /// QEMU's machine type.
    pub machine_type: &'static str,
    /// The kernel's name for the first serial port, with its speed.
    pub console: &'static str,
    /// The ELF `e_machine` of the architecture's executables (gABI).
    pub elf_machine: u16,
    /// The file name of the boot loader that UEFI starts from an ESP if there are no boot entries (UEFI 2.10, 3.5.1.1).
    pub efi_boot_file: &'static str,
    /// The file name of systemd-boot in Debian's package.
    pub systemd_boot_file: &'static str,
    /// The path of GRUB in Debian's signed package. This GRUB reads its files from `/EFI/debian` on the disk from which
    /// GRUB was loaded.
    pub grub_file: &'static str,
    /// The name of the architecture in Debian's library paths (multiarch) and at the start of the names of GNU tools:
    /// `aarch64-linux-gnu`.
    pub multiarch: &'static str,
    /// The path of the dynamic loader that executables name (psABI): a directory at the root and a file name.
    pub loader: (&'static str, &'static str),
    /// The settings that make the emulated CPU fast.
    pub tcg_cpu: TcgCpu,
    /// The CPU names that `--cpu` accepts and QEMU does not know, each with QEMU's name for the CPU.
    pub cpu_aliases: &'static [(&'static str, &'static str)],
    /// The known paths of firmware, as pairs of the code and the template of the variable store. They are used if no
    /// descriptor on the host names firmware.
    pub firmware_paths: &'static [(&'static str, &'static str)],
    /// The size in bytes that the flash with the firmware's code must have. `None` means that any multiple of 4 KiB is
    /// allowed.
    pub flash_bytes: Option<u64>,
    /// The flags in /proc/cpuinfo that indicate hardware virtualisation. The list is empty if the kernel shows no such
    /// flags for the architecture.
    pub virtualisation_flags: &'static [&'static str],
    /// True if programs may rely on a strong memory order, such as that of x86 (QEMU, `TCG_GUEST_DEFAULT_MO`).
    pub strong_memory_order: bool,
    /// QEMU's name of the property that is true for each CPU model that runs 64-bit programs.
    pub cpu_is_64_bit: &'static str,
    /// The maximum number of processors of an emulated machine, if libvirt or QEMU allow fewer than the machine type.
    pub emulated_cpus: Option<u32>,
    /// Debian's packages that depend on the newest kernel, each with the size of the kernel's pages in bytes.
    pub debian_kernels: &'static [(u64, &'static str)],
    /// QEMU's name of a CPU feature that every CPU of the architecture has. The planted fault `cpu-feature` uses this
    /// feature.
    pub baseline_feature: &'static str,
}

impl MachineProfile {
    /// Returns cargo's variable for a setting of this target: `CARGO_TARGET_<TRIPLE>_<SETTING>`.
    pub fn cargo_variable(&self, setting: &str) -> String {
        format!("CARGO_TARGET_{}_{setting}", self.triple.to_uppercase().replace('-', "_"))
    }
}

/// The changes that make QEMU's emulated `max` CPU fast.
#[derive(Debug)]
pub struct TcgCpu {
    /// The features that libvirt's `<cpu>` disables.
    pub disabled_features: &'static [&'static str],
    /// The `-global` properties. `pauth` is one of them, because libvirt 9.0 to 11 does not start a domain that
    /// disables the CPU feature `pauth`.
    pub globals: &'static [Global],
}

/// A value for a property of all devices of one type. QEMU's `-global` sets it: `max-arm-cpu.pauth=off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Global {
    pub driver: &'static str,
    pub property: &'static str,
    pub value: bool,
}

impl Global {
    /// Formats the property and its value without the driver, as `-cpu` expects them.
    pub fn assignment(&self) -> String {
        format!("{}={}", self.property, if self.value { "on" } else { "off" })
    }
}

impl fmt::Display for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.driver, self.assignment())
    }
}

static X86_64: MachineProfile = MachineProfile {
    arch: VmArchitecture::X86_64,
    machine: "x86_64",
    triple: "x86_64-unknown-linux-gnu",
    debian_arch: "amd64",
    emulator: "qemu-system-x86_64",
    machine_type: "q35",
    console: "ttyS0,115200",
    elf_machine: 62, // EM_X86_64
    efi_boot_file: "BOOTX64.EFI",
    systemd_boot_file: "systemd-bootx64.efi",
    grub_file: "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
    multiarch: "x86_64-linux-gnu",
    loader: ("/lib64/", "ld-linux-x86-64.so.2"),
    tcg_cpu: TcgCpu { disabled_features: &[], globals: &[] },
    cpu_aliases: &[],
    firmware_paths: &[
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ],
    flash_bytes: None,
    virtualisation_flags: &["vmx", "svm"],
    strong_memory_order: true,
    cpu_is_64_bit: "lm",
    emulated_cpus: None,
    debian_kernels: &[(4096, "linux-image-amd64")],
    baseline_feature: "fpu",
};

static AARCH64: MachineProfile = MachineProfile {
    arch: VmArchitecture::Aarch64,
    machine: "aarch64",
    triple: "aarch64-unknown-linux-gnu",
    debian_arch: "arm64",
    emulator: "qemu-system-aarch64",
    machine_type: "virt",
    console: "ttyAMA0,115200",
    elf_machine: 183, // EM_AARCH64
    efi_boot_file: "BOOTAA64.EFI",
    systemd_boot_file: "systemd-bootaa64.efi",
    grub_file: "usr/lib/grub/arm64-efi-signed/grubaa64.efi.signed",
    multiarch: "aarch64-linux-gnu",
    loader: ("/lib/", "ld-linux-aarch64.so.1"),
    // The emulation of pointer authentication and of SVE slows down a boot. QEMU's cheaper algorithm for pointer
    // authentication (pauth-impdef) still costs time; xtask/docs/benchmarks.md has the figures. The core of the Pi 5
    // has neither pointer authentication nor SVE.
    tcg_cpu: TcgCpu {
        disabled_features: &["sve"],
        globals: &[Global { driver: "max-arm-cpu", property: "pauth", value: false }],
    },
    cpu_aliases: &[("pi5", "cortex-a76"), ("pi4", "cortex-a72")],
    firmware_paths: &[
        ("/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        ("/usr/share/edk2/aarch64/QEMU_CODE.fd", "/usr/share/edk2/aarch64/QEMU_VARS.fd"),
        ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
        ("/usr/share/qemu/aavmf-aarch64-code.bin", "/usr/share/qemu/aavmf-aarch64-vars.bin"),
    ],
    flash_bytes: Some(64 << 20),
    virtualisation_flags: &[],
    strong_memory_order: false,
    cpu_is_64_bit: "aarch64",
    // libvirt gives an emulated `virt` a GICv2, which has interfaces for 8 processors.
    emulated_cpus: Some(8),
    debian_kernels: &[(4096, "linux-image-arm64"), (16384, "linux-image-arm64-16k")],
    baseline_feature: "aarch64",
};

impl VmArchitecture {
    /// Returns QEMU's name of the CPU that the command line calls `name`: `cortex-a76` for `pi5`.
    pub fn qemu_cpu(self, name: &str) -> &str {
        self.profile().cpu_aliases.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, qemu)| qemu)
    }

    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// Returns the row of the table for this architecture.
    pub fn profile(self) -> &'static MachineProfile {
        match self {
            Self::X86_64 => &X86_64,
            Self::Aarch64 => &AARCH64,
        }
    }

    /// Returns the argument for this architecture.
    pub fn pick<T>(self, x86_64: T, aarch64: T) -> T {
        match self {
            Self::X86_64 => x86_64,
            Self::Aarch64 => aarch64,
        }
    }

    /// Returns this host's architecture, or `None` if it is neither of the two.
    pub fn of_host() -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.profile().machine == std::env::consts::ARCH)
    }
}

impl fmt::Display for VmArchitecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.profile().machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_x86_64_and_each_row_is_its_own() {
        assert_eq!(VmArchitecture::default(), VmArchitecture::X86_64);
        for arch in VmArchitecture::ALL {
            let profile = arch.profile();
            assert_eq!(profile.arch, arch);
            assert!(profile.triple.starts_with(profile.machine), "{}", profile.triple);
            assert_eq!(serde_json::to_string(&arch).unwrap(), format!("{:?}", profile.machine));
            assert_eq!(VmArchitecture::from_str(profile.debian_arch, true), Ok(arch), "alias");
        }
    }
}
