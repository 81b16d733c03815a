//! Gathers the facts about this machine: programs, QEMU, firmware, KVM and packages. The facts are evaluated in
//! `preflight::findings`.

pub mod edk2;
pub mod facts;
pub mod firmware;
pub mod kvm;
pub mod local;
pub mod memory;
pub mod mounts;
pub mod network;
pub mod packages;
pub mod pkg_config;
pub mod qemu;
pub mod tools;
