//! Who decides whether an instruction that the core lacks is ever executed. Without running it that can be told so far:
//!
//! - a function that asks the processor (`getauxval(AT_HWCAP)`, an identification register, CPUID, `/proc/cpuinfo`), that an
//!   `IRELATIVE` relocation or an ifunc symbol names, or that reads what such a function wrote down, decides for whatever it
//!   calls or takes the address of: *guarded*;
//! - a function that calls lead to from the entry point, none of which passes through one that decides, is executed whatever
//!   the core has: *plain*;
//! - in a file in which nothing asks the processor, everything is *plain*;
//! - the rest, called through tables of pointers or from a library, is *unclear*.

mod detection;
mod graph;
mod pointers;

pub(crate) use detection::{Detection, find};
pub(crate) use graph::{Graph, first_user};

/// Endings and beginnings of the names of functions that are chosen at run time.
const CHOSEN: [&str; 26] = [
    "_sve", "_sve2", "_sme", "_mops", "_neon", "_lse", "_pauth", "_mte", "_dotprod", "_i8mm", "_bf16",
    "_sha3", "_sha512", "_ce", "_armv8", "_evex", "_avx", "_avx2", "_avx512", "_erms", "_sse2", "_sse4",
    "_ssse3", "_fma", "_aesni", "_vnni",
];

/// How much is known of a function's callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// It is executed whatever the core has.
    Plain,
    /// Something decides over it, for this reason.
    Guarded(&'static str),
    /// It cannot be told.
    Unclear,
}

/// Whether a name says that its function is one of several to choose from.
pub(crate) fn is_chosen(name: &[u8]) -> bool {
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let word_ends = |at: usize| name[at..].chars().next().is_none_or(|next| !next.is_ascii_alphanumeric());
    let outline = name.starts_with("__aarch64_")
        && ["_relax", "_acq", "_rel", "_sync"].iter().any(|end| name.ends_with(end));
    outline || CHOSEN.iter().any(|word| name.match_indices(word).any(|(at, _)| word_ends(at + word.len())))
}
