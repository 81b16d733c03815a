//! The desired state on disk: whole or not there, whatever moment the power goes. Written beside, synced, renamed, and the
//! directory synced (rename(2) replaces in one step, fsync(2) says that a directory wants its own). A first line names format
//! and digest, so that what a failing card gives back is not taken for what was written.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::desired::Desired;
use crate::digest;

/// The first line's first word; the number is the format's.
const FORMAT: &str = "iot-agent-state-1";
const DIGEST_LENGTH: usize = 64;

/// Where the state is kept.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
    /// What a file begins with: format and device. A card that was put into another device holds nothing for that one.
    magic: String,
}

/// What was found at start.
#[derive(Debug)]
pub struct LoadOutcome {
    /// `None`: nothing that can be trusted; the bus will tell.
    pub desired: Option<Desired>,
    /// What was wrong with what was there, and where it is now.
    pub problem: Option<String>,
}

impl Store {
    /// In `directory`, which exists, for this device.
    pub fn new(directory: &Path, device_id: &str) -> Self {
        Self { directory: directory.to_owned(), magic: format!("{FORMAT} {device_id} sha256:") }
    }

    fn path(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Reads the state. A file that is torn, corrupt, of another format or on a card that fails is set aside as `state.corrupt`,
    /// in the place of an earlier one; where it cannot be, it is told and left, for the next one that is saved to replace.
    pub fn load(&self) -> LoadOutcome {
        let path = self.path();
        let parsed = match fs::read(&path) {
            Ok(bytes) => self.parse(&bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return LoadOutcome { desired: None, problem: None };
            }
            Err(error) => Err(error.to_string()),
        };
        let why = match parsed {
            Ok(desired) => return LoadOutcome { desired: Some(desired), problem: None },
            Err(why) => why,
        };
        let aside = self.directory.join("state.corrupt");
        let place = match fs::rename(&path, &aside) {
            Ok(()) => format!("is now {}", aside.display()),
            Err(error) => format!("cannot be set aside as {}: {error}", aside.display()),
        };
        let problem = format!("{} was not usable ({why}) and {place}", path.display());
        LoadOutcome { desired: None, problem: Some(problem) }
    }

    /// On disk when this returns.
    ///
    /// # Errors
    /// Names the file; the state of before is then still there.
    pub fn save(&self, desired: &Desired) -> Result<()> {
        let path = self.path();
        write_durably(&path, &self.serialise(desired))
            .with_context(|| format!("keep the desired state in {}", path.display()))
    }

    /// Writes out all that the file system of the state has in memory (syncfs(2)): podman does not sync what it unpacks. On a slow
    /// card, or a busy one, that takes long.
    ///
    /// # Errors
    /// Where the kernel could not write.
    pub fn sync_file_system(&self) -> Result<()> {
        let directory =
            File::open(&self.directory).with_context(|| format!("open {}", self.directory.display()))?;
        rustix::fs::syncfs(directory).with_context(|| format!("sync {}", self.directory.display()))
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
            .ok_or("it is torn, of another format or of another device")?;
        let (digest, rest) = rest.split_at_checked(DIGEST_LENGTH).ok_or("it is torn")?;
        let body = rest.strip_prefix(b"\n").ok_or("it is torn")?;
        if digest::of_bytes(body).as_bytes() != digest {
            return Err("its digest does not match".to_owned());
        }
        serde_json::from_slice(body).map_err(|error| format!("it does not parse: {error}"))
    }
}

/// Beside, synced, renamed, the directory synced. Its owner's alone: a document may hold a secret.
fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let directory = path.parent().context("it is in a directory")?;
    File::open(directory)?.sync_all()?;
    Ok(())
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
    fn what_was_saved_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        let empty = store.load();
        assert!(empty.desired.is_none() && empty.problem.is_none(), "a first start is no problem");
        store.save(&small()).unwrap();
        assert_eq!(store.load().desired.unwrap(), small());
        store.sync_file_system().unwrap();
        let other = Store::new(directory.path(), "pi-8").load();
        assert!(other.desired.is_none() && other.problem.unwrap().contains("another device"));
        assert!(Store::new(Path::new("/nonexistent"), "pi-7").save(&small()).is_err());
    }

    /// Cut off at every length, and with every byte changed in three ways: never taken for the state, always set aside.
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
            let found = store.load();
            assert!(found.desired.is_none(), "{:?}", String::from_utf8_lossy(&bytes));
            assert!(found.problem.unwrap().contains("state.corrupt"));
            assert!(!store.path().exists());
            assert_eq!(fs::read(directory.path().join("state.corrupt")).unwrap(), bytes);
        }
    }

    #[test]
    fn a_state_that_cannot_be_read_is_told_and_does_not_end_the_agent() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        // Who is root may read any file, but no directory as one.
        fs::create_dir(store.path()).unwrap();
        let found = store.load();
        assert!(found.desired.is_none() && found.problem.unwrap().contains("was not usable"));
        store.save(&small()).unwrap();
        assert_eq!(store.load().desired.unwrap(), small());
    }

    #[test]
    fn a_write_that_was_cut_off_leaves_the_state_of_before() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "pi-7");
        store.save(&small()).unwrap();
        fs::write(directory.path().join("state.new"), &store.serialise(&Desired::default())[..9]).unwrap();
        assert_eq!(store.load().desired.unwrap(), small());
        store.save(&Desired::default()).unwrap();
        assert_eq!(store.load().desired.unwrap(), Desired::default());
    }
}
