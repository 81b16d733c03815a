//! Compares the live XML of a domain with the requested domain, because a libvirt daemon may refuse QMP commands. The
//! live XML describes less than QEMU does, but the comparison finds the same kinds of faults.

use std::path::Path;

use super::diff::{Findings, sentence};
use super::{ExpectedFlash, ExpectedMachine};
use crate::arch::Accelerator;
use crate::format::name_of;
use crate::machine::Disk;
use crate::preflight::findings::Finding;
use crate::xml_tree::{Element, read_document};

/// The id of the findings about the disks.
const DISK: &str = "rehearsal-disk";

/// The comparison of one domain.
struct Comparison<'a> {
    domain: &'a Element,
    findings: Findings<'a>,
    /// The properties that were not compared, because the XML does not describe them.
    unknown: Vec<&'static str>,
}

/// Compares the live XML of a running or paused domain (virDomainGetXMLDesc without VIR_DOMAIN_XML_INACTIVE) with the
/// requested domain. Returns a finding for every difference, and one finding that informs about the properties that
/// were not compared. The XML does not have the domain's state: the caller must check that the domain is paused
/// (virDomainGetState).
///
/// # Errors
/// Returns an error if the text is not the XML of a domain, or if that domain has no QEMU.
pub fn diff(expected: &ExpectedMachine, xml: &str) -> Result<Vec<Finding>, String> {
    let domain = read_document(xml, "domain")?;
    if domain.attribute("id").is_none() {
        return Err(
            "libvirt's domain has no id, so this XML describes no domain that runs: start the domain, and \
                    request the XML without VIR_DOMAIN_XML_INACTIVE"
                .to_owned(),
        );
    }
    let findings = Findings { expected, found: Vec::new() };
    let unknown = vec!["the threads of its processors"];
    let mut comparison = Comparison { domain: &domain, findings, unknown };
    comparison.check_machine();
    comparison.check_memory();
    comparison.check_processors();
    comparison.check_cpu_model();
    comparison.check_cpu_properties();
    if let Some(flash) = &expected.flash {
        comparison.check_code(flash);
        comparison.check_variables(flash);
        comparison.unknown.push("the sizes of its flash devices");
    }
    comparison.check_disks();
    comparison.check_network();
    Ok(comparison.finish())
}

impl<'a> Comparison<'a> {
    /// Returns all findings, the last of which names the properties that were not compared.
    fn finish(self) -> Vec<Finding> {
        let Self { findings: Findings { expected, mut found }, unknown, .. } = self;
        let what = format!("these properties were not compared: {}", unknown.join(", "));
        let evidence = "libvirt's live XML does not describe them; QEMU's monitor does";
        found.push(Finding::informs("rehearsal-not-compared", sentence(expected, &what), evidence));
        found
    }

    fn check_machine(&mut self) {
        let ExpectedMachine { accelerator, architecture, .. } = *self.findings.expected;
        let wanted = match accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        };
        if self.domain.attribute("type") != Some(wanted) {
            let what = format!("it does not run under the requested accelerator {accelerator}");
            self.findings.wrong("rehearsal-accelerator", what, self.domain.to_string());
        }
        let profile = architecture.profile();
        let kind = self.domain.first("os/type");
        let of_kind = |name| kind.and_then(|kind| kind.attribute(name)).unwrap_or_default();
        if of_kind("arch") != profile.machine {
            let what = format!("its architecture is not {}", profile.machine);
            self.findings.wrong("rehearsal-machine", what, shown("os/type", kind));
        }
        // libvirt replaces an alias by the machine type with its version: `virt-7.2`, `pc-q35-7.2`.
        if !of_kind("machine").split('-').any(|part| part == profile.machine_type) {
            let what = format!("it is not a {}", profile.machine_type);
            self.findings.wrong("rehearsal-machine", what, shown("os/type", kind));
        }
    }

    /// Checks the memory of the machine, and the part of it that the guest may use at present.
    fn check_memory(&mut self) {
        let wanted = self.findings.expected.memory_bytes;
        let memory = self.domain.first("memory");
        let current = self.domain.first("currentMemory").or(memory);
        for (path, element) in [("memory", memory), ("currentMemory", current)] {
            if element.and_then(bytes) != Some(wanted) {
                let what = format!("its memory is not {} MiB", wanted >> 20);
                return self.findings.wrong("rehearsal-memory", what, shown(path, element));
            }
        }
    }

    fn check_processors(&mut self) {
        let wanted = self.findings.expected.vcpus;
        let vcpu = self.domain.first("vcpu");
        // If some of the processors are offline, `current` is the number of the others.
        let found = vcpu.map(|vcpu| vcpu.attribute("current").unwrap_or(vcpu.text())).unwrap_or_default();
        if found.parse() != Ok(wanted) {
            let what = format!("it has {found} processor(s), {wanted} were requested");
            self.findings.wrong("rehearsal-processors", what, shown("vcpu", vcpu));
        }
    }

    fn check_cpu_model(&mut self) {
        let wanted = &self.findings.expected.cpu_model;
        let cpu = self.domain.first("cpu");
        let mode = cpu.and_then(|cpu| cpu.attribute("mode")).unwrap_or_default();
        let model = self.domain.first("cpu/model");
        let is_wanted = match wanted.as_str() {
            "max" => mode == "maximum",
            "host" => mode == "host-passthrough",
            name => mode == "custom" && model.is_some_and(|model| model.text() == name),
        };
        if !is_wanted {
            let seen = format!("{} {}", shown("cpu", cpu), shown("cpu/model", model));
            self.findings.wrong("rehearsal-cpu-model", format!("its CPU is not {wanted}"), seen);
        }
    }

    /// Checks that the XML sets each CPU property to the requested value.
    fn check_cpu_properties(&mut self) {
        for (name, wanted) in &self.findings.expected.cpu_properties {
            let settings = self.settings(name);
            let seen = match settings.iter().find(|(_, value)| value != wanted) {
                Some((setting, _)) => setting.clone(),
                None if settings.is_empty() => format!("neither <cpu> nor -global sets {name}"),
                None => continue,
            };
            let what = format!("the CPU's {name} is not {}", if *wanted { "on" } else { "off" });
            self.findings.wrong("rehearsal-cpu-feature", what, seen);
        }
    }

    /// Returns the places of the XML that set a CPU property, each with the value: elements `<feature>` and arguments
    /// `-global`.
    fn settings(&self, property: &str) -> Vec<(String, bool)> {
        let features = self.domain.all("cpu/feature").into_iter();
        let features = features.filter(|feature| feature.attribute("name") == Some(property));
        let features = features.filter_map(|feature| Some((feature.to_string(), policy(feature)?)));
        let model = &self.findings.expected.cpu_model;
        let arguments = self.arguments();
        let globals = arguments.windows(2).filter(|pair| pair[0] == "-global");
        let globals =
            globals.filter_map(|pair| Some((pair.join(" "), global_value(pair[1], model, property)?)));
        features.chain(globals).collect()
    }

    /// Returns the arguments that the XML passes to QEMU.
    fn arguments(&self) -> Vec<&'a str> {
        let arguments = self.domain.all("qemu:commandline/qemu:arg").into_iter();
        arguments.filter_map(|argument| argument.attribute("value")).collect()
    }

    fn check_code(&mut self, wanted: &ExpectedFlash) {
        const ID: &str = "rehearsal-firmware";
        let Some(loader) = self.domain.first("os/loader") else {
            return self.findings.wrong(ID, "it has no flash for its firmware", shown("os/loader", None));
        };
        if loader.attribute("type") != Some("pflash") {
            self.findings.wrong(ID, "its firmware is not in a flash", loader.to_string());
        }
        if Path::new(loader.text()) != wanted.code {
            let what = format!("its firmware is not {}", wanted.code.display());
            self.findings.wrong(ID, what, loader.to_string());
        }
        if loader.attribute("readonly") != Some("yes") {
            let what = "the guest may write to the firmware that all guests share";
            self.findings.wrong(ID, what, loader.to_string());
        }
    }

    fn check_variables(&mut self, wanted: &ExpectedFlash) {
        const ID: &str = "rehearsal-nvram";
        let Some(nvram) = self.domain.first("os/nvram") else {
            let what = "it has no flash for its firmware's variables";
            return self.findings.wrong(ID, what, shown("os/nvram", None));
        };
        // If the file is described by a `<source>`, the element has no text.
        let path = Path::new(source(nvram).unwrap_or(nvram.text()));
        let seen = format!("{nvram} ({})", path.display());
        if path == wanted.template {
            self.findings.add_template(wanted, seen);
        } else if path != wanted.nvram {
            let what = format!("its variables are not in {}", wanted.nvram.display());
            self.findings.wrong(ID, what, seen);
        }
    }

    fn check_disks(&mut self) {
        let wanted = &self.findings.expected.disks;
        let disks = self.domain.all("devices/disk");
        if disks.len() > wanted.len() {
            let what = format!("it has {} disks, {} were requested", disks.len(), wanted.len());
            self.findings.wrong(DISK, what, sources(&disks));
        }
        for (letter, wanted) in ('a'..='z').zip(wanted) {
            // The XML names a volume of a storage pool by its name, which is the last part of its path.
            let is_wanted = |disk: &&&Element| match source(disk).map(Path::new) {
                Some(path) => path == wanted.path,
                None => volume(disk).is_some_and(|name| wanted.path.ends_with(name)),
            };
            match disks.iter().find(is_wanted) {
                Some(disk) => self.check_disk(wanted, &format!("vd{letter}"), disk),
                None => {
                    let what = format!("none of its devices has the disk {}", wanted.path.display());
                    self.findings.wrong(DISK, what, sources(&disks));
                }
            }
        }
    }

    /// Checks a disk. `device` is the name of the device by which the order of the disks is requested.
    fn check_disk(&mut self, wanted: &Disk, device: &str, disk: &Element) {
        let path = wanted.path.display();
        let target = disk.first("target");
        let of_target = |name| target.and_then(|target| target.attribute(name));
        if (of_target("dev"), of_target("bus")) != (Some(device), Some("virtio")) {
            let what = format!("its disk {path} is not the device {device} on the bus virtio");
            self.findings.wrong(DISK, what, shown("target", target));
        }
        let driver = disk.first("driver");
        let of_driver = |name| driver.and_then(|driver| driver.attribute(name));
        let format = name_of(&wanted.format);
        if of_driver("type") != Some(format.as_str()) {
            let what = format!("its disk {path} does not have the format {format}");
            self.findings.wrong(DISK, what, shown("driver", driver));
        }
        let read_only = disk.first("readonly");
        if read_only.is_some() != wanted.read_only {
            let verb = if read_only.is_some() { "cannot" } else { "may" };
            let what = format!("the guest {verb} write {path}");
            self.findings.wrong(DISK, what, format!("{path}: {}", shown("readonly", read_only)));
        }
        if wanted.read_only {
            return;
        }
        self.check_backing(wanted, disk);
        if of_driver("cache") != Some("none") {
            let how = "does not have the cache mode none";
            self.findings.add_cache(how, format!("{path}: {}", shown("driver", driver)));
        }
    }

    /// Checks the backing files of a disk. The XML does not have their access.
    fn check_backing(&mut self, wanted: &Disk, disk: &Element) {
        let Some(files) = backing(disk) else {
            return self.unknown.push("the backing files of its disk");
        };
        self.findings.check_chain(wanted, &files, format!("<backingStore>: {files:?}"));
        if !wanted.backing.is_empty() {
            self.unknown.push("the access to the backing files of its disk");
        }
    }

    /// Checks the ports that QEMU's user-mode network forwards. If the domain has a network card of libvirt instead,
    /// this card is not compared.
    fn check_network(&mut self) {
        const ID: &str = "rehearsal-network";
        let arguments = self.arguments();
        let mut devices = arguments.windows(2).filter(|pair| pair[0] == "-netdev").map(|pair| pair[1]);
        let Some(user) = devices.find(|device| device.split(',').next() == Some("user")) else {
            if self.domain.first("devices/interface").is_some() {
                self.unknown.push("its network");
            } else {
                self.findings.wrong(ID, "it has no network", "neither <interface> nor -netdev user");
            }
            return;
        };
        let rules: Vec<_> = user.split(',').filter_map(|option| option.strip_prefix("hostfwd=")).collect();
        if let Some(rule) = rules.iter().find(|rule| !rule.starts_with("tcp:127.0.0.1:")) {
            self.findings.wrong(ID, "the guest's ports are open to other hosts", *rule);
        }
        let leads_to = |port: &u16| rules.iter().any(|rule| rule.ends_with(&format!(":{port}")));
        if let Some(port) = self.findings.expected.forwarded_ports.iter().find(|port| !leads_to(port)) {
            let what = format!("no port of this host leads to the guest's port {port}");
            self.findings.wrong(ID, what, user);
        }
    }
}

/// Formats an element for a message, or says that the XML does not have it.
fn shown(path: &str, element: Option<&Element>) -> String {
    element.map_or_else(|| format!("there is no {path}"), Element::to_string)
}

/// Returns the size that an element contains. The unit is a letter alone or with `iB` for powers of 1024, and with `B`
/// for powers of 1000 (libvirt.org/formatdomain.html, "Memory Allocation").
fn bytes(element: &Element) -> Option<u64> {
    let unit = element.attribute("unit").unwrap_or("KiB").to_ascii_lowercase();
    let scale = if ["b", "byte", "bytes"].contains(&unit.as_str()) {
        1
    } else {
        let power = "kmgtpe".find(unit.get(..1)?)? + 1;
        let base: u64 = match &unit[1..] {
            "" | "ib" => 1024,
            "b" => 1000,
            _ => return None,
        };
        base.checked_pow(u32::try_from(power).ok()?)?
    };
    element.text().parse::<u64>().ok()?.checked_mul(scale)
}

/// Returns whether a `<feature>` is on. Returns `None` if the XML leaves this to libvirt.
fn policy(feature: &Element) -> Option<bool> {
    match feature.attribute("policy")? {
        "disable" | "forbid" => Some(false),
        "require" | "force" => Some(true),
        _ => None,
    }
}

/// Returns the value that an argument such as `max-arm-cpu.pauth=off` gives to a property of the CPU model `model`.
fn global_value(argument: &str, model: &str, property: &str) -> Option<bool> {
    let (name, value) = argument.split_once('=')?;
    let (driver, of_driver) = name.rsplit_once('.')?;
    let is_of_model = driver.starts_with(&format!("{model}-")) && driver.ends_with("-cpu");
    match value {
        "on" if is_of_model && of_driver == property => Some(true),
        "off" if is_of_model && of_driver == property => Some(false),
        _ => None,
    }
}

/// Returns the path in the `<source>` of an element.
fn source(element: &Element) -> Option<&str> {
    let source = element.first("source")?;
    source.attribute("file").or_else(|| source.attribute("dev"))
}

/// Returns the name of the volume in the `<source>` of a disk.
fn volume(disk: &Element) -> Option<&str> {
    disk.first("source")?.attribute("volume")
}

/// Formats the targets and paths of disks for a message.
fn sources(disks: &[&Element]) -> String {
    let shown = disks.iter().map(|disk| {
        let device = disk.first("target").and_then(|target| target.attribute("dev")).unwrap_or("?");
        format!("{device}: {}", source(disk).or_else(|| volume(disk)).unwrap_or("no file"))
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// Returns the backing files of a disk, from top to bottom. Returns `None` if libvirt has not searched all of them: an
/// empty `<backingStore>` ends the list of a live domain.
fn backing(disk: &Element) -> Option<Vec<&str>> {
    let mut files = Vec::new();
    let mut store = disk.first("backingStore")?;
    while store.first("source").is_some() {
        files.push(source(store).unwrap_or("no file"));
        store = store.first("backingStore")?;
    }
    Some(files)
}

#[cfg(test)]
mod tests;
