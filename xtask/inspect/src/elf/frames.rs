//! The bounds of functions in a stripped file: `.eh_frame_hdr` has a sorted table of their starts for the unwinder, with
//! the place of the record in `.eh_frame` that has the length (LSB 5.0, 10.6).

use object::LittleEndian as LE;
use object::read::elf::ProgramHeader as _;

use super::{Elf, PT_GNU_EH_FRAME};

/// The encodings that every linker writes: `DW_EH_PE_udata4`, and `DW_EH_PE_datarel | DW_EH_PE_sdata4`.
const COUNT_ENCODING: u8 = 0x03;
const TABLE_ENCODING: u8 = 0x3b;
/// The sizes of the table's head and of an entry, in bytes.
const HEAD: usize = 12;
const ENTRY: usize = 8;

impl<'a> Elf<'a> {
    /// Returns the entries of the unwinder's table, and the address to which they are relative.
    fn unwind_table(&self) -> (&'a [u8], u64) {
        let header = self.segment(PT_GNU_EH_FRAME);
        let base = header.map_or(0, |header| header.p_vaddr(LE));
        let bytes = header.and_then(|header| header.data(LE, self.data).ok());
        let table = bytes.filter(|bytes| {
            bytes.len() >= HEAD && bytes[0] == 1 && bytes[2] == COUNT_ENCODING && bytes[3] == TABLE_ENCODING
        });
        (table.map(|bytes| &bytes[HEAD..]).unwrap_or_default(), base)
    }

    /// Returns the starts of functions in the unwinder's table.
    pub(crate) fn unwind_starts(&self) -> impl Iterator<Item = u64> + use<'a> {
        let (entries, base) = self.unwind_table();
        entries.chunks_exact(ENTRY).map(move |entry| address(entry, 0, base).unwrap_or_default())
    }

    /// Returns the address behind the last instruction of the function that begins at `start`. Returns `None` if the
    /// unwinder's records do not have it, or not in the encoding that compilers use (`DW_EH_PE_pcrel | DW_EH_PE_sdata4`).
    pub(crate) fn frame_end(&self, start: u64) -> Option<u64> {
        /// The offsets in a record of the function's start and of its length.
        const START: usize = 8;
        const LENGTH: usize = 12;
        let (entries, base) = self.unwind_table();
        let (entries, _) = entries.as_chunks::<ENTRY>();
        let after = entries.partition_point(|entry| address(entry, 0, base).is_some_and(|at| at <= start));
        let entry = entries.get(after.checked_sub(1)?)?;
        let place = address(entry, 4, base)?;
        let record = self.bytes_at(place)?;
        let told = address(record, START, place.wrapping_add(START as u64))?;
        let length = u32::from_le_bytes(record.get(LENGTH..LENGTH + 4)?.try_into().ok()?);
        if told != start || address(entry, 0, base)? != start {
            return None;
        }
        start.checked_add(u64::from(length))
    }
}

/// Returns the address that four bytes of `record` give relative to `base`.
fn address(record: &[u8], at: usize, base: u64) -> Option<u64> {
    let relative = i32::from_le_bytes(record.get(at..at + 4)?.try_into().ok()?);
    Some(base.wrapping_add_signed(i64::from(relative)))
}
