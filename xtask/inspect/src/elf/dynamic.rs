//! What the dynamic loader reads: `PT_DYNAMIC`, its strings, symbols, versions and relocations.

use std::cell::Cell;
use std::rc::Rc;

use object::LittleEndian as LE;
use object::elf::{self, Dyn64, DynamicTag, Rela64, Sym64, Verdaux, Verdef, Vernaux, Verneed};
use object::read::ReadRef as _;
use object::read::elf::ProgramHeader as _;

use super::{Elf, PT_DYNAMIC, string};

/// The dynamic section's part of an ELF file.
#[derive(Debug, Default)]
pub struct Dynamic<'a> {
    entries: &'a [Dyn64<LE>],
    strings: &'a [u8],
    symbols: &'a [Sym64<LE>],
    versions: &'a [u8],
    verneed: &'a [u8],
    verdef: &'a [u8],
    /// Relocations with addends.
    pub relocations: &'a [Rela64<LE>],
    /// Those of the procedure linkage table.
    pub plt_relocations: &'a [Rela64<LE>],
}

/// A version that a library must offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Required<'a> {
    /// The library's SONAME.
    pub library: &'a [u8],
    /// `GLIBC_2.39`.
    pub version: &'a [u8],
    /// Whether the loader goes on without it.
    pub weak: bool,
    /// As symbols name it.
    pub index: u16,
}

impl<'a> Dynamic<'a> {
    /// Reads it; empty where there is no `PT_DYNAMIC`.
    pub(super) fn read(elf: &Elf<'a>) -> Result<Self, String> {
        let Some(header) = elf.segment(PT_DYNAMIC) else { return Ok(Self::default()) };
        let (offset, size) = (header.p_offset(LE), header.p_filesz(LE));
        let beyond = || "its dynamic section lies beyond the end of the file".to_owned();
        let bytes = elf.data.read_bytes_at(offset, size).map_err(|()| beyond())?;
        let entries = bytes.read_slice_at::<Dyn64<LE>>(0, bytes.len() / size_of::<Dyn64<LE>>());
        let entries = entries.map_err(|()| beyond())?;
        let end = entries.iter().position(|entry| entry.d_tag.get(LE) == elf::DT_NULL);
        let entries = &entries[..end.unwrap_or(entries.len())];
        let mut dynamic = Self { entries, ..Self::default() };
        let at = |tag| dynamic.value(tag).map(|address| elf.bytes_at(address));
        let strings = match at(elf::DT_STRTAB) {
            Some(None) => return Err("its dynamic string table lies outside of what is loaded".to_owned()),
            found => found.flatten().unwrap_or_default(),
        };
        let limit = dynamic.value(elf::DT_STRSZ).and_then(|size| usize::try_from(size).ok());
        if limit.is_some_and(|limit| limit > strings.len()) {
            return Err("its dynamic string table is longer than what is loaded there".to_owned());
        }
        let strings = &strings[..limit.unwrap_or(strings.len())];
        let symbols = match at(elf::DT_SYMTAB) {
            Some(None) => return Err("its dynamic symbols lie outside of what is loaded".to_owned()),
            found => found.flatten().unwrap_or_default(),
        };
        let count = dynamic.count_of_symbols(elf).min(symbols.len() / size_of::<Sym64<LE>>());
        let symbols = symbols.read_slice_at::<Sym64<LE>>(0, count).unwrap_or_default();
        let of = |tag| at(tag).flatten().unwrap_or_default();
        let (versions, verneed, verdef) = (of(elf::DT_VERSYM), of(elf::DT_VERNEED), of(elf::DT_VERDEF));
        let relocations = table(of(elf::DT_RELA), dynamic.value(elf::DT_RELASZ));
        let plt_relocations = table(of(elf::DT_JMPREL), dynamic.value(elf::DT_PLTRELSZ));
        dynamic = Self { entries, strings, symbols, versions, verneed, verdef, relocations, plt_relocations };
        for (tag, what) in [(elf::DT_NEEDED, "a needed library"), (elf::DT_SONAME, "its own name")] {
            if dynamic.values(tag).any(|start| dynamic.string_at(start).is_none()) {
                return Err(format!("the name of {what} lies outside of the dynamic string table"));
            }
        }
        Ok(dynamic)
    }

    /// `DT_HASH` tells the number of symbols; of `DT_GNU_HASH` the last chain's end does.
    fn count_of_symbols(&self, elf: &Elf<'a>) -> usize {
        let word = |bytes: &[u8], at: usize| {
            let four = bytes.get(at..at.checked_add(4)?)?;
            Some(u32::from_le_bytes(four.try_into().ok()?))
        };
        let sections = elf.section_of_type(elf::SHT_DYNSYM);
        if let Some(section) = sections {
            use object::read::elf::SectionHeader as _;
            return usize::try_from(section.sh_size(LE)).unwrap_or(0) / size_of::<Sym64<LE>>();
        }
        if let Some(hash) = self.value(elf::DT_HASH).and_then(|address| elf.bytes_at(address)) {
            return word(hash, 4).map_or(0, |chains| chains as usize);
        }
        let Some(hash) = self.value(elf::DT_GNU_HASH).and_then(|address| elf.bytes_at(address)) else {
            return 0;
        };
        let (Some(buckets), Some(first), Some(bloom)) = (word(hash, 0), word(hash, 4), word(hash, 8)) else {
            return 0;
        };
        let at_buckets = (bloom as usize).saturating_mul(8).saturating_add(16);
        let bucket = |index: u32| word(hash, at_buckets.saturating_add((index as usize).saturating_mul(4)));
        let last = (0..buckets).map_while(bucket).max().unwrap_or(0);
        if last < first {
            return first as usize;
        }
        let at_chains = at_buckets.saturating_add((buckets as usize).saturating_mul(4));
        let mut index = last;
        while word(hash, at_chains.saturating_add((index - first) as usize * 4))
            .is_some_and(|hash| hash & 1 == 0)
        {
            let Some(next) = index.checked_add(1) else { return 0 };
            index = next;
        }
        (index as usize).saturating_add(1)
    }

    fn values(&self, tag: DynamicTag) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().filter(move |entry| entry.d_tag.get(LE) == tag).map(|entry| entry.d_val.get(LE))
    }

    /// The first value of a tag.
    pub fn value(&self, tag: DynamicTag) -> Option<u64> {
        self.values(tag).next()
    }

    fn string_at(&self, start: u64) -> Option<&'a [u8]> {
        string(self.strings, usize::try_from(start).ok()?)
    }

    /// `DT_NEEDED`, in order.
    pub fn needed(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        self.values(elf::DT_NEEDED).filter_map(|start| self.string_at(start))
    }

    /// The string that a tag names.
    pub fn text(&self, tag: DynamicTag) -> Option<&'a [u8]> {
        self.value(tag).and_then(|start| self.string_at(start))
    }

    /// Whether there is such a section at all.
    pub fn is_there(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Every dynamic symbol, the empty first one too.
    pub fn symbols(&self) -> &'a [Sym64<LE>] {
        self.symbols
    }

    /// A dynamic symbol's name.
    pub fn name(&self, symbol: &Sym64<LE>) -> &'a [u8] {
        self.string_at(u64::from(symbol.st_name.get(LE))).unwrap_or_default()
    }

    /// A symbol's version, as [`Required::index`].
    pub fn version_of(&self, symbol: usize) -> Option<u16> {
        let at = symbol.checked_mul(2)?;
        let two = self.versions.get(at..at + 2)?;
        Some(u16::from_le_bytes(two.try_into().ok()?) & 0x7fff)
    }

    /// What libraries must offer. A table whose links lead astray ends there.
    pub fn required(&self) -> impl Iterator<Item = Required<'a>> + '_ {
        let count = self.value(elf::DT_VERNEEDNUM).unwrap_or(0);
        // Lists that share their records would make of a small table a long one.
        let left = Rc::new(Cell::new(self.verneed.len() / size_of::<Vernaux<LE>>()));
        let libraries = chain(self.verneed, 0, count, size_of::<Verneed<LE>>(), |bytes| {
            bytes.read_at::<Verneed<LE>>(0).map_or(0, |need| need.vn_next.get(LE))
        });
        libraries.flat_map(move |(start, bytes)| {
            let need = bytes.read_at::<Verneed<LE>>(0).ok();
            let library = need.and_then(|need| self.string_at(u64::from(need.vn_file.get(LE))));
            let first = need.map_or(usize::MAX, |need| start.saturating_add(need.vn_aux.get(LE) as usize));
            let count = need.map_or(0, |need| u64::from(need.vn_cnt.get(LE)));
            let versions = chain(self.verneed, first, count, size_of::<Vernaux<LE>>(), |bytes| {
                bytes.read_at::<Vernaux<LE>>(0).map_or(0, |version| version.vna_next.get(LE))
            });
            let left = Rc::clone(&left);
            let there_is_more = move || left.replace(left.get().saturating_sub(1)) > 0;
            versions.take_while(move |_| there_is_more()).filter_map(move |(_, bytes)| {
                let version = bytes.read_at::<Vernaux<LE>>(0).ok()?;
                Some(Required {
                    library: library?,
                    version: self.string_at(u64::from(version.vna_name.get(LE)))?,
                    weak: version.vna_flags.get(LE).0 & elf::VER_FLG_WEAK.0 != 0,
                    index: version.vna_other.get(LE).0,
                })
            })
        })
    }

    /// The versions that this library offers.
    pub fn offered(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        let count = self.value(elf::DT_VERDEFNUM).unwrap_or(0);
        let definitions = chain(self.verdef, 0, count, size_of::<Verdef<LE>>(), |bytes| {
            bytes.read_at::<Verdef<LE>>(0).map_or(0, |definition| definition.vd_next.get(LE))
        });
        definitions.filter_map(|(_, bytes)| {
            let definition = bytes.read_at::<Verdef<LE>>(0).ok()?;
            if definition.vd_flags.get(LE).0 & elf::VER_FLG_BASE.0 != 0 {
                return None;
            }
            let name = bytes.read_at::<Verdaux<LE>>(u64::from(definition.vd_aux.get(LE))).ok()?;
            self.string_at(u64::from(name.vda_name.get(LE)))
        })
    }
}

/// The records of a linked list within `table`: at most `count`, and no more than there is room for.
fn chain<'a>(
    table: &'a [u8],
    first: usize,
    count: u64,
    size: usize,
    next: impl Fn(&'a [u8]) -> u32,
) -> impl Iterator<Item = (usize, &'a [u8])> {
    let most = usize::try_from(count).unwrap_or(usize::MAX).min(table.len() / size);
    let mut at = Some(first);
    std::iter::from_fn(move || {
        let start = at?;
        let bytes = table.get(start..)?;
        if bytes.len() < size {
            return None;
        }
        let step = next(bytes) as usize;
        at = if step == 0 { None } else { start.checked_add(step) };
        Some((start, bytes))
    })
    .take(most)
}

fn table(bytes: &[u8], size: Option<u64>) -> &[Rela64<LE>] {
    let size = size.and_then(|size| usize::try_from(size).ok()).unwrap_or(0).min(bytes.len());
    bytes.read_slice_at::<Rela64<LE>>(0, size / size_of::<Rela64<LE>>()).unwrap_or_default()
}
