//! `cargo xtask vm` for what needs libvirt: instances that somebody keeps.

pub(crate) mod console;
pub(crate) mod power;
