//! `elf-class`, `elf-endianness`, `elf-machine`, `elf-type`, `elf-flags`, `malformed`, `entry-point`: checks that the
//! file is an executable for this architecture.

use object::elf::{ET_CORE, ET_DYN, ET_EXEC, ET_REL};

use crate::elf::{Elf, Ident, Load};
use crate::finding::Finding;
use crate::isa::Isa;

const REBUILD: &str = "build it for the device: cargo xtask build --arch";

/// Checks the fields of the header. Returns `None` if they fit.
pub(crate) fn machine(ident: Ident, isa: Isa, arch: &str) -> Option<Finding> {
    let remedy = format!("{REBUILD} {arch}");
    let refused = |id, found: &str, offers: &str| Some(Finding::refused(id, found, offers, &remedy));
    if ident.class != 2 {
        let bits =
            if ident.class == 1 { "32-bit".to_owned() } else { format!("of ELF class {}", ident.class) };
        let found = format!("it is no 64-bit ELF file but {bits}, for {}", machine_name(ident.machine));
        return refused("elf-class", &found, &format!("the target needs one for {arch}"));
    }
    if ident.data != 1 {
        let offers = format!("{arch} needs a little-endian executable");
        return refused("elf-endianness", "it is big-endian", &offers);
    }
    if ident.machine != isa.elf_machine() {
        let found = format!("it is built for {}, and the device is {arch}", machine_name(ident.machine));
        return refused("elf-machine", &found, arch);
    }
    let kind = match ident.kind {
        kind if [ET_EXEC.0, ET_DYN.0].contains(&kind) => return flags(ident, arch),
        kind if kind == ET_REL.0 => "an object file that was not linked".to_owned(),
        kind if kind == ET_CORE.0 => "a core dump".to_owned(),
        kind => format!("of ELF type {kind}"),
    };
    let found = format!("it is {kind}, not an executable");
    refused("elf-type", &found, "the target needs an executable or a shared object")
}

/// Checks the flags. Neither architecture defines any (AAELF64, 5.1; x86-64 psABI, 4.1).
fn flags(ident: Ident, arch: &str) -> Option<Finding> {
    (ident.flags != 0).then(|| {
        let found = format!("its ELF flags are {:#x}", ident.flags);
        let (offers, remedy) = (format!("{arch} defines none"), "link it with a toolchain of the target");
        Finding::refused("elf-flags", &found, &offers, remedy)
    })
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "x86 (32-bit)".to_owned(),
        40 => "arm (32-bit)".to_owned(),
        62 => "x86_64".to_owned(),
        183 => "aarch64".to_owned(),
        other => format!("ELF machine {other}"),
    }
}

/// Returns the finding for a file without an ELF header.
pub(crate) fn no_elf(bytes: &[u8], why: &str) -> Finding {
    if bytes.starts_with(b"#!") {
        let (found, offers) = ("it is a script, not an executable", "the target needs an ELF executable");
        return Finding::refused("malformed", found, offers, "give the executable that the script starts");
    }
    malformed(&format!("it is no 64-bit ELF file, because {why}"))
}

/// Returns the finding for headers that are not valid.
pub(crate) fn malformed(why: &str) -> Finding {
    let remedy = "build or copy it again, and compare its size and digest with the original's";
    Finding::refused("malformed", why, "the target needs an ELF file with valid headers", remedy)
}

/// Checks that the entry point is in an executable segment.
pub(super) fn entry(elf: &Elf<'_>, findings: &mut Vec<Finding>) {
    let entry = elf.entry();
    let mut code = elf.loads().filter(Load::executable);
    let in_code = code.any(|load| entry >= load.address && entry - load.address < load.file_size);
    let is_program = elf.kind() == ET_EXEC || elf.interpreter().is_ok_and(|path| path.is_some());
    if !in_code && (entry != 0 || is_program) {
        let found = format!("its entry point {entry:#x} is in no executable segment");
        findings.push(Finding::refused("entry-point", &found, "an entry point in code", "link it again"));
    }
}
