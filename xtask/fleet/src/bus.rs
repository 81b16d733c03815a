//! The server for callers with a runtime of their own, such as the agent's tests: [`crate::Broker`] blocks on its own
//! runtime.

use std::path::{Path, PathBuf};

use anyhow::Result;
use xtask_core::fs::make_private_dir;
use xtask_jobs::Ui;

use crate::server::Server;
pub use crate::server::{FLEET_USER, users};

/// A running nats-server with JetStream, which ends with this value.
pub struct Bus {
    server: Server,
}

impl Bus {
    /// Starts it in `directory`. `access` is the part of its configuration that says who may log in, such as [`users`].
    ///
    /// # Errors
    /// The server is missing, ends, or does not listen in time.
    pub fn start(directory: &Path, access: &str) -> Result<Self> {
        make_private_dir(directory)?;
        let server = Server::start(directory, directory, access.to_owned(), &Ui::quiet())?;
        Ok(Self { server })
    }

    /// The port on 127.0.0.1, also while the server is away.
    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// Everything that the server has printed.
    pub fn log(&self) -> PathBuf {
        self.server.log().to_owned()
    }

    /// Ends the server. Connections are refused until [`Bus::come_back`].
    ///
    /// # Errors
    /// The server does not end, or its port cannot be kept.
    pub fn go_away(&mut self) -> Result<()> {
        self.server.go_away()
    }

    /// Starts the server again, on the same port and with the same store.
    ///
    /// # Errors
    /// Those of [`Bus::start`].
    pub fn come_back(&mut self) -> Result<()> {
        self.server.come_back(&Ui::quiet())
    }
}
