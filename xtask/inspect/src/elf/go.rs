//! The functions of a Go program, from the table that Go's runtime reads for its stack traces. Source: Go's
//! `src/debug/gosym/pclntab.go` and `src/internal/abi/symtab.go`.

use object::LittleEndian as LE;

use super::{Code, Elf};

/// The sections with the table, of programs at a fixed address and of others.
const SECTIONS: [&[u8]; 2] = [b".gopclntab", b".data.rel.ro.gopclntab"];
/// The first word of the table since Go 1.2, 1.16, 1.18 and 1.20.
const GO_1_2: u32 = 0xffff_fffb;
const GO_1_16: u32 = 0xffff_fffa;
const GO_1_18: u32 = 0xffff_fff0;
const GO_1_20: u32 = 0xffff_fff1;

/// The starts of Go's own functions, in order. C code that is linked into the program is not among them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GoFunctions<'a> {
    entries: &'a [u8],
    /// The size of an entry, and of the address in it, in bytes.
    size: usize,
    /// The address to which the entries are relative.
    text: u64,
    /// The address behind the last function.
    end: u64,
}

impl<'a> GoFunctions<'a> {
    /// Reads the table. Returns `None` if there is none, or if it has an unknown form.
    pub(crate) fn of(elf: &Elf<'a>) -> Option<Self> {
        let table = SECTIONS.iter().find_map(|name| elf.section(name))?;
        let magic = u32::try_from(number(table.bytes, 0, 4)?).ok()?;
        let count = usize::try_from(number(table.bytes, 8, 8)?).ok()?;
        let (start, size, text) = match magic {
            GO_1_2 => (16, 16, 0),
            GO_1_16 => (number(table.bytes, 56, 8)?, 16, 0),
            GO_1_18 | GO_1_20 => (number(table.bytes, 64, 8)?, 8, text(elf, &table)?),
            _ => return None,
        };
        let entries = table.bytes.get(usize::try_from(start).ok()?..)?;
        let length = count.checked_mul(size)?;
        let end = text.wrapping_add(number(entries, length, size / 2)?);
        Some(Self { entries: &entries[..length], size, text, end })
    }

    pub(crate) fn starts(&self) -> impl Iterator<Item = u64> + use<'a> {
        let (text, width) = (self.text, self.size / 2);
        let entries = self.entries.chunks_exact(self.size);
        entries.filter_map(move |entry| Some(text.wrapping_add(number(entry, 0, width)?)))
    }

    /// Returns whether an address is in one of Go's functions. Go's linker places them without a gap.
    pub(crate) fn hold(&self, address: u64) -> bool {
        self.starts().next().is_some_and(|first| first <= address) && address < self.end
    }
}

/// Returns the address of Go's first function. The table has it; in a program without a fixed address, a relocation does.
/// Newer versions of Go leave it out. It is then the address of a symbol, or the start of the section.
fn text(elf: &Elf<'_>, table: &Code<'_>) -> Option<u64> {
    const PLACE: u64 = 24;
    let place = table.address.checked_add(PLACE)?;
    let mut relocations = elf.dynamic.relocations.iter();
    let relocated = relocations.find(|relocation| relocation.r_offset.get(LE) == place);
    let relocated = relocated.map(|relocation| relocation.r_addend.get(LE) as u64);
    let stored = || number(table.bytes, PLACE as usize, 8);
    let symbol = || elf.symbols().find(|symbol| symbol.name == b"runtime.text").map(|symbol| symbol.address);
    let known = relocated.or_else(stored).filter(|address| *address != 0).or_else(symbol);
    known.or_else(|| Some(elf.section(b".text")?.address))
}

fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
