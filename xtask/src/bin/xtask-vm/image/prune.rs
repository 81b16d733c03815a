//! `cargo xtask image prune`: what nobody needs any more. Never what a run uses.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use xtask::cli::PruneArgs;
use xtask::digest::Algorithm;
use xtask::host::tools;
use xtask::layer::{FORMAT, Ingredients, Layer};
use xtask::limits;
use xtask::paths::is_own;
use xtask::report::human_bytes;
use xtask::run_dir::{directories, try_lock, users_of};

use super::build;
use super::store::{FETCHING, Kept, Store};
use crate::layer;

/// Seconds of a day.
const DAY: u64 = 24 * 60 * 60;

/// Something to delete, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Doomed {
    key: String,
    bytes: u64,
    reason: String,
}

/// What the choice looks at: an image, or a warm layer.
#[derive(Debug, Clone)]
struct Candidate {
    key: String,
    bytes: u64,
    idle_seconds: u64,
    used: bool,
    /// Why it goes whatever is asked.
    against: Option<String>,
    /// What a layer locks while it is deleted, and the image that it lies on; `None` of an image.
    layer: Option<OfLayer>,
}

/// What tells a layer from an image.
#[derive(Debug, Clone, Default)]
struct OfLayer {
    directory: PathBuf,
    lock: String,
    /// The key of its image, where that is in the cache.
    image: Option<String>,
}

/// Deletes what the arguments say; returns what was deleted, or would be.
pub(super) fn prune(store: &mut Store<'_>, args: &PruneArgs, named: &[String]) -> Result<Vec<Doomed>> {
    if !args.dry_run {
        store.collect_dead_builds("")?;
    }
    let kept = store.kept();
    let mut candidates: Vec<_> = kept.iter().map(|image| Candidate::of_image(image, named, args)).collect();
    let layers = layer::all(store.cache);
    for found in &layers {
        candidates.push(Candidate::of_layer(store, found, &layers, &kept)?);
    }
    let mut doomed = Vec::new();
    for (one, reason) in choose(&candidates, args) {
        let told = if args.dry_run { "would delete" } else { "deleting" };
        store.screen.note(&format!("{told} {} ({}): {reason}", one.key, human_bytes(one.bytes)));
        if args.dry_run || one.delete(store)? {
            doomed.push(Doomed { key: one.key.clone(), bytes: one.bytes, reason });
        }
    }
    if unnamed_too(args) {
        doomed.extend(abandoned_downloads(store, args.dry_run, named)?);
    }
    Ok(doomed)
}

impl Candidate {
    fn of_image(image: &Kept, named: &[String], args: &PruneArgs) -> Self {
        let against = if image.manifest.is_none() {
            Some("its manifest cannot be read".to_owned())
        } else if unnamed_too(args) && !named.contains(&image.key) {
            Some("the catalogue does not name it".to_owned())
        } else {
            None
        };
        Self {
            key: image.key.clone(),
            bytes: image.manifest.as_ref().map_or(0, |manifest| manifest.stamp.bytes),
            idle_seconds: image.idle_seconds,
            used: !image.used_by.is_empty(),
            against,
            layer: None,
        }
    }

    fn of_layer(
        store: &mut Store<'_>,
        found: &layer::Found,
        all: &[layer::Found],
        kept: &[Kept],
    ) -> Result<Self> {
        let path = found.layer.as_ref().map(|layer| &layer.ingredients.image_path);
        let image = path.and_then(|path| kept.iter().find(|image| path.starts_with(&image.directory)));
        Ok(Self {
            key: found.name(),
            bytes: found.bytes(),
            idle_seconds: found.idle_seconds(),
            used: !found.users.is_empty(),
            against: against(store, found, all)?,
            layer: Some(OfLayer {
                directory: found.directory.clone(),
                lock: found.key(),
                image: image.map(|image| image.key.clone()),
            }),
        })
    }

    /// Whether it is gone: between the listing and the lock a run may have taken it.
    fn delete(&self, store: &mut Store<'_>) -> Result<bool> {
        let Some(OfLayer { directory, lock, .. }) = &self.layer else {
            let _lock = store.lock(&self.key)?;
            if let Err(used) = store.refuse_used(&self.key) {
                store.screen.note(&format!("kept after all: {used}"));
                return Ok(false);
            }
            store.remove(&self.key)?;
            return Ok(true);
        };
        let _lock = layer::lock(store.cache, lock, limits::LAYER_MADE, store.interrupt, store.screen)?;
        if !directory.exists() {
            return Ok(false);
        }
        let users = users_of(store.cache, directory);
        if !users.is_empty() {
            store.screen.note(&format!("kept after all: {} lies on it", users.join(", ")));
            return Ok(false);
        }
        layer::remove(directory)?;
        Ok(true)
    }
}

/// Why a layer is deleted whatever is asked, if it is: of an image or a QEMU that is not there any more, or found changed. Each is
/// made again in a minute.
fn against(store: &mut Store<'_>, found: &layer::Found, all: &[layer::Found]) -> Result<Option<String>> {
    let reason = match &found.layer {
        _ if !found.users.is_empty() => return Ok(None),
        None => "a warm layer that cannot be read",
        Some(_) if !found.is_good => "a warm layer that was found changed, or is half deleted",
        Some(layer) if layer.ingredients.format != FORMAT => "a warm layer of another version",
        Some(layer) if !has_image(store, &layer.ingredients)? => {
            "a warm layer of an image that is not there any more"
        }
        Some(layer) if !has_emulator(store, layer)? => "a warm layer of a QEMU that is not there any more",
        Some(layer) if all.iter().filter(|other| other.is_good).any(|other| is_replaced(layer, other)) => {
            "a warm layer that a newer one of the same machine has replaced"
        }
        Some(_) => return Ok(None),
    };
    Ok(Some(reason.to_owned()))
}

/// Whether a newer layer is of the same image and domain, and of another seed, firmware, QEMU or libvirt: those of now, as this one's
/// were those of then.
fn is_replaced(layer: &Layer, other: &layer::Found) -> bool {
    let Some(other) = &other.layer else { return false };
    let machine = |layer: &Layer| {
        let Ingredients { image, domain, payload_bytes, .. } = &layer.ingredients;
        (image.clone(), domain.clone(), *payload_bytes)
    };
    // RFC 3339 in UTC: in the order of time.
    machine(layer) == machine(other) && layer.made_at < other.made_at
}

/// Whether the image that a layer lies on is still where it was, and the same.
fn has_image(store: &mut Store<'_>, made_of: &Ingredients) -> Result<bool> {
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

/// Whether the QEMU that froze it is the one that is found. Where none is, it may come back.
fn has_emulator(store: &mut Store<'_>, layer: &Layer) -> Result<bool> {
    let Some(emulator) = tools::find(layer.arch.profile().emulator) else { return Ok(true) };
    Ok(store.remembered_digest(&emulator, Algorithm::Sha256)? == layer.ingredients.emulator)
}

/// Asked for, or nothing else was.
fn unnamed_too(args: &PruneArgs) -> bool {
    args.unnamed || args.older_than.is_none() && args.keep.is_none()
}

/// What goes, images first, and why: what something speaks against, what was not used for long, and then, until the rest fits, the
/// longest unused; a layer before the image that it lies on, and never without it.
fn choose<'a>(candidates: &'a [Candidate], args: &PruneArgs) -> Vec<(&'a Candidate, String)> {
    let mut doomed: BTreeMap<usize, String> = BTreeMap::new();
    let mut free: Vec<usize> = (0..candidates.len()).filter(|at| !candidates[*at].used).collect();
    for at in &free {
        let Candidate { against, idle_seconds, .. } = &candidates[*at];
        let is_old = args.older_than.is_some_and(|days| *idle_seconds >= days * DAY);
        let idle = is_old.then(|| format!("not used for {} days", idle_seconds / DAY));
        doomed.extend(against.clone().or(idle).map(|reason| (*at, reason)));
    }
    doom_layers_of_the_doomed(candidates, &mut doomed);
    if let Some(limit) = args.keep {
        free.sort_by_key(|at| (Reverse(candidates[*at].idle_seconds), candidates[*at].layer.is_none()));
        for at in free {
            let left = (0..candidates.len()).filter(|at| !doomed.contains_key(at));
            if left.map(|at| candidates[at].bytes).sum::<u64>() <= limit {
                break;
            }
            doomed.entry(at).or_insert_with(|| format!("more than {} are kept", human_bytes(limit)));
            doom_layers_of_the_doomed(candidates, &mut doomed);
        }
    }
    doomed.into_iter().map(|(at, reason)| (&candidates[at], reason)).collect()
}

fn doom_layers_of_the_doomed(candidates: &[Candidate], doomed: &mut BTreeMap<usize, String>) {
    for (at, one) in candidates.iter().enumerate().filter(|(_, one)| !one.used) {
        let image = one.layer.as_ref().and_then(|layer| layer.image.as_ref());
        if let Some(image) = image.filter(|image| doomed.keys().any(|at| candidates[*at].key == **image)) {
            doomed.entry(at).or_insert_with(|| format!("a warm layer of {image}, which goes"));
        }
    }
}

/// Parts of downloads that the catalogue does not name: nobody goes on with them.
fn abandoned_downloads(store: &mut Store<'_>, dry_run: bool, named: &[String]) -> Result<Vec<Doomed>> {
    let mut found = Vec::new();
    for directory in directories(&store.images()).into_iter().filter(|directory| is_own(directory)) {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(key) = name.strip_suffix(FETCHING).filter(|key| !named.iter().any(|name| name == key))
        else {
            continue;
        };
        let Some(_lock) = try_lock(&store.directory(&format!("{key}.lock")))? else { continue };
        if !dry_run {
            build::discard(&directory, store.interrupt)?;
        }
        store.screen.note(&format!("{} {name}", if dry_run { "would delete" } else { "deleted" }));
        let reason = "a part of a download that the catalogue does not name".to_owned();
        found.push(Doomed { key: name, bytes: 0, reason });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(key: &str, mib: u64, days: u64, used: bool) -> Candidate {
        Candidate {
            key: key.to_owned(),
            bytes: mib << 20,
            idle_seconds: days * DAY,
            used,
            against: None,
            layer: None,
        }
    }

    fn layer_of(image: &str, key: &str, mib: u64, days: u64) -> Candidate {
        let layer = Some(OfLayer { image: Some(image.to_owned()), ..OfLayer::default() });
        Candidate { layer, ..candidate(key, mib, days, false) }
    }

    fn chosen(args: &PruneArgs) -> Vec<String> {
        let unnamed =
            Candidate { against: Some("unnamed".to_owned()), ..candidate("unnamed", 500, 1, false) };
        let candidates = [
            candidate("new", 500, 0, false),
            candidate("idle", 500, 40, false),
            unnamed,
            candidate("used", 500, 90, true),
            layer_of("new", "layer", 400, 0),
            layer_of("new", "idle layer", 400, 50),
            layer_of("unnamed", "layer of unnamed", 400, 1),
            Candidate { used: true, ..layer_of("used", "used layer", 400, 90) },
        ];
        choose(&candidates, args).into_iter().map(|(one, _)| one.key.clone()).collect()
    }

    #[test]
    fn what_a_run_uses_stays_whatever_is_asked() {
        let none = PruneArgs::default();
        let keep = |mib: u64| PruneArgs { keep: Some(mib << 20), ..none.clone() };
        let always = ["unnamed", "layer of unnamed"];
        assert_eq!(chosen(&none), always);
        let old = PruneArgs { older_than: Some(30), ..none.clone() };
        assert_eq!(chosen(&old), ["idle", "unnamed", "idle layer", "layer of unnamed"]);
        // 2700 MiB are left by then: three images and three layers.
        assert_eq!(chosen(&keep(2700)), always);
        assert_eq!(chosen(&keep(2600)), ["unnamed", "idle layer", "layer of unnamed"], "the longest unused");
        assert_eq!(chosen(&keep(2000)), ["idle", "unnamed", "idle layer", "layer of unnamed"]);
        let but_new = ["idle", "unnamed", "layer", "idle layer", "layer of unnamed"];
        assert_eq!(chosen(&keep(1400)), but_new, "a layer before its image");
        assert_eq!(chosen(&keep(0)), ["new", "idle", "unnamed", "layer", "idle layer", "layer of unnamed"]);
    }

    #[test]
    fn a_newer_layer_of_the_same_machine_replaces_an_older_one() {
        let digest = |of: &str| Algorithm::Sha256.of(of.as_bytes());
        let layer = |domain: &str, seed: &str, made_at: &str| Layer {
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
            arch: xtask::arch::VmArchitecture::Aarch64,
            uuid: String::new(),
            made_at: made_at.to_owned(),
            made_by: String::new(),
            files: BTreeMap::new(),
        };
        let found = |layer| layer::Found {
            directory: "/layers/x.y".into(),
            layer: Some(layer),
            is_good: true,
            users: Vec::new(),
        };
        let (morning, noon) = ("2026-11-26T09:00:00Z", "2026-11-26T12:00:00Z");
        let old = layer("2 GiB", "a", morning);
        assert!(is_replaced(&old, &found(layer("2 GiB", "b", noon))));
        assert!(!is_replaced(&old, &found(layer("4 GiB", "b", noon))), "another machine");
        assert!(!is_replaced(&layer("2 GiB", "b", noon), &found(old.clone())), "the newer one stays");
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
