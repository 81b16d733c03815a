//! Parses libvirt's two descriptions of its capabilities: the kinds of guests that it can run
//! (virConnectGetCapabilities), and the features of one kind of guest (virConnectGetDomainCapabilities).

use crate::xml_tree::{Element, read_document};

/// One kind of guest that a libvirt runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestOffer {
    /// The architecture of the guest, in libvirt's notation.
    pub machine: String,
    /// The path of the emulator on that host.
    pub emulator: String,
    /// The machine types, including aliases (`q35`).
    pub machine_types: Vec<String>,
    /// The domain types: `qemu`, `kvm`, `test` …
    pub domain_types: Vec<String>,
}

/// The features that a guest of one kind can have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainOffer {
    /// The path of the emulator on that host.
    pub emulator: String,
    /// The machine type with its version.
    pub machine_type: String,
    /// True if `<os firmware='efi'>` is supported.
    pub selects_uefi: bool,
    /// The firmware files that libvirt has found on that host.
    pub loaders: Vec<String>,
    /// The supported CPU modes: `host-passthrough`, `maximum`, `custom` …
    pub cpu_modes: Vec<String>,
    /// The names of the CPU models, and whether the host can use each of them. `None` means that libvirt does not know.
    pub cpu_models: Vec<(String, Option<bool>)>,
}

/// Returns the kinds of guests that `capabilities` lists. `capabilities` is the XML of virConnectGetCapabilities.
///
/// # Errors
/// Returns an error if the text is not that XML.
pub fn guests(capabilities: &str) -> Result<Vec<GuestOffer>, String> {
    let read = |arch: &Element| GuestOffer {
        machine: arch.attribute("name").unwrap_or_default().to_owned(),
        emulator: arch.texts("emulator").concat(),
        machine_types: arch.texts("machine"),
        domain_types: names(&arch.all("domain"), "type"),
    };
    Ok(read_document(capabilities, "capabilities")?.all("guest/arch").into_iter().map(read).collect())
}

/// Returns the features of a guest, from the XML of virConnectGetDomainCapabilities.
///
/// # Errors
/// Returns an error if the text is not that XML.
pub fn domain(capabilities: &str) -> Result<DomainOffer, String> {
    let root = read_document(capabilities, "domainCapabilities")?;
    let mut firmware = root.all("os/enum");
    firmware.retain(|values| values.attribute("name") == Some("firmware"));
    let mut modes = root.all("cpu/mode");
    modes.retain(|mode| mode.attribute("supported") == Some("yes"));
    let model = |model: &Element| {
        // Only the models of the mode `custom` can be named, and only these have the attribute `usable`. The mode
        // `host-model` also contains an element `model`.
        let usable = match model.attribute("usable")? {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        };
        Some((model.text().to_owned(), usable))
    };
    Ok(DomainOffer {
        emulator: root.texts("path").concat(),
        machine_type: root.texts("machine").concat(),
        selects_uefi: firmware.iter().any(|values| values.texts("value").iter().any(|value| value == "efi")),
        loaders: root.texts("os/loader/value"),
        cpu_modes: names(&modes, "name"),
        cpu_models: root.all("cpu/mode/model").into_iter().filter_map(model).collect(),
    })
}

fn names(elements: &[&Element], attribute: &str) -> Vec<String> {
    elements.iter().filter_map(|element| element.attribute(attribute)).map(str::to_owned).collect()
}
