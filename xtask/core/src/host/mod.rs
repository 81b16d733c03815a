//! The facts about this machine: programs, QEMU, firmware, KVM and packages. They are gathered here and evaluated
//! elsewhere.

pub mod edk2;
pub mod facts;
pub mod firmware;
pub mod kvm;
pub mod local;
pub mod packages;
pub mod qemu;
pub mod tools;
