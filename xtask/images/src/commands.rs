//! `cargo xtask image …`: what is pinned, what is cached, and what to do about either. Results go to stdout, one line or
//! one JSON document; progress and refusals to stderr.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
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
use xtask_core::report::PhaseStatus;
use xtask_core::workspace::Workspace;

use crate::fetch::{self, FetchRequest, RetryPolicy};
use crate::snapshots;
use crate::store::{CachedImage, ReadyImage, Store};
use crate::{build, bump, prune};
use xtask_jobs::{Step, Ui};

/// Does what the command says.
pub fn run(command: &ImageCommand, verbosity: Verbosity) -> Result<()> {
    let command = match command {
        ImageCommand::Bump(args) => return bump::run(&Workspace::find()?, args, verbosity),
        ImageCommand::Store(command) => command,
    };
    let ui = Ui::install(verbosity)?;
    let cache = Cache::from_env()?;
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

/// One line of `image list`.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    image: Image,
    key: String,
    cached: Option<Cached>,
}

#[derive(Debug, Serialize)]
struct Cached {
    path: std::path::PathBuf,
    digest: Digest,
    bytes: u64,
    made_at: String,
    idle_seconds: u64,
    verified: bool,
    used_by: Vec<String>,
}

impl Cached {
    /// `None` where its manifest cannot be read.
    fn of(kept: &CachedImage) -> Option<Self> {
        let manifest = kept.manifest.as_ref()?;
        Some(Self {
            path: kept.directory.join(crate::store::DISK),
            digest: manifest.digest.clone(),
            bytes: manifest.stamp.bytes,
            made_at: manifest.made_at.clone(),
            idle_seconds: kept.idle_seconds,
            verified: manifest.verified,
            used_by: kept.used_by.clone(),
        })
    }

    fn describe(&self) -> String {
        let used = if self.used_by.is_empty() {
            String::new()
        } else {
            format!(", used by {}", self.used_by.join(", "))
        };
        let age = match self.idle_seconds / 86_400 {
            0 => "used today".to_owned(),
            days => format!("last used {days} days ago"),
        };
        let made = self.made_at.split('T').next().unwrap_or_default();
        let unverified = if self.verified { "" } else { ", UNVERIFIED" };
        format!("{}, {}{unverified}, made {made}, {age}{used}", human_bytes(self.bytes), self.digest.short())
    }
}

/// Every image that has a name, for every architecture.
fn catalogue() -> Result<Vec<Image>> {
    let catalogue = Catalogue::built_in();
    let names: Vec<_> = catalogue.names().collect();
    let pairs = names.iter().flat_map(|name| VmArchitecture::ALL.map(|arch| (*name, arch)));
    pairs.map(|(name, arch)| Ok(catalogue.find(name, arch)?)).collect()
}

fn list(store: &Store<'_>, json: bool) -> Result<()> {
    let kept = store.kept();
    let mut listed = Vec::new();
    for image in catalogue()? {
        let key = image.key(build::SCRIPTS);
        let cached = kept.iter().find(|kept| kept.key == key).and_then(Cached::of);
        listed.push(Listed { image, key, cached });
    }
    let others: Vec<_> = kept.iter().filter(|kept| !listed.iter().any(|one| one.key == kept.key)).collect();
    if json {
        let others: Vec<_> = others
            .iter()
            .map(|kept| serde_json::json!({ "key": kept.key, "manifest": kept.manifest, "cached": Cached::of(kept) }))
            .collect();
        let snapshots: Vec<_> = snapshots::all(store.cache)
            .into_iter()
            .map(|found| {
                let (name, good, users) = (found.name(), found.is_good, &found.users);
                serde_json::json!({ "name": name, "good": good, "snapshot": found.manifest, "used_by": users })
            })
            .collect();
        let document = serde_json::json!({ "schema": 2, "images": listed, "not_in_catalogue": others, "snapshots": snapshots });
        println!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    for Listed { image, cached, .. } in &listed {
        let pinned = match &image.source {
            Source::Download(DownloadSource { digest: Some(digest), .. }) => {
                format!("pinned {}", digest.short())
            }
            Source::Packages(recipe) => format!("built from {}", recipe.suite),
            _ => String::new(),
        };
        let cached = cached.as_ref().map_or("not cached".to_owned(), Cached::describe);
        println!("{:<21} {:<8} {pinned:<28} {cached}", image.name, image.arch.to_string());
    }
    for kept in others {
        let (name, arch) = match &kept.manifest {
            Some(manifest) => (manifest.name.as_str(), manifest.arch.to_string()),
            None => (kept.key.as_str(), String::new()),
        };
        let cached = Cached::of(kept)
            .map_or("unreadable: image prune deletes it".to_owned(), |cached| cached.describe());
        println!("{name:<21} {arch:<8} {:<28} {cached}", "not in the catalogue");
    }
    for found in snapshots::all(store.cache) {
        let used = if found.users.is_empty() {
            String::new()
        } else {
            format!(", used by {}", found.users.join(", "))
        };
        let bytes = human_bytes(found.bytes());
        match &found.manifest {
            Some(snapshot) if found.is_good => {
                let arch = snapshot.arch.to_string();
                println!(
                    "{:<21} {arch:<8} {:<28} {bytes}, made {}{used}",
                    snapshot.image, "a snapshot", snapshot.made_at
                );
            }
            _ => {
                println!(
                    "{}: a snapshot that will not be used again; image prune deletes it{used}",
                    found.name()
                )
            }
        }
    }
    Ok(())
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
        return Err(Failure::usage(format!(
            "fetch {}: a local file needs no fetching, it is booted where it is",
            args.image
        ))
        .into());
    }
    let ready =
        make(store, "fetch", &image, |store| crate::ensure::ensure(store, &image, RetryPolicy::Full))?;
    print_ready(&image, &ready, None, args.json)
}

/// The file itself, under a name of the user's; the cache has no part in it.
fn fetch_to(store: &Store<'_>, image: &Image, to: &Path) -> Result<()> {
    let Source::Download(download) = &image.source else {
        return Err(Failure::usage(format!("--to {}: {} is not a download", to.display(), image.name)).into());
    };
    let DownloadSource { url, digest, bytes } = download;
    if digest.is_none() && to.exists() {
        bail_host!(
            "fetch to {}: it exists, and cannot be checked without a digest", to.display();
            "delete it, or choose another name or a digest"
        );
    }
    let wanted = FetchRequest {
        url,
        digest: digest.as_ref(),
        bytes: *bytes,
        target: to,
        retry_policy: RetryPolicy::Full,
    };
    let fetched = make(store, "fetch", image, |store| fetch::fetch(&wanted, store.ui))?;
    let how = match (fetched.already, fetched.resumed_from) {
        (true, _) => "it was already there".to_owned(),
        (false, 0) => format!("{} attempt(s)", fetched.attempts),
        (false, bytes) => {
            format!("{} attempt(s), {} of it from an earlier run", fetched.attempts, human_bytes(bytes))
        }
    };
    store.ui.note(&format!("{}, {}, {how}", human_bytes(fetched.bytes), fetched.sha256));
    println!("{}", to.display());
    Ok(())
}

fn build_image(store: &Store<'_>, args: &ImageBuildArgs) -> Result<()> {
    let image = Catalogue::built_in().find(&args.name, args.arch)?;
    if !matches!(image.source, Source::Packages(_)) {
        return Err(Failure::usage(format!(
            "build {}: it is a download; run: cargo xtask image fetch {0}",
            args.name
        ))
        .into());
    }
    let (before, ready) = make(store, "build", &image, |store| match args.rebuild {
        true => crate::ensure::rebuild(store, &image),
        false => Ok((None, crate::ensure::ensure(store, &image, RetryPolicy::Full)?)),
    })?;
    if let Some(before) = &before {
        let same = if *before == ready.digest {
            "the digest is the same as before"
        } else {
            "the digest has changed"
        };
        store.ui.note(&format!("{same}: {before}"));
    }
    print_ready(&image, &ready, before.as_ref(), args.json)
}

/// Runs something long with its name and its time on the screen; its failure is the host's.
fn make<T>(
    store: &Store<'_>,
    doing: &'static str,
    image: &Image,
    body: impl FnOnce(&Store<'_>) -> Result<T>,
) -> Result<T> {
    let what = format!("{} {}", image.name, image.arch);
    let step = Step { kind: "images", what: &format!("{doing} {what}"), title: doing };
    let outcome = store.ui.step(store.cache, step, || Ok((body(store)?, what.clone())));
    outcome.map_err(|error| {
        let what = format!("{doing} the image {} for {}", image.name, image.arch);
        error::host_fault(error, what, "see the causes")
    })
}

fn print_ready(image: &Image, ready: &ReadyImage, previous: Option<&Digest>, json: bool) -> Result<()> {
    if json {
        let document = serde_json::json!({
            "schema": 1, "name": image.name, "arch": image.arch, "path": ready.disk, "digest": ready.digest,
            "previous_digest": previous, "source": ready.source, "how": ready.how, "verified": image.is_verified(),
        });
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        println!("{}", ready.disk.display());
    }
    Ok(())
}

fn path(store: &Store<'_>, name: &str, arch: VmArchitecture, json: bool) -> Result<()> {
    let image = Catalogue::built_in().find(name, arch)?;
    match crate::ensure::find(store, &image)? {
        Some(ready) => print_ready(&image, &ready, None, json),
        None => bail_host!(
            "the image {name} for {arch} is not in the cache";
            "cargo xtask image fetch {name} --arch {arch}"
        ),
    }
}

/// One image that was hashed again.
#[derive(Debug, Serialize)]
struct Verified {
    key: String,
    /// `None`: the manifest cannot be read.
    expected: Option<Digest>,
    /// `None`: the disk cannot be read.
    found: Option<Digest>,
    sound: bool,
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
        let error = format!("verify {names}: not in the cache; cargo xtask image list shows what is");
        return Err(Failure::usage(error).into());
    }
    let mut verified = Vec::new();
    for CachedImage { key, directory, manifest, .. } in wanted {
        store.ui.start("verify", None);
        let expected = manifest.map(|manifest| manifest.digest);
        let found = match store.digest(&directory.join(crate::store::DISK), Algorithm::Sha256) {
            Err(error) if Kind::Interrupted.is(&error) => return Err(error),
            found => found,
        };
        let sound = expected.is_some() && found.as_ref().ok() == expected.as_ref();
        let status = if sound { PhaseStatus::Passed } else { PhaseStatus::Failed };
        let output = found.as_ref().map_or_else(|error| format!("{error:#}"), Digest::short);
        store.ui.end(status, &format!("{key} {output}"));
        verified.push(Verified { key, expected, found: found.ok(), sound });
    }
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&serde_json::json!({ "schema": 2, "images": verified }))?
        );
    }
    let changed: Vec<_> = verified.iter().filter(|one| !one.sound).map(|one| one.key.as_str()).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let directory = store.images();
    Err(Failure::guest(
        format!("changed since it was made: {}", changed.join(", ")),
        format!("delete it from {} and fetch or build it again", directory.display()),
    )
    .into())
}

fn prune_images(store: &Store<'_>, args: &PruneArgs) -> Result<()> {
    let named: Vec<_> = catalogue()?.iter().map(|image| image.key(build::SCRIPTS)).collect();
    let to_delete = prune::prune(store, args, &named)?;
    if args.json {
        let document = serde_json::json!({ "schema": 1, "dry_run": args.dry_run, "deleted": to_delete });
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else if to_delete.is_empty() {
        store.ui.note("nothing to delete");
    }
    Ok(())
}
