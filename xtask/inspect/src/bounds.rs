//! The starts of functions that no table of the file has, and the numbers among the code. In a stripped file, assembly may
//! have neither symbols nor records for the unwinder. It then seems to be part of the function before it, and no path from
//! the start of that function leads to it.

use std::ops::Range;

use crate::elf::Elf;
use crate::functions::{Needy, Path, Section, reached};
use crate::isa::Mention;
use crate::isa::features::Set;

/// The numbers that the code of one function loads from among the code, as sorted pairs of offset and size.
#[derive(Debug, Default)]
pub(crate) struct Literals(Vec<(usize, usize)>);

impl Literals {
    pub(crate) fn of(section: &Section<'_, '_>, function: usize) -> Self {
        let (start, end) = section.functions.range(function);
        let mut all = Vec::new();
        let body = section.code.bytes.get(start..end).unwrap_or_default();
        section.isa.literals(body, |place, size| all.push((start + place, size)));
        all.sort_unstable();
        Self(all)
    }

    /// Returns whether an offset is in one of the numbers.
    pub(crate) fn hold(&self, offset: usize) -> bool {
        const LARGEST: usize = 16;
        let behind = self.0.partition_point(|(place, _)| *place <= offset);
        let near = self.0[..behind].iter().rev().take_while(|(place, _)| offset - place < LARGEST);
        near.into_iter().any(|(place, size)| offset - place < *size)
    }
}

/// The ranges of functions with instructions to which no path leads from the start of the function.
struct Doubtful<'a, 'b> {
    section: &'b Section<'a, 'b>,
    ranges: Vec<(usize, usize)>,
}

impl Doubtful<'_, '_> {
    /// Returns the offset of an address, and the range that contains it. The first address of a range is known as a start.
    fn holds(&self, address: u64) -> Option<(usize, (usize, usize))> {
        let offset = usize::try_from(address.checked_sub(self.section.code.address)?).ok()?;
        let behind = self.ranges.partition_point(|(start, _)| *start < offset);
        let range = *self.ranges.get(behind.checked_sub(1)?)?;
        (offset < range.1).then_some((offset, range))
    }

    /// Returns whether a pointer to an address is one to the start of a function.
    fn may_begin(&self, address: u64) -> bool {
        let Section { isa, code, .. } = *self.section;
        self.holds(address).is_some_and(|(offset, _)| isa.may_begin(code.bytes, offset))
    }

    /// Returns whether the instruction at `from` shows that a function begins at `to`.
    fn is_shown(&self, from: u64, to: u64, how: Mention) -> bool {
        let Some((_, (start, end))) = self.holds(to) else { return false };
        let Section { isa, code, functions, .. } = *self.section;
        let from = (from - code.address) as usize;
        let from_outside = || !(start..end).contains(&from);
        // Numbers among the code can be decoded as calls.
        let is_code =
            || isa.is_amid_code(code.bytes, functions.range(functions.holding(from as u32)).0, from);
        match how {
            Mention::Call => is_code(),
            Mention::Branch => from_outside() && is_code(),
            Mention::Address => from_outside() && self.may_begin(to),
        }
    }
}

/// Returns the addresses at which functions begin inside of the given functions, in order: the targets of calls, of branches
/// from other functions, and of pointers.
pub(crate) fn entered_inside(section: &Section<'_, '_>, found: &[Needy], wanted: Set) -> Vec<u64> {
    let Section { isa, elf, code, functions } = *section;
    let unreached = |needy: &&Needy| {
        !matches!(reached(section, needy.function as usize, wanted, &|_| true), Path::Direct(_))
    };
    let ranges: Vec<_> =
        found.iter().filter(unreached).map(|needy| functions.range(needy.function as usize)).collect();
    if ranges.is_empty() {
        return Vec::new();
    }
    let doubtful = Doubtful { section, ranges };
    let most = code.bytes.len() / 64 + 64;
    let shown = |part: Range<usize>| {
        let mut shown = Vec::new();
        isa.mentions(&code.bytes[part.clone()], code.address + part.start as u64, |from, to, how| {
            if shown.len() < most / 2 && doubtful.is_shown(from, to, how) {
                shown.push(to);
            }
        });
        shown
    };
    // Both cores of a small machine read one half each.
    let middle = functions.range(functions.holding((code.bytes.len() / 2) as u32)).0;
    let mut inside = std::thread::scope(|scope| {
        let second = scope.spawn(|| shown(middle..code.bytes.len()));
        let mut all = shown(0..middle);
        all.extend(second.join().expect("decoding does not panic"));
        all
    });
    pointers(elf, |to| {
        if inside.len() < most && doubtful.may_begin(to) {
            inside.push(to);
        }
    });
    inside.sort_unstable();
    inside.dedup();
    inside
}

/// Calls `pointer` for each value in the file's data that the loader makes an address of, or that may be an address.
fn pointers(elf: &Elf<'_>, mut pointer: impl FnMut(u64)) {
    for relocation in elf.dynamic.relocations {
        pointer(relocation.r_addend.get(object::LittleEndian) as u64);
    }
    // Executables at a fixed address have no relocations, and packed ones keep the value in its place.
    for load in elf.loads().filter(|load| !load.executable()) {
        let (words, _) = elf.loaded(load).unwrap_or_default().as_chunks::<8>();
        words.iter().for_each(|word| pointer(u64::from_le_bytes(*word)));
    }
}
