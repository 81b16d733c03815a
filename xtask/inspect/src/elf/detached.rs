//! Recognises files with separate debug information, such as those of Debian's packages `…-dbg`. They have the headers of
//! the program, but not its code, so no loader can map them.

/// The size of a section header (gABI).
const HEADER: usize = 64;
/// `SHT_NOBITS`: the section has no content in the file.
const NOBITS: u32 = 8;
/// `SHF_ALLOC | SHF_EXECINSTR`: the section is code.
const CODE: u64 = 2 | 4;

/// Returns whether a 64-bit little-endian ELF file has the debug information of another file, which has the code. `start`
/// is the ELF header. `read` returns the bytes at an offset of the file, with a length.
pub fn is_detached(start: &[u8], read: impl FnOnce(u64, usize) -> Option<Vec<u8>>) -> bool {
    is_without_code(start, read).unwrap_or(false)
}

fn is_without_code(start: &[u8], read: impl FnOnce(u64, usize) -> Option<Vec<u8>>) -> Option<bool> {
    let number = |at: usize| Some(u16::from_le_bytes(start.get(at..at + 2)?.try_into().ok()?));
    let is_known = start.starts_with(b"\x7fELF\x02\x01") && usize::from(number(58)?) == HEADER;
    let count = usize::from(number(60)?);
    if !is_known || count == 0 {
        return None;
    }
    let offset = u64::from_le_bytes(start.get(40..48)?.try_into().ok()?);
    let headers = read(offset, count * HEADER)?;
    let is_absent = |header: &[u8]| {
        let kind = u32::from_le_bytes(header[4..8].try_into().ok()?);
        let flags = u64::from_le_bytes(header[8..16].try_into().ok()?);
        (flags & CODE == CODE).then_some(kind == NOBITS)
    };
    let code: Vec<bool> = headers.chunks_exact(HEADER).filter_map(is_absent).collect();
    Some(!code.is_empty() && code.iter().all(|is_absent| *is_absent))
}

#[cfg(test)]
mod tests {
    use crate::device;
    use crate::finding::Severity;
    use crate::isa::Isa;
    use crate::{Target, inspect};

    /// Returns a shared object without segments, with sections of these types, all of which are code.
    fn with_sections(kinds: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        (bytes[16], bytes[18], bytes[20]) = (3, 183, 1);
        (bytes[40], bytes[52], bytes[58], bytes[60]) = (64, 64, 64, kinds.len() as u8);
        for kind in kinds {
            let mut header = [0; 64];
            (header[4], header[8]) = (*kind, 6);
            bytes.extend(header);
        }
        bytes
    }

    #[test]
    fn a_file_without_its_code_has_only_debug_information() {
        let device = device::find(Isa::Aarch64, "pi5").unwrap();
        let target = Target::new("aarch64", "/lib/ld-linux-aarch64.so.1", &device);
        for (kinds, is_detached) in [(&[8, 8][..], true), (&[8, 1], false), (&[1], false), (&[], false)] {
            let report = inspect(&with_sections(kinds), &target);
            let ids: Vec<_> = report.of(Severity::Refused).map(|finding| finding.id).collect();
            assert_eq!(ids == ["elf-type"], is_detached, "{kinds:?}: {ids:?}");
        }
    }
}
