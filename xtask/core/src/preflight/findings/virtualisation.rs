//! The findings about QEMU, its firmware, libvirt, KVM and nats-server.

use super::finding::{Finding, Remedy, Severity};
use crate::host::edk2::Edk2;
use crate::host::facts::Facts;
use crate::host::firmware::{Rejected, Why};
use crate::host::kvm::Kvm;
use crate::host::local::LIBVIRT_IOHELPERS;
use crate::host::packages::{Need, PackageManager};
use crate::host::qemu::Emulator;
use crate::host::tools::release;
use crate::os_release::OsRelease;

/// The first QEMU release with notably faster emulation; xtask/docs/benchmarks.md has the figure.
const FASTER_QEMU: (u32, u32) = (9, 1);
/// The oldest tested release that supports JetStream's key-value buckets as the agent uses them.
const OLDEST_NATS: (u32, u32) = (2, 9);

pub(super) fn evaluate(facts: &Facts, findings: &mut Vec<Finding>) {
    check_nats(facts, findings);
    if facts.is_on_daemon {
        return;
    }
    check_emulator(facts, findings);
    match &facts.firmware {
        Err(rejected) => findings.push(no_firmware(facts, rejected)),
        Ok(_) => findings.extend(firmware_with_emulator(facts)),
    }
    check_libvirt(facts, findings);
    findings.extend(kvm(facts));
}

fn check_emulator(facts: &Facts, findings: &mut Vec<Finding>) {
    let (arch, program) = (facts.arch, facts.arch.profile().emulator);
    let install = Remedy::Install(Need::Emulator, arch);
    let finding = match &facts.emulator {
        Some(Ok(emulator)) => {
            findings.extend(old(facts, emulator));
            findings.extend(untuned(facts, emulator));
            findings.extend(no_network(facts, emulator));
            return;
        }
        None if facts.other_emulators.is_empty() => {
            Finding::blocks("emulator", format!("{program} is missing"), "not on PATH", install)
        }
        None => {
            let found = format!("found {}", facts.other_emulators.join(", "));
            Finding::blocks("emulator-arch", format!("QEMU is installed without {program}"), found, install)
        }
        Some(Err((path, error))) => {
            let remedy = format!("reinstall the package that provides {}", path.display());
            Finding::blocks("emulator-broken", format!("{program} does not run"), error, remedy)
        }
    };
    findings.push(finding);
}

fn old(facts: &Facts, emulator: &Emulator) -> Option<Finding> {
    let sentence = format!("QEMU {} works; 9.1 or newer emulates some 8 % faster", emulator.version);
    let remedy = newer_qemu(&facts.host.os).map(Remedy::from);
    let finding = Finding::informs("emulator-old", sentence, emulator.path.display().to_string());
    (emulator.release() < FASTER_QEMU).then_some(Finding { severity: Severity::Degrades, remedy, ..finding })
}

/// Returns how to install a newer QEMU, if an additional package source of the distribution provides one. `--fix` does
/// not do this, because it never changes package sources.
fn newer_qemu(os: &OsRelease) -> Option<&'static str> {
    match (os.id.as_str(), os.version_id.as_str()) {
        ("debian", "12") => Some(
            "bookworm-backports has QEMU 10: add that suite to apt's sources, then apt-get install -t bookworm-backports \
             qemu-system-arm qemu-system-x86 qemu-utils",
        ),
        ("ubuntu", "24.04") => Some(
            "Ubuntu's Cloud Archive has a newer QEMU for 24.04: add-apt-repository cloud-archive:flamingo, then apt-get \
             install qemu-system-arm qemu-system-x86 qemu-utils",
        ),
        _ => None,
    }
}

/// Returns a finding if the emulator lacks a CPU property that must be set to make `max` fast. An emulated `max` then
/// has SVE or pointer authentication, whose emulation slows down a boot.
fn untuned(facts: &Facts, emulator: &Emulator) -> Option<Finding> {
    let tuned = &facts.arch.profile().tcg_cpu;
    let wanted = tuned.globals.iter().map(|global| global.property);
    let wanted = wanted.chain(tuned.disabled_features.iter().copied());
    let missing: Vec<_> =
        wanted.filter(|wanted| !emulator.max_properties.iter().any(|known| known == wanted)).collect();
    if missing.is_empty() {
        return None;
    }
    let sentence = format!(
        "this QEMU's max CPU has no property {}; emulation is slow without it",
        missing.join(" and no property ")
    );
    let evidence = format!("QEMU {}, query-cpu-model-expansion", emulator.version);
    Some(Finding::degrades("emulator-cpu", sentence, evidence, "install QEMU 6.0 or newer"))
}

/// Returns a finding if the emulator lacks the user-mode network, to which each guest is connected.
fn no_network(facts: &Facts, emulator: &Emulator) -> Option<Finding> {
    let error = emulator.user_network.as_ref().err()?;
    let path = emulator.path.display();
    let sentence = format!("{path} was built without the user-mode network, which each guest needs");
    let manager = facts.host.package_manager;
    let packages = manager.map(|manager| manager.packages(Need::Emulator, facts.arch)).unwrap_or_default();
    let remedy = format!(
        "put the QEMU of the distribution ({}) first on PATH, or build QEMU with libslirp (--enable-slirp)",
        packages.first().unwrap_or(&"its package")
    );
    Some(Finding::blocks("emulator-network", sentence, error, remedy))
}

/// Returns the finding for a machine without usable firmware. If pairs were rejected for several reasons, the finding
/// names the first of these reasons: a file of the wrong size, a missing file that a descriptor names, an unreadable
/// file, firmware that requires signed boot loaders. For the first three, the user must reinstall a package.
fn no_firmware(facts: &Facts, rejected: &[Rejected]) -> Finding {
    let arch = facts.arch;
    let worst = rejected.iter().min_by_key(|rejected| &rejected.why).map(|rejected| &rejected.why);
    let (id, what) = match worst {
        Some(Why::Size(..)) => ("firmware-size", "has the wrong size"),
        Some(Why::Dangling(_)) => ("firmware-descriptor", "is described by a descriptor, but missing"),
        Some(Why::Unreadable(_)) => ("firmware-unreadable", "cannot be read"),
        Some(Why::Enrolled) => {
            ("firmware-enrolled", "is installed only in the variant that requires signed boot loaders")
        }
        Some(Why::Malformed(_) | Why::Absent) | None => ("firmware", "is missing"),
    };
    let described: Vec<_> = rejected.iter().map(ToString::to_string).collect();
    let sentence = format!("UEFI firmware for {arch} {what}");
    // If the package is installed but one of its files is wrong, an ordinary installation of the package changes
    // nothing.
    let remedy = match worst {
        Some(Why::Size(..) | Why::Dangling(_) | Why::Unreadable(_)) => reinstall(facts, Need::Firmware),
        _ => Remedy::Install(Need::Firmware, arch),
    };
    Finding::blocks(id, sentence, described.join("; "), remedy)
}

/// Returns the remedy if a package is installed but does not work.
pub(super) fn reinstall(facts: &Facts, need: Need) -> Remedy {
    let manager = facts.host.package_manager;
    let packages = manager.map(|manager| manager.packages(need, facts.arch)).unwrap_or_default();
    match (manager, &packages[..]) {
        (Some(PackageManager::Apt), [package, ..]) => {
            format!("reinstall it: apt-get install --reinstall {package}").into()
        }
        (Some(_), [package, ..]) => format!("remove the package {package} and install it again").into(),
        _ => "install its package again".into(),
    }
}

/// Returns a finding if the combination of this firmware and this emulator is known to fail.
fn firmware_with_emulator(facts: &Facts) -> Option<Finding> {
    // Only emulated guests have the fault.
    facts.kvm.against()?;
    let (emulator, bad) = (facts.working_emulator()?, facts.known_bad()?);
    let path = facts.firmware.as_ref().map(|pair| pair.code.display().to_string()).unwrap_or_default();
    let edk2 = facts.edk2.as_ref().map(Edk2::to_string).unwrap_or_default();
    let sentence = match bad.global {
        Some(global) => {
            format!("edk2 {edk2} with QEMU's max CPU {}; guests are started with {global}", bad.what)
        }
        None => format!("edk2 {edk2} with QEMU {} and its max CPU {}", emulator.version, bad.what),
    };
    let remedy = "install a newer firmware package, or use --cpu cortex-a76";
    Some(Finding::degrades("firmware-known-bad", sentence, path, remedy))
}

fn check_libvirt(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.host.libvirt_driver.is_none() {
        findings.push(Finding::blocks(
            "libvirt-driver",
            "libvirt's QEMU driver is missing",
            "no libvirt_driver_qemu.so in libvirt's connection-driver directory",
            Remedy::Install(Need::LibvirtDriver, facts.arch),
        ));
    }
    if !facts.host.libvirt_iohelper {
        findings.push(Finding::blocks(
            "libvirt-iohelper",
            "libvirt's libvirt_iohelper is missing; it saves a machine's memory",
            format!("none of {}", LIBVIRT_IOHELPERS.join(", ")),
            Remedy::Install(Need::LibvirtIohelper, facts.arch),
        ));
    }
    findings.extend(libvirt_user(facts));
}

fn libvirt_user(facts: &Facts) -> Option<Finding> {
    let user = match &facts.host.missing_libvirt_user {
        Ok(user) => (*user)?,
        Err(error) => {
            let sentence = "cannot find out whether libvirt's account exists, because getent does not answer";
            let remedy = "run the command by hand to see why";
            return Some(Finding::degrades("libvirt-user-unknown", sentence, error, remedy));
        }
    };
    let command = format!(
        "useradd --system --user-group --home-dir /var/lib/libvirt --no-create-home --shell /usr/sbin/nologin {user}"
    );
    Some(Finding::blocks(
        "libvirt-user",
        format!("the account {user} is missing, and libvirt does not start as root without it"),
        format!("getent passwd {user}"),
        Remedy::RunAsRoot(vec![command.split(' ').map(str::to_owned).collect()]),
    ))
}

fn kvm(facts: &Facts) -> Option<Finding> {
    let arch = facts.arch;
    let emulated = |id, why: &str| Finding::informs(id, format!("{arch} guests are emulated"), why);
    Some(match &facts.kvm {
        Kvm::Opens => return None,
        Kvm::Nested => Finding::informs(
            "kvm-nested",
            "this host is itself a virtual machine: if its KVM does not run the guest's kernel, the run continues under emulation",
            "the hypervisor flag in /proc/cpuinfo",
        ),
        Kvm::Foreign(why) => emulated("kvm-foreign", why),
        Kvm::Software(why) => emulated("kvm-software", why),
        Kvm::Failed(why) => emulated("kvm-failed", why),
        Kvm::Absent(why) => emulated("kvm-absent", why).with(
            "on hardware with virtualisation enable it in the firmware's setup, then run modprobe kvm_intel or kvm_amd",
        ),
        Kvm::Denied { why, group } => Finding::degrades(
            "kvm-denied",
            format!("{arch} guests are emulated, although this host has KVM"),
            why,
            let_open(facts.host.root, group.as_deref()),
        ),
    })
}

/// Returns how this user gets access to `/dev/kvm`, which the members of `group` may open.
fn let_open(root: bool, group: Option<&str>) -> String {
    match group {
        _ if root => "give the container the device: --device /dev/kvm".to_owned(),
        Some(group) => {
            format!("let this user open /dev/kvm: as root, usermod --append --groups {group} USER; then log in again")
        }
        None => "no group may open /dev/kvm: as root, chown root:kvm /dev/kvm && chmod 0660 /dev/kvm, and usermod \
                 --append --groups kvm USER; then log in again"
            .to_owned(),
    }
}

fn check_nats(facts: &Facts, findings: &mut Vec<Finding>) {
    match &facts.host.nats_server {
        Some(Ok(version)) if release(version) < OLDEST_NATS => {
            let old = "is too old for JetStream's buckets; 2.9 is the oldest tested version";
            let sentence = format!("nats-server {version} {old}");
            let remedy = "put a newer nats-server first on PATH";
            findings.push(Finding::blocks("nats-server-old", sentence, "nats-server --version", remedy));
        }
        Some(Err(error)) => {
            let remedy = reinstall(facts, Need::NatsServer);
            findings.push(Finding::blocks("nats-server-broken", "nats-server does not run", error, remedy));
        }
        // If nats-server is missing, there is already a finding about a missing program.
        Some(Ok(_)) | None => {}
    }
}
