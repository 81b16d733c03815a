//! A broker that outlives its run: its store, its certificates and its passwords, for a machine that is booted again.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xtask_core::fs::{entries, make_private_dir, remove_tree, write_private};
use xtask_jobs::Ui;

use crate::certificates::Certificates;
use crate::line::{Line, Passage};
use crate::server::{Server, keep_from_others, users};
use crate::{Broker, of_host};

/// The file with the [`Access`] of a kept broker.
const ACCESS: &str = "access.json";
/// The parts of the server's directory that are kept.
const STORE: &str = "store";

/// The logins and the ports of a kept broker.
#[derive(Debug, Serialize, Deserialize)]
struct Access {
    /// The port of the server.
    port: u16,
    /// The port of the line, if one was open.
    #[serde(default)]
    line_port: Option<u16>,
    device_id: String,
    device_password: String,
    fleet_password: String,
}

impl Broker {
    /// Copies everything with which [`Self::resume`] starts the same broker again to `kept`. Only this user can read the
    /// files. The server is stopped meanwhile.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn keep(&mut self, kept: &Path) -> Result<()> {
        self.go_away()?;
        let copied = self.copy(kept).with_context(|| format!("copy the broker to {}", kept.display()));
        self.come_back()?;
        copied.map_err(|error| of_host(error, "keep the broker"))
    }

    fn copy(&self, kept: &Path) -> Result<()> {
        make_private_dir(kept)?;
        self.certificates.copy_to(kept)?;
        copy_tree(&self.server.directory().join(STORE), &kept.join(STORE))?;
        let access = Access {
            port: self.server.port,
            line_port: self.line.as_ref().map(Line::port),
            device_id: self.device_id.clone(),
            device_password: self.device_password.clone(),
            fleet_password: self.fleet_password.clone(),
        };
        write_private(&kept.join(ACCESS), serde_json::to_string_pretty(&access)?)
    }

    /// Starts the broker that [`Self::keep`] has copied to `kept`, on the same port and with the same logins. If a line was
    /// open, a line is opened on the same port, too. Its passage is [`crate::Passage::Open`]. The files of the broker are
    /// copied to `work`.
    ///
    /// # Errors
    /// Returns a failure of the host, for example if another process has one of the ports.
    pub fn resume(work: &Path, kept: &Path, ui: &Ui) -> Result<Self> {
        Self::start_kept(work, kept, ui)
            .map_err(|error| of_host(error, &format!("start the broker of {} again", kept.display())))
    }

    /// Goes back to what [`Self::keep`] has copied from this broker to `kept`: the content of the buckets, the device's login
    /// and an open line. The server may be stopped or paused. The device's connections are cut.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub fn go_back(&mut self, kept: &Path) -> Result<()> {
        self.replaced(kept).map_err(|error| of_host(error, "bring the broker back to its earlier state"))
    }

    fn replaced(&mut self, kept: &Path) -> Result<()> {
        self.go_away()?;
        self.allow_login()?;
        let store = self.server.directory().join(STORE);
        remove_tree(&store)?;
        copy_tree(&kept.join(STORE), &store)?;
        self.come_back()?;
        let Some(line) = &self.line else { return Ok(()) };
        line.cut();
        line.set(Passage::Open)
    }

    fn start_kept(work: &Path, kept: &Path, ui: &Ui) -> Result<Self> {
        let access: Access = serde_json::from_slice(&fs_err::read(kept.join(ACCESS))?)?;
        let directory = work.join("nats");
        make_private_dir(&directory)?;
        let certificates = Certificates::read(kept, &directory)?;
        copy_tree(&kept.join(STORE), &directory.join(STORE))?;
        let Access { port, line_port, device_id, device_password, fleet_password } = access;
        let configured = certificates.server.clone() + &users(&fleet_password, &device_id, &device_password);
        // The fleet's own connection must not get the line's port before the line is opened.
        let reserved = line_port.map(|port| {
            keep_from_others(port).with_context(|| format!("reserve the line's port 127.0.0.1:{port}"))
        });
        let _reserved = reserved.transpose()?;
        let server = Server::start_on(&directory, work, Some(port), configured, ui)?;
        let mut broker =
            Self::connected(server, certificates, (fleet_password, device_id, device_password), ui)?;
        if line_port.is_some() {
            broker.open_line_on(line_port)?;
        }
        Ok(broker)
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    make_private_dir(to)?;
    for path in entries(from) {
        let copy = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_tree(&path, &copy)?;
        } else {
            write_private(&copy, fs_err::read(&path)?)?;
        }
    }
    Ok(())
}
