//! The images of documents: gets them, and follows the tags of the documents that ask for that.

use std::time::Duration;

use anyhow::{Result, bail};

use super::Reconciler;
use super::state::State;
use crate::device_state::short_id;
use crate::images::{Availability, FollowedTag, NeededImage};
use crate::managed::{ManagedDeployment, Role};

/// The state of the image of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeploymentImage {
    /// Podman has it.
    Present,
    Downloading,
    /// The tag of the document has moved to an image that podman has, and the deployment has another target.
    TargetChanged,
}

impl Reconciler {
    /// Gets the image of a deployment.
    pub(super) async fn get_image(&self, deployment: &mut ManagedDeployment) -> Result<DeploymentImage> {
        let Some(needed) = self.state().needed_image(deployment) else {
            return Ok(DeploymentImage::Present);
        };
        let available = self.images.lock().await.ensure(&needed).await?;
        let (id, problem) = match available {
            Availability::Available(id, problem) => (id, problem),
            Availability::Downloading(bytes) => {
                deployment.downloaded_bytes = Some(bytes);
                return Ok(DeploymentImage::Downloading);
            }
        };
        let (name, reference) = (&needed.deployment, &needed.reference);
        if let Some(error) = problem {
            self.record(&format!("{name}: using the image that the device has: {error:#}"));
        }
        if !needed.follows_tag || needed.id.as_ref() == Some(&id) {
            return Ok(DeploymentImage::Present);
        }
        if !self.state().move_tag(&needed, &id) {
            bail!("the image of this revision is gone, and {reference} is another one now");
        }
        let state = &mut *self.state();
        state.refresh(deployment);
        state.begin(deployment);
        Ok(DeploymentImage::TargetChanged)
    }

    /// Asks the registries about the tags of documents, and gives a deployment whose tag has moved another target.
    pub(super) async fn follow_tags(&self) {
        let followed = self.state().followed_tags();
        for needed in followed {
            let answer = self.images.lock().await.follow(&needed).await;
            match answer {
                Ok(FollowedTag { id, bytes, pause }) => {
                    let state = &mut *self.state();
                    state.look_again_in(pause);
                    // A question about a tag that has not moved downloads nothing.
                    if let Some(line) = state.lines.get_mut(&needed.deployment)
                        && bytes.is_some_and(|bytes| bytes > 0)
                    {
                        line.downloaded_bytes = bytes;
                    }
                    if id.is_some_and(|id| state.move_tag(&needed, &id)) {
                        state.look_again_in(Duration::ZERO);
                    }
                }
                Err(error) => {
                    let (name, reference) = (&needed.deployment, &needed.reference);
                    self.record(&format!("{name}: cannot ask for the tag of {reference}: {error:#}"));
                }
            }
        }
    }
}

impl State {
    /// Returns the image that a deployment needs. If the deployment has gone back to an earlier document, only the
    /// image that the document had is the right one.
    fn needed_image(&self, deployment: &ManagedDeployment) -> Option<NeededImage> {
        let ManagedDeployment { name, target, role, .. } = deployment;
        let desired = self.desired.deployments.get(name).map(|entry| &entry.target);
        let is_desired = *role == Role::Current && desired == Some(target);
        let spec = target.spec()?;
        Some(NeededImage {
            deployment: name.clone(),
            revision: deployment.revision,
            reference: spec.image.clone(),
            id: target.image().cloned(),
            follows_tag: is_desired && spec.follows_tag(),
        })
    }

    /// Returns the images of the desired documents that follow a tag and have had an image before.
    fn followed_tags(&self) -> Vec<NeededImage> {
        let deployments = self.desired.deployments.iter();
        let needed = deployments.filter_map(|(deployment, entry)| {
            let spec = entry.target.spec().filter(|spec| spec.follows_tag())?;
            Some(NeededImage {
                deployment: deployment.clone(),
                revision: entry.revision,
                reference: spec.image.clone(),
                id: Some(entry.image.clone()?),
                follows_tag: true,
            })
        });
        needed.collect()
    }

    /// Records the image that a tag names. Returns whether the deployment has another target now.
    fn move_tag(&mut self, needed: &NeededImage, id: &str) -> bool {
        let NeededImage { deployment, reference, .. } = needed;
        let has_moved = self.desired.move_tag(deployment, id);
        self.unsaved |= has_moved;
        if has_moved {
            self.events.push(&format!("{deployment}: {reference} is the image {}", short_id(id)));
        }
        has_moved
    }
}
