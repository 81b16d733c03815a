//! The starts of functions in a stripped file: `.eh_frame_hdr` has a sorted table of them for the unwinder (LSB 5.0,
//! 10.6.2).

use object::LittleEndian as LE;
use object::read::elf::ProgramHeader as _;

use super::{Elf, PT_GNU_EH_FRAME};

/// The encodings that every linker writes: `DW_EH_PE_udata4`, and `DW_EH_PE_datarel | DW_EH_PE_sdata4`.
const COUNT_ENCODING: u8 = 0x03;
const TABLE_ENCODING: u8 = 0x3b;

impl Elf<'_> {
    /// Returns the starts of functions in the unwinder's table.
    pub(crate) fn unwind_starts(&self) -> impl Iterator<Item = u64> + '_ {
        let header = self.segment(PT_GNU_EH_FRAME);
        let base = header.map_or(0, |header| header.p_vaddr(LE));
        let bytes = header.and_then(|header| header.data(LE, self.data).ok());
        let table = bytes.filter(|bytes| {
            bytes.len() >= 12 && bytes[0] == 1 && bytes[2] == COUNT_ENCODING && bytes[3] == TABLE_ENCODING
        });
        let entries = table.map(|bytes| &bytes[12..]).unwrap_or_default();
        entries.chunks_exact(8).map(move |entry| {
            let relative = i32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            base.wrapping_add_signed(i64::from(relative))
        })
    }
}
