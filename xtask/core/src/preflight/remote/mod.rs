//! Checks the libvirt that `--connect` names. `xtask-vm` gathers [`ConnectionFacts`], and [`evaluate`] turns
//! them into findings without side effects. [`capabilities`] parses libvirt's XML. [`refusal`] recognises libvirt's
//! error messages.

pub mod capabilities;
mod evaluate;
mod facts;
pub mod refusal;

pub use evaluate::{accelerator, evaluate};
pub use facts::*;
