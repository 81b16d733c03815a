//! The reconciler: a loop that observes podman's containers, compares them with the desired state, and acts.
//! It makes a pass on every change, on every event of podman, and at least every [`POLL_INTERVAL`]. No state
//! of a container is kept between two passes: each pass begins with podman's own listing. `steps` carries out
//! the steps for one deployment, `make` creates containers, and `state` holds the data that is kept between two
//! steps. `foreign` has the containers of others, and `leftovers` those that only podman's storage has. `memory` judges
//! memory limits, and `tags` gets images. `damage` decides about repairs of the storage, which `repair` makes.

mod damage;
mod foreign;
mod leftovers;
mod make;
mod memory;
mod repair;
mod state;
mod steps;
mod tags;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::Phase;
use anyhow::{Context, Result};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::Config;
use crate::desired::Change;
use crate::device_state::{self, DeviceState};
use crate::host::DeviceIdentity;
use crate::images::Images;
use crate::managed::ManagedDeployment;
use crate::plan::{self, Step};
use crate::podman::{ListedContainer, Podman, is_refusal};
use crate::progress::{Loop, Progress};
use crate::reset::Reset;
use crate::store::Store;
use memory::Memory;
use state::State;

/// Time between two passes if nothing indicates a change.
const POLL_INTERVAL: Duration = Duration::from_secs(30);
/// The longest pause after a failure to reach podman.
const MAX_PODMAN_PAUSE: Duration = Duration::from_secs(5);
/// The first pause after a failure to reach podman. If the socket does not exist yet, the pause ends when the
/// socket appears.
const MIN_PODMAN_PAUSE: Duration = Duration::from_millis(500);
/// Upper bound for the steps for one deployment in one pass. The longest sensible sequence is shorter.
const MAX_STEPS: usize = 16;
/// The smallest and the largest number of deployments that are processed in parallel. Between these limits,
/// the number is that of the processors, since starting a container keeps one processor busy. It is at least
/// two, so that a container that is slow to stop does not delay all others.
const PARALLEL_DEPLOYMENTS: std::ops::RangeInclusive<usize> = 2..=4;
/// Removals start this much earlier than the other deployments, which may need the ports that the removals
/// free.
const REMOVAL_HEAD_START: Duration = Duration::from_secs(2);

pub(crate) struct Reconciler {
    device: DeviceIdentity,
    podman: Podman,
    store: Store,
    /// The lock that is held while the store writes, so that an older state never overwrites a newer one.
    saving: tokio::sync::Mutex<()>,
    images: tokio::sync::Mutex<Images>,
    /// The lock that is held while volumes are listed and then created or deleted. podman's listing fails if
    /// a volume disappears meanwhile.
    volumes: tokio::sync::Mutex<()>,
    memory: Memory,
    state: Mutex<State>,
    device_state: watch::Sender<DeviceState>,
    wake: Arc<Notify>,
    progress: Arc<Progress>,
    reset: Reset,
}

impl Reconciler {
    /// Creates a reconciler that begins with the desired state on disk.
    pub(crate) fn new(
        config: &Config,
        device: DeviceIdentity,
        device_state: watch::Sender<DeviceState>,
        progress: Arc<Progress>,
    ) -> Self {
        let store = Store::new(&config.agent.state_directory, &config.agent.device_id);
        let mut state = State::default();
        let (desired, problem) = store.load();
        if let Some(desired) = desired {
            let (count, revision) = (desired.deployments.len(), desired.revision);
            let event = format!("loaded {count} deployments from disk, up to revision {revision}");
            state.events.push(&event);
            // A status with this revision that lacks a deployment would say that the deployment is gone.
            device_state::add_missing_lines(&mut state.lines, &desired);
            // An earlier state may lack deployments whose containers must go on.
            (state.desired, state.known) = (desired, problem.is_none());
            // The process before this one may have ended between the renaming of the file and the sync of its directory.
            match store.sync_directory() {
                Ok(()) => state.saved_revision = revision,
                Err(error) => state.events.push(&format!("the state may not outlive a power cut: {error:#}")),
            }
        }
        if let Some(problem) = problem {
            state.events.push(&format!("{problem}; the desired state will be read from the bus"));
        }
        let wake = Arc::new(Notify::new());
        let podman = Podman::new(&config.podman.socket);
        let images = Images::new(config, podman.clone(), store.clone(), Arc::clone(&wake));
        Self {
            device,
            podman,
            store,
            saving: tokio::sync::Mutex::default(),
            images: images.into(),
            volumes: tokio::sync::Mutex::default(),
            memory: Memory::new(config.podman.without_memory_limits),
            state: state.into(),
            device_state,
            wake,
            progress,
            reset: Reset::new(&config.agent.state_directory),
        }
    }

    /// Runs until the sender of `changes` is dropped.
    pub(crate) async fn run(self, mut changes: mpsc::Receiver<Change>) {
        let filter = plan::device_filter(&self.device.device_id);
        let watch =
            || tokio::spawn(watch_podman(self.podman.clone(), filter.clone(), Arc::clone(&self.wake)));
        let mut watching = watch();
        // Consecutive passes in which podman could not be reached.
        let mut failures: u32 = 0;
        loop {
            self.progress.tick(Loop::Reconciler);
            let passed = self.pass().await;
            if self.request_reset().await {
                // The event stream would keep podman running.
                watching.abort();
                self.publish();
                self.wait_for_reset(&mut changes).await;
                watching = watch();
            }
            match passed {
                Ok(()) => failures = 0,
                Err(error) => {
                    let mut state = self.state();
                    state.events.push(&format!("{error:#}"));
                    state.due = Some(Instant::now() + podman_pause(failures));
                    failures = failures.saturating_add(1);
                }
            }
            self.publish();
            let absent = !self.podman.has_socket();
            let next_poll = Instant::now() + POLL_INTERVAL;
            let due = self.state().due.take().map_or(next_poll, |due| due.min(next_poll));
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change, &mut changes).await,
                    None => break,
                },
                () = self.wake.notified() => {}
                () = self.podman.wait_for_socket(), if absent => failures = 0,
                () = sleep_until(due) => {}
            }
        }
        watching.abort();
    }

    /// Locks the state. The guard must not be held across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes this change and the changes that are queued behind it, saves them and reports their revision before
    /// the agent acts on them. If the disk cannot be written, the agent records an event and acts on the changes
    /// nevertheless.
    async fn take(&self, change: Change, changes: &mut mpsc::Receiver<Change>) {
        let mut next = Some(change);
        while let Some(change) = next {
            let mut state = self.state();
            state.known |= matches!(change, Change::Snapshot(..));
            state.unsaved |= state.desired.take(change);
            next = changes.try_recv().ok();
        }
        self.save().await;
        {
            let State { lines, desired, .. } = &mut *self.state();
            device_state::add_missing_lines(lines, desired);
        }
        self.publish();
    }

    /// Saves the desired state in a thread of its own, so that a slow card does not delay the bus and the
    /// watchdog.
    async fn save(&self) {
        let _guard = self.saving.lock().await;
        let desired = {
            let mut state = self.state();
            if !std::mem::take(&mut state.unsaved) {
                return;
            }
            state.desired.clone()
        };
        let (store, revision) = (self.store.clone(), desired.revision);
        let saved = tokio::task::spawn_blocking(move || store.save(&desired)).await;
        let error = match saved {
            Ok(Ok(())) => {
                self.state().saved_revision = revision;
                return;
            }
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => format!("write the desired state: {error}"),
        };
        let mut state = self.state();
        state.unsaved = true;
        state.events.push(&error);
    }

    /// Brings each deployment as close to its target as possible. Several deployments are processed in
    /// parallel, removals first.
    async fn pass(&self) -> Result<()> {
        let listed = self.podman.all_containers().await;
        self.judge_answer(listed.as_ref().err());
        let mut listed = listed.inspect_err(|_| {
            // New deployments are reported even if podman cannot be reached.
            let State { lines, desired, .. } = &mut *self.state();
            device_state::add_missing_lines(lines, desired);
        })?;
        {
            let State { foreign, events, desired, known, .. } = &mut *self.state();
            let is_known = |name: &str| !*known || desired.deployments.contains_key(name);
            foreign.take(&mut listed, &self.device.device_id, is_known, events);
        }
        self.finish_reset().await;
        self.remove_leftovers().await;
        let mut owned: BTreeMap<String, Vec<ListedContainer>> = BTreeMap::new();
        for container in listed {
            let name = container.labels.get(plan::DEPLOYMENT_LABEL).cloned().unwrap_or_default();
            owned.entry(name).or_default().push(container);
        }
        let (deployments, known) = {
            let mut state = self.state();
            state.drop_forgotten();
            (state.deployments(), state.known)
        };
        let [to_remove, to_run] = deployments.map(|deployments| {
            let with_containers = |mut deployment: ManagedDeployment| {
                deployment.containers = owned.remove(&deployment.name).unwrap_or_default();
                deployment
            };
            deployments.into_iter().map(with_containers).collect::<Vec<_>>()
        });
        let begun = Instant::now();
        let mut removing = pin!(self.work_on(to_remove, begun));
        let running = self.work_on(to_run, begun);
        match timeout(REMOVAL_HEAD_START, &mut removing).await {
            Ok(()) => running.await,
            Err(_elapsed) => {
                tokio::join!(removing, running);
            }
        }
        self.follow_tags().await;
        self.save().await;
        if known {
            self.collect_images().await?;
        }
        Ok(())
    }

    /// Deletes the images that neither a deployment names nor a container uses.
    async fn collect_images(&self) -> Result<()> {
        let mut images = self.images.lock().await;
        let named = self.state().desired.images();
        for image in images.collect(&named).await? {
            self.record(&format!("deleted the image {image}, which no deployment needs"));
        }
        Ok(())
    }

    /// Processes the deployments, several in parallel. `begun` is the start of the pass; a slow pass publishes
    /// the state after each deployment.
    async fn work_on(&self, deployments: Vec<ManagedDeployment>, begun: Instant) {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let parallel = processors.clamp(*PARALLEL_DEPLOYMENTS.start(), *PARALLEL_DEPLOYMENTS.end());
        let work = |deployment| async move {
            self.progress.tick(Loop::Reconciler);
            self.converge(deployment).await;
            if begun.elapsed() > REMOVAL_HEAD_START {
                self.publish();
            }
        };
        stream::iter(deployments).for_each_concurrent(parallel, work).await;
    }

    async fn converge(&self, mut deployment: ManagedDeployment) {
        self.state().begin(&mut deployment);
        let phase = self.take_steps(&mut deployment).await;
        if let Some(mut previous) = deployment.waiting_previous() {
            self.state().begin(&mut previous);
            self.take_steps(&mut previous).await;
            deployment.containers = previous.containers;
        }
        self.state().set_line(&self.device.device_id, &deployment, phase);
    }

    /// Takes steps until the deployment is as desired or has to wait, and returns its phase.
    async fn take_steps(&self, deployment: &mut ManagedDeployment) -> Phase {
        for _ in 0..MAX_STEPS {
            self.progress.tick(Loop::Reconciler);
            let step = {
                let mut state = self.state();
                match state.next(&self.device, deployment) {
                    Ok(step) => step,
                    Err(pause) => {
                        state.look_again_in(pause);
                        return state.backoff(deployment).phase();
                    }
                }
            };
            match self.take_step(deployment, &step).await {
                Ok(Some(phase)) => return phase,
                Ok(None) => {}
                Err(error) if self.must_roll_back(deployment, &step, &error) => {
                    let error = format!("{error:#}");
                    self.state().roll_back(deployment, &error, Some(&error));
                    self.save().await;
                }
                Err(error) => return self.state().step_failed(deployment, &error),
            }
            self.state().refresh(deployment);
            let label = format!("{}={}", plan::DEPLOYMENT_LABEL, deployment.name);
            match self.podman.containers(&label).await {
                Ok(mut listed) => {
                    let device_id = Some(&self.device.device_id);
                    listed.retain(|container| container.labels.get(plan::DEVICE_LABEL) == device_id);
                    deployment.containers = listed;
                }
                // The old listing may name containers that no longer exist.
                Err(error) => {
                    tracing::debug!("{error:#}");
                    break;
                }
            }
        }
        self.state().look_again_in(MAX_PODMAN_PAUSE);
        Phase::Pending
    }

    /// Returns whether an error rolls the deployment back to the previous container. This is so if that container
    /// does not run any more, and the new document has failed for good. At the start of the new one, nothing
    /// else runs, even if the agent has not stopped the previous one itself.
    fn must_roll_back(&self, deployment: &ManagedDeployment, step: &Step, error: &anyhow::Error) -> bool {
        let state = &mut *self.state();
        let entry = state.desired.deployments.get(&deployment.name);
        let previous = entry.and_then(|entry| entry.previous.as_ref());
        let was_stopped = previous.is_some_and(|previous| previous.applied.stopped);
        deployment.previous.is_some()
            && (was_stopped || matches!(step, Step::Start { .. }))
            && state.backoff(deployment).has_failed_for_good(is_refusal(error))
    }

    fn publish(&self) {
        let current = self.state().device_state();
        self.device_state.send_if_modified(|known| {
            let modified = *known != current;
            *known = current;
            modified
        });
    }
}

/// Returns the pause after a failure to reach podman. It doubles with each earlier failure, up to
/// [`MAX_PODMAN_PAUSE`].
fn podman_pause(earlier_failures: u32) -> Duration {
    MIN_PODMAN_PAUSE.saturating_mul(1 << earlier_failures.min(8)).min(MAX_PODMAN_PAUSE)
}

/// Wakes the reconciler on each event of a container with this label. Never returns.
async fn watch_podman(podman: Podman, label: String, wake: Arc<Notify>) {
    let mut failures: u32 = 0;
    loop {
        let began = Instant::now();
        if let Err(error) = podman.events(&label, || wake.notify_one()).await.context("wait for podman") {
            tracing::debug!("{error:#}");
        }
        failures = if began.elapsed() > MAX_PODMAN_PAUSE { 0 } else { failures + 1 };
        sleep(podman_pause(failures.saturating_sub(1))).await;
        // Events between two connections are lost, so a pass must look at the containers.
        wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pauses_grow_to_a_bound() {
        let pauses = [0, 1, 2, 3, 4, u32::MAX].map(|failures| podman_pause(failures).as_millis());
        assert_eq!(pauses, [500, 1000, 2000, 4000, 5000, 5000]);
    }
}
