//! Finds the imports, symbols, strings and relocations by which a file asks the processor for its features.

use std::collections::BTreeSet;

use memchr::memmem::find;
use object::LittleEndian as LE;
use object::elf::{self, Rela64};

use crate::elf::{Elf, array};

/// Functions of C libraries that return the processor's features.
const ASKING: [&[u8]; 3] = [b"getauxval", b"__getauxval", b"elf_aux_info"];
/// The arguments with which these functions return features (AT_HWCAP, AT_HWCAP2, 3, 4).
pub(super) const HWCAPS: [u32; 4] = [16, 26, 29, 30];

/// Words in the names of the functions and variables by which other libraries report the processor's features.
const TELLING: [&str; 13] = [
    "hwcap",
    "cpu_feature",
    "cpu_model",
    "cpu_indicator",
    "cpu_supports",
    "cpu_flags",
    "have_lse_atomics",
    "armcap",
    "ia32cap",
    "cpuid",
    "cpuinfo",
    "supportedtargets",
    "chosentarget",
];
/// Files that contain the processor's features. A function that computes the address of such a file's name asks the
/// processor.
const FILES: [&[u8]; 3] = [b"/proc/cpuinfo\0", b"/proc/self/auxv\0", b"/sys/devices/system/cpu\0"];

/// The ways in which a file asks the processor.
#[derive(Debug, Default)]
pub(crate) struct Detection {
    /// A description for messages; empty if nothing in the file asks.
    pub(crate) how: Vec<String>,
    /// The addresses of functions and variables that give the processor's features, and of the names of such files.
    pub(super) sources: BTreeSet<u64>,
    /// The functions among [`Self::sources`] that return features only for certain values of their first argument.
    pub(super) with_argument: BTreeSet<u64>,
    /// The entries of the global offset table for functions that give the processor's features.
    pub(super) through: BTreeSet<u64>,
    /// The functions that the loader calls to choose between implementations.
    pub(super) resolvers: BTreeSet<u64>,
    /// True if the file imports a function or a variable of another library for features.
    pub(crate) imports: bool,
    /// True if the Go compiler made the file. Go's runtime asks the processor, and Go's code tests the result.
    pub(crate) go: bool,
}

impl Detection {
    /// Searches the file's tables and strings.
    pub(crate) fn of(elf: &Elf<'_>) -> Self {
        let mut found = Self::default();
        let mut telling: BTreeSet<u32> = BTreeSet::new();
        for (index, name) in elf.imports() {
            if ASKING.contains(&name) || tells(name) {
                telling.extend(u32::try_from(index));
                found.imports |= tells(name) && !ASKING.contains(&name);
                found.note(name);
            }
        }
        found.follow_relocations(elf, &telling);
        for symbol in elf.symbols() {
            if ASKING.contains(&symbol.name) {
                found.with_argument.insert(symbol.address);
            }
            if ASKING.contains(&symbol.name) || tells(symbol.name) {
                found.sources.insert(symbol.address);
                found.note(symbol.name);
            }
            if symbol.ifunc {
                found.resolvers.insert(symbol.address);
            }
        }
        for name in FILES {
            let constants = elf.loads().filter(|load| !load.writable());
            let places =
                constants.filter_map(|load| Some(load.address + find(elf.loaded(load)?, name)? as u64));
            for place in places {
                found.sources.insert(place);
                found.note(&name[..name.len() - 1]);
            }
        }
        if !found.resolvers.is_empty() {
            found.how.push(format!("{} functions that the loader chooses (ifunc)", found.resolvers.len()));
        }
        found.go = elf.section_table().any(|(name, _)| name == b".go.buildinfo" || name == b".gopclntab")
            || elf.notes().any(|note| note.name() == b"Go");
        if found.go {
            found.how.push("Go's runtime".to_owned());
        }
        found
    }

    fn note(&mut self, name: &[u8]) {
        const MOST: usize = 6;
        let name = crate::elf::shown(name);
        if self.how.len() < MOST && !self.how.contains(&name) {
            self.how.push(name);
        }
    }

    /// Finds the entries of the global offset table through which functions of other libraries are called, and the
    /// functions that the loader calls.
    fn follow_relocations(&mut self, elf: &Elf<'_>, telling: &BTreeSet<u32>) {
        let irelative = match elf.machine() {
            183 => elf::R_AARCH64_IRELATIVE.0,
            _ => elf::R_X86_64_IRELATIVE.0,
        };
        let tables = [elf.dynamic.relocations, elf.dynamic.plt_relocations];
        // A static executable without a dynamic section has relocations in sections of its own.
        let sections = [&b".rela.plt"[..], b".rela.iplt", b".rela.dyn"].into_iter();
        let sections = sections.filter(|_| !elf.dynamic.is_there()).filter_map(|name| elf.section(name));
        let own = sections.flat_map(|section| array::<Rela64<LE>>(section.bytes));
        for relocation in tables.into_iter().flatten().chain(own) {
            let kind = relocation.r_type(LE, false);
            if kind.0 == irelative {
                self.resolvers.insert(relocation.r_addend.get(LE) as u64);
            } else if telling.contains(&relocation.r_sym(LE, false)) {
                self.through.insert(relocation.r_offset.get(LE));
            }
        }
    }

    /// Returns whether nothing in the file asks the processor.
    pub(crate) fn is_absent(&self) -> bool {
        self.how.is_empty()
    }
}

fn tells(name: &[u8]) -> bool {
    // Each of [`TELLING`] contains one of these three-letter parts. This test is fast, and most of the tens of
    // thousands of names contain none of them.
    let may = |part: &[u8]| {
        let lower = [part[0] | 0x20, part[1] | 0x20, part[2] | 0x20];
        [*b"cpu", *b"cap", *b"lse", *b"rge"].contains(&lower)
    };
    name.windows(3).any(may)
        && std::str::from_utf8(name).is_ok_and(|name| {
            let name = name.to_ascii_lowercase();
            TELLING.iter().any(|word| name.contains(word))
        })
}
