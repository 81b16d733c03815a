//! Another libvirt than the one inside the runs: what was seen of it ([`ConnectionFacts`], gathered by `xtask-vm`),
//! and what is to be said of that ([`evaluate`], pure). [`capabilities`] reads libvirt's XML, [`refusal`]
//! its errors.

pub mod capabilities;
mod evaluate;
mod facts;
pub mod refusal;

pub use evaluate::{accelerator, evaluate};
pub use facts::*;
