//! The check of a libvirt other than the embedded one of the runs. `xtask-vm` gathers [`ConnectionFacts`], and
//! [`evaluate`] turns them into findings without side effects. [`capabilities`] reads libvirt's XML, [`refusal`] its
//! errors.

pub mod capabilities;
mod evaluate;
mod facts;
pub mod refusal;

pub use evaluate::{accelerator, evaluate};
pub use facts::*;
