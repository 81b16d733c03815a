//! The light library of `cargo xtask`: flags, plan, pure domain logic, the host's checks, the agent's build.
//!
//! Modules in reading order: [`cli`] (every flag), [`arch`] (the one table of architectures), [`limits`] (every
//! duration), [`report`] (the result, and its views), [`exit`] (errors with an exit code of their own), [`paths`]
//! (where things are kept), [`digest`], [`workspace`], [`host`] (what this machine has and lacks), [`agent_build`],
//! [`inspection`] (will it run there), [`domain`] (the
//! machine and its seed), [`image`] (what can be booted), [`snapshot`] (what is warm), [`plan`] (what was
//! asked, resolved), [`file_lock`], [`run_dir`] (who owns what a run leaves), [`instance`] (machines that stay), [`tasks`] (`xtask`'s tasks).
//!
//! Invariants; `tests/tidy.rs` checks those that a test can check:
//! - this library opens no socket and links no C library: it must run on a bare machine and tell what that lacks;
//! - `virt::` appears in one file, `bin/xtask-vm/hypervisor.rs`;
//! - no `Duration::from_…` outside [`limits`], no flag outside [`cli`];
//! - every module begins with `//!`;
//! - the binaries import from the library, never the other way, and no module but the mains from [`tasks`].

pub mod agent_build;
pub mod arch;
pub mod cli;
pub mod digest;
pub mod domain;
pub mod exit;
pub mod file_lock;
#[cfg(test)]
mod golden;
pub mod host;
pub mod image;
pub mod inspection;
pub mod instance;
pub mod limits;
pub mod paths;
pub mod plan;
pub mod processes;
pub mod report;
pub mod run_dir;
pub mod snapshot;
pub mod tasks;
pub mod workspace;
