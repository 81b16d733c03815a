//! More of `tests/fetch.rs`, by what it is about.

mod disks;
mod processes;
mod routes;
