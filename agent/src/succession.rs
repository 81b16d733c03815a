//! The documents of one deployment: the one that the agent runs now, and the previous one, which runs again if
//! the newer one fails. This module does no I/O. `plan` takes the steps between them from these records and
//! from podman's containers.

use agent_protocol::ContainerSpec;
use serde::{Deserialize, Serialize};

use crate::desired::{Applied, Desired, DesiredEntry, Operation, Target};

/// A document that the agent can run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Accepted {
    pub(crate) revision: u64,
    /// The text of the document.
    pub(crate) document: String,
    /// The id of the image of `target`, if it follows a tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    /// Follows from the text, as [`DesiredEntry::target`] does.
    #[serde(skip)]
    pub(crate) target: Target,
}

impl Accepted {
    pub(crate) fn digest(&self) -> &str {
        self.target.digest().unwrap_or_default()
    }

    fn parsed(self, name: &str) -> Option<Self> {
        let target = Target::of(name, &Operation::Put(self.document.clone())).with_image(self.image.as_ref());
        target.digest().is_some().then_some(Self { target, ..self })
    }
}

/// The document that runs again if the current one fails. It is kept until the current document has passed its
/// probation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Previous {
    pub(crate) accepted: Accepted,
    pub(crate) applied: Applied,
}

impl Previous {
    /// Returns whether the deployment can be rolled back to this container: it had passed its probation, or it ran
    /// until the agent stopped it for its successor.
    pub(crate) fn is_proven(&self) -> bool {
        !self.applied.unproven || self.applied.stopped
    }

    pub(crate) fn spec(&self) -> Option<&ContainerSpec> {
        self.accepted.target.spec()
    }
}

/// The failure of a document that was rolled back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RolledBack {
    pub(crate) reason: String,
    /// True if the reason lies in the device and may pass. The agent then tries the document again.
    pub(crate) may_pass: bool,
    /// The number of consecutive failures.
    pub(crate) failures: u32,
}

impl Target {
    pub(crate) fn digest(&self) -> Option<&str> {
        match self {
            Self::Run { digest, .. } => Some(digest),
            _ => None,
        }
    }

    pub(crate) fn spec(&self) -> Option<&ContainerSpec> {
        match self {
            Self::Run { spec, .. } => Some(spec),
            _ => None,
        }
    }
}

impl DesiredEntry {
    /// Returns the entry that follows `known` when the bucket has a new operation.
    pub(crate) fn after(known: Option<Self>, revision: u64, operation: Operation, target: Target) -> Self {
        let new = Self {
            revision,
            operation,
            image: target.image().cloned(),
            target,
            applied: None,
            accepted: None,
            previous: None,
            rolled_back: None,
            orphaned: None,
            purge_above: 0,
        };
        let Some(known) = known else { return new };
        let current = known.current_document();
        let Self { applied, previous, .. } = known;
        match (new.target.digest(), current, previous) {
            // Only the revision is new.
            (Some(_), Some(current), previous) if current.target.serves(&new.target) => {
                Self { applied, previous, target: current.target, image: current.image, ..new }
            }
            (Some(_), _, Some(Previous { accepted, applied })) if accepted.target.serves(&new.target) => {
                Self { applied: Some(applied), target: accepted.target, image: accepted.image, ..new }
            }
            (Some(_), Some(accepted), previous) => {
                let previous = match (applied, previous) {
                    // A document that has not passed its probation does not replace one that has.
                    (Some(applied), None) => Some(Previous { accepted, applied }),
                    (Some(applied), Some(_)) if !applied.unproven => Some(Previous { accepted, applied }),
                    (_, previous) => previous,
                };
                Self { previous, ..new }
            }
            (None, current, previous) if matches!(new.target, Target::Refused(_)) => {
                Self { accepted: current, applied, previous, ..new }
            }
            // The container of an earlier document may still exist.
            _ => Self { applied, ..new },
        }
    }

    /// Returns the revision and the target of the document that the agent runs now.
    pub(crate) fn current(&self) -> (u64, &Target) {
        let accepted = self.accepted.as_ref();
        accepted.map_or((self.revision, &self.target), |accepted| (accepted.revision, &accepted.target))
    }

    fn current_document(&self) -> Option<Accepted> {
        match (&self.accepted, &self.operation) {
            (Some(accepted), _) => Some(accepted.clone()),
            (None, Operation::Put(document)) if self.target.digest().is_some() => Some(Accepted {
                revision: self.revision,
                document: document.clone(),
                image: self.image.clone(),
                target: self.target.clone(),
            }),
            _ => None,
        }
    }

    /// Returns the failure of the desired document, if it was rolled back.
    pub(crate) fn failure(&self) -> Option<&RolledBack> {
        self.rolled_back.as_ref().filter(|_| self.accepted.is_some())
    }

    /// Computes the targets, which the state file does not contain.
    pub(crate) fn parse_documents(&mut self, name: &str) {
        self.target = Target::of(name, &self.operation).with_image(self.image.as_ref());
        self.accepted = self.accepted.take().and_then(|accepted| accepted.parsed(name));
        self.previous = self.previous.take().and_then(|previous| {
            let accepted = previous.accepted.parsed(name)?;
            Some(Previous { accepted, ..previous })
        });
    }
}

/// The changes of the records while one document succeeds another. Each returns whether it changed the state.
impl Desired {
    /// Records that a document has passed its probation. If it is the current one, it needs no previous one any
    /// more.
    pub(crate) fn prove(&mut self, name: &str, digest: &str) -> bool {
        let Some(entry) = self.deployments.get_mut(name) else { return false };
        let before = entry.clone();
        if entry.current().1.digest() == Some(digest) {
            entry.previous = None;
            if entry.accepted.is_none() {
                entry.rolled_back = None;
            }
        }
        if let Some(applied) = entry.applied_mut(digest) {
            applied.unproven = false;
        }
        *entry != before
    }

    /// Records that the agent is about to stop the previous container for its successor.
    pub(crate) fn retire_previous(&mut self, name: &str) -> bool {
        let previous = self.deployments.get_mut(name).and_then(|entry| entry.previous.as_mut());
        previous.is_some_and(|previous| !std::mem::replace(&mut previous.applied.stopped, true))
    }

    /// Drops a previous document that never worked.
    pub(crate) fn drop_previous(&mut self, name: &str) -> bool {
        self.deployments.get_mut(name).is_some_and(|entry| entry.previous.take().is_some())
    }

    /// Gives the place of the current document back to the previous one.
    pub(crate) fn roll_back(&mut self, name: &str, reason: &str, may_pass: bool) -> bool {
        let Some(entry) = self.deployments.get_mut(name) else { return false };
        let Some(Previous { accepted, applied }) = entry.previous.take() else { return false };
        // A refused document must stay refused: only the failure of the desired document is reported.
        if entry.accepted.is_none() {
            let failures = entry.rolled_back.as_ref().map_or(0, |earlier| earlier.failures) + 1;
            entry.rolled_back = Some(RolledBack { reason: reason.to_owned(), may_pass, failures });
        }
        (entry.accepted, entry.applied) = (Some(accepted), Some(applied));
        true
    }

    /// Makes the desired document the current one again after it was rolled back.
    pub(crate) fn try_again(&mut self, name: &str) -> bool {
        let Some(entry) = self.deployments.get_mut(name) else { return false };
        if entry.failure().is_none() {
            return false;
        }
        let (accepted, applied) = (entry.accepted.take(), entry.applied.take());
        entry.previous = accepted.zip(applied).map(|(accepted, applied)| Previous { accepted, applied });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Update};

    fn document(tag: u32) -> String {
        format!(r#"{{"version":1,"kind":"podman-container","spec":{{"image":"localhost/a:{tag}"}}}}"#)
    }

    /// A device on which revision 1 has passed its probation in the container `c1`.
    fn proven() -> Desired {
        let mut desired = Desired::default();
        put(&mut desired, 1, &document(1));
        let digest = digest(&desired);
        desired.started("web", &digest, "c1", "b");
        assert!(desired.prove("web", &digest));
        desired
    }

    fn put(desired: &mut Desired, revision: u64, text: &str) {
        let operation = Operation::Put(text.into());
        desired.take(Change::Update(Update { name: "web".into(), revision, operation }));
    }

    fn entry(desired: &Desired) -> &DesiredEntry {
        &desired.deployments["web"]
    }

    fn digest(desired: &Desired) -> String {
        entry(desired).current().1.digest().unwrap().to_owned()
    }

    fn previous(desired: &Desired) -> Option<u64> {
        entry(desired).previous.as_ref().map(|previous| previous.accepted.revision)
    }

    #[test]
    fn a_refused_document_changes_nothing_but_the_status() {
        let mut desired = proven();
        let before = entry(&desired).clone();
        for revision in [2, 3] {
            put(&mut desired, revision, "{");
            assert_eq!(entry(&desired).current(), (1, &before.target));
            assert_eq!(entry(&desired).applied, before.applied);
        }
        put(&mut desired, 4, &document(2));
        put(&mut desired, 5, "{");
        assert_eq!((entry(&desired).current().0, previous(&desired)), (4, Some(1)), "its probation goes on");
        let delete = Update { name: "web".into(), revision: 6, operation: Operation::Delete };
        desired.take(Change::Update(delete));
        put(&mut desired, 7, "{");
        assert!(
            matches!(entry(&desired).current(), (7, Target::Refused(_))),
            "nothing runs after a deletion"
        );
    }

    #[test]
    fn the_last_document_that_worked_is_kept_until_its_successor_has_worked() {
        let mut desired = proven();
        put(&mut desired, 2, &document(2));
        assert_eq!((entry(&desired).current().0, previous(&desired)), (2, Some(1)));
        let second = digest(&desired);
        desired.started("web", &second, "c2", "b");
        put(&mut desired, 3, &document(3));
        assert_eq!(previous(&desired), Some(1), "revision 2 has not passed its probation");
        let third = digest(&desired);
        desired.started("web", &third, "c3", "b");
        assert!(desired.prove("web", &third) && !desired.prove("web", &third));
        assert_eq!(previous(&desired), None);
        put(&mut desired, 4, &document(4));
        assert_eq!(previous(&desired), Some(3));
        put(&mut desired, 5, &document(3));
        let applied = entry(&desired).applied.as_ref().unwrap();
        assert_eq!((applied.container.as_str(), previous(&desired)), ("c3", None), "the fleet has gone back");
    }

    #[test]
    fn a_document_that_fails_gives_the_place_back() {
        let mut desired = proven();
        put(&mut desired, 2, &document(2));
        assert!(desired.retire_previous("web") && !desired.retire_previous("web"));
        assert!(desired.roll_back("web", "it ended", true));
        assert!(!desired.roll_back("web", "it ended", true), "there is nothing to go back to");
        let back = entry(&desired);
        assert_eq!((back.revision, back.current().0), (2, 1));
        assert!(back.applied.as_ref().unwrap().stopped, "its container must be started");
        assert_eq!(back.failure().unwrap().failures, 1);
        let (name, first) = ("web", digest(&desired));
        assert!(!desired.prove(name, &first) && entry(&desired).failure().is_some());
        assert!(desired.try_again(name) && !desired.try_again(name));
        assert_eq!((entry(&desired).current().0, previous(&desired)), (2, Some(1)));
        assert!(entry(&desired).failure().is_none());
        desired.roll_back(name, "it ended", true);
        assert_eq!(entry(&desired).failure().unwrap().failures, 2);
        put(&mut desired, 3, &document(2));
        assert_eq!((entry(&desired).current().0, entry(&desired).failure()), (3, None), "a new chance");
    }

    #[test]
    fn the_records_survive_on_disk() {
        let mut desired = proven();
        put(&mut desired, 2, &document(2));
        desired.retire_previous("web");
        let reread = |desired: &Desired| {
            serde_json::from_value::<Desired>(serde_json::to_value(desired).unwrap()).unwrap()
        };
        assert_eq!(reread(&desired), desired);
        desired.roll_back("web", "it ended", false);
        assert_eq!(reread(&desired), desired);
        put(&mut desired, 3, "{");
        assert_eq!(reread(&desired), desired);
    }
}
