//! Plants faults that the rehearsal must find. Each fault is a change of the domain. Some faults also add a value to
//! the expected machine, because the comparison would otherwise not cover the changed property.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use xtask_core::cli::RehearsalFault;
use xtask_core::fs::write_private;
use xtask_core::host::firmware::AarchFirmware;
use xtask_core::machine::{DomainXmlParams, xml};
use xtask_core::readback::ExpectedMachine;

/// Returns the domain's XML with the fault. Files that the fault needs are made in `work`; no file of this host is
/// changed.
pub(super) fn plant(
    fault: RehearsalFault,
    mut params: DomainXmlParams,
    expected: &mut ExpectedMachine,
    firmware: &AarchFirmware,
    work: &Path,
) -> Result<String> {
    let flash = "find the domain's flash";
    match fault {
        // QEMU uses the first `-accel` that works, and that is libvirt's. A second one with `thread=single` would
        // change nothing. Counting instructions has the same effect as `thread=single`.
        RehearsalFault::SingleThread => {
            let arguments = r#"<qemu:arg value="-icount"/><qemu:arg value="shift=0"/></qemu:commandline>"#;
            return edited(&params, "</qemu:commandline>", arguments);
        }
        RehearsalFault::UnsafeCache => return edited(&params, r#"cache="none""#, r#"cache="unsafe""#),
        RehearsalFault::CpuFeature => {
            params.cpu.disabled_features.clear();
            if !expected.cpu_properties.iter().any(|(_, on)| !on) {
                let feature = params.spec.architecture.profile().baseline_feature;
                expected.cpu_properties.push((feature.to_owned(), false));
            }
        }
        RehearsalFault::CpuRefused => params.cpu.disabled_features.push("no-such-feature".to_owned()),
        RehearsalFault::FlashSize => {
            let longer = work.join("longer-code.fd");
            write_private(&longer, [fs_err::read(&firmware.code)?, vec![0; 4096]].concat())?;
            params.firmware.as_mut().context(flash)?.code = longer;
        }
        RehearsalFault::NvramTemplate => {
            // The fault needs a copy of the template, because QEMU opens the file for writing.
            let template = work.join("template.fd");
            write_private(&template, fs_err::read(&firmware.vars_template)?)?;
            expected.flash.as_mut().context(flash)?.template.clone_from(&template);
            params.files.nvram = template;
        }
    }
    Ok(xml::domain_xml(&params))
}

fn edited(params: &DomainXmlParams, from: &str, to: &str) -> Result<String> {
    let xml = xml::domain_xml(params);
    ensure!(xml.contains(from), "plant the fault: the domain's XML has no {from}");
    Ok(xml.replace(from, to))
}
