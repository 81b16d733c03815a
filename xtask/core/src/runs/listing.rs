//! The list of the instances with their states, which `vm list` prints. The function for the state of an instance is an
//! argument, because only `xtask-vm` can ask a libvirt daemon.

use std::fmt::{self, Display, Formatter};

use anyhow::Result;
use serde_json::{Value, json};

use super::instance::{Instance, InstanceRecord, SCHEMA};
use crate::message;
use crate::output::{print, print_json};

/// The state of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// QEMU does not run, or its guest has shut down. In the second case, QEMU of the embedded driver keeps running,
    /// because libvirt starts it with `-no-shutdown`.
    Off,
    Running,
    /// QEMU has stopped the guest. The text is QEMU's state (QEMU, RunState), for example `io-error`.
    Stopped(String),
    /// The libvirt daemon that runs the instance was not asked, or it did not answer.
    Unknown,
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Stopped(state) => state,
            Self::Unknown => "unknown",
        })
    }
}

/// Prints the instances, one a line, or as JSON.
///
/// # Errors
/// Returns an error if stdout cannot be written.
pub fn show(instances: &[Instance], as_json: bool, state: impl Fn(&Instance) -> State) -> Result<()> {
    if as_json {
        let machines: Vec<_> = instances.iter().map(|one| described(one, &state(one))).collect();
        return print_json(&json!({ "schema": SCHEMA, "machines": machines }));
    }
    if instances.is_empty() {
        message!("there is no machine; make one with cargo xtask vm up");
    }
    for one in instances {
        print(line(one, &state(one)))?;
    }
    Ok(())
}

/// Returns an instance's record, with the field `running`: `null` if the state is unknown.
fn described(instance: &Instance, state: &State) -> Value {
    let mut machine = json!(instance.machine);
    machine["running"] = match state {
        State::Unknown => Value::Null,
        other => json!(*other == State::Running),
    };
    machine
}

fn line(instance: &Instance, state: &State) -> String {
    let InstanceRecord { name, image, made_at, arch, daemon, .. } = &instance.machine;
    let arch = arch.to_string();
    let at = daemon.as_ref().map_or(String::new(), |daemon| format!(" on {}", daemon.uri));
    format!("{name:<20} {state:<8} {arch:<8} {image:<14} made {made_at}{at}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;
    use crate::runs::instance::DaemonRecord;

    #[test]
    fn an_instance_is_listed_with_its_state_and_its_daemon() {
        let mut instance = Instance {
            machine: InstanceRecord {
                schema: SCHEMA,
                id: "1124-100000-0001".to_owned(),
                name: "dev".to_owned(),
                arch: VmArchitecture::Aarch64,
                image: "debian-12".to_owned(),
                made_at: "2026-11-24T10:00:00Z".to_owned(),
                login_user: "debian".to_owned(),
                ssh_port: None,
                console: "/console.log".into(),
                daemon: None,
            },
            directory: "/runs/1124-100000-0001".into(),
        };
        let expected = "dev                  io-error aarch64  debian-12      made 2026-11-24T10:00:00Z";
        assert_eq!(line(&instance, &State::Stopped("io-error".to_owned())), expected);
        instance.machine.daemon = Some(DaemonRecord { uri: "qemu:///system".to_owned(), route: None });
        assert!(line(&instance, &State::Unknown).ends_with("Z on qemu:///system"));
        for (state, running) in [
            (State::Running, json!(true)),
            (State::Off, json!(false)),
            (State::Stopped("io-error".to_owned()), json!(false)),
            (State::Unknown, Value::Null),
        ] {
            let described = described(&instance, &state);
            assert_eq!((&described["running"], &described["id"]), (&running, &json!("1124-100000-0001")));
        }
    }
}
