//! Warm layers in the cache: found by their key, made beside in the run's own directory and renamed, read-only, and hashed again
//! by every run that uses one.
//!
//! ```text
//! layers/<key>/        layer.json, disk.qcow2, ram.save, nvram.fd, seed.img
//! layers/<key>.lock    held by whoever looks for it, makes it or deletes it
//! ```

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use xtask::digest::{Algorithm, Digest};
use xtask::exit::Unavailable;
use xtask::image::manifest::Stamp;
use xtask::layer::{FILES, Frozen, Ingredients, Layer, MANIFEST};
use xtask::limits;
use xtask::paths::{Cache, make_private_dir, write_private};
use xtask::run_dir::{self, try_lock};

use crate::interrupt::Interrupt;
use crate::screen::Screen;

/// Its time is when the layer was last used.
const USED: &str = "used";

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

    /// Its key.
    pub(crate) fn key(&self) -> String {
        self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Seconds since it was last used.
    pub(crate) fn idle_seconds(&self) -> u64 {
        let used = std::fs::metadata(self.file(USED)).and_then(|meta| meta.modified());
        used.ok().and_then(|used| used.elapsed().ok()).map_or(0, |idle| idle.as_secs())
    }

    /// Hashes its files beside what the run does, for a verdict that waits for it.
    pub(crate) fn verify(&self) -> JoinHandle<Result<()>> {
        let kept = self.clone();
        std::thread::spawn(move || kept.check())
    }

    /// An error where a file is not what was frozen; the layer is then gone.
    fn check(&self) -> Result<()> {
        for (name, frozen) in &self.layer.files {
            let found = digest(&self.file(name))?;
            if found != frozen.digest {
                return Err(self.corrupt(name, &format!("it has {found}, and {} was frozen", frozen.digest)));
            }
        }
        Ok(())
    }

    fn corrupt(&self, name: &str, why: &str) -> anyhow::Error {
        let what = match remove(&self.directory) {
            Ok(()) => "it is deleted, and the next run makes it anew".to_owned(),
            Err(error) => format!("delete {}: {error:#}", self.directory.display()),
        };
        Unavailable {
            error: format!("the warm layer {} was changed in {name}: {why}", self.key()),
            hint: format!("{what}; nothing that was seen on it counts"),
        }
        .into()
    }
}

/// Nobody else makes or deletes this layer while it is held.
pub(crate) fn lock(cache: &Cache, key: &str, interrupt: &Interrupt, screen: &mut Screen) -> Result<File> {
    make_private_dir(&cache.layers())?;
    loop {
        interrupt.check()?;
        match try_lock(&cache.layers().join(format!("{key}.lock")))? {
            Some(lock) => return Ok(lock),
            None => screen.alive("another run makes this layer"),
        }
        std::thread::sleep(limits::POLL);
    }
}

/// The layer with this key; what lies there and is none, as of another format, is deleted. Whoever calls holds its lock.
pub(crate) fn find(
    cache: &Cache,
    key: &str,
    wanted: &Ingredients,
    screen: &mut Screen,
) -> Result<Option<Kept>> {
    let directory = cache.layers().join(key);
    if !directory.exists() {
        return Ok(None);
    }
    match Layer::read(&directory) {
        Ok(layer) if layer.ingredients == *wanted => {
            let kept = Kept { directory, layer };
            touch(&kept.directory)?;
            Ok(Some(kept))
        }
        other => {
            let why =
                other.map_or_else(|error| format!("{error:#}"), |_| "it says that it is another".to_owned());
            screen.line(&format!("the warm layer {key} is made anew: {why}"));
            remove(&directory)?;
            Ok(None)
        }
    }
}

/// Freezes what is in `made` and gives it its name. Whoever calls holds the lock of its key.
pub(crate) fn keep(cache: &Cache, key: &str, made: &Path, mut layer: Layer) -> Result<Kept> {
    // The keys that made it, the seed's files, an empty disk.
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
        files.insert(name.to_owned(), Frozen { digest: digest(&path)?, stamp: Stamp::of(&path)? });
    }
    layer.files = files;
    write_private(&made.join(MANIFEST), serde_json::to_string_pretty(&layer)?)?;
    let directory = cache.layers().join(key);
    std::fs::rename(made, &directory)
        .with_context(|| format!("rename {} to {}", made.display(), directory.display()))?;
    touch(&directory)?;
    Ok(Kept { directory, layer })
}

/// Every layer, and who uses it.
pub(crate) fn all(cache: &Cache) -> Vec<(Kept, Vec<String>)> {
    let mut found: Vec<_> = run_dir::directories(&cache.layers())
        .into_iter()
        .filter_map(|directory| {
            let layer = Layer::read(&directory).ok()?;
            let users = run_dir::users_of(cache, &directory);
            Some((Kept { directory, layer }, users))
        })
        .collect();
    found.sort_by(|one, other| one.0.directory.cmp(&other.0.directory));
    found
}

/// Aside first: a directory that is being deleted is no layer any more.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    let aside = directory.with_extension("deleting");
    if aside.exists() {
        std::fs::remove_dir_all(&aside).with_context(|| format!("delete {}", aside.display()))?;
    }
    std::fs::rename(directory, &aside).with_context(|| format!("rename {}", directory.display()))?;
    std::fs::remove_dir_all(&aside).with_context(|| format!("delete {}", aside.display()))
}

fn touch(directory: &Path) -> Result<()> {
    write_private(&directory.join(USED), b"")
}

fn digest(path: &Path) -> Result<Digest> {
    let what = || format!("read {}", path.display());
    let mut file = File::open(path).with_context(what)?;
    let mut hash = Algorithm::Sha256.hasher();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).with_context(what)?;
        if count == 0 {
            return Ok(hash.finish());
        }
        hash.update(&buffer[..count]);
    }
}
