//! Faults for the rehearsal to find, planted in the domain alone: what is expected of it stays as it was asked for.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use xtask_core::cli::RehearsalFault;
use xtask_core::host::firmware::AarchFirmware;
use xtask_core::machine::{DomainXmlParams, xml};
use xtask_core::readback::ExpectedMachine;

/// The domain's XML with the fault in it. Files that it needs are made in `work`; none of this host's is written to.
pub(super) fn plant(
    fault: RehearsalFault,
    mut params: DomainXmlParams,
    expected: &mut ExpectedMachine,
    firmware: &AarchFirmware,
    work: &Path,
) -> Result<String> {
    match fault {
        // QEMU takes the first -accel that works, libvirt's own, so that a second one with thread=single changes
        // nothing. Counting instructions has the same effect.
        RehearsalFault::SingleThread => {
            let arguments = r#"<qemu:arg value="-icount"/><qemu:arg value="shift=0"/></qemu:commandline>"#;
            edited(&params, "</qemu:commandline>", arguments)
        }
        RehearsalFault::CpuFeature => {
            params.cpu.disabled_features.clear();
            if !expected.cpu_properties.iter().any(|(_, on)| !on) {
                let feature = params.spec.architecture.profile().baseline_feature;
                expected.cpu_properties.push((feature.to_owned(), false));
            }
            Ok(xml::domain_xml(&params))
        }
        RehearsalFault::CpuRefused => {
            params.cpu.disabled_features.push("no-such-feature".to_owned());
            Ok(xml::domain_xml(&params))
        }
        RehearsalFault::FlashSize => {
            let longer = work.join("longer-code.fd");
            let mut code = read(&firmware.code)?;
            code.extend([0; 4096]);
            xtask_core::fs::write_private(&longer, code)?;
            params.firmware.as_mut().context("find the domain's flash")?.code = longer;
            Ok(xml::domain_xml(&params))
        }
        RehearsalFault::UnsafeCache => edited(&params, r#"cache="none""#, r#"cache="unsafe""#),
        RehearsalFault::NvramTemplate => {
            // A template of its own: QEMU opens it for writing.
            let template = work.join("template.fd");
            xtask_core::fs::write_private(&template, read(&firmware.vars_template)?)?;
            expected.flash.as_mut().context("find the domain's flash")?.template.clone_from(&template);
            params.files.nvram = template;
            Ok(xml::domain_xml(&params))
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn edited(params: &DomainXmlParams, from: &str, to: &str) -> Result<String> {
    let xml = xml::domain_xml(params);
    ensure!(xml.contains(from), "plant the fault: the domain's XML has no {from}");
    Ok(xml.replace(from, to))
}
