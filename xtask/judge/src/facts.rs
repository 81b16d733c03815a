//! What a state of the disk at one point of the log must show and may show, from the events of the recording.

use std::collections::{BTreeMap, BTreeSet};

use agent_protocol::{Deployment, Document};
use iot_agent::volume_name;

use crate::recording::{EventKind, Recording, Wish};

/// The path in the workload's container at which its volume is mounted (`xtask/workload/main.rs`).
const MOUNT: &str = "/data";
/// The variable with the workload's generation.
const GENERATION: &str = "GENERATION";

/// The parts of a document that the judgement needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Parts {
    image: Option<String>,
    /// The name in podman of the volume with the number of starts.
    volume: Option<String>,
    generation: Option<u64>,
}

impl Parts {
    fn of(device_id: &str, name: &str, wish: &Wish) -> Self {
        let Some(Ok(document)) = wish.document().map(|text| Document::parse(text.as_bytes())) else {
            return Self::default();
        };
        let Deployment::PodmanContainer(spec) = document.deployment;
        let volume = spec.volumes.iter().find(|volume| volume.mount == MOUNT);
        Self {
            volume: volume.map(|volume| volume_name(device_id, name, &volume.name)),
            generation: spec.env.get(GENERATION).and_then(|text| text.parse().ok()),
            image: Some(spec.image),
        }
    }
}

/// A number that was acknowledged, and the position of the acknowledgement in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Floor {
    pub(crate) number: u64,
    pub(crate) position: usize,
}

/// The facts about a state at one point.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The highest revision that was sent before the point.
    pub(crate) sent: u64,
    /// The highest revision that the device has acknowledged.
    pub(crate) acknowledged: Option<Floor>,
    /// The least number of starts in each volume, by the deployment and the volume's name in podman.
    pub(crate) starts: BTreeMap<(String, String), Floor>,
    /// The references of the images that must be there, with the positions of the acknowledgements.
    pub(crate) images: BTreeMap<String, usize>,
    /// The SHA-256 of the executables that may be installed.
    pub(crate) executables: BTreeSet<String>,
    /// The position at which the last installation succeeded.
    pub(crate) installed: Option<usize>,
}

/// The deployments at one event, while the events are walked through.
#[derive(Default)]
struct Deployments<'a> {
    named: BTreeMap<&'a str, &'a Parts>,
    /// The least generation whose answers count, by deployment: after a Purge, the old container may still answer.
    since_purge: BTreeMap<&'a str, u64>,
}

/// The events with the parts of their documents, which are parsed once for all states.
#[derive(Debug)]
pub(crate) struct Timeline {
    events: Vec<(usize, EventKind, Parts)>,
}

impl Timeline {
    pub(crate) fn new(recording: &Recording) -> Self {
        let parts = |kind: &EventKind| match kind {
            EventKind::Desired { name, wish, .. } => Parts::of(&recording.device_id, name, wish),
            _ => Parts::default(),
        };
        let events = recording.events.iter();
        Self {
            events: events.map(|event| (event.position, event.kind.clone(), parts(&event.kind))).collect(),
        }
    }

    /// Returns what holds for a state at `point`, which contains no entry of the log from `point` on.
    pub(crate) fn at(&self, point: usize) -> Facts {
        let mut facts = Facts::default();
        let mut deployments = Deployments::default();
        for (position, kind, parts) in &self.events {
            match kind {
                EventKind::Desired { name, revision, wish } if *position < point => {
                    facts.sent = facts.sent.max(*revision);
                    facts.desire(&mut deployments, name, wish, parts);
                }
                EventKind::InstallBegan { sha256 } if *position < point => {
                    facts.executables.insert(sha256.clone());
                }
                EventKind::Acknowledged { revision } if *position <= point => {
                    let is_newer = facts.acknowledged.is_none_or(|known| known.number < *revision);
                    if is_newer {
                        facts.acknowledged = Some(Floor { number: *revision, position: *position });
                    }
                }
                EventKind::Installed { sha256 } if *position <= point => {
                    facts.executables = BTreeSet::from([sha256.clone()]);
                    facts.installed = Some(*position);
                }
                EventKind::Answered { deployment, generation, starts } if *position <= point => {
                    let floor = Floor { number: *starts, position: *position };
                    facts.answer(&deployments, deployment, *generation, floor);
                }
                EventKind::Loaded { reference }
                    if *position <= point && deployments.name_image(reference) =>
                {
                    facts.images.insert(reference.clone(), *position);
                }
                _ => {}
            }
        }
        facts
    }
}

impl Facts {
    fn desire<'a>(
        &mut self,
        deployments: &mut Deployments<'a>,
        name: &'a str,
        wish: &Wish,
        parts: &'a Parts,
    ) {
        deployments.named.insert(name, parts);
        match wish {
            Wish::Put(_) => {
                if let Some(least) = deployments.since_purge.get_mut(name).filter(|least| **least == u64::MAX)
                {
                    *least = parts.generation.unwrap_or_default();
                }
            }
            Wish::Delete => {}
            Wish::Purge => {
                deployments.since_purge.insert(name, u64::MAX);
                self.starts.retain(|(deployment, _), _| deployment != name);
            }
        }
        // The agent deletes an image that no deployment names.
        self.images.retain(|reference, _| deployments.name_image(reference));
    }

    fn answer(&mut self, deployments: &Deployments<'_>, name: &str, generation: u64, floor: Floor) {
        let counts = deployments.since_purge.get(name).is_none_or(|least| generation >= *least);
        let volume = deployments.named.get(name).and_then(|parts| parts.volume.as_ref());
        if let Some(volume) = volume.filter(|_| counts) {
            let known = self.starts.entry((name.to_owned(), volume.clone())).or_insert(floor);
            if known.number < floor.number {
                *known = floor;
            }
        }
    }
}

impl Deployments<'_> {
    fn name_image(&self, reference: &str) -> bool {
        self.named.values().any(|parts| parts.image.as_deref() == Some(reference))
    }
}
