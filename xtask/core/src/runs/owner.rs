//! The record of ownership in the metadata of a domain on a libvirt daemon. The daemon has domains and volumes of
//! others beside those of a run. The domain of a run is defined before the first volume of the run is made, and its
//! metadata lists the volumes, because libvirt's volumes have no metadata of their own
//! (libvirt.org/formatstorage.html). Therefore a run that is killed at any moment leaves nothing that its domain does
//! not list.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use quick_xml::Writer;
use quick_xml::events::BytesText;
use serde::{Deserialize, Serialize};

use super::collect::{Host, KEPT, has_form_of_id};
use super::{GUARD, RunDir};
use crate::fs::{lock, read_if_there, try_lock, write_atomically};
use crate::xml_tree::read_document;

/// The XML namespace of the record.
pub const NAMESPACE: &str = "urn:iot-xtask:run";
/// The prefix of the record's element. libvirt stores it with the element.
pub const PREFIX: &str = "iot";
/// The local name of the record's element.
const ELEMENT: &str = "run";
/// The beginning of the names of all domains and volumes that `cargo xtask` makes on a daemon.
pub const NAME: &str = "iot-xtask-";
/// The beginning of the names of the volumes with images.
const IMAGE: &str = "iot-xtask-image-";
/// The number of hexadecimal digits of an image's digest in the name of its volume.
const IMAGE_DIGITS: usize = 32;

/// The run to which a domain belongs, and the volumes that the run uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The id of the run.
    pub run: String,
    /// The directory of the run on the host that runs `cargo xtask`.
    directory: PathBuf,
    /// The random id of the cache's directory of runs. Two hosts or containers may have different directories with the
    /// same path.
    runs_id: String,
    /// The boot id and the name of the host that runs `cargo xtask`.
    host: String,
    pub volumes: Vec<OwnedVolume>,
}

/// A volume that a run uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedVolume {
    pub pool: String,
    pub name: String,
    pub role: Role,
}

/// The relation of a run to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The volume belongs to the run and is deleted with it.
    Run,
    /// The run uploads an image for itself and for later runs. An upload that was not completed is deleted.
    Upload,
    /// The run uses a complete image, which stays on the host.
    Image,
}

/// Whether the run that owns a domain still exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// The run is alive, or its machine is an instance of the user, or this user may not find out.
    Alive,
    /// The run has ended without deleting its domain.
    Dead,
    /// The run belongs to the host with this name, which alone can tell.
    OfOtherHost(String),
}

impl Owner {
    /// Returns the record of a live run without volumes.
    ///
    /// # Errors
    /// Returns an error if the run's directory or this host's boot id cannot be read.
    pub fn of(run: &RunDir) -> Result<Self> {
        let runs = run.path().parent().context("a run's directory has a parent")?;
        Ok(Self {
            run: run.id().to_owned(),
            directory: run.path().to_owned(),
            runs_id: id_of_runs(runs)?,
            host: Host::this()?.to_string().trim().to_owned(),
            volumes: Vec::new(),
        })
    }

    /// Returns the name of the run's domain.
    pub fn domain(&self) -> String {
        format!("{NAME}{}", self.run)
    }

    /// Returns whether the record can be that of the domain with this name. The copy of a domain has the record of its
    /// original, and others may have changed a record. All names in a record of ours are derived from the run.
    pub fn fits(&self, domain: &str) -> bool {
        let own = format!("{}-", self.domain());
        let is_own = |volume: &OwnedVolume| match volume.role {
            Role::Run => volume.name.starts_with(&own),
            Role::Upload | Role::Image => is_image_volume(&volume.name),
        };
        domain == self.domain() && has_form_of_id(&self.run) && self.volumes.iter().all(is_own)
    }

    /// Returns the element for the domain's metadata, without the prefix and the namespace, which libvirt adds.
    pub fn element(&self) -> String {
        self.written(ELEMENT, &[])
    }

    /// Returns the element for the domain's XML, with its namespace.
    pub fn element_in_domain(&self) -> String {
        self.written(&format!("{PREFIX}:{ELEMENT}"), &[(&format!("xmlns:{PREFIX}"), NAMESPACE)])
    }

    fn written(&self, name: &str, attributes: &[(&str, &str)]) -> String {
        let json = serde_json::to_string(self).expect("a record of ownership is plain data");
        let mut xml = Writer::new(Vec::new());
        let element = xml.create_element(name).with_attributes(attributes.iter().copied());
        element.write_text_content(BytesText::new(&json)).expect("writing to memory does not fail");
        String::from_utf8(xml.into_inner()).expect("quick-xml writes UTF-8")
    }

    /// Parses the element of a domain's metadata.
    ///
    /// # Errors
    /// Returns an error if the element is not such a record.
    pub fn parse(element: &str) -> Result<Self> {
        let read = [ELEMENT.to_owned(), format!("{PREFIX}:{ELEMENT}")];
        let read = read.iter().map(|name| read_document(element, name)).find_map(Result::ok);
        let json = read.context("read the metadata of a domain")?.text().to_owned();
        serde_json::from_str(&json).with_context(|| format!("read the record of ownership {json:?}"))
    }

    /// Returns whether the run still exists. The run holds the lock of its directory while it lives.
    ///
    /// # Errors
    /// Returns an error if this host's boot id cannot be read.
    pub fn life(&self) -> Result<Life> {
        let this = Host::this()?;
        let (boot, name) = self.host.split_once(' ').unwrap_or((&self.host, &self.host));
        let elsewhere = || Ok(Life::OfOtherHost(name.to_owned()));
        if boot != this.boot && name != this.name {
            return elsewhere();
        }
        let runs = self.directory.parent().map(|runs| fs_err::read_to_string(runs.join(ID)));
        match runs {
            Some(Ok(id)) if id == self.runs_id => {}
            Some(Err(error)) if error.kind() == ErrorKind::PermissionDenied => return Ok(Life::Alive),
            _ => return elsewhere(),
        }
        match fs_err::symlink_metadata(&self.directory) {
            Ok(_) if self.directory.join(KEPT).exists() => Ok(Life::Alive),
            Ok(_) => Ok(match try_lock(&self.directory.join("lock")) {
                Ok(Some(_)) => Life::Dead,
                Ok(None) | Err(_) => Life::Alive,
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Life::Dead),
            Err(_) => Ok(Life::Alive),
        }
    }
}

/// The file with the random id of a directory of runs.
const ID: &str = ".id";

/// Returns the random id of a directory of runs. The first call makes it.
fn id_of_runs(runs: &Path) -> Result<String> {
    let path = runs.join(ID);
    let _guard = lock(&runs.join(GUARD), || Ok(()))?;
    if let Some(id) = read_if_there(&path)? {
        return String::from_utf8(id).with_context(|| format!("read {}", path.display()));
    }
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random number")?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    write_atomically(&path, &id)?;
    Ok(id)
}

/// Returns the name of the volume with an image, from the hexadecimal digits of its digest.
pub fn image_volume(digest: &str) -> String {
    format!("{IMAGE}{}", &digest[..IMAGE_DIGITS])
}

/// Returns whether a volume of this name contains an image of `cargo xtask`.
pub fn is_image_volume(name: &str) -> bool {
    let is_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    name.strip_prefix(IMAGE).is_some_and(|rest| rest.len() == IMAGE_DIGITS && rest.chars().all(is_digit))
}

#[cfg(test)]
impl Owner {
    /// Returns a record that is the same on each host.
    pub(crate) fn of_test(run: &RunDir) -> Self {
        Self {
            run: "1201-000000-0001".into(),
            directory: "/cache/runs/1201-000000-0001".into(),
            runs_id: "1".into(),
            host: "boot host".into(),
            ..Self::of(run).unwrap()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;

    #[test]
    fn a_record_survives_libvirts_xml() {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let mut owner = Owner::of(&run).unwrap();
        let (pool, name) = ("a & b".to_owned(), "<disk>'\".qcow2".to_owned());
        owner.volumes = vec![OwnedVolume { pool, name, role: Role::Upload }];
        assert_eq!(Owner::parse(&owner.element()).unwrap(), owner);
        let written = owner.element_in_domain();
        assert!(written.starts_with("<iot:run xmlns:iot=\"urn:iot-xtask:run\">"), "{written}");
        assert_eq!(Owner::parse(&written).unwrap(), owner);
        for foreign in ["<run/>", "<run>{\"run\":\"x\"}</run>", "<run>", "other"] {
            assert!(Owner::parse(foreign).is_err(), "{foreign}");
        }
    }

    #[test]
    fn a_record_that_was_copied_or_changed_does_not_fit() {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let mut owner = Owner::of(&run).unwrap();
        let domain = owner.domain();
        let volume = |name: String, role| OwnedVolume { pool: "default".into(), name, role };
        owner.volumes = vec![
            volume(format!("{domain}-disk.qcow2"), Role::Run),
            volume(image_volume(&"0".repeat(64)), Role::Upload),
        ];
        assert!(owner.fits(&domain));
        assert!(!owner.fits("a-clone"), "the copy of a domain");
        for (name, role) in
            [("foreign.img".to_owned(), Role::Run), (format!("{domain}-disk.qcow2"), Role::Upload)]
        {
            let mut changed = owner.clone();
            changed.volumes.push(volume(name, role));
            assert!(!changed.fits(&domain), "{changed:?}");
        }
    }

    #[test]
    fn the_volume_of_an_image_is_known_by_its_name() {
        let name = image_volume(&"0123456789abcdef".repeat(4));
        assert_eq!(name, "iot-xtask-image-0123456789abcdef0123456789abcdef");
        assert!(is_image_volume(&name));
        for foreign in ["iot-xtask-image-", &name[1..], &format!("{name}0"), &name.replace('a', "A")] {
            assert!(!is_image_volume(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_run_is_dead_only_if_this_host_knows_it() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let (run, _) = RunDir::create(&cache, || Ok(())).unwrap();
        let owner = Owner::of(&run).unwrap();
        assert_eq!(owner.life().unwrap(), Life::Alive);
        let elsewhere = |change: fn(&mut Owner)| {
            let mut owner = owner.clone();
            change(&mut owner);
            owner.life().unwrap()
        };
        assert_eq!(elsewhere(|owner| owner.host = "boot far".into()), Life::OfOtherHost("far".into()));
        let other_runs = |owner: &mut Owner| owner.runs_id.push('0');
        assert!(matches!(elsewhere(other_runs), Life::OfOtherHost(_)), "another container has the same path");
        let path = run.path().to_owned();
        std::fs::write(path.join(KEPT), "{}").unwrap();
        drop(run);
        assert_eq!(owner.life().unwrap(), Life::Alive, "an instance");
        std::fs::remove_file(path.join(KEPT)).unwrap();
        assert_eq!(owner.life().unwrap(), Life::Dead);
        std::fs::remove_dir_all(path).unwrap();
        assert_eq!(owner.life().unwrap(), Life::Dead);
    }
}
