//! Makes the container of a document beside the containers that run, without touching them.

use agent_protocol::deployment::Port;
use agent_protocol::{ContainerSpec, Phase};
use anyhow::{Context as _, Result, bail};
use tokio::task::spawn_blocking;

use super::Reconciler;
use super::tags::DeploymentImage;
use crate::desired::Target;
use crate::generator::{NewContainer, spec_generator};
use crate::managed::ManagedDeployment;
use crate::plan::{self, has_digest};
use crate::podman::{ListedContainer, Mount, is_name_in_use, is_refusal};
use crate::ports;
use crate::progress::Loop;

/// The length of the name of an anonymous volume, which podman makes of random hex digits.
const ANONYMOUS_NAME_LENGTH: usize = 64;

impl Reconciler {
    /// Gets the image and creates a container. Then removes the containers that were made for this document
    /// before and that cannot be used. If this fails, everything goes on as before.
    pub(super) async fn make(&self, deployment: &mut ManagedDeployment) -> Result<Option<Phase>> {
        let spec = deployment.target.spec().context("there is no document to run")?;
        let omits_memory = self.must_omit_memory(spec).await?;
        self.fetch_again(deployment, spec).await?;
        match self.get_image(deployment).await? {
            DeploymentImage::Present => {}
            DeploymentImage::Downloading => return Ok(Some(Phase::Pending)),
            DeploymentImage::TargetChanged => return Ok(None),
        }
        let name = &deployment.name;
        let Target::Run { spec, digest, image } = &deployment.target else {
            bail!("there is no document to run");
        };
        let is_own = |container: &&ListedContainer| has_digest(container, Some(digest));
        let own: Vec<_> = deployment.containers.iter().filter(is_own).cloned().collect();
        let was_made = deployment.applied.as_ref().is_some_and(|applied| applied.digest == *digest);
        if own.is_empty() && was_made {
            self.record(&format!("{name}: its container is gone; creating it again"));
        }
        self.check_ports(deployment, spec).await?;
        self.create_volumes(name, spec).await?;
        let container_name = free_name(&self.device.device_id, deployment);
        let mut generator = spec_generator(&NewContainer {
            device_id: &self.device.device_id,
            deployment: name,
            name: &container_name,
            digest,
            spec,
            omits_memory,
            anonymous_volumes: &self.anonymous_volumes(deployment, spec).await?,
        });
        if let Some(id) = image {
            // The tag may have moved to another image meanwhile.
            generator["image"] = id.as_str().into();
        }
        self.progress.tick(Loop::Reconciler);
        if let Err(error) = self.podman.create(&generator).await {
            if !(is_name_in_use(&error) && self.remove_leftover_named(&container_name).await?) {
                return Err(error);
            }
            self.podman.create(&generator).await?;
        }
        if omits_memory {
            self.record_omitted_memory(name);
        }
        // Podman does not sync what it makes. A power cut would leave a container of empty files (podman#8005).
        let store = self.store.clone();
        spawn_blocking(move || store.sync_file_system()).await??;
        self.progress.tick(Loop::Reconciler);
        self.remove_all(&own).await?;
        self.state().backoff(deployment).made();
        Ok(None)
    }

    async fn check_ports(&self, deployment: &ManagedDeployment, spec: &ContainerSpec) -> Result<()> {
        for port in ports_of_others(deployment, spec) {
            if let Some(reason) = ports::unavailable(port) {
                let holder = self.holder(port.host).await?;
                bail!("{}", holder.map_or(reason.clone(), |holder| format!("{reason}; {holder}")));
            }
        }
        Ok(())
    }

    /// Returns the remedy if a container holds a port of the device.
    async fn holder(&self, port: u16) -> Result<Option<String>> {
        if let Some(remedy) = self.state().foreign.holder(port) {
            return Ok(Some(remedy));
        }
        Ok(deployment_with_port(&self.podman.all_containers().await?, port)
            .map(|name| format!("the deployment {name} holds it: delete or change that one first")))
    }

    async fn create_volumes(&self, name: &str, spec: &ContainerSpec) -> Result<()> {
        if spec.volumes.is_empty() {
            return Ok(());
        }
        let device_id = &self.device.device_id;
        let _guard = self.volumes.lock().await;
        let existing = self.podman.volumes(&plan::device_filter(device_id)).await?;
        for volume in &spec.volumes {
            let volume = plan::volume_name(device_id, name, &volume.name);
            if existing.iter().any(|known| known.name == volume) {
                continue;
            }
            if self.podman.has_volume(&volume).await? {
                // Podman can neither rename a volume nor change its labels.
                bail!(
                    "the volume {volume} lacks the agent's labels: podman volume export, rm, create --label \
                     {}={device_id} --label {}={name}, import",
                    plan::DEVICE_LABEL,
                    plan::DEPLOYMENT_LABEL
                );
            }
            self.podman.create_volume(&volume, &plan::labels(device_id, name)).await?;
        }
        Ok(())
    }

    /// Returns the anonymous volumes of the deployment's container if that was made from the same image.
    async fn anonymous_volumes(
        &self,
        deployment: &ManagedDeployment,
        spec: &ContainerSpec,
    ) -> Result<Vec<Mount>> {
        let Some(container) = deployment.shown_container(&self.device.device_id) else {
            return Ok(Vec::new());
        };
        let details = match self.podman.details(&container.id).await {
            Ok(details) => details,
            // A power cut may have torn the container. Such a container can only be removed.
            Err(error) if is_refusal(&error) => {
                self.record(&format!("{}: its anonymous volumes are unknown: {error:#}", deployment.name));
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let image = self.podman.image(deployment.target.image().unwrap_or(&spec.image)).await?;
        let (Some(details), Some(image)) = (details, image) else { return Ok(Vec::new()) };
        if details.image != image.id {
            return Ok(Vec::new());
        }
        Ok(details.mounts.into_iter().filter(|mount| is_anonymous(mount, spec)).collect())
    }
}

/// Returns the ports of a document that the deployment's own containers do not hold.
fn ports_of_others<'a>(
    deployment: &ManagedDeployment,
    spec: &'a ContainerSpec,
) -> impl Iterator<Item = &'a Port> {
    let containers = &deployment.containers;
    // A container whose start has failed may still hold its ports, although podman says that it does not run. It is
    // removed before the new one is started.
    let is_made_again = containers.iter().any(|container| has_digest(container, deployment.target.digest()));
    let running: Vec<_> = containers.iter().filter(|container| plan::is_active(container)).cloned().collect();
    // A container without a network namespace of its own is listed without ports.
    let previous = deployment.previous.as_ref().and_then(|previous| previous.spec());
    let previous: Vec<_> =
        previous.map_or(&[][..], |spec| &spec.ports).iter().map(|port| port.host).collect();
    spec.ports.iter().filter(move |port| {
        let is_held = running.iter().any(|container| container.holds_port(port.host));
        !is_made_again && !is_held && (running.is_empty() || !previous.contains(&port.host))
    })
}

/// Returns the name of the deployment whose running container holds a port of the device.
fn deployment_with_port(listed: &[ListedContainer], port: u16) -> Option<&String> {
    let holds = |container: &&ListedContainer| container.state == "running" && container.holds_port(port);
    listed.iter().find(holds)?.labels.get(plan::DEPLOYMENT_LABEL)
}

/// Returns the first name of a deployment's container that no container of the deployment has.
fn free_name(device_id: &str, deployment: &ManagedDeployment) -> String {
    let name = &deployment.name;
    let names = [plan::container_name, plan::name_of_new, plan::name_of_old].map(|of| of(device_id, name));
    let is_free = |wanted: &&String| {
        deployment.containers.iter().all(|container| container.names.first() != Some(wanted))
    };
    names.iter().find(is_free).unwrap_or(&names[0]).clone()
}

/// Returns whether a mount is an anonymous volume that the document does not replace by a named one.
fn is_anonymous(mount: &Mount, spec: &ContainerSpec) -> bool {
    let is_hex =
        mount.name.len() == ANONYMOUS_NAME_LENGTH && mount.name.bytes().all(|c| c.is_ascii_hexdigit());
    mount.kind == "volume" && is_hex && spec.volumes.iter().all(|volume| volume.mount != mount.destination)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{DesiredEntry, Operation};
    use crate::podman::ListedPort;
    use agent_protocol::deployment::{Protocol, Volume};

    #[test]
    fn only_anonymous_volumes_are_taken_over() {
        let mount = |kind: &str, name: &str, destination: &str| Mount {
            kind: kind.into(),
            name: name.into(),
            destination: destination.into(),
        };
        let volumes = vec![Volume { name: "data".into(), mount: "/data".into(), read_only: false }];
        let spec = ContainerSpec { volumes, ..ContainerSpec::of("localhost/a:1") };
        let hex = "5f".repeat(32);
        assert!(is_anonymous(&mount("volume", &hex, "/cache"), &spec));
        assert!(!is_anonymous(&mount("volume", &hex, "/data"), &spec), "it is named now");
        assert!(!is_anonymous(&mount("volume", "iot-pi-7.web.data", "/cache"), &spec));
        assert!(!is_anonymous(&mount("bind", &hex, "/cache"), &spec));
    }

    #[test]
    fn the_deployment_that_holds_a_port_is_found() {
        let container = |state: &str| ListedContainer {
            state: state.into(),
            labels: [(plan::DEPLOYMENT_LABEL.to_owned(), "web".to_owned())].into(),
            ports: vec![ListedPort { host_port: 8080, range: 2 }],
            ..ListedContainer::default()
        };
        let listed = [container("exited"), container("running")];
        assert_eq!(deployment_with_port(&listed, 8081).unwrap(), "web");
        assert_eq!(deployment_with_port(&listed, 8082), None);
        assert_eq!(deployment_with_port(&listed[..1], 8081), None);
    }

    #[test]
    fn the_ports_of_the_deployments_own_containers_are_not_checked() {
        let port = |host| Port { host, container: 80, address: None, protocol: Protocol::Tcp };
        let spec =
            ContainerSpec { ports: vec![port(8080), port(9090)], ..ContainerSpec::of("localhost/a:1") };
        let checked = |state: &str, digest: &str, ports: Vec<ListedPort>| {
            let target = Target::Run { spec: spec.clone(), digest: "d1".into(), image: None };
            let entry = DesiredEntry::after(None, 1, Operation::Delete, target);
            let container = ListedContainer {
                state: state.into(),
                labels: [(plan::DIGEST_LABEL.to_owned(), digest.to_owned())].into(),
                ports,
                ..ListedContainer::default()
            };
            let deployment =
                ManagedDeployment { containers: vec![container], ..ManagedDeployment::new("web", &entry) };
            ports_of_others(&deployment, &spec).map(|port| port.host).collect::<Vec<_>>()
        };
        let held = || vec![ListedPort { host_port: 8080, range: 1 }];
        assert_eq!(checked("running", "d0", held()), [9090]);
        assert_eq!(checked("exited", "d0", held()), [8080, 9090]);
        assert_eq!(checked("created", "d1", held()), [0; 0], "its start has failed");
    }
}
