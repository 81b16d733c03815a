//! The data that the dynamic loader reads: `PT_DYNAMIC`, its strings, symbols, versions and relocations.

use std::cell::Cell;
use std::rc::Rc;

use object::LittleEndian as LE;
use object::elf::{self, Dyn64, DynamicTag, FileHeader64, Rela64, Sym64, Verdaux, Verdef, Vernaux, Verneed};
use object::pod::Pod;
use object::read::ReadRef as _;
use object::read::elf::{GnuHashTable, ProgramHeader as _, SectionHeader as _};

use super::{Elf, PT_DYNAMIC, string};

/// Upper bound for the libraries that a file needs. Each one costs a search in the target's directories.
const MAX_NEEDED: usize = 4096;

/// The dynamic section of an ELF file, and the tables that it names.
#[derive(Debug, Default)]
pub struct Dynamic<'a> {
    entries: &'a [Dyn64<LE>],
    strings: &'a [u8],
    /// All dynamic symbols, including the empty first one.
    pub symbols: &'a [Sym64<LE>],
    versions: &'a [u8],
    verneed: &'a [u8],
    verdef: &'a [u8],
    /// Relocations with addends.
    pub relocations: &'a [Rela64<LE>],
    /// The relocations of the procedure linkage table.
    pub plt_relocations: &'a [Rela64<LE>],
}

/// A version that a library must offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Required<'a> {
    /// The library's SONAME.
    pub library: &'a [u8],
    /// The name of the version, such as `GLIBC_2.39`.
    pub version: &'a [u8],
    /// True if the loader continues when the library lacks the version.
    pub weak: bool,
    /// The number by which symbols refer to the version.
    pub index: u16,
}

impl<'a> Dynamic<'a> {
    /// Reads the dynamic section. The result is empty if there is no `PT_DYNAMIC`.
    pub(super) fn read(elf: &Elf<'a>) -> Result<Self, String> {
        let Some(header) = elf.segment(PT_DYNAMIC) else { return Ok(Self::default()) };
        let bytes = header.data(LE, elf.data);
        let bytes = bytes.map_err(|()| "its dynamic section lies beyond the end of the file")?;
        let entries: &[Dyn64<LE>] = array(bytes);
        let end = entries.iter().position(|entry| entry.d_tag.get(LE) == elf::DT_NULL);
        let entries = &entries[..end.unwrap_or(entries.len())];
        let mut dynamic = Self { entries, ..Self::default() };
        let at = |tag| dynamic.value(tag).map(|address| elf.bytes_at(address));
        let loaded = |tag, what: &str| match at(tag) {
            Some(None) => Err(format!("its dynamic {what} outside of the loaded segments")),
            found => Ok(found.flatten().unwrap_or_default()),
        };
        let strings = loaded(elf::DT_STRTAB, "string table lies")?;
        let limit = dynamic.value(elf::DT_STRSZ).and_then(|size| usize::try_from(size).ok());
        if limit.is_some_and(|limit| limit > strings.len()) {
            return Err("its dynamic string table is longer than the loaded segment".to_owned());
        }
        let strings = &strings[..limit.unwrap_or(strings.len())];
        let symbols: &[Sym64<LE>] = array(loaded(elf::DT_SYMTAB, "symbols lie")?);
        let symbols = &symbols[..symbols.len().min(dynamic.count_of_symbols(elf))];
        let of = |tag| at(tag).flatten().unwrap_or_default();
        let (versions, verneed, verdef) = (of(elf::DT_VERSYM), of(elf::DT_VERNEED), of(elf::DT_VERDEF));
        let table = |tag, size| {
            let size = dynamic.value(size).and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
            array(&of(tag)[..size.min(of(tag).len())])
        };
        let relocations = table(elf::DT_RELA, elf::DT_RELASZ);
        let plt_relocations = table(elf::DT_JMPREL, elf::DT_PLTRELSZ);
        dynamic = Self { entries, strings, symbols, versions, verneed, verdef, relocations, plt_relocations };
        let count = dynamic.values(elf::DT_NEEDED).count();
        if count > MAX_NEEDED {
            return Err(format!("it needs {count} libraries: no linker makes more than {MAX_NEEDED}"));
        }
        for (tag, what) in [(elf::DT_NEEDED, "a needed library"), (elf::DT_SONAME, "its own name")] {
            if dynamic.values(tag).any(|start| dynamic.string_at(start).is_none()) {
                return Err(format!("the name of {what} lies outside of the dynamic string table"));
            }
        }
        Ok(dynamic)
    }

    /// Returns the number of symbols. The section header or `DT_HASH` contains it. If there is only `DT_GNU_HASH`, the
    /// number follows from the end of the last chain.
    fn count_of_symbols(&self, elf: &Elf<'a>) -> usize {
        if let Some(section) = elf.section_of_type(elf::SHT_DYNSYM) {
            return usize::try_from(section.sh_size(LE)).unwrap_or(0) / size_of::<Sym64<LE>>();
        }
        let at = |tag| self.value(tag).and_then(|address| elf.bytes_at(address));
        if let Some(hash) = at(elf::DT_HASH) {
            let header = hash.read_at::<elf::HashHeader<LE>>(0);
            return header.map_or(0, |header| header.chain_count.get(LE) as usize);
        }
        let hash =
            at(elf::DT_GNU_HASH).and_then(|hash| GnuHashTable::<FileHeader64<LE>>::parse(LE, hash).ok());
        // Symbols that are not in the hash table come before the others. They exist even if the table is empty.
        hash.map_or(0, |hash| hash.symbol_table_length(LE).unwrap_or(hash.symbol_base()) as usize)
    }

    fn values(&self, tag: DynamicTag) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().filter(move |entry| entry.d_tag.get(LE) == tag).map(|entry| entry.d_val.get(LE))
    }

    /// Returns the first value of a tag.
    pub fn value(&self, tag: DynamicTag) -> Option<u64> {
        self.values(tag).next()
    }

    fn string_at(&self, start: u64) -> Option<&'a [u8]> {
        string(self.strings, usize::try_from(start).ok()?)
    }

    /// Returns the names of `DT_NEEDED`, in order.
    pub fn needed(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        self.values(elf::DT_NEEDED).filter_map(|start| self.string_at(start))
    }

    /// Returns whether the loader must write into segments that are not writable, to relocate the file.
    pub fn has_text_relocations(&self) -> bool {
        let flags = self.value(elf::DT_FLAGS).unwrap_or(0);
        self.value(elf::DT_TEXTREL).is_some() || flags & elf::DF_TEXTREL.0 != 0
    }

    /// Returns whether the loader finds all functions before the program starts.
    pub fn binds_now(&self) -> bool {
        let flag = |tag, bit: u64| self.value(tag).is_some_and(|flags| flags & bit != 0);
        flag(elf::DT_FLAGS, elf::DF_BIND_NOW.0)
            || flag(elf::DT_FLAGS_1, elf::DF_1_NOW.0)
            || self.value(elf::DT_BIND_NOW).is_some()
    }

    /// Returns the string that a tag names.
    pub fn text(&self, tag: DynamicTag) -> Option<&'a [u8]> {
        self.value(tag).and_then(|start| self.string_at(start))
    }

    /// Returns whether the file has a dynamic section.
    pub fn is_there(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Returns a dynamic symbol's name.
    pub fn name(&self, symbol: &Sym64<LE>) -> &'a [u8] {
        self.string_at(u64::from(symbol.st_name.get(LE))).unwrap_or_default()
    }

    /// Returns the number of a symbol's version, as in [`Required::index`].
    pub fn version_of(&self, symbol: usize) -> Option<u16> {
        let at = symbol.checked_mul(2)?;
        let two = self.versions.get(at..at + 2)?;
        Some(u16::from_le_bytes(two.try_into().ok()?) & 0x7fff)
    }

    /// Returns the versions that libraries must offer. An invalid link ends the table.
    pub fn required(&self) -> impl Iterator<Item = Required<'a>> + '_ {
        let count = self.value(elf::DT_VERNEEDNUM).unwrap_or(0);
        // The number of records is limited. Otherwise a small table could give very many of them, because lists can
        // share records.
        let left = Rc::new(Cell::new(self.verneed.len() / size_of::<Vernaux<LE>>()));
        let libraries = chain(self.verneed, 0, count, |need: &Verneed<LE>| need.vn_next.get(LE));
        libraries.flat_map(move |(start, need)| {
            let library = self.string_at(u64::from(need.vn_file.get(LE)));
            let first = start.saturating_add(need.vn_aux.get(LE) as usize);
            let count = u64::from(need.vn_cnt.get(LE));
            let next = |version: &Vernaux<LE>| version.vna_next.get(LE);
            let left = Rc::clone(&left);
            let there_is_more = move || left.replace(left.get().saturating_sub(1)) > 0;
            let versions = chain(self.verneed, first, count, next).take_while(move |_| there_is_more());
            versions.filter_map(move |(_, version)| {
                Some(Required {
                    library: library?,
                    version: self.string_at(u64::from(version.vna_name.get(LE)))?,
                    weak: version.vna_flags.get(LE).contains(elf::VER_FLG_WEAK),
                    index: version.vna_other.get(LE).0,
                })
            })
        })
    }

    /// Returns the versions that this library offers.
    pub fn offered(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        let count = self.value(elf::DT_VERDEFNUM).unwrap_or(0);
        let definitions = chain(self.verdef, 0, count, |definition: &Verdef<LE>| definition.vd_next.get(LE));
        let named = definitions.filter(|(_, version)| !version.vd_flags.get(LE).contains(elf::VER_FLG_BASE));
        named.filter_map(|(start, definition)| {
            let at = (start as u64).checked_add(u64::from(definition.vd_aux.get(LE)))?;
            let name = self.verdef.read_at::<Verdaux<LE>>(at).ok()?;
            self.string_at(u64::from(name.vda_name.get(LE)))
        })
    }
}

/// Returns the records of a linked list within `table`, with their offsets. These are at most `count` records, and no
/// more than fit into the table.
fn chain<T: Pod>(
    table: &[u8],
    first: usize,
    count: u64,
    next: impl Fn(&T) -> u32,
) -> impl Iterator<Item = (usize, &T)> {
    let most = usize::try_from(count).unwrap_or(usize::MAX).min(table.len() / size_of::<T>());
    let mut at = Some(first);
    std::iter::from_fn(move || {
        let start = at?;
        let record = table.read_at(start as u64).ok()?;
        let step = next(record) as usize;
        at = if step == 0 { None } else { start.checked_add(step) };
        Some((start, record))
    })
    .take(most)
}

/// Returns the bytes as records, without an incomplete record at the end.
pub(crate) fn array<T: Pod>(bytes: &[u8]) -> &[T] {
    bytes.read_slice_at(0, bytes.len() / size_of::<T>()).unwrap_or_default()
}
