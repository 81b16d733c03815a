//! A libvirt daemon that runs a guest beside the guests of others: this host's, a user's, or that of another host. A run
//! makes one domain there and a few volumes. [`run_domain`] makes and removes them, [`power`] switches the domain of an
//! earlier command on and off, [`owned`] finds those of dead runs by the metadata of their domains, [`storage`] makes
//! volumes, [`memory`] saves and restores the memory of a machine, and [`streams`] passes the guest's consoles on.

mod image;
mod memory;
pub(crate) mod owned;
mod power;
pub(crate) mod run_domain;
mod storage;
mod streams;

use std::mem::ManuallyDrop;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Instant;

use anyhow::{Context, Result};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::storage_pool::StoragePool;
use virt::storage_vol::StorageVol;
use xtask_core::error::{Failure, host_fault};
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::limits;
use xtask_core::runs::owner::{NAMESPACE, Owner};

use xtask_jobs::Ui;

use super::reaper::{children, end_children_since};
use super::{remote, start_event_loop};

/// An open connection to a daemon.
pub(crate) struct Daemon {
    /// The connection is never closed: the crate virt panics if libvirt cannot close a connection that has broken, and
    /// the process ends soon after the run.
    connect: ManuallyDrop<Connect>,
    uri: ConnectUri,
}

impl Daemon {
    /// Opens a read-write connection. libvirt checks every few seconds whether the daemon still answers. If it does not,
    /// all calls return an error.
    ///
    /// # Errors
    /// Returns a failure of the host that names the URI.
    pub(crate) fn open(uri: &ConnectUri) -> Result<Self> {
        virt::error::clear_error_callback();
        start_event_loop()?;
        let open = || -> Result<Connect, Error> {
            let connect = Connect::open(Some(&uri.for_libvirt()))?;
            let seconds = i32::try_from(limits::KEEPALIVE.as_secs()).unwrap_or(i32::MAX);
            connect.set_keep_alive(seconds, limits::KEEPALIVES_MISSED)?;
            Ok(connect)
        };
        let connect = open().map_err(|error| {
            let hint = format!("see the cause; cargo xtask preflight --connect '{uri}' checks this libvirt");
            host_fault(error.into(), format!("open the libvirt {uri}"), hint)
        })?;
        Ok(Self { connect: ManuallyDrop::new(connect), uri: uri.clone() })
    }

    /// Opens a connection like [`Self::open`], for a command that has not checked the daemon before. The user can end the
    /// wait, which has a limit. The thread that waits is then abandoned. It ends together with this process.
    ///
    /// # Errors
    /// Returns the errors of [`Self::open`], or a failure of the host after the limit.
    pub(crate) fn open_in_time(uri: &ConnectUri, ui: &Ui) -> Result<Self> {
        let before = children();
        let (sender, opened) = mpsc::channel();
        let name = uri.clone();
        // After a timeout, the receiver no longer exists.
        std::thread::spawn(move || _ = sender.send(Self::open(&name)));
        let begun = Instant::now();
        let error = loop {
            match (opened.recv_timeout(limits::POLL), ui.check()) {
                (Ok(daemon), _) => return daemon,
                (_, Err(interrupted)) => break interrupted,
                (Err(RecvTimeoutError::Timeout), _) if begun.elapsed() < limits::CONNECTION => {}
                (Err(_), _) => {
                    let limit = limits::CONNECTION.as_secs();
                    break Failure::host(
                        format!("open the libvirt {uri}: no answer within {limit} s"),
                        format!(
                            "check its host; cargo xtask preflight --connect '{uri}' checks this libvirt"
                        ),
                    )
                    .into();
                }
            }
        };
        end_children_since(&before);
        Err(error)
    }

    pub(crate) fn uri(&self) -> &ConnectUri {
        &self.uri
    }

    /// Returns libvirt's version on the daemon's host.
    pub(crate) fn version(&self) -> Result<String> {
        self.connect.lib_version().map(remote::version).context("ask libvirt for its version")
    }

    /// Checks that the connection still exists. The caller waits for `what`.
    ///
    /// # Errors
    /// Returns a failure of the host if the connection has ended, or if the daemon no longer answers.
    pub(crate) fn check(&self, what: &str) -> Result<(), Failure> {
        if self.connect.is_alive().unwrap_or(false) {
            return Ok(());
        }
        Err(Failure::host(
            format!("the connection to {} ended while waiting for {what}", self.uri),
            "check the network and ssh's server on that host, and run again; nothing is known about the agent",
        ))
    }

    /// Checks that a network is active. The caller waits for `what`.
    ///
    /// # Errors
    /// Returns a failure of the host if the network was stopped or deleted.
    pub(crate) fn check_network(&self, name: &str, what: &str) -> Result<(), Failure> {
        let network = self.connect.lookup_network_by_name(name);
        if network.and_then(|network| network.is_active()).unwrap_or(false) {
            return Ok(());
        }
        Err(Failure::host(
            format!("the guest's network {name} was stopped while waiting for {what}"),
            format!("start it ({}), and run again", self.uri.virsh(&format!("net-start {name}"))),
        ))
    }

    fn pool(&self, name: &str) -> Result<StoragePool> {
        self.connect
            .lookup_storage_pool_by_name(name)
            .with_context(|| format!("find the storage pool {name}"))
    }

    /// Returns the volume, or `None` if it or its pool does not exist.
    fn volume(&self, pool: &str, name: &str) -> Result<Option<StorageVol>> {
        let Some(of) =
            remote::unless(ErrorNumber::NoStoragePool, self.connect.lookup_storage_pool_by_name(pool))
                .with_context(|| format!("find the storage pool {pool}"))?
        else {
            return Ok(None);
        };
        remote::unless(ErrorNumber::NoStorageVolume, of.lookup_storage_vol_by_name(name))
            .with_context(|| format!("find the volume {name} in the pool {pool}"))
    }

    /// Returns the domains whose metadata names `cargo xtask` as their owner. A record that cannot be read is an error
    /// in the list.
    fn owned(&self) -> Result<Vec<(Domain, Result<Owner>)>> {
        let domains = self.connect.list_all_domains(0).context("list the domains")?;
        let owned = domains.into_iter().filter_map(|domain| {
            let owner = Self::owner(&domain)?;
            Some((domain, owner))
        });
        Ok(owned.collect())
    }

    /// Returns the record in the metadata of a domain, or `None` if the domain belongs to others.
    fn owner(domain: &Domain) -> Option<Result<Owner>> {
        let kind = virt::sys::VIR_DOMAIN_METADATA_ELEMENT.try_into().ok()?;
        // A domain without such metadata belongs to others. The error has the same meaning.
        let element = domain.metadata(kind, Some(NAMESPACE), 0).ok()?;
        Some(Owner::parse(&element))
    }
}
