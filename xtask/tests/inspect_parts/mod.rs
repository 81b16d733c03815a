//! The parts of the tests of `inspect`: compilers, planted faults, sound executables, other readers.

pub(crate) mod agree;
pub(crate) mod build;
pub(crate) mod distribution;
pub(crate) mod faults;
pub(crate) mod sound;
