//! `cargo xtask image prune`: what nobody needs any more. Never what a run uses.

use anyhow::Result;
use serde::Serialize;
use xtask::cli::PruneArgs;
use xtask::digest::Algorithm;
use xtask::host::tools;
use xtask::layer::{FORMAT, Ingredients, Layer};
use xtask::limits;
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

/// What the choice looks at.
#[derive(Debug, Clone)]
struct Candidate {
    key: String,
    bytes: u64,
    idle_seconds: u64,
    named: bool,
    used: bool,
    readable: bool,
}

/// Deletes what the arguments say; returns what was deleted, or would be.
pub(super) fn prune(store: &mut Store<'_>, args: &PruneArgs, named: &[String]) -> Result<Vec<Doomed>> {
    if !args.dry_run {
        store.collect_dead_builds("")?;
    }
    let kept = store.kept();
    let candidates: Vec<_> = kept.iter().map(|image| Candidate::of(image, named)).collect();
    let mut doomed = Vec::new();
    for one in choose(&candidates, args) {
        store.screen.note(&format!(
            "{} {} ({}): {}",
            if args.dry_run { "would delete" } else { "deleting" },
            one.key,
            human_bytes(one.bytes),
            one.reason
        ));
        if !args.dry_run {
            let _lock = store.lock(&one.key)?;
            // Between the listing and the lock a run may have taken it.
            if let Err(used) = store.refuse_used(&one.key) {
                store.screen.note(&format!("kept after all: {used}"));
                continue;
            }
            store.remove(&one.key)?;
        }
        doomed.push(one);
    }
    doomed.extend(prune_layers(store, args)?);
    if unnamed_too(args) {
        doomed.extend(abandoned_downloads(store, args.dry_run, named)?);
    }
    Ok(doomed)
}

impl Candidate {
    fn of(image: &Kept, named: &[String]) -> Self {
        Self {
            key: image.key.clone(),
            bytes: image.manifest.as_ref().map_or(0, |manifest| manifest.stamp.bytes),
            idle_seconds: image.idle_seconds,
            named: named.contains(&image.key),
            used: !image.used_by.is_empty(),
            readable: image.manifest.is_some(),
        }
    }
}

/// Warm layers: of an image or a QEMU that is not there any more, found changed, or not used for as long as images may be. Each is made again in a
/// minute.
fn prune_layers(store: &mut Store<'_>, args: &PruneArgs) -> Result<Vec<Doomed>> {
    let mut doomed = Vec::new();
    for found in layer::all(store.cache) {
        let Some(reason) = against(store, &found, args)? else { continue };
        let one = Doomed { key: found.name(), bytes: found.bytes(), reason };
        let told = if args.dry_run { "would delete" } else { "deleting" };
        store.screen.note(&format!("{told} {} ({}): {}", one.key, human_bytes(one.bytes), one.reason));
        if !args.dry_run {
            let _lock =
                layer::lock(store.cache, &found.key(), limits::LAYER_MADE, store.interrupt, store.screen)?;
            if !found.directory.exists() {
                continue;
            }
            let users = users_of(store.cache, &found.directory);
            if !users.is_empty() {
                store.screen.note(&format!("kept after all: {} lies on it", users.join(", ")));
                continue;
            }
            layer::remove(&found.directory)?;
        }
        doomed.push(one);
    }
    Ok(doomed)
}

/// Why a layer is deleted, if it is.
fn against(store: &mut Store<'_>, found: &layer::Found, args: &PruneArgs) -> Result<Option<String>> {
    let idle = found.idle_seconds();
    let reason = match &found.layer {
        _ if !found.users.is_empty() => return Ok(None),
        None => "a warm layer that cannot be read".to_owned(),
        Some(_) if !found.is_good => "a warm layer that was found changed, or is half deleted".to_owned(),
        Some(layer) if layer.ingredients.format != FORMAT => "a warm layer of another version".to_owned(),
        Some(layer) if !has_image(store, &layer.ingredients)? => {
            "a warm layer of an image that is not there any more".to_owned()
        }
        Some(layer) if !has_emulator(store, layer)? => {
            "a warm layer of a QEMU that is not there any more".to_owned()
        }
        Some(_) if args.older_than.is_some_and(|days| idle >= days * DAY) => {
            format!("a warm layer that was not used for {} days", idle / DAY)
        }
        Some(_) => return Ok(None),
    };
    Ok(Some(reason))
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

/// Without a wish of its own: what the catalogue does not name any more.
fn choose(candidates: &[Candidate], args: &PruneArgs) -> Vec<Doomed> {
    let unnamed = unnamed_too(args);
    let free: Vec<_> = candidates.iter().filter(|image| !image.used).collect();
    let mut doomed: Vec<Doomed> = Vec::new();
    for image in &free {
        let reason = if !image.readable {
            "its manifest cannot be read".to_owned()
        } else if unnamed && !image.named {
            "the catalogue does not name it".to_owned()
        } else if args.older_than.is_some_and(|days| image.idle_seconds >= days * DAY) {
            format!("not used for {} days", image.idle_seconds / DAY)
        } else {
            continue;
        };
        doomed.push(Doomed { key: image.key.clone(), bytes: image.bytes, reason });
    }
    if let Some(limit) = args.keep {
        let gone = |key: &str, doomed: &[Doomed]| doomed.iter().any(|one| one.key == key);
        let mut left: u64 =
            candidates.iter().filter(|image| !gone(&image.key, &doomed)).map(|image| image.bytes).sum();
        let mut longest_idle = free;
        longest_idle.sort_by_key(|image| std::cmp::Reverse(image.idle_seconds));
        for image in longest_idle {
            if left > limit && !gone(&image.key, &doomed) {
                left -= image.bytes;
                let reason = format!("more than {} are kept", human_bytes(limit));
                doomed.push(Doomed { key: image.key.clone(), bytes: image.bytes, reason });
            }
        }
    }
    doomed
}

/// Parts of downloads that the catalogue does not name: nobody goes on with them.
fn abandoned_downloads(store: &mut Store<'_>, dry_run: bool, named: &[String]) -> Result<Vec<Doomed>> {
    let mut found = Vec::new();
    for directory in directories(&store.images()) {
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

    fn candidate(key: &str, mib: u64, days: u64, named: bool, used: bool) -> Candidate {
        Candidate {
            key: key.to_owned(),
            bytes: mib << 20,
            idle_seconds: days * DAY,
            named,
            used,
            readable: true,
        }
    }

    fn chosen(args: &PruneArgs) -> Vec<String> {
        let candidates = [
            candidate("new", 500, 0, true, false),
            candidate("idle", 500, 40, true, false),
            candidate("unnamed", 500, 1, false, false),
            candidate("used", 500, 90, false, true),
        ];
        choose(&candidates, args).into_iter().map(|one| one.key).collect()
    }

    #[test]
    fn what_a_run_uses_stays_whatever_is_asked() {
        let none = PruneArgs::default();
        assert_eq!(chosen(&none), ["unnamed"]);
        assert_eq!(chosen(&PruneArgs { older_than: Some(30), ..none.clone() }), ["idle"]);
        assert_eq!(
            chosen(&PruneArgs { older_than: Some(30), unnamed: true, ..none.clone() }),
            ["idle", "unnamed"]
        );
        assert_eq!(
            chosen(&PruneArgs { keep: Some(1500 << 20), ..none.clone() }),
            ["idle"],
            "the longest idle first"
        );
        assert_eq!(chosen(&PruneArgs { keep: Some(0), ..none }), ["idle", "unnamed", "new"]);
    }
}
