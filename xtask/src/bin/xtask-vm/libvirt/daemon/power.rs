//! The domain of a machine that an earlier command has left on a daemon: its state, its power, and the way to its guest.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use virt::error::ErrorNumber;
use xtask_core::cli::Network;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::SSH_PORT;
use xtask_core::processes::{Process, emulator_of_daemon};
use xtask_core::runs::instance::Route;
use xtask_core::runs::listing::State;
use xtask_core::runs::owner::{NAME, Role};
use xtask_core::xml_tree::read_document;
use xtask_jobs::{Ui, child};

use super::Daemon;
use super::run_domain::RunDomain;
use super::streams::Streams;
use crate::libvirt::{Condition, Machine, remote};

/// The directory in which the system's daemon writes the pids of its QEMUs.
const SYSTEM_PID_FILES: &str = "/run/libvirt/qemu";
/// The directory in which the daemon of a user writes the pids of its QEMUs, below XDG_RUNTIME_DIR.
const SESSION_PID_FILES: &str = "libvirt/qemu/run";
/// The part of QEMU's argument `-netdev` that gives the guest no access to the host and the internet.
const RESTRICTION: &str = ",restrict=on";

impl RunDomain {
    /// Finds the domain of a run. Returns `None` if the daemon has no domain of its name.
    ///
    /// # Errors
    /// Returns an error if the domain of this name has no record of the run, because it then belongs to others.
    pub(crate) fn find(daemon: Daemon, run: &str, ui: &Ui) -> Result<Option<Self>> {
        let name = format!("{NAME}{run}");
        let found = remote::unless(ErrorNumber::NoDomain, daemon.connect.lookup_domain_by_name(&name));
        let Some(domain) = found.with_context(|| format!("find the domain {name}"))? else {
            return Ok(None);
        };
        let owner =
            Daemon::owner(&domain).with_context(|| format!("the domain {name} belongs to others"))??;
        ensure!(owner.run == run, "the domain {name} belongs to the run {}", owner.run);
        let of_run = owner.volumes.iter().find(|volume| volume.role == Role::Run);
        let pool = of_run.map(|volume| volume.pool.clone()).unwrap_or_default();
        let mut run_domain = Self::new(daemon, owner, &pool, ui);
        run_domain.domain = Some(domain);
        Ok(Some(run_domain))
    }

    /// Returns the machine of the domain. If the value is dropped, the machine goes on.
    pub(crate) fn machine(&self) -> Result<Machine> {
        Ok(Machine::left_by_another(self.domain()?.clone()))
    }

    /// Returns the condition of the domain.
    ///
    /// # Errors
    /// Returns a failure of the host if the connection to the daemon has ended.
    pub(crate) fn condition(&self) -> Result<Condition> {
        let condition = self.machine()?.condition();
        if condition == Condition::Gone {
            // An error of the connection looks like this, too.
            self.daemon.check("the state of the machine")?;
        }
        Ok(condition)
    }

    /// Returns the state of the machine, with QEMU's name of the state if QEMU has stopped the guest.
    pub(crate) fn state(&self) -> Result<State> {
        Ok(match self.condition()? {
            Condition::Running => State::Running,
            Condition::Off | Condition::Gone => State::Off,
            Condition::Paused => State::Stopped(self.machine()?.run_state()?),
        })
    }

    /// Returns the domain's QEMU, if it runs on this host and this user may find it.
    pub(crate) fn emulator(&self) -> Option<Process> {
        if self.daemon.uri().destination.is_some() {
            return None;
        }
        let name = self.owner().domain();
        let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let directories = [Some(PathBuf::from(SYSTEM_PID_FILES)), own.map(|own| own.join(SESSION_PID_FILES))];
        let found = |directory: PathBuf| emulator_of_daemon(&directory.join(format!("{name}.pid")));
        directories.into_iter().flatten().find_map(found)
    }

    /// Sends SIGKILL to the domain's QEMU, on another host by ssh. Returns false if this user may not do so.
    pub(crate) fn kill_qemu(&self) -> Result<bool> {
        match self.emulator() {
            Some(qemu) => qemu.kill().map(|_| true),
            None => self.kill_over_ssh(),
        }
    }

    fn kill_over_ssh(&self) -> Result<bool> {
        let uri = self.daemon.uri();
        let Some((program, mut arguments)) = uri.ssh() else { return Ok(false) };
        let name = self.owner().domain();
        let directory = match uri.session {
            true => format!("${{XDG_RUNTIME_DIR:-/run/user/$(id -u)}}/{SESSION_PID_FILES}"),
            false => SYSTEM_PID_FILES.to_owned(),
        };
        // A later process may have the same pid, but not the name of the domain among its arguments.
        arguments.push(format!(
            "pid=$(cat \"{directory}/{name}.pid\") && grep -q {name} /proc/$pid/cmdline && kill -KILL $pid"
        ));
        let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
        let program = tools::require(program)?;
        let killed = child::output(&program, &arguments, limits::CONNECTION, &self.ui)?;
        Ok(killed.status.success())
    }

    /// Kills the domain's QEMU, then calls libvirt's destroy, which alone would let QEMU flush its disks first. Returns
    /// whether QEMU could be killed.
    pub(crate) fn cut_power(&self) -> Result<bool> {
        let was_hard = self.kill_qemu().context("cut the power")?;
        self.machine()?.destroy()?;
        Ok(was_hard)
    }

    /// Returns the network of the guest.
    pub(crate) fn network(&self) -> Result<Network> {
        let domain = read_document(&self.definition()?, "domain").map_err(anyhow::Error::msg)?;
        let source = domain.first("devices/interface/source");
        let name = source.and_then(|source| source.attribute("network"));
        Ok(name.map_or(Network::User, |name| Network::Nat(name.to_owned())))
    }

    /// Returns the way to the guest's sshd, or `None` if the network has not leased an address to the guest yet.
    pub(crate) fn route(&self, network: &Network, machine: &Machine) -> Result<Option<Route>> {
        let proxy_command = self.daemon.uri().proxy_command();
        Ok(match network {
            Network::Nat(_) => self.leased_address()?.map(|address| Route {
                address: address.to_string(),
                port: SSH_PORT,
                proxy_command,
            }),
            Network::User => Some(Route {
                address: "127.0.0.1".to_owned(),
                port: machine.port_to(SSH_PORT)?,
                proxy_command,
            }),
        })
    }

    /// Gives the guest of a smoke the internet from its next boot on. A guest of `vm up` has it.
    pub(crate) fn lift_restriction(&mut self) -> Result<()> {
        let xml = self.definition()?;
        if xml.contains(RESTRICTION) {
            let xml = xml.replace(RESTRICTION, "");
            let defined = self.daemon.connect.define_domain_xml(&xml).context("define the domain")?;
            self.domain = Some(defined);
        }
        Ok(())
    }

    fn definition(&self) -> Result<String> {
        let inactive = virt::sys::VIR_DOMAIN_XML_INACTIVE;
        self.domain()?.xml_desc(inactive).context("read the definition of the domain")
    }

    /// Attaches to the guest's console. Its output is appended to `log`, and what is written to the returned socket is
    /// typed. The socket ends with the guest or with the connection.
    ///
    /// # Errors
    /// Returns an error if another client of libvirt is attached.
    pub(crate) fn attach_console(&mut self, log: &Path) -> Result<UnixStream> {
        let daemon = Daemon::open_in_time(self.daemon.uri(), &self.ui)?;
        let seen = daemon.connect.lookup_domain_by_name(&self.owner.domain()).context("find the domain")?;
        let (streams, socket) = Streams::attach(&daemon.connect, &seen, log)?;
        self.streams = Some((daemon, streams));
        Ok(socket)
    }
}
