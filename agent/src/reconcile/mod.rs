//! The reconciler: observe, compare, act, tell; again on every change, every event of podman's, and every now and then. It keeps no
//! picture of the containers: each pass begins with what podman shows. [`steps`] is what is done about one deployment.

mod steps;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::attempts::Attempts;
use crate::config::Config;
use crate::desired::{Change, Desired, Target};
use crate::images::Images;
use crate::plan::{self, Step};
use crate::podman::{Listed, Podman};
use crate::progress::{Loop, Progress};
use crate::protocol::status::{DeploymentStatus, Phase, shortened};
use crate::store::{Found, Store};
use crate::view::{self, Events, View, short};

/// Without any sign of a change, podman is asked this often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The longest pause after podman could not be asked.
const PODMAN_AWAY: Duration = Duration::from_secs(5);
/// The first one. Where there is no socket yet, as for some seconds after a boot, its appearance ends the pause.
const PODMAN_NOT_YET: Duration = Duration::from_millis(500);
/// Steps for one deployment in one pass; more than the longest sensible sequence.
const MOST_STEPS: usize = 6;

/// The reconciler.
pub struct Reconciler {
    device_id: String,
    boot_id: String,
    podman: Podman,
    store: Store,
    images: Images,
    /// What it knows of the fleet's wishes.
    desired: Desired,
    /// Whether that is known at all: without it, nothing is an orphan.
    known: bool,
    attempts: HashMap<String, Attempts>,
    /// How each deployment was after the last look at it.
    lines: BTreeMap<String, DeploymentStatus>,
    events: Events,
    view: watch::Sender<View>,
    wake: Arc<Notify>,
    progress: Arc<Progress>,
    /// When a deployment wants another look.
    due: Option<Instant>,
    /// Passes in a row for which podman could not be asked.
    away: u32,
    unsaved: bool,
}

impl Reconciler {
    /// With what the last boot left on disk.
    pub fn begin(config: &Config, boot_id: &str, view: watch::Sender<View>, progress: Arc<Progress>) -> Self {
        let store = Store::new(&config.state_directory, &config.device_id);
        let Found { desired, problem } = store.load();
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
            images,
            desired,
            known,
            attempts: HashMap::new(),
            lines: BTreeMap::new(),
            events,
            view,
            wake,
            progress,
            due: None,
            away: 0,
            unsaved: false,
        }
    }

    /// For ever, until the bus' side of `changes` is dropped.
    pub async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        let following =
            tokio::spawn(follow(self.podman.clone(), plan::own(&self.device_id), Arc::clone(&self.wake)));
        loop {
            self.progress.tick(Loop::Reconciler);
            match self.pass().await {
                Ok(()) => self.away = 0,
                Err(error) => {
                    self.events.push(&format!("{error:#}"));
                    self.due = Some(Instant::now() + away_pause(self.away));
                    self.away = self.away.saturating_add(1);
                }
            }
            self.publish();
            let absent = !self.podman.is_there();
            let look_again = Instant::now() + LOOK_AGAIN;
            let due = self.due.take().map_or(look_again, |due| due.min(look_again));
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change, &mut changes).await,
                    None => break,
                },
                () = self.wake.notified() => {}
                () = self.podman.appears(), if absent => self.away = 0,
                () = sleep_until(due) => {}
            }
        }
        following.abort();
    }

    /// This change and those that came with it are on disk before any is acted on; or, where the disk cannot be written, that is told,
    /// and they are acted on all the same.
    async fn take(&mut self, change: Change, changes: &mut mpsc::Receiver<Change>) {
        let mut next = Some(change);
        while let Some(change) = next {
            self.known |= matches!(change, Change::Snapshot(_));
            self.unsaved |= self.desired.take(change);
            next = changes.try_recv().ok();
        }
        self.save().await;
    }

    /// In a thread of its own: a slow card must not hold up the bus and the watchdog.
    async fn save(&mut self) {
        if !self.unsaved {
            return;
        }
        let (store, desired) = (self.store.clone(), self.desired.clone());
        match tokio::task::spawn_blocking(move || store.save(&desired)).await {
            Ok(Ok(())) => self.unsaved = false,
            Ok(Err(error)) => self.events.push(&format!("{error:#}")),
            Err(error) => self.events.push(&format!("keep the desired state: {error}")),
        }
    }

    /// Each deployment as far as it can be brought now.
    async fn pass(&mut self) -> Result<()> {
        let listed = self.podman.containers(&plan::own(&self.device_id)).await;
        let mut owned: BTreeMap<String, Vec<Listed>> = BTreeMap::new();
        match listed {
            Ok(listed) => {
                for container in listed {
                    let name = container.labels.get(plan::DEPLOYMENT_LABEL).cloned().unwrap_or_default();
                    owned.entry(name).or_default().push(container);
                }
            }
            // Without podman the lines are told as far as they are known.
            Err(error) => {
                view::line_up(&mut self.lines, &self.desired);
                return Err(error);
            }
        }
        let names: Vec<String> = self.desired.deployments.keys().cloned().collect();
        self.lines.retain(|name, _| self.desired.deployments.contains_key(name));
        self.attempts.retain(|name, _| self.desired.deployments.contains_key(name));
        for name in names {
            let containers = owned.remove(&name).unwrap_or_default();
            self.progress.tick(Loop::Reconciler);
            self.converge(&name, containers).await;
        }
        let orphans =
            if self.known { self.remove_orphans(owned.into_values().flatten()).await } else { Ok(()) };
        self.save().await;
        orphans
    }

    /// What carries this device's label and belongs to no deployment that is known. One that stays does not keep the others.
    async fn remove_orphans(&mut self, orphans: impl Iterator<Item = Listed>) -> Result<()> {
        let mut outcome = Ok(());
        for orphan in orphans {
            self.progress.tick(Loop::Reconciler);
            let id = short(&orphan.id);
            self.events.push(&format!("a container that belongs to no deployment is removed: {id}"));
            outcome = outcome.and(self.podman.remove(&orphan.id).await);
        }
        outcome
    }

    /// One deployment, step by step.
    async fn converge(&mut self, name: &str, mut containers: Vec<Listed>) {
        let entry = &self.desired.deployments[name];
        let (target, revision) = (entry.target(name), entry.revision);
        let attempt_of = match &target {
            Target::Run(_, digest) => digest.clone(),
            _ => format!("{revision}"),
        };
        self.attempts.entry(name.to_owned()).or_default().of(&attempt_of);
        for _ in 0..MOST_STEPS {
            let entry = &self.desired.deployments[name];
            self.progress.tick(Loop::Reconciler);
            let applied = entry.applied.as_ref();
            let mut step = plan::next(&self.device_id, name, &target, &containers, applied, &self.boot_id);
            let attempts = self.attempts.entry(name.to_owned()).or_default();
            let stuck = attempts.waits_too_long(step == Step::Wait, Instant::now());
            if stuck || attempts.remake && matches!(step, Step::Start { .. } | Step::Rename(_)) {
                step = Step::Make;
            }
            let forgets = step == Step::Gone && target == Target::Forgotten;
            let acts = forgets || !matches!(step, Step::Keep | Step::Complete | Step::Wait | Step::Gone);
            if acts && let Some(wait) = attempts.wait(Instant::now()) {
                self.look_again_in(wait);
                return self.tell(name, &target, revision, &containers, Phase::BackingOff);
            }
            match self.take_step(name, &target, &step, &containers).await {
                Ok(Some(phase)) => return self.tell(name, &target, revision, &containers, phase),
                Ok(None) => {}
                Err(error) => {
                    let now = Instant::now();
                    let attempts = self.attempts.entry(name.to_owned()).or_default();
                    attempts.failed(now, shortened(&format!("{error:#}")));
                    let wait = attempts.wait(now).unwrap_or_default();
                    self.look_again_in(wait);
                    self.events.push(&format!("{name}: {error:#}"));
                    return self.tell(name, &target, revision, &containers, Phase::BackingOff);
                }
            }
            let label = format!("{}={name}", plan::DEPLOYMENT_LABEL);
            match self.podman.containers(&label).await {
                Ok(listed) => {
                    let own = |container: &Listed| {
                        container.labels.get(plan::DEVICE_LABEL) == Some(&self.device_id)
                    };
                    containers = listed.into_iter().filter(own).collect();
                }
                // To go on from the old listing would be to act on what is no more.
                Err(error) => {
                    tracing::debug!("{error:#}");
                    self.look_again_in(PODMAN_AWAY);
                    return self.tell(name, &target, revision, &containers, Phase::Pending);
                }
            }
        }
        self.look_again_in(PODMAN_AWAY);
        self.tell(name, &target, revision, &containers, Phase::Pending);
    }

    fn look_again_in(&mut self, wait: Duration) {
        let then = Instant::now() + wait;
        self.due = Some(self.due.map_or(then, |due| due.min(then)));
    }

    fn tell(&mut self, name: &str, target: &Target, revision: u64, containers: &[Listed], phase: Phase) {
        if !self.desired.deployments.contains_key(name) {
            self.lines.remove(name);
            return;
        }
        let attempts = &self.attempts[name];
        let (error, restarts) = (attempts.error.as_ref(), attempts.restarts);
        let line =
            DeploymentStatus { restarts, ..view::line(name, target, revision, containers, phase, error) };
        self.lines.insert(name.to_owned(), line);
    }

    fn publish(&self) {
        let view = View {
            desired_revision: self.desired.revision,
            deployments: self.lines.values().cloned().collect(),
            events: self.events.list(),
        };
        self.view.send_if_modified(|known| {
            let news = *known != view;
            *known = view;
            news
        });
    }
}

/// Doubling up to [`PODMAN_AWAY`].
fn away_pause(before: u32) -> Duration {
    PODMAN_NOT_YET.saturating_mul(1 << before.min(8)).min(PODMAN_AWAY)
}

/// Wakes the reconciler when something happens to a container of this device's, for ever.
async fn follow(podman: Podman, label: String, wake: Arc<Notify>) {
    let mut away: u32 = 0;
    loop {
        let began = Instant::now();
        if let Err(error) = podman.events(&label, || wake.notify_one()).await.context("wait for podman") {
            tracing::debug!("{error:#}");
        }
        away = if began.elapsed() > PODMAN_AWAY { 0 } else { away + 1 };
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
