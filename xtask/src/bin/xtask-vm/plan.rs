//! What was asked, resolved: everything a run needs to know is known here, before anything slow starts.

use std::path::PathBuf;

use anyhow::{Context, Result};
use xtask::arch::{Accelerator, VmArchitecture};
use xtask::cli::{Accel, MachineArgs};
use xtask::domain::VmSpec;
use xtask::exit::{Unavailable, Usage};
use xtask::host::facts::Facts;
use xtask::host::firmware::Firmware;
use xtask::host::kvm::Kvm;
use xtask::host::qemu;
use xtask::image::{self, Boot, DEFAULT_IMAGE, Image};
use xtask::limits::Limits;

/// A run, resolved.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The machine as asked.
    pub(crate) spec: VmSpec,
    /// How its instructions run.
    pub(crate) accelerator: Accelerator,
    /// Why not the other one.
    pub(crate) accelerator_note: Option<String>,
    /// Whether KVM, where it turns out not to run the kernel, gives way to TCG.
    pub(crate) may_fall_back: bool,
    /// `--timeout-scale`.
    pub(crate) timeout_scale: f64,
    /// The full-system emulator.
    pub(crate) emulator: PathBuf,
    /// Its version.
    pub(crate) qemu_version: String,
    /// The firmware pair, where the image boots by UEFI.
    pub(crate) firmware: Option<Firmware>,
    /// The image.
    pub(crate) image: Image,
}

impl Plan {
    /// Resolves the machine that was asked for on the machine that there is.
    pub(crate) fn resolve(
        facts: &Facts,
        arch: VmArchitecture,
        machine: &MachineArgs,
        timeout_scale: f64,
    ) -> Result<Self> {
        let image = image::find(machine.image.as_deref().unwrap_or(DEFAULT_IMAGE), arch)?;
        let (accelerator, accelerator_note, may_fall_back) = accelerator(machine.accel, arch, &facts.kvm)?;
        let (emulator, version) = facts.emulator.clone().context("preflight has seen the emulator")?;
        if let Some(cpu) = &machine.cpu {
            qemu::check_cpu(&emulator, arch.profile(), accelerator, cpu)?;
        }
        let firmware = match image.boot {
            Boot::Uefi => Some(facts.firmware.clone().map_err(anyhow::Error::msg)?),
        };
        Ok(Self {
            spec: VmSpec::from_args(arch, machine),
            accelerator,
            accelerator_note,
            may_fall_back,
            timeout_scale,
            emulator,
            qemu_version: version.map_err(anyhow::Error::msg)?,
            firmware,
            image,
        })
    }

    /// The limits of the accelerator in use.
    pub(crate) fn limits(&self) -> Limits {
        Limits::new(self.accelerator, self.timeout_scale)
    }

    /// From KVM to emulation, with the reason.
    pub(crate) fn fall_back(&mut self, reason: &str) {
        self.accelerator = Accelerator::Tcg;
        self.accelerator_note = Some(reason.to_owned());
        self.may_fall_back = false;
    }

    /// What makes the times of two runs comparable.
    pub(crate) fn kind(&self) -> String {
        let cpu = self.spec.cpu.as_deref().unwrap_or("default");
        format!("{}-{}-{cpu}-{}", self.spec.architecture, self.accelerator, self.image.name)
    }
}

fn accelerator(asked: Accel, arch: VmArchitecture, kvm: &Kvm) -> Result<(Accelerator, Option<String>, bool)> {
    match (asked, kvm) {
        (Accel::Tcg, _) => Ok((Accelerator::Tcg, Some("--accel tcg".to_owned()), false)),
        (Accel::Auto, Kvm::Opens) => Ok((Accelerator::Kvm, None, true)),
        (Accel::Auto, Kvm::No(reason)) => Ok((Accelerator::Tcg, Some(reason.clone()), false)),
        (Accel::Kvm, _) if VmArchitecture::of_host() != Some(arch) => Err(Usage(format!(
            "--accel kvm: the host is {} and the guest {arch}; leave --accel out",
            std::env::consts::ARCH
        ))
        .into()),
        (Accel::Kvm, Kvm::Opens) => Ok((Accelerator::Kvm, None, false)),
        (Accel::Kvm, Kvm::No(reason)) => Err(Unavailable {
            error: format!("--accel kvm: {reason}"),
            hint: "leave --accel out: the guest is then emulated".to_owned(),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accelerator_follows_the_flag_and_the_host() {
        let host = VmArchitecture::of_host().unwrap();
        let foreign = VmArchitecture::ALL.into_iter().find(|arch| *arch != host).unwrap();
        let broken = Kvm::No("it never ran a kernel".into());
        let is = |asked, arch, kvm: &Kvm| accelerator(asked, arch, kvm);
        assert_eq!(is(Accel::Auto, host, &Kvm::Opens).unwrap(), (Accelerator::Kvm, None, true));
        let (accelerator, note, _) = is(Accel::Auto, host, &broken).unwrap();
        assert_eq!((accelerator, note.unwrap().as_str()), (Accelerator::Tcg, "it never ran a kernel"));
        assert_eq!(is(Accel::Tcg, host, &Kvm::Opens).unwrap().0, Accelerator::Tcg);
        assert_eq!(xtask::exit::code(&is(Accel::Kvm, foreign, &broken).unwrap_err()), 2);
        assert_eq!(xtask::exit::code(&is(Accel::Kvm, host, &broken).unwrap_err()), 69);
        assert!(!is(Accel::Kvm, host, &Kvm::Opens).unwrap().2, "a KVM that was asked for is not replaced");
    }
}
