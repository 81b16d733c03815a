//! What this machine has: programs, QEMU, firmware, KVM, packages; gathered, and judged elsewhere.

pub mod edk2;
pub mod facts;
pub mod firmware;
pub mod kvm;
pub mod local;
pub mod packages;
pub mod qemu;
pub mod tools;
