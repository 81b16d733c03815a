//! Carries out the steps of [`crate::plan`].

use agent_protocol::Phase;
use anyhow::Result;
use tokio::time::Instant;

use super::{MAX_PODMAN_PAUSE, Reconciler};
use crate::desired::Target;
use crate::managed::ManagedDeployment;
use crate::plan::{self, Step};
use crate::podman::{ListedContainer, is_name_in_use};
use crate::progress::Loop;

impl Reconciler {
    /// Carries out a step. Returns the deployment's phase if no further step follows.
    pub(super) async fn take_step(
        &self,
        deployment: &mut ManagedDeployment,
        step: &Step,
    ) -> Result<Option<Phase>> {
        let name = deployment.name.clone();
        let mut phase = None;
        match step {
            Step::Keep(id) => phase = self.keep(deployment, id),
            Step::Complete(id) => phase = self.complete(deployment, id),
            Step::Lost(_) => {
                // Whether the document works is unknown. The deployment can still go back to the previous one.
                self.state().backoff(deployment).reset();
                phase = Some(Phase::Lost);
            }
            Step::Wait => {
                self.state().look_again_in(MAX_PODMAN_PAUSE);
                phase = Some(Phase::Pending);
            }
            Step::Gone => phase = Some(self.without_container(deployment).await?),
            Step::Make => phase = self.make(deployment).await?,
            Step::Retire(id) => self.retire(deployment, id).await?,
            Step::DropPrevious => {
                let mut state = self.state();
                state.unsaved |= state.desired.drop_previous(&name);
            }
            Step::RollBack { id, exit_code } => {
                let mut reason =
                    format!("its container has ended within its probation, with exit code {exit_code}");
                // The container is removed, and its output with it.
                match self.podman.logs(id, 1).await.as_deref() {
                    Ok([.., last]) => reason = format!("{reason}; its last output: {last}"),
                    Ok([]) => {}
                    Err(error) => tracing::debug!("{error:#}"),
                }
                self.state().roll_back(deployment, &reason, None);
            }
            Step::Start { id, ended } => {
                if let Some(code) = ended {
                    let error = format!("its container has ended with exit code {code}");
                    self.state().backoff(deployment).last_error = Some(error);
                }
                self.start(deployment, id, ended.is_some()).await?;
            }
            Step::Unpause(id) => self.podman.unpause(id).await?,
            Step::Rename { id, to } => self.rename(deployment, id, to).await?,
            Step::Remove(ids) => {
                let surplus = deployment.containers.iter().filter(|container| ids.contains(&container.id));
                self.remove_all(&surplus.cloned().collect::<Vec<_>>()).await?;
                let plural = if ids.len() == 1 { "" } else { "s" };
                self.record(&format!("{name}: removed {} container{plural}", ids.len()));
            }
        }
        if phase.is_none() {
            // The records must be on disk before the next step changes the containers.
            self.save().await;
        }
        Ok(phase)
    }

    /// Records that the container runs. After its probation, returns `None`: the previous container is surplus.
    fn keep(&self, deployment: &ManagedDeployment, id: &str) -> Option<Phase> {
        {
            let mut state = self.state();
            state.backoff(deployment).running(Instant::now());
            state.damage.works(&deployment.name);
        }
        // An earlier process of the agent may have started the container and ended before it recorded the
        // start.
        self.note_started(deployment, id);
        let Target::Run { spec, .. } = &deployment.target else { return Some(Phase::Running) };
        if !deployment.applied.as_ref().is_none_or(|applied| applied.unproven) {
            return Some(Phase::Running);
        }
        let left = self.state().backoff(deployment).probation_left(Instant::now(), spec.probation());
        if let Some(left) = left {
            self.state().look_again_in(left);
            return Some(Phase::Running);
        }
        (!self.prove(deployment)).then_some(Phase::Running)
    }

    fn complete(&self, deployment: &ManagedDeployment, id: &str) -> Option<Phase> {
        {
            let mut state = self.state();
            state.backoff(deployment).reset();
            let digest = deployment.target.digest().unwrap_or_default();
            state.unsaved |= state.desired.completed(&deployment.name, digest, id);
        }
        let container = deployment.containers.iter().find(|container| container.id == *id);
        // A container that has failed does not become the one to which the deployment can go back.
        let succeeded = container.is_some_and(|container| container.exit_code == 0);
        (!(succeeded && self.prove(deployment))).then_some(Phase::Completed)
    }

    /// Records that the container has passed its probation. Returns whether that was new.
    fn prove(&self, deployment: &ManagedDeployment) -> bool {
        let mut state = self.state();
        let digest = deployment.target.digest().unwrap_or_default();
        let is_new = state.desired.prove(&deployment.name, digest);
        state.unsaved |= is_new;
        if is_new && deployment.previous.is_some() {
            let (name, revision) = (&deployment.name, deployment.target_revision);
            state.events.push(&format!("{name}: revision {revision} has passed its probation"));
        }
        is_new
    }

    /// Stops the previous container, whose place the new one takes.
    async fn retire(&self, deployment: &ManagedDeployment, id: &str) -> Result<()> {
        {
            let mut state = self.state();
            state.unsaved |= state.desired.retire_previous(&deployment.name);
        }
        // After a power cut, the record tells that the container has not ended by itself.
        self.save().await;
        self.progress.tick(Loop::Reconciler);
        self.podman.stop(id).await
    }

    pub(super) async fn remove_all(&self, containers: &[ListedContainer]) -> Result<()> {
        for container in containers {
            self.progress.tick(Loop::Reconciler);
            self.podman.remove(container).await?;
        }
        Ok(())
    }

    async fn rename(&self, deployment: &ManagedDeployment, id: &str, to: &str) -> Result<()> {
        let is_ours = deployment.containers.iter().find(|container| container.id == *id);
        let known = [plan::name_of_new, plan::name_of_old, plan::container_name]
            .map(|of| of(&self.device.device_id, &deployment.name));
        {
            let mut state = self.state();
            // If the renaming fails because the name is taken, the next step creates another container.
            state.backoff(deployment).needs_new_container = true;
            if !is_ours.and_then(|container| container.names.first()).is_some_and(|name| known.contains(name))
            {
                let name = &deployment.name;
                state.events.push(&format!("{name}: its container was renamed; renaming it back to {to}"));
            }
        }
        if let Err(error) = self.podman.rename(id, to).await {
            if !(is_name_in_use(&error) && self.remove_leftover_named(to).await?) {
                return Err(error);
            }
            self.podman.rename(id, to).await?;
        }
        self.state().backoff(deployment).needs_new_container = false;
        Ok(())
    }

    async fn start(&self, deployment: &ManagedDeployment, id: &str, restart: bool) -> Result<()> {
        let name = &deployment.name;
        let container = deployment.containers.iter().find(|container| container.id == *id);
        let is_unlimited =
            container.is_some_and(|container| container.labels.contains_key(plan::UNLIMITED_LABEL));
        if is_unlimited && self.can_limit_memory().await? {
            // The container was made before the device had the memory controller.
            self.state().backoff(deployment).needs_new_container = true;
            return Ok(());
        }
        {
            let mut state = self.state();
            state.backoff(deployment).started(Instant::now(), restart);
            let digest = deployment.target.digest().unwrap_or_default();
            state.unsaved |= state.desired.starting(name, digest, id, &self.device.boot_id);
        }
        if container.is_some_and(plan::awaits_clean_up)
            && let Err(error) = self.podman.wait_for_clean_up(id).await
        {
            tracing::debug!("{name}: {error:#}");
        }
        // The record must be on disk before the start. Without it, the agent cannot interpret the container's
        // state after a power cut.
        self.save().await;
        self.progress.tick(Loop::Reconciler);
        if let Err(error) = self.podman.start(id).await {
            self.state().backoff(deployment).needs_new_container = true;
            return Err(error);
        }
        if restart {
            self.record(&format!("{name}: restarted its container"));
        } else {
            self.record(&format!("{name}: started revision {}", deployment.target_revision));
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

    /// Finishes a deployment that has no container any more. If it was purged, deletes its volumes. Forgets a
    /// deployment that was purged or deleted.
    async fn without_container(&self, deployment: &ManagedDeployment) -> Result<Phase> {
        let name = &deployment.name;
        {
            let mut state = self.state();
            state.unsaved |= state.desired.note_gone(name);
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
            }
            Target::Refused(_) => return Ok(Phase::Refused),
            Target::Run { .. } => return Ok(Phase::Removed),
            Target::Removed => {}
        }
        let mut state = self.state();
        state.desired.forget(name);
        state.unsaved = true;
        Ok(Phase::Removed)
    }

    pub(super) fn record(&self, event: &str) {
        self.state().events.push(event);
    }
}
