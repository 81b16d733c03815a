//! Tells the instructions of A64 from the numbers that lie among them, and finds the places that the code names.

use super::a64::{Tracker, decode, flow, is_conditional, words};
use super::{Event, Flow, Mention};

/// The number of words on each side that must be instructions.
const AROUND: usize = 16;
const RET: u32 = 0xd65f_03c0;
const NOP: u32 = 0xd503_201f;

/// Reports calls, branches and computed addresses.
pub(super) fn mentions(code: &[u8], address: u64, mut mention: impl FnMut(u64, u64, Mention)) {
    let mut tracker = Tracker::default();
    for (at, word) in words(code) {
        let from = address.wrapping_add(at as u64);
        tracker.step(word, from, |event| match event {
            Event::Call { to, .. } => mention(from, to, Mention::Call),
            Event::Jump { to, .. } => mention(from, to, Mention::Branch),
            Event::Address(to) => mention(from, to, Mention::Address),
            _ => {}
        });
        if is_conditional(word)
            && let Flow::Branch(to) = flow(word, from)
        {
            mention(from, to, Mention::Branch);
        }
    }
}

fn word_at(code: &[u8], offset: usize) -> Option<u32> {
    words(code.get(offset..offset.checked_add(4)?)?).next().map(|(_, word)| word)
}

/// Returns whether control never continues behind a word.
fn ends(word: u32) -> bool {
    matches!(flow(word, 0), Flow::Jump(_) | Flow::Computed | Flow::End)
}

/// Returns whether a word is UDF, whose upper half is zero. It counts as a number.
fn is_number(word: u32) -> bool {
    word >> 16 == 0
}

/// Returns whether the words from `offset` to the end of the block are instructions.
fn goes_on(code: &[u8], offset: usize) -> bool {
    let mut before = None;
    for (_, word) in words(code.get(offset..).unwrap_or_default()).take(AROUND) {
        // A trap may follow a call that does not return.
        let traps = before.is_some_and(|before| matches!(flow(before, 0), Flow::Call(_)));
        if is_number(word) {
            return traps;
        }
        if decode(word).is_none() {
            return false;
        }
        if ends(word) {
            return true;
        }
        before = Some(word);
    }
    true
}

/// Returns whether the words before `offset`, back to the end of the block before, are instructions.
fn came_from(code: &[u8], start: usize, offset: usize) -> bool {
    const ALIGNED: usize = 16;
    let least = start.max(offset.saturating_sub(AROUND * 4));
    let before = code.get(least..offset).unwrap_or_default();
    for (at, word) in words(before).collect::<Vec<_>>().into_iter().rev() {
        if ends(word) && !is_number(word) {
            return true;
        }
        if word == 0 && (least + at + 4).is_multiple_of(ALIGNED) {
            return true;
        }
        if is_number(word) || decode(word).is_none() {
            return false;
        }
    }
    true
}

/// Returns whether the words around an offset are instructions. They are not if the offset is in a table of numbers or
/// in a text between functions. Zeros before an aligned address count as padding.
pub(super) fn is_amid_code(code: &[u8], start: usize, offset: usize) -> bool {
    goes_on(code, offset) && came_from(code, start, offset)
}

/// Returns whether a function may begin at an offset.
pub(super) fn may_begin(code: &[u8], offset: usize) -> bool {
    let before = offset.checked_sub(4).and_then(|before| word_at(code, before));
    let is_apart = before.is_none_or(|word| ends(word) || word == NOP || decode(word).is_none());
    offset.is_multiple_of(4)
        && is_apart
        && word_at(code, offset).is_some_and(|word| !is_number(word))
        && goes_on(code, offset)
}

/// Returns whether the function that contains an offset has only this instruction, a landing pad before it, and RET.
pub(super) fn is_alone(code: &[u8], start: usize, offset: usize) -> bool {
    const BTI_C: u32 = 0xd503_245f;
    let before = |at: usize| (at > start).then(|| word_at(code, at - 4)).flatten();
    let first = if before(offset) == Some(BTI_C) { offset - 4 } else { offset };
    let begins = before(first).is_none_or(|word| ends(word) || word == NOP);
    begins && word_at(code, offset + 4) == Some(RET)
}

/// Reports the constants that LDR (literal) and LDRSW (literal) load.
pub(super) fn literals(code: &[u8], mut literal: impl FnMut(usize, usize)) {
    for (at, word) in words(code) {
        let (kind, vector) = (word >> 30, word >> 26 & 1 == 1);
        if word & 0x3b00_0000 != 0x1800_0000 || kind == 3 {
            continue;
        }
        let size = match (kind, vector) {
            (0 | 2, false) => 4,
            (1, false) => 8,
            (kind, _) => 4 << kind,
        };
        let signed = (i64::from(word >> 5 & 0x7_ffff) << 45) >> 43;
        let place = (at as i64).checked_add(signed).and_then(|place| usize::try_from(place).ok());
        if let Some(place) = place {
            literal(place, size);
        }
    }
}

/// Returns whether the code extracts the bit of LSE (HWCAP_ATOMICS) and is too short to do more.
pub(super) fn asks_for_lse_only(code: &[u8]) -> bool {
    const LONGEST: usize = 96;
    const UBFX_8_1: [u32; 2] = [0xd348_2000, 0x5308_2000];
    code.len() <= LONGEST && words(code).any(|(_, word)| UBFX_8_1.contains(&(word & 0xffff_fc00)))
}
