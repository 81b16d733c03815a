//! What in a file asks the processor: imports, symbols, strings, relocations.

use std::collections::BTreeSet;

use object::LittleEndian as LE;
use object::elf;

use crate::elf::Elf;

/// Functions of C libraries that tell what the processor has, and the arguments that ask for it (AT_HWCAP, AT_HWCAP2, 3, 4).
const ASKING: [&[u8]; 3] = [b"getauxval", b"__getauxval", b"elf_aux_info"];
pub(super) const HWCAPS: [u32; 4] = [16, 26, 29, 30];

/// Words in the names of other libraries' functions and variables that tell the same.
const TELLING: [&str; 8] =
    ["hwcap", "cpu_feature", "cpu_model", "cpu_indicator", "have_lse_atomics", "armcap", "ia32cap", "cpuid"];
/// Files that tell it; whoever makes their names' addresses asks.
const FILES: [&[u8]; 3] = [b"/proc/cpuinfo\0", b"/proc/self/auxv\0", b"/sys/devices/system/cpu\0"];

/// Whether anything in the file asks the processor, and what.
#[derive(Debug, Default)]
pub(crate) struct Detection {
    /// For people; empty where nothing does.
    pub(crate) how: Vec<String>,
    /// Addresses of functions and places that tell.
    pub(super) sources: BTreeSet<u64>,
    /// Of [`Self::sources`], those whose first argument matters.
    pub(super) with_argument: BTreeSet<u64>,
    /// Places in the global offset table through which such functions are called.
    pub(super) through: BTreeSet<u64>,
    /// Functions that the loader asks.
    pub(super) resolvers: BTreeSet<u64>,
    /// Written by the Go compiler, whose runtime asks, and whose code tests what it found.
    pub(crate) go: bool,
}

impl Detection {
    /// Looks for it in the file's tables and strings.
    pub(crate) fn of(elf: &Elf<'_>) -> Self {
        let mut found = Self::default();
        let mut telling: Vec<usize> = Vec::new();
        for (index, name) in elf.imports() {
            if ASKING.contains(&name) || tells(name) {
                telling.push(index);
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
            let places = elf.loads().filter(|load| !load.writable()).filter_map(|load| {
                let start = usize::try_from(load.offset).ok()?;
                let bytes = elf.data.get(start..start.checked_add(usize::try_from(load.file_size).ok()?)?)?;
                Some(load.address + find(bytes, name)? as u64)
            });
            for place in places {
                found.sources.insert(place);
                found.note(&name[..name.len() - 1]);
            }
        }
        if !found.resolvers.is_empty() {
            found.how.push(format!("{} functions that the loader chooses (ifunc)", found.resolvers.len()));
        }
        found.go = elf.section_table().any(|(name, ..)| name == b".go.buildinfo" || name == b".gopclntab")
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

    /// Where the functions of other libraries are called through, and which functions the loader asks.
    fn follow_relocations(&mut self, elf: &Elf<'_>, telling: &[usize]) {
        let irelative = match elf.machine() {
            183 => elf::R_AARCH64_IRELATIVE.0,
            _ => elf::R_X86_64_IRELATIVE.0,
        };
        let telling: BTreeSet<u32> = telling.iter().filter_map(|index| u32::try_from(*index).ok()).collect();
        let tables = [elf.dynamic.relocations, elf.dynamic.plt_relocations];
        for relocation in tables.into_iter().flatten() {
            let kind = relocation.r_type(LE, false);
            if kind.0 == irelative {
                self.resolvers.insert(relocation.r_addend.get(LE) as u64);
            } else if telling.contains(&relocation.r_sym(LE, false)) {
                self.through.insert(relocation.r_offset.get(LE));
            }
        }
        // A static executable's own, without a dynamic section: .rela.plt, .rela.iplt.
        for name in [&b".rela.plt"[..], b".rela.iplt", b".rela.dyn"] {
            let Some(section) = elf.section(name).filter(|_| !elf.dynamic.is_there()) else { continue };
            for entry in section.bytes.chunks_exact(24) {
                let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap_or_default());
                if word(8) as u32 == irelative {
                    self.resolvers.insert(word(16));
                }
            }
        }
    }

    /// Whether nothing in the file asks the processor.
    pub(crate) fn is_absent(&self) -> bool {
        self.how.is_empty()
    }
}

fn tells(name: &[u8]) -> bool {
    // Each of the words holds one of these; most names hold none, and there are tens of thousands.
    let may = |part: &[u8]| {
        let lower = [part[0] | 0x20, part[1] | 0x20, part[2] | 0x20];
        [*b"cpu", *b"cap", *b"lse"].contains(&lower)
    };
    name.windows(3).any(may)
        && std::str::from_utf8(name).is_ok_and(|name| {
            let name = name.to_ascii_lowercase();
            TELLING.iter().any(|word| name.contains(word))
        })
}

/// Where `needle` is in `bytes`.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle)
}
