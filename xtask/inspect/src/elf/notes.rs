//! Notes: the build id, the ABI, and the properties about the protection of branches (gABI, "Program Property").

use object::LittleEndian as LE;
use object::elf::{
    ELF_NOTE_GNU, FileHeader64, GNU_PROPERTY_AARCH64_FEATURE_1_AND, GNU_PROPERTY_X86_FEATURE_1_AND,
    NT_GNU_BUILD_ID,
};
use object::read::elf::{Note, NoteIterator, ProgramHeader as _};

use super::{Elf, PT_GNU_PROPERTY, PT_NOTE};

impl<'a> Elf<'a> {
    /// Returns all notes.
    pub fn notes(&self) -> impl Iterator<Item = Note<'a, FileHeader64<LE>>> + '_ {
        let headers = self.segments.iter();
        let holders = headers.filter(|header| [PT_NOTE, PT_GNU_PROPERTY].contains(&header.p_type(LE)));
        // In a sound file, at most two of these headers cover the same byte. In other files, this limits the work.
        let mut left = self.data.len().saturating_mul(2) as u64;
        let holders = holders.take_while(move |header| {
            let enough = header.p_filesz(LE) <= left;
            left = left.saturating_sub(header.p_filesz(LE));
            enough
        });
        holders.flat_map(|header| {
            let bytes = header.data(LE, self.data).unwrap_or_default();
            let align = if header.p_align(LE) == 8 { 8 } else { 4 };
            NoteIterator::new(LE, align, bytes).into_iter().flatten().flatten()
        })
    }

    /// Returns the content of `.note.gnu.build-id`.
    pub fn build_id(&self) -> Option<&'a [u8]> {
        let is_id = |note: &Note<'_, _>| note.name() == ELF_NOTE_GNU && note.n_type(LE) == NT_GNU_BUILD_ID;
        self.notes().find(is_id).map(|note| note.desc())
    }

    /// Returns the property about the protection of branches; `None` if there is no such property. A bit is set if all
    /// object files from which the file was linked have the protection.
    pub fn branch_protection(&self) -> Option<u32> {
        let kinds = [GNU_PROPERTY_AARCH64_FEATURE_1_AND, GNU_PROPERTY_X86_FEATURE_1_AND];
        let properties = self.notes().filter_map(|note| note.gnu_properties(LE)).flatten().flatten();
        let mut found = properties.filter(|property| kinds.contains(&property.pr_type()));
        found.find_map(|property| property.data_u32(LE).ok())
    }
}
