//! Who decides whether an instruction that the core lacks is ever executed. Without running it that can be told so far:
//!
//! - a function that asks the processor (`getauxval(AT_HWCAP)`, an identification register, CPUID, `/proc/cpuinfo`), that an
//!   `IRELATIVE` relocation or an ifunc symbol names, or that reads what such a function wrote down, decides for whatever it
//!   calls or takes the address of: *guarded*;
//! - a function that calls lead to from the entry point, none of which passes through one that decides, is executed whatever
//!   the core has: *plain*;
//! - a function whose name says that it is one of several to choose from, and for which features, is *guarded* as to those;
//! - in a file in which nothing asks the processor, everything that calls lead to is *plain*;
//! - the rest, called through tables of pointers or from a library, is *unclear*.

mod detection;
mod graph;
mod names;
mod pointers;

pub(crate) use detection::Detection;
pub(crate) use graph::{Graph, first_user};
pub(crate) use names::{chosen_for, go_level};

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
