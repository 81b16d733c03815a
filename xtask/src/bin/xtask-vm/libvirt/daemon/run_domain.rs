//! The domain of one run on a daemon, with its volumes. The domain is defined first, and each volume is recorded in its
//! metadata before it is made. A run that is killed therefore leaves nothing that the next run does not find.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use virt::domain::Domain;
use virt::storage_vol::StorageVol;
use xtask_core::cli::Network;
use xtask_core::digest::Digest;
use xtask_core::error::Failure;
use xtask_core::image::Format;
use xtask_core::limits;
use xtask_core::machine::volume::NewVolume;
use xtask_core::machine::{DaemonDomain, DomainXmlParams, GUEST_MAC, RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::runs::owner::{NAMESPACE, OwnedVolume, Owner, PREFIX, Role};
use xtask_core::xml_tree::read_document;
use xtask_images::ReadyImage;
use xtask_jobs::Ui;

use super::Daemon;
use super::streams::Streams;
use crate::libvirt::Machine;

/// The domain of a run, and the daemon that has it.
pub(crate) struct RunDomain {
    pub(crate) daemon: Daemon,
    pub(super) owner: Owner,
    pub(super) pool: String,
    pub(super) domain: Option<Domain>,
    /// The guest's consoles, and the connection that they alone use. A thread that waits in libvirt for a stream would
    /// otherwise keep libvirt from noticing that the daemon no longer answers the calls.
    pub(super) streams: Option<(Daemon, Streams)>,
    pub(super) ui: Ui,
}

/// The volumes of a machine.
pub(crate) struct Volumes {
    /// The paths on the daemon's host, in the order of the machine's disks.
    pub(crate) paths: [PathBuf; 3],
    /// The paths of the layers below the first disk, from top to bottom.
    pub(crate) backing: Vec<PathBuf>,
}

/// The layers below the disk of a machine, as files of this host with their digests. Each of them stays on the daemon's
/// host for later runs.
#[derive(Clone, Copy)]
pub(crate) struct Layers<'a> {
    pub(crate) image: &'a ReadyImage,
    /// The disk of the snapshot, if the machine is restored from one.
    pub(crate) snapshot: Option<(&'a Digest, &'a Path)>,
}

/// The firmware that libvirt has selected for a running domain.
pub(crate) struct SelectedFirmware {
    pub(crate) code: PathBuf,
    pub(crate) vars_template: PathBuf,
    pub(crate) nvram: PathBuf,
}

impl RunDomain {
    pub(crate) fn new(daemon: Daemon, owner: Owner, pool: &str, ui: &Ui) -> Self {
        Self { daemon, owner, pool: pool.to_owned(), domain: None, streams: None, ui: ui.clone() }
    }

    /// Returns the record of the domain's owner, with the volumes so far.
    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Returns the names of the volumes of a machine's disks.
    pub(crate) fn volume_names(&self) -> [String; 3] {
        ["disk.qcow2", "seed.img", "payload.img"].map(|name| format!("{}-{name}", self.owner.domain()))
    }

    /// Returns the path of the file with the firmware's variables. It is beside the volumes if the pool is a directory,
    /// so that it is one of them. Otherwise libvirt chooses the path.
    pub(crate) fn nvram(&self) -> Result<Option<PathBuf>> {
        let file = format!("{}-nvram.fd", self.owner.domain());
        Ok(self.directory()?.map(|directory| directory.join(file)))
    }

    /// Returns the path of the storage pool, if it is a directory.
    pub(crate) fn directory(&self) -> Result<Option<PathBuf>> {
        let pool = self.daemon.pool(&self.pool)?;
        let description = pool.xml_desc(0).context("describe the storage pool")?;
        let pool = read_document(&description, "pool").map_err(anyhow::Error::msg)?;
        let is_directory = ["dir", "fs", "netfs"].iter().any(|kind| pool.attribute("type") == Some(kind));
        let path = pool.first("target/path").filter(|_| is_directory);
        Ok(path.map(|path| path.text().into()))
    }

    /// Defines the domain, or replaces its definition.
    pub(crate) fn define(&mut self, params: &DomainXmlParams) -> Result<()> {
        let xml = xml::domain_xml(params);
        self.domain = Some(self.daemon.connect.define_domain_xml(&xml).context("define the domain")?);
        Ok(())
    }

    pub(super) fn domain(&self) -> Result<&Domain> {
        self.domain.as_ref().context("the domain is not defined; this is a bug of cargo xtask")
    }

    /// Records a volume, or changes its role. `None` removes it from the record.
    pub(super) fn record(&mut self, name: &str, role: Option<Role>) -> Result<()> {
        let pool = &self.pool;
        self.owner.volumes.retain(|volume| (&volume.pool, volume.name.as_str()) != (pool, name));
        let volume = role.map(|role| OwnedVolume { pool: pool.clone(), name: name.to_owned(), role });
        self.owner.volumes.extend(volume);
        let element = self.owner.element();
        let kind = i32::try_from(virt::sys::VIR_DOMAIN_METADATA_ELEMENT).context("record a volume")?;
        let flags = virt::sys::VIR_DOMAIN_AFFECT_CONFIG;
        self.domain()?
            .set_metadata(kind, Some(&element), Some(PREFIX), Some(NAMESPACE), flags)
            .with_context(|| format!("record the volume {name} in the domain's metadata"))
    }

    /// Makes the volumes of a machine: the overlay over the layers, the seed and the payload. They replace those of an
    /// earlier machine of the run. A layer is uploaded if the daemon's host does not have it yet.
    pub(crate) fn make_volumes(
        &mut self,
        layers: Layers<'_>,
        disk_bytes: u64,
        files: [&Path; 2],
    ) -> Result<Volumes> {
        let Layers { image, snapshot } = layers;
        let (mut top, mut format) = (self.image(&image.digest, &image.disk)?, image.format);
        let mut backing = vec![PathBuf::from(&top)];
        if let Some((digest, disk)) = snapshot {
            (top, format) = (self.image(digest, disk)?, Format::Qcow2);
            backing.insert(0, PathBuf::from(&top));
        }
        let names = self.volume_names();
        for name in &names {
            self.record(name, Some(Role::Run))?;
            self.daemon.delete_volume(&self.pool, name)?;
        }
        let overlay = self.make_overlay(&names[0], (&top, format), disk_bytes)?;
        let mut paths = vec![path(&overlay)?];
        for (name, file) in names[1..].iter().zip(files) {
            let bytes = fs_err::metadata(file)?.len();
            let new = NewVolume {
                pool: &self.pool,
                name,
                format: Format::Raw,
                capacity: bytes,
                backing: None,
                mode: "0600",
            };
            let volume = self.daemon.make_volume(new)?;
            self.daemon.upload(&volume, &self.pool, file, &self.ui)?;
            paths.push(path(&volume)?);
        }
        let paths = paths.try_into().ok().context("a machine has three disks")?;
        Ok(Volumes { paths, backing })
    }

    /// Replaces the overlay by an unused one.
    pub(crate) fn renew_disk(&self, image: &ReadyImage, bytes: u64) -> Result<()> {
        let [name, ..] = &self.volume_names();
        self.daemon.delete_volume(&self.pool, name)?;
        let base = self.owner.volumes.iter().find(|volume| volume.role == Role::Image);
        let base = base.context("the run uses no image; this is a bug of cargo xtask")?;
        let base =
            self.daemon.volume(&self.pool, &base.name)?.context("the image is no longer in the pool")?;
        self.make_overlay(name, (path(&base)?.to_str().unwrap_or_default(), image.format), bytes).map(drop)
    }

    fn make_overlay(&self, name: &str, backing: (&str, Format), capacity: u64) -> Result<StorageVol> {
        self.daemon.make_volume(NewVolume {
            pool: &self.pool,
            name,
            format: Format::Qcow2,
            capacity,
            backing: Some(backing),
            mode: "0600",
        })
    }

    /// Starts the domain with its processors stopped, and opens its consoles. They are passed on to `files`.
    pub(crate) fn start_paused(&mut self, files: &RunFiles) -> Result<Machine> {
        let domain = self.domain()?.clone();
        domain.create_with_flags(virt::sys::VIR_DOMAIN_START_PAUSED).context("start the domain")?;
        let machine = Machine::of(domain);
        self.streams = None;
        let daemon = Daemon::open_in_time(self.daemon.uri(), &self.ui)?;
        let seen = daemon.connect.lookup_domain_by_name(&self.owner.domain()).context("find the domain")?;
        let streams = Streams::open(&daemon.connect, &seen, files)?;
        self.streams = Some((daemon, streams));
        Ok(machine)
    }

    /// Closes the consoles of a guest that is left running.
    pub(crate) fn close_streams(&mut self) {
        self.streams = None;
    }

    /// Returns the firmware that libvirt has selected for the running domain.
    pub(crate) fn firmware(&self) -> Result<SelectedFirmware> {
        let domain =
            read_document(&self.domain()?.xml_desc(0).context("describe the running domain")?, "domain")
                .map_err(anyhow::Error::msg)?;
        let of = |path: &str| {
            domain.first(path).with_context(|| format!("libvirt names no {path} of the running domain"))
        };
        let (loader, nvram) = (of("os/loader")?, of("os/nvram")?);
        Ok(SelectedFirmware {
            code: loader.text().into(),
            vars_template: nvram.attribute("template").unwrap_or_default().into(),
            nvram: nvram.text().into(),
        })
    }

    /// Returns the address that the DHCP server of the guest's network has leased to the guest, if it has.
    pub(crate) fn leased_address(&self) -> Result<Option<Ipv4Addr>> {
        let lease = virt::sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE;
        let cards = self.domain()?.interface_addresses(lease, 0).context("ask for the guest's address")?;
        let addresses = cards.iter().flat_map(|card| &card.addrs);
        Ok(addresses.filter_map(|address| address.addr.parse().ok()).next())
    }

    /// Checks that the daemon still answers, and that it has not ended the guest's network. The caller waits for `what`.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub(crate) fn check(&self, what: &str) -> Result<(), Failure> {
        self.daemon.check(what)?;
        self.streams.as_ref().map_or(Ok(()), |(daemon, _)| daemon.check(what))
    }

    /// Ends the domain, and removes it with its volumes. If the connection has ended, opens another one, for which it
    /// tries for a while: the daemon may have been restarted.
    ///
    /// # Errors
    /// Returns an error that says what is left, and how it is removed.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.streams = None;
        let Some(domain) = self.domain.take() else { return Ok(()) };
        let name = self.owner.domain();
        let uri = self.daemon.uri().clone();
        self.remove_over(&name, &domain).map_err(|error| {
            // The warnings at the end of a run have no line for a remedy.
            let hint =
                format!("the next smoke there removes them, and so does cargo xtask vm gc --connect '{uri}'");
            let attempted = format!("remove the domain {name} and its volumes from {uri} ({hint})");
            error.context(Failure::host(attempted, hint))
        })
    }

    fn remove_over(&self, name: &str, domain: &Domain) -> Result<()> {
        let daemon = match self.daemon.check("the end of the domain") {
            Ok(()) => &self.daemon,
            Err(_) => &self.connect_again()?,
        };
        let found = daemon.connect.lookup_domain_by_name(name);
        let domain = found.as_ref().unwrap_or(domain);
        let known: Vec<_> = daemon.owned()?.into_iter().filter_map(|(_, owner)| owner.ok()).collect();
        daemon.remove(domain, &self.owner, &known).map(drop)
    }

    fn connect_again(&self) -> Result<Daemon> {
        let begun = Instant::now();
        let ui = self.ui.uninterruptible();
        loop {
            match Daemon::open_in_time(self.daemon.uri(), &ui) {
                Err(_) if begun.elapsed() < limits::CONNECTION => std::thread::sleep(limits::SSH_AGAIN),
                opened => return opened,
            }
        }
    }
}

pub(super) fn path(volume: &StorageVol) -> Result<PathBuf> {
    volume.path().map(PathBuf::from).context("ask for the path of a volume")
}

/// Returns the parameters of the daemon's part of a domain.
pub(crate) fn daemon_domain(run_domain: &RunDomain, plan: &Plan, is_restricted: bool) -> DaemonDomain {
    DaemonDomain {
        owner: run_domain.owner.clone(),
        pool: run_domain.pool.clone(),
        volumes: run_domain.volume_names(),
        network: plan.place.network(),
        host: plan.host,
        mac: match plan.place.network() {
            // Each guest has a user-mode network of its own, and a restored guest keeps its address.
            Network::User => GUEST_MAC.to_owned(),
            Network::Nat(_) => mac(&run_domain.owner.run),
        },
        is_restricted,
        is_incoming: false,
    }
}

/// Returns the MAC address of a run's guest, in the range of QEMU and KVM. Two runs have the same address only if the
/// last three bytes of the digests of their ids are equal.
fn mac(run: &str) -> String {
    let digest = xtask_core::digest::Algorithm::Sha256.of(run.as_bytes());
    let hex = digest.hex();
    format!("52:54:00:{}:{}:{}", &hex[0..2], &hex[2..4], &hex[4..6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_its_own_card() {
        let first = mac("1201-000000-0001");
        assert!(first.starts_with("52:54:00:") && first.len() == 17, "{first}");
        assert_ne!(first, mac("1201-000000-0002"));
    }
}
