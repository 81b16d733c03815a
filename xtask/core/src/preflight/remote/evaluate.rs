//! The connection's facts judged.

use super::capabilities::{DomainOffer, GuestOffer};
use super::facts::{Access, ConnectionFacts, ConnectionOffer, DEFAULT, DomainAnswer};
use super::refusal::{PERMISSION, let_in};
use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::{Accel, MachineArgs};
use crate::cpu::{Cpu, CpuModel};
use crate::libvirt_uri::ConnectUri;
use crate::preflight::PreflightRequest;
use crate::preflight::findings::{Finding, Remedy, Severity};

const MIB: u64 = 1 << 20;
/// QEMU itself, beside the guest's memory.
const QEMU_MEMORY: u64 = 512 * MIB;
/// A pool with less has no room for an image and what a guest writes.
const POOL_NEEDED: u64 = 4096 * MIB;

/// One libvirt and what is being said of it.
struct Evaluation<'a> {
    uri: &'a ConnectUri,
    findings: Vec<Finding>,
}

/// How libvirt would run a guest of this kind: as `--accel` says, else by KVM where it is offered.
pub fn accelerator(accel: Accel, guest: &GuestOffer) -> Accelerator {
    let offered = guest.domain_types.iter().any(|kind| kind == "kvm");
    match accel {
        Accel::Kvm => Accelerator::Kvm,
        Accel::Auto if offered => Accelerator::Kvm,
        Accel::Auto | Accel::Tcg => Accelerator::Tcg,
    }
}

/// Everything that is to be said of a libvirt, for the guests that are asked for.
pub fn evaluate(facts: &ConnectionFacts, asked: &PreflightRequest<'_>) -> Vec<Finding> {
    let offer = match &facts.answer {
        Err(refusal) => return vec![refusal.finding(&facts.uri)],
        Ok(offer) => offer,
    };
    let mut evaluation = Evaluation { uri: &facts.uri, findings: Vec::new() };
    evaluation.host(offer);
    evaluation.access(&offer.access);
    evaluation.memory(offer, asked.machine.memory * MIB);
    match &offer.guests {
        Ok(guests) => {
            for arch in asked.architectures {
                evaluation.guest(offer, guests, *arch, asked.machine);
            }
        }
        Err(error) => {
            let by_hand = facts.uri.virsh("capabilities");
            evaluation.degrades(
                "connect-arch",
                "its guest architectures are unknown".to_owned(),
                error,
                by_hand,
            );
        }
    }
    evaluation.network(offer);
    evaluation.pool(offer);
    evaluation.findings
}

impl Evaluation<'_> {
    fn add(
        &mut self,
        id: &'static str,
        severity: Severity,
        sentence: impl std::fmt::Display,
        evidence: impl Into<String>,
        remedy: Option<String>,
    ) {
        let sentence = format!("{}: {sentence}", self.uri);
        // Never a remedy that `--fix` would run: this is another machine's business, or a daemon's.
        let remedy = remedy.map(Remedy::Manual);
        self.findings.push(Finding { id, severity, sentence, evidence: evidence.into(), remedy });
    }

    fn blocks(&mut self, id: &'static str, sentence: String, evidence: impl Into<String>, remedy: String) {
        self.add(id, Severity::Blocks, sentence, evidence, Some(remedy));
    }

    fn degrades(&mut self, id: &'static str, sentence: String, evidence: impl Into<String>, remedy: String) {
        self.add(id, Severity::Degrades, sentence, evidence, Some(remedy));
    }

    fn host(&mut self, offer: &ConnectionOffer) {
        let or = |known: &Result<String, String>| known.clone().unwrap_or_else(|_| "unknown".to_owned());
        let node = offer.node.as_ref().map_or_else(
            |_| "an unknown machine".to_owned(),
            |node| format!("{}, {} CPUs, {} of memory", node.machine, node.cpus, size(node.memory)),
        );
        let free =
            offer.free_memory.as_ref().map_or(String::new(), |free| format!(" ({} free)", size(*free)));
        let unknown: Vec<&str> = [
            offer.host_name.as_ref().err(),
            offer.hypervisor.as_ref().err(),
            offer.libvirt.as_ref().err(),
            offer.node.as_ref().err(),
            offer.free_memory.as_ref().err(),
        ]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
        let evidence = if unknown.is_empty() { "libvirt's answer".to_owned() } else { unknown.join("; ") };
        self.add(
            "connect-host",
            Severity::Informs,
            format!(
                "host {}: {node}{free}; libvirt {}, {}",
                or(&offer.host_name),
                or(&offer.libvirt),
                or(&offer.hypervisor)
            ),
            evidence,
            None,
        );
    }

    fn access(&mut self, access: &Access) {
        if let Access::ReadOnly(why) = access {
            let remedy = let_in(self.uri);
            self.blocks(
                PERMISSION,
                "this user has read-only access and cannot start guests".to_owned(),
                why,
                remedy,
            );
        }
    }

    fn memory(&mut self, offer: &ConnectionOffer, guest: u64) {
        let wanted = guest + QEMU_MEMORY;
        let less = "use a smaller guest (--memory), or end other guests there".to_owned();
        match (&offer.node, &offer.free_memory) {
            (Ok(node), _) if node.memory < wanted => {
                let has = format!("the host has {} of memory, {} wanted", size(node.memory), size(wanted));
                self.blocks("connect-memory", has, "virNodeGetInfo", less);
            }
            (_, Ok(free)) if *free < wanted => {
                let has = format!("{} of memory free, {} wanted", size(*free), size(wanted));
                self.degrades("connect-memory", has, "free, buffers and page cache", less);
            }
            _ => {}
        }
    }

    fn guest(
        &mut self,
        offer: &ConnectionOffer,
        guests: &[GuestOffer],
        arch: VmArchitecture,
        machine: &MachineArgs,
    ) {
        let profile = arch.profile();
        let there = self.uri.there();
        let Some(guest) = guests.iter().find(|guest| guest.machine == profile.machine) else {
            let mut runs: Vec<_> = guests.iter().map(|guest| guest.machine.as_str()).collect();
            runs.dedup();
            let evidence = format!("it runs {}", list(&runs));
            let remedy = format!("{there}install {} and restart the daemon", profile.emulator);
            return self.blocks("connect-arch", format!("it runs no guests of {arch}"), evidence, remedy);
        };
        if !guest.machine_types.iter().any(|kind| kind == profile.machine_type) {
            self.blocks(
                "connect-machine",
                format!("its {arch} guests cannot be of the machine type {}", profile.machine_type),
                format!("{} has {}", guest.emulator, list(&guest.machine_types)),
                format!("{there}install a QEMU that supports it"),
            );
        }
        let accelerator = accelerator(machine.accel, guest);
        if accelerator == Accelerator::Kvm && !guest.domain_types.iter().any(|kind| kind == "kvm") {
            let evidence = format!("domain types: {}", list(&guest.domain_types));
            let remedy = format!(
                "{there}check /dev/kvm and the virtualisation setting of the firmware; or use --accel tcg"
            );
            return self.blocks(
                "connect-accel",
                format!("its {arch} guests cannot have KVM"),
                evidence,
                remedy,
            );
        }
        match offer.domains.iter().find(|answer| answer.arch == arch) {
            Some(DomainAnswer { offer: Ok(domain), .. }) => self.domain(arch, accelerator, machine, domain),
            Some(DomainAnswer { offer: Err(error), .. }) => {
                let what = format!("the capabilities of its {arch} guests are unknown");
                let ask = format!("domcapabilities --arch {arch} --machine {}", profile.machine_type);
                self.degrades("connect-domain", what, error, self.uri.virsh(&ask));
            }
            None => {}
        }
    }

    fn domain(
        &mut self,
        arch: VmArchitecture,
        accelerator: Accelerator,
        machine: &MachineArgs,
        offer: &DomainOffer,
    ) {
        let there = self.uri.there();
        let files =
            if offer.loaders.is_empty() { "no firmware file".to_owned() } else { list(&offer.loaders) };
        if offer.loaders.is_empty() {
            self.blocks(
                "connect-firmware",
                format!("it has no UEFI for {arch} guests"),
                "no loader in its domain capabilities",
                format!("{there}install it (Debian: {})", arch.pick("ovmf", "qemu-efi-aarch64")),
            );
        } else if !offer.selects_uefi {
            self.degrades(
                "connect-firmware",
                format!("it does not select UEFI for {arch} guests automatically"),
                files.clone(),
                "name the loader in the domain: <loader readonly='yes' type='pflash'>FILE</loader>"
                    .to_owned(),
            );
        }
        let cpu = Cpu::resolve(arch, accelerator, machine.cpu.as_deref());
        if let Err(evidence) = has_cpu(offer, &cpu.model) {
            let ask = format!("domcapabilities --arch {arch} lists the models; choose one with --cpu");
            let remedy = self.uri.virsh(&ask);
            self.blocks(
                "connect-cpu",
                format!("its {arch} guests cannot have the CPU {}", cpu.describe()),
                evidence,
                remedy,
            );
        }
        let how = match accelerator {
            Accelerator::Kvm => "by KVM (not tested)",
            Accelerator::Tcg => "emulated",
        };
        let sentence = format!("{arch} guests: {how}; machine type {}", offer.machine_type);
        self.add("connect-offer", Severity::Informs, sentence, format!("{}, {files}", offer.emulator), None);
    }

    fn network(&mut self, offer: &ConnectionOffer) {
        let (start, autostart) = (
            self.uri.virsh(&format!("net-start {DEFAULT}")),
            self.uri.virsh(&format!("net-autostart {DEFAULT}")),
        );
        match &offer.network {
            Err(error) => {
                let remedy = format!(
                    "{}install libvirt's network driver (Debian 13: libvirt-daemon-driver-network) and restart the daemon",
                    self.uri.there()
                );
                self.degrades("connect-network", "cannot read its networks".to_owned(), error, remedy);
            }
            // A user's own daemon cannot make a network of this kind.
            Ok(None) if self.uri.session => self.add(
                "connect-network-missing",
                Severity::Informs,
                format!("no network {DEFAULT}, as in every session; guests have user-mode networking"),
                "virNetworkLookupByName",
                None,
            ),
            Ok(None) => {
                let define = self.uri.virsh("net-define /usr/share/libvirt/networks/default.xml");
                let remedy = format!(
                    "{define} && {start} && {autostart} (Debian has the file in libvirt-daemon-system, later in \
                     libvirt-daemon-config-network)"
                );
                let what = format!("there is no network {DEFAULT}");
                self.degrades("connect-network-missing", what, "virNetworkLookupByName", remedy);
            }
            Ok(Some(network)) if !network.active => {
                let (says, remedy) = if network.autostart {
                    ("autostart: yes", start)
                } else {
                    ("autostart: no", format!("{start} && {autostart}"))
                };
                let what = format!("the network {DEFAULT} is not active");
                self.degrades("connect-network-inactive", what, says, remedy);
            }
            Ok(Some(network)) if !network.autostart => {
                let what =
                    format!("the network {DEFAULT} does not start automatically at the host's next boot");
                self.degrades("connect-network-autostart", what, "active: yes, autostart: no", autostart);
            }
            Ok(Some(_)) => {}
        }
    }

    fn pool(&mut self, offer: &ConnectionOffer) {
        let start = self.uri.virsh(&format!("pool-start {DEFAULT}"));
        match &offer.pool {
            Err(error) => {
                let remedy =
                    format!("{}install libvirt's storage driver and restart the daemon", self.uri.there());
                self.degrades("connect-pool", "cannot read its storage pools".to_owned(), error, remedy);
            }
            Ok(None) => {
                let place = if self.uri.session {
                    "\"$HOME/.local/share/libvirt/images\""
                } else {
                    "/var/lib/libvirt/images"
                };
                let define = self.uri.virsh(&format!("pool-define-as {DEFAULT} dir --target {place}"));
                let remedy = format!("{define} && {start}");
                let what = format!("there is no storage pool {DEFAULT}; disks are named by their paths");
                self.add(
                    "connect-pool-missing",
                    Severity::Informs,
                    what,
                    "virStoragePoolLookupByName",
                    Some(remedy),
                );
            }
            Ok(Some(pool)) if !pool.active => {
                let what = format!("the storage pool {DEFAULT} is not active");
                self.degrades("connect-pool-inactive", what, "virStoragePoolIsActive", start);
            }
            Ok(Some(pool)) if pool.free < POOL_NEEDED => {
                let what = format!(
                    "{} free in the storage pool {DEFAULT}, {} wanted",
                    size(pool.free),
                    size(POOL_NEEDED)
                );
                let remedy =
                    format!("free some space: {}", self.uri.virsh(&format!("vol-list {DEFAULT} --details")));
                self.degrades("connect-pool-room", what, "virStoragePoolGetInfo", remedy);
            }
            Ok(Some(pool)) => {
                let what = format!("{} free in the storage pool {DEFAULT}", size(pool.free));
                self.add("connect-pool", Severity::Informs, what, "virStoragePoolGetInfo", None);
            }
        }
    }
}

/// Whether a guest can have this CPU; the reason why not.
fn has_cpu(offer: &DomainOffer, model: &CpuModel) -> Result<(), String> {
    let (mode, name) = match model {
        CpuModel::Maximum => ("maximum", None),
        CpuModel::HostPassthrough => ("host-passthrough", None),
        CpuModel::Named(name) => ("custom", Some(name)),
    };
    if !offer.cpu_modes.iter().any(|supported| supported == mode) {
        return Err(format!("CPU modes: {}", list(&offer.cpu_modes)));
    }
    let Some(name) = name else { return Ok(()) };
    match offer.cpu_models.iter().find(|(known, _)| known == name) {
        None => Err(format!("it is not one of the {} models of {}", offer.cpu_models.len(), offer.emulator)),
        Some((_, Some(false))) => Err(format!("usable='no' for {name}")),
        Some(_) => Ok(()),
    }
}

fn list(words: &[impl AsRef<str>]) -> String {
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    if words.is_empty() { "nothing".to_owned() } else { words.join(" ") }
}

fn size(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1024 * MIB) as f64)
}

#[cfg(test)]
mod tests;
