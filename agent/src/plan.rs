//! What is to be done about one deployment, out of what is desired and what podman shows: pure. One step at a time, from
//! whatever there is.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::desired::{Applied, Target};
use crate::podman::ListedContainer;
use agent_protocol::deployment::{ContainerSpec, Deployment, Protocol, Restart};

/// On everything that this agent makes: the device. What does not carry it is never touched.
pub const DEVICE_LABEL: &str = "io.iot-agent.device";
/// Whose it is.
pub const DEPLOYMENT_LABEL: &str = "io.iot-agent.deployment";
/// Of which document, by its digest.
pub const DIGEST_LABEL: &str = "io.iot-agent.digest";

/// A container's output that is kept at most.
const LOG_BYTES: u64 = 1 << 20;
/// The period of the scheduler's processor quotas, in microseconds (the kernel's cgroup-v2 document, cpu.max).
const CPU_PERIOD: u64 = 100_000;

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is as desired.
    Keep,
    /// It has ended, and that is as desired.
    Complete,
    /// Podman is about to do something with it.
    Wait,
    /// None fits: get the image, remove what there is, make one and start it.
    Make,
    /// Start the one that fits.
    Start {
        /// Its id.
        id: String,
        /// Its exit code, where it has run and ended.
        ended: Option<i32>,
    },
    /// Let it go on.
    Unpause(String),
    /// It goes by another name.
    Rename(String),
    /// These are too many.
    Remove(Vec<String>),
    /// There is no container, as desired.
    Gone,
}

/// The container's name for a deployment; a `.` is in no part. With the device, so that a card from another one, or a device that
/// was given another name, has none of its names taken.
pub fn container_name(device_id: &str, deployment: &str) -> String {
    format!("iot-{device_id}.{deployment}")
}

/// The volume's name, likewise.
pub fn volume_name(device_id: &str, deployment: &str, volume: &str) -> String {
    format!("iot-{device_id}.{deployment}.{volume}")
}

/// The filter for what is this device's.
pub fn own(device_id: &str) -> String {
    format!("{DEVICE_LABEL}={device_id}")
}

/// The labels of what is made for a deployment.
pub fn labels(device_id: &str, deployment: &str) -> BTreeMap<String, String> {
    [(DEVICE_LABEL, device_id), (DEPLOYMENT_LABEL, deployment)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

/// The next step for the deployment `name`, of which podman has `containers`.
pub fn next(
    device_id: &str,
    name: &str,
    target: &Target,
    containers: &[ListedContainer],
    applied: Option<&Applied>,
    boot_id: &str,
) -> Step {
    let Target::Run(document, digest) = target else {
        return if containers.is_empty() { Step::Gone } else { Step::Remove(ids(containers.iter())) };
    };
    let fits = |container: &&ListedContainer| container.labels.get(DIGEST_LABEL) == Some(digest);
    let runs = |container: &&ListedContainer| container.state == "running";
    let Some(one) = containers.iter().filter(fits).find(runs).or_else(|| containers.iter().find(fits)) else {
        return Step::Make;
    };
    if containers.len() > 1 {
        return Step::Remove(ids(containers.iter().filter(|other| other.id != one.id)));
    }
    if one.names.first() != Some(&container_name(device_id, name)) {
        return Step::Rename(one.id.clone());
    }
    let Deployment::PodmanContainer(spec) = &document.deployment;
    let id = one.id.clone();
    match one.state.as_str() {
        "running" => Step::Keep,
        "paused" => Step::Unpause(id),
        "created" | "configured" | "initialized" => {
            // After a power cut podman 4 shows so what had run.
            let ran = applied.is_some_and(|applied| applied.container == id && applied.boot_id != boot_id);
            match spec.restart {
                Restart::Never if ran => Step::Complete,
                _ => Step::Start { id, ended: None },
            }
        }
        _ if has_ended(one) => {
            let applied = applied.filter(|applied| applied.container == id);
            if stays_ended(spec.restart, one.exit_code, applied, boot_id) {
                Step::Complete
            } else {
                Step::Start { id, ended: Some(one.exit_code) }
            }
        }
        "stopping" | "removing" => Step::Wait,
        // `unknown`, and words of a podman that is not known here: made anew.
        _ => Step::Make,
    }
}

/// `stopped` is podman's word until it has tidied up behind one that has exited.
pub fn has_ended(container: &ListedContainer) -> bool {
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

/// libpod's SpecGenerator for a deployment's container. Restarting it is the agent's, since podman's own has no pause.
pub fn generator(device_id: &str, name: &str, digest: &str, spec: &ContainerSpec) -> Value {
    let mut labels = labels(device_id, name);
    labels.insert(DIGEST_LABEL.to_owned(), digest.to_owned());
    let ports: Vec<_> = spec
        .ports
        .iter()
        .map(|port| {
            json!({
                "host_ip": port.address.map(|address| address.to_string()).unwrap_or_default(),
                "host_port": port.host,
                "container_port": port.container,
                "protocol": match port.protocol { Protocol::Tcp => "tcp", Protocol::Udp => "udp" },
            })
        })
        .collect();
    let volumes: Vec<_> = spec
        .volumes
        .iter()
        .map(|volume| {
            let options: &[&str] = if volume.read_only { &["ro"] } else { &[] };
            json!({ "Name": volume_name(device_id, name, &volume.name), "Dest": volume.mount, "Options": options })
        })
        .collect();
    let mut generator = json!({
        "name": container_name(device_id, name),
        "image": spec.image,
        "labels": labels,
        "env": spec.env,
        "portmappings": ports,
        "volumes": volumes,
        "restart_policy": "no",
        "no_new_privileges": true,
        "log_configuration": { "driver": "k8s-file", "size": LOG_BYTES },
    });
    if !spec.command.is_empty() {
        generator["command"] = json!(spec.command);
    }
    if let Some(files) = spec.limits.open_files {
        generator["r_limits"] = json!([{ "type": "nofile", "soft": files, "hard": files }]);
    }
    let mut resources = serde_json::Map::new();
    if let Some(mib) = spec.limits.memory_mib {
        resources.insert("memory".to_owned(), json!({ "limit": u64::from(mib) << 20 }));
    }
    if let Some(millicpus) = spec.limits.millicpus {
        let quota = u64::from(millicpus) * CPU_PERIOD / 1000;
        resources.insert("cpu".to_owned(), json!({ "quota": quota, "period": CPU_PERIOD }));
    }
    if let Some(processes) = spec.limits.processes {
        resources.insert("pids".to_owned(), json!({ "limit": processes }));
    }
    if !resources.is_empty() {
        generator["resource_limits"] = resources.into();
    }
    generator
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::deployment::{Document, Refusal};

    fn target(restart: Restart) -> Target {
        let spec = ContainerSpec { restart, ..ContainerSpec::of("localhost/a:1") };
        Target::Run(Document::of(Deployment::PodmanContainer(spec)), "d1".into())
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
        next("pi-7", "web", target, containers, applied, "boot-2")
    }

    #[test]
    fn from_whatever_there_is_one_step_leads_on() {
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
    fn what_is_not_to_run_is_removed() {
        for target in [Target::Removed, Target::Forgotten, Target::Refused(Refusal("no".into()))] {
            assert_eq!(
                step(&target, &[listed("a", "d1", "running", 0)], None),
                Step::Remove(vec!["a".into()])
            );
            assert_eq!(step(&target, &[], None), Step::Gone);
        }
    }

    #[test]
    fn a_container_that_ended_stays_so_as_its_policy_says() {
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
    fn a_container_is_made_as_the_document_says() {
        let text = br#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1","command":["/a"],"env":{"K":"v"},
            "ports":[{"host":8080,"container":80,"address":"127.0.0.1"}],"volumes":[{"name":"data","mount":"/d","read_only":true}],
            "limits":{"memory_mib":64,"millicpus":250,"processes":9,"open_files":99}}}"#;
        let Deployment::PodmanContainer(spec) = Document::parse(text).unwrap().deployment;
        let made = generator("pi-7", "web", "d1", &spec);
        assert_eq!(made["labels"][DEVICE_LABEL], "pi-7");
        assert_eq!(made["labels"][DIGEST_LABEL], "d1");
        assert_eq!(
            made["portmappings"][0],
            json!({"host_ip":"127.0.0.1","host_port":8080,"container_port":80,"protocol":"tcp"})
        );
        assert_eq!(made["volumes"][0], json!({"Name":"iot-pi-7.web.data","Dest":"/d","Options":["ro"]}));
        assert_eq!(
            made["resource_limits"],
            json!({"memory":{"limit":64 << 20},"cpu":{"quota":25000,"period":100_000},"pids":{"limit":9}})
        );
        assert_eq!(made["r_limits"][0]["hard"], 99);
        let least = generator("pi-7", "web", "d1", &ContainerSpec::of("localhost/a:1"));
        assert!(least.get("resource_limits").is_none() && least.get("command").is_none());
    }
}
