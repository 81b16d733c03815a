//! Checks that a snapshot and the image below it are as they were saved. They are hashed while the run goes on, and
//! must not be modified until the run ends. A snapshot that cannot be restored is not used again.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::{Context, Error, Result, bail};
use xtask_core::bail_host;
use xtask_core::error::{Failure, Kind, host_fault, shortage};
use xtask_core::fs::write_private;
use xtask_core::snapshot::{BAD, DISK, Ingredients, SEED};

use super::{Snapshot, digest};

/// The hint about a snapshot that is not used any more.
const NEXT: &str = "the next run makes another snapshot, and deletes this one once no machine uses it";

const HASH_AGAIN: &str = "run again; --cold needs no snapshot";

/// A check that runs in parallel with a run.
pub struct Verification {
    kept: Snapshot,
    before: Vec<(PathBuf, Option<InodeStamp>)>,
    hashed: JoinHandle<Result<()>>,
}

impl Verification {
    /// Returns whether [`Self::conclude`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.hashed.is_finished()
    }

    /// Waits for the end of the check. Returns an error if a file is not as it was saved, or was modified since the
    /// check began. In the second case, the check may have read other bytes than the guest.
    pub fn conclude(self) -> Result<()> {
        let hashed = self.hashed.join().unwrap_or_else(|_| bail!("the check of the snapshot panicked"));
        hashed.map_err(|error| host_fault(error, "check the snapshot", HASH_AGAIN))?;
        let touched =
            self.before.iter().find(|(path, before)| before.is_none() || InodeStamp::of(path) != *before);
        let Some((path, _)) = touched else { return Ok(()) };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let why = "it was modified while a run used it";
        if path.starts_with(&self.kept.directory) {
            return Err(self.kept.is_bad(&name, why));
        }
        bail_host!(
            "the image {} of the snapshot {}: {why}", path.display(), self.kept.name();
            "run again; the results of this run do not count"
        );
    }
}

/// The identity of a file's content. Every write changes this identity, even if the modification time is set back
/// (inode(7), ctime).
#[derive(Debug, Clone, PartialEq, Eq)]
struct InodeStamp {
    inode: (u64, u64),
    bytes: u64,
    changed: (i64, i64),
}

impl InodeStamp {
    fn of(path: &Path) -> Option<Self> {
        let meta = path.metadata().ok()?;
        let (inode, changed) = ((meta.dev(), meta.ino()), (meta.ctime(), meta.ctime_nsec()));
        Some(Self { inode, bytes: meta.len(), changed })
    }
}

impl Snapshot {
    /// Starts hashing the snapshot's files in parallel with the run. The verdict waits for the result.
    pub fn verify(&self) -> Verification {
        let image = self.manifest.ingredients.image_path.clone();
        let paths = self.manifest.files.keys().map(|name| self.file(name)).chain([image]);
        let before = paths.map(|path| (path.clone(), InodeStamp::of(&path))).collect();
        let kept = self.clone();
        let hashed = std::thread::spawn(move || {
            // The guest has priority over this check. On Linux, setpriority(2) changes the priority of this thread
            // alone.
            rustix::process::setpriority_process(None, 19)
                .context("lower the priority of the snapshot's check")?;
            kept.check()
        });
        Verification { kept: self.clone(), before, hashed }
    }

    /// Returns an error if a file is not as it was saved. If the file belongs to the snapshot and not to the image, no
    /// later run uses the snapshot.
    pub(super) fn check(&self) -> Result<()> {
        self.check_files(|_| true)
    }

    /// Checks only the image and the files of the snapshot from which a restored machine boots again later.
    pub fn check_what_boots(&self) -> Result<()> {
        self.check_files(|name| [DISK, SEED].contains(&name))
    }

    fn check_files(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        for (name, saved) in self.manifest.files.iter().filter(|(name, _)| wanted(name)) {
            if !self.file(name).exists() {
                return Err(self.is_bad(name, "it is gone"));
            }
            let found = digest(&self.file(name)).map_err(|error| {
                host_fault(error, format!("hash the snapshot {}", self.name()), HASH_AGAIN)
            })?;
            if found != saved.digest {
                return Err(self.is_bad(name, &format!("it has {found}, expected {}", saved.digest)));
            }
        }
        self.check_image()
    }

    /// Checks the image. The snapshot's disk contains only the changes to the image, so both must be unchanged.
    fn check_image(&self) -> Result<()> {
        let Ingredients { image, image_path, .. } = &self.manifest.ingredients;
        let hash = |error| host_fault(error, "hash the image of the snapshot", HASH_AGAIN);
        let found = image.algorithm().of_file(image_path, |_, _| Ok(())).map_err(hash)?;
        if found != *image {
            let (path, name) = (image_path.display(), self.name());
            bail_host!(
                "the image {path} of the snapshot {name} was changed: it has {found}, expected {image}";
                "cached image: follow cargo xtask image verify; your own image: run again, which makes another \
                 snapshot. The results of this run do not count"
            );
        }
        Ok(())
    }

    fn is_bad(&self, name: &str, why: &str) -> Error {
        Failure::host(
            format!("the snapshot {} was changed in {name}: {why}", self.name()),
            format!("{}; the results of this run do not count", self.give_up(why)),
        )
        .into()
    }

    /// Returns the error for a snapshot that could not be restored although its files are unchanged. Either the
    /// machine was saved at a bad moment, or it depends on something that the snapshot's key does not cover. The
    /// snapshot is marked as bad, so that the next run does not fail in the same way. If the host lacks memory, space
    /// or open files, the snapshot is kept, because another one could not be restored either.
    pub fn does_not_restore(&self, error: Error) -> Error {
        if Kind::Interrupted.is(&error) {
            return error;
        }
        if let Some(remedy) = shortage(&error) {
            let what = format!("restore the machine from the snapshot {}, which is kept", self.name());
            return error.context(Failure::host(what, remedy));
        }
        let next = self.give_up(&format!("{error:#}"));
        error.context(Failure::host(
            format!("restore the machine from the snapshot {}", self.name()),
            format!("{next}: run again, or use --cold; nothing is known about the agent yet"),
        ))
    }

    /// Marks the snapshot as bad. Returns a sentence about what will happen to the snapshot.
    fn give_up(&self, why: &str) -> String {
        match write_private(&self.file(BAD), why) {
            Ok(()) => NEXT.to_owned(),
            Err(error) => format!("delete {}: {error:#}", self.directory.display()),
        }
    }
}
