//! x86-64, instruction by instruction. The decoder has a table of the CPUID bits that each instruction needs.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

use super::features::{Set, X86};
use super::{Event, Flow};

/// The features that each of the decoder's codes needs.
static NEEDS: LazyLock<Vec<Set>> = LazyLock::new(|| Code::values().map(of_code).collect());

fn of_code(code: Code) -> Set {
    // Compilers write `rep bsf` for any processor. Without BMI1, the prefix means nothing.
    if code.mnemonic() == Mnemonic::Tzcnt {
        return Set::NONE;
    }
    code.cpuid_features().iter().fold(Set::NONE, |set, feature| set | of_feature(*feature))
}

/// Returns the set for one of the decoder's features. The decoder's names are the names of the table in upper case.
fn of_feature(feature: CpuidFeature) -> Set {
    let name = format!("{feature:?}").to_ascii_lowercase();
    let name = if name == "d3nowext" { "d3now" } else { &name };
    X86.iter().position(|feature| feature.name == name).map_or(Set::NONE, Set::of)
}

fn decoder(code: &[u8], address: u64) -> Decoder<'_> {
    Decoder::with_ip(64, code, address, DecoderOptions::NONE)
}

/// Calls `hit` for each instruction of `code` that needs one of `wanted`, with its offset and all features that it
/// needs.
pub(super) fn scan(code: &[u8], wanted: Set, mut hit: impl FnMut(usize, Set)) {
    let needs = &*NEEDS;
    let mut decoder = decoder(code, 0);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        let need = needs[instruction.code() as usize] & wanted;
        if !need.is_empty() {
            hit(at, need);
        }
    }
}

/// Returns the mnemonic, for a message.
pub(super) fn mnemonic(code: &[u8]) -> String {
    format!("{:?}", decoder(code, 0).decode().mnemonic()).to_ascii_lowercase()
}

/// Decodes the instruction that `code` begins with. Returns its length, the features that it needs, and the flow of
/// control after it. Returns `None` if there is no instruction.
pub(super) fn step(code: &[u8], address: u64) -> Option<(usize, Set, Flow)> {
    let instruction = decoder(code, address).decode();
    if instruction.is_invalid() {
        return None;
    }
    let flow = match instruction.flow_control() {
        FlowControl::UnconditionalBranch => Flow::Jump(instruction.near_branch_target()),
        FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
            Flow::Branch(instruction.near_branch_target())
        }
        FlowControl::Call => Flow::Call(instruction.near_branch_target()),
        FlowControl::IndirectBranch => Flow::Computed,
        FlowControl::Return | FlowControl::Exception => Flow::End,
        FlowControl::Next | FlowControl::IndirectCall | FlowControl::Interrupt => Flow::Next,
    };
    Some((instruction.len(), NEEDS[instruction.code() as usize], flow))
}

/// Reports the events of each instruction of `code` to `event`, for the guard analysis.
pub(super) fn events(code: &[u8], address: u64, mut event: impl FnMut(u64, Event)) {
    let mut decoder = decoder(code, address);
    let mut instruction = Instruction::default();
    let mut argument = None;
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let at = instruction.ip();
        let (to, place) = (instruction.near_branch_target(), instruction.ip_rel_memory_address());
        match instruction.mnemonic() {
            Mnemonic::Cpuid | Mnemonic::Xgetbv => event(at, Event::Detects),
            Mnemonic::Mov
                if instruction.op_kind(0) == OpKind::Register
                    && [iced_x86::Register::EDI, iced_x86::Register::RDI]
                        .contains(&instruction.op0_register()) =>
            {
                argument = (instruction.op_kind(1) == OpKind::Immediate32).then(|| instruction.immediate32());
            }
            _ => {}
        }
        match instruction.flow_control() {
            FlowControl::Call => event(at, Event::Call { to, argument: argument.take() }),
            FlowControl::UnconditionalBranch => event(at, Event::Jump { to, argument: argument.take() }),
            FlowControl::IndirectCall | FlowControl::IndirectBranch
                if instruction.is_ip_rel_memory_operand() =>
            {
                event(at, Event::CallThrough { place, argument: argument.take() });
            }
            _ if instruction.is_ip_rel_memory_operand() => event(at, of_memory(&instruction, place)),
            _ => {}
        }
    }
}

fn of_memory(instruction: &Instruction, place: u64) -> Event {
    match instruction.mnemonic() {
        Mnemonic::Lea => Event::Address(place),
        Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt => Event::Tests(place),
        _ if instruction.op0_kind() == OpKind::Memory => Event::Store(place),
        _ => Event::Load(place),
    }
}

/// Returns the constants of all CMP instructions.
pub(super) fn comparisons(code: &[u8]) -> Vec<u64> {
    let decoded = decoder(code, 0).into_iter();
    let compares =
        decoded.filter(|instruction| instruction.mnemonic() == Mnemonic::Cmp && instruction.op_count() == 2);
    compares.filter_map(|instruction| instruction.try_immediate(1).ok()).collect()
}
