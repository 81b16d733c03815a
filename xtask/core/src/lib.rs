//! The light library of `cargo xtask`: flags, plan, pure domain logic, the host's checks, the agent's build. It opens no
//! socket and links no C library: it runs on a bare machine and tells what that lacks.
//!
//! Each module uses only those that stand before it here; `xtask/tests/arrows.rs` checks that.
//!
//! ```text
//! arch error digest format fs os_release cache workspace
//! limits cpu report libvirt_uri
//! cli processes
//! image build runs
//! host
//! machine
//! plan preflight
//! snapshot readback
//! ```

pub mod arch;
pub mod build;
pub mod cache;
pub mod cli;
pub mod cpu;
pub mod digest;
pub mod error;
pub mod format;
pub mod fs;
#[cfg(test)]
mod golden;
pub mod host;
pub mod image;
pub mod libvirt_uri;
pub mod limits;
pub mod machine;
pub mod os_release;
pub mod plan;
pub mod preflight;
pub mod processes;
pub mod readback;
pub mod report;
pub mod runs;
pub mod snapshot;
pub mod workspace;
