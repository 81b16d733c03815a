//! An ELF file as the kernel and the dynamic loader read it, by its program headers. Sections are read if there are
//! any, but nothing depends on them. The sizes in headers are not trusted: every table is a slice of the file, and no
//! memory of such a size is allocated.

mod detached;
mod dynamic;
mod frames;
mod go;
mod notes;
mod symbols;

use object::LittleEndian as LE;
use object::elf::{
    self, FileHeader64, PT_DYNAMIC, PT_GNU_EH_FRAME, PT_GNU_PROPERTY, PT_INTERP, PT_LOAD, PT_NOTE,
    ProgramHeader64, SectionHeader64,
};
use object::read::ReadRef as _;
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};

pub use detached::is_detached;
pub(crate) use dynamic::array;
pub use dynamic::{Dynamic, Required};
pub(crate) use go::GoFunctions;
pub use symbols::Symbol;

/// The longest path of an interpreter that Linux reads (fs/binfmt_elf.c: PATH_MAX).
const LONGEST_INTERPRETER: u64 = 4096;
/// Upper bound for the bytes of program headers that Linux reads (fs/binfmt_elf.c, load_elf_phdrs).
const LARGEST_HEADERS: usize = 65536;
/// Upper bound for the ranges of code. Linkers make a handful. Each range costs a pass over all symbols.
const MAX_CODE: usize = 64;

/// A 64-bit little-endian ELF file with valid headers.
#[derive(Debug)]
pub struct Elf<'a> {
    /// The content of the file.
    pub data: &'a [u8],
    header: &'a FileHeader64<LE>,
    segments: &'a [ProgramHeader64<LE>],
    sections: &'a [SectionHeader64<LE>],
    /// True if the header names section headers that are not in the file. Only tools read them.
    pub sections_are_lost: bool,
    section_names: &'a [u8],
    /// The segments to load, by address. [`LARGEST_HEADERS`] limits their number.
    loads: Vec<Load>,
    /// Address and size of the memory that is read-only after relocation. Both are stored here, because the analysis
    /// needs them for each memory access in the code.
    pub relro: Option<(u64, u64)>,
    /// The dynamic section; empty in a static executable.
    pub dynamic: Dynamic<'a>,
}

/// A `PT_LOAD` segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    pub offset: u64,
    pub address: u64,
    pub file_size: u64,
    pub memory_size: u64,
    pub align: u64,
    pub flags: u32,
}

impl Load {
    fn of(header: &ProgramHeader64<LE>) -> Self {
        Self {
            offset: header.p_offset(LE),
            address: header.p_vaddr(LE),
            file_size: header.p_filesz(LE),
            memory_size: header.p_memsz(LE),
            align: header.p_align(LE),
            flags: header.p_flags(LE).0,
        }
    }

    pub fn executable(&self) -> bool {
        self.flags & elf::PF_X.0 != 0
    }

    pub fn writable(&self) -> bool {
        self.flags & elf::PF_W.0 != 0
    }
}

/// A range of code: its bytes, and its address in memory.
#[derive(Debug, Clone, Copy)]
pub struct Code<'a> {
    /// The address of the first byte.
    pub address: u64,
    pub bytes: &'a [u8],
}

/// The fields of the first 64 bytes, for a file of any class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ident {
    pub class: u8,
    pub data: u8,
    /// `EI_OSABI`.
    pub system: u8,
    pub machine: u16,
    pub kind: u16,
    pub flags: u32,
}

impl Ident {
    /// Reads the fields.
    ///
    /// # Errors
    /// Returns an error if the file has no ELF header.
    pub fn read(data: &[u8]) -> Result<Self, String> {
        if !data.starts_with(b"\x7fELF") {
            let is_empty = data.is_empty();
            let what = if is_empty { "it is empty" } else { "it does not begin with ELF's magic number" };
            return Err(what.to_owned());
        }
        if data.len() < 52 {
            return Err(format!("it ends after {} bytes, within its header", data.len()));
        }
        let (class, order) = (data[4], data[5]);
        let half = |at: usize| {
            let bytes = [data[at], data[at + 1]];
            if order == 2 { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
        };
        let at = if class == 2 { 48 } else { 36 };
        let bytes = [data[at], data[at + 1], data[at + 2], data[at + 3]];
        let flags = if order == 2 { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
        Ok(Self { class, data: order, system: data[7], machine: half(18), kind: half(16), flags })
    }
}

/// Returns an error if Linux (fs/binfmt_elf.c) refuses the segments or cannot load them completely, or if there is
/// more code than can be examined.
fn check_loads(loads: &[Load], length: u64) -> Result<(), String> {
    let mut end_before: Option<u64> = None;
    for (index, load) in loads.iter().enumerate() {
        let end = load.offset.checked_add(load.file_size);
        if end.is_none_or(|end| end > length) {
            return Err(format!(
                "segment {index} to load ends at {}, and the file has {length} bytes: it is truncated or damaged",
                end.map_or("2^64".to_owned(), |end| end.to_string())
            ));
        }
        if load.file_size > load.memory_size {
            return Err(format!("segment {index} to load is larger in the file than in memory"));
        }
        let Some(end) = load.address.checked_add(load.memory_size) else {
            return Err(format!("segment {index} to load wraps around the address space"));
        };
        if end_before.is_some_and(|before| load.address < before) {
            return Err(format!("segment {index} to load overlaps the one before it"));
        }
        end_before = Some(end);
    }
    let executable = loads.iter().filter(|load| load.executable()).count();
    if executable > MAX_CODE {
        return Err(format!("it has {executable} segments of code: no linker makes more than a few"));
    }
    match end_before {
        None => Err("it has no segment to load".to_owned()),
        Some(_) => Ok(()),
    }
}

impl<'a> Elf<'a> {
    /// Reads the headers and the dynamic section.
    ///
    /// # Errors
    /// Returns an error that says which header is not valid.
    pub fn parse(data: &'a [u8]) -> Result<Self, String> {
        let header = FileHeader64::<LE>::parse(data).map_err(|error| format!("its header: {error}"))?;
        if usize::from(header.e_phentsize(LE)) != size_of::<ProgramHeader64<LE>>() && header.e_phnum(LE) != 0
        {
            return Err(format!("its program headers have {} bytes, not 56", header.e_phentsize(LE)));
        }
        let segments = header
            .program_headers(LE, data)
            .map_err(|_cause| "its program headers lie beyond the end of the file".to_owned())?;
        if segments.is_empty() {
            return Err("it has no program headers: there is nothing to load".to_owned());
        }
        if size_of_val(segments) > LARGEST_HEADERS {
            return Err(format!(
                "it has {} program headers: Linux loads nothing with more than {} bytes of them",
                segments.len(),
                LARGEST_HEADERS
            ));
        }
        // Neither the kernel nor the loader reads sections, so headers beyond the end of the file are no fault.
        let sections = header.section_headers(LE, data);
        let sections_are_lost = sections.is_err();
        let sections = sections.unwrap_or_default();
        let loads: Vec<Load> =
            segments.iter().filter(|header| header.p_type(LE) == PT_LOAD).map(Load::of).collect();
        check_loads(&loads, data.len() as u64)?;
        let (section_names, dynamic) = (&[][..], Dynamic::default());
        let relro = None;
        let mut elf = Self {
            data,
            header,
            segments,
            sections,
            sections_are_lost,
            section_names,
            loads,
            relro,
            dynamic,
        };
        let relro = elf.segment(elf::PT_GNU_RELRO);
        elf.relro = relro.map(|header| (header.p_vaddr(LE), header.p_memsz(LE)));
        elf.section_names = elf.names_of_sections();
        elf.dynamic = Dynamic::read(&elf)?;
        Ok(elf)
    }

    fn names_of_sections(&self) -> &'a [u8] {
        let index = self.header.shstrndx(LE, self.data).unwrap_or(0);
        let strings = usize::try_from(index).ok().and_then(|index| self.sections.get(index));
        strings.and_then(|section| section.data(LE, self.data).ok()).unwrap_or_default()
    }

    /// Returns `e_machine`.
    pub fn machine(&self) -> u16 {
        self.header.e_machine(LE).0
    }

    /// Returns `e_type`.
    pub fn kind(&self) -> elf::FileType {
        self.header.e_type(LE)
    }

    /// Returns `e_entry`.
    pub fn entry(&self) -> u64 {
        self.header.e_entry(LE)
    }

    /// Returns the number of program headers and of section headers.
    pub fn counts(&self) -> (usize, usize) {
        (self.segments.len(), self.sections.len())
    }

    /// Returns the segments to load, by address.
    pub fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        self.loads.iter().copied()
    }

    /// Returns the segment whose memory contains an address.
    fn load_at(&self, address: u64) -> Option<Load> {
        let behind = self.loads.partition_point(|load| load.address <= address);
        // If several segments begin at one address, all but the last are empty.
        let load = *self.loads.get(behind.checked_sub(1)?)?;
        (address - load.address < load.memory_size).then_some(load)
    }

    /// Returns the first program header of a type.
    fn segment(&self, kind: elf::ProgramType) -> Option<&'a ProgramHeader64<LE>> {
        self.segments.iter().find(|header| header.p_type(LE) == kind)
    }

    /// Returns the flags of `PT_GNU_STACK`; `None` if there is no such header.
    pub fn stack_flags(&self) -> Option<u32> {
        self.segment(elf::PT_GNU_STACK).map(|header| header.p_flags(LE).0)
    }

    /// Returns the path in `PT_INTERP`, if there is such a header.
    ///
    /// # Errors
    /// Returns an error if the header's content is no path.
    pub fn interpreter(&self) -> Result<Option<&'a [u8]>, String> {
        let Some(header) = self.segment(PT_INTERP) else { return Ok(None) };
        if header.p_filesz(LE) > LONGEST_INTERPRETER {
            return Err("its interpreter's path is longer than 4096 bytes".to_owned());
        }
        let bytes = header.data(LE, self.data);
        let bytes = bytes.map_err(|()| "its interpreter's path lies beyond the end of the file")?;
        match bytes.split_last() {
            Some((0, path)) if !path.is_empty() => {
                Ok(Some(path.split(|byte| *byte == 0).next().unwrap_or(path)))
            }
            _ => Err("its interpreter's path does not end".to_owned()),
        }
    }

    /// Returns whether other files load this one. A linker marks a position-independent executable with `DF_1_PIE`
    /// (binutils since 2.26). Older ones have an interpreter, and so has glibc's libc.so.6, which has a SONAME, too. The
    /// entry point tells nothing: older linkers set it in libraries.
    pub fn is_library(&self) -> bool {
        let flags = self.dynamic.value(elf::DT_FLAGS_1).unwrap_or(0);
        let named = self.dynamic.text(elf::DT_SONAME).is_some();
        let asks = self.segment(PT_INTERP).is_some();
        self.kind() == elf::ET_DYN
            && self.dynamic.is_there()
            && flags & elf::DF_1_PIE.0 == 0
            && (named || !asks)
    }

    /// Returns whether the executable contains its C library: it asks for no loader and needs no library.
    pub fn is_static(&self) -> bool {
        !self.is_library() && self.segment(PT_INTERP).is_none() && self.dynamic.needed().next().is_none()
    }

    /// Returns the file's bytes from `address` to the end of the loaded segment.
    pub fn bytes_at(&self, address: u64) -> Option<&'a [u8]> {
        let load = self.load_at(address)?;
        let inside = address - load.address;
        self.data.read_bytes_at(load.offset + inside, load.file_size.checked_sub(inside)?).ok()
    }

    /// Returns the file's bytes of a segment.
    pub fn loaded(&self, load: Load) -> Option<&'a [u8]> {
        self.data.read_bytes_at(load.offset, load.file_size).ok()
    }

    /// Returns whether the memory at `address` can change while the program runs.
    pub fn is_variable(&self, address: u64) -> bool {
        let inside = |start: u64, size: u64| address >= start && address - start < size;
        let relro = self.relro.is_some_and(|(start, size)| inside(start, size));
        !relro && self.load_at(address).is_some_and(|load| load.writable())
    }

    /// Returns the ranges of code. These are the executable sections. If there are no such sections, or more than any
    /// linker makes, they are the executable segments.
    pub fn code(&self) -> Vec<Code<'a>> {
        let code = |section: &&SectionHeader64<LE>| {
            section.sh_flags(LE).contains(elf::SHF_EXECINSTR) && section.sh_type(LE) == elf::SHT_PROGBITS
        };
        let sections = disjoint(self.sections.iter().filter(code).filter_map(|section| {
            let (address, bytes) = (section.sh_addr(LE), section.data(LE, self.data).ok()?);
            let wraps = address.checked_add(bytes.len() as u64).is_none();
            (!wraps).then_some((section.sh_offset(LE), Code { address, bytes }))
        }));
        if (1..=MAX_CODE).contains(&sections.len()) {
            return sections;
        }
        disjoint(self.loads().filter(Load::executable).filter_map(|load| {
            Some((load.offset, Code { address: load.address, bytes: self.loaded(load)? }))
        }))
    }

    fn section_name(&self, section: &SectionHeader64<LE>) -> &'a [u8] {
        let start = usize::try_from(section.sh_name(LE)).unwrap_or(usize::MAX);
        string(self.section_names, start).unwrap_or_default()
    }

    /// Returns the name and the size of every section.
    pub fn section_table(&self) -> impl Iterator<Item = (&'a [u8], u64)> + '_ {
        self.sections.iter().map(|section| (self.section_name(section), section.sh_size(LE)))
    }

    /// Returns a section's content and address, by its name.
    pub fn section(&self, name: &[u8]) -> Option<Code<'a>> {
        let found = self.sections.iter().find(|section| self.section_name(section) == name)?;
        let bytes = found.data(LE, self.data).ok()?;
        found.sh_addr(LE).checked_add(bytes.len() as u64)?;
        Some(Code { address: found.sh_addr(LE), bytes })
    }

    fn section_of_type(&self, kind: elf::SectionType) -> Option<&'a SectionHeader64<LE>> {
        self.sections.iter().find(|section| section.sh_type(LE) == kind)
    }

    /// Returns the name of the separate file that contains the debug symbols.
    pub fn debug_link(&self) -> Option<&'a [u8]> {
        string(self.section(b".gnu_debuglink")?.bytes, 0).filter(|name| !name.is_empty())
    }
}

/// Returns the ranges of code without the empty ones and without those that overlap an earlier range in the file.
fn disjoint<'a>(parts: impl Iterator<Item = (u64, Code<'a>)>) -> Vec<Code<'a>> {
    let mut end = 0;
    let fresh = parts.filter(|(offset, code)| {
        let fresh = *offset >= end && !code.bytes.is_empty();
        if fresh {
            end = offset.saturating_add(code.bytes.len() as u64);
        }
        fresh
    });
    fresh.map(|(_, code)| code).collect()
}

/// Returns a NUL-terminated string of a string table. A string that is longer than any real name is refused, since
/// many entries of a table may refer to the same long string.
pub(crate) fn string(table: &[u8], start: usize) -> Option<&[u8]> {
    const LONGEST: usize = 16 << 10;
    let rest = table.get(start..)?;
    let end = memchr::memchr(0, &rest[..rest.len().min(LONGEST)])?;
    Some(&rest[..end])
}

/// Formats bytes of the file for a message. Bytes that cannot be printed are escaped, and a long text is cut.
pub fn shown(bytes: &[u8]) -> String {
    const LONGEST: usize = 120;
    let cut = &bytes[..bytes.len().min(LONGEST)];
    let mut text = cut.escape_ascii().to_string();
    if cut.len() < bytes.len() {
        text.push('…');
    }
    text
}
