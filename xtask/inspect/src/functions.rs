//! The functions of one range of code, and which of them have instructions that the target's core lacks.

use std::ops::Range;

use crate::elf::{Code, Elf, GoFunctions};
use crate::isa::features::Set;
use crate::isa::{Flow, Isa};

/// Returns the addresses at which functions begin in the whole file, in order. They come from symbols, from the
/// unwinder's table, from Go's table, and from the entry point. The bytes between the known end of a function and the next
/// start are a function of their own, because calls and data in them say nothing about the function before.
pub(crate) fn starts(elf: &Elf<'_>) -> Vec<u64> {
    /// The largest padding before a function.
    const PADDING: u64 = 64;
    let mut starts: Vec<u64> = elf.unwind_starts().collect();
    starts.extend(GoFunctions::of(elf).iter().flat_map(GoFunctions::starts));
    let mut ends: Vec<u64> = starts.iter().filter_map(|start| elf.frame_end(*start)).collect();
    for symbol in elf.symbols().filter(|symbol| symbol.function) {
        starts.push(symbol.address);
        ends.extend(Some(symbol.address.wrapping_add(symbol.size)).filter(|_| symbol.size > 0));
    }
    starts.push(elf.entry());
    starts.sort_unstable();
    starts.dedup();
    ends.retain(|end| {
        let next = starts.get(starts.partition_point(|start| start < end));
        next.is_none_or(|next| next - end > PADDING)
    });
    starts.extend(ends);
    starts.sort_unstable();
    starts.dedup();
    starts
}

/// The starts of functions. A function ends where the next one begins. A start takes four bytes here, and more in any
/// table of the file that names a function, so this list is smaller than the file.
#[derive(Debug)]
pub(crate) struct Functions {
    base: u64,
    length: u32,
    starts: Vec<u32>,
}

impl Functions {
    /// Selects the functions of `code` from the result of [`starts`].
    pub(crate) fn of(starts: &[u64], code: &Code<'_>) -> Option<Self> {
        let length = u32::try_from(code.bytes.len()).ok()?;
        let first = starts.partition_point(|start| *start <= code.address);
        let inside = starts.get(first..)?.iter().map_while(|start| {
            let offset = u32::try_from(start - code.address).ok();
            offset.filter(|offset| *offset < length)
        });
        let starts = std::iter::once(0).chain(inside).collect();
        Some(Self { base: code.address, length, starts })
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Returns the function that contains an offset.
    pub(crate) fn holding(&self, offset: u32) -> usize {
        self.starts.partition_point(|start| *start <= offset).saturating_sub(1)
    }

    /// Returns the function that contains an address.
    pub(crate) fn at(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.base)?;
        let offset = u32::try_from(offset).ok().filter(|offset| *offset < self.length)?;
        Some(self.holding(offset))
    }

    /// Returns the function that begins at an address.
    pub(crate) fn beginning_at(&self, address: u64) -> Option<usize> {
        let offset = u32::try_from(address.checked_sub(self.base)?).ok()?;
        self.starts.binary_search(&offset).ok()
    }

    /// Returns the offsets of a function's first byte and of the byte behind its last one.
    pub(crate) fn range(&self, index: usize) -> (usize, usize) {
        let start = self.starts.get(index).copied().unwrap_or(self.length);
        let end = self.starts.get(index + 1).copied().unwrap_or(self.length);
        (start as usize, end as usize)
    }
}

/// A range of code with its functions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section<'a, 'b> {
    pub(crate) isa: Isa,
    pub(crate) elf: &'b Elf<'a>,
    pub(crate) code: &'b Code<'a>,
    pub(crate) functions: &'b Functions,
}

/// A function with instructions that the core lacks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needy {
    /// The function's index.
    pub(crate) function: u32,
    /// The number of instructions that the core lacks.
    pub(crate) count: u32,
    /// The offset in the code of the first instruction that the core lacks.
    pub(crate) first: u32,
    /// The features that the instructions need.
    pub(crate) needs: Set,
}

/// Returns every function of a section that needs one of `wanted`, in order. The list is limited to a share of the
/// file's size. The second value is the number of instructions in functions that did not fit into the list.
pub(crate) fn needy(section: &Section<'_, '_>, wanted: Set) -> (Vec<Needy>, usize) {
    const WORKERS: usize = 2;
    const SHARE: usize = 128;
    const WORTH_A_THREAD: usize = 1 << 19;
    let (functions, length) = (section.functions, section.code.bytes.len());
    let most = (length / SHARE).max(64);
    if length < WORTH_A_THREAD {
        return part(section, wanted, 0..length, most);
    }
    // Cut the code where a function begins, because x86 instructions must be read from their first byte.
    let middle = functions.range(functions.holding(functions.length / WORKERS as u32)).0;
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| part(section, wanted, middle..length, most / 2));
        let one = part(section, wanted, 0..middle, most / 2);
        (one, other.join().expect("the scan does not panic"))
    });
    let (mut all, mut left) = one;
    left += other.1;
    all.extend(other.0);
    (all, left)
}

fn part(section: &Section<'_, '_>, wanted: Set, range: Range<usize>, most: usize) -> (Vec<Needy>, usize) {
    let functions = section.functions;
    let mut found: Vec<Needy> = Vec::new();
    let mut left = 0;
    let mut current: Option<(usize, usize)> = None;
    let start = range.start;
    section.isa.scan(&section.code.bytes[range], wanted, |offset, needs| {
        let offset = start + offset;
        if let Some((_, end)) = current
            && offset < end
            && let Some(last) = found.last_mut()
        {
            last.count += 1;
            last.needs = last.needs | needs;
            return;
        }
        let function = functions.holding(offset as u32);
        if found.len() >= most {
            left += 1;
            return;
        }
        current = Some(functions.range(function));
        found.push(Needy { function: function as u32, count: 1, first: offset as u32, needs });
    });
    (found, left)
}

/// Returns the instructions in a part of a function that need one of `wanted` and that `counts` accepts by their offset.
/// Returns `None` if there are none.
pub(crate) fn needy_within(
    section: &Section<'_, '_>,
    wanted: Set,
    range: Range<usize>,
    counts: impl Fn(usize) -> bool,
) -> Option<Needy> {
    let mut found: Option<Needy> = None;
    let function = section.functions.holding(range.start as u32) as u32;
    section.isa.scan(section.code.bytes.get(range.clone())?, wanted, |offset, needs| {
        let first = range.start + offset;
        if counts(first) {
            let one = Needy { function, count: 0, first: first as u32, needs };
            let all = found.get_or_insert(one);
            all.count += 1;
            all.needs = all.needs | needs;
        }
    });
    found
}

/// The path on which control gets from the start of a function to an instruction that the core lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Control goes from the function's first instruction to the one at this offset, by falling through and by direct
    /// branches.
    Direct(usize),
    /// There is no direct path, but the function has computed jumps.
    Computed,
    /// No path in this function leads to such an instruction.
    None,
}

/// Finds the first instruction that needs one of `wanted` among the instructions that control reaches from the start
/// of the function by falling through and by direct branches. Bytes behind a computed jump or between functions may be
/// data, and so may bytes behind a call that does not return. An offset that `counts` does not accept is data.
pub(crate) fn reached(
    section: &Section<'_, '_>,
    function: usize,
    wanted: Set,
    counts: &dyn Fn(usize) -> bool,
) -> Path {
    const LARGEST: usize = 1 << 20;
    let (isa, code, range) = (section.isa, section.code, section.functions.range(function));
    let Some(bytes) = code.bytes.get(range.0..range.1.min(range.0 + LARGEST)) else { return Path::Computed };
    let mut computed = range.1 - range.0 > LARGEST;
    let base = code.address + range.0 as u64;
    let mut seen = vec![0u64; bytes.len() / 64 + 1];
    let most = bytes.len() / 16;
    let mut pending = vec![0u32];
    while let Some(at) = pending.pop() {
        let mut at = at as usize;
        while at < bytes.len() && seen[at / 64] >> (at % 64) & 1 == 0 {
            seen[at / 64] |= 1 << (at % 64);
            let Some((length, needs, flow)) = isa.step(&bytes[at..], base + at as u64) else { break };
            if !(needs & wanted).is_empty() {
                if counts(range.0 + at) {
                    return Path::Direct(range.0 + at);
                }
                break;
            }
            let within = |to: u64| {
                to.checked_sub(base).and_then(|to| usize::try_from(to).ok()).filter(|to| *to < bytes.len())
            };
            match flow {
                Flow::Next | Flow::Call(_) => at += length,
                Flow::Branch(to) => {
                    let fresh = within(to).filter(|to| seen[to / 64] >> (to % 64) & 1 == 0);
                    pending.extend(fresh.filter(|_| pending.len() < most).map(|to| to as u32));
                    at += length;
                }
                Flow::Jump(to) => match within(to) {
                    Some(to) => at = to,
                    None => break,
                },
                Flow::Computed => {
                    computed = true;
                    break;
                }
                Flow::End => break,
            }
        }
    }
    if computed { Path::Computed } else { Path::None }
}
