//! Which CPU the guest sees, in libvirt's words and QEMU's.

use crate::arch::{Accelerator, VmArchitecture};

/// A resolved CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// libvirt's mode and model.
    pub model: CpuModel,
    /// Features switched off.
    pub disabled_features: Vec<String>,
    /// QEMU `-global` properties, for what libvirt refuses in `<cpu>`.
    pub globals: Vec<String>,
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

impl Cpu {
    /// `requested` is `--cpu`; without it the fastest that the accelerator has.
    pub fn resolve(arch: VmArchitecture, accelerator: Accelerator, requested: Option<&str>) -> Self {
        let plain = |model| Self { model, disabled_features: Vec::new(), globals: Vec::new() };
        match (requested, accelerator) {
            (None | Some("host"), Accelerator::Kvm) => plain(CpuModel::HostPassthrough),
            (None | Some("max"), Accelerator::Tcg) => {
                let tuned = &arch.profile().tcg_cpu;
                let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
                Self {
                    model: CpuModel::Maximum,
                    disabled_features: owned(tuned.disabled_features),
                    globals: owned(tuned.globals),
                }
            }
            (Some("max"), Accelerator::Kvm) => plain(CpuModel::Maximum),
            (Some(name), _) => plain(CpuModel::Named(arch.qemu_cpu(name).to_owned())),
        }
    }

    /// The emulated `max` without the properties that this emulator does not know, which it would refuse, and with what steers
    /// around a fault of its firmware.
    pub fn adjusted(mut self, known: &[String], workaround: Option<&str>) -> Self {
        if self.model == CpuModel::Maximum && !self.globals.is_empty() {
            let is_known = |name: &str| known.iter().any(|known| known == name);
            self.globals.retain(|global| global.split(['.', '=']).nth(1).is_some_and(is_known));
            self.disabled_features.retain(|feature| is_known(feature));
            self.globals.extend(workaround.map(str::to_owned));
        }
        self
    }

    /// As one would write it for QEMU's `-cpu`, for the report.
    pub fn describe(&self) -> String {
        let mut text = match &self.model {
            CpuModel::Maximum => "max".to_owned(),
            CpuModel::HostPassthrough => "host".to_owned(),
            CpuModel::Named(name) => name.clone(),
        };
        for global in &self.globals {
            text.push(',');
            text.push_str(global.split_once('.').map_or(global.as_str(), |(_, property)| property));
        }
        for feature in &self.disabled_features {
            text.push_str(&format!(",{feature}=off"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_emulator_does_not_know_it_is_not_told() {
        let tuned = || Cpu::resolve(VmArchitecture::Aarch64, Accelerator::Tcg, None);
        let known = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let all = known(&["pauth", "sve"]);
        assert_eq!(tuned().adjusted(&all, None), tuned());
        assert_eq!(tuned().adjusted(&known(&["sve"]), None).describe(), "max,sve=off");
        let steered = tuned().adjusted(&all, Some("max-arm-cpu.lpa2=off")).describe();
        assert_eq!(steered, "max,pauth=off,lpa2=off,sve=off");
        let named = Cpu::resolve(VmArchitecture::Aarch64, Accelerator::Tcg, Some("pi5"));
        assert_eq!(named.clone().adjusted(&[], Some("max-arm-cpu.lpa2=off")), named);
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
