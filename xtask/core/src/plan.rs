//! The plan of a run. It is made from the flags and the facts about the host, before anything slow starts.

use std::path::PathBuf;
use std::time::Duration;

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::{Accel, PlaceArgs};
use crate::cpu::Cpu;
use crate::error::Failure;
use crate::host::facts::Facts;
use crate::host::firmware::AarchFirmware;
use crate::host::kvm::{Candidate, Kvm};
use crate::image::Image;
use crate::image::choice::Choice;
use crate::limits::Limits;
use crate::machine::proxies::Proxies;
use crate::machine::{DomainXmlParams, RunFiles, VmSpec};
use crate::preflight::remote::{ConnectionOffer, accelerator};
use anyhow::{Context, Result};

/// The resolved options of a run. A plan is never changed. If the run needs another accelerator or image, it makes
/// another plan.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machine as requested.
    pub spec: VmSpec,
    pub acceleration: Acceleration,
    /// The CPU for the accelerator in use.
    pub cpu: Cpu,
    /// The CPU of the same machine under emulation.
    pub emulated_cpu: Cpu,
    /// The limits for the accelerator in use, scaled by `--timeout-scale`.
    pub limits: Limits,
    pub emulator: PathBuf,
    pub qemu_version: String,
    /// The firmware of this host; `None` if the daemon of `place` selects firmware of its host.
    pub firmware: Option<AarchFirmware>,
    /// The libvirt that runs the guest.
    pub place: PlaceArgs,
    /// The architecture of the host that runs the guest; `None` if it is neither of the two.
    pub host: Option<VmArchitecture>,
    /// The proxies of this host, which the guest uses, too.
    pub proxies: Proxies,
    pub image: Image,
    /// The image that is tested if the host of `image` cannot be reached.
    pub fallback: Option<Image>,
}

/// The accelerator of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acceleration {
    /// KVM. If `may_fall_back` is true and KVM does not run the guest's kernel, the run continues under emulation.
    Kvm { may_fall_back: bool },
    /// Emulation; `why` is the reason why KVM is not used.
    Tcg { why: String },
}

impl Acceleration {
    /// Returns the accelerator that `--accel` requests. With `--accel auto`, the result is KVM, unless `kvm` has a
    /// reason against KVM.
    ///
    /// # Errors
    /// Returns a usage error if KVM is requested for a guest of another architecture. Returns a failure of the host if
    /// KVM is requested and not available.
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
            // `--accel kvm` tries KVM even if an earlier run has recorded a failure of KVM.
            (Accel::Kvm, _) if kvm.opens() => Ok(Self::Kvm { may_fall_back: false }),
            (Accel::Kvm, reason) => Err(Failure::host(
                format!("--accel kvm: {}", reason.unwrap_or_default()),
                "leave out --accel to emulate the guest",
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
    /// Returns the plan for the guest and the host that `facts` describe.
    ///
    /// # Errors
    /// Returns the errors of [`Plan::check_flags`]. Also returns an error if the facts contain no working emulator or
    /// no firmware.
    pub fn resolve(facts: &Facts, timeout_scale: f64) -> Result<Self> {
        let acceleration = Self::check_flags(facts)?;
        let emulator = facts
            .working_emulator()
            .cloned()
            .context("resolve the plan: preflight found no working emulator")?;
        let firmware =
            facts.firmware.clone().ok().context("resolve the plan: preflight found no firmware")?;
        let place = PlaceArgs::default();
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
            firmware: Some(firmware),
            place,
            host: VmArchitecture::of_host(),
            proxies: Proxies::from_env(),
            image,
            fallback,
        })
    }

    /// Checks that this host has the requested accelerator, CPU model and processors, and returns the accelerator.
    ///
    /// # Errors
    /// Returns a usage error if KVM is requested for a guest of another architecture, or if the emulator lacks the
    /// requested CPU model or allows fewer processors. Returns a failure of the host if KVM is requested and not
    /// available.
    pub fn check_flags(facts: &Facts) -> Result<Acceleration, Failure> {
        let machine = &facts.guest.machine;
        let acceleration = Acceleration::choose(machine.accel, facts.arch, &facts.kvm)?;
        if let Some(emulator) = facts.working_emulator() {
            emulator.check(facts.arch, acceleration.accelerator(), machine)?;
        }
        Ok(acceleration)
    }

    /// Returns the plan for a guest on the libvirt daemon of `place`, whose answer is `offer`. The image is chosen by
    /// the facts about this host.
    ///
    /// # Errors
    /// Returns an error if the daemon runs no guests of this architecture, or if their features are not known.
    pub fn on_daemon(
        facts: &Facts,
        offer: &ConnectionOffer,
        place: &PlaceArgs,
        timeout_scale: f64,
    ) -> Result<Self> {
        const UNKNOWN: &str = "resolve the plan: libvirt has not described its guests";
        let (machine, arch) = (&facts.guest.machine, facts.arch);
        let (guest, domain) = (offer.guest(arch).context(UNKNOWN)?, offer.domain(arch).context(UNKNOWN)?);
        let is_here = is_on_this_host(place);
        let acceleration = match accelerator(machine.accel, guest) {
            Accelerator::Kvm if machine.accel == Accel::Auto && is_here && facts.kvm.against().is_some() => {
                Acceleration::Tcg { why: facts.kvm.against().unwrap_or_default().to_owned() }
            }
            Accelerator::Kvm => Acceleration::Kvm { may_fall_back: machine.accel == Accel::Auto },
            Accelerator::Tcg if machine.accel == Accel::Tcg => {
                Acceleration::Tcg { why: "--accel tcg".to_owned() }
            }
            Accelerator::Tcg => {
                Acceleration::Tcg { why: format!("that libvirt has no KVM for {arch} guests") }
            }
        };
        let spec = VmSpec::from_args(arch, machine);
        let cpu = |accelerator| Cpu::resolve(arch, accelerator, spec.cpu.as_deref());
        let version = offer.hypervisor.as_deref().unwrap_or_default();
        let Choice { image, fallback } = facts.guest.choice.clone();
        Ok(Self {
            cpu: cpu(acceleration.accelerator()),
            emulated_cpu: cpu(Accelerator::Tcg),
            limits: Limits::new(acceleration.accelerator(), timeout_scale),
            spec,
            acceleration,
            emulator: domain.emulator.clone().into(),
            qemu_version: version.trim_start_matches("QEMU ").to_owned(),
            firmware: None,
            place: place.clone(),
            host: offer.node.as_ref().ok().and_then(|node| {
                VmArchitecture::ALL.into_iter().find(|arch| arch.profile().machine == node.machine)
            }),
            proxies: Proxies::default(),
            image,
            fallback,
        })
    }

    /// Returns whether the guest runs on this host. Only then may a failure of KVM be recorded, because the record is
    /// about this host.
    pub fn is_here(&self) -> bool {
        is_on_this_host(&self.place)
    }

    /// Returns the firmware of this host.
    ///
    /// # Errors
    /// Returns an error if the guest runs on a libvirt daemon, which selects firmware of its host.
    pub fn own_firmware(&self) -> Result<&AarchFirmware> {
        self.firmware.as_ref().context("this host's firmware is not used on a libvirt daemon")
    }

    /// Returns the plan of the same run under emulation; `why` is the reason.
    pub fn under_tcg(&self, why: &str) -> Self {
        Self {
            acceleration: Acceleration::Tcg { why: why.to_owned() },
            cpu: self.emulated_cpu.clone(),
            limits: self.limits.under_tcg(),
            ..self.clone()
        }
    }

    /// Returns the plan of the same run with another image and without a fallback.
    pub fn with_image(&self, image: Image) -> Self {
        Self { image, fallback: None, ..self.clone() }
    }

    pub fn accelerator(&self) -> Accelerator {
        self.acceleration.accelerator()
    }

    /// Returns the machine under whose name a failure of KVM is recorded.
    pub fn kvm_candidate(&self) -> Candidate<'_> {
        let VmSpec { architecture, cpu, .. } = &self.spec;
        Candidate { arch: *architecture, cpu: cpu.as_deref(), image: &self.image.name }
    }

    /// Returns the reason why the guest is emulated, or `None` under KVM.
    pub fn accelerator_note(&self) -> Option<&str> {
        match &self.acceleration {
            Acceleration::Kvm { .. } => None,
            Acceleration::Tcg { why } => Some(why),
        }
    }

    /// Returns whether the run uses KVM and may continue under emulation if KVM fails.
    pub fn may_fall_back(&self) -> bool {
        self.acceleration == Acceleration::Kvm { may_fall_back: true }
    }

    /// Returns the limit until the guest has installed the agent. In the first boot of a downloaded image or of a file
    /// of the user, the guest also installs podman.
    pub fn provision_limit(&self, is_first_boot: bool) -> Duration {
        let installs = is_first_boot && !self.image.is_built();
        self.limits.provision() + if installs { self.limits.packages() } else { Duration::ZERO }
    }

    /// Returns the domain of this plan with these files.
    pub fn domain(&self, files: &RunFiles) -> DomainXmlParams {
        DomainXmlParams {
            spec: self.spec.clone(),
            accelerator: self.accelerator(),
            cpu: self.cpu.clone(),
            emulator: self.emulator.clone(),
            firmware: self.firmware.clone(),
            files: files.clone(),
            daemon: None,
        }
    }

    /// Returns a name that is the same for all runs whose durations are comparable.
    pub fn kind(&self) -> String {
        let spec = &self.spec;
        let cpu = spec.cpu.as_deref().unwrap_or("default");
        let size = format!("{}x{}", spec.vcpus, spec.memory_mib);
        let kind = format!("{}-{}-{cpu}-{size}-{}", spec.architecture, self.accelerator(), self.image.name);
        match &self.place.connect {
            None => kind,
            Some(uri) => {
                format!("{kind}-on-{uri}").replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_")
            }
        }
    }
}

fn is_on_this_host(place: &PlaceArgs) -> bool {
    place.connect.as_ref().is_none_or(|uri| uri.destination.is_none())
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
        assert_eq!(is(Accel::Kvm, host, &Kvm::Opens).unwrap(), kvm(false), "an explicit choice is kept");
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

    #[test]
    fn a_first_boot_of_a_downloaded_image_has_time_for_packages() {
        let plan = Plan::resolve(&crate::preflight::findings::tests::sound(), 1.0).unwrap();
        let built = plan.with_image(plan.fallback.clone().unwrap());
        let limits = [(&plan, true), (&plan, false), (&built, true)]
            .map(|(plan, is_first_boot)| plan.provision_limit(is_first_boot).as_secs());
        assert_eq!(limits, [400, 100, 100]);
    }
}
