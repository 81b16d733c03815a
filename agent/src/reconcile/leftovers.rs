//! Removes the containers that podman's storage kept although podman's own database does not have them. A power cut, or
//! the end of podman while it makes or removes a container, leaves such a container. The container keeps its name
//! and its image in use, and podman lists it only as an external one.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use super::Reconciler;
use crate::plan;
use crate::podman::ListedContainer;

/// The time between two searches. A container that two searches find is a leftover: podman makes a container in the
/// storage first and adds it to the database within seconds.
const INTERVAL: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Leftovers {
    /// The ids that the last search has found.
    found: HashSet<String>,
    /// The time of the next search.
    due: Option<Instant>,
}

impl Leftovers {
    /// Takes the result of a search. Returns the containers that the search before has found, too.
    fn take(&mut self, listed: Vec<ListedContainer>) -> Vec<ListedContainer> {
        let ids = listed.iter().map(|container| container.id.clone()).collect();
        let earlier = std::mem::replace(&mut self.found, ids);
        listed.into_iter().filter(|container| earlier.contains(&container.id)).collect()
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.due.is_none_or(|due| now >= due);
        if is_due {
            self.due = Some(now + INTERVAL);
        }
        is_due
    }
}

impl Reconciler {
    /// Searches for leftovers from time to time, and removes them.
    pub(super) async fn remove_leftovers(&self) {
        let now = Instant::now();
        if !self.state().leftovers.is_due(now) {
            return;
        }
        let listed = match self.own_in_storage().await {
            Ok(listed) => listed,
            Err(error) => return tracing::debug!("{error:#}"),
        };
        let leftovers = self.state().leftovers.take(listed);
        if !self.state().leftovers.found.is_empty() {
            self.state().look_again_in(INTERVAL);
        }
        for container in leftovers {
            if let Err(error) = self.remove_leftover(&container).await {
                self.record(&format!("{error:#}"));
            }
        }
    }

    /// Removes the leftover that has this name, which podman has therefore refused for another container. Returns
    /// whether there was one.
    pub(super) async fn remove_leftover_named(&self, name: &str) -> Result<bool> {
        let listed = self.own_in_storage().await?;
        let has_name = |container: &&ListedContainer| container.names.iter().any(|known| known == name);
        let Some(container) = listed.iter().find(has_name) else { return Ok(false) };
        self.remove_leftover(container).await?;
        Ok(true)
    }

    async fn remove_leftover(&self, container: &ListedContainer) -> Result<()> {
        self.podman.remove(container).await?;
        let name = container.names.first().unwrap_or(&container.id);
        self.record(&format!("removed the container {name}, which only podman's storage knew"));
        Ok(())
    }

    /// Lists the containers that only the storage has and whose names this agent gives.
    async fn own_in_storage(&self) -> Result<Vec<ListedContainer>> {
        let mut listed = self.podman.storage_containers().await?;
        let is_own = |name: &String| plan::is_container_name(&self.device.device_id, name);
        listed.retain(|container| container.names.iter().any(is_own));
        Ok(listed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_two_searches_find_is_a_leftover() {
        let listed = |ids: &[&str]| {
            let container =
                |id: &&str| ListedContainer { id: (*id).to_owned(), ..ListedContainer::default() };
            ids.iter().map(container).collect::<Vec<_>>()
        };
        let mut leftovers = Leftovers::default();
        assert_eq!(leftovers.take(listed(&["a", "b"])), []);
        assert_eq!(leftovers.take(listed(&["b", "c"])), listed(&["b"]));
        assert_eq!(leftovers.take(listed(&["a"])), [], "it was not there meanwhile");
        let now = Instant::now();
        assert!(leftovers.is_due(now) && !leftovers.is_due(now) && leftovers.is_due(now + INTERVAL));
    }
}
