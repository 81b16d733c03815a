//! Writes the domain XML (libvirt.org/formatdomain.html) from the resolved parameters.

use std::io;
use std::path::Path;

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::{
    DOMAIN_NAME, DaemonDomain, Disk, DomainXmlParams, FORWARDED_PORTS, GUEST_MAC, MARKER_PORT, ROOT_PORT,
    RunFiles, SSH_PORT,
};
use crate::arch::Accelerator;
use crate::cli::Network;
use crate::cpu::CpuModel;
use crate::format::name_of;
use crate::host::firmware::AarchFirmware;

type Xml = Writer<Vec<u8>>;

/// Plants the fault `stale-chain`: returns XML that lists the backing files of the first disk explicitly and leaves out
/// the snapshot's disk. QEMU then does not read the snapshot's disk. The XML in the file of a saved machine would have
/// the same effect.
pub fn with_stale_chain(xml: &str, overlay: &Path, below: &Path) -> String {
    let source = format!("<source file=\"{}\"/>", overlay.display());
    let described = format!(
        "{source}<backingStore type=\"file\"><format type=\"qcow2\"/><source file=\"{}\"/><backingStore/></backingStore>",
        below.display()
    );
    xml.replacen(&source, &described, 1)
}

/// Returns the domain's XML, indented by two spaces per level.
pub fn domain_xml(params: &DomainXmlParams) -> String {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    write_domain(&mut xml, params).expect("writing to memory does not fail");
    let mut text = String::from_utf8(xml.into_inner()).expect("quick-xml writes UTF-8");
    text.push('\n');
    text
}

/// Returns a domain's XML without its disks. libvirt looks for volumes even if it only converts a domain.
pub fn without_disks(xml: &str) -> String {
    let rest = |part: &str| part.split_once("</disk>").map(|(_, rest)| rest.to_owned());
    let mut parts = xml.split("<disk ");
    let first = parts.next().unwrap_or_default().to_owned();
    first + &parts.filter_map(rest).collect::<String>()
}

/// Writes an element without content.
fn empty(xml: &mut Xml, name: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    xml.create_element(name).with_attributes(attributes.iter().copied()).write_empty().map(drop)
}

/// Writes an element that contains a text.
fn text(xml: &mut Xml, name: &str, attributes: &[(&str, &str)], content: &str) -> io::Result<()> {
    let element = xml.create_element(name).with_attributes(attributes.iter().copied());
    element.write_text_content(BytesText::new(content)).map(drop)
}

/// Writes an element that contains other elements.
fn element(
    xml: &mut Xml,
    name: &str,
    attributes: &[(&str, &str)],
    content: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> io::Result<()> {
    let element = xml.create_element(name).with_attributes(attributes.iter().copied());
    element.write_inner_content(content).map(drop)
}

fn write_domain(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let domain_type = match params.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let namespace = ("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0");
    element(xml, "domain", &[("type", domain_type), namespace], |xml| {
        let name = params.daemon.as_ref().map(|daemon| daemon.owner.domain());
        text(xml, "name", &[], name.as_deref().unwrap_or(DOMAIN_NAME))?;
        text(xml, "uuid", &[], &params.files.uuid)?;
        if let Some(daemon) = &params.daemon {
            element(xml, "metadata", &[], |xml| {
                xml.get_mut().extend(daemon.owner.element_in_domain().into_bytes());
                Ok(())
            })?;
        }
        text(xml, "memory", &[("unit", "MiB")], &params.spec.memory_mib.to_string())?;
        text(xml, "vcpu", &[], &params.spec.vcpus.to_string())?;
        let selects: &[_] = if params.daemon.is_some() { &[("firmware", "efi")] } else { &[] };
        element(xml, "os", selects, |xml| write_os(xml, params))?;
        element(xml, "features", &[], |xml| empty(xml, "acpi", &[]))?;
        write_cpu(xml, params)?;
        empty(xml, "clock", &[("offset", "utc")])?;
        text(xml, "on_poweroff", &[], "destroy")?;
        text(xml, "on_reboot", &[], "restart")?;
        text(xml, "on_crash", &[], "destroy")?;
        element(xml, "devices", &[], |xml| write_devices(xml, params))?;
        write_qemu_arguments(xml, params)
    })
}

fn write_os(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let profile = params.spec.architecture.profile();
    text(xml, "type", &[("arch", profile.machine), ("machine", profile.machine_type)], "hvm")?;
    if params.daemon.is_some() {
        // libvirt selects firmware by the descriptors of its host. Without these elements, it prefers firmware that
        // boots only signed images.
        element(xml, "firmware", &[], |xml| {
            let off = |name| [("enabled", "no"), ("name", name)];
            ["enrolled-keys", "secure-boot"].iter().try_for_each(|name| empty(xml, "feature", &off(name)))
        })?;
    } else if let Some(AarchFirmware { code, .. }) = &params.firmware {
        text(xml, "loader", &[("readonly", "yes"), ("type", "pflash")], &code.to_string_lossy())?;
    }
    if params.daemon.is_some() || params.firmware.is_some() {
        text(xml, "nvram", &[], &params.files.nvram.to_string_lossy())?;
        // Arm's UEFI (seen with version 2022.11) waits 5 s for a key, unless QEMU passes it another time in the fw_cfg
        // file `etc/boot-menu-wait`. QEMU makes this file only if the boot menu is enabled and has a timeout.
        empty(xml, "bootmenu", &[("enable", "yes"), ("timeout", "0")])?;
    }
    Ok(())
}

fn write_cpu(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let mode: &[_] = match &params.cpu.model {
        CpuModel::Maximum => &[("mode", "maximum")],
        CpuModel::HostPassthrough => &[("mode", "host-passthrough")],
        CpuModel::Named(_) => &[("mode", "custom"), ("match", "exact"), ("check", "none")],
    };
    element(xml, "cpu", mode, |xml| {
        if let CpuModel::Named(name) = &params.cpu.model {
            text(xml, "model", &[("fallback", "forbid")], name)?;
        }
        let mut disabled = params.cpu.disabled_features.iter();
        disabled.try_for_each(|name| empty(xml, "feature", &[("policy", "disable"), ("name", name)]))
    })
}

fn write_devices(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    text(xml, "emulator", &[], &params.emulator.to_string_lossy())?;
    for (index, disk) in params.disks().iter().enumerate() {
        write_disk(xml, index, disk, params.daemon.as_ref())?;
    }
    // Without this element, libvirt adds a USB controller. The guest does not need it, and the firmware would spend
    // time on it.
    empty(xml, "controller", &[("type", "usb"), ("model", "none")])?;
    match &params.daemon {
        None => write_ports(xml, &params.files)?,
        Some(daemon) => {
            write_streamed_ports(xml)?;
            write_interface(xml, daemon)?;
        }
    }
    element(xml, "rng", &[("model", "virtio")], |xml| {
        text(xml, "backend", &[("model", "random")], "/dev/urandom")
    })?;
    empty(xml, "memballoon", &[("model", "none")])
}

/// Writes the console and the virtio-serial ports, which have sockets and logs on this host.
fn write_ports(xml: &mut Xml, files: &RunFiles) -> io::Result<()> {
    // QEMU writes the guest's output to the log, whether or not a user is attached to the socket.
    element(xml, "serial", &[("type", "unix")], |xml| {
        let socket = files.console_socket.to_string_lossy();
        empty(xml, "source", &[("mode", "bind"), ("path", &socket)])?;
        // With `append`, the second boot adds to the log of the first boot.
        empty(xml, "log", &[("file", &files.console_log.to_string_lossy()), ("append", "on")])?;
        empty(xml, "target", &[("port", "0")])
    })?;
    element(xml, "channel", &[("type", "file")], |xml| {
        empty(xml, "source", &[("path", &files.markers_log.to_string_lossy()), ("append", "on")])?;
        empty(xml, "target", &[("type", "virtio"), ("name", MARKER_PORT)])
    })?;
    element(xml, "channel", &[("type", "unix")], |xml| {
        empty(xml, "source", &[("mode", "bind"), ("path", &files.root_socket.to_string_lossy())])?;
        empty(xml, "target", &[("type", "virtio"), ("name", ROOT_PORT)])
    })
}

/// Writes the console and the virtio-serial ports of a daemon's domain, which are read over the connection
/// (virDomainOpenConsole, virDomainOpenChannel). libvirt chooses the paths of the sockets.
fn write_streamed_ports(xml: &mut Xml) -> io::Result<()> {
    element(xml, "serial", &[("type", "pty")], |xml| empty(xml, "target", &[("port", "0")]))?;
    [MARKER_PORT, ROOT_PORT].iter().try_for_each(|port| {
        element(xml, "channel", &[("type", "unix")], |xml| {
            empty(xml, "source", &[("mode", "bind")])?;
            empty(xml, "target", &[("type", "virtio"), ("name", port)])
        })
    })
}

/// Writes the network card in a network of libvirt. A card with the user-mode network is among QEMU's arguments.
fn write_interface(xml: &mut Xml, daemon: &DaemonDomain) -> io::Result<()> {
    let Network::Nat(name) = &daemon.network else { return Ok(()) };
    element(xml, "interface", &[("type", "network")], |xml| {
        empty(xml, "mac", &[("address", &daemon.mac)])?;
        empty(xml, "source", &[("network", name)])?;
        empty(xml, "model", &[("type", "virtio")])?;
        // With a ROM, the firmware would try to boot from the network.
        empty(xml, "rom", &[("enabled", "no")])
    })
}

fn write_disk(xml: &mut Xml, index: usize, disk: &Disk, daemon: Option<&DaemonDomain>) -> io::Result<()> {
    let letter = char::from(b'a' + u8::try_from(index).expect("a handful of disks"));
    let format = name_of(&disk.format);
    let mut driver = vec![("name", "qemu"), ("type", format.as_str())];
    if !disk.read_only {
        // With `cache=none`, QEMU bypasses this host's page cache. Otherwise the cache could keep data that a real
        // power cut would lose.
        driver.push(("cache", "none"));
    }
    let kind = if daemon.is_some() { "volume" } else { "file" };
    element(xml, "disk", &[("type", kind), ("device", "disk")], |xml| {
        empty(xml, "driver", &driver)?;
        match daemon {
            None => empty(xml, "source", &[("file", &disk.path.to_string_lossy())])?,
            Some(daemon) => {
                empty(xml, "source", &[("pool", &daemon.pool), ("volume", &daemon.volumes[index])])?;
            }
        }
        empty(xml, "target", &[("dev", &format!("vd{letter}")), ("bus", "virtio")])?;
        if disk.read_only {
            empty(xml, "readonly", &[])?;
        }
        if index == 0 {
            empty(xml, "boot", &[("order", "1")])?;
        }
        Ok(())
    })
}

/// Writes the QEMU arguments that libvirt's own XML cannot express:
///
/// - Port forwarding with QEMU's user-mode network. libvirt offers port forwarding only with passt, which Debian 12's
///   libvirt does not support and Ubuntu 24.04's AppArmor blocks.
/// - A network card without a PXE ROM (`romfile=`). The firmware then does not try to boot from the network.
/// - Forwarding from host port 0. The kernel then picks a free port, which QEMU's `info usernet` shows.
fn write_qemu_arguments(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let (mac, restrict, ports) = match &params.daemon {
        None => (GUEST_MAC, "", &FORWARDED_PORTS[..]),
        // ssh forwards the other ports, because the daemon may be on another host.
        Some(daemon) => {
            (daemon.mac.as_str(), if daemon.is_restricted { ",restrict=on" } else { "" }, &[SSH_PORT][..])
        }
    };
    let mut arguments = Vec::new();
    if params.daemon.as_ref().is_none_or(|daemon| daemon.network == Network::User) {
        let forwards: String = ports.iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:0-:{port}")).collect();
        arguments.extend(["-netdev".to_owned(), format!("user,id=net0,ipv6=off{restrict}{forwards}")]);
        let card = format!("virtio-net-pci,netdev=net0,mac={mac},bus=pcie.0,addr=0x10,romfile=");
        arguments.extend(["-device".to_owned(), card]);
    }
    if params.daemon.as_ref().is_some_and(|daemon| daemon.is_incoming) {
        arguments.extend(["-incoming", "defer"].map(str::to_owned));
    }
    for global in &params.cpu.globals {
        arguments.extend(["-global".to_owned(), global.to_string()]);
    }
    if arguments.is_empty() {
        return Ok(());
    }
    element(xml, "qemu:commandline", &[], |xml| {
        arguments.iter().try_for_each(|argument| empty(xml, "qemu:arg", &[("value", argument)]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;
    use crate::cache::Cache;
    use crate::cli::MachineArgs;
    use crate::cpu::Cpu;
    use crate::machine::VmSpec;
    use crate::runs::RunDir;
    use crate::runs::owner::Owner;
    use std::path::Path;

    fn params(
        arch: VmArchitecture,
        accelerator: Accelerator,
        cpu: Option<&str>,
        uefi: bool,
    ) -> DomainXmlParams {
        let (code, vars_template) = arch.profile().firmware_paths[1];
        let firmware = AarchFirmware { code: code.into(), vars_template: vars_template.into() };
        let files = RunFiles {
            overlay: "/run dir/<1>/disk.qcow2".into(),
            backing: Vec::new(),
            seed: "/run dir/<1>/seed.img".into(),
            payload: "/run dir/<1>/payload.img".into(),
            nvram: "/run dir/<1>/nvram.fd".into(),
            console_log: "/run dir/<1>/console.log".into(),
            console_socket: "/run dir/<1>/console.sock".into(),
            markers_log: "/run dir/<1>/markers.log".into(),
            root_socket: "/run dir/<1>/root.sock".into(),
            uuid: "6a7e489a-24e7-440d-b2b9-310110de50b9".into(),
        };
        let emulator = Path::new("/usr/bin").join(arch.profile().emulator);
        DomainXmlParams {
            spec: VmSpec::from_args(arch, &MachineArgs::default()),
            accelerator,
            cpu: Cpu::resolve(arch, accelerator, cpu),
            emulator,
            firmware: uefi.then_some(firmware),
            files,
            daemon: None,
        }
    }

    /// The domain XML is an input of a snapshot's key. Therefore a changed machine must have another XML.
    #[test]
    fn another_machine_is_another_domain() {
        use Accelerator::{Kvm, Tcg};
        use VmArchitecture::{Aarch64, X86_64};
        let base = || params(Aarch64, Tcg, None, true);
        type Change = fn(&mut DomainXmlParams);
        let changes: [Change; 5] = [
            |params| params.spec.memory_mib += 1,
            |params| params.spec.vcpus += 1,
            |params| params.cpu.globals.clear(),
            |params| params.cpu.disabled_features.clear(),
            |params| params.emulator = "/opt/qemu-system-aarch64".into(),
        ];
        let mut all: Vec<_> = changes
            .iter()
            .map(|change| {
                let mut changed = base();
                change(&mut changed);
                changed
            })
            .chain([
                base(),
                params(Aarch64, Kvm, None, true),
                params(Aarch64, Tcg, Some("pi5"), true),
                params(X86_64, Tcg, None, true),
                params(X86_64, Tcg, None, false),
            ])
            .map(|params| domain_xml(&params))
            .collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(domain_xml(&base()), domain_xml(&base()));
    }

    /// Returns the parameters of a domain on a daemon.
    fn on_daemon(arch: VmArchitecture, network: Network) -> DomainXmlParams {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let daemon = DaemonDomain {
            owner: Owner::of_test(&run),
            pool: "default".into(),
            volumes: ["disk.qcow2", "seed.img", "payload.img"].map(str::to_owned),
            network,
            mac: "52:54:00:00:00:01".into(),
            host: None,
            is_restricted: true,
            is_incoming: false,
        };
        DomainXmlParams { daemon: Some(daemon), ..params(arch, Accelerator::Tcg, None, true) }
    }

    /// Compares with `test_data/<name>.xml`; `SNAPSHOTS=overwrite cargo test` rewrites the file.
    #[test]
    fn golden_domains() {
        use Accelerator::{Kvm, Tcg};
        use VmArchitecture::{Aarch64, X86_64};
        for (name, params) in [
            ("domain-aarch64-tcg", params(Aarch64, Tcg, None, true)),
            ("domain-aarch64-tcg-pi5", params(Aarch64, Tcg, Some("pi5"), true)),
            ("domain-aarch64-kvm", params(Aarch64, Kvm, None, true)),
            ("domain-x86_64-kvm", params(X86_64, Kvm, None, true)),
            ("domain-x86_64-tcg", params(X86_64, Tcg, None, true)),
            ("domain-x86_64-tcg-bios", params(X86_64, Tcg, None, false)),
        ] {
            crate::golden::compare(&format!("{name}.xml"), domain_xml(&params));
        }
        let mut restored = on_daemon(Aarch64, Network::User);
        if let Some(daemon) = &mut restored.daemon {
            daemon.is_incoming = true;
        }
        crate::golden::compare("domain-daemon-aarch64-restored.xml", domain_xml(&restored));
        assert!(!without_disks(&domain_xml(&restored)).contains("disk.qcow2"));
        let nat = Network::Nat("default".into());
        for (name, params) in [
            ("domain-daemon-aarch64-nat", on_daemon(Aarch64, nat.clone())),
            ("domain-daemon-aarch64-user", on_daemon(Aarch64, Network::User)),
            ("domain-daemon-x86_64-nat", on_daemon(X86_64, nat)),
        ] {
            crate::golden::compare(&format!("{name}.xml"), domain_xml(&params));
        }
    }
}
