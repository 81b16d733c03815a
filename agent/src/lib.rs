//! The device agent of the fleet.
//!
//! It reports the device's state to the JetStream KV bucket [`protocol::STATUS_BUCKET`] and answers requests
//! on [`protocol::command_subject`]. Modules in reading order: [`protocol`] (what goes over the bus, pure),
//! [`config`] (the TOML file), [`host`] (what the device says of itself), [`run`] (the agent at work).

pub mod config;
pub mod host;
pub mod protocol;
pub mod run;
