//! Repairs podman's storage: fetches an image again, and requests a reset of the storage.

use std::time::Duration;

use agent_protocol::ContainerSpec;
use anyhow::Result;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep};

use super::Reconciler;
use crate::desired::Change;
use crate::managed::ManagedDeployment;
use crate::plan::{self, has_digest};
use crate::progress::Loop;

/// The time in which podman's service ends if it gets no request (`--time 60` in `dist/iot-podman.service`).
const PODMAN_ENDS: Duration = Duration::from_secs(70);

impl Reconciler {
    /// Deletes the image of a deployment whose containers have failed several times, so that it is fetched again.
    pub(super) async fn fetch_again(
        &self,
        deployment: &ManagedDeployment,
        spec: &ContainerSpec,
    ) -> Result<()> {
        let name = &deployment.name;
        if !self.state().damage.must_fetch_again(name, &spec.image) {
            return Ok(());
        }
        let digest = deployment.target.digest();
        let failed: Vec<_> = deployment
            .containers
            .iter()
            .filter(|container| has_digest(container, digest) && !plan::is_active(container))
            .cloned()
            .collect();
        self.remove_all(&failed).await?;
        let image = &spec.image;
        if self.podman.remove_unused_image(image).await? {
            self.record(&format!(
                "{name}: deleted the image {image}, which may be damaged, to fetch it again"
            ));
        }
        Ok(())
    }

    /// Takes podman's answer to the list of the containers. Ends a podman that lets requests wait.
    pub(super) fn judge_answer(&self, error: Option<&anyhow::Error>) {
        let now = Instant::now();
        // A podman without a socket cannot reset its storage either.
        let is_silent = error.is_some() && self.podman.has_socket();
        let has_waited = error.is_some_and(|error| error.chain().any(|cause| cause.is::<Elapsed>()));
        let must_end = {
            let damage = &mut self.state().damage;
            damage.answered(!is_silent, now);
            damage.must_end(has_waited, now)
        };
        if must_end {
            match self.podman.end_service() {
                Ok(()) => self.record("ended podman, which no longer answers"),
                Err(error) => self.record(&format!("podman no longer answers: {error:#}")),
            }
        }
    }

    /// Requests a reset of podman's storage if it is beyond repair. Returns whether podman must end for the reset.
    pub(super) async fn request_reset(&self) -> bool {
        let (reason, is_silent) = {
            let damage = &self.state().damage;
            (damage.is_beyond_repair(Instant::now()), damage.is_silent())
        };
        let reset = self.reset.clone();
        let Some(reason) = reason else {
            if !is_silent && self.reset.is_requested() {
                let withdrawn = spawn_blocking(move || reset.withdraw()).await;
                match withdrawn.unwrap_or_else(|error| Err(error.into())) {
                    Ok(true) => self.record("podman's storage was not reset, since podman has not ended"),
                    Ok(false) => {}
                    Err(error) => self.record(&format!("withdraw the reset of podman's storage: {error}")),
                }
            }
            return false;
        };
        let text = reason.clone();
        let requested = spawn_blocking(move || reset.request(&text)).await;
        if let Err(error) = requested.unwrap_or_else(|error| Err(error.into())) {
            let refusal = format!("podman's storage is beyond repair ({reason}): {error:#}");
            if self.state().damage.is_new_refusal(&refusal) {
                self.record(&refusal);
            }
            return false;
        }
        self.state().damage.requested();
        self.record(&format!(
            "podman's storage is beyond repair ({reason}); it is reset, and the volumes stay"
        ));
        !is_silent
    }

    /// Stops the containers, and sends no request to podman until its service has ended and has reset the storage, or
    /// for a limited time. Takes the changes of the desired state meanwhile.
    pub(super) async fn wait_for_reset(&self, changes: &mut mpsc::Receiver<Change>) {
        // Podman's service does not end while a download runs.
        self.images.lock().await.abort();
        let filter = plan::device_filter(&self.device.device_id);
        for container in self.podman.containers(&filter).await.unwrap_or_default() {
            self.progress.tick(Loop::Reconciler);
            if let Err(error) = self.podman.stop(&container.id).await {
                tracing::debug!("{error:#}");
            }
        }
        let end = Instant::now() + PODMAN_ENDS;
        while self.reset.is_requested() && Instant::now() < end {
            self.progress.tick(Loop::Reconciler);
            if let Ok(change) = changes.try_recv() {
                self.take(change, changes).await;
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// After a reset, creates the agent's volumes in podman again. Their content has stayed. If a volume cannot be
    /// created here, it is created together with its container.
    pub(super) async fn finish_reset(&self) {
        let reset = self.reset.clone();
        let Ok(Some(done)) = spawn_blocking(move || reset.done()).await else { return };
        let device_id = &self.device.device_id;
        self.state().end_pauses();
        let mut kept = 0;
        for volume in &done.volumes {
            let Some(deployment) = plan::deployment_of_volume(device_id, volume) else { continue };
            // The agent may have ended before it recorded that it has dealt with the reset.
            if !self.podman.has_volume(volume).await.unwrap_or_default() {
                let made = self.podman.create_volume(volume, &plan::labels(device_id, deployment)).await;
                if let Err(error) = made {
                    self.record(&format!("{error:#}"));
                    continue;
                }
            }
            kept += 1;
        }
        let reset = self.reset.clone();
        match spawn_blocking(move || reset.finish()).await.unwrap_or_else(|error| Err(error.into())) {
            Ok(()) => {
                self.record(&format!(
                    "podman's storage was reset ({}); {kept} volume(s) were kept",
                    done.reason
                ));
            }
            Err(error) => self.record(&format!("record the reset of podman's storage: {error}")),
        }
    }
}
