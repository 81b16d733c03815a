//! Tests that the runner's image of the pipelines has the packages that preflight installs on a bare Debian.

use std::collections::BTreeSet;

use super::*;
use crate::host::local::PROGRAMS;
use crate::preflight::{Preflight, fix};

/// Returns the facts about a host that has nothing that the test suite needs, except for Rust and a C compiler.
fn bare(arch: VmArchitecture, linker: Result<Linking, Unfit>) -> Facts {
    let mut facts = sound();
    facts.arch = arch;
    facts.purpose = Purpose::TestSuite;
    (facts.emulator, facts.firmware) = (None, Err(Vec::new()));
    (facts.runs_guest_programs, facts.user_emulator) = (false, false);
    facts.linker = linker;
    let host = &mut facts.host;
    host.missing_programs = PROGRAMS.to_vec();
    host.nats_server = None;
    host.pkg_config.program = None;
    (host.libvirt, host.libvirt_header) = (Err("none".into()), false);
    (host.libvirt_driver, host.libvirt_iohelper) = (None, false);
    host.debian_keyring = false;
    facts
}

/// Returns the packages in the command `apt-get install` of a text.
fn installed(text: &str) -> BTreeSet<&str> {
    let command = text.split("apt-get install").nth(1).unwrap();
    let words = command.split("&&").next().unwrap().split_whitespace();
    words.filter(|word| *word != "\\" && !word.starts_with("--")).collect()
}

#[test]
fn the_image_of_the_pipelines_has_what_preflight_installs() {
    let lacks_libc = linking("2.36", false);
    let preflight = Preflight::evaluate(vec![
        bare(VmArchitecture::Aarch64, Err(unfit(UnfitKind::Missing))),
        bare(VmArchitecture::X86_64, lacks_libc),
    ]);
    let install = fix::plan(&preflight)[1].join(" ");
    let containerfile = include_str!("../../../../../../ci/Containerfile");
    assert_eq!(installed(containerfile), installed(&install));
}
