//! Warm layers in the cache: found by their key, made beside in the run's own directory and renamed, read-only, and hashed again
//! by every run that uses one.
//!
//! ```text
//! layers/<key>.<run>/          layer.json, disk.qcow2, ram.save, nvram.fd, seed.img; `bad` in one that was found changed
//! layers/<key>.<run>.deleting/ what is being deleted
//! layers/<key>.lock            held by whoever looks for it, makes it or deletes it
//! ```
//!
//! The run that made it is part of the name: what lies on a layer names its path, which is never another one's.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask::digest::{Algorithm, Digest};
use xtask::exit::{Unavailable, host_fault};
use xtask::layer::{BAD, DISK, FILES, Frozen, Ingredients, Layer, MANIFEST, SEED};
use xtask::limits;
use xtask::paths::{Cache, make_private_dir, write_private};
use xtask::run_dir::{self, try_lock};

use crate::interrupt::Interrupt;
use crate::screen::Screen;

/// Its time is when the layer was last used.
const USED: &str = "used";
/// The ending of what is being deleted.
const DELETING: &str = ".deleting";

/// A layer in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// What it says of itself.
    pub(crate) layer: Layer,
}

impl Kept {
    /// One of its files.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Its directory's name.
    pub(crate) fn name(&self) -> String {
        name_of(&self.directory)
    }

    /// Hashes its files beside what the run does, for a verdict that waits for it.
    pub(crate) fn verify(&self) -> JoinHandle<Result<()>> {
        let kept = self.clone();
        std::thread::spawn(move || {
            // The guest goes first; on Linux this is the thread's own (setpriority(2)).
            rustix::process::setpriority_process(None, 19)
                .context("make the check of the warm layer wait for the guest")?;
            kept.check()
        })
    }

    /// An error where a file is not what was frozen; nobody uses the layer from then on.
    fn check(&self) -> Result<()> {
        self.check_files(|_| true)
    }

    /// The same of what a machine that has been thawed boots from later.
    pub(crate) fn check_what_boots(&self) -> Result<()> {
        self.check_files(|name| [DISK, SEED].contains(&name))
    }

    fn check_files(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        for (name, frozen) in self.layer.files.iter().filter(|(name, _)| wanted(name)) {
            if !self.file(name).exists() {
                return Err(self.is_bad(name, "it is gone"));
            }
            let found = digest(&self.file(name)).map_err(|error| {
                host_fault(
                    error,
                    format!("hash the warm layer {}", self.name()),
                    "run again; --cold needs no layer",
                )
            })?;
            if found != frozen.digest {
                return Err(self.is_bad(name, &format!("it has {found}, and {} was frozen", frozen.digest)));
            }
        }
        self.check_image()
    }

    /// The layer's disk is the image and what was written since.
    fn check_image(&self) -> Result<()> {
        let Ingredients { image, image_path, .. } = &self.layer.ingredients;
        let hash = |error| {
            host_fault(error, "hash the image below the warm layer", "run again; --cold needs no layer")
        };
        let found = image.algorithm().of_file(image_path, |_, _| Ok(())).map_err(hash)?;
        if found == *image {
            return Ok(());
        }
        Err(Unavailable {
            error: format!(
                "the image {} below the warm layer {} was changed: it has {found}, and had {image}",
                image_path.display(),
                self.name()
            ),
            hint: "cargo xtask image verify tells how to replace one of the cache's; one of your own makes another layer, as it \
                   is now. Nothing that was seen on it counts"
                .to_owned(),
        }
        .into())
    }

    fn is_bad(&self, name: &str, why: &str) -> anyhow::Error {
        let what = match write_private(&self.file(BAD), why) {
            Ok(()) => {
                "the next run makes another and deletes this one, once no machine lies on it".to_owned()
            }
            Err(error) => format!("delete {}: {error:#}", self.directory.display()),
        };
        Unavailable {
            error: format!("the warm layer {} was changed in {name}: {why}", self.name()),
            hint: format!("{what}; nothing that was seen on it counts"),
        }
        .into()
    }
}

fn name_of(directory: &Path) -> String {
    directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The layer that a run's machine lies on; `None` where it lies on its image alone.
pub(crate) fn under(work: &Path) -> Result<Option<Kept>> {
    let Some(directory) = run_dir::layer_of(work)? else { return Ok(None) };
    let layer = Layer::read(&directory)?;
    Ok(Some(Kept { directory, layer }))
}

/// Nobody else makes or deletes this layer while it is held. Another run may take `limit` to make it.
pub(crate) fn lock(
    cache: &Cache,
    key: &str,
    limit: Duration,
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<File> {
    make_private_dir(&cache.layers())?;
    let path = cache.layers().join(format!("{key}.lock"));
    let started = Instant::now();
    loop {
        interrupt.check()?;
        if let Some(lock) = try_lock(&path)? {
            return Ok(lock);
        }
        screen.alive("another run makes this layer, or takes its machine out of it");
        if started.elapsed() > limit {
            return Err(Unavailable {
                error: format!(
                    "wait for the warm layer {key}: another run has held {} for {} s",
                    path.display(),
                    limit.as_secs()
                ),
                hint: "wait for that run, or end it: it has the file open (fuser); a smoke with --cold needs no layer".to_owned(),
            }
            .into());
        }
        std::thread::sleep(limits::POLL);
    }
}

/// The layer with this key. What is bad, or of another version, is deleted where nothing lies on it. Whoever calls holds its lock.
pub(crate) fn find(
    cache: &Cache,
    key: &str,
    wanted: &Ingredients,
    screen: &mut Screen,
) -> Result<Option<Kept>> {
    let prefix = format!("{key}.");
    let own = all(cache).into_iter().filter(|found| name_of(&found.directory).starts_with(&prefix));
    let mut usable = None;
    for found in own {
        match found.layer {
            Some(layer) if found.is_good && layer.ingredients == *wanted => {
                usable = Some(Kept { directory: found.directory, layer });
            }
            _ if found.users.is_empty() => {
                screen.line(&format!("deleting the warm layer {}, which is not used again", found.name()));
                remove(&found.directory)?;
            }
            _ => {}
        }
    }
    if let Some(kept) = &usable {
        touch(&kept.directory)?;
    }
    Ok(usable)
}

/// Freezes what is in `made` and gives it its name. Whoever calls holds the lock of its key.
pub(crate) fn keep(cache: &Cache, key: &str, made: &Path, mut layer: Layer) -> Result<Kept> {
    // The seed's files, an empty disk; and whatever else the making of it may come to leave there.
    for entry in std::fs::read_dir(made).with_context(|| format!("read {}", made.display()))? {
        let path = entry.with_context(|| format!("read {}", made.display()))?.path();
        if !FILES.iter().any(|name| path.ends_with(name)) {
            let deleted =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            deleted.with_context(|| format!("delete {}, which is no part of a layer", path.display()))?;
        }
    }
    let mut files = BTreeMap::new();
    for name in FILES {
        let path = made.join(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        file.sync_all().with_context(|| format!("write {} to the disk", path.display()))?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o400))
            .with_context(|| format!("make {} read-only", path.display()))?;
        let bytes = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
        files.insert(name.to_owned(), Frozen { digest: digest(&path)?, bytes });
    }
    layer.files = files;
    write_private(&made.join(MANIFEST), serde_json::to_string_pretty(&layer)?)?;
    let directory = cache.layers().join(format!("{key}.{}", layer.made_by));
    std::fs::rename(made, &directory)
        .with_context(|| format!("rename {} to {}", made.display(), directory.display()))?;
    touch(&directory)?;
    Ok(Kept { directory, layer })
}

/// What is in the directory of layers.
pub(crate) struct Found {
    pub(crate) directory: PathBuf,
    /// `None` where its manifest cannot be read: of another version, damaged, or half deleted.
    pub(crate) layer: Option<Layer>,
    /// Whether nobody has found it changed, and nobody deletes it.
    pub(crate) is_good: bool,
    /// The runs and kept machines that lie on it.
    pub(crate) users: Vec<String>,
}

impl Found {
    /// Its directory's name.
    pub(crate) fn name(&self) -> String {
        name_of(&self.directory)
    }

    /// Under which others lock it.
    pub(crate) fn key(&self) -> String {
        let name = self.name();
        let name = name.strip_suffix(DELETING).unwrap_or(&name);
        name.rsplit_once('.').map_or(name, |(key, _)| key).to_owned()
    }

    /// Bytes on disk, as far as that is known.
    pub(crate) fn bytes(&self) -> u64 {
        self.layer.as_ref().map_or(0, Layer::bytes)
    }

    /// Seconds since it was last used.
    pub(crate) fn idle_seconds(&self) -> u64 {
        let used = std::fs::metadata(self.directory.join(USED)).and_then(|meta| meta.modified());
        used.ok().and_then(|used| used.elapsed().ok()).map_or(0, |idle| idle.as_secs())
    }
}

/// Every layer, and who uses it; also what is none any more.
pub(crate) fn all(cache: &Cache) -> Vec<Found> {
    let mut found: Vec<_> = run_dir::directories(&cache.layers())
        .into_iter()
        .map(|directory| {
            let is_good = !name_of(&directory).ends_with(DELETING) && !directory.join(BAD).exists();
            let users = run_dir::users_of(cache, &directory);
            Found { layer: Layer::read(&directory).ok(), is_good, users, directory }
        })
        .collect();
    found.sort_by(|one, other| one.directory.cmp(&other.directory));
    found
}

/// Aside first: a directory that is being deleted is no layer any more. Whoever calls holds its lock.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    let aside = match name_of(directory) {
        name if name.ends_with(DELETING) => directory.to_owned(),
        name => directory.with_file_name(format!("{name}{DELETING}")),
    };
    if aside != directory {
        std::fs::rename(directory, &aside).with_context(|| format!("rename {}", directory.display()))?;
    }
    run_dir::remove_tree(&aside)
}

fn touch(directory: &Path) -> Result<()> {
    write_private(&directory.join(USED), b"")
}

fn digest(path: &Path) -> Result<Digest> {
    Algorithm::Sha256.of_file(path, |_, _| Ok(()))
}

#[cfg(test)]
mod tests;
