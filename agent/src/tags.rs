//! The images of documents that follow a tag (`pull: always`). The image is a part of the target. Therefore a tag that
//! has moved is followed like a new document: the container of the earlier image is kept until the new one has passed
//! its probation. This module does no I/O.

use std::collections::BTreeSet;

use crate::desired::{Desired, DesiredEntry, Target};
use crate::digest;

/// The images that must stay on the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NamedImages {
    pub(crate) references: BTreeSet<String>,
    /// The ids of the images of documents that follow a tag.
    pub(crate) ids: BTreeSet<String>,
}

impl Target {
    /// Returns the id of the image, if the document follows a tag and the id is known.
    pub(crate) fn image(&self) -> Option<&String> {
        match self {
            Self::Run { image, .. } => image.as_ref(),
            _ => None,
        }
    }

    /// Returns whether `new` needs no other container than this target: the documents are the same, and the tag that
    /// they follow has not moved.
    pub(crate) fn serves(&self, new: &Self) -> bool {
        match (self, new) {
            (Self::Run { spec, image, .. }, Self::Run { spec: new, image: moved, .. }) => {
                spec == new && (moved.is_none() || moved == image)
            }
            _ => false,
        }
    }

    /// Returns the target with the id of its image, which must not be known yet. Each image has a container of its own,
    /// although the document is the same.
    pub(crate) fn with_image(self, id: Option<&String>) -> Self {
        match (self, id) {
            (Self::Run { spec, digest, image: None }, Some(id)) => {
                let digest = digest::of_bytes(format!("{digest} {id}").as_bytes());
                Self::Run { spec, digest, image: Some(id.clone()) }
            }
            (target, _) => target,
        }
    }
}

impl Desired {
    /// Returns the images of all documents that run, are desired, or may run again.
    pub(crate) fn images(&self) -> NamedImages {
        let targets = |entry: &DesiredEntry| {
            let previous = entry.previous.as_ref().map(|previous| previous.accepted.target.clone());
            [Some(entry.target.clone()), Some(entry.current().1.clone()), previous]
        };
        let mut named = NamedImages::default();
        for target in self.deployments.values().flat_map(targets).flatten() {
            if let Target::Run { spec, image, .. } = target {
                named.references.insert(spec.image);
                named.ids.extend(image);
            }
        }
        named
    }

    /// Records that the tag that the desired document follows names this image. If the tag has named another image, the
    /// new image succeeds it like a new document. Returns whether the deployment has another target now.
    pub(crate) fn move_tag(&mut self, name: &str, id: &str) -> bool {
        let Some(entry) = self.deployments.get_mut(name) else { return false };
        let follows = matches!(&entry.target, Target::Run { spec, .. } if spec.follows_tag());
        if !follows || entry.image.as_deref() == Some(id) {
            return false;
        }
        let target = Target::of(name, &entry.operation).with_image(Some(&id.to_owned()));
        if entry.image.is_none() {
            // No container has been made for the document.
            (entry.target, entry.image) = (target, Some(id.to_owned()));
            return true;
        }
        let known = entry.clone();
        let (revision, operation) = (known.revision, known.operation.clone());
        let (orphaned, purge_above) = (known.orphaned, known.purge_above);
        let new = DesiredEntry::after(Some(known), revision, operation, target);
        *entry = DesiredEntry { orphaned, purge_above, ..new };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Operation, Update};

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

    const DOCUMENT: &str = r#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1"}}"#;

    /// A device on which the image `i1` of a followed tag has passed its probation in the container `c1`.
    fn following() -> (Desired, String) {
        let mut desired = Desired::default();
        let text = DOCUMENT.replace("\"spec\":{", "\"spec\":{\"pull\":\"always\",");
        put(&mut desired, 1, &text);
        assert!(!desired.move_tag("other", "i1") && entry(&desired).target.image().is_none());
        assert!(desired.move_tag("web", "i1") && !desired.move_tag("web", "i1"));
        let digest = digest(&desired);
        desired.started("web", &digest, "c1", "b");
        desired.prove("web", &digest);
        (desired, text)
    }

    fn image(desired: &Desired) -> &str {
        entry(desired).current().1.image().unwrap()
    }

    #[test]
    fn a_moved_tag_takes_over_like_a_new_document() {
        let (mut desired, text) = following();
        let first = digest(&desired);
        assert!(desired.move_tag("web", "i2"));
        assert_eq!((image(&desired), previous(&desired)), ("i2", Some(1)));
        let second = digest(&desired);
        assert!(first != second && entry(&desired).applied.is_none());
        // The document is put again.
        put(&mut desired, 2, &text);
        assert_eq!((entry(&desired).current().0, image(&desired), previous(&desired)), (2, "i2", Some(1)));
        desired.started("web", &second, "c2", "b");
        // The tag moves on, and back.
        assert!(desired.move_tag("web", "i3") && desired.move_tag("web", "i1"));
        assert_eq!((image(&desired), digest(&desired), previous(&desired)), ("i1", first, None));
        assert_eq!(entry(&desired).applied.as_ref().unwrap().container, "c1");
        // Documents that follow no tag have no image.
        put(&mut desired, 3, DOCUMENT);
        assert!(!desired.move_tag("web", "i4") && entry(&desired).image.is_none());
        let named = desired.images();
        assert_eq!(
            (named.references.len(), named.ids.into_iter().collect::<Vec<_>>()),
            (1, vec!["i1".to_owned()])
        );
    }

    #[test]
    fn an_image_that_was_rolled_back_is_not_tried_again() {
        let (mut desired, text) = following();
        desired.move_tag("web", "i2");
        let second = digest(&desired);
        desired.started("web", &second, "c2", "b");
        desired.retire_previous("web");
        assert!(desired.roll_back("web", "it ended", false));
        assert_eq!(image(&desired), "i1");
        assert!(!desired.move_tag("web", "i2") && entry(&desired).failure().is_some());
        let reread: Desired = serde_json::from_value(serde_json::to_value(&desired).unwrap()).unwrap();
        assert_eq!(reread, desired);
        let mut next = desired.clone();
        assert!(next.move_tag("web", "i3"), "a further image gets a chance");
        assert_eq!((image(&next), previous(&next), entry(&next).failure()), ("i3", Some(1), None));
        let mut back = desired.clone();
        assert!(back.move_tag("web", "i1"), "the tag was moved back");
        assert_eq!((image(&back), previous(&back), entry(&back).failure()), ("i1", None, None));
        assert_eq!(entry(&back).applied.as_ref().unwrap().container, "c1");
        put(&mut desired, 2, &text);
        assert!(desired.move_tag("web", "i2"), "a put gives a new chance");
    }
}
