//! The protocol between the agent and the fleet: names of buckets and subjects, and the documents. The crate
//! is pure data, so that another program can read a status without linking the agent. [`deployment`] is the
//! desired state, [`status`] and [`heartbeat`] are the reported state, and [`command`] has the requests and replies.

pub mod command;
pub mod deployment;
mod form;
pub mod heartbeat;
pub mod status;

pub use command::{ErrorCode, LogsRequest, Reply, command_subject, command_wildcard};
pub use deployment::{ContainerSpec, Deployment, Document, Refusal};
pub use heartbeat::Heartbeat;
pub use status::{DeploymentStatus, DeviceStatus, Event, Footprint, ObservedContainer, OsRelease, Phase};

/// The JetStream KV bucket that holds one [`DeviceStatus`] per device, under the key `<device_id>`, and one
/// [`Heartbeat`], under [`heartbeat_key`]. All revisions are those of one stream, so that they tell which document
/// of a device is newer.
pub const STATUS_BUCKET: &str = "agent-status";

/// The JetStream KV bucket of the desired state: one [`Document`] per deployment, under [`desired_key`].
///
/// A *Put* stores the document of a deployment that the device must run. A *Delete* stops and removes the
/// deployment's container. The volumes stay, so that a later Put finds the data again. A *Purge* removes the
/// volumes, too. As soon as either is carried out, the status has no line for the deployment. If the bucket loses an
/// entry without such a marker, the deployment goes on as an orphan ([`Phase::Orphaned`]).
pub const DESIRED_BUCKET: &str = "desired-state";

/// The schema number of [`DeviceStatus`] and [`Heartbeat`]. A reader refuses an unknown number. New fields need no new
/// number.
pub const STATUS_SCHEMA: u32 = 1;

/// Returns the key of a deployment in [`DESIRED_BUCKET`].
pub fn desired_key(device_id: &str, deployment: &str) -> String {
    format!("{device_id}.{deployment}")
}

/// Returns the key of a device's heartbeat in [`STATUS_BUCKET`]. A watcher of `*` gets only the statuses.
pub fn heartbeat_key(device_id: &str) -> String {
    format!("{device_id}.heartbeat")
}

/// Returns the keys of one device in [`DESIRED_BUCKET`], as a wildcard.
pub fn desired_wildcard(device_id: &str) -> String {
    desired_key(device_id, ">")
}

/// Returns whether `name` is valid for a device, a deployment or a volume. The name becomes a part of KV
/// keys, subjects and container names.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=63).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_contain_the_device() {
        assert_eq!(desired_key("pi-7", "web"), "pi-7.web");
        assert_eq!(desired_wildcard("pi-7"), "pi-7.>");
        assert_eq!(heartbeat_key("pi-7"), "pi-7.heartbeat");
    }

    #[test]
    fn valid_names_are_tokens() {
        for name in ["pi-7", "A_b", "x", &"a".repeat(63)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "a.b", "a b", ">", "*", "-x", "ü", "a/b", &"a".repeat(64)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
