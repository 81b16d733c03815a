//! The place where a guest runs: libvirt's embedded driver on this host, or a libvirt daemon. The phases use a running
//! machine only through this type, so another place would change only this file. [`super::on_daemon`] has the daemon's
//! half.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask_core::error::Failure;
use xtask_core::fs::write_private;
use xtask_core::machine::{RunFiles, SSH_PORT, xml};
use xtask_core::plan::Plan;
use xtask_core::processes::{Process, emulator};
use xtask_core::readback::ExpectedMachine;
use xtask_core::runs::instance::Route;
use xtask_core::snapshot::{DISK, RAM};
use xtask_core::{bail_guest, bail_host};
use xtask_images::ReadyImage;

use super::on_daemon::OnDaemon;
use super::prepare::make_writable_files;
use super::run::Run;
use crate::libvirt::{Condition, Hypervisor, Machine, Reach, paused};

/// The definition of a domain of the embedded driver, which is used for each of its boots.
pub(super) struct Domain {
    pub(super) xml: String,
    expected: ExpectedMachine,
    work: PathBuf,
    /// The network services that the guest can reach from its next boot on.
    pub(super) reach: Reach,
    /// The file in which all writes of the next boot are recorded.
    write_log: Option<PathBuf>,
}

impl Domain {
    /// Makes the domain of a plan. Its XML and the machine that is expected from QEMU are written into the run's
    /// working directory, where `vm start` also reads them.
    pub(super) fn write(plan: &Plan, files: &RunFiles, work: &Path, reach: Reach) -> Result<Self> {
        let params = plan.domain(files);
        let xml = xml::domain_xml(&params);
        write_private(&work.join(paused::XML), &xml)?;
        let expected = ExpectedMachine::of(&params)?;
        write_private(&work.join(paused::EXPECTED), serde_json::to_string_pretty(&expected)?)?;
        Ok(Self { xml, expected, work: work.to_owned(), reach, write_log: None })
    }

    /// Records all writes to the guest's disk in `log`, if there is one, from the next start or restore on. The recording
    /// begins before the guest runs.
    pub(super) fn record_writes(&mut self, log: Option<PathBuf>) {
        self.write_log = log;
    }

    /// Starts the domain paused, compares QEMU's machine with the expected one, and lets the guest run.
    pub(super) fn start(&self, hypervisor: &Hypervisor) -> Result<Machine> {
        self.resume(hypervisor.start_paused(&self.xml, &self.reach)?)
    }

    /// Compares the machine of a stopped guest with the expected one, and lets the guest run.
    pub(super) fn resume(&self, stopped: Machine) -> Result<Machine> {
        let verified = paused::verified(stopped, &self.expected, &self.work)?;
        if let Some(log) = &self.write_log {
            verified.record_writes(log)?;
        }
        verified.resume()?;
        Ok(verified)
    }
}

/// The libvirt that runs a machine, with the definition of its domain.
pub(super) enum Driver {
    Embedded { hypervisor: Hypervisor, domain: Box<Domain> },
    Daemon(Box<OnDaemon>),
}

/// A machine in its place.
pub(super) struct Target {
    driver: Driver,
    machine: Machine,
}

impl Target {
    pub(super) fn embedded(hypervisor: Hypervisor, domain: Domain, machine: Machine) -> Self {
        Self { driver: Driver::Embedded { hypervisor, domain: Box::new(domain) }, machine }
    }

    pub(super) fn on_daemon(on_daemon: OnDaemon, machine: Machine) -> Self {
        Self { driver: Driver::Daemon(Box::new(on_daemon)), machine }
    }

    /// Replaces a machine that has ended by another one, and its domain if it is of the embedded driver.
    pub(super) fn replace(&mut self, replacement: Option<Domain>, machine: Machine) {
        if let (Driver::Embedded { domain, .. }, Some(replacement)) = (&mut self.driver, replacement) {
            **domain = replacement;
        }
        self.machine = machine;
    }

    pub(super) fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    /// Returns the daemon's half if the machine runs on a daemon.
    pub(super) fn daemon(&mut self) -> Option<&mut OnDaemon> {
        match &mut self.driver {
            Driver::Embedded { .. } => None,
            Driver::Daemon(on_daemon) => Some(on_daemon),
        }
    }

    /// Returns whether the guest can reach no services of the host of its QEMU but those of the run. The answer for the
    /// embedded driver assumes that this host can confine QEMU.
    pub(super) fn is_confined(&self) -> bool {
        match &self.driver {
            Driver::Embedded { domain, .. } => domain.reach != Reach::Everything,
            Driver::Daemon(on_daemon) => on_daemon.is_confined(),
        }
    }

    pub(super) fn condition(&self) -> Condition {
        self.machine.condition()
    }

    /// Checks that the host has not ended QEMU, and that the connection to a daemon still exists. The caller waits for
    /// `what`.
    ///
    /// # Errors
    /// Returns a failure of the host.
    pub(super) fn check_host(&self, what: &str) -> Result<(), Failure> {
        match &self.driver {
            Driver::Embedded { hypervisor, .. } => hypervisor.check_signal(what),
            Driver::Daemon(on_daemon) => {
                on_daemon.run_domain.check(what)?;
                self.machine.check_end(what)
            }
        }
    }

    /// Returns the failure of the host if the connection to a daemon has ended, or if the guest's network was stopped.
    pub(super) fn broken_connection(&self, what: &str) -> Option<Failure> {
        match &self.driver {
            Driver::Embedded { .. } => None,
            Driver::Daemon(on_daemon) => on_daemon.broken(what),
        }
    }

    /// Returns the port on 127.0.0.1 that is forwarded to a port of the guest.
    pub(super) fn port_to(&self, guest_port: u16) -> Result<u16> {
        match &self.driver {
            Driver::Embedded { .. } => self.machine.port_to(guest_port),
            Driver::Daemon(on_daemon) => on_daemon.port_to(guest_port),
        }
    }

    /// Returns the run's working directory.
    pub(super) fn work(&self) -> &Path {
        match &self.driver {
            Driver::Embedded { domain, .. } => &domain.work,
            Driver::Daemon(on_daemon) => &on_daemon.work,
        }
    }

    /// Returns the way to the guest's sshd. `None` if the guest has no address yet.
    pub(super) fn ssh_route(&self) -> Result<Option<Route>> {
        match &self.driver {
            Driver::Embedded { .. } => {
                let port = self.machine.port_to(SSH_PORT)?;
                Ok(Some(Route { address: "127.0.0.1".to_owned(), port, proxy_command: None }))
            }
            Driver::Daemon(on_daemon) => on_daemon.route(&self.machine),
        }
    }

    /// Returns the failure of the host if a guest on a daemon is not connected with the servers of the run.
    pub(super) fn tunnel_failure(&self) -> Option<Failure> {
        match &self.driver {
            Driver::Embedded { .. } => None,
            Driver::Daemon(on_daemon) => on_daemon.tunnel_failure(),
        }
    }

    /// Opens the connection between a guest on a daemon and the servers of the run.
    pub(super) fn open_tunnel(&mut self, route: &Route) {
        if let Driver::Daemon(on_daemon) = &mut self.driver {
            on_daemon.open_tunnel(route);
        }
    }

    /// Writes the machine's memory to a file in the directory `made`, and ends the machine. The disk of a machine on a
    /// daemon is copied to this directory, too.
    pub(super) fn save(&mut self, made: &Path) -> Result<()> {
        match &mut self.driver {
            Driver::Embedded { .. } => self.machine.save(&made.join(RAM)),
            Driver::Daemon(on_daemon) => {
                on_daemon.run_domain.save_memory(&mut self.machine, &made.join(RAM))?;
                on_daemon.run_domain.close_streams();
                on_daemon.run_domain.download_disk(&made.join(DISK))
            }
        }
    }

    /// Returns the QEMU of a machine on this host, if this process may find it.
    pub(super) fn emulator(&self) -> Option<Process> {
        match &self.driver {
            Driver::Embedded { domain, .. } => emulator(&domain.work),
            Driver::Daemon(on_daemon) => on_daemon.run_domain.emulator(),
        }
    }

    /// Sends SIGKILL to QEMU. On a daemon where this user may not do so, ends QEMU by virDomainDestroy. Returns whether
    /// QEMU had no time to flush its disks.
    pub(super) fn kill_qemu(&mut self) -> Result<bool> {
        match &self.driver {
            Driver::Embedded { domain, .. } => match emulator(&domain.work) {
                Some(qemu) => qemu.kill().map(|_| true),
                None => bail_host!(
                    "cannot find the run's QEMU to kill it";
                    "run again; if QEMU ends by itself, read the host's kernel log"
                ),
            },
            Driver::Daemon(on_daemon) => {
                let was_hard = on_daemon.run_domain.kill_qemu()?;
                if !was_hard {
                    self.machine.destroy()?;
                }
                Ok(was_hard)
            }
        }
    }

    /// Cuts the power of a running guest: sends SIGKILL to its QEMU, then calls libvirt's destroy. virDomainDestroy
    /// alone first sends SIGTERM, on which QEMU flushes its disks. The guest would then lose none of its writes.
    /// Returns whether SIGKILL could be sent.
    ///
    /// # Errors
    /// Returns a failure of the guest if the guest does not run, because a guest that is already off loses nothing.
    pub(super) fn cut_power(&mut self) -> Result<bool> {
        match self.machine.condition() {
            Condition::Running => {}
            Condition::Paused => return Err(self.stopped("before the power cut")?.into()),
            Condition::Off | Condition::Gone => {
                self.check_host("the power cut")?;
                bail_guest!(
                    "the guest was not running when its power was to be cut: it was already off";
                    "read console.log for why it stopped"
                )
            }
        }
        let was_hard = self.kill_qemu().context("cut the power")?;
        self.power_off()?;
        Ok(was_hard)
    }

    /// Returns QEMU's own name of its state (QEMU, RunState): `io-error` if QEMU stopped the guest because it cannot
    /// write the guest's disk, and `internal-error` if KVM could not run the guest.
    pub(super) fn run_state(&self) -> Result<String> {
        self.machine.run_state()
    }

    /// Returns the failure of the host because of which QEMU has stopped the guest.
    pub(super) fn stopped(&self, when: &str) -> Result<Failure> {
        let state = self.run_state()?;
        let hint = match (state.as_str(), &self.driver) {
            ("io-error", Driver::Embedded { .. }) => format!(
                "QEMU cannot write the guest's disk: check the free space of the file system with {}",
                self.work().display()
            ),
            ("io-error", Driver::Daemon(on_daemon)) => on_daemon.full_pool(),
            _ => "read QEMU's log (qemu.log in the report's directory, or /var/log/libvirt/qemu on a daemon's host); \
                  if KVM failed, use --accel tcg"
                .to_owned(),
        };
        Ok(Failure::host(format!("QEMU stopped the guest {when}; its state is {state}"), hint))
    }

    /// Returns the registers of all processors of the guest as text. If two texts are equal, no processor has executed
    /// anything in between.
    pub(super) fn registers(&self) -> Result<String> {
        self.machine.hmp("info registers -a").context("read the registers of the guest's processors")
    }

    /// Limits the writes to the guest's disk, in bytes and in requests per second. 0 means no limit. QEMU lets one more
    /// request through before a limit takes effect (QEMU, docs/throttle.txt).
    pub(super) fn limit_writes(&self, bytes: u64, requests: u64) -> Result<()> {
        self.machine.limit_writes(bytes, requests)
    }

    /// Connects the guest's network card with its network, or takes the cable out.
    pub(super) fn set_link(&self, is_up: bool) -> Result<()> {
        self.machine.set_link(is_up)
    }

    /// Lets the next write to the guest's disk fail with EIO.
    pub(super) fn fail_next_write(&self) -> Result<()> {
        self.machine.fail_next_write()
    }

    /// Stops the guest's processors, and waits until QEMU has completed the guest's requests to its disks.
    pub(super) fn stop_guest(&self) -> Result<()> {
        self.machine.stop_guest()
    }

    /// Ends the machine without a shutdown of the guest.
    pub(super) fn power_off(&mut self) -> Result<()> {
        if let Driver::Daemon(on_daemon) = &mut self.driver {
            on_daemon.close_tunnel();
        }
        self.machine.destroy()
    }

    /// Ends the machine, and removes what it has on a daemon.
    pub(super) fn remove(&mut self) -> Result<()> {
        match &mut self.driver {
            Driver::Embedded { .. } => self.power_off(),
            Driver::Daemon(on_daemon) => {
                on_daemon.close_tunnel();
                self.machine.let_go();
                on_daemon.run_domain.remove()
            }
        }
    }

    /// Starts the same domain again. QEMU's machine is compared with the expected one before the guest runs. All
    /// packages are installed now, so the guest no longer reaches the internet.
    pub(super) fn power_on(&mut self, files: &RunFiles) -> Result<()> {
        self.machine = match &mut self.driver {
            Driver::Embedded { hypervisor, domain } => {
                domain.reach = domain.reach.without_internet();
                // The first boot alone is recorded.
                domain.write_log = None;
                domain.start(hypervisor)?
            }
            Driver::Daemon(on_daemon) => on_daemon.power_on(files)?,
        };
        Ok(())
    }

    /// Changes the disks of a machine of the embedded driver that is off, for its next boot.
    pub(super) fn redefine(&mut self, plan: &Plan, files: &RunFiles) -> Result<()> {
        match &mut self.driver {
            Driver::Embedded { domain, .. } => {
                **domain = Domain::write(plan, files, &domain.work, domain.reach.clone())?;
                Ok(())
            }
            Driver::Daemon(_) => bail_host!(
                "the disks of a machine are replaced only on libvirt's embedded driver";
                "this is a bug of cargo xtask"
            ),
        }
    }

    /// Starts another machine with an unused disk, after the plan has changed.
    pub(super) fn start_again(
        &mut self,
        run: &Run<'_>,
        plan: &Plan,
        files: &RunFiles,
        image: &ReadyImage,
    ) -> Result<()> {
        self.machine = match &mut self.driver {
            Driver::Embedded { hypervisor, domain } => {
                make_writable_files(plan, files, &image.base(), &run.ui)?;
                **domain = Domain::write(plan, files, &run.dir.work(), domain.reach.clone())?;
                domain.start(hypervisor)?
            }
            Driver::Daemon(on_daemon) => on_daemon.start_again(plan, files, image)?,
        };
        Ok(())
    }

    /// Lets the machine run on after this value is dropped.
    pub(super) fn leave(&mut self) {
        self.machine.let_go();
    }
}
