//! One interface for the two instruction sets.

pub mod a64;
mod a64_table;
mod data;
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

/// The flow of control after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    Jump(u64),
    Branch(u64),
    Call(u64),
    /// Control goes to an address in a register: a table of jump targets, or another function.
    Computed,
    End,
}

/// The way in which an instruction names an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mention {
    Call,
    /// A jump, with or without a condition.
    Branch,
    /// The code computes the address.
    Address,
}

/// An event in the code, for the guard analysis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A direct call, with the first argument if that is a constant.
    Call { to: u64, argument: Option<u32> },
    /// A direct jump. A jump that leaves its function is a call.
    Jump { to: u64, argument: Option<u32> },
    /// A call through a pointer at a known place.
    CallThrough { place: u64, argument: Option<u32> },
    /// The code computes an address.
    Address(u64),
    /// The code reads a value at a known place.
    Load(u64),
    /// The code writes a value at a known place.
    Store(u64),
    /// A branch depends on a value at a known place.
    Tests(u64),
    /// The code asks the processor for its features.
    Detects,
}

impl Isa {
    /// Returns the ELF `e_machine` (gABI).
    pub fn elf_machine(self) -> u16 {
        match self {
            Self::Aarch64 => 183,
            Self::X86_64 => 62,
        }
    }

    /// Returns the features of this instruction set.
    pub fn features(self) -> &'static [Feature] {
        match self {
            Self::Aarch64 => &features::A64,
            Self::X86_64 => &features::X86,
        }
    }

    /// Returns a set that contains only the feature `name`; `None` if this instruction set has no such feature.
    pub fn feature(self, name: &str) -> Option<Set> {
        self.features().iter().position(|feature| feature.name == name).map(Set::of)
    }

    /// Calls `hit` for each instruction of `code` that needs one of `wanted`, with its offset and all features that it
    /// needs.
    pub(crate) fn scan(self, code: &[u8], wanted: Set, hit: impl FnMut(usize, Set)) {
        match self {
            Self::Aarch64 => a64::scan(code, wanted, hit),
            Self::X86_64 => x86::scan(code, wanted, hit),
        }
    }

    /// Decodes the instruction that `code` begins with. Returns its length, the features that it needs, and the flow of
    /// control after it.
    pub(crate) fn step(self, code: &[u8], address: u64) -> Option<(usize, Set, Flow)> {
        match self {
            Self::Aarch64 => a64::step(code, address),
            Self::X86_64 => x86::step(code, address),
        }
    }

    /// Calls `mention` for each place of `code` that names another one: with the address of the instruction, the address
    /// that it names, and the way in which it does.
    pub(crate) fn mentions(self, code: &[u8], address: u64, mention: impl FnMut(u64, u64, Mention)) {
        match self {
            Self::Aarch64 => data::mentions(code, address, mention),
            // On x86, the bytes of a call also occur inside of other instructions, and a list of targets would be wrong.
            Self::X86_64 => {}
        }
    }

    /// Returns whether the bytes around an offset of `code` are instructions, and not a table or a text. The function that
    /// contains them begins at `start`.
    pub(crate) fn is_amid_code(self, code: &[u8], start: usize, offset: usize) -> bool {
        match self {
            Self::Aarch64 => data::is_amid_code(code, start, offset),
            // On x86, any bytes can be decoded as instructions of some kind.
            Self::X86_64 => true,
        }
    }

    /// Returns whether a function may begin at an offset of `code`: control does not come there from the instruction
    /// before, and what follows are instructions.
    pub(crate) fn may_begin(self, code: &[u8], offset: usize) -> bool {
        match self {
            Self::Aarch64 => data::may_begin(code, offset),
            Self::X86_64 => false,
        }
    }

    /// Returns whether a function consists of the instruction at an offset of `code` and a return.
    pub(crate) fn is_alone(self, code: &[u8], start: usize, offset: usize) -> bool {
        match self {
            Self::Aarch64 => data::is_alone(code, start, offset),
            Self::X86_64 => false,
        }
    }

    /// Calls `literal` with the offset and the size of each constant that an instruction of `code` loads from among the
    /// code.
    pub(crate) fn literals(self, code: &[u8], literal: impl FnMut(usize, usize)) {
        match self {
            Self::Aarch64 => data::literals(code, literal),
            Self::X86_64 => {}
        }
    }

    /// Returns whether a function that asks the processor reads only whether there are LSE atomics. libgcc and
    /// compiler-rt have such a function, which is linked into most files.
    pub(crate) fn asks_for_lse_only(self, code: &[u8]) -> bool {
        match self {
            Self::Aarch64 => data::asks_for_lse_only(code),
            Self::X86_64 => false,
        }
    }

    /// Returns the name of the instruction that `code` begins with.
    pub fn mnemonic(self, code: &[u8]) -> String {
        match self {
            Self::Aarch64 => a64::mnemonic(code).to_owned(),
            Self::X86_64 => x86::mnemonic(code),
        }
    }

    /// Returns the constants with which `code` compares registers, in order.
    pub(crate) fn comparisons(self, code: &[u8]) -> Vec<u64> {
        match self {
            Self::Aarch64 => a64::comparisons(code),
            Self::X86_64 => x86::comparisons(code),
        }
    }

    /// Reports the events of a function's instructions to `event`, for the guard analysis.
    pub(crate) fn events(self, code: &[u8], address: u64, event: impl FnMut(u64, Event)) {
        match self {
            Self::Aarch64 => a64::events(code, address, event),
            Self::X86_64 => x86::events(code, address, event),
        }
    }
}
