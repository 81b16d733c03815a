//! What was asked, resolved: everything a run needs to know is known here, before anything slow starts.

use std::path::PathBuf;

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::Accel;
use crate::cpu::Cpu;
use crate::error::Failure;
use crate::host::facts::Facts;
use crate::host::firmware::AarchFirmware;
use crate::host::kvm::Kvm;
use crate::image::Image;
use crate::image::choice::Choice;
use crate::limits::Limits;
use crate::machine::{DomainXmlParams, RunFiles, VmSpec};
use anyhow::{Context, Result};

/// A run, resolved. It never changes: another accelerator or image makes another plan.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machine as it was asked for.
    pub spec: VmSpec,
    pub acceleration: Acceleration,
    /// The CPU under the accelerator in use.
    pub cpu: Cpu,
    /// The CPU that the same machine has if it is emulated.
    pub emulated_cpu: Cpu,
    /// The limits of the accelerator in use, with `--timeout-scale`.
    pub limits: Limits,
    /// The full-system emulator.
    pub emulator: PathBuf,
    pub qemu_version: String,
    pub firmware: AarchFirmware,
    pub image: Image,
    /// What is tested where the image's host cannot be reached.
    pub fallback: Option<Image>,
}

/// The accelerator, and what speaks for or against the other one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acceleration {
    /// `may_fall_back`: a KVM that turns out not to run the kernel gives way to emulation.
    Kvm { may_fall_back: bool },
    /// `why` says why it is not KVM.
    Tcg { why: String },
}

impl Acceleration {
    /// Chooses as `--accel` says; without it, KVM if the host's runs this guest's kernel.
    ///
    /// # Errors
    /// A usage error for KVM and a guest of another architecture; a failure of the host where there is no KVM.
    pub fn choose(asked: Accel, arch: VmArchitecture, kvm: &Kvm) -> Result<Self, Failure> {
        let tcg = |why: &str| Ok(Self::Tcg { why: why.to_owned() });
        match (asked, kvm.against()) {
            (Accel::Tcg, _) => tcg("--accel tcg"),
            (Accel::Auto, Some(reason)) => tcg(reason),
            (Accel::Auto, None) => Ok(Self::Kvm { may_fall_back: true }),
            (Accel::Kvm, _) if VmArchitecture::of_host() != Some(arch) => Err(Failure::usage(format!(
                "--accel kvm: the host is {} and the guest {arch}; leave --accel out",
                std::env::consts::ARCH
            ))),
            // KVM that is asked for by name is tried again even if it has failed before.
            (Accel::Kvm, _) if kvm.opens() => Ok(Self::Kvm { may_fall_back: false }),
            (Accel::Kvm, reason) => Err(Failure::host(
                format!("--accel kvm: {}", reason.unwrap_or_default()),
                "leave out --accel to have the guest emulated",
            )),
        }
    }

    pub fn accelerator(&self) -> Accelerator {
        match self {
            Self::Kvm { .. } => Accelerator::Kvm,
            Self::Tcg { .. } => Accelerator::Tcg,
        }
    }
}

impl Plan {
    /// Resolves the machine that was asked for on the host that `facts` describe.
    ///
    /// # Errors
    /// As [`Plan::check_flags`].
    pub fn resolve(facts: &Facts, timeout_scale: f64) -> Result<Self> {
        let acceleration = Self::check_flags(facts)?;
        let emulator = facts
            .working_emulator()
            .cloned()
            .context("resolve the plan: preflight found no working emulator")?;
        let firmware =
            facts.firmware.clone().ok().context("resolve the plan: preflight found no firmware")?;
        let spec = VmSpec::from_args(facts.arch, &facts.guest.machine);
        let cpu = |accelerator| Cpu::resolve(spec.architecture, accelerator, spec.cpu.as_deref());
        let workaround = facts.known_bad().and_then(|bad| bad.global);
        let emulated_cpu = cpu(Accelerator::Tcg).adjusted(&emulator.max_properties, workaround);
        let accelerator = acceleration.accelerator();
        let Choice { image, fallback } = facts.guest.choice.clone();
        Ok(Self {
            cpu: match accelerator {
                Accelerator::Kvm => cpu(Accelerator::Kvm),
                Accelerator::Tcg => emulated_cpu.clone(),
            },
            emulated_cpu,
            limits: Limits::new(accelerator, timeout_scale),
            spec,
            acceleration,
            emulator: emulator.path,
            qemu_version: emulator.version,
            firmware,
            image,
            fallback,
        })
    }

    /// Refuses an accelerator or a CPU model that this host does not have; else the accelerator.
    ///
    /// # Errors
    /// A usage error for flags that contradict each other, a failure of the host for what it lacks.
    pub fn check_flags(facts: &Facts) -> Result<Acceleration, Failure> {
        let machine = &facts.guest.machine;
        let acceleration = Acceleration::choose(machine.accel, facts.arch, &facts.kvm)?;
        if let (Some(emulator), Some(cpu)) = (facts.working_emulator(), &machine.cpu) {
            emulator.check_cpu(facts.arch, acceleration.accelerator(), cpu)?;
        }
        Ok(acceleration)
    }

    /// The same run, emulated for this reason.
    pub fn under_tcg(&self, why: &str) -> Self {
        Self {
            acceleration: Acceleration::Tcg { why: why.to_owned() },
            cpu: self.emulated_cpu.clone(),
            limits: self.limits.under_tcg(),
            ..self.clone()
        }
    }

    /// The same run with another image, which has no fallback.
    pub fn with_image(&self, image: Image) -> Self {
        Self { image, fallback: None, ..self.clone() }
    }

    pub fn accelerator(&self) -> Accelerator {
        self.acceleration.accelerator()
    }

    /// Why the guest is emulated, where it is.
    pub fn accelerator_note(&self) -> Option<&str> {
        match &self.acceleration {
            Acceleration::Kvm { .. } => None,
            Acceleration::Tcg { why } => Some(why),
        }
    }

    /// Whether it runs under KVM that gives way to emulation where it fails.
    pub fn may_fall_back(&self) -> bool {
        self.acceleration == Acceleration::Kvm { may_fall_back: true }
    }

    /// The domain of this plan, with these files.
    pub fn domain(&self, files: &RunFiles) -> DomainXmlParams {
        DomainXmlParams {
            spec: self.spec.clone(),
            accelerator: self.accelerator(),
            cpu: self.cpu.clone(),
            emulator: self.emulator.clone(),
            firmware: Some(self.firmware.clone()),
            files: files.clone(),
        }
    }

    /// What makes the times of two runs comparable.
    pub fn kind(&self) -> String {
        let spec = &self.spec;
        let cpu = spec.cpu.as_deref().unwrap_or("default");
        let size = format!("{}x{}", spec.vcpus, spec.memory_mib);
        format!("{}-{}-{cpu}-{size}-{}", spec.architecture, self.accelerator(), self.image.name)
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
        let is = Acceleration::choose;
        let kvm = |may_fall_back| Acceleration::Kvm { may_fall_back };
        let tcg = |why: &str| Acceleration::Tcg { why: why.to_owned() };
        assert_eq!(is(Accel::Auto, host, &Kvm::Opens).unwrap(), kvm(true));
        assert_eq!(is(Accel::Auto, host, &failed).unwrap(), tcg("it never ran a kernel"));
        assert_eq!(is(Accel::Tcg, host, &Kvm::Opens).unwrap(), tcg("--accel tcg"));
        assert_eq!(is(Accel::Kvm, foreign, &absent).unwrap_err().kind.exit_code(), 2);
        assert_eq!(is(Accel::Kvm, host, &absent).unwrap_err().kind.exit_code(), 69);
        assert_eq!(is(Accel::Auto, host, &lies).unwrap(), tcg("neither vmx nor svm"));
        assert_eq!(is(Accel::Kvm, host, &lies).unwrap(), kvm(false));
        assert_eq!(is(Accel::Kvm, host, &failed).unwrap(), kvm(false));
        assert_eq!(is(Accel::Kvm, host, &Kvm::Opens).unwrap(), kvm(false), "what was asked for stays");
    }

    #[test]
    fn a_plan_that_falls_back_has_the_cpu_and_the_limits_of_emulation() {
        let mut facts = crate::preflight::findings::tests::sound();
        (facts.arch, facts.kvm) = (VmArchitecture::Aarch64, Kvm::Opens);
        let plan = Plan::resolve(&facts, 1.0).unwrap();
        assert_eq!((plan.cpu.describe().as_str(), plan.accelerator_note()), ("host", None));
        assert!(plan.may_fall_back());
        let emulated = plan.under_tcg("it hangs");
        assert_eq!(emulated.cpu.describe(), "max,pauth=off,sve=off");
        assert_eq!((emulated.accelerator_note(), emulated.may_fall_back()), (Some("it hangs"), false));
        assert_eq!(emulated.limits.boot(), plan.limits.boot() * 3);
    }
}
