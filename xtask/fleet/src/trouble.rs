//! The faults of the broker that a run causes on purpose. If a fault cannot be caused or ended, that is a failure of the
//! host.

use std::collections::BTreeMap;

use agent_protocol as protocol;
use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::kv;
use futures_util::TryStreamExt as _;
use rustix::process::Signal;
use xtask_core::fs::make_private_dir;

use crate::certificates::Certificates;
use crate::line::Line;
use crate::server::{Server, users};
use crate::{Broker, of_host, random_password};

/// The authority that issues the portal's certificate.
const PORTAL_AUTHORITY: &str = "the certificate authority of a portal";

/// The documents of the desired state, in the order in which they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    revision: u64,
    key: String,
    document: Vec<u8>,
}

impl Broker {
    /// Opens the line, through which the device connects from now on. [`Self::port`] and [`Self::agent_config`] then
    /// give the line's port. Therefore this function must be called before either of them is used.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn open_line(&mut self) -> Result<()> {
        self.open_line_on(None)
    }

    /// Opens the line on this port.
    pub(crate) fn open_line_on(&mut self, port: Option<u16>) -> Result<()> {
        ensure!(self.line.is_none(), "open a line to the broker: a line is open already");
        self.line = Some(Line::open(self.runtime.handle().clone(), port, self.server.port)?);
        Ok(())
    }

    /// Returns the line, if it was opened.
    pub fn line(&self) -> Option<&Line> {
        self.line.as_ref()
    }

    /// Starts the portal, to which [`crate::Passage::Portal`] leads the device's connections, unless it runs already.
    /// The portal is a second nats-server. Its certificate has the broker's addresses, but another authority has issued
    /// it. The portal ends with the broker.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn open_portal(&mut self) -> Result<()> {
        let line = self.line.as_ref().context("start the portal: open the line first")?;
        if self.portal.is_some() {
            return Ok(());
        }
        let start = || {
            let directory = self.server.owner().join("portal");
            make_private_dir(&directory)?;
            let certificates = Certificates::issue(&directory, PORTAL_AUTHORITY)?;
            let nobody = users(&random_password()?, &self.device_id, &random_password()?);
            Server::start(&directory, self.server.owner(), certificates.server + &nobody, &self.ui)
        };
        let portal = start().map_err(|error| of_host(error, "start the portal"))?;
        line.lead_to(portal.port);
        self.portal = Some(portal);
        Ok(())
    }

    /// Stops all threads of the server (SIGSTOP). The kernel still accepts connections to it and acknowledges their
    /// bytes, but nothing answers. The fleet's own requests fail meanwhile.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn pause(&self) -> Result<()> {
        self.server.signal(Signal::STOP).map_err(|error| of_host(error, "pause the broker"))
    }

    /// Lets the server go on after [`Self::pause`], and connects the fleet to it again. The fleet's earlier connection
    /// may have ended meanwhile.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn go_on(&mut self) -> Result<()> {
        self.server
            .signal(Signal::CONT)
            .and_then(|()| self.reconnect())
            .map_err(|error| of_host(error, "let the broker go on"))
    }

    /// Makes the server refuse the device's login from now on, also after [`Self::come_back`]. The server ends the
    /// device's connection.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn revoke_login(&mut self) -> Result<()> {
        let accepted = random_password()?;
        self.accept(&accepted).map_err(|error| of_host(error, "revoke the device's login"))
    }

    /// Makes the server accept the device's login again.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn allow_login(&mut self) -> Result<()> {
        let accepted = self.device_password.clone();
        self.accept(&accepted).map_err(|error| of_host(error, "allow the device's login again"))
    }

    fn accept(&mut self, password: &str) -> Result<()> {
        let logins = users(&self.fleet_password, &self.device_id, password);
        self.server.reload(self.certificates.server.clone() + &logins, &self.ui)
    }

    /// Empties the desired state like an operator who purges the wrong stream: no entry is left, and no marker of a
    /// deletion. Returns the documents that were there, for [`Self::refill_bucket`]. The revisions go on after the last
    /// one.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn empty_bucket(&self) -> Result<Contents> {
        let contents = self.contents()?;
        let purge = async { self.fleet.desired.stream.purge().await };
        self.ask("purge the stream of the desired state", purge)?;
        Ok(contents)
    }

    fn contents(&self) -> Result<Contents> {
        let what = "list the desired state";
        let keys = self.ask(what, self.fleet.desired.keys())?;
        let keys: Vec<String> = self.ask(what, keys.try_collect())?;
        let mut entries = Vec::new();
        for key in keys {
            let entry = self.ask(&format!("read the deployment {key}"), self.fleet.desired.entry(&key))?;
            let put = entry.filter(|entry| entry.operation == kv::Operation::Put);
            entries.extend(put.map(|put| Entry { revision: put.revision, key, document: put.value.into() }));
        }
        entries.sort_by_key(|entry| entry.revision);
        Ok(Contents { entries })
    }

    /// Writes documents that [`Self::empty_bucket`] has returned, byte for byte and in their order. Returns the new
    /// revisions of the deployments.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn refill_bucket(&self, contents: &Contents) -> Result<BTreeMap<String, u64>> {
        let device = protocol::desired_key(&self.device_id, "");
        let put = |entry: &Entry| {
            let put = self.fleet.desired.put(&entry.key, entry.document.clone().into());
            let revision = self.ask(&format!("write the deployment {} again", entry.key), put)?;
            Ok((entry.key.strip_prefix(&device).unwrap_or(&entry.key).to_owned(), revision))
        };
        contents.entries.iter().map(put).collect()
    }
}
