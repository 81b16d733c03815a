//! Where a guest runs: libvirt's embedded driver on this host. What a phase does with a running machine goes through this
//! type, so that another place needs this file alone.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask_core::bail_guest;
use xtask_core::fs::write_private;
use xtask_core::machine::{RunFiles, SSH_PORT, xml};
use xtask_core::plan::Plan;
use xtask_core::processes::emulator;
use xtask_core::readback::ExpectedMachine;

use crate::libvirt::{Condition, Hypervisor, Machine, paused};

/// A domain as it was written, for each of its boots.
pub(super) struct Domain {
    pub(super) xml: String,
    expected: ExpectedMachine,
    work: PathBuf,
}

impl Domain {
    /// From the plan. The XML, and what QEMU must make of it, are in the run's working directory, for `vm start` too.
    pub(super) fn write(plan: &Plan, files: &RunFiles, work: &Path) -> Result<Self> {
        let params = plan.domain(files);
        let xml = xml::domain_xml(&params);
        write_private(&work.join(paused::XML), &xml)?;
        let expected = ExpectedMachine::of(&params)?;
        write_private(&work.join(paused::EXPECTED), serde_json::to_string_pretty(&expected)?)?;
        Ok(Self { xml, expected, work: work.to_owned() })
    }

    /// Starts it paused, reads back what QEMU made of it, and lets the guest run.
    pub(super) fn start(&self, hypervisor: &Hypervisor) -> Result<Machine> {
        self.resume(hypervisor.start_paused(&self.xml)?)
    }

    /// Reads back a machine that is stopped, and lets its guest run.
    pub(super) fn resume(&self, stopped: Machine) -> Result<Machine> {
        paused::resume_verified(stopped, &self.expected, &self.work)
    }
}

/// A machine on its target.
pub(super) struct Target {
    pub(super) hypervisor: Hypervisor,
    domain: Domain,
    machine: Machine,
}

impl Target {
    pub(super) fn new(hypervisor: Hypervisor, domain: Domain, machine: Machine) -> Self {
        Self { hypervisor, domain, machine }
    }

    /// Another domain and its machine take the place of those that ended.
    pub(super) fn replace(&mut self, domain: Domain, machine: Machine) {
        (self.domain, self.machine) = (domain, machine);
    }

    pub(super) fn condition(&self) -> Condition {
        self.machine.condition()
    }

    /// The port on 127.0.0.1 that leads to a port of the guest.
    pub(super) fn port_to(&self, guest_port: u16) -> Result<u16> {
        self.machine.port_to(guest_port)
    }

    pub(super) fn ssh_port(&self) -> Result<u16> {
        self.machine.port_to(SSH_PORT)
    }

    /// Writes the machine's memory and ends it.
    pub(super) fn save(&mut self, memory: &Path) -> Result<()> {
        self.machine.save(memory)
    }

    /// Cuts the power of a guest that runs: SIGKILL to its QEMU, then libvirt's destroy. virDomainDestroy alone sends SIGTERM
    /// first, on which QEMU flushes its disks, so that nothing that the guest has written would be lost.
    ///
    /// # Errors
    /// A failure of the guest if it does not run: a guest that was off already loses nothing.
    pub(super) fn cut_power(&mut self) -> Result<()> {
        let condition = self.machine.condition();
        if condition != Condition::Running {
            bail_guest!(
                "the guest was not running when its power was to be cut: its machine is {condition:?}";
                "read console.log for why it stopped"
            );
        }
        let qemu = emulator(&self.domain.work).context("find the run's QEMU to cut its power")?;
        qemu.kill().context("cut the power")?;
        self.power_off()
    }

    /// Ends it: no shutdown of the guest.
    pub(super) fn power_off(&mut self) -> Result<()> {
        self.machine.destroy()
    }

    /// Starts the same domain again; it is read back before it runs.
    pub(super) fn power_on(&mut self) -> Result<()> {
        self.machine = self.domain.start(&self.hypervisor)?;
        Ok(())
    }

    /// Leaves the machine running when this value goes.
    pub(super) fn leave(&mut self) {
        self.machine.let_go();
    }
}
