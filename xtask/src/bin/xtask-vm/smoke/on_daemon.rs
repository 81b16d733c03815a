//! A machine on a libvirt daemon: its start, its power, and the ways between the guest and the servers of the run.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use xtask_core::cli::Network;
use xtask_core::error::Failure;
use xtask_core::fs::write_private;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::machine::seed::{PayloadTime, Seed};
use xtask_core::machine::{DaemonDomain, DomainXmlParams, GUEST_MAC, RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::readback::{ExpectedFlash, ExpectedMachine};
use xtask_core::report::{EventKind, FirmwareReport};
use xtask_core::runs::instance::Route;
use xtask_core::runs::owner::Owner;
use xtask_core::snapshot::neutral_seed;
use xtask_core::{bail_host, limits};
use xtask_images::ReadyImage;

use super::boot::emulate_instead;
use super::prepare::{Parts, SMALLEST_DISK, apt_sources};
use super::run::Run;
use super::running::RunningVm;
use super::target::Target;
use crate::guest::media::{self, Delivered};
use crate::guest::tunnel::{BROKER_IN_GUEST, Tunnel};
use crate::libvirt::daemon::Daemon;
use crate::libvirt::daemon::run_domain::{Layers, RunDomain, daemon_domain};
use crate::libvirt::{Machine, paused};

/// The daemon's half of a machine's place.
pub(super) struct OnDaemon {
    pub(super) run_domain: RunDomain,
    tunnel: Tunnel,
    pub(super) params: DomainXmlParams,
    /// The run's working directory on this host.
    pub(super) work: PathBuf,
    /// True if the guest keeps its access to the internet after its first boot, as a machine of `vm up` does.
    pub(super) keeps_internet: bool,
    /// The firmware that libvirt has selected.
    firmware: Option<FirmwareReport>,
}

/// The parts of a machine on a daemon that exist before its domain is defined.
pub(super) struct Begun {
    pub(super) parts: Parts,
    pub(super) on_daemon: OnDaemon,
    pub(super) files: RunFiles,
    pub(super) libvirt_version: String,
}

impl Begun {
    /// Makes the broker and the keys, and deletes what dead runs have left on the daemon.
    pub(super) fn new(uri: &ConnectUri, run: &Run<'_>, plan: &Plan) -> Result<Self> {
        let work = run.dir.work();
        let parts = Parts::make(run, plan)?;
        let daemon = Daemon::open(uri)?;
        let libvirt_version = daemon.version()?;
        for collected in daemon.collect()? {
            if collected.is_done() {
                run.ui.note(&collected.to_string());
            } else {
                run.ui.line(&collected.to_string());
            }
        }
        let run_domain = RunDomain::new(daemon, Owner::of(&run.dir)?, plan.place.pool(), &run.ui);
        let mut files = RunFiles::of_run(&work, run.dir.path().join("console.log"))?;
        if let Some(nvram) = run_domain.nvram()? {
            files.nvram = nvram;
        }
        let tunnel = Tunnel::new(work.clone(), &plan.image.login_user, parts.broker.port())?;
        let keeps_internet = run.options.is_instance;
        let params = plan.domain(&files);
        let on_daemon = OnDaemon { run_domain, tunnel, params, work, keeps_internet, firmware: None };
        Ok(Self { parts, on_daemon, files, libvirt_version })
    }

    /// Makes the disks, defines the domain, and starts it. If the daemon's host cannot start it under KVM, changes the
    /// plan to emulation, unless the user has requested KVM by name.
    pub(super) fn start(
        mut self,
        run: &Run<'_>,
        plan: &mut Plan,
        image: &ReadyImage,
        subject: Delivered<'_>,
    ) -> Result<RunningVm> {
        let made = self.prepare(run, plan, image, subject);
        let (on_daemon, files) = (&mut self.on_daemon, &self.files);
        let started = made.and_then(|()| on_daemon.boot(files)).or_else(|error| {
            emulate_instead(run, plan, error)?;
            on_daemon.start_again(plan, files, image)
        });
        let uri = self.on_daemon.run_domain.daemon.uri().clone();
        let mut vm = self.with(plan, started)?;
        vm.record(EventKind::Boot, format!("the machine was switched on at {uri}"));
        Ok(vm)
    }

    /// Defines the domain, and makes its volumes.
    fn prepare(
        &mut self,
        run: &Run<'_>,
        plan: &Plan,
        image: &ReadyImage,
        subject: Delivered<'_>,
    ) -> Result<()> {
        let Self { parts, on_daemon, files, .. } = self;
        let [seed_file, payload_file] = [files.seed.clone(), files.payload.clone()];
        on_daemon.define(plan, files, on_daemon.is_restricted_at_first(plan), false)?;
        let sabotage = run.options.sabotage;
        let mac = on_daemon.params.daemon.as_ref().map_or(GUEST_MAC.to_owned(), |daemon| daemon.mac.clone());
        let seed = Seed { sabotage, payload: PayloadTime::AtFirstBoot, mac: &mac, ..neutral_seed(plan) };
        media::make_seed(&seed_file, &parts.keys.seed(run.dir.id(), &seed), &on_daemon.work, &run.ui)?;
        let (config, ca) = (parts.broker.agent_config(BROKER_IN_GUEST), parts.broker.ca());
        let apt_sources = apt_sources(plan, subject, &run.ui)?;
        let apt_sources = &apt_sources;
        let plant = run.plant(plan)?;
        let disk = media::PayloadDisk {
            subject,
            apt_sources,
            config: &config,
            ca,
            sabotage,
            plant: plant.as_ref(),
            registries: None,
            restored: None,
        };
        media::make_payload(&payload_file, run.workspace, &disk, &on_daemon.work, &run.ui)?;
        on_daemon.make_disks(Layers { image, snapshot: None }, [&seed_file, &payload_file], files)
    }

    /// Returns the running machine. If it did not start, removes its domain and its volumes: from the definition of the
    /// domain on, an error must not leave it.
    pub(super) fn with(mut self, plan: &Plan, started: Result<Machine>) -> Result<RunningVm> {
        let machine = match started {
            Ok(machine) => machine,
            Err(error) => return Err(self.given_up(error)),
        };
        let firmware = self.on_daemon.firmware.take();
        let target = Target::on_daemon(self.on_daemon, machine);
        let mut vm = self.parts.with(plan.clone(), self.files, target, self.libvirt_version);
        vm.firmware = firmware;
        Ok(vm)
    }

    /// Removes the domain and the volumes. Returns the error because of which the machine is given up.
    pub(super) fn given_up(self, error: anyhow::Error) -> anyhow::Error {
        removed(self.on_daemon.run_domain, error)
    }
}

/// Removes the domain and the volumes of a machine that did not start. Returns the error for which it did not.
fn removed(mut run_domain: RunDomain, error: anyhow::Error) -> anyhow::Error {
    let error = match run_domain.daemon.check("the machine to start") {
        Err(broken) => error.context(broken),
        Ok(()) if format!("{error:#}").contains("UNIX socket path") => error.context(Failure::host(
            "libvirt cannot make the sockets of the domain, because the home directory of this user has a long path",
            "use the system's libvirt: --connect qemu:///system",
        )),
        Ok(()) => error,
    };
    match run_domain.remove() {
        Ok(()) => error,
        Err(left) => {
            let uri = run_domain.daemon.uri();
            xtask_core::message!(
                "warning: the domain {} is left on {uri}: {left:#}; the next smoke there removes it",
                run_domain.owner().domain()
            );
            error
        }
    }
}

impl OnDaemon {
    /// Returns whether the first boot gives the guest no internet. If the image was not built from packages, the guest
    /// then installs packages.
    pub(super) fn is_restricted_at_first(&self, plan: &Plan) -> bool {
        plan.image.is_built() && !self.keeps_internet
    }

    /// Defines the domain, or replaces its definition.
    pub(super) fn define(
        &mut self,
        plan: &Plan,
        files: &RunFiles,
        is_restricted: bool,
        is_incoming: bool,
    ) -> Result<()> {
        let daemon = DaemonDomain { is_incoming, ..daemon_domain(&self.run_domain, plan, is_restricted) };
        self.params = DomainXmlParams { daemon: Some(daemon), ..plan.domain(files) };
        self.run_domain.define(&self.params)
    }

    /// Makes the volumes of the defined domain from these layers, the seed and the payload. Sets their paths in `files`.
    pub(super) fn make_disks(
        &mut self,
        layers: Layers<'_>,
        own: [&Path; 2],
        files: &mut RunFiles,
    ) -> Result<()> {
        let bytes = layers.image.virtual_bytes.max(SMALLEST_DISK);
        let volumes = self.run_domain.make_volumes(layers, bytes, own)?;
        [files.overlay, files.seed, files.payload] = volumes.paths;
        files.backing = volumes.backing;
        self.params.files = files.clone();
        if let Some(daemon) = &mut self.params.daemon {
            daemon.owner = self.run_domain.owner().clone();
        }
        Ok(())
    }

    /// Starts the domain paused, compares its machine with the expected one, and lets the guest run.
    pub(super) fn boot(&mut self, files: &RunFiles) -> Result<Machine> {
        self.write_xml()?;
        let machine = self.run_domain.start_paused(files)?;
        self.resume(machine)
    }

    /// Writes the definition of the domain into the run's working directory, where `vm start` also reads it.
    pub(super) fn write_xml(&self) -> Result<()> {
        write_private(&self.work.join(paused::XML), xml::domain_xml(&self.params))
    }

    /// Compares the machine of a stopped guest with the expected one, and lets the guest run.
    pub(super) fn resume(&mut self, machine: Machine) -> Result<Machine> {
        let firmware = self.run_domain.firmware()?;
        self.firmware = Some(FirmwareReport {
            code: firmware.code.clone(),
            vars_template: firmware.vars_template.clone(),
            code_sha256: None,
        });
        let mut expected = ExpectedMachine::of(&self.params)?;
        expected.flash = Some(ExpectedFlash::selected(
            self.params.spec.architecture,
            firmware.code,
            firmware.vars_template,
            firmware.nvram,
        ));
        write_private(&self.work.join(paused::EXPECTED), serde_json::to_string_pretty(&expected)?)?;
        paused::resume_verified(machine, &expected, &self.work)
    }

    pub(super) fn power_on(&mut self, files: &RunFiles) -> Result<Machine> {
        if let Some(daemon) = &mut self.params.daemon
            && !daemon.is_restricted
            && !self.keeps_internet
        {
            daemon.is_restricted = true;
            daemon.owner = self.run_domain.owner().clone();
            self.run_domain.define(&self.params)?;
        }
        self.boot(files)
    }

    /// Starts another machine with an unused disk, after the plan has changed.
    pub(super) fn start_again(
        &mut self,
        plan: &Plan,
        files: &RunFiles,
        image: &ReadyImage,
    ) -> Result<Machine> {
        let mut daemon = self.params.daemon.take();
        if let Some(daemon) = &mut daemon {
            daemon.owner = self.run_domain.owner().clone();
        }
        self.params = DomainXmlParams { daemon, ..plan.domain(files) };
        self.run_domain.define(&self.params)?;
        self.run_domain.renew_disk(image, image.virtual_bytes.max(SMALLEST_DISK))?;
        self.boot(files)
    }

    /// Returns whether the guest can reach no services of the daemon's host.
    pub(super) fn is_confined(&self) -> bool {
        let user = |network: &Network| *network == Network::User;
        self.params.daemon.as_ref().is_some_and(|daemon| daemon.is_restricted && user(&daemon.network))
    }

    pub(super) fn port_to(&self, guest_port: u16) -> Result<u16> {
        self.tunnel.port_to(guest_port)
    }

    pub(super) fn open_tunnel(&mut self, route: &Route) {
        self.tunnel.open(route);
    }

    pub(super) fn tunnel_failure(&self) -> Option<Failure> {
        self.tunnel.failure()
    }

    /// Returns the failure of the host if the connection has ended, or if the guest's network was stopped.
    pub(super) fn broken(&self, what: &str) -> Option<Failure> {
        if let Err(failure) = self.run_domain.check(what) {
            return Some(failure);
        }
        match self.params.daemon.as_ref().map(|daemon| &daemon.network) {
            Some(Network::Nat(name)) => self.run_domain.daemon.check_network(name, what).err(),
            _ => None,
        }
    }

    pub(super) fn close_tunnel(&mut self) {
        self.tunnel.close();
    }

    /// Leaves the guest running without the servers of the run.
    pub(super) fn leave(&mut self) {
        self.tunnel.close();
        self.run_domain.close_streams();
    }

    /// Returns the way to the guest's sshd, or `None` if the guest has no address yet.
    pub(super) fn route(&self, machine: &Machine) -> Result<Option<Route>> {
        let network = self.params.daemon.as_ref().map(|daemon| daemon.network.clone());
        self.run_domain.route(&network.unwrap_or_default(), machine)
    }

    /// Returns the remedy if QEMU cannot write the guest's disk.
    pub(super) fn full_pool(&self) -> String {
        let pool = self.params.daemon.as_ref().map_or("", |daemon| &daemon.pool);
        let list = self.run_domain.daemon.uri().virsh(&format!("pool-info {pool}"));
        format!("QEMU cannot write the guest's disk: check the free space of the storage pool ({list})")
    }
}

/// The wait for the address of a guest on a daemon. It begins with the guest's kernel, because a guest without an address
/// may wait for its network before it starts anything else.
#[derive(Default)]
pub(super) struct Leasing {
    begun: Option<Instant>,
    /// The time at which libvirt was last asked.
    asked: Option<Instant>,
    route: Option<Route>,
}

impl Leasing {
    /// Asks for the guest's address from time to time.
    ///
    /// # Errors
    /// Returns a failure of the host if the network gives the guest no address within the limit.
    pub(super) fn poll(&mut self, vm: &mut RunningVm) -> Result<()> {
        let is_on_daemon = vm.target.daemon().is_some();
        let is_early = self.asked.is_some_and(|asked| asked.elapsed() < limits::SSH_AGAIN);
        let is_ready = if vm.is_restored() { vm.has_keys()? } else { vm.shows_life() };
        if !is_on_daemon || self.route.is_some() || is_early || !is_ready {
            return Ok(());
        }
        let begun = *self.begun.get_or_insert_with(Instant::now);
        self.asked = Some(Instant::now());
        self.route = vm.target.ssh_route()?;
        let limit = vm.plan.limits.lease();
        if self.route.is_none() && begun.elapsed() > limit {
            let network = vm.plan.place.network();
            bail_host!(
                "the network {network} has leased no address to the guest within {} s", limit.as_secs();
                "check its DHCP server (virsh net-dumpxml, net-dhcp-leases) and the host's firewall; or use --network \
                 user"
            );
        }
        Ok(())
    }
}

impl RunningVm {
    /// Connects a guest on a daemon with the servers of the run, as soon as it has an address.
    ///
    /// # Errors
    /// Returns the errors of [`Leasing::poll`] at once.
    pub(super) fn connect_tunnel(&mut self, mut leasing: Leasing) -> Result<()> {
        if self.target.daemon().is_none() {
            return Ok(());
        }
        // A wait repeats what fails because of the host, and the address has a limit of its own.
        let route = self.wait("the guest's address", |vm| match leasing.poll(vm) {
            Ok(()) => Ok(leasing.route.take().map(Ok)),
            Err(error) => Ok(Some(Err(error))),
        })?;
        self.target.open_tunnel(&route?);
        Ok(())
    }
}
