//! The devices: the features of their cores and the page sizes of their kernels, from `xtask/inspect/devices.toml`.

use serde::Deserialize;

use crate::isa::Isa;
use crate::isa::features::Set;

const TEXT: &str = include_str!("../devices.toml");

/// The schema that this code reads.
const SCHEMA: u32 = 1;

/// A device that an executable may run on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The name of the device on the command line.
    pub name: String,
    #[serde(rename = "arch")]
    pub isa: Isa,
    /// A description for messages.
    pub about: String,
    /// The page sizes of the kernels that the device may run, in bytes.
    pub page_sizes: Vec<u64>,
    /// The numbers of bits in a process' addresses, with the kernels that the device may run; empty if all of them have
    /// at least 47.
    #[serde(default)]
    pub address_bits: Vec<u32>,
    /// The features of the core.
    #[serde(skip)]
    pub features: Set,
    /// The names of `features`; `*` stands for all of them.
    #[serde(rename = "features")]
    named: Vec<String>,
    /// QEMU's name of the core, if it has one.
    pub cpu: Option<String>,
    /// True if this is the default device of its architecture.
    #[serde(default)]
    pub default: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: u32,
    device: Vec<Device>,
}

/// Returns every device of this build.
pub fn built_in() -> Vec<Device> {
    parse(TEXT).expect("a test parses the devices that are built in")
}

/// Returns the device that an architecture uses if none is named.
pub fn default_of(isa: Isa) -> Device {
    let found = built_in().into_iter().find(|device| device.isa == isa && device.default);
    found.expect("a test sees that each architecture has a default")
}

/// Returns the device with this name, or the one whose core has this name in QEMU.
pub fn find(isa: Isa, name: &str) -> Option<Device> {
    let of_isa = || built_in().into_iter().filter(move |device| device.isa == isa);
    of_isa()
        .find(|device| device.name == name)
        .or_else(|| of_isa().find(|device| device.cpu.as_deref() == Some(name)))
}

fn parse(text: &str) -> Result<Vec<Device>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.schema != SCHEMA {
        return Err(format!("schema {} is unknown; known: {SCHEMA}", file.schema));
    }
    file.device.into_iter().map(Device::checked).collect()
}

impl Device {
    fn checked(mut self) -> Result<Self, String> {
        for name in &self.named {
            let feature = if name == "*" { Some(Set(u64::MAX)) } else { self.isa.feature(name) };
            let feature = feature.ok_or_else(|| format!("{}: the feature {name:?} is unknown", self.name))?;
            self.features = self.features | feature;
        }
        if self.page_sizes.is_empty() || self.page_sizes.iter().any(|size| !size.is_power_of_two()) {
            return Err(format!("{}: page sizes must be powers of two", self.name));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_that_are_built_in_are_sound() {
        let devices = parse(TEXT).unwrap();
        let names: std::collections::BTreeSet<_> = devices.iter().map(|device| &device.name).collect();
        assert_eq!(names.len(), devices.len(), "a name twice");
        for isa in [Isa::Aarch64, Isa::X86_64] {
            assert_eq!(devices.iter().filter(|device| device.isa == isa && device.default).count(), 1);
        }
        assert_eq!(default_of(Isa::Aarch64).name, "pi5");
        assert_eq!(find(Isa::Aarch64, "cortex-a72").unwrap().name, "pi4");
        assert_eq!(find(Isa::X86_64, "pi5"), None);
    }

    #[test]
    fn a_misspelt_feature_or_a_strange_page_is_an_error() {
        for (right, wrong) in [
            ("\"lse\"", "\"lsd\""),
            ("[4096]", "[4095]"),
            ("schema = 1", "schema = 2"),
            ("about = ", "abut = "),
        ] {
            assert!(parse(&TEXT.replacen(right, wrong, 1)).is_err(), "{wrong}");
        }
    }
}
