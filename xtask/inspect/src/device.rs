//! What a device offers: its core's features and its kernels' page sizes, out of `xtask/inspect/devices.toml`.

use serde::Deserialize;

use crate::isa::Isa;
use crate::isa::features::Set;

const TEXT: &str = include_str!("../devices.toml");

/// The schema that this code reads.
const SCHEMA: u32 = 1;

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its name on the command line.
    pub name: String,
    /// Its instruction set.
    #[serde(rename = "arch")]
    pub isa: Isa,
    /// A line for people.
    pub about: String,
    /// The page sizes of the kernels that it may run, in bytes.
    pub page_sizes: Vec<u64>,
    /// What its core has.
    #[serde(skip)]
    pub features: Set,
    /// The names of `features`; `*` is all of them.
    #[serde(rename = "features")]
    named: Vec<String>,
    /// QEMU's name of the core.
    pub cpu: Option<String>,
    /// Whether it is its architecture's default.
    #[serde(default)]
    pub default: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: u32,
    device: Vec<Device>,
}

/// Every device of this build.
pub fn built_in() -> Vec<Device> {
    parse(TEXT).expect("a test parses the devices that are built in")
}

/// The device that an architecture has where none is named.
pub fn default_of(isa: Isa) -> Device {
    let found = built_in().into_iter().find(|device| device.isa == isa && device.default);
    found.expect("a test sees that each architecture has a default")
}

/// The device of this name, or with this core of QEMU's.
pub fn find(isa: Isa, name: &str) -> Option<Device> {
    let of_isa = || built_in().into_iter().filter(move |device| device.isa == isa);
    of_isa()
        .find(|device| device.name == name)
        .or_else(|| of_isa().find(|device| device.cpu.as_deref() == Some(name)))
}

fn parse(text: &str) -> Result<Vec<Device>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.schema != SCHEMA {
        return Err(format!("schema {} where {SCHEMA} is known", file.schema));
    }
    file.device.into_iter().map(Device::checked).collect()
}

impl Device {
    fn checked(mut self) -> Result<Self, String> {
        for name in &self.named {
            let feature = if name == "*" { Some(Set(u64::MAX)) } else { self.isa.feature(name) };
            let feature = feature.ok_or_else(|| format!("{}: no feature {name:?}", self.name))?;
            self.features = self.features | feature;
        }
        if self.page_sizes.is_empty() || self.page_sizes.iter().any(|size| !size.is_power_of_two()) {
            return Err(format!("{}: page sizes are powers of two", self.name));
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
