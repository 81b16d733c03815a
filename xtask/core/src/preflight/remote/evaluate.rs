//! The findings about the libvirt that `--connect` names.

use super::capabilities::{DomainOffer, GuestOffer};
use super::facts::{Access, ConnectionFacts, ConnectionOffer, Network, Pool};
use super::refusal::{PERMISSION, let_in};
use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::{self, Accel, DEFAULT_NAME, MachineArgs, PlaceArgs};
use crate::cpu::{Cpu, CpuModel};
use crate::format::gib;
use crate::libvirt_uri::ConnectUri;
use crate::preflight::PreflightRequest;
use crate::preflight::findings::{Finding, MEMORY_BESIDE, MIB};

/// The free bytes that a storage pool needs for an image and the writes of a guest.
const POOL_NEEDED: u64 = 4096 * MIB;

/// Returns the accelerator for a guest of this kind. `--accel kvm` and `--accel tcg` determine it. With `--accel auto`,
/// it is KVM if libvirt offers KVM for this kind of guest, and TCG otherwise.
pub fn accelerator(accel: Accel, guest: &GuestOffer) -> Accelerator {
    let offered = guest.domain_types.iter().any(|kind| kind == "kvm");
    match accel {
        Accel::Kvm => Accelerator::Kvm,
        Accel::Auto if offered => Accelerator::Kvm,
        Accel::Auto | Accel::Tcg => Accelerator::Tcg,
    }
}

/// Returns all findings about a libvirt, for the requested guests. All remedies are texts and no commands, so `--fix`
/// runs none of them: the host or its daemon may belong to someone else.
pub fn evaluate(facts: &ConnectionFacts, asked: &PreflightRequest<'_>) -> Vec<Finding> {
    let uri = &facts.uri;
    let offer = match &facts.answer {
        Err(refusal) => return vec![refusal.finding(uri)],
        Ok(offer) => offer,
    };
    let mut findings = vec![host(offer)];
    if let Access::ReadOnly(why) = &offer.access {
        let what = "this user has read-only access and cannot start guests";
        findings.push(Finding::blocks(PERMISSION, what, why, let_in(uri)));
    }
    findings.extend(memory(offer, asked.machine.memory * MIB));
    match &offer.guests {
        Ok(guests) => {
            let of = |arch: &VmArchitecture| guest(uri, offer, guests, *arch, asked.machine);
            findings.extend(asked.architectures.iter().flat_map(of));
        }
        Err(error) => {
            let what = "its guest architectures are unknown";
            findings.push(Finding::degrades("connect-arch", what, error, uri.virsh("capabilities")));
        }
    }
    findings.extend(match &offer.network {
        _ if asked.place.network == Some(cli::Network::User) => None,
        Err(error) => {
            let remedy = format!(
                "{}install libvirt's network driver (Debian 13: libvirt-daemon-driver-network) and restart the daemon",
                uri.there()
            );
            Some(Finding::degrades("connect-network", "cannot read its networks", error, remedy))
        }
        Ok(known) => network(uri, known.as_ref(), asked.place),
    });
    findings.push(match &offer.pool {
        Err(error) => {
            let remedy = format!("{}install libvirt's storage driver and restart the daemon", uri.there());
            Finding::blocks("connect-pool", "cannot read its storage pools", error, remedy)
        }
        Ok(known) => pool(uri, known.as_ref(), asked.place.pool()),
    });
    let named = |finding: Finding| Finding { sentence: format!("{uri}: {}", finding.sentence), ..finding };
    findings.into_iter().map(named).collect()
}

fn host(offer: &ConnectionOffer) -> Finding {
    let or = |known: &Result<String, String>| known.clone().unwrap_or_else(|_| "unknown".to_owned());
    let node = offer.node.as_ref().map_or_else(
        |_| "an unknown machine".to_owned(),
        |node| format!("{}, {} CPUs, {} of memory", node.machine, node.cpus, gib(node.memory)),
    );
    let free = offer.free_memory.as_ref().map_or(String::new(), |free| format!(" ({} free)", gib(*free)));
    let texts = [&offer.host_name, &offer.hypervisor, &offer.libvirt].map(|text| text.as_ref().err());
    let unknown = texts.into_iter().chain([offer.node.as_ref().err(), offer.free_memory.as_ref().err()]);
    let unknown: Vec<&str> = unknown.flatten().map(String::as_str).collect();
    let evidence = if unknown.is_empty() { "libvirt's answer".to_owned() } else { unknown.join("; ") };
    let (name, libvirt, hypervisor) = (or(&offer.host_name), or(&offer.libvirt), or(&offer.hypervisor));
    let sentence = format!("host {name}: {node}{free}; libvirt {libvirt}, {hypervisor}");
    Finding::informs("connect-host", sentence, evidence)
}

fn memory(offer: &ConnectionOffer, guest: u64) -> Option<Finding> {
    let wanted = guest + MEMORY_BESIDE;
    let less = "use a smaller guest (--memory), or end other guests there";
    match (&offer.node, &offer.free_memory) {
        (Ok(node), _) if node.memory < wanted => {
            let has = format!("the host has {} of memory, {} wanted", gib(node.memory), gib(wanted));
            Some(Finding::blocks("connect-memory", has, "virNodeGetInfo", less))
        }
        (_, Ok(free)) if *free < wanted => {
            let has = format!("{} of memory free, {} wanted", gib(*free), gib(wanted));
            Some(Finding::degrades("connect-memory", has, "free, buffers and page cache", less))
        }
        _ => None,
    }
}

fn guest(
    uri: &ConnectUri,
    offer: &ConnectionOffer,
    guests: &[GuestOffer],
    arch: VmArchitecture,
    machine: &MachineArgs,
) -> Vec<Finding> {
    let (profile, there) = (arch.profile(), uri.there());
    let Some(guest) = guests.iter().find(|guest| guest.machine == profile.machine) else {
        let mut runs: Vec<_> = guests.iter().map(|guest| guest.machine.as_str()).collect();
        runs.dedup();
        let what = format!("it runs no {arch} guests");
        let remedy = format!("{there}install {} and restart the daemon", profile.emulator);
        return vec![Finding::blocks("connect-arch", what, format!("it runs {}", list(&runs)), remedy)];
    };
    let mut findings = Vec::new();
    if !guest.machine_types.iter().any(|kind| kind == profile.machine_type) {
        findings.push(Finding::blocks(
            "connect-machine",
            format!("the machine type {} is not available for its {arch} guests", profile.machine_type),
            format!("{} has {}", guest.emulator, list(&guest.machine_types)),
            format!("{there}install a QEMU that supports it"),
        ));
    }
    let accelerator = accelerator(machine.accel, guest);
    if accelerator == Accelerator::Kvm && !guest.domain_types.iter().any(|kind| kind == "kvm") {
        findings.push(Finding::blocks(
            "connect-accel",
            format!("KVM is not available for its {arch} guests"),
            format!("domain types: {}", list(&guest.domain_types)),
            format!(
                "{there}check /dev/kvm and the virtualisation setting of the firmware; or use --accel tcg"
            ),
        ));
        return findings;
    }
    match offer.domains.iter().find(|(of, _)| *of == arch) {
        Some((_, Ok(offer))) => {
            let cpu = Cpu::resolve(arch, accelerator, machine.cpu.as_deref());
            findings.extend(firmware(uri, arch, offer));
            findings.extend(has_cpu(offer, &cpu.model).err().map(|evidence| {
                let what = format!("the CPU {} is not available for its {arch} guests", cpu.describe());
                let ask = format!("domcapabilities --arch {arch} lists the models; choose one with --cpu");
                Finding::blocks("connect-cpu", what, evidence, uri.virsh(&ask))
            }));
            let how = match accelerator {
                Accelerator::Kvm => "by KVM (not tested)",
                Accelerator::Tcg => "emulated",
            };
            let sentence = format!("{arch} guests: {how}; machine type {}", offer.machine_type);
            let evidence = format!("{}, {}", offer.emulator, loaders(offer));
            findings.push(Finding::informs("connect-offer", sentence, evidence));
        }
        Some((_, Err(error))) => {
            let what = format!("the capabilities of its {arch} guests are unknown");
            let ask = format!("domcapabilities --arch {arch} --machine {}", profile.machine_type);
            findings.push(Finding::degrades("connect-domain", what, error, uri.virsh(&ask)));
        }
        None => {}
    }
    findings
}

fn firmware(uri: &ConnectUri, arch: VmArchitecture, offer: &DomainOffer) -> Option<Finding> {
    if offer.loaders.is_empty() {
        let package = arch.pick("ovmf", "qemu-efi-aarch64");
        return Some(Finding::blocks(
            "connect-firmware",
            format!("it has no UEFI for {arch} guests"),
            "no loader in its domain capabilities",
            format!("{}install it (Debian: {package})", uri.there()),
        ));
    }
    (!offer.selects_uefi).then(|| {
        let what = format!("it does not select UEFI for {arch} guests automatically");
        let remedy = "name the loader in the domain: <loader readonly='yes' type='pflash'>FILE</loader>";
        Finding::degrades("connect-firmware", what, loaders(offer), remedy)
    })
}

fn loaders(offer: &DomainOffer) -> String {
    if offer.loaders.is_empty() { "no firmware file".to_owned() } else { list(&offer.loaders) }
}

/// Checks the network of `--network nat`. Without this flag, a guest has QEMU's user-mode network, and a fault of the
/// network `default` does not block.
fn network(uri: &ConnectUri, network: Option<&Network>, place: &PlaceArgs) -> Option<Finding> {
    let (name, is_needed) = match &place.network {
        Some(cli::Network::Nat(name)) => (name.as_str(), true),
        _ => (DEFAULT_NAME, false),
    };
    let fault = |id, what: String, evidence: &str, remedy: String| match is_needed {
        true => Finding::blocks(id, what, evidence, remedy),
        false => Finding::degrades(id, what, evidence, remedy),
    };
    let start = uri.virsh(&format!("net-start {name}"));
    let autostart = uri.virsh(&format!("net-autostart {name}"));
    Some(match network {
        // The daemon of a user (a session) cannot create such a network, so its absence is not a fault.
        None if uri.session => Finding::informs(
            "connect-network-missing",
            format!("no network {name}, as in every session; guests have user-mode networking"),
            "virNetworkLookupByName",
        ),
        None if name != DEFAULT_NAME => fault(
            "connect-network-missing",
            format!("there is no network {name}"),
            "virNetworkLookupByName",
            format!("choose one with --network nat:NAME; {} lists them", uri.virsh("net-list --all")),
        ),
        None => fault(
            "connect-network-missing",
            format!("there is no network {name}"),
            "virNetworkLookupByName",
            format!(
                "{} && {start} && {autostart} (Debian has the file in libvirt-daemon-system, later in \
                 libvirt-daemon-config-network)",
                uri.virsh("net-define /usr/share/libvirt/networks/default.xml")
            ),
        ),
        Some(Network { active: true, autostart: true }) => return None,
        Some(Network { active: true, .. }) => {
            let what = format!("the network {name} does not start automatically at the host's next boot");
            let evidence = "active: yes, autostart: no";
            Finding::degrades("connect-network-autostart", what, evidence, autostart)
        }
        Some(network) => {
            let what = format!("the network {name} is not active");
            let (evidence, remedy) = match network.autostart {
                true => ("autostart: yes", start),
                false => ("autostart: no", format!("{start} && {autostart}")),
            };
            fault("connect-network-inactive", what, evidence, remedy)
        }
    })
}

/// Checks the storage pool, in which a smoke makes the disks of its guest.
fn pool(uri: &ConnectUri, pool: Option<&Pool>, name: &str) -> Finding {
    let start = uri.virsh(&format!("pool-start {name}"));
    match pool {
        None => {
            // libvirt refuses two pools in one directory.
            let last = if name == DEFAULT_NAME { "images" } else { name };
            let place = match uri.session {
                true => format!("\"$HOME/.local/share/libvirt/{last}\""),
                false => format!("/var/lib/libvirt/{last}"),
            };
            let define = uri.virsh(&format!("pool-define-as {name} dir --target {place}"));
            let build = uri.virsh(&format!("pool-build {name}"));
            let what = format!("there is no storage pool {name} for the disks of a guest");
            let remedy = format!("{define} && {build} && {start}; or choose another pool with --pool NAME");
            Finding::blocks("connect-pool-missing", what, "virStoragePoolLookupByName", remedy)
        }
        Some(pool) if !pool.active => {
            let what = format!("the storage pool {name} is not active");
            Finding::blocks("connect-pool-inactive", what, "virStoragePoolIsActive", start)
        }
        Some(pool) => {
            let free = format!("{} free in the storage pool {name}", gib(pool.free));
            if pool.free >= POOL_NEEDED {
                return Finding::informs("connect-pool", free, "virStoragePoolGetInfo");
            }
            let what = format!("{free}, {} needed", gib(POOL_NEEDED));
            let list = uri.virsh(&format!("vol-list {name} --details"));
            let remedy = format!("free some space: {list}; or choose another pool with --pool NAME");
            Finding::blocks("connect-pool-room", what, "virStoragePoolGetInfo", remedy)
        }
    }
}

/// Checks that a guest can have this CPU. The error is the evidence of the finding.
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

#[cfg(test)]
mod tests;
