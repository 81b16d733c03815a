//! Tests which functions count as chosen at run time although no check can be seen, and what counts as code.

use inspect::finding::Severity;

use crate::made::{CNTB, Made, NOP, RET, WORK, call, function};

/// `mrs x0, id_aa64pfr0_el1`, which asks the processor.
const MRS: u32 = 0xd538_0400;

/// Compilers put constants behind the functions that load them.
#[test]
fn a_number_that_the_code_loads_is_no_instruction() {
    let load_behind = |words: u32| 0x5c00_0000 | words << 5;
    for (load, severity) in [(load_behind(2), Severity::Informs), (NOP, Severity::Warned)] {
        let made = Made::of(&[
            function(&[RET]),
            function(&[RET]),
            function(&[load, RET, CNTB, NOP]),
            function(&[RET]),
        ]);
        assert_eq!(made.worst(), severity, "{load:#x}");
    }
}

/// Numbers may follow a call that does not return. Nothing in the code shows that it does not.
#[test]
fn numbers_behind_a_call_are_no_code() {
    for (number, severity) in [(0x0000_808a, Severity::Informs), (NOP, Severity::Refused)] {
        let made = Made::of(&[function(&[call(1), CNTB, number, RET]), function(&[RET])]);
        assert_eq!(made.worst(), severity, "{number:#x}");
    }
}

/// The number before the hidden function would otherwise show that there is no code.
#[test]
fn a_pointer_in_the_data_shows_where_a_function_begins() {
    let made = || {
        let hidden = function(&[RET, NOP, NOP, 0x0000_808a]);
        let functions = [function(&[RET]), function(&[RET]), hidden, function(&WORK), function(&[RET])];
        Made::of(&functions).without_frames(3..4)
    };
    assert_eq!(made().worst(), Severity::Informs);
    assert_eq!(made().pointing_to(3).worst(), Severity::Warned);
}

/// Such functions are probes, which are executed to find out whether there is a signal, and helpers of code that was chosen.
#[test]
fn a_function_of_a_single_instruction_is_not_warned_of() {
    for (next, severity) in [(RET, Severity::Informs), (NOP, Severity::Warned)] {
        let made = Made::of(&[function(&[RET]), function(&[RET]), function(&[CNTB, next, RET])]);
        assert_eq!(made.into_library().worst(), severity, "{next:#x}");
    }
}

/// The bytes behind the known end of a function are not a part of it, so what they call is not called by the function.
#[test]
fn code_behind_the_end_of_a_function_is_not_its_own() {
    const HIDDEN: usize = 6;
    let start = [function(&[call(1), RET]), function(&[RET])];
    let hidden = (0..HIDDEN).map(|at| function(&[call(HIDDEN - at), RET]));
    let functions: Vec<_> =
        start.into_iter().chain(hidden).chain([function(&WORK), function(&[RET])]).collect();
    let made = Made::of(&functions).without_frames(2..2 + HIDDEN);
    assert_eq!(made.worst(), Severity::Warned);
}

/// Returns a library in which `first` is the first function, and `last` is a function that nothing calls.
fn large_library(count: usize, first: &[u32], last: &[u32]) -> Made {
    let mut functions = vec![function(&[RET]); count];
    functions[0] = function(first);
    functions[count - 2] = function(last);
    Made::of(&functions).without_question().into_library()
}

#[test]
fn a_program_that_asks_chooses_among_pointers() {
    /// `ldapur w0, [x0]`, of RCPC2, which compilers use everywhere if they may.
    const LDAPUR: u32 = 0x9940_0000;
    let worst = |count, first: &[u32], last: &[u32]| large_library(count, first, last).worst();
    assert_eq!(worst(200, &[MRS, RET], &WORK), Severity::Informs);
    assert_eq!(worst(200, &[NOP, RET], &WORK), Severity::Warned, "nothing asks");
    assert_eq!(worst(20, &[MRS, RET], &WORK), Severity::Warned, "a large share of the functions uses SVE");
    assert_eq!(worst(200, &[MRS, RET], &[LDAPUR, NOP, RET]), Severity::Warned, "no kernel has only this");
}

/// A file that is compiled for a feature as a whole also needs it in functions that are called.
#[test]
fn what_the_functions_that_are_called_need_is_no_choice() {
    for (function, severity) in [(197, Severity::Warned), (196, Severity::Informs)] {
        let mut made = large_library(200, &[MRS, RET], &WORK);
        let at = made.address(197);
        made.put(at, &WORK.map(u32::to_le_bytes).concat());
        let finding = &made.calling_at_start(function).findings()[0];
        // Both functions are judged alike, the one that is called and the one that is not.
        assert_eq!((finding.severity, finding.details.len()), (severity, 2), "{finding:#?}");
    }
}

#[test]
fn a_library_that_imports_the_answer_chooses_among_pointers() {
    for (name, severity) in [("cpu_flags", Severity::Informs), ("cpu_flats", Severity::Warned)] {
        let made =
            Made::of(&[function(&[RET]), function(&[RET]), function(&WORK)]).renamed("getauxval", name);
        assert_eq!(made.into_library().worst(), severity, "{name}");
    }
}

/// libgcc's function that looks for LSE is in most files, and says nothing about other features.
#[test]
fn who_asks_for_atomics_asks_for_nothing_else() {
    const UBFX_8_1: u32 = 0xd348_2000;
    for (next, severity) in [(UBFX_8_1, Severity::Warned), (NOP, Severity::Informs)] {
        assert_eq!(large_library(200, &[MRS, next, RET], &WORK).worst(), severity, "{next:#x}");
    }
}

/// musl and glibc in a stripped static executable ask in a way that is not known.
#[test]
fn a_large_static_executable_chooses_among_pointers() {
    for (count, severity) in [(200, Severity::Informs), (20, Severity::Warned)] {
        let mut functions = vec![function(&[RET]); count];
        functions[count - 2] = function(&WORK);
        let made = Made::of(&functions).without_question().linked_statically().stripped();
        assert_eq!(made.worst(), severity, "{count} functions");
    }
}

/// OpenSSL 1.1 computes the address of its variable in this way.
#[test]
fn an_address_may_be_the_sum_of_a_constant_and_a_place() {
    const ADD_X0_X0_X1: u32 = 0x8b01_0000;
    let (load_x0, adr_x1) = (0x5800_0000 | 4 << 5, 0x1000_0001 | 3 << 5);
    for (sum, severity) in [(ADD_X0_X0_X1, Severity::Informs), (NOP, Severity::Warned)] {
        let mut functions = vec![function(&[RET]); 200];
        functions[0] = vec![load_x0, adr_x1, sum, RET, 16, 0, NOP, NOP];
        functions[1] =
            b"/proc/cpuinfo\0\0\0".as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        functions[198] = function(&WORK);
        // The symbol of the first function ends before the constant.
        let made = Made::of(&functions).without_question().stripped().without_frames(1..2).into_library();
        assert_eq!(made.worst(), severity, "{sum:#x}");
    }
}

/// Rust's `cpufeatures` and others keep the answer in a variable, which outline atomics write.
#[test]
fn an_answer_may_be_asked_for_when_it_is_needed() {
    const PAGE_OF_VARIABLES: u32 = 0x9000_0009 | 8 << 5;
    const CBZ_OVER_TWO: u32 = 0x3400_0048;
    let work = function(&WORK);
    let made = |variable: u32, test: u32| {
        let read = 0x3940_0128 | variable << 10;
        let first = vec![PAGE_OF_VARIABLES, read, test, NOP, call(1), call(3) - 1, RET, NOP];
        let mut functions = vec![first, function(&[call(1), RET]), function(&[MRS, RET]), work.clone()];
        functions.push(function(&[RET]));
        Made::of(&functions).without_question().stripped().without_frames(1..2)
    };
    let (_, variable) = made(0, NOP).slot();
    let variable = (variable & 0xfff) as u32;
    assert_eq!(made(variable, CBZ_OVER_TWO).worst(), Severity::Informs);
    assert_eq!(made(variable, NOP).worst(), Severity::Refused);
}
