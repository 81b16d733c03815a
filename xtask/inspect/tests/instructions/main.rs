//! Tests how `inspect` judges instructions that the core lacks, with small executables that are made by hand. Each test
//! has the case that must be found beside the case that must not.

mod chosen;
mod made;
#[path = "../support/mod.rs"]
mod support;

use inspect::finding::Severity;

use made::{
    CNTB, DYNAMIC, FRAMES, FUNCTION, IRG, Made, NOP, RET, WORK, address_of, branch, call, function, if_equal,
};

/// LLVM's unwinder clears the tags of frames that have some, and is in every Rust program that is linked with musl.
#[test]
fn an_unwinder_that_clears_tags_is_no_need_for_them() {
    let stg = |register: u32| 0xd920_0800 | register;
    for (register, severity) in [(0, Severity::Informs), (1, Severity::Refused)] {
        let made = Made::of(&[function(&[stg(register), RET]), function(&[RET])]);
        assert_eq!(made.worst(), severity, "stg x{register}, [x0]");
    }
}

#[test]
fn nobody_can_know_what_a_static_executable_without_symbols_asks() {
    let made = || Made::of(&[function(&WORK), function(&[RET])]).linked_statically();
    let named = made().findings();
    assert_eq!(named[0].severity, Severity::Refused, "{named:#?}");
    assert!(named[0].offers.contains("nothing in it asks the processor"), "{named:#?}");
    let stripped = made().stripped().findings();
    assert_eq!(stripped[0].severity, Severity::Warned, "{stripped:#?}");
    assert!(!stripped[0].offers.contains("nothing in it asks"), "{stripped:#?}");
}

/// The callers of a library choose its functions by their names.
#[test]
fn a_library_is_not_refused_because_its_callers_may_ask() {
    let made = || Made::of(&[function(&[RET]), function(&WORK)]).without_question();
    assert_eq!(made().worst(), Severity::Refused);
    assert_eq!(made().into_library().worst(), Severity::Informs);
    assert_eq!(made().renamed("work_sve", "work_all").into_library().worst(), Severity::Warned);
}

/// glibc's libmvec has such functions, and functions without names that only they call.
#[test]
fn vector_variants_are_called_by_vector_code_only() {
    let functions = [function(&[RET]), function(&[CNTB, call(1) - 1, RET]), function(&WORK)];
    let made = || Made::of(&functions).without_question().into_library();
    assert_eq!(made().renamed("work_sve", "_ZGVsM_f").worst(), Severity::Informs);
    assert_eq!(made().renamed("work_sve", "_ZGVnM_f").worst(), Severity::Warned);
}

/// The start code passes on the address of `main`, which is called. Elsewhere an address may go into a table from which
/// somebody chooses.
#[test]
fn an_address_that_is_only_taken_is_no_call() {
    let chain = |last: u32| {
        let [first, second, third, fourth] = [call(2), call(1), call(1), call(1)];
        let on_the_way = [first, second, third, fourth].map(|call| function(&[call, RET]));
        let [main, first, second, third] = on_the_way;
        let functions =
            [main, function(&[RET]), first, second, third, function(&[last, RET]), function(&WORK)];
        Made::of(&functions)
    };
    assert_eq!(chain(call(1)).worst(), Severity::Refused);
    assert_eq!(chain(address_of(1)).worst(), Severity::Warned);
    let from_main = Made::of(&[function(&[address_of(2), RET]), function(&[RET]), function(&WORK)]);
    assert_eq!(from_main.worst(), Severity::Refused);
}

#[test]
fn words_that_no_path_leads_to_are_data_if_the_function_is_known_to_hold_them() {
    let table = [RET, CNTB, CNTB, CNTB];
    // A symbol gives the bounds of the first function, and nothing those of the third.
    let made = Made::of(&[function(&table), function(&[RET]), function(&[RET])]);
    assert_eq!(made.worst(), Severity::Informs);
    let made = Made::of(&[function(&[RET]), function(&[RET]), function(&table)]);
    assert_eq!(made.worst(), Severity::Warned);
    // The unwinder's record gives them, if it is there.
    for (length, severity) in [(16u32, Severity::Informs), (4, Severity::Warned)] {
        let mut made = Made::of(&[
            function(&[RET]),
            function(&[RET]),
            function(&table),
            function(&[RET]),
            function(&[]),
        ]);
        let (start, record) = (made.address(2) as u32, made.address(4) as u32);
        let fields = [12, 0, start.wrapping_sub(record + 8), length];
        made.put(record as usize, &fields.map(u32::to_le_bytes).concat());
        let frames = made.number(Made::header(FRAMES) + 8) as usize;
        made.put(frames + 12 + 2 * 8 + 4, &record.wrapping_sub(frames as u32).to_le_bytes());
        assert_eq!(made.worst(), severity, "a record of {length} bytes");
    }
}

/// In a stripped file, assembly has no symbol and no record for the unwinder. Only calls, branches and pointers show where it
/// begins.
#[test]
fn a_call_shows_where_a_function_begins() {
    let branches = [call(3), branch(0x1400_0000, 3), if_equal(3), address_of(3)];
    let cases = branches.map(|branch| (branch, Severity::Refused)).into_iter();
    for (call, severity) in cases.chain([(NOP, Severity::Warned)]) {
        let made = Made::of(&[
            function(&[call, RET]),
            function(&[RET]),
            function(&[RET]),
            function(&WORK),
            function(&[RET]),
        ])
        .without_frames(3..4);
        assert_eq!(made.worst(), severity, "{call:#x}");
    }
}

/// GHC, and compilers of constants, put numbers between functions. Small numbers decode as UDF.
#[test]
fn small_numbers_are_no_code() {
    for (number, severity) in [(0x0000_808a, Severity::Informs), (NOP, Severity::Warned)] {
        let made = Made::of(&[function(&[RET]), function(&[RET]), function(&[RET, number, CNTB, number])]);
        assert_eq!(made.worst(), severity, "{number:#x}");
    }
}

/// Compilers make no such instruction of ordinary code. The linker tells whether a file asks for tagged memory.
#[test]
fn tags_that_nobody_asked_for_are_not_warned_of() {
    let library =
        || Made::of(&[function(&[RET]), function(&[RET]), function(&[IRG, NOP, RET])]).into_library();
    assert_eq!(library().worst(), Severity::Informs);
    let mut tagged = library();
    // The second entry of the dynamic section becomes DT_AARCH64_MEMTAG_MODE.
    let dynamic = tagged.number(Made::header(DYNAMIC) + 8) as usize;
    tagged.put(dynamic + 16, &0x7000_0009u64.to_le_bytes());
    assert_eq!(tagged.worst(), Severity::Warned);
    assert_eq!(Made::of(&[function(&[IRG, RET]), function(&[RET])]).worst(), Severity::Refused);
}

/// Returns Go's table (since Go 1.20) of one function, whose end is given relative to `text`.
fn go_table(text: u64, end: u32) -> Vec<u8> {
    const HEADER: u64 = 72;
    let mut table = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 4, 8];
    for number in [1, 0, text, 0, 0, 0, 0, HEADER] {
        table.extend(u64::to_le_bytes(number));
    }
    table.extend([0, 0, end].map(u32::to_le_bytes).concat());
    table
}

/// Only Go's own functions test what its runtime found. C code in the same program does not.
#[test]
fn in_a_go_program_only_the_functions_of_go_are_exempt() {
    let functions =
        [function(&[CNTB, call(3) - 1, RET]), function(&[RET]), function(&[RET]), function(&WORK)];
    let all_but = |rest: usize| {
        let text = Made::with(&functions, &[(".gopclntab", &go_table(0, 0))]).address(0) as u64;
        let end = ((functions.len() - rest) * FUNCTION * 4) as u32;
        Made::with(&functions, &[(".gopclntab", &go_table(text, end))])
    };
    assert_eq!(all_but(0).worst(), Severity::Informs);
    assert_eq!(all_but(1).worst(), Severity::Refused);
    let unknown = Made::with(&functions, &[(".gopclntab", b"an unknown form")]);
    assert_eq!(unknown.worst(), Severity::Warned);
}

#[test]
fn a_refusal_has_the_path_of_calls() {
    let functions = [function(&[call(3), RET]), function(&[RET]), function(&[RET]), function(&WORK)];
    let made = Made::of(&functions);
    let finding = &made.findings()[0];
    assert_eq!(finding.paths, [format!("main > {:#x}", made.address(3))], "{finding:#?}");
}
