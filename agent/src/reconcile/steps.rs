//! Carries out the steps of [`crate::plan`].

use agent_protocol::{ContainerSpec, Phase};
use anyhow::{Result, bail};
use tokio::time::Instant;

use super::{MAX_PODMAN_PAUSE, Reconciler};
use crate::desired::Target;
use crate::images::Availability;
use crate::plan::{self, ManagedDeployment, Step};
use crate::podman::ListedContainer;
use crate::progress::Loop;

impl Reconciler {
    /// Carries out a step. Returns the deployment's phase if no further step follows.
    pub(super) async fn take_step(
        &self,
        deployment: &ManagedDeployment,
        step: &Step,
    ) -> Result<Option<Phase>> {
        let name = &deployment.name;
        let id = deployment.containers.first().map(|container| &*container.id);
        match step {
            Step::Keep => {
                self.state().backoff(name).running(Instant::now());
                if let Some(id) = id {
                    // An earlier process of the agent may have started the container and ended before it
                    // recorded the start.
                    self.note_started(deployment, id);
                }
                return Ok(Some(Phase::Running));
            }
            Step::Complete => {
                let mut state = self.state();
                state.backoff(name).reset();
                state.unsaved |= state.desired.completed(name, id);
                return Ok(Some(Phase::Completed));
            }
            Step::Wait => {
                self.state().look_again_in(MAX_PODMAN_PAUSE);
                return Ok(Some(Phase::Pending));
            }
            Step::Gone => return self.without_container(deployment).await.map(Some),
            Step::Make => return self.make(deployment).await,
            Step::Start { id, ended } => {
                if let Some(code) = ended {
                    let error = format!("its container has ended with exit code {code}");
                    self.state().backoff(name).last_error = Some(error);
                }
                self.start(deployment, id, ended.is_some()).await?;
            }
            Step::Unpause(id) => self.podman.unpause(id).await?,
            Step::Rename(id) => self.rename(name, id).await?,
            Step::Remove(ids) => {
                let surplus = deployment.containers.iter().filter(|container| ids.contains(&container.id));
                self.remove_all(&surplus.cloned().collect::<Vec<_>>()).await?;
                let plural = if ids.len() == 1 { "" } else { "s" };
                self.record(&format!("{name}: removed {} container{plural}", ids.len()));
            }
        }
        Ok(None)
    }

    /// Gets the image, removes the old containers, and creates and starts a new one. The old containers run
    /// until the image is available.
    async fn make(&self, deployment: &ManagedDeployment) -> Result<Option<Phase>> {
        let name = &deployment.name;
        let Target::Run { spec, digest } = &deployment.target else {
            bail!("a deployment without a document to run cannot be started");
        };
        if let Availability::Downloading(_) = self.images.lock().await.ensure(&spec.image).await? {
            return Ok(Some(Phase::Pending));
        }
        let applied = self.state().desired.deployments[name].applied.clone();
        if deployment.containers.is_empty() && applied.is_some_and(|applied| applied.digest == *digest) {
            self.record(&format!("{name}: its container is gone; creating it again"));
        }
        self.remove_all(&deployment.containers).await?;
        self.progress.tick(Loop::Reconciler);
        self.create_volumes(name, spec).await?;
        let generator = plan::spec_generator(&self.device.device_id, name, digest, spec);
        let id = self.podman.create(&generator).await?;
        self.note_started(deployment, &id);
        // The record must be on disk before the start. Without it, the agent cannot interpret the container's
        // state after a power cut.
        self.save().await;
        self.start(deployment, &id, false).await?;
        self.record(&format!("{name}: started revision {}", deployment.revision));
        Ok(None)
    }

    async fn remove_all(&self, containers: &[ListedContainer]) -> Result<()> {
        for container in containers {
            self.progress.tick(Loop::Reconciler);
            self.podman.remove(container).await?;
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
            if !existing.iter().any(|known| known.name == volume) {
                self.podman.create_volume(&volume, &plan::labels(device_id, name)).await?;
            }
        }
        Ok(())
    }

    async fn rename(&self, name: &str, id: &str) -> Result<()> {
        let wanted = plan::container_name(&self.device.device_id, name);
        {
            let mut state = self.state();
            // If the renaming fails because the name is taken, the next step creates another container.
            state.backoff(name).needs_new_container = true;
            state.events.push(&format!("{name}: its container was renamed; renaming it back to {wanted}"));
        }
        self.podman.rename(id, &wanted).await?;
        self.state().backoff(name).needs_new_container = false;
        Ok(())
    }

    async fn start(&self, deployment: &ManagedDeployment, id: &str, restart: bool) -> Result<()> {
        let name = &deployment.name;
        self.state().backoff(name).started(Instant::now(), restart);
        if let Err(error) = self.podman.start(id).await {
            self.state().backoff(name).needs_new_container = true;
            return Err(error);
        }
        if restart {
            self.record(&format!("{name}: restarted its container"));
        }
        self.note_started(deployment, id);
        Ok(())
    }

    fn note_started(&self, deployment: &ManagedDeployment, id: &str) {
        if let Target::Run { digest, .. } = &deployment.target {
            let mut state = self.state();
            state.unsaved |= state.desired.started(&deployment.name, digest, id, &self.device.boot_id);
        }
    }

    /// Finishes a deployment that has no container any more. If it was purged, deletes its volumes and
    /// forgets it.
    async fn without_container(&self, deployment: &ManagedDeployment) -> Result<Phase> {
        let name = &deployment.name;
        {
            let mut state = self.state();
            state.unsaved |= state.desired.note_applied(name, None);
        }
        match deployment.target {
            Target::Purged => {
                let _guard = self.volumes.lock().await;
                for volume in self.podman.volumes(&plan::device_filter(&self.device.device_id)).await? {
                    if volume.labels.get(plan::DEPLOYMENT_LABEL) == Some(name) {
                        self.podman.remove_volume(&volume.name).await?;
                        self.record(&format!("{name}: deleted the volume {}", volume.name));
                    }
                }
                let mut state = self.state();
                state.desired.forget(name);
                state.unsaved = true;
                Ok(Phase::Removed)
            }
            Target::Refused(_) => Ok(Phase::Refused),
            Target::Removed | Target::Run { .. } => Ok(Phase::Removed),
        }
    }

    pub(super) fn record(&self, event: &str) {
        self.state().events.push(event);
    }
}
