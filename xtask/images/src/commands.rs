//! `cargo xtask image …`: shows pinned and cached images, and fetches, builds, verifies and deletes them. Results go to
//! stdout, as one line or one JSON document. Progress and errors go to stderr.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use xtask_core::arch::VmArchitecture;
use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::cli::{
    ImageArgs, ImageBuildArgs, ImageCommand, ImageFetchArgs, ImageVerifyArgs, PruneArgs, StoreCommand,
    Verbosity,
};
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::error::{self, Failure, Kind};
use xtask_core::format::human_bytes;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::image::choice::Choice;
use xtask_core::image::{DownloadSource, Image, Source};
use xtask_core::output::{print, print_json};
use xtask_core::report::PhaseStatus;
use xtask_core::snapshot::SnapshotManifest;
use xtask_core::workspace::Workspace;

use crate::fetch::{self, FetchRequest, RetryPolicy};
use crate::snapshots::{self, Found};
use crate::store::{CachedImage, DISK, ReadyImage, Store};
use crate::{build, bump, prune};
use xtask_jobs::{Step, Ui};

/// Runs a command of `cargo xtask image`.
pub fn run(command: &ImageCommand, verbosity: Verbosity) -> Result<()> {
    let command = match command {
        ImageCommand::Bump(args) => return bump::run(&Workspace::find()?, args, verbosity),
        ImageCommand::Store(command) => command,
    };
    let ui = Ui::install(verbosity)?;
    let cache = Cache::open()?;
    let store = Store { cache: &cache, ui: &ui, offline: false, run: None };
    let outcome = match command {
        StoreCommand::List { json } => list(&store, *json),
        StoreCommand::Fetch(args) => fetch(&store, args),
        StoreCommand::Build(args) => build_image(&store, args),
        StoreCommand::Verify(args) => verify(&store, args),
        StoreCommand::Path { name, arch, json } => path(&store, name, *arch, *json),
        StoreCommand::Prune(args) => prune_images(&store, args),
    };
    outcome.map_err(|error| error::host_fault(error, "work on the cache's images", "see the causes"))
}

/// An image of the catalogue, its key, and its copy in the cache.
type Listed = (Image, String, Option<CachedImage>);

/// Returns a cached image in the form of `image list --json`; `None` if its manifest cannot be read.
fn cached_json(kept: &CachedImage) -> Option<Value> {
    let manifest = kept.manifest.as_ref()?;
    Some(json!({
        "path": kept.directory.join(DISK), "digest": manifest.digest, "bytes": manifest.stamp.bytes,
        "made_at": manifest.made_at, "idle_seconds": kept.idle_seconds, "verified": manifest.is_verified(),
        "used_by": kept.used_by,
    }))
}

/// Describes a cached image for people; `None` if its manifest cannot be read.
fn describe_cached(kept: &CachedImage) -> Option<String> {
    let manifest = kept.manifest.as_ref()?;
    let age = match kept.idle_seconds / 86_400 {
        0 => "used today".to_owned(),
        days => format!("last used {days} days ago"),
    };
    let made = manifest.made_at.split('T').next().unwrap_or_default();
    let unverified = if manifest.is_verified() || manifest.is_built() { "" } else { ", UNVERIFIED" };
    let (bytes, digest) = (human_bytes(manifest.stamp.bytes), manifest.digest.short());
    Some(format!("{bytes}, {digest}{unverified}, made {made}, {age}{}", used_by(&kept.used_by)))
}

fn list(store: &Store<'_>, json: bool) -> Result<()> {
    let mut others = store.kept();
    let listed = Catalogue::built_in().images.into_iter().map(|image| {
        let key = image.key(build::SCRIPTS);
        let cached = others.iter().position(|kept| kept.key == key).map(|at| others.remove(at));
        (image, key, cached)
    });
    let listed: Vec<Listed> = listed.collect();
    let snapshots = snapshots::all(store.cache);
    if json {
        let image = |(image, key, cached): &Listed| {
            let mut image = json!(image);
            image["key"] = json!(key);
            image["cached"] = json!(cached.as_ref().and_then(cached_json));
            image
        };
        let other = |kept: &CachedImage| json!({ "key": kept.key, "manifest": kept.manifest, "cached": cached_json(kept) });
        let snapshot = |found: &Found| {
            let (good, users) = (found.is_good, &found.users);
            json!({ "name": found.name(), "good": good, "snapshot": found.manifest, "used_by": users })
        };
        return print_json(&json!({
            "schema": 2,
            "images": listed.iter().map(image).collect::<Vec<_>>(),
            "not_in_catalogue": others.iter().map(other).collect::<Vec<_>>(),
            "snapshots": snapshots.iter().map(snapshot).collect::<Vec<_>>(),
        }));
    }
    let lines = listed.iter().map(line_of_listed);
    for line in lines.chain(others.iter().map(line_of_other)).chain(snapshots.iter().map(line_of_snapshot)) {
        print(line)?;
    }
    Ok(())
}

fn line_of_listed((image, _, cached): &Listed) -> String {
    let pinned = match &image.source {
        Source::Download(DownloadSource { digest: Some(digest), .. }) => format!("pinned {}", digest.short()),
        Source::Packages(recipe) => format!("built from {}", recipe.suite),
        _ => String::new(),
    };
    let cached = cached.as_ref().and_then(describe_cached).unwrap_or("not cached".to_owned());
    format!("{:<21} {:<8} {pinned:<28} {cached}", image.name, image.arch.to_string())
}

fn line_of_other(kept: &CachedImage) -> String {
    let (name, arch) = match &kept.manifest {
        Some(manifest) => (manifest.name.as_str(), manifest.arch.to_string()),
        None => (kept.key.as_str(), String::new()),
    };
    let cached = describe_cached(kept).unwrap_or("unreadable: image prune deletes it".to_owned());
    format!("{name:<21} {arch:<8} {:<28} {cached}", "not in the catalogue")
}

fn line_of_snapshot(found: &Found) -> String {
    let used = used_by(&found.users);
    let manifest = found.manifest.as_ref().filter(|_| found.is_good);
    let Some(SnapshotManifest { image, arch, made_at, .. }) = manifest else {
        let name = found.name();
        return format!("{name}: a snapshot that will not be used again; image prune deletes it{used}");
    };
    let (arch, bytes) = (arch.to_string(), human_bytes(found.bytes()));
    format!("{image:<21} {arch:<8} {:<28} {bytes}, made {made_at}{used}", "a snapshot")
}

fn used_by(users: &[String]) -> String {
    if users.is_empty() { String::new() } else { format!(", used by {}", users.join(", ")) }
}

fn fetch(store: &Store<'_>, args: &ImageFetchArgs) -> Result<()> {
    let wanted = ImageArgs {
        image: Some(args.image.clone()),
        image_digest: args.image_digest.clone(),
        unverified: args.unverified,
        ..ImageArgs::default()
    };
    let Choice { image, .. } = Choice::from_args(&wanted, args.arch)?;
    if let Some(to) = &args.to {
        return fetch_to(store, &image, to);
    }
    if matches!(image.source, Source::File(_)) {
        let error =
            format!("fetch {}: a local file is not fetched; runs boot it from its own path", args.image);
        bail!(Failure::usage(error));
    }
    let ready = make(store, "fetch", &image, || crate::ensure::ensure(store, &image, RetryPolicy::Full))?;
    print_ready(&image, &ready, None, args.json)
}

/// Fetches the file to `to`, a path that the user chose, without using the cache.
fn fetch_to(store: &Store<'_>, image: &Image, to: &Path) -> Result<()> {
    let Source::Download(download) = &image.source else {
        bail!(Failure::usage(format!("--to {}: {} is not a download", to.display(), image.name)));
    };
    if download.digest.is_none() && to.exists() {
        bail_host!(
            "fetch to {}: it exists, and cannot be checked without a digest", to.display();
            "delete it, choose another name, or pass --image-digest"
        );
    }
    let wanted = FetchRequest { source: download, target: to, retry_policy: RetryPolicy::Full };
    let fetched = make(store, "fetch", image, || fetch::fetch(&wanted, store.ui))?;
    let how = match (fetched.already, fetched.resumed_from) {
        (true, _) => "it was already there".to_owned(),
        (false, 0) => format!("{} attempt(s)", fetched.attempts),
        (false, bytes) => {
            format!("{} attempt(s), {} of it from an earlier run", fetched.attempts, human_bytes(bytes))
        }
    };
    store.ui.note(&format!("{}, {}, {how}", human_bytes(fetched.bytes), fetched.sha256));
    print(to.display())
}

fn build_image(store: &Store<'_>, args: &ImageBuildArgs) -> Result<()> {
    let image = Catalogue::built_in().find(&args.name, args.arch)?;
    let Source::Packages(recipe) = &image.source else {
        let error = format!("build {}: it is a download; run: cargo xtask image fetch {0}", args.name);
        bail!(Failure::usage(error));
    };
    let (before, ready) = make(store, "build", &image, || match args.rebuild {
        true => crate::ensure::rebuild(store, &image, recipe),
        false => Ok((None, crate::ensure::ensure(store, &image, RetryPolicy::Full)?)),
    })?;
    if let Some(before) = &before {
        let change = if *before == ready.digest { "is the same as before" } else { "has changed" };
        store.ui.note(&format!("the digest {change}: {before}"));
    }
    print_ready(&image, &ready, before.as_ref(), args.json)
}

/// Runs a long operation with its name and its time on the screen. An error counts as a failure of the host.
fn make<T>(store: &Store<'_>, doing: &str, image: &Image, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let what = format!("{} {}", image.name, image.arch);
    let step = Step { kind: "images", what: &format!("{doing} {what}"), title: doing };
    let outcome = store.ui.step(store.cache, step, || Ok((body()?, what.clone())));
    outcome.map_err(|error| {
        let what = format!("{doing} the image {} for {}", image.name, image.arch);
        error::host_fault(error, what, "see the causes")
    })
}

fn print_ready(image: &Image, ready: &ReadyImage, previous: Option<&Digest>, json: bool) -> Result<()> {
    if json {
        return print_json(&json!({
            "schema": 1, "name": image.name, "arch": image.arch, "path": ready.disk, "digest": ready.digest,
            "previous_digest": previous, "source": ready.source, "how": ready.how, "verified": image.is_verified(),
        }));
    }
    print(ready.disk.display())
}

fn path(store: &Store<'_>, name: &str, arch: VmArchitecture, json: bool) -> Result<()> {
    let image = Catalogue::built_in().find(name, arch)?;
    match crate::ensure::find(store, &image)? {
        Some(ready) => print_ready(&image, &ready, None, json),
        None => bail_host!(
            "the image {name} for {arch} is not in the cache";
            "run cargo xtask image fetch {name} --arch {arch}"
        ),
    }
}

fn verify(store: &Store<'_>, args: &ImageVerifyArgs) -> Result<()> {
    let kept = store.kept();
    let named = |kept: &CachedImage| {
        let name = kept.manifest.as_ref().map_or(kept.key.as_str(), |manifest| manifest.name.as_str());
        args.names.is_empty() || args.names.iter().any(|wanted| wanted == name)
    };
    let wanted: Vec<_> = kept.into_iter().filter(named).collect();
    if wanted.is_empty() && !args.names.is_empty() {
        let names = args.names.join(", ");
        let error = format!("verify {names}: not in the cache; see cargo xtask image list");
        bail!(Failure::usage(error));
    }
    // A program that can write the disk can write its manifest too. The disk is therefore compared with the pin, which
    // is not in the cache.
    let pin = |image: &Image| Some((image.key(build::SCRIPTS), image.pin()?.clone()));
    let pins: Vec<_> = Catalogue::built_in().images.iter().filter_map(pin).collect();
    let (mut verified, mut changed) = (Vec::new(), Vec::new());
    for CachedImage { key, directory, manifest, .. } in wanted {
        store.ui.start("verify", None);
        let pin = pins.iter().find(|(pinned, _)| *pinned == key).map(|(_, pin)| pin.clone());
        let expected = manifest.map(|manifest| pin.unwrap_or(manifest.digest));
        let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
        let found = match store.digest(&directory.join(DISK), algorithm) {
            Err(error) if Kind::Interrupted.is(&error) => return Err(error),
            found => found,
        };
        let sound = expected.is_some() && found.as_ref().ok() == expected.as_ref();
        let status = if sound { PhaseStatus::Passed } else { PhaseStatus::Failed };
        let output = found.as_ref().map_or_else(|error| format!("{error:#}"), Digest::short);
        store.ui.end(status, &format!("{key} {output}"));
        // A digest is null if the manifest or the disk cannot be read.
        verified.push(json!({ "key": key, "expected": expected, "found": found.ok(), "sound": sound }));
        if !sound {
            changed.push(key);
        }
    }
    if args.json {
        print_json(&json!({ "schema": 2, "images": verified }))?;
    }
    if !changed.is_empty() {
        let hint =
            format!("delete them from {}, and fetch or build them again", store.cache.images().display());
        bail!(Failure::guest(
            format!(
                "these cached images have changed since they were made, or cannot be read: {}",
                changed.join(", ")
            ),
            hint
        ));
    }
    Ok(())
}

fn prune_images(store: &Store<'_>, args: &PruneArgs) -> Result<()> {
    let named: Vec<_> = Catalogue::built_in().images.iter().map(|image| image.key(build::SCRIPTS)).collect();
    let to_delete = prune::prune(store, args, &named)?;
    if args.json {
        print_json(&json!({ "schema": 1, "dry_run": args.dry_run, "deleted": to_delete }))?;
    } else if to_delete.is_empty() {
        store.ui.note("nothing to delete");
    }
    Ok(())
}
