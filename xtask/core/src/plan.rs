//! What was asked, resolved: everything a run needs to know is known here, before anything slow starts.

use std::path::PathBuf;

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::{Accel, MachineArgs};
use crate::error::Failure;
use crate::host::edk2::known_bad;
use crate::host::facts::Facts;
use crate::host::firmware::AarchFirmware;
use crate::host::kvm::Kvm;
use crate::image::Image;
use crate::image::choice::Choice;
use crate::limits::Limits;
use crate::machine::cpu::Cpu;
use crate::machine::{DomainXmlParams, RunFiles, VmSpec};
use anyhow::{Context, Result};

/// A run, resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machine as asked.
    pub spec: VmSpec,
    /// How its instructions run.
    pub accelerator: Accelerator,
    /// Why not the other one.
    pub accelerator_note: Option<String>,
    /// Whether KVM, where it turns out not to run the kernel, gives way to TCG.
    pub may_fall_back: bool,
    /// `--timeout-scale`.
    pub timeout_scale: f64,
    /// The full-system emulator.
    pub emulator: PathBuf,
    /// Its version.
    pub qemu_version: String,
    /// What its `max` CPU knows.
    max_properties: Vec<String>,
    /// The `-global` property that steers around a fault of this firmware with this emulator.
    workaround: Option<&'static str>,
    /// The firmware pair.
    pub firmware: AarchFirmware,
    /// The image.
    pub image: Image,
    /// What is tested where the image's host cannot be reached.
    pub fallback: Option<Image>,
}

impl Plan {
    /// Resolves the machine that was asked for on the machine that there is.
    ///
    /// # Errors
    /// A usage error for a flag that cannot be on this host, A failure of the host for one that this host cannot serve.
    pub fn resolve(
        facts: &Facts,
        arch: VmArchitecture,
        machine: &MachineArgs,
        timeout_scale: f64,
    ) -> Result<Self> {
        let Choice { image, fallback } = Choice::from_args(&machine.image, arch)?;
        let (accelerator, accelerator_note, may_fall_back) = accelerator(machine.accel, arch, &facts.kvm)?;
        let emulator = facts.working_emulator().cloned().context("preflight has seen the emulator")?;
        if let Some(cpu) = &machine.cpu {
            emulator.check_cpu(arch.profile(), accelerator, cpu)?;
        }
        let bad = known_bad(arch.profile().machine, emulator.release(), facts.edk2, "max");
        let firmware = facts.firmware.clone().ok().context("preflight has seen the firmware")?;
        Ok(Self {
            spec: VmSpec::from_args(arch, machine),
            accelerator,
            accelerator_note,
            may_fall_back,
            timeout_scale,
            emulator: emulator.path,
            qemu_version: emulator.version,
            max_properties: emulator.max_properties,
            workaround: bad.and_then(|bad| bad.global),
            firmware,
            image,
            fallback,
        })
    }

    /// The CPU under the accelerator in use.
    pub fn cpu(&self) -> Cpu {
        let cpu = Cpu::resolve(self.spec.architecture, self.accelerator, self.spec.cpu.as_deref());
        match self.accelerator {
            Accelerator::Tcg => cpu.adjusted(&self.max_properties, self.workaround),
            Accelerator::Kvm => cpu,
        }
    }

    /// The domain of this plan, with these files.
    pub fn domain(&self, files: &RunFiles) -> DomainXmlParams {
        let firmware = Some(&self.firmware);
        DomainXmlParams::resolve(&self.spec, self.accelerator, self.cpu(), &self.emulator, firmware, files)
    }

    /// The limits of the accelerator in use.
    pub fn limits(&self) -> Limits {
        Limits::new(self.accelerator, self.timeout_scale)
    }

    /// From KVM to emulation, with the reason.
    pub fn fall_back(&mut self, reason: &str) {
        self.accelerator = Accelerator::Tcg;
        self.accelerator_note = Some(reason.to_owned());
        self.may_fall_back = false;
    }

    /// What makes the times of two runs comparable.
    pub fn kind(&self) -> String {
        let spec = &self.spec;
        let cpu = spec.cpu.as_deref().unwrap_or("default");
        let size = format!("{}x{}", spec.vcpus, spec.memory_mib);
        format!("{}-{}-{cpu}-{size}-{}", spec.architecture, self.accelerator, self.image.name)
    }
}

#[cfg(test)]
impl Plan {
    /// An emulated machine of a host that has this emulator and this firmware.
    pub(crate) fn of_test(arch: VmArchitecture, emulator: PathBuf, firmware: AarchFirmware) -> Self {
        let image = crate::image::catalogue::Catalogue::built_in().find("debian-12", arch).unwrap();
        Self {
            spec: VmSpec::new(crate::machine::DOMAIN_NAME, arch),
            accelerator: Accelerator::Tcg,
            accelerator_note: None,
            may_fall_back: false,
            timeout_scale: 1.0,
            emulator,
            qemu_version: "7.2.22".to_owned(),
            max_properties: ["pauth", "sve"].map(str::to_owned).to_vec(),
            workaround: None,
            firmware,
            image,
            fallback: None,
        }
    }

    /// With other properties of `max`, and another way around a fault of the firmware.
    pub(crate) fn with_emulators(
        mut self,
        max_properties: &[&str],
        workaround: Option<&'static str>,
    ) -> Self {
        self.max_properties = max_properties.iter().map(ToString::to_string).collect();
        self.workaround = workaround;
        self
    }
}

/// The accelerator, why not the other one, and whether KVM gives way where it fails.
///
/// # Errors
/// As [`Plan::resolve`], for `--accel`.
pub fn accelerator(
    asked: Accel,
    arch: VmArchitecture,
    kvm: &Kvm,
) -> Result<(Accelerator, Option<String>, bool)> {
    match asked {
        Accel::Tcg => Ok((Accelerator::Tcg, Some("--accel tcg".to_owned()), false)),
        Accel::Auto => match kvm.against() {
            None => Ok((Accelerator::Kvm, None, true)),
            Some(reason) => Ok((Accelerator::Tcg, Some(reason.to_owned()), false)),
        },
        Accel::Kvm if VmArchitecture::of_host() != Some(arch) => Err(Failure::usage(format!(
            "--accel kvm: the host is {} and the guest {arch}; leave --accel out",
            std::env::consts::ARCH
        ))
        .into()),
        // Whoever asks for it by name wants it tried again.
        Accel::Kvm if kvm.opens() => Ok((Accelerator::Kvm, None, false)),
        Accel::Kvm => Err(Failure::host(
            format!("--accel kvm: {}", kvm.against().unwrap_or_default()),
            "leave out --accel to have the guest emulated",
        )
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
        let failed = Kvm::Failed("it never ran a kernel".into());
        let absent = Kvm::Absent("no /dev/kvm".into());
        let lies = Kvm::Software("neither vmx nor svm".into());
        let is = |asked, arch, kvm: &Kvm| accelerator(asked, arch, kvm);
        assert_eq!(is(Accel::Auto, host, &Kvm::Opens).unwrap(), (Accelerator::Kvm, None, true));
        let (accelerator, note, _) = is(Accel::Auto, host, &failed).unwrap();
        assert_eq!((accelerator, note.unwrap().as_str()), (Accelerator::Tcg, "it never ran a kernel"));
        assert_eq!(is(Accel::Tcg, host, &Kvm::Opens).unwrap().0, Accelerator::Tcg);
        assert_eq!(crate::error::code(&is(Accel::Kvm, foreign, &absent).unwrap_err()), 2);
        assert_eq!(crate::error::code(&is(Accel::Kvm, host, &absent).unwrap_err()), 69);
        assert_eq!(is(Accel::Auto, host, &lies).unwrap().0, Accelerator::Tcg);
        assert_eq!(is(Accel::Kvm, host, &lies).unwrap().0, Accelerator::Kvm);
        assert_eq!(crate::error::code(&is(Accel::Kvm, host, &absent).unwrap_err()), 69);
        assert_eq!(is(Accel::Kvm, host, &failed).unwrap().0, Accelerator::Kvm);
        assert!(!is(Accel::Kvm, host, &Kvm::Opens).unwrap().2, "a KVM that was asked for is not replaced");
    }
}
