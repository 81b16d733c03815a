//! Decides whether something checks the processor before an instruction that the core lacks is executed. The code is
//! only read and not run. The functions are classified as follows:
//!
//! - A function *decides* if it asks the processor (`getauxval(AT_HWCAP)`, an identification register, CPUID,
//!   `/proc/cpuinfo`), if an `IRELATIVE` relocation or an ifunc symbol names it, or if it reads what such a function
//!   wrote. The function itself is *guarded*, and so is everything that it calls or takes the address of, unless calls
//!   from the entry point lead there too.
//! - A function is *plain* if calls lead to it from the entry point or `main` without passing through a function that
//!   decides or that calls one that asks. It must not itself call a function that asks, and must not branch on a
//!   variable. Such a function is executed on any core.
//! - A function whose name says that it is one of several to choose from is *guarded* for the features in its name.
//! - If nothing in a file asks the processor, a function is *plain* if direct branches in it lead to the instruction.
//!   This does not hold for a function of a static executable that branches on a variable.
//! - All other functions are *unclear*. Most of them are called through tables of pointers or from a library.

mod detection;
mod graph;
mod names;
mod pointers;

pub(crate) use detection::Detection;
pub(crate) use graph::{Graph, first_user};
pub(crate) use names::{chosen_for, go_level};

/// The use of a function, as far as its callers show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// The function is executed on any core.
    Plain,
    /// A check of the processor decides whether the function is executed. The text is the reason for this conclusion.
    Guarded(&'static str),
    /// The callers of the function do not show whether a check decides about it.
    Unclear,
}
