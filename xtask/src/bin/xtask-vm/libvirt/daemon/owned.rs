//! The domains and volumes of dead runs on a daemon. They are found by the metadata of the domains alone.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result, anyhow};
use virt::domain::Domain;
use virt::storage_vol::StorageVol;
use xtask_core::error::Failure;
use xtask_core::runs::owner::{Life, OwnedVolume, Owner, Role, is_image_volume};

use super::Daemon;

/// What became of the domain of a run that has ended.
#[derive(Debug)]
pub(crate) struct Collected {
    pub(crate) domain: String,
    /// The number of volumes that were deleted, or the reason why the domain was left.
    pub(crate) volumes: Result<usize, String>,
}

impl Collected {
    pub(crate) fn is_done(&self) -> bool {
        self.volumes.is_ok()
    }
}

impl Display for Collected {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let domain = &self.domain;
        match &self.volumes {
            Ok(count) => {
                write!(f, "collected the domain {domain} of a run that died: {count} volume(s) deleted")
            }
            Err(reason) => write!(f, "left the domain {domain}, which cannot be collected: {reason}"),
        }
    }
}

/// Others may have saved the domain or made snapshots of it. Without these flags, libvirt then keeps the definition.
const UNDEFINE: virt::sys::virDomainUndefineFlagsValues = virt::sys::VIR_DOMAIN_UNDEFINE_NVRAM
    | virt::sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | virt::sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | virt::sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;

impl Daemon {
    /// Removes the domains and volumes of dead runs.
    pub(crate) fn collect(&self) -> Result<Vec<Collected>> {
        self.each_dead(|domain, owner, known| self.remove(domain, owner, known))
    }

    /// Returns what [`Self::collect`] would remove.
    pub(crate) fn would_collect(&self) -> Result<Vec<Collected>> {
        self.each_dead(|_, owner, known| Ok(self.doomed(owner, known)?.len()))
    }

    /// Calls `end` for the domain of each dead run, with its record and the records of all runs.
    fn each_dead(&self, end: impl Fn(&Domain, &Owner, &[Owner]) -> Result<usize>) -> Result<Vec<Collected>> {
        let owned = self.owned()?;
        let known: Vec<_> = owned.iter().filter_map(|(_, owner)| owner.as_ref().ok()).cloned().collect();
        let mut collected = Vec::new();
        for (domain, owner) in &owned {
            let outcome = match owner {
                Ok(owner) if !owner.fits(&domain.name().unwrap_or_default()) => {
                    Err(anyhow!("its record of ownership is that of another domain, or was changed"))
                }
                Ok(owner) => owner.life().and_then(|life| match life {
                    Life::Dead => end(domain, owner, &known).map(Some),
                    Life::Alive | Life::OfOtherHost(_) => Ok(None),
                }),
                Err(error) => Err(anyhow!("{error:#}")),
            };
            let name = domain.name().unwrap_or_default();
            match outcome {
                Ok(None) => {}
                Ok(Some(count)) => collected.push(Collected { domain: name, volumes: Ok(count) }),
                Err(error) => {
                    collected.push(Collected { domain: name, volumes: Err(format!("{error:#}")) });
                }
            }
        }
        Ok(collected)
    }

    /// Ends a domain, deletes the volumes of its run, and then its definition. The definition is the record of the
    /// volumes, so it is deleted last. `known` are the records of all runs.
    pub(super) fn remove(&self, domain: &Domain, owner: &Owner, known: &[Owner]) -> Result<usize> {
        if domain.is_active().context("ask for the state of the domain")? {
            domain.destroy().context("destroy the domain")?;
        }
        let doomed = self.doomed(owner, known)?;
        for (OwnedVolume { pool, name, .. }, volume) in &doomed {
            volume.delete(0).with_context(|| format!("delete the volume {name} of the pool {pool}"))?;
        }
        domain.undefine_flags(UNDEFINE).context("delete the domain's definition")?;
        // libvirt reads a pool's directory after each upload, and may have listed the file with the firmware's variables.
        for pool in owner.volumes.iter().map(|volume| &volume.pool).collect::<BTreeSet<_>>() {
            // A pool in use by another client is read again later.
            let _ = self.pool(pool).map(|pool| pool.refresh(0));
        }
        Ok(doomed.len())
    }

    /// Returns the volumes that are deleted with a run. A recorded volume does not exist if the run died just before it
    /// made the volume.
    fn doomed<'a>(&self, owner: &'a Owner, known: &[Owner]) -> Result<Vec<(&'a OwnedVolume, StorageVol)>> {
        let mut doomed = Vec::new();
        for recorded in owner.volumes.iter().filter(|volume| is_deleted(volume, owner, known)) {
            let volume = self.volume(&recorded.pool, &recorded.name)?;
            doomed.extend(volume.map(|volume| (recorded, volume)));
        }
        Ok(doomed)
    }

    /// Returns the images in a pool that no run has recorded, apart from the runs of `collected` domains.
    ///
    /// # Errors
    /// Returns a failure of the host if a record cannot be read, because it may name an image.
    pub(crate) fn unused_images(&self, pool: &str, collected: &[Collected]) -> Result<Vec<String>> {
        let volumes = self.pool(pool)?.list_all_volumes(0).context("list the volumes of the pool")?;
        let mut known = Vec::new();
        for (domain, owner) in self.owned()? {
            let name = domain.name().unwrap_or_default();
            let owner = owner.map_err(|error| {
                let hint =
                    format!("if nobody needs it, remove it: {}", self.uri.virsh(&format!("undefine {name}")));
                error.context(Failure::host(format!("find the images that the domain {name} uses"), hint))
            })?;
            if !collected.iter().any(|one| one.is_done() && one.domain == name) {
                known.push(owner);
            }
        }
        let mut names: Vec<_> = volumes.iter().filter_map(|volume| volume.name().ok()).collect();
        names.retain(|name| is_image_volume(name) && !is_recorded(&known, pool, name));
        Ok(names)
    }

    /// Deletes a volume of a pool.
    pub(crate) fn delete_volume(&self, pool: &str, name: &str) -> Result<()> {
        match self.volume(pool, name)? {
            Some(volume) => volume.delete(0).with_context(|| format!("delete the volume {name}")),
            None => Ok(()),
        }
    }
}

fn is_recorded(owners: &[Owner], pool: &str, name: &str) -> bool {
    let is_same = |volume: &OwnedVolume| (volume.pool.as_str(), volume.name.as_str()) == (pool, name);
    owners.iter().any(|owner| owner.volumes.iter().any(is_same))
}

/// Returns whether a volume is deleted with its run. An incomplete image is kept if another run has recorded it, which
/// then uploads it.
fn is_deleted(volume: &OwnedVolume, owner: &Owner, known: &[Owner]) -> bool {
    let is_same = |other: &OwnedVolume| (&other.pool, &other.name) == (&volume.pool, &volume.name);
    let mut others = known.iter().filter(|other| other.run != owner.run);
    match volume.role {
        Role::Run => true,
        Role::Image => false,
        Role::Upload => !others.any(|other| other.volumes.iter().any(is_same)),
    }
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;

    use virt::connect::Connect;
    use xtask_core::cache::Cache;
    use xtask_core::image::Format;
    use xtask_core::machine::volume::NewVolume;
    use xtask_core::runs::RunDir;
    use xtask_core::runs::owner::image_volume;
    use xtask_jobs::Ui;

    use super::super::run_domain::RunDomain;
    use super::*;

    const POOL: &str = "default-pool";

    /// Returns libvirt's mock driver. It has the domain `test` of others, and the pool [`POOL`].
    fn mock() -> Daemon {
        let connect = ManuallyDrop::new(Connect::open(Some("test:///default")).unwrap());
        Daemon { connect, uri: "test:///default".parse().unwrap() }
    }

    /// Defines a domain of this name with a record.
    fn define(daemon: &Daemon, name: &str, record: &str) -> Domain {
        let xml = format!(
            "<domain type='test'><name>{name}</name><metadata>{record}</metadata><memory>8192</memory>\
             <os><type>hvm</type></os></domain>"
        );
        daemon.connect.define_domain_xml(&xml).unwrap()
    }

    #[test]
    fn the_machine_of_a_run_is_found_by_its_record() {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let owner = Owner::of(&run).unwrap();
        let daemon = mock();
        let find = || RunDomain::find(mock(), run.id(), &Ui::quiet());
        assert!(find().unwrap().is_none());
        let foreign = define(&daemon, &owner.domain(), "");
        let error = find().err().unwrap().to_string();
        assert!(error.contains(&format!("{} belongs to others", owner.domain())), "{error}");
        foreign.undefine().unwrap();
        let other = owner.element_in_domain().replace(run.id(), "1201-000000-ffff");
        let other = define(&daemon, &owner.domain(), &other);
        let error = find().err().unwrap().to_string();
        assert!(error.contains("belongs to the run 1201-000000-ffff"), "{error}");
        other.undefine().unwrap();
        let own = define(&daemon, &owner.domain(), &owner.element_in_domain());
        let found = find().unwrap().unwrap();
        assert_eq!(found.owner(), &owner);
        assert_eq!(found.state().unwrap(), xtask_core::runs::listing::State::Off);
        own.undefine().unwrap();
    }

    #[test]
    fn an_image_is_unused_if_no_run_has_recorded_it() {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let mut owner = Owner::of(&run).unwrap();
        let daemon = mock();
        let [used, unused] = ["0", "1"].map(|digit| image_volume(&digit.repeat(64)));
        let names = [used.as_str(), unused.as_str(), "iot-xtask-image-mine", "foreign"];
        for name in names {
            let (format, mode) = (Format::Raw, "0600");
            let new = NewVolume { pool: POOL, name, format, capacity: 1024, backing: None, mode };
            daemon.make_volume(new).unwrap();
        }
        let recorded = OwnedVolume { pool: POOL.to_owned(), name: used.clone(), role: Role::Image };
        owner.volumes = vec![recorded];
        let domain = define(&daemon, &owner.domain(), &owner.element_in_domain());
        assert_eq!(daemon.unused_images(POOL, &[]).unwrap(), [unused.as_str()]);
        let collected = |volumes| [Collected { domain: owner.domain(), volumes }];
        assert_eq!(
            daemon.unused_images(POOL, &collected(Err("busy".to_owned()))).unwrap(),
            [unused.as_str()]
        );
        let mut both = daemon.unused_images(POOL, &collected(Ok(3))).unwrap();
        both.sort();
        assert_eq!(both, [used.as_str(), unused.as_str()]);
        assert_eq!(daemon.would_collect().unwrap().len(), 0, "the run lives");
        drop(run);
        let dead = daemon.would_collect().unwrap();
        assert_eq!((dead[0].domain.as_str(), &dead[0].volumes), (owner.domain().as_str(), &Ok(0)));
        daemon.delete_volume(POOL, &unused).unwrap();
        daemon.delete_volume(POOL, &unused).unwrap();
        assert_eq!(daemon.unused_images(POOL, &[]).unwrap(), Vec::<String>::new());
        domain.undefine().unwrap();
        let unreadable =
            define(&daemon, "iot-xtask-x", "<iot:run xmlns:iot='urn:iot-xtask:run'>{}</iot:run>");
        let error = daemon.unused_images(POOL, &[]).unwrap_err().to_string();
        assert!(error.contains("the images that the domain iot-xtask-x uses"), "{error}");
        unreadable.undefine().unwrap();
        for name in names {
            daemon.delete_volume(POOL, name).unwrap();
        }
    }
}
