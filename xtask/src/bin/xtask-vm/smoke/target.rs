//! The place where a guest runs: libvirt's embedded driver on this host. The phases use a running machine only through
//! this type, so another place would change only this file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use xtask_core::bail_guest;
use xtask_core::error::Failure;
use xtask_core::fs::write_private;
use xtask_core::machine::{RunFiles, SSH_PORT, xml};
use xtask_core::plan::Plan;
use xtask_core::processes::emulator;
use xtask_core::readback::ExpectedMachine;

use crate::libvirt::{Condition, Hypervisor, Machine, Reach, paused};

/// The definition of a domain, which is used for each of its boots.
pub(super) struct Domain {
    pub(super) xml: String,
    expected: ExpectedMachine,
    work: PathBuf,
    /// The network services that the guest can reach from its next boot on.
    pub(super) reach: Reach,
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
        Ok(Self { xml, expected, work: work.to_owned(), reach })
    }

    /// Starts the domain paused, compares QEMU's machine with the expected one, and lets the guest run.
    pub(super) fn start(&self, hypervisor: &Hypervisor) -> Result<Machine> {
        self.resume(hypervisor.start_paused(&self.xml, &self.reach)?)
    }

    /// Compares the machine of a stopped guest with the expected one, and lets the guest run.
    pub(super) fn resume(&self, stopped: Machine) -> Result<Machine> {
        paused::resume_verified(stopped, &self.expected, &self.work)
    }
}

/// A machine, with the libvirt that runs it and the definition of its domain.
pub(super) struct Target {
    pub(super) hypervisor: Hypervisor,
    domain: Domain,
    machine: Machine,
}

impl Target {
    pub(super) fn new(hypervisor: Hypervisor, domain: Domain, machine: Machine) -> Self {
        Self { hypervisor, domain, machine }
    }

    /// Replaces a domain and its machine, which have ended, by new ones.
    pub(super) fn replace(&mut self, domain: Domain, machine: Machine) {
        (self.domain, self.machine) = (domain, machine);
    }

    pub(super) fn reach(&self) -> &Reach {
        &self.domain.reach
    }

    pub(super) fn condition(&self) -> Condition {
        self.machine.condition()
    }

    /// Returns the port on 127.0.0.1 that is forwarded to a port of the guest.
    pub(super) fn port_to(&self, guest_port: u16) -> Result<u16> {
        self.machine.port_to(guest_port)
    }

    /// Returns the run's working directory.
    pub(super) fn work(&self) -> &Path {
        &self.domain.work
    }

    pub(super) fn ssh_port(&self) -> Result<u16> {
        self.machine.port_to(SSH_PORT)
    }

    /// Writes the machine's memory to a file, and ends the machine.
    pub(super) fn save(&mut self, memory: &Path) -> Result<()> {
        self.machine.save(memory)
    }

    /// Cuts the power of a running guest: sends SIGKILL to its QEMU, then calls libvirt's destroy. virDomainDestroy
    /// alone first sends SIGTERM, on which QEMU flushes its disks. The guest would then lose none of its writes.
    ///
    /// # Errors
    /// Returns a failure of the guest if the guest does not run, because a guest that is already off loses nothing.
    pub(super) fn cut_power(&mut self) -> Result<()> {
        match self.machine.condition() {
            Condition::Running => {}
            Condition::Paused => return Err(self.stopped("before the power cut")?.into()),
            Condition::Off | Condition::Gone => {
                self.hypervisor.check_signal("the power cut")?;
                bail_guest!(
                    "the guest was not running when its power was to be cut: it was already off";
                    "read console.log for why it stopped"
                )
            }
        }
        let qemu = emulator(&self.domain.work).context("find the run's QEMU to cut its power")?;
        qemu.kill().context("cut the power")?;
        self.power_off()
    }

    /// Returns QEMU's own name of its state (QEMU, RunState): `io-error` if QEMU stopped the guest because it cannot
    /// write the guest's disk, and `internal-error` if KVM could not run the guest.
    pub(super) fn run_state(&self) -> Result<String> {
        let status = self.machine.qmp("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Returns the failure of the host because of which QEMU has stopped the guest.
    pub(super) fn stopped(&self, when: &str) -> Result<Failure> {
        let state = self.run_state()?;
        let hint = match state.as_str() {
            "io-error" => format!(
                "QEMU cannot write the guest's disk: check the free space of the file system with {}",
                self.work().display()
            ),
            _ => "read qemu.log in the report's directory; if KVM failed, use --accel tcg".to_owned(),
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
        let limits = json!({
            "id": "/machine/peripheral/virtio-disk0/virtio-backend",
            "bps": 0, "bps_rd": 0, "bps_wr": bytes, "iops": 0, "iops_rd": 0, "iops_wr": requests,
        });
        self.machine
            .qmp("block_set_io_throttle", &limits)
            .map(drop)
            .context("limit the writes to the guest's disk")
    }

    /// Ends the machine without a shutdown of the guest.
    pub(super) fn power_off(&mut self) -> Result<()> {
        self.machine.destroy()
    }

    /// Starts the same domain again. QEMU's machine is compared with the expected one before the guest runs. All
    /// packages are installed now, so the guest no longer reaches the internet.
    pub(super) fn power_on(&mut self) -> Result<()> {
        self.domain.reach = self.domain.reach.without_internet();
        self.machine = self.domain.start(&self.hypervisor)?;
        Ok(())
    }

    /// Lets the machine run on after this value is dropped.
    pub(super) fn leave(&mut self) {
        self.machine.let_go();
    }
}
