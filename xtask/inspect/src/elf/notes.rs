//! Notes: build id, ABI, and the properties that say whether branches are protected (gABI, "Program Property").

use object::LittleEndian as LE;
use object::read::ReadRef as _;
use object::read::elf::ProgramHeader as _;

use super::{Elf, PT_GNU_PROPERTY, PT_NOTE};

/// `GNU_PROPERTY_AARCH64_FEATURE_1_AND` and its x86 twin.
const FEATURE_1_AND: [u32; 2] = [0xc000_0000, 0xc000_0002];
/// `NT_GNU_BUILD_ID`, `NT_GNU_PROPERTY_TYPE_0` and the note of Go's linker.
const BUILD_ID: u32 = 3;
const PROPERTY: u32 = 5;

impl<'a> Elf<'a> {
    /// Every note: owner, type, content.
    pub fn notes(&self) -> impl Iterator<Item = (&'a [u8], u32, &'a [u8])> + '_ {
        let headers = self.segments.iter();
        let holders = headers.filter(|header| [PT_NOTE, PT_GNU_PROPERTY].contains(&header.p_type(LE)));
        // Each byte of a sound file is in two of them at most.
        let mut left = self.data.len().saturating_mul(2) as u64;
        let holders = holders.take_while(move |header| {
            let enough = header.p_filesz(LE) <= left;
            left = left.saturating_sub(header.p_filesz(LE));
            enough
        });
        holders.flat_map(|header| {
            let bytes = self.data.read_bytes_at(header.p_offset(LE), header.p_filesz(LE)).unwrap_or_default();
            let align = if header.p_align(LE) == 8 { 8 } else { 4 };
            notes_in(bytes, align)
        })
    }

    /// `.note.gnu.build-id`.
    pub fn build_id(&self) -> Option<&'a [u8]> {
        self.notes().find(|(owner, kind, _)| *owner == b"GNU" && *kind == BUILD_ID).map(|(_, _, id)| id)
    }

    /// The bits of the property that every object file of it agreed on; `None` where there is no such property.
    pub fn branch_protection(&self) -> Option<u32> {
        let properties = self.notes().filter(|(owner, kind, _)| *owner == b"GNU" && *kind == PROPERTY);
        properties.map(|(_, _, content)| content).find_map(|mut rest| {
            loop {
                let kind = u32::from_le_bytes(rest.get(0..4)?.try_into().ok()?);
                let size = u32::from_le_bytes(rest.get(4..8)?.try_into().ok()?) as usize;
                let value = rest.get(8..8usize.checked_add(size)?)?;
                if FEATURE_1_AND.contains(&kind) {
                    return Some(u32::from_le_bytes(value.get(..4)?.try_into().ok()?));
                }
                rest = rest.get(8 + size.next_multiple_of(8)..)?;
            }
        })
    }
}

fn notes_in(mut rest: &[u8], align: usize) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_le_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let (owner_size, size, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let owner = rest.get(12..12usize.checked_add(owner_size)?)?;
        let start = 12usize.checked_add(owner_size)?.checked_next_multiple_of(align)?;
        let end = start.checked_add(size)?;
        let content = rest.get(start..end)?;
        rest = rest.get(end.checked_next_multiple_of(align)?..).unwrap_or_default();
        let owner = owner.strip_suffix(b"\0").unwrap_or(owner);
        Some((owner, kind, content))
    })
}
