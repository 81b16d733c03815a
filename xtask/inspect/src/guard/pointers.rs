//! The content of the file's tables of pointers after the loader has relocated them.

use object::LittleEndian as LE;
use object::elf;

use crate::elf::Elf;

/// The relocated places in order, with the addresses that the loader writes there.
#[derive(Debug)]
pub(super) struct Pointers<'a, 'b> {
    elf: &'b Elf<'a>,
    relocated: Vec<(u64, u64)>,
}

impl<'a, 'b> Pointers<'a, 'b> {
    /// Reads the relocations that name an address in this file.
    pub(super) fn of(elf: &'b Elf<'a>) -> Self {
        let arm = elf.machine() == 183;
        let (relative, others) = if arm {
            (elf::R_AARCH64_RELATIVE.0, [elf::R_AARCH64_GLOB_DAT.0, elf::R_AARCH64_ABS64.0])
        } else {
            (elf::R_X86_64_RELATIVE.0, [elf::R_X86_64_GLOB_DAT.0, elf::R_X86_64_64.0])
        };
        let mut relocated = Vec::new();
        for relocation in elf.dynamic.relocations {
            let (kind, addend) = (relocation.r_type(LE, false).0, relocation.r_addend.get(LE) as u64);
            let symbol = elf.dynamic.symbols.get(relocation.r_sym(LE, false) as usize);
            let value = symbol.map_or(0, |symbol| symbol.st_value.get(LE));
            if kind == relative {
                relocated.push((relocation.r_offset.get(LE), addend));
            } else if others.contains(&kind) && value != 0 {
                relocated.push((relocation.r_offset.get(LE), value.wrapping_add(addend)));
            }
        }
        relocated.sort_unstable();
        Self { elf, relocated }
    }

    /// Returns the address at a place. If the place is not relocated, the address is in the file itself.
    pub(super) fn at(&self, place: u64) -> Option<u64> {
        if let Ok(found) = self.relocated.binary_search_by_key(&place, |(at, _)| *at) {
            return self.relocated.get(found).map(|(_, value)| *value);
        }
        let bytes = self.elf.bytes_at(place)?.get(..8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?)).filter(|value| *value != 0)
    }
}
