//! Which CPU the guest sees, in libvirt's words and QEMU's.

use crate::arch::{Accelerator, Global, VmArchitecture};

/// A resolved CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// libvirt's mode and model.
    pub model: CpuModel,
    /// Features switched off.
    pub disabled_features: Vec<String>,
    /// QEMU `-global` properties, for what libvirt refuses in `<cpu>`.
    pub globals: Vec<Global>,
}

/// libvirt's `<cpu mode>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuModel {
    /// `maximum`: everything that the emulator has.
    Maximum,
    /// `host-passthrough`.
    HostPassthrough,
    /// `custom`, with QEMU's name.
    Named(String),
}

impl CpuModel {
    /// What `--cpu` means; without it, the fastest model that the accelerator has. `host` without KVM is no model, and
    /// stays a name that no emulator has.
    pub fn requested(arch: VmArchitecture, accelerator: Accelerator, requested: Option<&str>) -> Self {
        match (requested, accelerator) {
            (None | Some("host"), Accelerator::Kvm) => Self::HostPassthrough,
            (None, Accelerator::Tcg) | (Some("max"), _) => Self::Maximum,
            (Some(name), _) => Self::Named(arch.qemu_cpu(name).to_owned()),
        }
    }

    /// As QEMU calls it.
    pub fn name(&self) -> &str {
        match self {
            Self::Maximum => "max",
            Self::HostPassthrough => "host",
            Self::Named(name) => name,
        }
    }
}

impl Cpu {
    /// The CPU that `--cpu` requests. The emulated `max` lacks what makes it slow.
    pub fn resolve(arch: VmArchitecture, accelerator: Accelerator, requested: Option<&str>) -> Self {
        let model = CpuModel::requested(arch, accelerator, requested);
        let tuned = &arch.profile().tcg_cpu;
        let (features, globals) = match (&model, accelerator) {
            (CpuModel::Maximum, Accelerator::Tcg) => (tuned.disabled_features, tuned.globals),
            _ => Default::default(),
        };
        let disabled_features = features.iter().map(ToString::to_string).collect();
        Self { model, disabled_features, globals: globals.to_vec() }
    }

    /// The emulated `max` without the properties that this emulator does not know, which it would refuse, and with what steers
    /// around a fault of its firmware.
    pub fn adjusted(mut self, known: &[String], workaround: Option<Global>) -> Self {
        if self.model == CpuModel::Maximum {
            let is_known = |name: &str| known.iter().any(|known| known == name);
            self.globals.retain(|global| is_known(global.property));
            self.disabled_features.retain(|feature| is_known(feature));
            self.globals.extend(workaround);
        }
        self
    }

    /// As one would write it for QEMU's `-cpu`, for the report.
    pub fn describe(&self) -> String {
        let globals = self.globals.iter().map(|global| format!(",{}", global.assignment()));
        let features = self.disabled_features.iter().map(|feature| format!(",{feature}=off"));
        self.model.name().to_owned() + &globals.chain(features).collect::<String>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LPA2: Global = Global { driver: "max-arm-cpu", property: "lpa2", value: false };

    #[test]
    fn what_an_emulator_does_not_know_it_is_not_told() {
        let tuned = || Cpu::resolve(VmArchitecture::Aarch64, Accelerator::Tcg, None);
        let known = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let all = known(&["pauth", "sve"]);
        assert_eq!(tuned().adjusted(&all, None), tuned());
        assert_eq!(tuned().adjusted(&known(&["sve"]), None).describe(), "max,sve=off");
        let steered = tuned().adjusted(&all, Some(LPA2)).describe();
        assert_eq!(steered, "max,pauth=off,lpa2=off,sve=off");
        let named = Cpu::resolve(VmArchitecture::Aarch64, Accelerator::Tcg, Some("pi5"));
        assert_eq!(named.clone().adjusted(&[], Some(LPA2)), named);
    }

    #[test]
    fn every_combination_resolves_to_what_qemu_is_told() {
        use Accelerator::{Kvm, Tcg};
        use VmArchitecture::{Aarch64, X86_64};
        for (arch, accelerator, requested, expected) in [
            (Aarch64, Tcg, None, "max,pauth=off,sve=off"),
            (Aarch64, Tcg, Some("max"), "max,pauth=off,sve=off"),
            (Aarch64, Tcg, Some("pi5"), "cortex-a76"),
            (Aarch64, Tcg, Some("neoverse-n1"), "neoverse-n1"),
            (Aarch64, Kvm, None, "host"),
            (X86_64, Tcg, None, "max"),
            (X86_64, Kvm, None, "host"),
            (X86_64, Kvm, Some("Nehalem"), "Nehalem"),
        ] {
            assert_eq!(Cpu::resolve(arch, accelerator, requested).describe(), expected);
        }
    }
}
