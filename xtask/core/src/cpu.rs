//! The CPU of the guest, in libvirt's notation and in QEMU's.

use crate::arch::{Accelerator, Global, VmArchitecture};

/// A CPU with all settings resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// The mode and model for libvirt.
    pub model: CpuModel,
    /// The features that are disabled.
    pub disabled_features: Vec<String>,
    /// The QEMU `-global` properties for settings that libvirt refuses in `<cpu>`.
    pub globals: Vec<Global>,
}

/// The mode of libvirt's `<cpu>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuModel {
    /// `maximum`: every feature that the emulator supports.
    Maximum,
    /// `host-passthrough`: the host's CPU.
    HostPassthrough,
    /// `custom`, with QEMU's name of the model.
    Named(String),
}

impl CpuModel {
    /// Returns the model that `--cpu` requests. If `--cpu` is not given, the result is the model that is fastest under
    /// the accelerator. The value `host` means the host's CPU only under KVM. Under emulation, `host` is returned as
    /// the name of a model. No emulator has such a model, so a later check refuses the name.
    pub fn requested(arch: VmArchitecture, accelerator: Accelerator, requested: Option<&str>) -> Self {
        match (requested, accelerator) {
            (None | Some("host"), Accelerator::Kvm) => Self::HostPassthrough,
            (None, Accelerator::Tcg) | (Some("max"), _) => Self::Maximum,
            (Some(name), _) => Self::Named(arch.qemu_cpu(name).to_owned()),
        }
    }

    /// Returns QEMU's name of the model.
    pub fn name(&self) -> &str {
        match self {
            Self::Maximum => "max",
            Self::HostPassthrough => "host",
            Self::Named(name) => name,
        }
    }
}

impl Cpu {
    /// Returns the CPU that `--cpu` requests. In the emulated `max`, the features that make it slow are disabled.
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

    /// Adjusts the emulated `max` to an emulator that has the properties `known`. Settings of other properties are
    /// removed, because the emulator would refuse them. `workaround` is a setting that avoids a known fault of the
    /// firmware; it is added.
    pub fn adjusted(mut self, known: &[String], workaround: Option<Global>) -> Self {
        if self.model == CpuModel::Maximum {
            let is_known = |name: &str| known.iter().any(|known| known == name);
            self.globals.retain(|global| is_known(global.property));
            self.disabled_features.retain(|feature| is_known(feature));
            self.globals.extend(workaround);
        }
        self
    }

    /// Formats the CPU as an argument of QEMU's `-cpu`, for the report.
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
