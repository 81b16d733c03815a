//! Symbols, and the starts of functions.

use object::LittleEndian as LE;
use object::elf::{self, Sym64};
use object::read::elf::SectionHeader as _;

use super::{Elf, array, string};

/// A defined symbol.
#[derive(Debug, Clone, Copy)]
pub struct Symbol<'a> {
    pub name: &'a [u8],
    pub address: u64,
    /// The size in bytes; 0 if it is not known.
    pub size: u64,
    /// True if the symbol is code.
    pub function: bool,
    /// True if the loader calls a resolver to choose the function (`STT_GNU_IFUNC`).
    pub ifunc: bool,
}

impl<'a> Elf<'a> {
    /// Returns the symbol table and its strings; both are empty if the file is stripped.
    fn symbol_table(&self) -> (&'a [Sym64<LE>], &'a [u8]) {
        let Some(section) = self.section_of_type(elf::SHT_SYMTAB) else { return (&[], &[]) };
        let strings = self.sections.get(section.sh_link(LE) as usize);
        let strings = strings.and_then(|section| section.data(LE, self.data).ok()).unwrap_or_default();
        let bytes = section.data(LE, self.data).unwrap_or_default();
        (array(bytes), strings)
    }

    /// Returns whether the file has a symbol table.
    pub fn has_symbols(&self) -> bool {
        self.symbol_table().0.len() > 1
    }

    /// Returns whether the file has line numbers.
    pub fn has_debug_information(&self) -> bool {
        self.section_table().any(|(name, size)| name == b".debug_info" && size > 0)
    }

    /// Returns the defined symbols of both tables.
    pub fn symbols(&self) -> impl Iterator<Item = Symbol<'a>> + '_ {
        let (table, strings) = self.symbol_table();
        let own = table.iter().filter_map(move |symbol| {
            defined(symbol, string(strings, symbol.st_name.get(LE) as usize).unwrap_or_default())
        });
        let exported = self.dynamic.symbols.iter();
        own.chain(exported.filter_map(|symbol| defined(symbol, self.dynamic.name(symbol))))
    }

    /// Returns the addresses of the functions that other files call by name, without those of weak symbols.
    pub(crate) fn exported_functions(&self) -> impl Iterator<Item = u64> + '_ {
        let symbols = self.dynamic.symbols.iter().filter(|symbol| {
            let (binding, kind) = (symbol.st_info.0 >> 4, symbol.st_info.0 & 0xf);
            binding == elf::STB_GLOBAL.0
                && kind == elf::STT_FUNC.0
                && symbol.st_shndx.get(LE) != elf::SHN_UNDEF
        });
        symbols.map(|symbol| symbol.st_value.get(LE))
    }

    /// Returns the places of the pointers to functions that the loader calls before anything else (`DT_INIT_ARRAY`).
    pub(crate) fn initial_places(&self) -> impl Iterator<Item = u64> + use<'a> {
        const MOST: u64 = 1 << 16;
        let start = self.dynamic.value(elf::DT_INIT_ARRAY).unwrap_or(0);
        let count = self.dynamic.value(elf::DT_INIT_ARRAYSZ).unwrap_or(0) / 8;
        (0..count.min(MOST)).map(move |index| start.wrapping_add(index * 8))
    }

    /// Returns the symbols that libraries must provide: index and name.
    pub fn imports(&self) -> impl Iterator<Item = (usize, &'a [u8])> + '_ {
        let symbols = self.dynamic.symbols.iter().enumerate().skip(1);
        symbols
            .filter(|(_, symbol)| symbol.st_shndx.get(LE) == elf::SHN_UNDEF)
            .map(|(index, symbol)| (index, self.dynamic.name(symbol)))
    }

    /// Returns the hashes (`DT_GNU_HASH`) of the names that other files can use, sorted.
    pub fn exports(&self) -> Vec<u32> {
        let symbols = self.dynamic.symbols.iter().skip(1);
        let defined = symbols.filter(|symbol| {
            symbol.st_shndx.get(LE) != elf::SHN_UNDEF && symbol.st_info.0 >> 4 != elf::STB_LOCAL.0
        });
        let mut hashes: Vec<u32> = defined.map(|symbol| elf::gnu_hash(self.dynamic.name(symbol))).collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes
    }

    /// Returns the symbols that libraries must provide, because a relocation uses them and they are not weak: index,
    /// name, and whether the loader looks for the symbol before the program starts.
    pub fn required_symbols(&self) -> Vec<(usize, &'a [u8], bool)> {
        let used = |relocations: &[elf::Rela64<LE>]| {
            let mut used: Vec<u32> = relocations
                .iter()
                .map(|one| (one.r_info.get(LE) >> 32) as u32)
                .filter(|index| *index > 0)
                .collect();
            used.sort_unstable();
            used.dedup();
            used
        };
        let (early, late) = (used(self.dynamic.relocations), used(self.dynamic.plt_relocations));
        let now = self.dynamic.binds_now();
        let is_strong = |index: &usize| {
            self.dynamic.symbols.get(*index).is_some_and(|one| one.st_info.0 >> 4 == elf::STB_GLOBAL.0)
        };
        let imports = self.imports().filter(|(index, _)| is_strong(index));
        imports
            .filter_map(|(index, name)| {
                let has = |list: &[u32]| list.binary_search(&(index as u32)).is_ok();
                let in_plt = has(&late);
                let at_start = now || (has(&early) && !in_plt);
                (in_plt || has(&early)).then_some((index, name, at_start))
            })
            .collect()
    }
}

fn defined<'a>(symbol: &Sym64<LE>, name: &'a [u8]) -> Option<Symbol<'a>> {
    let kind = symbol.st_info.0 & 0xf;
    let ifunc = kind == elf::STT_GNU_IFUNC.0;
    let known = ifunc || [elf::STT_FUNC.0, elf::STT_OBJECT.0, elf::STT_NOTYPE.0].contains(&kind);
    if !known || symbol.st_shndx.get(LE) == elf::SHN_UNDEF || name.is_empty() {
        return None;
    }
    Some(Symbol {
        name,
        address: symbol.st_value.get(LE),
        size: symbol.st_size.get(LE),
        function: ifunc || kind == elf::STT_FUNC.0,
        ifunc,
    })
}
