//! One step for one deployment, as [`crate::plan`] names it.

use anyhow::{Result, bail};
use tokio::time::Instant;

use super::{PODMAN_AWAY, Reconciler};
use crate::desired::Target;
use crate::images::Availability;
use crate::plan::{self, Step};
use crate::podman::Listed;
use crate::progress::Loop;
use crate::protocol::Phase;
use crate::protocol::deployment::Deployment;

impl Reconciler {
    /// Takes a step; where it was the last one, the phase that it ends in.
    pub(super) async fn take_step(
        &mut self,
        name: &str,
        target: &Target,
        step: &Step,
        containers: &[Listed],
    ) -> Result<Option<Phase>> {
        let now = Instant::now();
        let attempts = self.attempts.entry(name.to_owned()).or_default();
        match step {
            Step::Keep => {
                attempts.runs(now);
                if let (Target::Run(_, digest), Some(container)) = (target, containers.first()) {
                    // Noted also where another process of this agent's started it and had no time to.
                    self.unsaved |= self.desired.started(name, digest, &container.id, &self.boot_id);
                }
                return Ok(Some(Phase::Running));
            }
            Step::Complete => {
                attempts.settled();
                self.unsaved |=
                    self.desired.completed(name, containers.first().map(|container| &*container.id));
                return Ok(Some(Phase::Completed));
            }
            Step::Wait => {
                self.look_again_in(PODMAN_AWAY);
                return Ok(Some(Phase::Pending));
            }
            Step::Gone => return self.gone(name, target).await.map(Some),
            Step::Make => return self.make(name, target, containers).await,
            Step::Start { id, ended } => {
                if let Some(code) = ended {
                    attempts.error = Some(format!("its container has ended with exit code {code}"));
                }
                let (id, again) = (id.clone(), ended.is_some());
                self.start(name, &id, again).await?;
            }
            Step::Unpause(id) => self.podman.unpause(id).await?,
            Step::Rename(id) => {
                // Where the name is taken, only another container gets it.
                attempts.remake = true;
                let wanted = plan::container_name(&self.device_id, name);
                self.events.push(&format!("{name}: its container has another name, and gets {wanted} back"));
                self.podman.rename(id, &wanted).await?;
                self.attempts.entry(name.to_owned()).or_default().remake = false;
            }
            Step::Remove(ids) => {
                for id in ids {
                    self.progress.tick(Loop::Reconciler);
                    self.podman.remove(id).await?;
                }
                self.events.push(&format!("{name}: {} removed", count(ids.len(), "container")));
            }
        }
        Ok(None)
    }

    /// The image, then out with what does not fit, then the container. Without the image, what ran before goes on.
    async fn make(&mut self, name: &str, target: &Target, containers: &[Listed]) -> Result<Option<Phase>> {
        let Target::Run(document, digest) = target else { bail!("nothing to run was to be made") };
        let Deployment::PodmanContainer(spec) = &document.deployment;
        if self.images.ensure(&spec.image).await? == Availability::Fetching {
            return Ok(Some(Phase::Pending));
        }
        let entry = &self.desired.deployments[name];
        let lost =
            containers.is_empty() && entry.applied.as_ref().is_some_and(|applied| applied.digest == *digest);
        let revision = entry.revision;
        if lost {
            self.events.push(&format!("{name}: its container is gone, and is made again"));
        }
        for container in containers {
            self.progress.tick(Loop::Reconciler);
            self.podman.remove(&container.id).await?;
        }
        self.progress.tick(Loop::Reconciler);
        let labels = plan::labels(&self.device_id, name);
        if !spec.volumes.is_empty() {
            let there = self.podman.volumes(&plan::own(&self.device_id)).await?;
            for volume in &spec.volumes {
                let volume = plan::volume_name(&self.device_id, name, &volume.name);
                if !there.iter().any(|known| known.name == volume) {
                    self.podman.create_volume(&volume, &labels).await?;
                }
            }
        }
        let id = self.podman.create(&plan::generator(&self.device_id, name, digest, spec)).await?;
        self.unsaved |= self.desired.started(name, digest, &id, &self.boot_id);
        // Before it runs: what podman then shows of it means something only together with this.
        self.save().await;
        self.start(name, &id, false).await?;
        self.events.push(&format!("{name}: revision {revision} is started"));
        Ok(None)
    }

    async fn start(&mut self, name: &str, id: &str, again: bool) -> Result<()> {
        let attempts = self.attempts.entry(name.to_owned()).or_default();
        attempts.started(Instant::now(), again);
        if let Err(error) = self.podman.start(id).await {
            attempts.remake = true;
            return Err(error);
        }
        if again {
            self.events.push(&format!("{name}: its container is started again"));
        }
        if let Target::Run(_, digest) = self.desired.deployments[name].target(name) {
            self.unsaved |= self.desired.started(name, &digest, id, &self.boot_id);
        }
        Ok(())
    }

    /// Without a container: a purged deployment loses its volumes too, and is forgotten.
    async fn gone(&mut self, name: &str, target: &Target) -> Result<Phase> {
        self.unsaved |= self.desired.note_applied(name, None);
        match target {
            Target::Forgotten => {
                for volume in self.podman.volumes(&plan::own(&self.device_id)).await? {
                    if volume.labels.get(plan::DEPLOYMENT_LABEL).is_some_and(|owner| owner == name) {
                        self.podman.remove_volume(&volume.name).await?;
                        self.events.push(&format!("{name}: the volume {} is deleted", volume.name));
                    }
                }
                self.desired.forget(name);
                self.unsaved = true;
                Ok(Phase::Removed)
            }
            Target::Refused(_) => Ok(Phase::Refused),
            Target::Removed | Target::Run(..) => Ok(Phase::Removed),
        }
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
