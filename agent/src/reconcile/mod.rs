//! The reconciler: observe, compare, act, tell; again on every change, every event of podman's, and every now and then. It keeps no
//! picture of the containers: each pass begins with what podman shows. [`steps`] is what is done about one deployment, [`state`]
//! what is known between two steps.

mod state;
mod steps;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::Config;
use crate::desired::{Change, Target};
use crate::device_state::{self, DeviceState, Events, short};
use crate::images::Images;
use crate::plan;
use crate::podman::{ListedContainer, Podman};
use crate::progress::{Loop, Progress};
use crate::store::{LoadOutcome, Store};
use agent_protocol::status::{Phase, shortened};
use state::State;

/// Without any sign of a change, podman is asked this often.
const POLL_INTERVAL: Duration = Duration::from_secs(30);
/// The longest pause after podman could not be asked.
const MAX_PODMAN_PAUSE: Duration = Duration::from_secs(5);
/// The first one. Where there is no socket yet, as for some seconds after a boot, its appearance ends the pause.
const MIN_PODMAN_PAUSE: Duration = Duration::from_millis(500);
/// Steps for one deployment in one pass; more than the longest sensible sequence.
const MAX_STEPS: usize = 6;
/// How many deployments are worked on at once: as many as there are processors, since starting a container keeps one busy, and at
/// least two, so that one that takes its time to end does not hold up all others.
const PARALLEL_DEPLOYMENTS: std::ops::RangeInclusive<usize> = 2..=4;
/// What is to be gone goes first, since others may be about to take its ports; but not for longer than this.
const REMOVAL_HEAD_START: Duration = Duration::from_secs(2);

/// Something to do in a pass.
enum Job {
    /// A deployment, with the containers that it has.
    Deployment { name: String, target: Target, revision: u64, containers: Vec<ListedContainer> },
    /// A container without one.
    Orphan(ListedContainer),
}

/// The reconciler.
pub struct Reconciler {
    device_id: String,
    boot_id: String,
    podman: Podman,
    store: Store,
    /// Held while the store writes, so that what is older never comes last onto the disk.
    saving: tokio::sync::Mutex<()>,
    images: tokio::sync::Mutex<Images>,
    /// Held while the volumes are listed for one to be made or deleted: podman's listing fails where one goes meanwhile.
    volumes: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    device_state: watch::Sender<DeviceState>,
    wake: Arc<Notify>,
    progress: Arc<Progress>,
}

impl Reconciler {
    /// With what the last boot left on disk.
    pub fn begin(
        config: &Config,
        boot_id: &str,
        device_state: watch::Sender<DeviceState>,
        progress: Arc<Progress>,
    ) -> Self {
        let store = Store::new(&config.state_directory, &config.device_id);
        let LoadOutcome { desired, problem } = store.load();
        let mut events = Events::default();
        if let Some(problem) = problem {
            events.push(&format!("{problem}; the bus will say again what is desired"));
        }
        let wake = Arc::new(Notify::new());
        let podman = Podman::new(&config.podman_socket);
        let images = Images::new(config, podman.clone(), store.clone(), Arc::clone(&wake));
        let known = desired.is_some();
        let desired = desired.unwrap_or_default();
        if known {
            events.push(&format!(
                "{} deployments of revision {} and before are known from the disk",
                desired.deployments.len(),
                desired.revision
            ));
        }
        Self {
            device_id: config.device_id.clone(),
            boot_id: boot_id.to_owned(),
            podman,
            store,
            saving: tokio::sync::Mutex::default(),
            images: images.into(),
            volumes: tokio::sync::Mutex::default(),
            state: Mutex::new(State { desired, known, events, ..State::default() }),
            device_state,
            wake,
            progress,
        }
    }

    /// For ever, until the bus' side of `changes` is dropped.
    pub async fn run(self, mut changes: mpsc::Receiver<Change>) {
        let following =
            tokio::spawn(follow(self.podman.clone(), plan::own(&self.device_id), Arc::clone(&self.wake)));
        // Passes in a row for which podman could not be asked.
        let mut away: u32 = 0;
        loop {
            self.progress.tick(Loop::Reconciler);
            match self.pass().await {
                Ok(()) => away = 0,
                Err(error) => {
                    let mut state = self.state();
                    state.events.push(&format!("{error:#}"));
                    state.due = Some(Instant::now() + away_pause(away));
                    away = away.saturating_add(1);
                }
            }
            self.publish();
            let absent = !self.podman.is_there();
            let look_again = Instant::now() + POLL_INTERVAL;
            let due = self.state().due.take().map_or(look_again, |due| due.min(look_again));
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change, &mut changes).await,
                    None => break,
                },
                () = self.wake.notified() => {}
                () = self.podman.appears(), if absent => away = 0,
                () = sleep_until(due) => {}
            }
        }
        following.abort();
    }

    /// Never held across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This change and those that came with it are on disk before any is acted on; or, where the disk cannot be written, that is told,
    /// and they are acted on all the same.
    async fn take(&self, change: Change, changes: &mut mpsc::Receiver<Change>) {
        let mut next = Some(change);
        while let Some(change) = next {
            let mut state = self.state();
            state.known |= matches!(change, Change::Snapshot(_));
            state.unsaved |= state.desired.take(change);
            next = changes.try_recv().ok();
        }
        self.save().await;
    }

    /// In a thread of its own: a slow card must not hold up the bus and the watchdog.
    async fn save(&self) {
        let _turn = self.saving.lock().await;
        let desired = {
            let mut state = self.state();
            if !std::mem::take(&mut state.unsaved) {
                return;
            }
            state.desired.clone()
        };
        let store = self.store.clone();
        let saved = tokio::task::spawn_blocking(move || store.save(&desired)).await;
        let error = match saved {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => format!("keep the desired state: {error}"),
        };
        let mut state = self.state();
        state.unsaved = true;
        state.events.push(&error);
    }

    /// Each deployment as far as it can be brought now, some at once; what is to be gone before what is to run.
    async fn pass(&self) -> Result<()> {
        let listed = self.podman.containers(&plan::own(&self.device_id)).await;
        let mut owned: BTreeMap<String, Vec<ListedContainer>> = BTreeMap::new();
        match listed {
            Ok(listed) => {
                for container in listed {
                    let name = container.labels.get(plan::DEPLOYMENT_LABEL).cloned().unwrap_or_default();
                    owned.entry(name).or_default().push(container);
                }
            }
            // Without podman the lines are told as far as they are known.
            Err(error) => {
                let State { lines, desired, .. } = &mut *self.state();
                device_state::add_missing_lines(lines, desired);
                return Err(error);
            }
        }
        let (targets, known) = {
            let mut state = self.state();
            state.keep_desired();
            (state.targets(), state.known)
        };
        let [gone, run] = targets.map(|targets| {
            let with_its_own = |(name, target, revision): (String, Target, u64)| {
                let containers = owned.remove(&name).unwrap_or_default();
                Job::Deployment { name, target, revision, containers }
            };
            targets.into_iter().map(with_its_own).collect::<Vec<_>>()
        });
        let orphans = owned.into_values().flatten().filter(|_| known).map(Job::Orphan);
        let begun = Instant::now();
        let mut gone = pin!(self.work_on(gone.into_iter().chain(orphans), begun));
        let run = self.work_on(run, begun);
        let outcome = match timeout(REMOVAL_HEAD_START, &mut gone).await {
            Ok(outcome) => outcome.and(run.await),
            Err(_elapsed) => {
                let (gone, run) = tokio::join!(gone, run);
                gone.and(run)
            }
        };
        self.save().await;
        outcome
    }

    /// These, some at once; what fails does not keep the others. What has been reached is told where the pass, which began then, takes
    /// its time.
    async fn work_on(&self, jobs: impl IntoIterator<Item = Job>, begun: Instant) -> Result<()> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let at_once = processors.clamp(*PARALLEL_DEPLOYMENTS.start(), *PARALLEL_DEPLOYMENTS.end());
        let work = |job| async move {
            self.progress.tick(Loop::Reconciler);
            let outcome = match job {
                Job::Orphan(container) => self.remove_orphan(&container).await,
                Job::Deployment { name, target, revision, containers } => {
                    self.converge(&name, &target, revision, containers).await;
                    Ok(())
                }
            };
            if begun.elapsed() > REMOVAL_HEAD_START {
                self.publish();
            }
            outcome
        };
        let outcomes = stream::iter(jobs).map(work).buffer_unordered(at_once);
        outcomes.fold(Ok(()), |all: Result<()>, one| std::future::ready(all.and(one))).await
    }

    /// What carries this device's label and belongs to no deployment that is known.
    async fn remove_orphan(&self, orphan: &ListedContainer) -> Result<()> {
        let what = format!("a container that belongs to no deployment is removed: {}", short(&orphan.id));
        self.state().events.push(&what);
        self.podman.remove(orphan).await
    }

    /// One deployment, step by step.
    async fn converge(
        &self,
        name: &str,
        target: &Target,
        revision: u64,
        mut containers: Vec<ListedContainer>,
    ) {
        self.state().begin(name, target, revision);
        let device = (&*self.device_id, &*self.boot_id);
        for _ in 0..MAX_STEPS {
            self.progress.tick(Loop::Reconciler);
            let step = {
                let mut state = self.state();
                match state.next(device, name, target, &containers) {
                    Ok(step) => step,
                    Err(wait) => {
                        state.look_again_in(wait);
                        return state.set_line(name, target, revision, &containers, Phase::BackingOff);
                    }
                }
            };
            match self.take_step(name, target, &step, &containers).await {
                Ok(Some(phase)) => return self.state().set_line(name, target, revision, &containers, phase),
                Ok(None) => {}
                Err(error) => {
                    let (now, mut state) = (Instant::now(), self.state());
                    let backoff = state.backoff(name);
                    backoff.failed(now, shortened(&format!("{error:#}")));
                    let wait = backoff.wait(now).unwrap_or_default();
                    state.look_again_in(wait);
                    state.events.push(&format!("{name}: {error:#}"));
                    return state.set_line(name, target, revision, &containers, Phase::BackingOff);
                }
            }
            let label = format!("{}={name}", plan::DEPLOYMENT_LABEL);
            match self.podman.containers(&label).await {
                Ok(listed) => {
                    let own = |container: &ListedContainer| {
                        container.labels.get(plan::DEVICE_LABEL) == Some(&self.device_id)
                    };
                    containers = listed.into_iter().filter(own).collect();
                }
                // To go on from the old listing would be to act on what is no more.
                Err(error) => {
                    tracing::debug!("{error:#}");
                    break;
                }
            }
        }
        let mut state = self.state();
        state.look_again_in(MAX_PODMAN_PAUSE);
        state.set_line(name, target, revision, &containers, Phase::Pending);
    }

    fn publish(&self) {
        let device_state = self.state().device_state();
        self.device_state.send_if_modified(|known| {
            let news = *known != device_state;
            *known = device_state;
            news
        });
    }
}

/// Doubling up to [`MAX_PODMAN_PAUSE`].
fn away_pause(before: u32) -> Duration {
    MIN_PODMAN_PAUSE.saturating_mul(1 << before.min(8)).min(MAX_PODMAN_PAUSE)
}

/// Wakes the reconciler when something happens to a container of this device's, for ever.
async fn follow(podman: Podman, label: String, wake: Arc<Notify>) {
    let mut away: u32 = 0;
    loop {
        let began = Instant::now();
        if let Err(error) = podman.events(&label, || wake.notify_one()).await.context("wait for podman") {
            tracing::debug!("{error:#}");
        }
        away = if began.elapsed() > MAX_PODMAN_PAUSE { 0 } else { away + 1 };
        sleep(away_pause(away.saturating_sub(1))).await;
        // What happened meanwhile has been missed.
        wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn podman_is_asked_again_soon_at_first_and_not_without_end() {
        let pauses = [0, 1, 2, 3, 4, u32::MAX].map(|before| away_pause(before).as_millis());
        assert_eq!(pauses, [500, 1000, 2000, 4000, 5000, 5000]);
    }
}
