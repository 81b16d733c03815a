//! The device agent of the fleet.
//!
//! The agent runs the deployments that the fleet desires ([`agent_protocol::DESIRED_BUCKET`]) as podman
//! containers, restores them after a power cut, reports the device's state to
//! [`agent_protocol::STATUS_BUCKET`] and answers requests on [`agent_protocol::command_subject`].
//!
//! Modules in reading order:
//!
//! - [`config`], `credentials`, `registry_logins`: the configuration file, the logins to the bus and to registries
//! - `host`: facts about the device
//! - `desired`: the desired state (no I/O); `bucket`: which changes of it are believed (no I/O); [`store`]: the desired
//!   state on disk, with `files` and `digest`
//! - `succession`: which of a deployment's documents runs; `tags`: the images of documents that follow a tag (no I/O)
//! - `managed`: a deployment with its documents and its containers; `plan`: the next step for it (no I/O)
//! - `generator`: the form in which podman gets a container; `ports`: whether a port of the host is free
//! - `podman`: podman's REST API; `images`: image downloads; `backoff`: pauses between attempts
//! - `reconcile`: observe, compare, act
//! - [`storage`]: prepares podman's storage before podman starts, with `reset` and `lost_processes`
//! - `device_state`, [`status_report`]: the state that the device reports
//! - `bus`: connect and answer; `report`: send statuses and heartbeats; `follow`: read and follow the desired state,
//!   with `markers`; `reconnect`: the pauses between connections; `rate_limiter`: how often a status is sent;
//!   `command_handler`: replies
//! - `progress`: the watchdog; [`run`]: starts all of it

mod backoff;
mod bucket;
mod bus;
mod command_handler;
pub mod config;
mod credentials;
mod desired;
mod device_state;
mod digest;
mod files;
mod follow;
mod generator;
mod host;
mod images;
mod lost_processes;
mod managed;
mod markers;
mod plan;
mod podman;
mod ports;
mod progress;
mod rate_limiter;
mod reconcile;
mod reconnect;
mod registry_logins;
mod report;
mod reset;
pub mod run;
pub mod status_report;
pub mod storage;
pub mod store;
mod succession;
mod tags;

// `xtask/judge` reads the disk of a device after a power cut with these.
pub use images::{Fetched, complete_images};
pub use plan::{deployment_of_volume, volume_name};
