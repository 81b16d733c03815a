//! Decides whether something checks the processor before an instruction that the core lacks is executed. The code is
//! only read and not run. The functions are classified as follows:
//!
//! - A function *decides* if it asks the processor (`getauxval(AT_HWCAP)`, an identification register, CPUID,
//!   `/proc/cpuinfo`), if an `IRELATIVE` relocation or an ifunc symbol names it, or if it reads what such a function
//!   wrote. It also decides if it tests a variable and calls a direct caller of such a function: the variable is filled
//!   when it is needed for the first time. A function that decides is *guarded*. A function that it calls, or whose address it takes, is *guarded*
//!   too, unless calls from the entry point also lead there.
//! - A function is *plain* if calls lead to it from the entry point or `main`, and if no function on the way decides or
//!   calls a function that asks. A plain function itself calls no function that asks, and does not branch on a
//!   variable. It is executed on any core. An address that a function takes counts as a call only in the code that
//!   starts the program.
//! - A function whose name says that it is one of several to choose from is *guarded* for the features in its name. So
//!   is a function without such a name to which only such functions lead.
//! - In a Go program, Go's own functions are *guarded*, because Go's runtime asks the processor.
//! - If nothing in a file asks the processor, a function is *plain* if direct branches in it lead to the instruction.
//!   This does not hold for a function of a static executable that branches on a variable.
//! - No function of a library is *plain*, because the library's callers may ask. No function of a static executable
//!   without symbols is *plain*, because the C library in it asks in a way that is not known.
//! - All other functions are *unclear*. Most of them are called through tables of pointers or from a library.
//!
//! An unclear function is *guarded* nevertheless in two cases. In the first case, it has a single instruction and returns:
//! a probe, or a helper of code that was chosen. In the second case, only pointers lead to it, and the file chooses among
//! pointers. That is so if the file asks for more than LSE, or imports the answer, or is a static executable without
//! symbols; if no function to which direct calls lead from the file's entry points needs the same features; and if
//! functions that need features are rare, or very many functions were looked at. A file that is compiled for a feature as a
//! whole fulfils neither of the last two conditions. In a library, the name of the function is sufficient.
//!
//! Words that no path from the start of their function leads to are data, if the end of the function is known or numbers
//! surround them. So are words that the code loads from a place relative to itself.

mod detection;
mod facts;
mod graph;
mod names;
mod pointers;
mod stubs;

pub(crate) use detection::Detection;
pub(crate) use graph::{Graph, first_user};
pub(crate) use names::{chosen_for, everywhere, go_level, is_vector_variant, on_request};

/// How a function is used, as far as its callers show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// The function is executed on any core.
    Plain,
    /// A check of the processor decides whether the function is executed. The text is the reason for this conclusion.
    Guarded(&'static str),
    /// The callers of the function do not show whether a check of the processor comes before it.
    Unclear,
}
