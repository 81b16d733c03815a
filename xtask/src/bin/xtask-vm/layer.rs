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
        std::thread::spawn(move || kept.check())
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
        Ok(())
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
mod tests {
    use xtask::cli::Voice;
    use xtask::layer::FORMAT;

    use super::*;

    fn ingredients() -> Ingredients {
        let digest = Algorithm::Sha256.of(b"x");
        Ingredients {
            format: FORMAT,
            image: digest.clone(),
            image_path: "/images/a/disk".into(),
            seed: digest.clone(),
            domain: digest.clone(),
            firmware_code: digest.clone(),
            firmware_vars: digest.clone(),
            emulator: digest,
            qemu: "7.2.22".to_owned(),
            libvirt: "9.0.0".to_owned(),
            payload_bytes: 1,
        }
    }

    /// A layer of files that hold their own names.
    fn made(cache: &Cache, key: &str, run: &str) -> Kept {
        let beside = cache.root().join("made");
        make_private_dir(&beside).unwrap();
        make_private_dir(&cache.layers()).unwrap();
        for name in FILES.iter().chain(&["user_key"]) {
            std::fs::write(beside.join(name), name).unwrap();
        }
        let layer = Layer {
            ingredients: ingredients(),
            image: "debian-12".to_owned(),
            arch: xtask::arch::VmArchitecture::Aarch64,
            uuid: String::new(),
            made_at: "2026-11-24T10:00:00Z".to_owned(),
            made_by: run.to_owned(),
            files: BTreeMap::new(),
        };
        keep(cache, key, &beside, layer).unwrap()
    }

    #[test]
    fn a_layer_is_found_until_it_is_bad_and_deleted_when_nothing_lies_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let mut screen = Screen::new(Voice::silent());
        // A key with a dot, as ubuntu-24.04 has.
        let key = "ubuntu-24.04-aarch64-0123";
        let mut look = |wanted: &Ingredients| find(&cache, key, wanted, &mut screen).unwrap();
        assert!(look(&ingredients()).is_none());
        let first = made(&cache, key, "1124-100000-0001");
        assert!(!first.file("user_key").exists(), "no key is in a layer");
        let other = made(&cache, "debian-12-aarch64-0123", "1124-100000-0002");
        assert_eq!(look(&ingredients()).unwrap().directory, first.directory);
        first.check().unwrap();

        // A machine that somebody keeps lies on it.
        let work = cache.runs().join("1124-100000-0003/w");
        std::fs::create_dir_all(&work).unwrap();
        std::fs::write(work.join("frozen"), first.directory.as_os_str().as_encoded_bytes()).unwrap();
        std::fs::set_permissions(first.file("ram.save"), Permissions::from_mode(0o600)).unwrap();
        std::fs::write(first.file("ram.save"), "ram.sale").unwrap();
        let error = first.check().unwrap_err();
        assert!(
            error.is::<Unavailable>() && error.to_string().contains("was changed in ram.save"),
            "{error:#}"
        );
        assert!(look(&ingredients()).is_none(), "bad");
        assert!(first.directory.exists(), "it is not deleted under a machine");
        let second = made(&cache, key, "1124-100000-0004");
        assert_eq!(look(&ingredients()).unwrap().directory, second.directory);

        std::fs::remove_dir_all(work).unwrap();
        assert_eq!(look(&ingredients()).unwrap().directory, second.directory);
        assert!(!first.directory.exists(), "nothing lies on it any more");
        // What a killed deletion left, and what another version made.
        std::fs::rename(&second.directory, second.directory.with_file_name(format!("{key}.x{DELETING}")))
            .unwrap();
        make_private_dir(&cache.layers().join(format!("{key}.y"))).unwrap();
        assert!(look(&ingredients()).is_none());
        let left: Vec<_> = all(&cache).iter().map(Found::name).collect();
        assert_eq!(left, [other.name()]);
        assert_eq!(all(&cache)[0].key(), "debian-12-aarch64-0123");
        // The same key's layer that says that it is another.
        let another = Ingredients { qemu: "10".to_owned(), ..ingredients() };
        assert!(find(&cache, "debian-12-aarch64-0123", &another, &mut screen).unwrap().is_none());
        assert!(all(&cache).is_empty());
    }

    #[test]
    fn a_file_that_is_gone_is_this_hosts_fault() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let kept = made(&cache, "debian-12-aarch64-0123", "1124-100000-0001");
        std::fs::remove_file(kept.file("nvram.fd")).unwrap();
        let error = kept.check().unwrap_err();
        assert!(error.is::<Unavailable>(), "{error:#}");
        // A kept machine boots from its own variables, and from the layer's disk.
        kept.check_what_boots().unwrap();
        std::fs::set_permissions(kept.file(DISK), Permissions::from_mode(0o600)).unwrap();
        std::fs::write(kept.file(DISK), "another").unwrap();
        let error = kept.check_what_boots().unwrap_err();
        assert!(error.to_string().contains("was changed in disk.qcow2"), "{error:#}");
    }
}
