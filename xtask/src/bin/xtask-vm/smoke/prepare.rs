//! The parts of a machine for a cold run or a warm run (broker, keys, disks), and the decision which runs may be warm.

use std::net::TcpListener;

use anyhow::{Context, Result};
use xtask_core::arch::Accelerator;
use xtask_core::cli::{Network, Sabotage};
use xtask_core::error::{self, Failure};
use xtask_core::format::name_of;
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::image::Image;
use xtask_core::limits;
use xtask_core::machine::{HOST_FROM_GUEST, RunFiles};
use xtask_core::plan::Plan;
use xtask_fleet::{Broker, Registry};
use xtask_images::Base;
use xtask_jobs::mirror::guest_sources;
use xtask_jobs::{Ui, child};

use super::options::RunOptions;
use super::run::Run;
use super::running::RunningVm;
use super::target::{Domain, Target};
use crate::guest::console::Console;
use crate::guest::media::Delivered;
use crate::guest::root_port::RootPort;
use crate::guest::ssh::Keys;
use crate::guest::watch::Deadline;
use crate::libvirt::{Hypervisor, Machine, Reach, isolation};

/// The parts of a machine that do not depend on the libvirt that runs it.
pub(super) struct Parts {
    ui: Ui,
    deadline: Deadline,
    pub(super) broker: Broker,
    /// The registry of a run that records the writes; `None` in other runs.
    registry: Option<Registry>,
    pub(super) keys: Keys,
    /// See [`RunningVm::canary`].
    canary: Option<TcpListener>,
}

impl Parts {
    pub(super) fn make(run: &Run<'_>, plan: &Plan) -> Result<Self> {
        let work = run.dir.work();
        let mut broker = Broker::start(&work, &run.device_id(), run.options.sabotage, &run.ui)?;
        if run.options.has_line {
            broker.open_line()?;
        }
        let has_registry = run.options.records || run.options.has_line;
        let registry = has_registry.then(|| Registry::start(&work, None, &run.ui)).transpose()?;
        Self::with_servers(run, plan, broker, registry)
    }

    pub(super) fn with_servers(
        run: &Run<'_>,
        plan: &Plan,
        broker: Broker,
        registry: Option<Registry>,
    ) -> Result<Self> {
        let work = run.dir.work();
        run.hide(broker.secrets());
        run.hide(plan.proxies.secrets());
        let keys = Keys::make(&work, &plan.image.login_user, &run.ui)?;
        run.hide(keys.secrets()?.iter().map(String::as_str));
        Ok(Self { ui: run.ui.clone(), deadline: run.times.deadline(), broker, registry, keys, canary: None })
    }

    /// Returns the values with which a guest reaches the servers of the run, and is reached.
    pub(super) fn access(&self) -> Access<'_> {
        Access { keys: &self.keys, broker: &self.broker, registry: self.registry.as_ref() }
    }

    /// Returns the machine that `target` runs.
    pub(super) fn with(
        self,
        plan: Plan,
        files: RunFiles,
        target: Target,
        libvirt_version: String,
    ) -> RunningVm {
        let Self { ui, deadline, broker, registry, keys, canary } = self;
        let console = Console::new(&files.console_log).with_markers(&files.markers_log);
        let mut root = RootPort::new(&files.root_socket);
        root.connect();
        RunningVm {
            ui,
            plan,
            files,
            target,
            snapshot: None,
            libvirt_version,
            firmware: None,
            keys,
            console,
            root,
            broker,
            registry,
            canary,
            deadline,
            expected_boots: None,
            fault: None,
            disturbance: None,
            disk_limits: (0, 0),
            emptied: None,
            events: Vec::new(),
        }
    }
}

/// The keys of a guest, and the servers of the run.
#[derive(Clone, Copy)]
pub(super) struct Access<'a> {
    pub(super) keys: &'a Keys,
    pub(super) broker: &'a Broker,
    pub(super) registry: Option<&'a Registry>,
}

impl Access<'_> {
    /// Returns podman's configuration for the registry of the run, if it has one. Only a guest of the embedded driver
    /// reaches the registry.
    pub(super) fn registries(self) -> Option<String> {
        self.registry.map(|registry| registry.podman_configuration(HOST_FROM_GUEST))
    }
}

/// The parts of a machine of the embedded driver that exist before its domain starts.
pub(super) struct Prepared {
    pub(super) parts: Parts,
    pub(super) hypervisor: Hypervisor,
    pub(super) libvirt_version: String,
}

impl Prepared {
    pub(super) fn make(run: &Run<'_>, plan: &Plan) -> Result<Self> {
        Self::of(run, Parts::make(run, plan)?)
    }

    pub(super) fn of(run: &Run<'_>, mut parts: Parts) -> Result<Self> {
        let hypervisor = Hypervisor::open(&run.dir.libvirt_root(), &run.cache)?;
        let libvirt_version = hypervisor.version()?;
        if !isolation::is_possible() {
            run.ui.note(
                "the guest can connect to every TCP port of this host, because this host cannot confine QEMU",
            );
        } else if run.options.is_instance {
            run.note_services();
        }
        let canary = isolation::is_possible().then(|| TcpListener::bind(("127.0.0.1", 0))).transpose();
        parts.canary = canary.context("listen on a port of this host's loopback")?;
        Ok(Self { parts, hypervisor, libvirt_version })
    }

    /// Returns the network services that the guest reaches in the first boot of an image. If the image was not built
    /// from packages, the guest installs the packages that the agent needs from the internet.
    pub(super) fn reach_of_first_boot(&self, run: &Run<'_>, plan: &Plan) -> Reach {
        match reach(run, plan, self.parts.access()) {
            Reach::Servers(servers) if !plan.image.is_built() => {
                run.note_services();
                let (own, proxies) = plan.proxies.ports();
                Reach::Internet { own: [servers, own].concat(), proxies }
            }
            reach => reach,
        }
    }

    pub(super) fn with(self, plan: Plan, files: RunFiles, domain: Domain, machine: Machine) -> RunningVm {
        let target = Target::embedded(self.hypervisor, domain, machine);
        self.parts.with(plan, files, target, self.libvirt_version)
    }
}

/// Returns the network services that the guest of a run reaches. A machine of `vm up` reaches the internet. It does not
/// reach the broker, because another program may get the broker's port when the broker has ended.
pub(super) fn reach(run: &Run<'_>, plan: &Plan, access: Access<'_>) -> Reach {
    match run.options.sabotage {
        Some(Sabotage::OpenNetwork) => Reach::Everything,
        _ if run.options.is_instance => {
            let (own, proxies) = plan.proxies.ports();
            Reach::Internet { own, proxies }
        }
        _ => {
            let registry = access.registry.map(Registry::port);
            Reach::Servers([access.broker.port()].into_iter().chain(registry).collect())
        }
    }
}

/// Attributes a failed start of a machine to the host, unless the error says otherwise. No code of the guest has run
/// yet.
pub(super) fn not_started(error: anyhow::Error) -> anyhow::Error {
    let hint =
        "see the causes; nothing is known about the agent yet. Check this host with cargo xtask preflight";
    error::host_fault(error, "start the machine", hint)
}

/// Returns whether this run may use a snapshot. A boot under KVM takes only seconds, so it needs no snapshot. Two
/// faults are planted in the first boot, which a restored machine skips.
pub(super) fn may_be_warm(options: &RunOptions<'_>, plan: &Plan) -> bool {
    is_warm_kind(options, plan) && against_warm(plan.is_here(), &plan.place.network()).is_none()
}

fn is_warm_kind(options: &RunOptions<'_>, plan: &Plan) -> bool {
    let of_first_boot = matches!(options.sabotage, Some(Sabotage::KernelPanic | Sabotage::KillQemu));
    !options.cold && !of_first_boot && plan.accelerator() == Accelerator::Tcg
}

/// Returns the reason why a guest in this place cannot be restored from a snapshot, or `None` if it may be possible.
fn against_warm(is_here: bool, network: &Network) -> Option<&'static str> {
    match (is_here, network) {
        (false, _) => Some("this host cannot read the QEMU and the firmware of another host"),
        (true, Network::Nat(_)) => {
            Some("restored guests have one MAC address, which a network of libvirt does not allow")
        }
        (true, Network::User) => None,
    }
}

/// Returns the reason why an emulated run on a daemon cannot be warm, if the user did not request a cold run.
pub(super) fn why_cold(options: &RunOptions<'_>, plan: &Plan) -> Option<String> {
    let why = against_warm(plan.is_here(), &plan.place.network()).filter(|_| is_warm_kind(options, plan));
    why.map(str::to_owned)
}

/// Returns a usage error if the run is cold and a flag needs a warm run. Also returns one for `cold-panics` without
/// `--verify-cold`, and for `small-pages` on a kernel with pages of 4 KiB.
pub(super) fn check_flags(options: &RunOptions<'_>, plan: &Plan) -> Result<(), Failure> {
    let warm = may_be_warm(options, plan);
    let cannot = match options.sabotage {
        Some(Sabotage::StaleChain) if !warm => {
            "--sabotage stale-chain: needs a warm run, under emulation and without --cold"
        }
        Some(Sabotage::SmallPages) if !has_large_pages(&plan.image) => {
            "--sabotage small-pages: needs an image whose kernel has pages of more than 4 KiB: --image debian-13-16k"
        }
        Some(Sabotage::ColdPanics) => {
            "--sabotage cold-panics: needs --verify-cold, for it is planted in the cold one of the two runs"
        }
        _ if options.warm && !warm => {
            "--warm: not possible under KVM or with a fault of the first boot, where every run is cold"
        }
        _ => return Ok(()),
    };
    Err(Failure::usage(cannot))
}

/// Returns whether the catalogue states that the kernel of an image has pages of more than 4 KiB.
fn has_large_pages(image: &Image) -> bool {
    image.expected.as_ref().is_some_and(|expected| expected.page_size > 4096)
}

/// Returns the lines for apt's sources in a machine of `vm up`. Returns none in a smoke, which tests the agent on the
/// image as it is.
pub(super) fn apt_sources(plan: &Plan, subject: Delivered<'_>, ui: &Ui) -> Result<Vec<String>> {
    if subject.is_some() { Ok(Vec::new()) } else { guest_sources(&plan.image, ui) }
}

/// The minimum size of a guest's disk in bytes: room for a cloud image and a few workloads.
pub(super) const SMALLEST_DISK: u64 = 6 << 30;

/// Makes the files to which the guest writes: an empty overlay over the image, and the NVRAM as a copy of the
/// firmware's template.
pub(crate) fn make_writable_files(plan: &Plan, files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    make_overlay(files, base, ui)?;
    write_private(&files.nvram, fs_err::read(&plan.own_firmware()?.vars_template)?)
}

/// Makes the overlay over an image or over the disk of a snapshot.
pub(super) fn make_overlay(files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    let qemu_img = tools::require("qemu-img")?;
    let format = name_of(&base.format);
    let mut arguments = ["create", "-q", "-f", "qcow2", "-F", &format, "-b"].map(Into::into).to_vec();
    arguments.extend([base.disk.clone().into_os_string(), files.overlay.clone().into_os_string()]);
    // A cloud image extends its root file system to the size of the disk at the first boot.
    arguments.push(base.virtual_bytes.max(SMALLEST_DISK).to_string().into());
    child::read(&qemu_img, &arguments, limits::SERVER_START, ui).context("make the disk's overlay")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_be_restored_only_on_this_host_and_without_a_network_of_libvirt() {
        let nat = Network::Nat("default".to_owned());
        assert_eq!(against_warm(true, &Network::User), None);
        assert!(against_warm(true, &nat).unwrap().contains("one MAC address"));
        assert!(against_warm(false, &Network::User).unwrap().contains("another host"));
        assert!(against_warm(false, &nat).unwrap().contains("another host"));
    }
}
