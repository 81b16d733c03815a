//! The difference between a domain as it was asked for and as QEMU made it, in findings.

use crate::arch::Accelerator;
use crate::machine::{Disk, FORWARDED_PORTS};
use crate::preflight::findings::{Finding, Remedy, Severity};

use super::observed::{Flash, ImageInfo, Layer, Observed};
use super::{ExpectedFlash, ExpectedMachine};

/// What to do where QEMU or libvirt made something else of the domain than what it was told.
const NOT_AS_TOLD: &str = "this QEMU or libvirt does not do what the domain's XML says: compare with other \
                           versions of them; a smoke on this machine would prove nothing";

/// Findings about one domain.
struct Findings<'a> {
    expected: &'a ExpectedMachine,
    found: Vec<Finding>,
}

/// Everything about the domain that is not as it was asked for. Nothing where it is.
pub fn diff(expected: &ExpectedMachine, seen: &Observed) -> Vec<Finding> {
    let mut findings = Findings { expected, found: Vec::new() };
    findings.check_guest_is_stopped(seen);
    findings.check_machine(seen);
    findings.check_processors(seen);
    findings.check_cpu(seen);
    if let Some(flash) = &expected.flash {
        findings.check_code(flash, seen.flashes.first());
        findings.check_variables(flash, seen.flashes.get(1));
    }
    for disk in &expected.disks {
        findings.check_disk(disk, seen);
    }
    findings.check_network(seen);
    findings.found
}

/// A domain that libvirt or QEMU refused to start, in their words. Those are prose, so that they choose the finding's id and
/// no more than that.
pub fn refused(expected: &ExpectedMachine, error: &str) -> Finding {
    let words = error.to_lowercase();
    let says = |signs: &[&str]| signs.iter().any(|sign| words.contains(sign));
    let (id, what, remedy) = if expected.accelerator == Accelerator::Kvm && says(&["kvm"]) {
        ("rehearsal-kvm", "KVM does not start the machine", "use --accel tcg to emulate the guest")
    } else if says(&["flash", "block backend provides"]) {
        (
            "rehearsal-flash-size",
            "the firmware does not fit QEMU's flash device",
            "reinstall the firmware's package; your own firmware file must have the size of the flash device",
        )
    } else if says(&["cpu feature", "cpu model", "-cpu.", "features"]) {
        (
            "rehearsal-cpu-refused",
            "libvirt or QEMU refuses the CPU",
            "choose another CPU with --cpu, or use another QEMU",
        )
    } else {
        (
            "rehearsal-refused",
            "libvirt does not start the domain",
            "read its message; a smoke would fail in the same way",
        )
    };
    let mut findings = Findings { expected, found: Vec::new() };
    findings.add(id, what, error.trim(), remedy);
    findings.found.remove(0)
}

impl Findings<'_> {
    fn add(&mut self, id: &'static str, what: &str, seen: &str, remedy: &str) {
        self.found.push(Finding {
            id,
            severity: Severity::Blocks,
            sentence: format!("the {} machine: {what}", self.expected.architecture),
            evidence: seen.to_owned(),
            remedy: Some(Remedy::Manual(remedy.to_owned())),
        });
    }

    /// A guest that has run may have written; and the rehearsal promises that none does.
    fn check_guest_is_stopped(&mut self, seen: &Observed) {
        if seen.status.running || !["prelaunch", "paused"].contains(&seen.status.status.as_str()) {
            let evidence = format!("query-status: {}", seen.status.status);
            self.add(
                "rehearsal-guest-ran",
                "its guest runs, although it was started paused",
                &evidence,
                NOT_AS_TOLD,
            );
        }
    }

    fn check_machine(&mut self, seen: &Observed) {
        let kvm = self.expected.accelerator == Accelerator::Kvm;
        if seen.kvm.enabled != kvm {
            let what = format!("it does not run under {}, which was requested", self.expected.accelerator);
            let evidence = format!("query-kvm: enabled {}", seen.kvm.enabled);
            self.add("rehearsal-accelerator", &what, &evidence, NOT_AS_TOLD);
        }
        let wanted = self.expected.architecture.profile().machine_type;
        if !seen.machine.contains(wanted) {
            let what = format!("it is not a {wanted}");
            self.add(
                "rehearsal-machine",
                &what,
                &format!("the type of /machine: {}", seen.machine),
                NOT_AS_TOLD,
            );
        }
        if seen.memory_bytes != self.expected.memory_bytes {
            let what = format!("its memory is not {} MiB", self.expected.memory_bytes >> 20);
            let evidence = format!("query-memory-size-summary: {} bytes", seen.memory_bytes);
            self.add("rehearsal-memory", &what, &evidence, NOT_AS_TOLD);
        }
    }

    fn check_processors(&mut self, seen: &Observed) {
        let wanted = self.expected.vcpus;
        if seen.vcpus.len() != wanted {
            let what = format!("it has {} processor(s), {wanted} were requested", seen.vcpus.len());
            self.add("rehearsal-processors", &what, "query-cpus-fast", NOT_AS_TOLD);
        }
        let ids: Vec<_> = seen.vcpus.iter().map(|vcpu| vcpu.thread_id).collect();
        let mut threads = ids.clone();
        threads.sort_unstable();
        threads.dedup();
        if self.expected.own_threads && threads.len() != ids.len() {
            let what =
                format!("its {} processors run on {} thread(s) of this host", ids.len(), threads.len());
            self.add(
                "rehearsal-threads",
                &what,
                &format!("query-cpus-fast: the thread ids {ids:?}"),
                "QEMU emulates them one after the other (thread=single, icount), by its build or configuration; use \
                 another QEMU, or --vcpus 1 and --timeout-scale 2",
            );
        }
    }

    fn check_cpu(&mut self, seen: &Observed) {
        let model = &self.expected.cpu_model;
        if !seen.cpu_type.starts_with(&format!("{model}-")) {
            let what = format!("its CPU is not {model}");
            self.add(
                "rehearsal-cpu-model",
                &what,
                &format!("the CPU's type: {}", seen.cpu_type),
                NOT_AS_TOLD,
            );
        }
        let word = |on: bool| if on { "on" } else { "off" };
        for ((name, wanted), (_, found)) in self.expected.cpu_properties.iter().zip(&seen.cpu_properties) {
            let what = format!("the CPU's {name} is not {}", word(*wanted));
            match found {
                Ok(found) if found == wanted => {}
                // What the CPU does not have is off.
                Err(_) if !wanted => {}
                Ok(found) => {
                    let evidence = format!("qom-get {name}: {}", word(*found));
                    self.add("rehearsal-cpu-feature", &what, &evidence, NOT_AS_TOLD);
                }
                Err(error) => {
                    self.add(
                        "rehearsal-cpu-feature",
                        &what,
                        &format!("qom-get {name}: {error}"),
                        NOT_AS_TOLD,
                    );
                }
            }
        }
    }

    fn check_code(&mut self, wanted: &ExpectedFlash, seen: Option<&Flash>) {
        const ID: &str = "rehearsal-firmware";
        let Some(seen) = seen else {
            return self.add(ID, "it has no flash for its firmware", "query-block", NOT_AS_TOLD);
        };
        self.check_size("the firmware's code", wanted.code_bytes, seen);
        if !seen.layer.is_of(&wanted.code) && seen.bytes == wanted.code_bytes {
            let what = format!("its firmware is not {}", wanted.code.display());
            self.add(ID, &what, &in_flash(seen), NOT_AS_TOLD);
        }
        if !seen.layer.ro {
            self.add(
                ID,
                "the guest may write to the firmware that all guests share",
                &in_flash(seen),
                NOT_AS_TOLD,
            );
        }
    }

    fn check_variables(&mut self, wanted: &ExpectedFlash, seen: Option<&Flash>) {
        const ID: &str = "rehearsal-nvram";
        let Some(seen) = seen else {
            return self.add(ID, "it has no flash for its firmware's variables", "query-block", NOT_AS_TOLD);
        };
        self.check_size("the firmware's variables", wanted.vars_bytes, seen);
        let template =
            format!("its variables are the template {} instead of a copy", wanted.template.display());
        let remedy = "each machine must have its own copy, or its changes would affect all others";
        if seen.layer.is_of(&wanted.template) {
            self.add(ID, &template, &in_flash(seen), remedy);
        } else if !seen.layer.is_of(&wanted.nvram) {
            let what = format!("its variables are not in {}", wanted.nvram.display());
            self.add(ID, &what, &in_flash(seen), NOT_AS_TOLD);
        } else if seen.layer.ro {
            self.add(ID, "it cannot write to its own variables", &in_flash(seen), NOT_AS_TOLD);
        }
    }

    fn check_size(&mut self, what: &str, wanted: u64, seen: &Flash) {
        if seen.bytes != wanted {
            let what = format!("the flash for {what} has {} bytes, expected {wanted}", seen.bytes);
            let remedy = "the firmware's entry point would be elsewhere and the guest would print nothing: reinstall the firmware's \
                          package, and check what else names a firmware file";
            self.add("rehearsal-flash-size", &what, &in_flash(seen), remedy);
        }
    }

    /// A file's own node is opened for writing only where one above it is (`auto-read-only`): one of the two says so.
    fn check_layers_below(&mut self, disk: &Disk, seen: &Observed) {
        for path in &disk.backing {
            let mut nodes = seen.layers.iter().filter(|layer| layer.is_of(path)).peekable();
            if nodes.peek().is_some() && !nodes.any(|layer| layer.ro) {
                let what = format!("{}, the backing file of its disk, is writable", path.display());
                self.add("rehearsal-disk-writable", &what, "query-named-block-nodes: ro false", NOT_AS_TOLD);
            }
        }
    }

    fn check_disk(&mut self, disk: &Disk, seen: &Observed) {
        let path = disk.path.display();
        let inserted = seen.devices.iter().filter_map(|device| device.inserted.as_ref());
        let Some(found) = inserted.into_iter().find(|layer| layer.is_of(&disk.path)) else {
            let files: Vec<_> =
                seen.devices.iter().flat_map(|device| &device.inserted).map(|layer| &layer.file).collect();
            let what = format!("none of its devices has the disk {path}");
            return self.add("rehearsal-disk", &what, &format!("query-block: {files:?}"), NOT_AS_TOLD);
        };
        if found.ro != disk.read_only {
            let what = format!("the guest {} write {path}", if found.ro { "cannot" } else { "may" });
            self.add("rehearsal-disk", &what, &format!("query-block: ro {}", found.ro), NOT_AS_TOLD);
        }
        if disk.read_only {
            return;
        }
        let lies_on = found.image.as_ref().map(ImageInfo::backing).unwrap_or_default();
        let wanted: Vec<_> = disk.backing.iter().map(|path| path.to_string_lossy()).collect();
        if !wanted.is_empty() && lies_on != wanted {
            self.add(
                "rehearsal-disk-chain",
                &format!("its disk {path} has the backing files {}, expected {}", lies_on.join(", "), wanted.join(", ")),
                &format!("query-block: {lies_on:?}"),
                "the guest would skip a layer of its disk and silently corrupt its file system: the domain's XML must give no \
                 <backingStore> for this disk other than what its own headers say",
            );
        }
        self.check_layers_below(disk, seen);
        // The format's layer and the file's: either one softens a power cut.
        let soft = |layer: &&Layer| layer.is_of(&disk.path) && (layer.cache.no_flush || !layer.cache.direct);
        let layers = seen.layers.iter().chain(std::iter::once(found));
        if let Some(layer) = layers.into_iter().find(soft) {
            let how = if layer.cache.no_flush {
                "ignores the guest's flushes"
            } else {
                "goes through this host's page cache"
            };
            let cache = layer.cache;
            self.add(
                "rehearsal-disk-cache",
                &format!("its disk {how}, so a power cut on it proves nothing"),
                &format!(
                    "query-named-block-nodes: {path}: direct {}, no-flush {}",
                    cache.direct, cache.no_flush
                ),
                "it must be opened with cache=none: find what changes the domain's disks on this host",
            );
        }
    }

    /// QEMU's table has a row for each forwarded port: `TCP[HOST_FORWARD] 11 127.0.0.1 43105 10.0.2.15 22 0 0`.
    fn check_network(&mut self, seen: &Observed) {
        const ID: &str = "rehearsal-network";
        let rows: Vec<_> = seen.forwarding.lines().filter(|line| line.contains("HOST_FORWARD")).collect();
        let open = rows.iter().find(|row| row.split_whitespace().nth(2) != Some("127.0.0.1"));
        if let Some(row) = open {
            self.add(ID, "the guest's ports are open to other hosts", row.trim(), NOT_AS_TOLD);
        }
        let leads_to = |port: &u16| {
            rows.iter().any(|row| row.split_whitespace().nth(5) == Some(port.to_string().as_str()))
        };
        if let Some(port) = FORWARDED_PORTS.iter().find(|port| !leads_to(port)) {
            let what = format!("no port of this host leads to the guest's port {port}");
            self.add(ID, &what, "info usernet", NOT_AS_TOLD);
        }
    }
}

fn in_flash(flash: &Flash) -> String {
    let Layer { file, ro, .. } = &flash.layer;
    format!(
        "{}: {} bytes, {file}, {}",
        flash.qom_path,
        flash.bytes,
        if *ro { "read-only" } else { "writable" }
    )
}
