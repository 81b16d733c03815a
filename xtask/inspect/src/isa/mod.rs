//! The two instruction sets behind one face.

pub mod a64;
mod a64_table;
pub mod features;
mod x86;

use features::{Feature, Set};
use serde::{Deserialize, Serialize};

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// 64-bit Arm.
    Aarch64,
    /// 64-bit x86.
    #[serde(rename = "x86_64")]
    X86_64,
}

/// Where control goes after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    Jump(u64),
    Branch(u64),
    Call(u64),
    /// To an address in a register: a table of places, or another function.
    Computed,
    End,
}

/// What an instruction does that matters to who guards what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A direct call, with the first argument where it is a constant.
    Call { to: u64, argument: Option<u32> },
    /// A direct jump; out of its function, it is a call.
    Jump { to: u64, argument: Option<u32> },
    /// A call through a pointer at a known place.
    CallThrough { place: u64, argument: Option<u32> },
    /// An address is made.
    Address(u64),
    /// A value at a known place is read.
    Load(u64),
    /// A value at a known place is written.
    Store(u64),
    /// A value at a known place decides over a branch.
    Tests(u64),
    /// The processor is asked what it is.
    Detects,
}

impl Isa {
    /// The ELF `e_machine` (gABI).
    pub fn elf_machine(self) -> u16 {
        match self {
            Self::Aarch64 => 183,
            Self::X86_64 => 62,
        }
    }

    /// Its features.
    pub fn features(self) -> &'static [Feature] {
        match self {
            Self::Aarch64 => &features::A64,
            Self::X86_64 => &features::X86,
        }
    }

    /// The feature of this name.
    pub fn feature(self, name: &str) -> Option<Set> {
        self.features().iter().position(|feature| feature.name == name).map(Set::of)
    }

    /// Every instruction of `code` that needs one of `wanted`: offset and needs.
    pub(crate) fn scan(self, code: &[u8], wanted: Set, hit: impl FnMut(usize, Set)) {
        match self {
            Self::Aarch64 => a64::scan(code, wanted, hit),
            Self::X86_64 => x86::scan(code, wanted, hit),
        }
    }

    /// The instruction that `code` begins with.
    pub(crate) fn step(self, code: &[u8], address: u64) -> Option<(usize, Set, Flow)> {
        match self {
            Self::Aarch64 => a64::step(code, address),
            Self::X86_64 => x86::step(code, address),
        }
    }

    /// Whether what surrounds an offset of `code` is code too, and no table or text among it.
    pub(crate) fn is_amid_code(self, code: &[u8], offset: usize) -> bool {
        match self {
            Self::Aarch64 => a64::is_amid_code(code, offset),
            // Any bytes are instructions of some kind.
            Self::X86_64 => true,
        }
    }

    /// The name of the instruction that `code` begins with.
    pub fn mnemonic(self, code: &[u8]) -> String {
        match self {
            Self::Aarch64 => a64::mnemonic(code).to_owned(),
            Self::X86_64 => x86::mnemonic(code),
        }
    }

    /// The constants that `code` compares registers with, in order.
    pub(crate) fn comparisons(self, code: &[u8]) -> Vec<u64> {
        match self {
            Self::Aarch64 => a64::comparisons(code),
            Self::X86_64 => x86::comparisons(code),
        }
    }

    /// What each instruction of a function does that matters to who guards what.
    pub(crate) fn events(self, code: &[u8], address: u64, event: impl FnMut(u64, Event)) {
        match self {
            Self::Aarch64 => a64::events(code, address, event),
            Self::X86_64 => x86::events(code, address, event),
        }
    }
}
