//! Computes the next step for one deployment from the desired state and from podman's containers, without
//! I/O. A step may start from any state of the containers.

use std::collections::BTreeMap;

use agent_protocol::deployment::{ContainerSpec, Limits, Port, Restart, Volume};
use serde_json::{Map, Value, json};

use crate::desired::{Applied, DesiredEntry, Target};
use crate::host::DeviceIdentity;
use crate::podman::ListedContainer;

/// The label with the device id. Everything that this agent creates has this label, and the agent never
/// touches objects without it.
pub(crate) const DEVICE_LABEL: &str = "io.iot-agent.device";
pub(crate) const DEPLOYMENT_LABEL: &str = "io.iot-agent.deployment";
/// Label with the digest of the document.
pub(crate) const DIGEST_LABEL: &str = "io.iot-agent.digest";

/// Upper bound for a container's log file, in bytes.
const LOG_BYTES: u64 = 1 << 20;
/// The period of the scheduler's CPU quotas, in microseconds (the kernel's cgroup-v2 document, cpu.max).
const CPU_PERIOD: u64 = 100_000;

/// A deployment as the reconciler processes it: its target, and podman's containers for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManagedDeployment {
    pub(crate) name: String,
    /// The revision, in the bucket, of the operation that gives `target`.
    pub(crate) revision: u64,
    pub(crate) target: Target,
    pub(crate) containers: Vec<ListedContainer>,
}

impl ManagedDeployment {
    /// Returns a deployment without its containers, which are not known yet.
    pub(crate) fn new(name: &str, entry: &DesiredEntry) -> Self {
        let (revision, target) = (entry.revision, entry.target.clone());
        Self { name: name.to_owned(), revision, target, containers: Vec::new() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Do nothing: the deployment is as desired.
    Keep,
    /// Do nothing: the container has ended as its restart policy allows.
    Complete,
    /// Wait for podman, which is stopping or removing the container.
    Wait,
    /// No container matches: get the image, remove the containers, create a new one and start it.
    Make,
    /// Start the matching container.
    Start {
        id: String,
        /// The exit code, if the container has run and ended.
        ended: Option<i32>,
    },
    Unpause(String),
    /// Give the container its proper name.
    Rename(String),
    /// Remove surplus containers.
    Remove(Vec<String>),
    /// Finish the deployment: there is no container, as desired.
    Gone,
}

/// Returns the name of a deployment's container. Neither part contains a `.`. The device id avoids conflicts
/// with containers that another device, or this device under an earlier name, has left on the card.
pub(crate) fn container_name(device_id: &str, deployment: &str) -> String {
    format!("iot-{device_id}.{deployment}")
}

pub(crate) fn volume_name(device_id: &str, deployment: &str, volume: &str) -> String {
    format!("iot-{device_id}.{deployment}.{volume}")
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

pub(crate) fn next(
    device: &DeviceIdentity,
    deployment: &ManagedDeployment,
    applied: Option<&Applied>,
) -> Step {
    let containers = &deployment.containers;
    let Target::Run { spec, digest } = &deployment.target else {
        return if containers.is_empty() { Step::Gone } else { Step::Remove(ids(containers.iter())) };
    };
    let matches = |container: &&ListedContainer| container.labels.get(DIGEST_LABEL) == Some(digest);
    let runs = |container: &&ListedContainer| container.state == "running";
    let running = containers.iter().filter(matches).find(runs);
    let Some(container) = running.or_else(|| containers.iter().find(matches)) else {
        return Step::Make;
    };
    if containers.len() > 1 {
        return Step::Remove(ids(containers.iter().filter(|other| other.id != container.id)));
    }
    if container.names.first() != Some(&container_name(&device.device_id, &deployment.name)) {
        return Step::Rename(container.id.clone());
    }
    let applied = applied.filter(|applied| applied.container == container.id);
    match container.state.as_str() {
        "running" => Step::Keep,
        "paused" => Step::Unpause(container.id.clone()),
        "created" | "configured" | "initialized" => {
            // After a power cut, podman 4 shows this state for containers that were running.
            let ran = applied.is_some_and(|applied| applied.boot_id != device.boot_id);
            match spec.restart {
                Restart::Never if ran => Step::Complete,
                _ => Step::Start { id: container.id.clone(), ended: None },
            }
        }
        _ if has_ended(container) => {
            if stays_ended(spec.restart, container.exit_code, applied, &device.boot_id) {
                Step::Complete
            } else {
                Step::Start { id: container.id.clone(), ended: Some(container.exit_code) }
            }
        }
        "stopping" | "removing" => Step::Wait,
        // `unknown`, or a state of a later podman: replace the container.
        _ => Step::Make,
    }
}

/// Returns whether the container has ended. Podman shows `stopped` for an exited container until it has
/// cleaned up.
pub(crate) fn has_ended(container: &ListedContainer) -> bool {
    ["exited", "stopped"].contains(&container.state.as_str())
}

fn stays_ended(restart: Restart, exit_code: i32, applied: Option<&Applied>, boot_id: &str) -> bool {
    let completed = applied.is_some_and(|applied| applied.completed);
    let of_this_boot = applied.is_some_and(|applied| applied.boot_id == boot_id);
    match restart {
        Restart::Always => false,
        Restart::OnFailure => completed || exit_code == 0 && of_this_boot,
        Restart::Never => true,
    }
}

fn ids<'a>(containers: impl Iterator<Item = &'a ListedContainer>) -> Vec<String> {
    containers.map(|container| container.id.clone()).collect()
}

/// Builds libpod's SpecGenerator for a deployment's container. The agent and not podman restarts the
/// container, since podman would restart it without a pause.
pub(crate) fn spec_generator(device_id: &str, name: &str, digest: &str, spec: &ContainerSpec) -> Value {
    let mut labels = labels(device_id, name);
    labels.insert(DIGEST_LABEL.to_owned(), digest.to_owned());
    let port = |port: &Port| {
        json!({
            "host_ip": port.address.map(|address| address.to_string()).unwrap_or_default(),
            "host_port": port.host,
            "container_port": port.container,
            "protocol": port.protocol,
        })
    };
    let volume = |volume: &Volume| {
        let options: &[&str] = if volume.read_only { &["ro"] } else { &[] };
        json!({ "Name": volume_name(device_id, name, &volume.name), "Dest": volume.mount, "Options": options })
    };
    let mut generator = json!({
        "name": container_name(device_id, name),
        "image": spec.image,
        "labels": labels,
        "env": spec.env,
        "portmappings": spec.ports.iter().map(port).collect::<Vec<_>>(),
        "volumes": spec.volumes.iter().map(volume).collect::<Vec<_>>(),
        "restart_policy": "no",
        "no_new_privileges": true,
        "log_configuration": { "driver": "k8s-file", "size": LOG_BYTES },
    });
    if !spec.command.is_empty() {
        generator["command"] = json!(spec.command);
    }
    if let Some(signal) = spec.stop_signal {
        generator["stop_signal"] = json!(signal.number());
    }
    if let Some(seconds) = spec.stop_seconds {
        generator["stop_timeout"] = json!(seconds);
    }
    if let Some(files) = spec.limits.open_files {
        generator["r_limits"] = json!([{ "type": "nofile", "soft": files, "hard": files }]);
    }
    let resources = resource_limits(&spec.limits);
    if !resources.is_empty() {
        generator["resource_limits"] = resources.into();
    }
    generator
}

fn resource_limits(limits: &Limits) -> Map<String, Value> {
    let mut resources = Map::new();
    if let Some(mib) = limits.memory_mib {
        resources.insert("memory".to_owned(), json!({ "limit": u64::from(mib) << 20 }));
    }
    if let Some(millicpus) = limits.millicpus {
        let quota = u64::from(millicpus) * CPU_PERIOD / 1000;
        resources.insert("cpu".to_owned(), json!({ "quota": quota, "period": CPU_PERIOD }));
    }
    if let Some(processes) = limits.processes {
        resources.insert("pids".to_owned(), json!({ "limit": processes }));
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::{Deployment, Document, Refusal};

    fn target(restart: Restart) -> Target {
        let spec = ContainerSpec { restart, ..ContainerSpec::of("localhost/a:1") };
        Target::Run { spec, digest: "d1".into() }
    }

    fn listed(id: &str, digest: &str, state: &str, exit_code: i32) -> ListedContainer {
        ListedContainer {
            id: id.into(),
            names: vec!["iot-pi-7.web".into()],
            state: state.into(),
            exit_code,
            labels: [(DIGEST_LABEL.to_owned(), digest.to_owned())].into(),
        }
    }

    fn step(target: &Target, containers: &[ListedContainer], applied: Option<&Applied>) -> Step {
        let device = DeviceIdentity { device_id: "pi-7".into(), boot_id: "boot-2".into() };
        let (target, containers) = (target.clone(), containers.to_vec());
        next(&device, &ManagedDeployment { name: "web".into(), revision: 1, target, containers }, applied)
    }

    #[test]
    fn every_state_has_a_next_step() {
        let run = target(Restart::Always);
        let start = |id: &str, ended| Step::Start { id: id.into(), ended };
        let table: Vec<(Vec<ListedContainer>, Step)> = vec![
            (vec![], Step::Make),
            (vec![listed("a", "d1", "running", 0)], Step::Keep),
            (vec![listed("a", "d0", "running", 0)], Step::Make),
            (vec![listed("a", "d1", "created", 0)], start("a", None)),
            (vec![listed("a", "d1", "exited", 0)], start("a", Some(0))),
            (vec![listed("a", "d1", "exited", 3)], start("a", Some(3))),
            (vec![listed("a", "d1", "paused", 0)], Step::Unpause("a".into())),
            (vec![listed("a", "d1", "stopping", 0)], Step::Wait),
            (vec![listed("a", "d1", "unknown", 0)], Step::Make),
            (
                vec![
                    listed("a", "d1", "exited", 0),
                    listed("b", "d1", "running", 0),
                    listed("c", "d0", "running", 0),
                ],
                Step::Remove(vec!["a".into(), "c".into()]),
            ),
            (
                vec![ListedContainer { names: vec!["mine".into()], ..listed("a", "d1", "running", 0) }],
                Step::Rename("a".into()),
            ),
            (
                vec![ListedContainer { names: vec![], ..listed("a", "d1", "running", 0) }],
                Step::Rename("a".into()),
            ),
        ];
        for (containers, expected) in table {
            assert_eq!(step(&run, &containers, None), expected, "{containers:?}");
        }
    }

    #[test]
    fn containers_of_other_targets_are_removed() {
        for target in [Target::Removed, Target::Purged, Target::Refused(Refusal("no".into()))] {
            assert_eq!(
                step(&target, &[listed("a", "d1", "running", 0)], None),
                Step::Remove(vec!["a".into()])
            );
            assert_eq!(step(&target, &[], None), Step::Gone);
        }
    }

    #[test]
    fn a_container_that_ended_follows_its_restart_policy() {
        let applied = |boot: &str, completed| Applied {
            digest: "d1".into(),
            container: "a".into(),
            boot_id: boot.into(),
            completed,
        };
        let (this_boot, cut_off, done) =
            (applied("boot-2", false), applied("boot-1", false), applied("boot-1", true));
        let table = [
            (Restart::Always, 0, Some(&done), false),
            (Restart::OnFailure, 0, Some(&this_boot), true),
            (Restart::OnFailure, 1, Some(&this_boot), false),
            (Restart::OnFailure, 0, Some(&cut_off), false),
            (Restart::OnFailure, 0, Some(&done), true),
            (Restart::OnFailure, 1, Some(&done), true),
            (Restart::OnFailure, 0, None, false),
            (Restart::Never, 1, Some(&this_boot), true),
            (Restart::Never, 0, Some(&cut_off), true),
        ];
        for (restart, exit_code, applied, stays) in table {
            let step = step(&target(restart), &[listed("a", "d1", "exited", exit_code)], applied);
            let expected =
                if stays { Step::Complete } else { Step::Start { id: "a".into(), ended: Some(exit_code) } };
            assert_eq!(step, expected, "{restart:?} {exit_code} {applied:?}");
        }
    }

    #[test]
    fn the_generator_follows_the_document() {
        let text = br#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1","command":["/a"],"env":{"K":"v"},
            "ports":[{"host":8080,"container":80,"address":"127.0.0.1"}],"volumes":[{"name":"data","mount":"/d","read_only":true}],
            "stop_signal":"SIGINT","stop_seconds":30,
            "limits":{"memory_mib":64,"millicpus":250,"processes":9,"open_files":99}}}"#;
        let Deployment::PodmanContainer(spec) = Document::parse(text).unwrap().deployment;
        let made = spec_generator("pi-7", "web", "d1", &spec);
        assert_eq!(made["labels"][DEVICE_LABEL], "pi-7");
        assert_eq!(made["labels"][DIGEST_LABEL], "d1");
        assert_eq!(
            made["portmappings"][0],
            json!({"host_ip":"127.0.0.1","host_port":8080,"container_port":80,"protocol":"tcp"})
        );
        assert_eq!(made["volumes"][0], json!({"Name":"iot-pi-7.web.data","Dest":"/d","Options":["ro"]}));
        assert_eq!((&made["stop_signal"], &made["stop_timeout"]), (&json!(2), &json!(30)));
        assert_eq!(
            made["resource_limits"],
            json!({"memory":{"limit":64 << 20},"cpu":{"quota":25000,"period":100_000},"pids":{"limit":9}})
        );
        assert_eq!(made["r_limits"][0]["hard"], 99);
        let least = spec_generator("pi-7", "web", "d1", &ContainerSpec::of("localhost/a:1"));
        for absent in ["resource_limits", "command", "stop_signal", "stop_timeout"] {
            assert!(least.get(absent).is_none(), "{absent}");
        }
    }
}
