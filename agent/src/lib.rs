//! The device agent of the fleet.
//!
//! It runs what the fleet desires ([`agent_protocol::DESIRED_BUCKET`]) as podman containers, keeps that across power cuts, reports the
//! device's state to [`agent_protocol::STATUS_BUCKET`] and answers requests on [`agent_protocol::command_subject`].
//!
//! Modules in reading order: [`agent_protocol`] (what goes over the bus, pure), [`config`] and [`credentials`] (the TOML file),
//! [`host`] (what the device says of itself), [`desired`] (what is wished, pure), [`store`] (that, on disk), [`plan`] (the next step
//! for a deployment, pure), [`podman`] (its REST API), `backoff` and `images` (what waits), [`reconcile`] (observe, compare,
//! act), [`device_state`] and [`status_report`] (what is told of it), [`bus`] (connect, report, follow) and [`rate_limiter`] (how often), [`command_handler`] (answer), [`progress`]
//! (the watchdog), [`run`] (all of it at work).

mod backoff;
pub mod bus;
pub mod command_handler;
pub mod config;
pub mod credentials;
pub mod desired;
pub mod device_state;
pub mod digest;
pub mod host;
mod images;
pub mod plan;
pub mod podman;
pub mod progress;
pub mod rate_limiter;
pub mod reconcile;
pub mod run;
pub mod status_report;
pub mod store;
