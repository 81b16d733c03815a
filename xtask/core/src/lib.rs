//! The library that all binaries of `cargo xtask` use: flags, plan, domain XML, the checks of the host, and the build
//! of the agent. It opens no socket and links no C library. Therefore it runs on a machine on which nothing is
//! installed yet, and can report what is missing.
//!
//! The following list has all modules, from left to right and from top to bottom. A module uses only modules that come
//! before it. `xtask/tests/arrows.rs` checks this.
//!
//! ```text
//! arch limits error job output digest format fs git os_release cache workspace xml_tree
//! cpu report libvirt_uri kernel
//! cli processes
//! image build runs
//! host
//! machine
//! preflight
//! plan spread
//! snapshot readback
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!(
    "cargo xtask needs Linux: it starts QEMU through libvirt's embedded driver and reads /proc; use a Linux host, or a \
     Linux virtual machine on this one"
);

pub mod arch;
pub mod build;
pub mod cache;
pub mod cli;
pub mod cpu;
pub mod digest;
pub mod error;
pub mod format;
pub mod fs;
pub mod git;
#[cfg(test)]
mod golden;
pub mod host;
pub mod image;
pub mod job;
pub mod kernel;
pub mod libvirt_uri;
pub mod limits;
pub mod machine;
pub mod os_release;
pub mod output;
pub mod plan;
pub mod preflight;
pub mod processes;
pub mod readback;
pub mod report;
pub mod runs;
pub mod snapshot;
pub mod spread;
pub mod workspace;
pub mod xml_tree;
