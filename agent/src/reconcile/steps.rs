//! One step for one deployment, as [`crate::plan`] names it.

use anyhow::{Result, bail};
use tokio::time::Instant;

use super::{MAX_PODMAN_PAUSE, Reconciler};
use crate::desired::Target;
use crate::images::Availability;
use crate::plan::{self, Step};
use crate::podman::ListedContainer;
use crate::progress::Loop;
use agent_protocol::Phase;
use agent_protocol::deployment::Deployment;

impl Reconciler {
    /// Takes a step; where it was the last one, the phase that it ends in.
    pub(super) async fn take_step(
        &self,
        name: &str,
        target: &Target,
        step: &Step,
        containers: &[ListedContainer],
    ) -> Result<Option<Phase>> {
        match step {
            Step::Keep => {
                let mut state = self.state();
                state.backoff(name).runs(Instant::now());
                if let (Target::Run(_, digest), Some(container)) = (target, containers.first()) {
                    // Noted also where another process of this agent's started it and had no time to.
                    state.unsaved |= state.desired.started(name, digest, &container.id, &self.boot_id);
                }
                return Ok(Some(Phase::Running));
            }
            Step::Complete => {
                let mut state = self.state();
                state.backoff(name).settled();
                let container = containers.first().map(|container| &*container.id);
                state.unsaved |= state.desired.completed(name, container);
                return Ok(Some(Phase::Completed));
            }
            Step::Wait => {
                self.state().look_again_in(MAX_PODMAN_PAUSE);
                return Ok(Some(Phase::Pending));
            }
            Step::Gone => return self.gone(name, target).await.map(Some),
            Step::Make => return self.make(name, target, containers).await,
            Step::Start { id, ended } => {
                if let Some(code) = ended {
                    let error = format!("its container has ended with exit code {code}");
                    self.state().backoff(name).error = Some(error);
                }
                self.start(name, target, id, ended.is_some()).await?;
            }
            Step::Unpause(id) => self.podman.unpause(id).await?,
            Step::Rename(id) => {
                let wanted = plan::container_name(&self.device_id, name);
                {
                    let mut state = self.state();
                    // Where the name is taken, only another container gets it.
                    state.backoff(name).remake = true;
                    state
                        .events
                        .push(&format!("{name}: its container has another name, and gets {wanted} back"));
                }
                self.podman.rename(id, &wanted).await?;
                self.state().backoff(name).remake = false;
            }
            Step::Remove(ids) => {
                for container in containers.iter().filter(|container| ids.contains(&container.id)) {
                    self.progress.tick(Loop::Reconciler);
                    self.podman.remove(container).await?;
                }
                self.record(&format!("{name}: {} removed", count(ids.len(), "container")));
            }
        }
        Ok(None)
    }

    /// The image, then out with what does not fit, then the container. Without the image, what ran before goes on.
    async fn make(
        &self,
        name: &str,
        target: &Target,
        containers: &[ListedContainer],
    ) -> Result<Option<Phase>> {
        let Target::Run(document, digest) = target else { bail!("nothing to run was to be made") };
        let Deployment::PodmanContainer(spec) = &document.deployment;
        if self.images.lock().await.ensure(&spec.image).await? == Availability::Fetching {
            return Ok(Some(Phase::Pending));
        }
        let (lost, revision) = {
            let state = self.state();
            let entry = &state.desired.deployments[name];
            let applied = entry.applied.as_ref().is_some_and(|applied| applied.digest == *digest);
            (containers.is_empty() && applied, entry.revision)
        };
        if lost {
            self.record(&format!("{name}: its container is gone, and is made again"));
        }
        for container in containers {
            self.progress.tick(Loop::Reconciler);
            self.podman.remove(container).await?;
        }
        self.progress.tick(Loop::Reconciler);
        let labels = plan::labels(&self.device_id, name);
        if !spec.volumes.is_empty() {
            let _turn = self.volumes.lock().await;
            let there = self.podman.volumes(&plan::own(&self.device_id)).await?;
            for volume in &spec.volumes {
                let volume = plan::volume_name(&self.device_id, name, &volume.name);
                if !there.iter().any(|known| known.name == volume) {
                    self.podman.create_volume(&volume, &labels).await?;
                }
            }
        }
        let id = self.podman.create(&plan::generator(&self.device_id, name, digest, spec)).await?;
        self.note_started(name, target, &id);
        // Before it runs: what podman then shows of it means something only together with this.
        self.save().await;
        self.start(name, target, &id, false).await?;
        self.record(&format!("{name}: revision {revision} is started"));
        Ok(None)
    }

    async fn start(&self, name: &str, target: &Target, id: &str, again: bool) -> Result<()> {
        self.state().backoff(name).started(Instant::now(), again);
        if let Err(error) = self.podman.start(id).await {
            self.state().backoff(name).remake = true;
            return Err(error);
        }
        if again {
            self.record(&format!("{name}: its container is started again"));
        }
        self.note_started(name, target, id);
        Ok(())
    }

    fn note_started(&self, name: &str, target: &Target, id: &str) {
        if let Target::Run(_, digest) = target {
            let mut state = self.state();
            state.unsaved |= state.desired.started(name, digest, id, &self.boot_id);
        }
    }

    /// Without a container: a purged deployment loses its volumes too, and is forgotten.
    async fn gone(&self, name: &str, target: &Target) -> Result<Phase> {
        {
            let mut state = self.state();
            state.unsaved |= state.desired.note_applied(name, None);
        }
        match target {
            Target::Forgotten => {
                let _turn = self.volumes.lock().await;
                for volume in self.podman.volumes(&plan::own(&self.device_id)).await? {
                    if volume.labels.get(plan::DEPLOYMENT_LABEL).is_some_and(|owner| owner == name) {
                        self.podman.remove_volume(&volume.name).await?;
                        self.record(&format!("{name}: the volume {} is deleted", volume.name));
                    }
                }
                let mut state = self.state();
                state.desired.forget(name);
                state.unsaved = true;
                Ok(Phase::Removed)
            }
            Target::Refused(_) => Ok(Phase::Refused),
            Target::Removed | Target::Run(..) => Ok(Phase::Removed),
        }
    }

    fn record(&self, what: &str) {
        self.state().events.push(what);
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
