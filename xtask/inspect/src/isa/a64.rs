//! A64, word by word: the feature that an instruction belongs to, the target of a branch, and the addresses that the
//! code computes.

use std::sync::LazyLock;

use fARM64::{Decoder, DecoderOptions, Feature, Instruction, Mnemonic};

use super::a64_table::{BASE, LOADS, Row, SCALAR, SIMD, SVE2};
use super::features::{A64, Set};
use super::{Event, Flow};

/// A row of the table: mask, value, and the feature's index. `None` stands for Armv8.0.
type Indexed = (u32, u32, Option<usize>);

/// The rows, grouped by the four bits that the manual's first table decodes (C4.1, op0).
static GROUPS: LazyLock<[Vec<Indexed>; 16]> = LazyLock::new(|| {
    std::array::from_fn(|op0| {
        let rows: &[Row] = match op0 {
            0b1000 | 0b1001 | 0b1010 | 0b1011 | 0b0101 | 0b1101 => SCALAR,
            0b0100 | 0b0110 | 0b1100 | 0b1110 => LOADS,
            0b0111 | 0b1111 => SIMD,
            _ => &[],
        };
        let op0 = (op0 as u32) << 25;
        let fits = |(mask, value, _): &&Row| (value ^ op0) & mask & (0xf << 25) == 0;
        rows.iter().filter(fits).map(|(mask, value, name)| (*mask, *value, index(name))).collect()
    })
});

fn index(name: &str) -> Option<usize> {
    if name == BASE {
        return None;
    }
    let at = A64.iter().position(|feature| feature.name == name);
    Some(at.expect("each row names a known feature; a test checks that"))
}

/// Returns the feature that a word may need, by the table alone.
#[inline]
fn candidate(groups: &[Vec<Indexed>; 16], word: u32) -> Option<usize> {
    const SVE: usize = 17;
    const SME: usize = 41;
    // CNTD is not counted. libgcc's unwinder executes it only for frames whose description names the vector length,
    // and only SVE code has such frames.
    const UNWINDER: (u32, u32) = (0xffff_ffe0, 0x04e0_e3e0);
    let op0 = (word >> 25 & 0xf) as usize;
    match op0 {
        0b0010 if word & UNWINDER.0 == UNWINDER.1 => None,
        0b1100 if gives_memory_its_pointers_tag(word) => None,
        0b0010 => Some(SVE),
        0b0000 if word >> 31 == 1 => Some(SME),
        _ => groups[op0].iter().find(|(mask, value, _)| word & mask == *value).and_then(|row| row.2),
    }
}

/// Returns whether a word is STG or one of its variants, and stores a pointer's tag at that pointer: `stg x0, [x0]`. These
/// are not counted. LLVM's unwinder (libunwind, `stepWithDwarf`) executes them only for frames with the augmentation `G`,
/// and only code with tags on its stack has such frames. That code itself needs IRG, which makes a tag.
fn gives_memory_its_pointers_tag(word: u32) -> bool {
    let stores = word & 0xff20_0000 == 0xd920_0000 && word >> 10 & 3 != 0;
    stores && word & 31 == word >> 5 & 31
}

/// Decodes one word; `None` if the decoder knows no such instruction.
pub fn decode(word: u32) -> Option<Instruction> {
    let bytes = word.to_le_bytes();
    let instruction = Decoder::new(&bytes, 0, DecoderOptions::default()).decode();
    (instruction.mnemonic() != Mnemonic::Invalid).then_some(instruction)
}

/// Returns the feature that a word needs beyond Armv8.0; nothing if the decoder knows no such instruction.
pub fn need(word: u32) -> Set {
    confirm(word, candidate(&GROUPS, word))
}

#[inline]
fn confirm(word: u32, candidate: Option<usize>) -> Set {
    let Some(index) = candidate else { return Set::NONE };
    let Some(instruction) = decode(word) else { return Set::NONE };
    if A64[index].name != "sve" {
        return Set::of(index);
    }
    let newer = |name| Set::of(A64.iter().position(|feature| feature.name == name).unwrap_or(index));
    match instruction.code().feature() {
        Feature::Sme | Feature::Sme2 => newer("sme"),
        Feature::Sve if !SVE2.contains(instruction.mnemonic().name()) => Set::of(index),
        _ => newer("sve2"),
    }
}

/// Calls `hit` for each instruction of `code` that needs one of `wanted`, with its offset and all features that it
/// needs.
pub(super) fn scan(code: &[u8], wanted: Set, mut hit: impl FnMut(usize, Set)) {
    let groups = &*GROUPS;
    for (at, word) in words(code) {
        let need = confirm(word, candidate(groups, word)) & wanted;
        if !need.is_empty() {
            hit(at, need);
        }
    }
}

/// Decodes the instruction that `code` begins with. Returns its length, the features that it needs, and the flow of
/// control after it. Returns `None` if there is no instruction.
pub(super) fn step(code: &[u8], address: u64) -> Option<(usize, Set, Flow)> {
    let (_, word) = words(code).next()?;
    Some((4, need(word), flow(word, address)))
}

/// Returns the mnemonic, for a message.
pub(super) fn mnemonic(code: &[u8]) -> &'static str {
    let instruction = words(code).next().and_then(|(_, word)| decode(word));
    instruction.map_or("?", |instruction| instruction.mnemonic().name())
}

/// Returns a branch's offset in bytes. The field is signed and counts words.
fn offset(word: u32, low: u32, width: u32) -> i64 {
    let field = word >> low & ((1 << width) - 1);
    let shift = 64 - width;
    (i64::from(field) << shift) >> shift << 2
}

/// Returns whether a word is a branch with a condition: B.cond, CBZ, TBZ and their variants.
#[inline]
pub(super) fn is_conditional(word: u32) -> bool {
    word & 0xfe00_0000 == 0x5400_0000 || word & 0x7c00_0000 == 0x3400_0000
}

/// Returns where control goes after the word at `address`.
pub(super) fn flow(word: u32, address: u64) -> Flow {
    let to = |low, width| address.wrapping_add_signed(offset(word, low, width));
    if word & 0xfc00_0000 == 0x1400_0000 {
        Flow::Jump(to(0, 26))
    } else if word & 0xfc00_0000 == 0x9400_0000 {
        Flow::Call(to(0, 26))
    } else if word & 0xfe00_0000 == 0x5400_0000 || word & 0x7e00_0000 == 0x3400_0000 {
        Flow::Branch(to(5, 19))
    } else if word & 0x7e00_0000 == 0x3600_0000 {
        Flow::Branch(to(5, 14))
    } else if word & 0xfe00_0000 == 0xd600_0000 {
        // Control returns here after BLR and its variants, but not after BR, RET and their variants.
        match word >> 21 & 3 {
            1 => Flow::Next,
            0 => Flow::Computed,
            _ => Flow::End,
        }
    } else if word & 0xffff_0000 == 0 || word & 0xffe0_001f == 0xd420_0000 {
        Flow::End
    } else {
        Flow::Next
    }
}

/// Returns the constants of all CMP instructions (SUBS with an immediate and the zero register).
pub(super) fn comparisons(code: &[u8]) -> Vec<u64> {
    let compares = words(code).map(|(_, word)| word).filter(|word| word & 0x7f80_001f == 0x7100_001f);
    compares.map(|word| u64::from(word >> 10 & 0xfff) << if word >> 22 & 1 == 1 { 12 } else { 0 }).collect()
}

/// The registers whose value is known on a straight path: pages that ADRP computes, and sums with them. The code is
/// decoded at some nanoseconds a word, so that the state is kept in bits.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    values: [u64; 32],
    /// A bit for each register with a known value.
    known: u32,
    /// The address from which a register was loaded, and the number of the word that loaded it.
    loaded: [(u64, u32); 32],
    /// A bit for each register that was loaded from a known address.
    from_memory: u32,
    /// The number of words so far.
    count: u32,
    first_argument: Option<u32>,
}

impl Tracker {
    fn value(&self, register: usize) -> Option<u64> {
        (self.known >> register & 1 == 1).then(|| self.values[register])
    }

    /// Records that a register is written, and the value if it is known.
    fn write(&mut self, register: usize, value: Option<u64>) {
        self.forget(register);
        self.from_memory &= !(1 << register);
        if let Some(value) = value {
            self.known |= 1 << register;
            self.values[register] = value;
        }
    }

    /// Records that a register no longer has a known value. It may still depend on a place in memory.
    fn forget(&mut self, register: usize) {
        self.known &= !(1 << register);
    }

    /// Reports the events of the word at `address` to `event`, for the guard analysis.
    #[inline]
    pub(super) fn step(&mut self, word: u32, address: u64, mut event: impl FnMut(Event)) {
        let (d, n) = ((word & 31) as usize, (word >> 5 & 31) as usize);
        self.count = self.count.wrapping_add(1);
        if word & 0x9f00_0000 == 0x9000_0000 || word & 0x9f00_0000 == 0x1000_0000 {
            let value = adr(word, address);
            self.write(d, Some(value));
            let page = word >> 31 == 1;
            if !page {
                event(Event::Address(value));
            }
        } else if word & 0x7f80_0000 == 0x1100_0000 {
            let shift = if word >> 22 & 1 == 1 { 12 } else { 0 };
            let value = self.value(n).map(|page| page.wrapping_add(u64::from(word >> 10 & 0xfff) << shift));
            self.write(d, value);
            if let Some(value) = value {
                event(Event::Address(value));
            }
        } else if word & 0xffe0_fc00 == 0x8b00_0000 {
            // ADD of two registers.
            let other = self.value((word >> 16 & 31) as usize);
            let value = self.value(n).zip(other).map(|(one, other)| one.wrapping_add(other));
            self.write(d, value);
            if let Some(value) = value {
                event(Event::Address(value));
            }
        } else if word & 0x3b00_0000 == 0x3900_0000 {
            self.load_or_store(word, d, n, &mut event);
        } else if word & 0xff80_0000 == 0x5280_0000 || word & 0xff80_0000 == 0xd280_0000 {
            self.write(d, None);
            if d == 0 {
                self.first_argument = Some(word >> 5 & 0xffff);
            }
        } else if word & 0xfff0_0000 == 0xd530_0000 {
            // MRS reads an identification register: S3_0_C0_Cm_op2.
            if word & 0x000f_f000 == 0x0008_0000 {
                event(Event::Detects);
            }
            self.forget(d);
        } else {
            self.branch_or_other(word, address, d, &mut event);
        }
    }

    /// Handles a load or a store of a register at a base register plus an unsigned offset.
    fn load_or_store(&mut self, word: u32, d: usize, n: usize, event: &mut impl FnMut(Event)) {
        let vector = word >> 26 & 1 == 1;
        let scale = word >> 30;
        let place = self.value(n).map(|page| page.wrapping_add(u64::from(word >> 10 & 0xfff) << scale));
        let stores = word >> 22 & 3 == 0;
        if !vector && !stores {
            self.write(d, None);
            if let Some(place) = place {
                self.from_memory |= 1 << d;
                self.loaded[d] = (place, self.count);
            }
            if d == 0 {
                self.first_argument = None;
            }
        }
        if let Some(place) = place.filter(|_| !vector) {
            event(if stores { Event::Store(place) } else { Event::Load(place) });
        }
    }

    fn branch_or_other(&mut self, word: u32, address: u64, d: usize, event: &mut impl FnMut(Event)) {
        const NEAR: u32 = 4;
        /// Calls preserve only x19 to x28 (AAPCS64, 6.1.1).
        const PRESERVED: u32 = 0x1ff8_0000;
        let tests = word & 0x7c00_0000 == 0x3400_0000;
        if tests && self.from_memory >> d & 1 == 1 {
            let (place, since) = self.loaded[d];
            if self.count.wrapping_sub(since) <= NEAR {
                event(Event::Tests(place));
            }
        }
        match flow(word, address) {
            Flow::Call(to) => {
                event(Event::Call { to, argument: self.first_argument });
                self.known &= PRESERVED;
                self.from_memory &= PRESERVED;
                self.first_argument = None;
            }
            Flow::Jump(to) => event(Event::Jump { to, argument: self.first_argument }),
            Flow::Next if !tests => {
                // Any other instruction may write the register, whose value is then unknown.
                self.forget(d);
                if d == 0 {
                    self.first_argument = None;
                }
            }
            Flow::Next | Flow::Branch(_) | Flow::Computed | Flow::End => {}
        }
    }
}

/// Decodes a function one instruction at a time, and calls `event` with the address and each [`Event`] of the
/// instruction. The analysis in [`crate::guard`] uses these events.
pub(super) fn events(code: &[u8], address: u64, mut event: impl FnMut(u64, Event)) {
    let mut tracker = Tracker::default();
    let leaves = |to: u64| to.wrapping_sub(address) >= code.len() as u64;
    for (offset, word) in words(code) {
        let at = address.wrapping_add(offset as u64);
        match literal(code, offset, word) {
            Some((register, value)) => tracker.write(register, Some(value)),
            None => tracker.step(word, at, |found| event(at, found)),
        }
        if is_conditional(word)
            && let Flow::Branch(to) = flow(word, at)
            && leaves(to)
        {
            event(at, Event::Jump { to, argument: None });
        }
    }
}

/// Returns the register and the value of LDR (literal) of 64 bits. OpenSSL's assembly keeps the distance to a variable in
/// such a constant.
fn literal(code: &[u8], at: usize, word: u32) -> Option<(usize, u64)> {
    if word & 0xff00_0000 != 0x5800_0000 {
        return None;
    }
    let place = usize::try_from((at as i64).checked_add(offset(word, 5, 19))?).ok()?;
    let value = code.get(place..place.checked_add(8)?)?;
    Some(((word & 31) as usize, u64::from_le_bytes(value.try_into().ok()?)))
}

pub(super) fn words(code: &[u8]) -> impl Iterator<Item = (usize, u32)> {
    let words =
        code.chunks_exact(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    words.enumerate().map(|(index, word)| (index * 4, word))
}

fn adr(word: u32, address: u64) -> u64 {
    let immediate = (word >> 5 & 0x7_ffff) << 2 | word >> 29 & 3;
    let signed = (i64::from(immediate) << 43) >> 43;
    if word >> 31 == 1 {
        (address & !0xfff).wrapping_add_signed(signed << 12)
    } else {
        address.wrapping_add_signed(signed)
    }
}
