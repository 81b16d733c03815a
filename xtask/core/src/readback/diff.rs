//! Compares QEMU's machine with the requested domain, and returns the differences as findings.

use std::collections::BTreeSet;

use crate::arch::Accelerator;
use crate::machine::Disk;
use crate::preflight::findings::Finding;

use super::observed::{CacheMode, Flash, ImageInfo, Layer, Observed};
use super::{ExpectedFlash, ExpectedMachine};

/// The remedy if QEMU's machine differs from the domain's XML.
const NOT_AS_TOLD: &str = "this QEMU or libvirt does not do what the domain's XML says: compare with other \
                           versions of them; a smoke on this machine would prove nothing";

/// The findings about one domain.
pub(super) struct Findings<'a> {
    pub(super) expected: &'a ExpectedMachine,
    pub(super) found: Vec<Finding>,
}

/// Returns a finding for every difference between the requested domain and QEMU's machine.
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

/// Returns the finding for a domain that libvirt or QEMU refused to start. Words in their error message select the id,
/// the sentence and the remedy of the finding.
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
        let remedy = "choose another CPU with --cpu, or use another QEMU";
        ("rehearsal-cpu-refused", "libvirt or QEMU refuses the CPU", remedy)
    } else {
        let remedy = "read its message; a smoke would fail in the same way";
        ("rehearsal-refused", "libvirt does not start the domain", remedy)
    };
    Finding::blocks(id, sentence(expected, what), error.trim(), remedy)
}

pub(super) fn sentence(expected: &ExpectedMachine, what: &str) -> String {
    format!("the {} machine: {what}", expected.architecture)
}

impl Findings<'_> {
    pub(super) fn add(
        &mut self,
        id: &'static str,
        what: impl AsRef<str>,
        seen: impl Into<String>,
        remedy: &str,
    ) {
        self.found.push(Finding::blocks(id, sentence(self.expected, what.as_ref()), seen, remedy));
    }

    /// Adds a finding for a property that differs from the domain's XML.
    pub(super) fn wrong(&mut self, id: &'static str, what: impl AsRef<str>, seen: impl Into<String>) {
        self.add(id, what, seen, NOT_AS_TOLD);
    }

    /// Checks that the guest has not run. If it had, it could have written to its disks.
    fn check_guest_is_stopped(&mut self, seen: &Observed) {
        let status = &seen.status.status;
        if seen.status.running || !["prelaunch", "paused"].contains(&status.as_str()) {
            let what = "its guest runs, although it was started paused";
            self.wrong("rehearsal-guest-ran", what, format!("query-status: {status}"));
        }
    }

    fn check_machine(&mut self, seen: &Observed) {
        let ExpectedMachine { accelerator, architecture, memory_bytes, .. } = *self.expected;
        if seen.kvm.enabled != (accelerator == Accelerator::Kvm) {
            let what = format!("it does not run under the requested accelerator {accelerator}");
            self.wrong("rehearsal-accelerator", what, format!("query-kvm: enabled {}", seen.kvm.enabled));
        }
        let wanted = architecture.profile().machine_type;
        if !seen.machine.contains(wanted) {
            let evidence = format!("the type of /machine: {}", seen.machine);
            self.wrong("rehearsal-machine", format!("it is not a {wanted}"), evidence);
        }
        if seen.memory_bytes != memory_bytes {
            let what = format!("its memory is not {} MiB", memory_bytes >> 20);
            let evidence = format!("query-memory-size-summary: {} bytes", seen.memory_bytes);
            self.wrong("rehearsal-memory", what, evidence);
        }
    }

    fn check_processors(&mut self, seen: &Observed) {
        let (wanted, found) = (self.expected.vcpus, seen.vcpus.len());
        if found != wanted {
            let what = format!("it has {found} processor(s), {wanted} were requested");
            self.wrong("rehearsal-processors", what, "query-cpus-fast");
        }
        let ids: Vec<_> = seen.vcpus.iter().map(|vcpu| vcpu.thread_id).collect();
        let threads = ids.iter().collect::<BTreeSet<_>>().len();
        if self.expected.own_threads && threads != found {
            let what = format!("its {found} processors run on {threads} thread(s) of this host");
            let remedy = "QEMU emulates them one after the other (thread=single, icount), by its build or configuration; use \
                          another QEMU, or --vcpus 1 and --timeout-scale 2";
            self.add("rehearsal-threads", what, format!("query-cpus-fast: the thread ids {ids:?}"), remedy);
        }
    }

    fn check_cpu(&mut self, seen: &Observed) {
        let model = &self.expected.cpu_model;
        if !seen.cpu_type.starts_with(&format!("{model}-")) {
            let evidence = format!("the CPU's type: {}", seen.cpu_type);
            self.wrong("rehearsal-cpu-model", format!("its CPU is not {model}"), evidence);
        }
        let word = |on: bool| if on { "on" } else { "off" };
        for ((name, wanted), (_, found)) in self.expected.cpu_properties.iter().zip(&seen.cpu_properties) {
            let found = match found {
                Ok(found) if found == wanted => continue,
                // If the CPU does not have the property at all, the property counts as off.
                Err(_) if !wanted => continue,
                Ok(found) => word(*found),
                Err(error) => error,
            };
            let what = format!("the CPU's {name} is not {}", word(*wanted));
            self.wrong("rehearsal-cpu-feature", what, format!("qom-get {name}: {found}"));
        }
    }

    fn check_code(&mut self, wanted: &ExpectedFlash, seen: Option<&Flash>) {
        const ID: &str = "rehearsal-firmware";
        let Some(seen) = seen else {
            return self.wrong(ID, "it has no flash for its firmware", "query-block");
        };
        self.check_size("the firmware's code", wanted.code_bytes, seen);
        if !seen.layer.is_of(&wanted.code) && wanted.code_bytes.is_none_or(|bytes| seen.bytes == bytes) {
            self.wrong(ID, format!("its firmware is not {}", wanted.code.display()), in_flash(seen));
        }
        if !seen.layer.ro {
            self.wrong(ID, "the guest may write to the firmware that all guests share", in_flash(seen));
        }
    }

    fn check_variables(&mut self, wanted: &ExpectedFlash, seen: Option<&Flash>) {
        const ID: &str = "rehearsal-nvram";
        let Some(seen) = seen else {
            return self.wrong(ID, "it has no flash for its firmware's variables", "query-block");
        };
        self.check_size("the firmware's variables", wanted.vars_bytes, seen);
        if seen.layer.is_of(&wanted.template) {
            self.add_template(wanted, in_flash(seen));
        } else if !seen.layer.is_of(&wanted.nvram) {
            let what = format!("its variables are not in {}", wanted.nvram.display());
            self.wrong(ID, what, in_flash(seen));
        } else if seen.layer.ro {
            self.wrong(ID, "it cannot write to its own variables", in_flash(seen));
        }
    }

    /// Adds the finding for a machine that uses the template of the firmware's variables.
    pub(super) fn add_template(&mut self, wanted: &ExpectedFlash, seen: String) {
        let template = wanted.template.display();
        let what = format!("its variables are the template {template} instead of a copy");
        let remedy = "each machine must have its own copy, or its changes would affect all others";
        self.add("rehearsal-nvram", what, seen, remedy);
    }

    fn check_size(&mut self, what: &str, wanted: Option<u64>, seen: &Flash) {
        if let Some(wanted) = wanted.filter(|wanted| seen.bytes != *wanted) {
            let what = format!("the flash for {what} has {} bytes, expected {wanted}", seen.bytes);
            let remedy = "the firmware's entry point would be elsewhere and the guest would print nothing: reinstall the \
                          firmware's package, and check what else names a firmware file";
            self.add("rehearsal-flash-size", what, in_flash(seen), remedy);
        }
    }

    /// Checks that the backing files are read-only. A backing file has two nodes: that of its format and, below it,
    /// that of the file itself. It is enough that one of the two is read-only, because QEMU opens the lower node for
    /// writing only if the upper one is writable (`auto-read-only`).
    fn check_layers_below(&mut self, disk: &Disk, seen: &Observed) {
        for path in &disk.backing {
            let mut nodes = seen.layers.iter().filter(|layer| layer.is_of(path)).peekable();
            if nodes.peek().is_some() && !nodes.any(|layer| layer.ro) {
                let what = format!("{}, the backing file of its disk, is writable", path.display());
                self.wrong("rehearsal-disk-writable", what, "query-named-block-nodes: ro false");
            }
        }
    }

    fn check_disk(&mut self, disk: &Disk, seen: &Observed) {
        let path = disk.path.display();
        let inserted: Vec<_> = seen.devices.iter().flat_map(|device| &device.inserted).collect();
        let Some(found) = inserted.iter().find(|layer| layer.is_of(&disk.path)) else {
            let files: Vec<_> = inserted.iter().map(|layer| &layer.file).collect();
            let what = format!("none of its devices has the disk {path}");
            return self.wrong("rehearsal-disk", what, format!("query-block: {files:?}"));
        };
        if found.ro != disk.read_only {
            let what = format!("the guest {} write {path}", if found.ro { "cannot" } else { "may" });
            self.wrong("rehearsal-disk", what, format!("query-block: ro {}", found.ro));
        }
        if disk.read_only {
            return;
        }
        let lies_on = found.image.as_ref().map(ImageInfo::backing).unwrap_or_default();
        self.check_chain(disk, &lies_on, format!("query-block: {lies_on:?}"));
        self.check_layers_below(disk, seen);
        self.check_cache(disk, seen, found);
    }

    /// Checks the backing files of a disk, from top to bottom, if the requested ones are known.
    pub(super) fn check_chain(&mut self, disk: &Disk, lies_on: &[&str], seen: String) {
        let wanted: Vec<_> = disk.backing.iter().map(|path| path.to_string_lossy()).collect();
        if !wanted.is_empty() && lies_on != wanted {
            let (path, files, wanted) = (disk.path.display(), lies_on.join(", "), wanted.join(", "));
            let what = format!("its disk {path} has the backing files {files}, expected {wanted}");
            let remedy = "the guest would skip a layer of its disk and silently corrupt its file system: the domain's XML must \
                          give no <backingStore> for this disk other than what its own headers say";
            self.add("rehearsal-disk-chain", what, seen, remedy);
        }
    }

    /// Checks the cache mode of both nodes of a disk, the node of the format and the node of the file. If one of them
    /// uses the host's page cache, a power cut proves nothing.
    fn check_cache(&mut self, disk: &Disk, seen: &Observed, found: &Layer) {
        let soft = |layer: &&Layer| layer.is_of(&disk.path) && (layer.cache.no_flush || !layer.cache.direct);
        let Some(layer) = seen.layers.iter().chain([found]).find(soft) else { return };
        let CacheMode { direct, no_flush } = layer.cache;
        let how =
            if no_flush { "ignores the guest's flushes" } else { "goes through this host's page cache" };
        let path = disk.path.display();
        let evidence = format!("query-named-block-nodes: {path}: direct {direct}, no-flush {no_flush}");
        self.add_cache(how, evidence);
    }

    /// Adds the finding for a disk that could lose data that the guest has flushed.
    pub(super) fn add_cache(&mut self, how: &str, seen: String) {
        let what = format!("its disk {how}, so a power cut on it proves nothing");
        let remedy = "it must be opened with cache=none: find what changes the domain's disks on this host";
        self.add("rehearsal-disk-cache", what, seen, remedy);
    }

    /// Checks the table of QEMU's `info usernet`. It has a row for each forwarded port:
    /// `TCP[HOST_FORWARD] 11 127.0.0.1 43105 10.0.2.15 22 0 0`.
    fn check_network(&mut self, seen: &Observed) {
        const ID: &str = "rehearsal-network";
        let rows: Vec<_> = seen.forwarding.lines().filter(|line| line.contains("HOST_FORWARD")).collect();
        let column = |row: &str, at| row.split_whitespace().nth(at).unwrap_or_default().to_owned();
        if let Some(row) = rows.iter().find(|row| column(row, 2) != "127.0.0.1") {
            self.wrong(ID, "the guest's ports are open to other hosts", row.trim());
        }
        let leads_to = |port: &u16| rows.iter().any(|row| column(row, 5) == port.to_string());
        if let Some(port) = self.expected.forwarded_ports.iter().find(|port| !leads_to(port)) {
            let what = format!("no port of this host leads to the guest's port {port}");
            self.wrong(ID, what, "info usernet");
        }
    }
}

fn in_flash(flash: &Flash) -> String {
    let access = if flash.layer.ro { "read-only" } else { "writable" };
    format!("{}: {} bytes, {}, {access}", flash.qom_path, flash.bytes, flash.layer.file)
}
