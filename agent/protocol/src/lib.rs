//! What the agent and the fleet say to each other: bucket and subject names, and the documents. Pure data, so
//! that a verifier can read a status without linking the agent. [`deployment`] is what the fleet desires, [`status`] what a
//! device says of itself, [`command`] what is asked and answered.

pub mod command;
pub mod deployment;
pub mod status;

pub use command::{ErrorCode, LogsRequest, Reply, command_subject, command_wildcard};
pub use deployment::{ContainerSpec, Deployment, Document, Refusal};
pub use status::{DeploymentStatus, DeviceStatus, Event, Footprint, ObservedContainer, OsRelease, Phase};

/// The JetStream KV bucket that holds one [`DeviceStatus`] per device, under the key `<device_id>`.
pub const STATUS_BUCKET: &str = "agent-status";

/// The JetStream KV bucket of what the fleet desires: one [`Document`] per deployment, under [`desired_key`].
///
/// A *Put* is a deployment to run. A *Delete* stops it and removes its container: its volumes stay, and so does its line in the
/// status, so that a later Put finds its data again. A *Purge* forgets it: container, volumes and line. A key that is in a
/// whole reading of the bucket in no form was deleted there in a way that left no marker, and counts as a Delete.
pub const DESIRED_BUCKET: &str = "desired-state";

/// The schema number of [`DeviceStatus`]; a reader refuses one that it does not know. Fields are added without a new number.
pub const STATUS_SCHEMA: u32 = 1;

/// The key of a deployment in [`DESIRED_BUCKET`].
pub fn desired_key(device_id: &str, deployment: &str) -> String {
    format!("{device_id}.{deployment}")
}

/// What the device watches in [`DESIRED_BUCKET`].
pub fn desired_wildcard(device_id: &str) -> String {
    desired_key(device_id, ">")
}

/// Whether `name` can be a device's or a deployment's: a KV key and a subject token, a part of a container's name, and short
/// enough for each.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=63).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_fleets() {
        assert_eq!(desired_key("pi-7", "web"), "pi-7.web");
        assert_eq!(desired_wildcard("pi-7"), "pi-7.>");
    }

    #[test]
    fn names_are_tokens() {
        for name in ["pi-7", "A_b", "x", &"a".repeat(63)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "a.b", "a b", ">", "*", "-x", "ü", "a/b", &"a".repeat(64)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
