//! The domain XML (libvirt.org/formatdomain.html), from resolved parameters alone.

use std::io;
use std::path::Path;

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::{Disk, DomainXmlParams, FORWARDED_PORTS, GUEST_MAC};
use crate::arch::Accelerator;
use crate::cpu::CpuModel;

type Xml = Writer<Vec<u8>>;

/// The same domain with a fault: what libvirt is told of the first disk's layers leaves one out, as the XML in a saved machine's
/// own file does. QEMU would read past that layer.
pub fn with_stale_chain(xml: &str, overlay: &Path, below: &Path) -> String {
    let source = format!("<source file=\"{}\"/>", overlay.display());
    let described = format!(
        "{source}<backingStore type=\"file\"><format type=\"qcow2\"/><source file=\"{}\"/><backingStore/></backingStore>",
        below.display()
    );
    xml.replacen(&source, &described, 1)
}

/// The domain's XML, two spaces to a level.
pub fn domain_xml(params: &DomainXmlParams) -> String {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    write_domain(&mut xml, params).expect("writing to memory does not fail");
    let mut text = String::from_utf8(xml.into_inner()).expect("quick-xml writes UTF-8");
    text.push('\n');
    text
}

fn write_domain(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let domain_type = match params.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let memory = params.memory_mib.to_string();
    xml.create_element("domain")
        .with_attribute(("type", domain_type))
        .with_attribute(("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0"))
        .write_inner_content(|xml| {
            text(xml, "name", &params.name)?;
            text(xml, "uuid", &params.uuid)?;
            xml.create_element("memory")
                .with_attribute(("unit", "MiB"))
                .write_text_content(BytesText::new(&memory))?;
            text(xml, "vcpu", &params.vcpus.to_string())?;
            write_os(xml, params)?;
            xml.create_element("features").write_inner_content(|xml| {
                xml.create_element("acpi").write_empty()?;
                Ok(())
            })?;
            write_cpu(xml, params)?;
            xml.create_element("clock").with_attribute(("offset", "utc")).write_empty()?;
            text(xml, "on_poweroff", "destroy")?;
            text(xml, "on_reboot", "restart")?;
            text(xml, "on_crash", "destroy")?;
            write_devices(xml, params)?;
            write_qemu_arguments(xml, params)
        })?;
    Ok(())
}

fn text(xml: &mut Xml, name: &str, content: &str) -> io::Result<()> {
    xml.create_element(name).write_text_content(BytesText::new(content))?;
    Ok(())
}

fn path_text(xml: &mut Xml, name: &str, path: &std::path::Path) -> io::Result<()> {
    text(xml, name, &path.to_string_lossy())
}

fn write_os(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let profile = params.architecture.profile();
    xml.create_element("os").write_inner_content(|xml| {
        xml.create_element("type")
            .with_attribute(("arch", profile.machine))
            .with_attribute(("machine", profile.machine_type))
            .write_text_content(BytesText::new("hvm"))?;
        if let Some(firmware) = &params.firmware {
            xml.create_element("loader")
                .with_attribute(("readonly", "yes"))
                .with_attribute(("type", "pflash"))
                .write_text_content(BytesText::new(&firmware.code.to_string_lossy()))?;
            path_text(xml, "nvram", &firmware.nvram)?;
            // Arm's UEFI waits 5 s for somebody to press a key (2022.11: seen) unless QEMU's fw_cfg has `etc/boot-menu-wait`, which
            // QEMU writes for a boot menu with a time; without one, `enable='no'` too, it waits for its own.
            xml.create_element("bootmenu")
                .with_attribute(("enable", "yes"))
                .with_attribute(("timeout", "0"))
                .write_empty()?;
        }
        Ok(())
    })?;
    Ok(())
}

fn write_cpu(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let cpu = xml.create_element("cpu");
    let cpu = match &params.cpu.model {
        CpuModel::Maximum => cpu.with_attribute(("mode", "maximum")),
        CpuModel::HostPassthrough => cpu.with_attribute(("mode", "host-passthrough")),
        CpuModel::Named(_) => cpu
            .with_attribute(("mode", "custom"))
            .with_attribute(("match", "exact"))
            .with_attribute(("check", "none")),
    };
    cpu.write_inner_content(|xml| {
        if let CpuModel::Named(name) = &params.cpu.model {
            xml.create_element("model")
                .with_attribute(("fallback", "forbid"))
                .write_text_content(BytesText::new(name))?;
        }
        for feature in &params.cpu.disabled_features {
            xml.create_element("feature")
                .with_attribute(("policy", "disable"))
                .with_attribute(("name", feature.as_str()))
                .write_empty()?;
        }
        Ok(())
    })?;
    Ok(())
}

fn write_devices(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    xml.create_element("devices").write_inner_content(|xml| {
        path_text(xml, "emulator", &params.emulator)?;
        for (index, disk) in params.disks.iter().enumerate() {
            write_disk(xml, index, disk)?;
        }
        // Nothing of the device's: without it libvirt adds a USB controller that the firmware enumerates.
        xml.create_element("controller")
            .with_attribute(("type", "usb"))
            .with_attribute(("model", "none"))
            .write_empty()?;
        // The guest's words go into the file whether or not somebody is attached.
        xml.create_element("serial").with_attribute(("type", "unix")).write_inner_content(|xml| {
            xml.create_element("source")
                .with_attribute(("mode", "bind"))
                .with_attribute(("path", &*params.console_socket.to_string_lossy()))
                .write_empty()?;
            // append: the second boot continues the file that holds the first.
            xml.create_element("log")
                .with_attribute(("file", &*params.console_log.to_string_lossy()))
                .with_attribute(("append", "on"))
                .write_empty()?;
            xml.create_element("target").with_attribute(("port", "0")).write_empty()?;
            Ok(())
        })?;
        xml.create_element("rng").with_attribute(("model", "virtio")).write_inner_content(|xml| {
            xml.create_element("backend")
                .with_attribute(("model", "random"))
                .write_text_content(BytesText::new("/dev/urandom"))?;
            Ok(())
        })?;
        xml.create_element("memballoon").with_attribute(("model", "none")).write_empty()?;
        Ok(())
    })?;
    Ok(())
}

fn write_disk(xml: &mut Xml, index: usize, disk: &Disk) -> io::Result<()> {
    let letter = char::from(b'a' + u8::try_from(index).expect("a handful of disks"));
    let target = format!("vd{letter}");
    xml.create_element("disk")
        .with_attribute(("type", "file"))
        .with_attribute(("device", "disk"))
        .write_inner_content(|xml| {
            let driver = xml
                .create_element("driver")
                .with_attribute(("name", "qemu"))
                .with_attribute(("type", disk.format.name()));
            // A verifying run's power cut must not be softened by this host's page cache.
            let driver = if disk.read_only { driver } else { driver.with_attribute(("cache", "none")) };
            driver.write_empty()?;
            xml.create_element("source")
                .with_attribute(("file", &*disk.path.to_string_lossy()))
                .write_empty()?;
            xml.create_element("target")
                .with_attribute(("dev", target.as_str()))
                .with_attribute(("bus", "virtio"))
                .write_empty()?;
            if disk.read_only {
                xml.create_element("readonly").write_empty()?;
            }
            if index == 0 {
                xml.create_element("boot").with_attribute(("order", "1")).write_empty()?;
            }
            Ok(())
        })?;
    Ok(())
}

/// What libvirt's own XML cannot say. User-mode port forwarding: libvirt has it for passt alone, which Debian 12's
/// build lacks and Ubuntu 24.04's AppArmor blocks. `romfile=`: without a PXE ROM the firmware does not try to
/// boot from the network. Host port 0: the kernel picks a free one, which QEMU tells by `info usernet`.
fn write_qemu_arguments(xml: &mut Xml, params: &DomainXmlParams) -> io::Result<()> {
    let device = format!("virtio-net-pci,netdev=net0,mac={GUEST_MAC},bus=pcie.0,addr=0x10,romfile=");
    let forwards = FORWARDED_PORTS.map(|port| format!(",hostfwd=tcp:127.0.0.1:0-:{port}")).concat();
    let mut arguments =
        vec!["-netdev".to_owned(), format!("user,id=net0,ipv6=off{forwards}"), "-device".to_owned(), device];
    for global in &params.cpu.globals {
        arguments.extend(["-global".to_owned(), global.to_string()]);
    }
    xml.create_element("qemu:commandline").write_inner_content(|xml| {
        for argument in &arguments {
            xml.create_element("qemu:arg").with_attribute(("value", argument.as_str())).write_empty()?;
        }
        Ok(())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;
    use crate::cli::MachineArgs;
    use crate::cpu::Cpu;
    use crate::host::firmware::AarchFirmware;
    use crate::machine::{RunFiles, VmSpec};
    use std::path::Path;

    fn params(
        arch: VmArchitecture,
        accelerator: Accelerator,
        cpu: Option<&str>,
        uefi: bool,
    ) -> DomainXmlParams {
        let spec = VmSpec::from_args(arch, &MachineArgs::default());
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
            uuid: "6a7e489a-24e7-440d-b2b9-310110de50b9".into(),
        };
        let emulator = Path::new("/usr/bin").join(arch.profile().emulator);
        let cpu = Cpu::resolve(arch, accelerator, cpu);
        DomainXmlParams::resolve(&spec, accelerator, cpu, &emulator, uefi.then_some(&firmware), &files)
    }

    /// A snapshot's key has the domain in it: what makes another machine makes another snapshot.
    #[test]
    fn another_machine_is_another_domain() {
        use Accelerator::{Kvm, Tcg};
        use VmArchitecture::{Aarch64, X86_64};
        let base = || params(Aarch64, Tcg, None, true);
        type Change = fn(&mut DomainXmlParams);
        let changes: [Change; 5] = [
            |params| params.memory_mib += 1,
            |params| params.vcpus += 1,
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

    /// Compares with `test_data/<name>.xml`; `IOT_XTASK_BLESS=1 cargo test` writes it anew.
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
            crate::golden::compare(&format!("{name}.xml"), &domain_xml(&params));
        }
    }
}
