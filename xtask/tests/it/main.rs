//! The tests that need libvirt's headers. They are one binary, so that they are linked once. After a preflight,
//! `cargo xtask ci` runs each module by its name, for example:
//! `cargo test -p xtask --features vm --test it -- warm:: --test-threads 2`.
//!
//! No test may change the directory, the environment or the signals of this process.

mod attempt;
mod broken_hosts;
mod bump;
mod completions;
mod connection;
mod containers;
mod draw;
mod fetch;
mod fresh_host;
mod images;
mod inspect;
mod it_can_fail;
mod ordinary_user;
mod rehearsal;
mod scratch;
mod settings;
mod several;
mod testbed;
mod torture;
mod warm;
