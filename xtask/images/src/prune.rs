//! `cargo xtask image prune` deletes images, snapshots and kernels that are not needed any more. It never deletes an
//! image or a snapshot that a run uses.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use xtask_core::cli::PruneArgs;
use xtask_core::digest::Algorithm;
use xtask_core::error::Kind;
use xtask_core::format::human_bytes;
use xtask_core::fs::{directories, is_own, try_lock};
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::runs::users_of;
use xtask_core::snapshot::{FORMAT, Ingredients, SnapshotManifest};

use crate::snapshots::{self, Found};
use crate::store::{CachedImage, FETCHING, Store, name_of};

/// The number of seconds in a day.
pub(crate) const DAY: u64 = 24 * 60 * 60;

/// A deletion, and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Deletion {
    pub(crate) key: String,
    pub(crate) bytes: u64,
    pub(crate) reason: String,
}

/// An image or a snapshot that may be deleted.
#[derive(Debug, Clone)]
struct Candidate {
    key: String,
    bytes: u64,
    idle_seconds: u64,
    used: bool,
    /// The reason to delete the candidate regardless of the arguments, if there is one.
    against: Option<&'static str>,
    /// The additional facts about a snapshot; `None` for an image.
    snapshot: Option<OfSnapshot>,
}

/// The facts that only a snapshot has. `lock` is the key that is locked while the snapshot is deleted.
#[derive(Debug, Clone, Default)]
struct OfSnapshot {
    directory: PathBuf,
    lock: String,
    /// The key of the image below the snapshot, if the image is in the cache.
    image: Option<String>,
}

/// Deletes the images, snapshots and partial downloads that the arguments select. Returns the deletions, which a dry
/// run only lists.
pub(crate) fn prune(store: &Store<'_>, args: &PruneArgs, named: &[String]) -> Result<Vec<Deletion>> {
    if !args.dry_run {
        store.collect_dead_builds("")?;
    }
    let kept = store.kept();
    let mut candidates: Vec<_> = kept.iter().map(|image| Candidate::of_image(image, named, args)).collect();
    let snapshots = snapshots::all(store.cache);
    for found in &snapshots {
        match Candidate::of_snapshot(store, found, &snapshots, &kept) {
            Ok(candidate) => candidates.push(candidate),
            Err(error) if Kind::Interrupted.is(&error) => return Err(error),
            Err(error) => store.ui.line(&format!("not deleted: {}: {error:#}", found.name())),
        }
    }
    let mut to_delete = Vec::new();
    for (one, reason) in choose(&candidates, args) {
        let verb = if args.dry_run { "would delete" } else { "deleting" };
        store.ui.note(&format!("{verb} {} ({}): {reason}", one.key, human_bytes(one.bytes)));
        match if args.dry_run { Ok(true) } else { one.delete(store) } {
            Ok(true) => to_delete.push(Deletion { key: one.key.clone(), bytes: one.bytes, reason }),
            Ok(false) => {}
            Err(error) if Kind::Interrupted.is(&error) => return Err(error),
            Err(error) => store.ui.line(&format!("not deleted: {}: {error:#}", one.key)),
        }
    }
    if unnamed_too(args) {
        to_delete.extend(abandoned_downloads(store, args.dry_run, named)?);
    }
    to_delete.extend(crate::kernels::prune(store, args)?);
    Ok(to_delete)
}

impl Candidate {
    fn of_image(image: &CachedImage, named: &[String], args: &PruneArgs) -> Self {
        let against = match &image.manifest {
            None => Some("its manifest cannot be read"),
            Some(_) if named.contains(&image.key) || !unnamed_too(args) => None,
            Some(_) => Some("it is not in the catalogue"),
        };
        Self {
            key: image.key.clone(),
            bytes: image.manifest.as_ref().map_or(0, |manifest| manifest.stamp.bytes),
            idle_seconds: image.idle_seconds,
            used: !image.used_by.is_empty(),
            against,
            snapshot: None,
        }
    }

    fn of_snapshot(store: &Store<'_>, found: &Found, all: &[Found], kept: &[CachedImage]) -> Result<Self> {
        let path = found.manifest.as_ref().map(|manifest| &manifest.ingredients.image_path);
        let image = path.and_then(|path| kept.iter().find(|image| path.starts_with(&image.directory)));
        Ok(Self {
            key: found.name(),
            bytes: found.bytes(),
            idle_seconds: found.idle_seconds(),
            used: !found.users.is_empty(),
            against: against(store, found, all)?,
            snapshot: Some(OfSnapshot {
                directory: found.directory.clone(),
                lock: found.key(),
                image: image.map(|image| image.key.clone()),
            }),
        })
    }

    /// Deletes the candidate. Returns false if it was not deleted, because a run has begun to use it or another
    /// process has deleted it since the candidates were listed.
    fn delete(&self, store: &Store<'_>) -> Result<bool> {
        let Some(OfSnapshot { directory, lock, .. }) = &self.snapshot else {
            let _lock = store.lock(&self.key)?;
            if let Err(used) = store.refuse_used(&self.key) {
                store.ui.note(&format!("not deleted: {used}"));
                return Ok(false);
            }
            store.remove(&self.key)?;
            return Ok(true);
        };
        let _lock = snapshots::lock(store.cache, lock, limits::SNAPSHOT_WAIT, store.ui)?;
        if !directory.exists() {
            return Ok(false);
        }
        let users = users_of(store.cache, directory);
        if !users.is_empty() {
            store.ui.note(&format!("not deleted: {} uses it", users.join(", ")));
            return Ok(false);
        }
        snapshots::remove(directory)?;
        Ok(true)
    }
}

/// Returns the reason to delete a snapshot regardless of the arguments; `None` if there is no reason. A snapshot is
/// deleted if it is damaged or of another version, if its image or its QEMU is gone, or if a newer snapshot replaces
/// it. A snapshot in use is never deleted. A deleted snapshot can be made again in a minute.
fn against(store: &Store<'_>, found: &Found, all: &[Found]) -> Result<Option<&'static str>> {
    Ok(Some(match &found.manifest {
        _ if !found.users.is_empty() => return Ok(None),
        None => "a snapshot that cannot be read",
        Some(_) if !found.is_good => "a snapshot that was found changed, or is half deleted",
        Some(snapshot) if snapshot.ingredients.format != FORMAT => "a snapshot of another version",
        Some(snapshot) if !has_image(store, &snapshot.ingredients)? => {
            "a snapshot of an image that no longer exists"
        }
        Some(snapshot) if !has_emulator(store, snapshot)? => {
            "a snapshot of a QEMU that is no longer installed"
        }
        Some(snapshot)
            if all.iter().filter(|other| other.is_good).any(|other| is_replaced(snapshot, other)) =>
        {
            "a snapshot that was replaced by a newer one of the same machine"
        }
        Some(_) => return Ok(None),
    }))
}

/// Returns whether `other` is a newer snapshot of the same image and domain. The two can differ only in the seed, the
/// firmware, QEMU or libvirt, and the newer one has the current ones.
fn is_replaced(snapshot: &SnapshotManifest, other: &Found) -> bool {
    let Some(other) = &other.manifest else { return false };
    let machine = |snapshot: &SnapshotManifest| {
        let Ingredients { image, domain, payload_bytes, .. } = &snapshot.ingredients;
        (image.clone(), domain.clone(), *payload_bytes)
    };
    // Times of RFC 3339, if all of them are in UTC, sort in the order of time.
    machine(snapshot) == machine(other) && snapshot.made_at < other.made_at
}

/// Returns whether the image below a snapshot is still in its place and unchanged.
fn has_image(store: &Store<'_>, made_of: &Ingredients) -> Result<bool> {
    let path = &made_of.image_path;
    if !path.exists() {
        return Ok(false);
    }
    let cached = store.kept().into_iter().find(|image| path.starts_with(&image.directory));
    let digest = match cached {
        Some(image) => image.manifest.map(|manifest| manifest.digest),
        None => Some(store.remembered_digest(path, Algorithm::Sha256)?),
    };
    Ok(digest.is_some_and(|digest| digest == made_of.image))
}

/// Returns whether the installed QEMU is the one that saved the snapshot. If no QEMU is installed, the result is true,
/// since the same QEMU may be installed again.
fn has_emulator(store: &Store<'_>, snapshot: &SnapshotManifest) -> Result<bool> {
    let Some(emulator) = tools::find(snapshot.arch.profile().emulator) else { return Ok(true) };
    Ok(store.remembered_digest(&emulator, Algorithm::Sha256)? == snapshot.ingredients.emulator)
}

/// Returns whether to delete images that the catalogue does not name. They are deleted if the user requested it or
/// gave no other criterion.
fn unnamed_too(args: &PruneArgs) -> bool {
    args.unnamed || args.older_than.is_none() && args.keep.is_none()
}

/// Chooses the candidates to delete, each with the reason. First it chooses every candidate that has a reason of its
/// own, and every candidate that was not used for the requested number of days. Then it chooses the candidates that
/// were unused for the longest time, until the others fit into the requested size. A snapshot is chosen before its
/// image, and an image is never chosen without its snapshots. The result lists images first.
fn choose<'a>(candidates: &'a [Candidate], args: &PruneArgs) -> Vec<(&'a Candidate, String)> {
    let mut to_delete: BTreeMap<usize, String> = BTreeMap::new();
    let mut free: Vec<usize> = (0..candidates.len()).filter(|at| !candidates[*at].used).collect();
    for at in &free {
        let Candidate { against, idle_seconds, .. } = &candidates[*at];
        let is_old = args.older_than.is_some_and(|days| *idle_seconds >= days * DAY);
        let idle = is_old.then(|| format!("not used for {} days", idle_seconds / DAY));
        to_delete.extend(against.map(str::to_owned).or(idle).map(|reason| (*at, reason)));
    }
    add_snapshots_of_deleted_images(candidates, &mut to_delete);
    if let Some(limit) = args.keep {
        free.sort_by_key(|at| (Reverse(candidates[*at].idle_seconds), candidates[*at].snapshot.is_none()));
        for at in free {
            let left = (0..candidates.len()).filter(|at| !to_delete.contains_key(at));
            if left.map(|at| candidates[at].bytes).sum::<u64>() <= limit {
                break;
            }
            to_delete.entry(at).or_insert_with(|| format!("more than {} are cached", human_bytes(limit)));
            add_snapshots_of_deleted_images(candidates, &mut to_delete);
        }
    }
    to_delete.into_iter().map(|(at, reason)| (&candidates[at], reason)).collect()
}

fn add_snapshots_of_deleted_images(candidates: &[Candidate], to_delete: &mut BTreeMap<usize, String>) {
    for (at, one) in candidates.iter().enumerate().filter(|(_, one)| !one.used) {
        let image = one.snapshot.as_ref().and_then(|snapshot| snapshot.image.as_ref());
        if let Some(image) = image.filter(|image| to_delete.keys().any(|at| candidates[*at].key == **image)) {
            to_delete.entry(at).or_insert_with(|| format!("a snapshot of {image}, which is deleted"));
        }
    }
}

/// Deletes partial downloads that the catalogue does not name, since no run will resume them.
fn abandoned_downloads(store: &Store<'_>, dry_run: bool, named: &[String]) -> Result<Vec<Deletion>> {
    let mut found = Vec::new();
    for directory in directories(&store.cache.images()).into_iter().filter(|directory| is_own(directory)) {
        let name = name_of(&directory);
        let Some(key) = name.strip_suffix(FETCHING).filter(|key| !named.iter().any(|name| name == key))
        else {
            continue;
        };
        let Some(_lock) = try_lock(&store.directory(&format!("{key}.lock")))? else { continue };
        if !dry_run {
            crate::discard::discard(&directory, store.ui)?;
        }
        store.ui.note(&format!("{} {name}", if dry_run { "would delete" } else { "deleted" }));
        let reason = "a partial download that is not in the catalogue".to_owned();
        found.push(Deletion { key: name, bytes: 0, reason });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use xtask_core::cache::Cache;
    use xtask_core::fs::make_own_dir;
    use xtask_jobs::Ui;

    use super::*;

    fn candidate(key: &str, mib: u64, days: u64, used: bool) -> Candidate {
        Candidate {
            key: key.to_owned(),
            bytes: mib << 20,
            idle_seconds: days * DAY,
            used,
            against: None,
            snapshot: None,
        }
    }

    fn snapshot_of(image: &str, key: &str, mib: u64, days: u64) -> Candidate {
        let snapshot = Some(OfSnapshot { image: Some(image.to_owned()), ..OfSnapshot::default() });
        Candidate { snapshot, ..candidate(key, mib, days, false) }
    }

    fn chosen(args: &PruneArgs) -> Vec<String> {
        let unnamed = Candidate { against: Some("unnamed"), ..candidate("unnamed", 500, 1, false) };
        let candidates = [
            candidate("new", 500, 0, false),
            candidate("idle", 500, 40, false),
            unnamed,
            candidate("used", 500, 90, true),
            snapshot_of("new", "snapshot", 400, 0),
            snapshot_of("new", "idle snapshot", 400, 50),
            snapshot_of("unnamed", "snapshot of unnamed", 400, 1),
            Candidate { used: true, ..snapshot_of("used", "used snapshot", 400, 90) },
        ];
        choose(&candidates, args).into_iter().map(|(one, _)| one.key.clone()).collect()
    }

    #[test]
    fn what_a_run_uses_stays_whatever_is_asked() {
        let none = PruneArgs::default();
        let keep = |mib: u64| PruneArgs { keep: Some(mib << 20), ..none.clone() };
        let always = ["unnamed", "snapshot of unnamed"];
        assert_eq!(chosen(&none), always);
        let old = PruneArgs { older_than: Some(30), ..none.clone() };
        assert_eq!(chosen(&old), ["idle", "unnamed", "idle snapshot", "snapshot of unnamed"]);
        // After the unnamed images are deleted, 2700 MiB are left: three images and three snapshots.
        assert_eq!(chosen(&keep(2700)), always);
        assert_eq!(
            chosen(&keep(2600)),
            ["unnamed", "idle snapshot", "snapshot of unnamed"],
            "the longest unused"
        );
        assert_eq!(chosen(&keep(2000)), ["idle", "unnamed", "idle snapshot", "snapshot of unnamed"]);
        let but_new = ["idle", "unnamed", "snapshot", "idle snapshot", "snapshot of unnamed"];
        assert_eq!(chosen(&keep(1400)), but_new, "a snapshot before its image");
        assert_eq!(
            chosen(&keep(0)),
            ["new", "idle", "unnamed", "snapshot", "idle snapshot", "snapshot of unnamed"]
        );
    }

    #[test]
    fn a_snapshot_that_cannot_be_deleted_stops_no_other_deletion() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, ui) = (Cache::at(directory.path()), Ui::quiet());
        let [blocked, free] = ["a.0101-000000-0001", "b.0101-000000-0002"].map(|name| {
            let snapshot = cache.snapshots().join(name);
            make_own_dir(&snapshot).unwrap();
            snapshot
        });
        // This lock cannot be opened, as if it belonged to another user.
        std::os::unix::fs::symlink(directory.path().join("missing"), cache.snapshots().join("a.lock"))
            .unwrap();
        let store = Store { cache: &cache, ui: &ui, offline: true, run: None };
        let deleted = prune(&store, &PruneArgs::default(), &[]).unwrap();
        assert_eq!(deleted.iter().map(|one| &*one.key).collect::<Vec<_>>(), ["b.0101-000000-0002"]);
        assert!(blocked.exists() && !free.exists());
    }

    #[test]
    fn a_newer_snapshot_of_the_same_machine_replaces_an_older_one() {
        let digest = |of: &str| Algorithm::Sha256.of(of.as_bytes());
        let snapshot = |domain: &str, seed: &str, made_at: &str| SnapshotManifest {
            ingredients: Ingredients {
                format: FORMAT,
                image: digest("image"),
                image_path: "/disk".into(),
                seed: digest(seed),
                domain: digest(domain),
                firmware_code: digest("code"),
                firmware_vars: digest("vars"),
                emulator: digest("emulator"),
                qemu: String::new(),
                libvirt: String::new(),
                payload_bytes: 64,
            },
            image: "debian-12".to_owned(),
            arch: xtask_core::arch::VmArchitecture::Aarch64,
            uuid: String::new(),
            made_at: made_at.to_owned(),
            made_by: String::new(),
            files: BTreeMap::new(),
        };
        let found = |snapshot| Found {
            directory: "/snapshots/x.y".into(),
            manifest: Some(snapshot),
            is_good: true,
            users: Vec::new(),
        };
        let (morning, noon) = ("2026-11-26T09:00:00Z", "2026-11-26T12:00:00Z");
        let old = snapshot("2 GiB", "a", morning);
        assert!(is_replaced(&old, &found(snapshot("2 GiB", "b", noon))));
        assert!(!is_replaced(&old, &found(snapshot("4 GiB", "b", noon))), "another machine");
        assert!(!is_replaced(&snapshot("2 GiB", "b", noon), &found(old.clone())), "the newer one stays");
        assert!(!is_replaced(&old, &found(old.clone())));
    }

    #[test]
    fn what_the_catalogue_does_not_name_goes_where_nothing_else_is_asked() {
        let none = PruneArgs::default();
        assert!(unnamed_too(&none));
        assert!(!unnamed_too(&PruneArgs { older_than: Some(1), ..none.clone() }));
        assert!(!unnamed_too(&PruneArgs { keep: Some(1), ..none.clone() }));
        assert!(unnamed_too(&PruneArgs { older_than: Some(1), unnamed: true, ..none }));
    }
}
