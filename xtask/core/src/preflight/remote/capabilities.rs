//! libvirt's two descriptions of what it can run: the host's kinds of guests (virConnectGetCapabilities), and what one
//! kind can have (virConnectGetDomainCapabilities).

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// One kind of guest that a libvirt runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestOffer {
    /// Its architecture, as libvirt calls it.
    pub machine: String,
    /// The emulator's path there.
    pub emulator: String,
    /// Machine types, aliases among them (`q35`).
    pub machine_types: Vec<String>,
    /// `qemu`, `kvm`, `test` …
    pub domain_types: Vec<String>,
}

/// What a guest of one kind can have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainOffer {
    /// The emulator's path there.
    pub emulator: String,
    /// The machine type with its version.
    pub machine_type: String,
    /// Whether `<os firmware='efi'>` is taken.
    pub selects_uefi: bool,
    /// Firmware files that libvirt knows there.
    pub loaders: Vec<String>,
    /// `host-passthrough`, `maximum`, `custom` …: those supported.
    pub cpu_modes: Vec<String>,
    /// CPU models by their names, and whether they can be used: `None` where libvirt does not know.
    pub cpu_models: Vec<(String, Option<bool>)>,
}

/// An element as it ends or is read: where it stands, its attributes, its text.
struct Element<'a> {
    path: &'a str,
    attributes: &'a [(String, String)],
    text: &'a str,
}

impl Element<'_> {
    fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The kinds of guests in `capabilities`, the XML of virConnectGetCapabilities.
///
/// # Errors
/// Where it is not that XML.
pub fn guests(capabilities: &str) -> Result<Vec<GuestOffer>, String> {
    let mut guests = Vec::new();
    let mut guest = GuestOffer::default();
    walk(capabilities, "capabilities", |element| match element.path {
        // These are read at their end, so that the guest's own end comes last.
        "capabilities/guest/arch/emulator" => guest.emulator = element.text.to_owned(),
        "capabilities/guest/arch/machine" => guest.machine_types.push(element.text.to_owned()),
        "capabilities/guest/arch/domain" => {
            guest.domain_types.extend(element.attribute("type").map(str::to_owned))
        }
        "capabilities/guest/arch" => guest.machine = element.attribute("name").unwrap_or_default().to_owned(),
        "capabilities/guest" => guests.push(std::mem::take(&mut guest)),
        _ => {}
    })?;
    Ok(guests)
}

/// What a guest can have, from the XML of virConnectGetDomainCapabilities.
///
/// # Errors
/// Where it is not that XML.
pub fn domain(capabilities: &str) -> Result<DomainOffer, String> {
    let mut offer = DomainOffer::default();
    // What an `enum` holds is known at its end alone, by its name.
    let mut values = Vec::new();
    walk(capabilities, "domainCapabilities", |element| match element.path {
        "domainCapabilities/path" => offer.emulator = element.text.to_owned(),
        "domainCapabilities/machine" => offer.machine_type = element.text.to_owned(),
        "domainCapabilities/os/enum/value" => values.push(element.text.to_owned()),
        "domainCapabilities/os/enum" => {
            let values = std::mem::take(&mut values);
            if element.attribute("name") == Some("firmware") {
                offer.selects_uefi = values.iter().any(|value| value == "efi");
            }
        }
        "domainCapabilities/os/loader/value" => offer.loaders.push(element.text.to_owned()),
        "domainCapabilities/cpu/mode" if element.attribute("supported") == Some("yes") => {
            offer.cpu_modes.extend(element.attribute("name").map(str::to_owned));
        }
        "domainCapabilities/cpu/mode/model" => {
            let usable = match element.attribute("usable") {
                Some("yes") => Some(true),
                Some("no") => Some(false),
                Some(_) => None,
                // The mode host-model has a model too, which is no name to choose.
                None => return,
            };
            offer.cpu_models.push((element.text.to_owned(), usable));
        }
        _ => {}
    })?;
    Ok(offer)
}

/// Shows `visit` every element of a document at its end, with the text that stands directly before that.
fn walk(xml: &str, root: &str, mut visit: impl FnMut(&Element<'_>)) -> Result<(), String> {
    let wrong = |error: String| format!("libvirt's {root} cannot be read: {error}");
    let mut reader = Reader::from_str(xml);
    let mut open: Vec<(usize, Vec<(String, String)>)> = Vec::new();
    let (mut path, mut text, mut seen) = (String::new(), String::new(), false);
    loop {
        match reader.read_event().map_err(|error| wrong(error.to_string()))? {
            Event::Start(start) => {
                open.push((path.len(), attributes(&start)));
                enter(&mut path, &start);
                seen |= path == root;
                text.clear();
            }
            Event::Empty(start) => {
                let outer = path.len();
                enter(&mut path, &start);
                seen |= path == root;
                visit(&Element { path: &path, attributes: &attributes(&start), text: "" });
                path.truncate(outer);
            }
            Event::Text(part) => text.push_str(&part),
            Event::End(_) => {
                let (outer, attributes) =
                    open.pop().ok_or_else(|| wrong("an end without a start".to_owned()))?;
                visit(&Element { path: &path, attributes: &attributes, text: text.trim() });
                path.truncate(outer);
                text.clear();
            }
            Event::Eof if !open.is_empty() => return Err(wrong(format!("it ends inside {path}"))),
            Event::Eof if !seen => return Err(wrong("there is no such element".to_owned())),
            Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

fn enter(path: &mut String, start: &BytesStart<'_>) {
    if !path.is_empty() {
        path.push('/');
    }
    path.push_str(start.name().as_ref());
}

/// Names and paths alone are read here; none of them is escaped.
fn attributes(start: &BytesStart<'_>) -> Vec<(String, String)> {
    start
        .attributes()
        .flatten()
        .map(|attribute| (attribute.key.as_ref().to_owned(), attribute.value.into_owned()))
        .collect()
}
