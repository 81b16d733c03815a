//! The reconciler: observe, compare, act, tell; again on every change, every event of podman's, and every now and then. It keeps no
//! picture of the containers: each pass begins with what podman shows.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::attempts::Attempts;
use crate::config::Config;
use crate::desired::{Applied, Change, Desired, Target};
use crate::images::{Availability, Images};
use crate::plan::{self, Step};
use crate::podman::{Listed, Podman};
use crate::progress::{Loop, Progress};
use crate::protocol::deployment::Deployment;
use crate::protocol::status::{DeploymentStatus, ObservedContainer, Phase, shortened};
use crate::store::{Found, Store};
use crate::view::{Events, View};

/// Without any sign of a change, podman is asked this often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The pause after podman could not be asked.
const PODMAN_AWAY: Duration = Duration::from_secs(5);
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
    unsaved: bool,
    unsynced: bool,
}

impl Reconciler {
    /// With what the last boot left on disk.
    ///
    /// # Errors
    /// Where the state's directory cannot be used.
    pub fn begin(
        config: &Config,
        boot_id: &str,
        view: watch::Sender<View>,
        progress: Arc<Progress>,
    ) -> Result<Self> {
        let store = Store::new(&config.state_directory, &config.device_id);
        let Found { desired, problem } = store.load()?;
        let mut events = Events::default();
        if let Some(problem) = problem {
            events.push(&format!("{problem}; the bus will say again what is desired"));
        }
        let wake = Arc::new(Notify::new());
        let podman = Podman::new(&config.podman_socket);
        let images = Images::new(podman.clone(), config.image_archives.clone(), Arc::clone(&wake));
        let known = desired.is_some();
        let desired = desired.unwrap_or_default();
        if known {
            events.push(&format!(
                "{} deployments of revision {} and before are known from the disk",
                desired.deployments.len(),
                desired.revision
            ));
        }
        Ok(Self {
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
            unsaved: false,
            unsynced: false,
        })
    }

    /// For ever, until the bus' side of `changes` is dropped.
    pub async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        let following =
            tokio::spawn(follow(self.podman.clone(), plan::own(&self.device_id), Arc::clone(&self.wake)));
        loop {
            self.progress.tick(Loop::Reconciler);
            if let Err(error) = self.pass().await {
                self.events.push(&format!("{error:#}"));
                self.due = Some(Instant::now() + PODMAN_AWAY);
            }
            self.publish();
            let look_again = Instant::now() + LOOK_AGAIN;
            let due = self.due.take().map_or(look_again, |due| due.min(look_again));
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change, &mut changes),
                    None => break,
                },
                () = self.wake.notified() => {}
                () = sleep_until(due) => {}
            }
        }
        following.abort();
    }

    /// This change and those that came with it are on disk before any is acted on.
    fn take(&mut self, change: Change, changes: &mut mpsc::Receiver<Change>) {
        let mut next = Some(change);
        while let Some(change) = next {
            self.known |= matches!(change, Change::Snapshot(_));
            self.unsaved |= self.desired.take(change);
            next = changes.try_recv().ok();
        }
        self.save();
    }

    fn save(&mut self) {
        if !self.unsaved {
            return;
        }
        match self.store.save(&self.desired) {
            Ok(()) => self.unsaved = false,
            Err(error) => self.events.push(&format!("{error:#}")),
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
                self.line_up();
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
        if self.known {
            self.remove_orphans(owned.into_values().flatten()).await?;
        }
        if self.unsynced {
            let store = self.store.clone();
            tokio::task::spawn_blocking(move || store.sync_file_system()).await??;
            self.unsynced = false;
        }
        self.save();
        Ok(())
    }

    /// What carries this device's label and belongs to no deployment that is known.
    async fn remove_orphans(&mut self, orphans: impl Iterator<Item = Listed>) -> Result<()> {
        for orphan in orphans {
            self.events.push(&format!(
                "a container that belongs to no deployment is removed: {}",
                short(&orphan.id)
            ));
            self.podman.remove(&orphan.id).await?;
        }
        Ok(())
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
            let mut step = plan::next(name, &target, &containers, entry.applied.as_ref(), &self.boot_id);
            let attempts = &self.attempts[name];
            if attempts.remake && matches!(step, Step::Start { .. }) {
                step = Step::Make;
            }
            let acts = !matches!(step, Step::Keep | Step::Complete | Step::Wait | Step::Gone);
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
                // The next pass asks again.
                Err(error) => tracing::debug!("{error:#}"),
            }
        }
        self.look_again_in(PODMAN_AWAY);
        self.tell(name, &target, revision, &containers, Phase::Pending);
    }

    /// Takes a step; where it was the last one, the phase that it ends in.
    async fn take_step(
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
                return Ok(Some(Phase::Running));
            }
            Step::Complete => {
                attempts.settled();
                self.completed(name);
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
                let wanted = plan::container_name(name);
                self.events.push(&format!("{name}: its container has another name, and gets {wanted} back"));
                self.podman.rename(id, &wanted).await?;
            }
            Step::Remove(ids) => {
                for id in ids {
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
            self.podman.remove(&container.id).await?;
        }
        let labels = plan::labels(&self.device_id, name);
        if !spec.volumes.is_empty() {
            let there = self.podman.volumes(&plan::own(&self.device_id)).await?;
            for volume in &spec.volumes {
                let volume = plan::volume_name(name, &volume.name);
                if !there.iter().any(|known| known.name == volume) {
                    self.podman.create_volume(&volume, &labels).await?;
                }
            }
        }
        let id = self.podman.create(&plan::generator(&self.device_id, name, digest, spec)).await?;
        let applied = Applied {
            digest: digest.clone(),
            container: id.clone(),
            boot_id: self.boot_id.clone(),
            completed: false,
        };
        self.note_applied(name, Some(applied));
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
        self.unsynced = true;
        let digest = match self.desired.deployments[name].target(name) {
            Target::Run(_, digest) => digest,
            _ => bail!("what is not to run was started"),
        };
        let applied =
            Applied { digest, container: id.to_owned(), boot_id: self.boot_id.clone(), completed: false };
        self.note_applied(name, Some(applied));
        Ok(())
    }

    fn completed(&mut self, name: &str) {
        let mut applied = self.desired.deployments[name].applied.clone();
        if let Some(applied) = &mut applied {
            applied.completed = true;
        }
        self.note_applied(name, applied);
    }

    fn note_applied(&mut self, name: &str, applied: Option<Applied>) {
        if let Some(entry) = self.desired.deployments.get_mut(name)
            && entry.applied != applied
        {
            entry.applied = applied;
            self.unsaved = true;
        }
    }

    /// Without a container: a purged deployment loses its volumes too, and is forgotten.
    async fn gone(&mut self, name: &str, target: &Target) -> Result<Phase> {
        self.note_applied(name, None);
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

    fn look_again_in(&mut self, wait: Duration) {
        let then = Instant::now() + wait;
        self.due = Some(self.due.map_or(then, |due| due.min(then)));
    }

    /// The deployment's line of the status.
    fn tell(&mut self, name: &str, target: &Target, revision: u64, containers: &[Listed], phase: Phase) {
        if !self.desired.deployments.contains_key(name) {
            self.lines.remove(name);
            return;
        }
        let attempts = &self.attempts[name];
        let container =
            containers.iter().find(|container| container.state == "running").or(containers.first());
        let last_error = match target {
            Target::Refused(refusal) => Some(refusal.0.clone()),
            _ => attempts.error.clone(),
        };
        let line = DeploymentStatus {
            name: name.to_owned(),
            desired_revision: revision,
            phase: match (phase, target) {
                (Phase::BackingOff | Phase::Pending, Target::Removed | Target::Forgotten) => Phase::Removing,
                _ => phase,
            },
            container: container.map(|container| ObservedContainer {
                id: short(&container.id),
                state: container.state.clone(),
                exit_code: plan::has_ended(container).then_some(container.exit_code),
            }),
            last_error,
            restarts: attempts.restarts,
        };
        self.lines.insert(name.to_owned(), line);
    }

    /// A line for each deployment of which podman has not been asked yet.
    fn line_up(&mut self) {
        for (name, entry) in &self.desired.deployments {
            let target = entry.target(name);
            let line = self.lines.entry(name.clone()).or_insert_with(|| DeploymentStatus {
                name: name.clone(),
                desired_revision: entry.revision,
                phase: Phase::Pending,
                container: None,
                last_error: None,
                restarts: 0,
            });
            if line.desired_revision != entry.revision {
                line.desired_revision = entry.revision;
                line.phase = if matches!(target, Target::Run(..)) { Phase::Pending } else { Phase::Removing };
            }
            if let Target::Refused(refusal) = target {
                line.last_error = Some(refusal.0);
            }
        }
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

/// Wakes the reconciler when something happens to a container of this device's, for ever.
async fn follow(podman: Podman, label: String, wake: Arc<Notify>) {
    loop {
        if let Err(error) = podman.events(&label, || wake.notify_one()).await.context("wait for podman") {
            tracing::debug!("{error:#}");
        }
        sleep(PODMAN_AWAY).await;
        // What happened meanwhile has been missed.
        wake.notify_one();
    }
}

/// As podman prints ids.
fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
