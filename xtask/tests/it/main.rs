//! The tests that need libvirt's headers, as one binary, so that they are linked once. `cargo xtask ci` runs each module by
//! its name, after a preflight: `cargo test -p xtask --features vm --test it -- warm:: --test-threads 2`.
//!
//! No test may change this process: its directory, its environment, its signals.

mod broken_hosts;
mod bump;
mod completions;
mod connection;
mod draw;
mod fetch;
mod fresh_host;
mod images;
mod inspect;
mod it_can_fail;
mod rehearsal;
mod scratch;
mod warm;
