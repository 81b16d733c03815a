//! Computes the next step for one deployment from the desired state and from podman's containers, without
//! I/O. A step may start from any state of the containers.

use std::collections::BTreeMap;

use agent_protocol::deployment::Restart;
use agent_protocol::is_name;

use crate::desired::{Applied, Target};
use crate::host::DeviceIdentity;
use crate::managed::ManagedDeployment;
use crate::podman::ListedContainer;

/// The label with the device id. Everything that this agent creates has this label, and the agent never
/// touches objects without it.
pub(crate) const DEVICE_LABEL: &str = "io.iot-agent.device";
pub(crate) const DEPLOYMENT_LABEL: &str = "io.iot-agent.deployment";
/// Label with the digest of the document.
pub(crate) const DIGEST_LABEL: &str = "io.iot-agent.digest";

/// Label with the limits of the document that the container does not have, since the device cannot enforce them.
pub(crate) const UNLIMITED_LABEL: &str = "io.iot-agent.unlimited";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Do nothing: the container runs, as desired.
    Keep(String),
    /// Do nothing: the container has ended as its restart policy allows.
    Complete(String),
    /// Do nothing: a power cut has ended the container, and its restart policy does not start it again.
    Lost(String),
    /// Wait for podman, which is stopping or removing the container.
    Wait,
    /// No container matches: get the image and create a container beside the others.
    Make,
    /// Stop the container of the previous document, whose place is taken.
    Retire(String),
    /// Forget the previous document, which never worked.
    DropPrevious,
    /// Roll back to the previous container, since the new one has failed.
    RollBack {
        id: String,
        exit_code: i32,
    },
    /// Start the matching container.
    Start {
        id: String,
        /// The exit code, if the container has run and ended.
        ended: Option<i32>,
    },
    Unpause(String),
    /// Give the container the name of its role.
    Rename {
        id: String,
        to: String,
    },
    /// Remove surplus containers.
    Remove(Vec<String>),
    /// Finish the deployment: there is no container, as desired, or none that the agent may touch.
    Gone,
}

/// Returns the name of a deployment's container. Neither part contains a `.`. The device id avoids conflicts
/// with containers that another device, or this device under an earlier name, has left on the card.
pub(crate) fn container_name(device_id: &str, deployment: &str) -> String {
    format!("iot-{device_id}.{deployment}")
}

/// Returns the name of a new container until the container with the proper name has been stopped.
pub(crate) fn name_of_new(device_id: &str, deployment: &str) -> String {
    format!("{}.new", container_name(device_id, deployment))
}

/// Returns the name of the previous container until the new one has passed its probation.
pub(crate) fn name_of_old(device_id: &str, deployment: &str) -> String {
    format!("{}.old", container_name(device_id, deployment))
}

/// Returns whether the agent gives this name to a container: one of a deployment, a new one or a previous one.
pub(crate) fn is_container_name(device_id: &str, name: &str) -> bool {
    let deployment = name
        .strip_prefix("iot-")
        .and_then(|rest| rest.strip_prefix(device_id))
        .and_then(|rest| rest.strip_prefix('.'));
    let deployment =
        deployment.map(|rest| rest.strip_suffix(".new").or(rest.strip_suffix(".old")).unwrap_or(rest));
    deployment.is_some_and(is_name)
}

/// Returns the name of a volume of a deployment in podman.
pub fn volume_name(device_id: &str, deployment: &str, volume: &str) -> String {
    format!("iot-{device_id}.{deployment}.{volume}")
}

/// Returns the deployment of a volume if the agent gives this name to a volume.
pub fn deployment_of_volume<'a>(device_id: &str, volume: &'a str) -> Option<&'a str> {
    let rest = volume.strip_prefix("iot-")?.strip_prefix(device_id)?.strip_prefix('.')?;
    let (deployment, volume) = rest.split_once('.')?;
    (is_name(deployment) && is_name(volume)).then_some(deployment)
}

/// Returns the label filter for everything that belongs to this device.
pub(crate) fn device_filter(device_id: &str) -> String {
    format!("{DEVICE_LABEL}={device_id}")
}

/// Returns the labels of a deployment's containers and volumes.
pub(crate) fn labels(device_id: &str, deployment: &str) -> BTreeMap<String, String> {
    [(DEVICE_LABEL, device_id), (DEPLOYMENT_LABEL, deployment)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

/// Returns the next step.
///
/// A new document takes over in these steps: a container is made beside the previous one, which runs on
/// (`Make`); the previous one is stopped (`Retire`) and renamed; the new one gets the proper name and is
/// started. The two never run at the same time, since they may use the same ports and volumes. If the new one
/// fails (`RollBack`), the previous document becomes the current one. Then the failed container is surplus,
/// and the previous one is renamed and started.
pub(crate) fn next(device: &DeviceIdentity, deployment: &ManagedDeployment) -> Step {
    let containers = &deployment.containers;
    let Target::Run { spec, digest, .. } = &deployment.target else {
        // The agent has lost the state with the document of these containers, which a refused one does not replace.
        let is_unknown = matches!(deployment.target, Target::Refused(_)) && deployment.applied.is_none();
        return if containers.is_empty() || is_unknown {
            Step::Gone
        } else {
            Step::Remove(ids(containers.iter()))
        };
    };
    let proper = container_name(&device.device_id, &deployment.name);
    let Some(container) = pick(containers, digest, &proper) else { return Step::Make };
    let previous = deployment.previous.as_ref();
    let old = previous.and_then(|previous| pick(containers, previous.accepted.digest(), &proper));
    let is_surplus =
        |other: &&ListedContainer| other.id != container.id && old.is_none_or(|old| old.id != other.id);
    let surplus = ids(containers.iter().filter(is_surplus));
    if !surplus.is_empty() {
        return Step::Remove(surplus);
    }
    let applied = deployment.applied.as_ref().filter(|applied| applied.container == container.id);
    if let Some(previous) = previous {
        if !previous.is_proven() && old.is_none_or(|old| !is_active(old)) {
            return Step::DropPrevious;
        }
        if has_failed(container, spec.restart, applied, &device.boot_id) {
            return Step::RollBack { id: container.id.clone(), exit_code: container.exit_code };
        }
        match old.filter(|old| is_active(old)) {
            Some(old) if old.state == "paused" => return Step::Unpause(old.id.clone()),
            Some(old) => return Step::Retire(old.id.clone()),
            None => {}
        }
        if let Some(old) = old.filter(|old| old.names.first() == Some(&proper)) {
            let to = name_of_old(&device.device_id, &deployment.name);
            return Step::Rename { id: old.id.clone(), to };
        }
    }
    if container.names.first() != Some(&proper) {
        return Step::Rename { id: container.id.clone(), to: proper };
    }
    let id = container.id.clone();
    match container.state.as_str() {
        "running" => Step::Keep(id),
        "paused" => Step::Unpause(id),
        state if is_created(state) => {
            // After a power cut, podman 4 shows this state for containers that were running.
            let ran = applied.is_some_and(|applied| applied.boot_id != device.boot_id && !applied.stopped);
            match spec.restart {
                Restart::Never if ran => Step::Lost(id),
                _ => Step::Start { id, ended: None },
            }
        }
        _ if has_ended(container) => after_end(container, spec.restart, applied, &device.boot_id),
        "stopping" | "removing" => Step::Wait,
        // `unknown`, or a state of a later podman: replace the container.
        _ => Step::Make,
    }
}

/// Returns the container of a document: the one that runs, or else the one with the proper name.
fn pick<'a>(containers: &'a [ListedContainer], digest: &str, proper: &String) -> Option<&'a ListedContainer> {
    let all = || containers.iter().filter(|container| has_digest(container, Some(digest)));
    let running = all().find(|container| container.state == "running");
    running.or_else(|| all().find(|container| container.names.first() == Some(proper))).or(all().next())
}

pub(crate) fn has_digest(container: &ListedContainer, digest: Option<&str>) -> bool {
    digest.is_some() && container.labels.get(DIGEST_LABEL).map(String::as_str) == digest
}

/// Returns whether the container has ended. Podman shows `stopped` for an exited container until it has
/// cleaned up.
pub(crate) fn has_ended(container: &ListedContainer) -> bool {
    ["exited", "stopped"].contains(&container.state.as_str())
}

/// Returns whether podman has not yet cleaned up after a container that has ended.
pub(crate) fn awaits_clean_up(container: &ListedContainer) -> bool {
    container.state == "stopped"
}

fn is_created(state: &str) -> bool {
    ["created", "configured", "initialized"].contains(&state)
}

/// Returns whether the container may have a process.
pub(crate) fn is_active(container: &ListedContainer) -> bool {
    ["running", "paused", "stopping"].contains(&container.state.as_str())
}

/// Returns the step for a container that has ended.
fn after_end(
    container: &ListedContainer,
    restart: Restart,
    applied: Option<&Applied>,
    boot_id: &str,
) -> Step {
    let id = container.id.clone();
    if applied.is_some_and(|applied| applied.stopped) {
        return Step::Start { id, ended: None };
    }
    let completed = applied.is_some_and(|applied| applied.completed);
    let of_this_boot = applied.is_some_and(|applied| applied.boot_id == boot_id);
    let stays_ended = match restart {
        Restart::Always => false,
        Restart::OnFailure => completed || container.exit_code == 0 && of_this_boot,
        // The exit code is meaningless after a power cut.
        Restart::Never if applied.is_some() && !completed && !of_this_boot => return Step::Lost(id),
        Restart::Never => true,
    };
    if stays_ended { Step::Complete(id) } else { Step::Start { id, ended: Some(container.exit_code) } }
}

/// Returns whether a container has failed within its probation. A container that a power cut has ended has not
/// failed.
fn has_failed(
    container: &ListedContainer,
    restart: Restart,
    applied: Option<&Applied>,
    boot_id: &str,
) -> bool {
    let on_probation = |applied: &Applied| {
        applied.unproven && !applied.stopped && !applied.completed && applied.boot_id == boot_id
    };
    let by_design = restart != Restart::Always && container.exit_code == 0;
    has_ended(container) && applied.is_some_and(on_probation) && !by_design
}

fn ids<'a>(containers: impl Iterator<Item = &'a ListedContainer>) -> Vec<String> {
    containers.map(|container| container.id.clone()).collect()
}

#[cfg(test)]
mod tests;
