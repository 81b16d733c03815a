//! Makes the container of a document beside the containers that run, without touching them.

use agent_protocol::{ContainerSpec, Phase};
use anyhow::{Result, bail};

use super::Reconciler;
use crate::desired::Target;
use crate::generator::{NewContainer, spec_generator};
use crate::images::Availability;
use crate::managed::ManagedDeployment;
use crate::plan::{self, has_digest};
use crate::podman::ListedContainer;
use crate::ports;
use crate::progress::Loop;

impl Reconciler {
    /// Gets the image and creates a container. Then removes the containers that were made for this document
    /// before and that cannot be used. If this fails, everything goes on as before.
    pub(super) async fn make(&self, deployment: &ManagedDeployment) -> Result<Option<Phase>> {
        let name = &deployment.name;
        let Target::Run { spec, digest } = &deployment.target else {
            bail!("a deployment without a document to run cannot be started");
        };
        if let Availability::Downloading(_) = self.images.lock().await.ensure(&spec.image).await? {
            return Ok(Some(Phase::Pending));
        }
        let is_own = |container: &&ListedContainer| has_digest(container, Some(digest));
        let own: Vec<_> = deployment.containers.iter().filter(is_own).cloned().collect();
        let was_made = deployment.applied.as_ref().is_some_and(|applied| applied.digest == *digest);
        if own.is_empty() && was_made {
            self.record(&format!("{name}: its container is gone; creating it again"));
        }
        self.check_ports(deployment, spec)?;
        self.create_volumes(name, spec).await?;
        let container_name = free_name(&self.device.device_id, deployment);
        let generator = spec_generator(&NewContainer {
            device_id: &self.device.device_id,
            deployment: name,
            name: &container_name,
            digest,
            spec,
        });
        self.progress.tick(Loop::Reconciler);
        self.podman.create(&generator).await?;
        self.remove_all(&own).await?;
        self.state().backoff(deployment).made();
        Ok(None)
    }

    /// Checks that the ports are free, except for those that the deployment's own container holds.
    fn check_ports(&self, deployment: &ManagedDeployment, spec: &ContainerSpec) -> Result<()> {
        let running: Vec<_> =
            deployment.containers.iter().filter(|container| plan::is_active(container)).collect();
        let is_held = |number: u16| running.iter().any(|container| container.holds_port(number));
        // A container without a network namespace of its own is listed without ports.
        let previous = deployment.previous.as_ref().and_then(|previous| previous.spec());
        let is_known = |number: u16| {
            !running.is_empty()
                && previous.is_some_and(|spec| spec.ports.iter().any(|port| port.host == number))
        };
        for port in spec.ports.iter().filter(|port| !is_held(port.host) && !is_known(port.host)) {
            if let Some(reason) = ports::unavailable(port) {
                let holder = self.state().foreign.holder(port.host);
                bail!("{}", holder.map_or(reason.clone(), |holder| format!("{reason}; {holder}")));
            }
        }
        Ok(())
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
