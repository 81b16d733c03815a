//! `elf-class`, `elf-endianness`, `elf-machine`, `elf-type`, `elf-flags`, `malformed`, `entry-point`: checks that the
//! file is an executable for this architecture.

use object::elf::{ELFOSABI_GNU, ELFOSABI_NONE, ET_CORE, ET_DYN, ET_EXEC, ET_REL};

use crate::elf::{Elf, Ident, Load};
use crate::finding::Finding;
use crate::isa::Isa;

const REBUILD: &str = "take the build for the device; cargo xtask build builds the agent with --arch";

/// The values of `EI_OSABI` (gABI) that name another system. glibc's loader refuses libraries with them
/// (elf/dl-load.c). The kernel does not read the value, but the program makes the other system's calls.
const SYSTEMS: [(u8, &str); 6] = [
    (2, "NetBSD"),
    (6, "Solaris"),
    (9, "FreeBSD"),
    (12, "OpenBSD"),
    (97, "Arm's bare metal"),
    (255, "no system"),
];

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
    if ![ELFOSABI_NONE.0, ELFOSABI_GNU.0].contains(&ident.system) {
        let known = SYSTEMS.iter().find(|(value, _)| *value == ident.system);
        let name = known.map_or_else(|| format!("system {}", ident.system), |(_, name)| (*name).to_owned());
        let found = format!("it is built for {name} (EI_OSABI {})", ident.system);
        return refused("elf-osabi", &found, "the target runs Linux");
    }
    let kind = match ident.kind {
        kind if [ET_EXEC.0, ET_DYN.0].contains(&kind) => return flags(ident, arch),
        kind if kind == ET_REL.0 => {
            let found = "it is an object file that was not linked, or a kernel module";
            let remedy = "give the executable that it is linked into; only the kernel loads modules";
            let offers = "the target needs an executable or a shared object";
            return Some(Finding::refused("elf-type", found, offers, remedy));
        }
        kind if kind == ET_CORE.0 => "a core dump".to_owned(),
        kind => format!("of ELF type {kind}"),
    };
    let found = format!("it is {kind}, not an executable");
    refused("elf-type", &found, "the target needs an executable or a shared object")
}

/// Returns the finding for a file with separate debug information.
pub(crate) fn detached() -> Finding {
    let found = "it has the debug information of another file, and no code";
    let offers = "the target needs an executable or a shared object";
    Finding::refused("elf-type", found, offers, "give the file with the code, which has the same build id")
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

/// The first bytes of files that are no ELF files, what they are, and what to give instead.
const OTHERS: [(&[u8], &str, &str); 11] = [
    (b"#!", "a script", "give the executable that the script starts"),
    (b"!<arch>\ndebian", "a Debian package", "unpack it (dpkg-deb -x) and give an executable of it"),
    (b"!<arch>\n", "a static library", "give the executable that it is linked into"),
    (b"!<thin>\n", "a static library", "give the executable that it is linked into"),
    (b"PK\x03\x04", "a ZIP archive, such as a wheel", "unpack it and give an executable or a library of it"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it and give an executable or a library of it"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it and give an executable or a library of it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it and give an executable or a library of it"),
    (b"MZ", "an executable for Windows or UEFI", "take the build for Linux"),
    (b"\xcf\xfa\xed\xfe", "an executable for macOS", "take the build for Linux"),
    (b"\xca\xfe\xba\xbe", "an executable for macOS, or a Java class", "take the build for Linux"),
];

/// Returns the finding for a file without an ELF header.
pub(crate) fn no_elf(bytes: &[u8], why: &str) -> Finding {
    match OTHERS.iter().find(|(start, ..)| bytes.starts_with(start)) {
        Some((_, what, remedy)) => {
            let found = format!("it is {what}, not an executable");
            Finding::refused("malformed", &found, "the target needs an ELF executable", remedy)
        }
        None => malformed(&format!("it is no 64-bit ELF file, because {why}")),
    }
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
