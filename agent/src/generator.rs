//! The form in which podman gets a container: libpod's SpecGenerator.

use agent_protocol::deployment::{ContainerSpec, Limits, Port, Volume};
use serde_json::{Map, Value, json};

use crate::plan::{DIGEST_LABEL, UNLIMITED_LABEL, labels, volume_name};
use crate::podman::Mount;

/// Upper bound for a container's log file, in bytes.
const LOG_BYTES: u64 = 1 << 20;
/// The period of the scheduler's CPU quotas, in microseconds (the kernel's cgroup-v2 document, cpu.max).
const CPU_PERIOD: u64 = 100_000;

/// A container to create.
pub(crate) struct NewContainer<'a> {
    pub(crate) device_id: &'a str,
    pub(crate) deployment: &'a str,
    /// The container's name.
    pub(crate) name: &'a str,
    /// The digest of the document.
    pub(crate) digest: &'a str,
    pub(crate) spec: &'a ContainerSpec,
    /// True if the container must have no memory limit.
    pub(crate) omits_memory: bool,
    /// The anonymous volumes that the container takes over.
    pub(crate) anonymous_volumes: &'a [Mount],
}

/// Builds libpod's SpecGenerator for a deployment's container. The agent and not podman restarts the
/// container, since podman would restart it without a pause.
pub(crate) fn spec_generator(new: &NewContainer<'_>) -> Value {
    let NewContainer { device_id, deployment, digest, spec, .. } = *new;
    let mut labels = labels(device_id, deployment);
    labels.insert(DIGEST_LABEL.to_owned(), digest.to_owned());
    let mut limits = spec.limits.clone();
    if new.omits_memory && limits.memory_mib.take().is_some() {
        labels.insert(UNLIMITED_LABEL.to_owned(), "memory".to_owned());
    }
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
        json!({ "Name": volume_name(device_id, deployment, &volume.name), "Dest": volume.mount, "Options": options })
    };
    let kept = |mount: &Mount| json!({ "Name": mount.name, "Dest": mount.destination });
    let volumes = spec.volumes.iter().map(volume).chain(new.anonymous_volumes.iter().map(kept));
    let mut generator = json!({
        "name": new.name,
        "image": spec.image,
        "labels": labels,
        "env": spec.env,
        "portmappings": spec.ports.iter().map(port).collect::<Vec<_>>(),
        "volumes": volumes.collect::<Vec<_>>(),
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
    if let Some(files) = limits.open_files {
        generator["r_limits"] = json!([{ "type": "nofile", "soft": files, "hard": files }]);
    }
    let resources = resource_limits(&limits);
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
    use crate::plan::DEVICE_LABEL;
    use agent_protocol::{Deployment, Document};

    fn new_container(spec: &ContainerSpec) -> NewContainer<'_> {
        NewContainer {
            device_id: "pi-7",
            deployment: "web",
            name: "iot-pi-7.web.new",
            digest: "d1",
            spec,
            omits_memory: false,
            anonymous_volumes: &[],
        }
    }

    #[test]
    fn the_generator_follows_the_document() {
        let text = br#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1","command":["/a"],"env":{"K":"v"},
            "ports":[{"host":8080,"container":80,"address":"127.0.0.1"}],"volumes":[{"name":"data","mount":"/d","read_only":true}],
            "stop_signal":"SIGINT","stop_seconds":30,
            "limits":{"memory_mib":64,"millicpus":250,"processes":9,"open_files":99}}}"#;
        let Deployment::PodmanContainer(spec) = Document::parse(text).unwrap().deployment;
        let kept = [Mount { kind: "volume".into(), name: "5f".into(), destination: "/var/lib/x".into() }];
        let made = spec_generator(&NewContainer { anonymous_volumes: &kept, ..new_container(&spec) });
        assert_eq!(made["name"], "iot-pi-7.web.new");
        assert_eq!(made["labels"][DEVICE_LABEL], "pi-7");
        assert_eq!(made["labels"][DIGEST_LABEL], "d1");
        assert_eq!(
            made["portmappings"][0],
            json!({"host_ip":"127.0.0.1","host_port":8080,"container_port":80,"protocol":"tcp"})
        );
        assert_eq!(made["volumes"][0], json!({"Name":"iot-pi-7.web.data","Dest":"/d","Options":["ro"]}));
        assert_eq!(made["volumes"][1], json!({"Name":"5f","Dest":"/var/lib/x"}));
        assert_eq!((&made["stop_signal"], &made["stop_timeout"]), (&json!(2), &json!(30)));
        assert_eq!(
            made["resource_limits"],
            json!({"memory":{"limit":64 << 20},"cpu":{"quota":25000,"period":100_000},"pids":{"limit":9}})
        );
        assert_eq!(made["r_limits"][0]["hard"], 99);
        assert!(made["labels"].get(UNLIMITED_LABEL).is_none());
        let unlimited = spec_generator(&NewContainer { omits_memory: true, ..new_container(&spec) });
        assert_eq!(unlimited["labels"][UNLIMITED_LABEL], "memory");
        assert_eq!(
            unlimited["resource_limits"],
            json!({"cpu":{"quota":25000,"period":100_000},"pids":{"limit":9}})
        );
        let least = spec_generator(&new_container(&ContainerSpec::of("localhost/a:1")));
        for absent in ["resource_limits", "command", "stop_signal", "stop_timeout"] {
            assert!(least.get(absent).is_none(), "{absent}");
        }
    }
}
