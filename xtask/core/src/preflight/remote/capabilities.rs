//! Parses libvirt's two descriptions of its capabilities: the kinds of guests that it can run
//! (virConnectGetCapabilities), and the features of one kind of guest (virConnectGetDomainCapabilities).

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

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

/// An element with its content.
#[derive(Default)]
struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    text: String,
    content: Vec<Element>,
}

impl Element {
    fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Returns the elements at a path below this element: `guest/arch`.
    fn all<'a>(&'a self, path: &str) -> Vec<&'a Element> {
        path.split('/').fold(vec![self], |outer, name| {
            let content = outer.into_iter().flat_map(|element| &element.content);
            content.filter(|element| element.name == name).collect()
        })
    }

    fn texts(&self, path: &str) -> Vec<String> {
        self.all(path).into_iter().map(|element| element.text.trim().to_owned()).collect()
    }
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
        Some((model.text.trim().to_owned(), usable))
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

/// Returns the outermost element of a document. Its name must be `root`.
fn read_document(xml: &str, root: &str) -> Result<Element, String> {
    let mut reader = Reader::from_str(xml);
    reader.config_mut().expand_empty_elements = true;
    let mut document = Element::default();
    let read = fill(&mut document, &mut reader).and_then(|()| {
        let found = document.content.into_iter().find(|element| element.name == root);
        found.ok_or_else(|| "there is no such element".to_owned())
    });
    read.map_err(|error| format!("libvirt's {root} cannot be read: {error}"))
}

/// Reads the content of the element `outer` up to its end tag. For the document itself, the name of `outer` is empty.
fn fill(outer: &mut Element, reader: &mut Reader<&[u8]>) -> Result<(), String> {
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(start) => {
                let mut inner = element(&start);
                fill(&mut inner, reader)?;
                outer.content.push(inner);
            }
            Event::Text(part) => outer.text.push_str(&part),
            Event::Eof if !outer.name.is_empty() => return Err(format!("it ends inside {}", outer.name)),
            Event::End(_) | Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

/// Returns an empty element with the name and the attributes of a start tag. The attributes are not unescaped: those
/// that are read contain only names and paths without special characters.
fn element(start: &BytesStart<'_>) -> Element {
    let attributes = start.attributes().flatten();
    let read = attributes.map(|one| (one.key.as_ref().to_owned(), one.value.into_owned()));
    Element { name: start.name().as_ref().to_owned(), attributes: read.collect(), ..Element::default() }
}
