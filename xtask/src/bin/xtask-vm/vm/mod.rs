//! The commands of `cargo xtask vm` that need libvirt, except for `vm up`.

pub(crate) mod console;
pub(crate) mod log;
pub(crate) mod on_daemon;
pub(crate) mod power;
