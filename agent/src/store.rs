//! The desired state on disk. A power cut at any moment leaves the old file or the new one. The first line
//! contains the format, the device and a digest, so that the agent notices corrupted data.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::desired::Desired;
use crate::{digest, files};

/// The first word of the first line. The number is the format's version.
const FORMAT: &str = "iot-agent-state-1";
const DIGEST_LENGTH: usize = 64;
/// The file of the state, in the store's directory.
pub const STATE: &str = "state";
/// The file of the previous state.
pub const PREVIOUS_STATE: &str = "state.old";

/// The reason why the state file is not usable.
#[derive(Debug, PartialEq, Eq)]
pub enum Problem {
    Missing,
    /// The file is truncated, corrupt, of another format or of another device, or it cannot be read.
    Unusable(String),
}

/// The state file of one device.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
    /// The beginning of the file: format and device. The agent refuses a card from another device.
    magic: String,
}

impl Store {
    /// Creates the store of a device in `directory`, which must exist.
    pub fn new(directory: &Path, device_id: &str) -> Self {
        Self { directory: directory.to_owned(), magic: format!("{FORMAT} {device_id} sha256:") }
    }

    /// Locks the directory until the returned file is dropped. Two agents would replace each other's state. Returns
    /// `None` if the directory cannot be opened; then nothing can be saved either, which each attempt reports.
    ///
    /// # Errors
    /// Returns an error if another process has the lock.
    pub fn lock(&self) -> Result<Option<File>> {
        let Ok(directory) = File::open(&self.directory) else { return Ok(None) };
        directory.try_lock().with_context(|| {
            let path = self.directory.display();
            format!("lock {path}: does another agent run? See systemctl status iot-agent")
        })?;
        Ok(Some(directory))
    }

    fn path(&self) -> PathBuf {
        self.directory.join(STATE)
    }

    /// Reads the state. A file that is truncated, corrupt, of another format or unreadable is renamed to
    /// `state.corrupt`, and replaces an earlier file of that name. If the renaming fails, the file stays
    /// until the next [`Store::save`] replaces it. The previous state (`state.old`) is then returned, if it is usable.
    ///
    /// Also returns the reason why the file is not usable, and its new path.
    pub fn load(&self) -> (Option<Desired>, Option<String>) {
        let path = self.path();
        let (found, problem) = self.choose(|name| fs::read(self.directory.join(name)));
        let reason = match problem {
            None => return (found, None),
            // The agent may have been restarted after it renamed a corrupt file.
            Some(Problem::Missing) => {
                let problem = found.is_some().then(|| {
                    format!("the state file {} is missing; the previous state is used", path.display())
                });
                return (found, problem);
            }
            Some(Problem::Unusable(reason)) => reason,
        };
        let aside = self.directory.join("state.corrupt");
        let place = match fs::rename(&path, &aside) {
            Ok(()) => format!("was renamed to {}", aside.display()),
            Err(error) => format!("cannot be renamed to {}: {error}", aside.display()),
        };
        let next = if found.is_some() { "the previous state is used" } else { "there is no previous state" };
        let problem =
            format!("the state file {} is not usable ({reason}) and {place}; {next}", path.display());
        (found, Some(problem))
    }

    /// Chooses the state as [`Store::load`] does, and changes no file. `read` returns the content of a file of the
    /// store's directory ([`STATE`] or [`PREVIOUS_STATE`]). With the content of a disk after a power cut, `xtask/judge`
    /// asks what the agent would make of it.
    ///
    /// Also returns the reason why the file [`STATE`] is not usable. The returned state is then the previous one.
    pub fn choose(&self, read: impl Fn(&str) -> io::Result<Vec<u8>>) -> (Option<Desired>, Option<Problem>) {
        let problem = match self.parse_content(read(STATE)) {
            Ok(Some(found)) => return (Some(found), None),
            Ok(None) => Problem::Missing,
            Err(reason) => Problem::Unusable(reason),
        };
        (self.parse_content(read(PREVIOUS_STATE)).ok().flatten(), Some(problem))
    }

    fn parse_content(&self, content: io::Result<Vec<u8>>) -> Result<Option<Desired>, String> {
        match content {
            Ok(bytes) => self.parse(&bytes).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Returns the path of the previous state.
    fn earlier(&self) -> PathBuf {
        self.directory.join(PREVIOUS_STATE)
    }

    /// Writes the state to disk and syncs it. If this fails, the previous state is still there. The previous state
    /// stays as `state.old`, because a card may corrupt a file that was synced.
    pub(crate) fn save(&self, desired: &Desired) -> Result<()> {
        let path = self.path();
        if path.is_file() {
            files::keep(&path, &self.earlier())
                .with_context(|| format!("keep the previous state as {}", self.earlier().display()))?;
        }
        files::replace_durably(&path, &self.serialise(desired))
            .with_context(|| format!("write the desired state to {}", path.display()))
    }

    /// Syncs the names of the state's files.
    pub(crate) fn sync_directory(&self) -> Result<()> {
        let path = self.path();
        files::sync_parent(&path).with_context(|| format!("sync the directory of {}", path.display()))
    }

    /// Writes the cached data of the state's file system to disk (syncfs(2)), since podman does not sync the
    /// images that it unpacks. This takes long on a slow or busy card.
    pub(crate) fn sync_file_system(&self) -> Result<()> {
        let path = self.directory.display();
        let directory = File::open(&self.directory).with_context(|| format!("open {path}"))?;
        rustix::fs::syncfs(directory).with_context(|| format!("sync {path}"))
    }

    /// Returns the space that is free for this user on the state's file system, in MiB. Podman's storage is on
    /// the same file system if `state_directory` has its default.
    pub(crate) fn free_mib(&self) -> Result<u64> {
        let path = self.directory.display();
        let space =
            rustix::fs::statvfs(&self.directory).with_context(|| format!("read the free space of {path}"))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize) >> 20)
    }

    fn serialise(&self, desired: &Desired) -> Vec<u8> {
        let body = serde_json::to_vec(desired).expect("the desired state is plain data");
        let mut bytes = format!("{}{}\n", self.magic, digest::of_bytes(&body)).into_bytes();
        bytes.extend(body);
        bytes
    }

    fn parse(&self, bytes: &[u8]) -> Result<Desired, String> {
        let rest = bytes
            .strip_prefix(self.magic.as_bytes())
            .ok_or("it is truncated, of another format or of another device")?;
        let (digest, rest) = rest.split_at_checked(DIGEST_LENGTH).ok_or("it is truncated")?;
        let body = rest.strip_prefix(b"\n").ok_or("it is truncated")?;
        if digest::of_bytes(body).as_bytes() != digest {
            return Err("its digest does not match".to_owned());
        }
        serde_json::from_slice(body).map_err(|error| format!("it cannot be parsed: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Operation, Update};

    fn small() -> Desired {
        let mut desired = Desired::default();
        desired.take(Change::Update(Update {
            name: "w".into(),
            revision: 7,
            operation: Operation::Put("{}".into()),
        }));
        desired
    }

    #[test]
    fn two_agents_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = [(); 2].map(|()| Store::new(directory.path(), "pi-7"));
        let lock = first.lock().unwrap();
        let error = format!("{:#}", second.lock().unwrap_err());
        assert!(lock.is_some() && error.contains("does another agent run?"), "{error}");
        drop(lock);
        assert!(second.lock().unwrap().is_some());
        assert!(Store::new(Path::new("/nonexistent"), "pi-7").lock().unwrap().is_none());
    }

    #[test]
    fn a_saved_state_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        assert_eq!(store.load(), (None, None), "a first start reports no problem");
        store.save(&small()).unwrap();
        assert_eq!(store.load(), (Some(small()), None));
        store.sync_file_system().unwrap();
        store.sync_directory().unwrap();
        let other = Store::new(directory.path(), "pi-8").load();
        assert!(other.0.is_none() && other.1.unwrap().contains("another device"));
        let nowhere = Store::new(Path::new("/nonexistent"), "pi-7");
        assert!(nowhere.save(&small()).is_err() && nowhere.sync_directory().is_err());
    }

    /// Truncates the file at every length and changes every byte in three ways.
    #[test]
    fn a_file_that_is_corrupt_anywhere_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        let good = store.serialise(&small());
        let mut bad: Vec<Vec<u8>> = (0..good.len()).map(|length| good[..length].to_vec()).collect();
        for at in 0..good.len() {
            bad.extend([0x01, 0x80, 0xff].map(|bits| {
                let mut bytes = good.clone();
                bytes[at] ^= bits;
                bytes
            }));
        }
        bad.push([good.as_slice(), b"x"].concat());
        bad.push(vec![0; good.len()]);
        for bytes in bad {
            fs::write(store.path(), &bytes).unwrap();
            let (found, problem) = store.load();
            let problem = problem.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&bytes)));
            assert!(found.is_none() && problem.contains("state.corrupt"), "{problem}");
            assert!(!store.path().exists());
            assert_eq!(fs::read(directory.path().join("state.corrupt")).unwrap(), bytes);
        }
    }

    #[test]
    fn the_previous_state_replaces_a_corrupt_one() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        store.save(&small()).unwrap();
        store.save(&Desired::default()).unwrap();
        fs::write(store.path(), "torn").unwrap();
        // The agent may be restarted before it saves a state.
        for words in ["is not usable", "is missing"] {
            let (found, problem) = store.load();
            assert_eq!(found, Some(small()));
            let problem = problem.unwrap();
            assert!(problem.contains(words) && problem.ends_with("the previous state is used"), "{problem}");
        }
        store.save(&Desired::default()).unwrap();
        assert_eq!(store.load(), (Some(Desired::default()), None));
    }

    #[test]
    fn a_state_is_chosen_without_a_change_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        let choose = || store.choose(|name| fs::read(directory.path().join(name)));
        assert_eq!(choose(), (None, Some(Problem::Missing)));
        store.save(&small()).unwrap();
        store.save(&Desired::default()).unwrap();
        assert_eq!(choose(), (Some(Desired::default()), None));
        fs::write(store.path(), "torn").unwrap();
        for _ in 0..2 {
            let (found, problem) = choose();
            assert_eq!(found, Some(small()));
            assert!(matches!(problem, Some(Problem::Unusable(reason)) if reason.contains("truncated")));
        }
        fs::remove_file(store.path()).unwrap();
        assert_eq!(choose(), (Some(small()), Some(Problem::Missing)));
        let documents: Vec<_> = small()
            .documents()
            .map(|(name, document)| (name.to_owned(), document.map(str::to_owned)))
            .collect();
        assert_eq!((small().revision(), documents), (7, vec![("w".to_owned(), Some("{}".to_owned()))]));
    }

    #[test]
    fn an_unreadable_state_is_reported_and_can_be_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        // Root can read any file, but not even root can read a directory as a file.
        fs::create_dir(store.path()).unwrap();
        assert!(store.load().1.unwrap().contains("is not usable"));
        store.save(&small()).unwrap();
        assert_eq!(store.load(), (Some(small()), None));
    }

    #[test]
    fn an_interrupted_write_leaves_the_previous_state() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        store.save(&small()).unwrap();
        fs::write(directory.path().join("state.new"), &store.serialise(&Desired::default())[..9]).unwrap();
        assert_eq!(store.load(), (Some(small()), None));
        store.save(&Desired::default()).unwrap();
        assert_eq!(store.load(), (Some(Desired::default()), None));
    }
}
