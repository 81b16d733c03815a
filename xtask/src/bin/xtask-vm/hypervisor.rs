//! libvirt, and with `remote.rs` the only file that names `virt::`: an embedded QEMU driver with a root per run, so that
//! there is no daemon, no group and no network to set up, and two runs cannot collide.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, bail};
use virt::connect::Connect;
use virt::domain::{Domain, DomainState, DomainStateEnum};
use xtask::limits;
use xtask::paths::{make_private_dir, write_private};

/// What a domain is for libvirt while it lives: transient, so that the end of the domain is the end of its definition.
const TRANSIENT: virt::sys::virDomainCreateFlags = 0;

/// An open connection to the embedded driver.
pub(crate) struct Hypervisor {
    connect: Connect,
}

/// A domain that was started. Dropped, it is destroyed: whatever ends a run early leaves no QEMU.
pub(crate) struct Machine {
    domain: Domain,
    /// Destroyed already, or left to a person.
    let_go: bool,
}

/// How a domain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// QEMU is there and the guest's processors run.
    Running,
    /// QEMU is there and has stopped the guest: its disk's file system is full, or KVM gave up.
    Paused,
    /// QEMU has ended.
    Gone,
}

impl Hypervisor {
    /// Opens the embedded driver below `root`. One root per process: a libvirt that has one refuses another.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        // Its errors come back as values; by default libvirt prints them as well.
        virt::error::clear_error_callback();
        start_event_loop()?;
        make_private_dir(&root.join("etc"))?;
        write_private(&root.join("etc/qemu.conf"), qemu_conf())?;
        let uri = format!("qemu:///embed?root={}", root.display());
        let connect =
            Connect::open(Some(&uri)).with_context(|| format!("open libvirt's embedded driver {uri}"))?;
        Ok(Self { connect })
    }

    /// libvirt's version.
    pub(crate) fn version(&self) -> Result<String> {
        let number = self.connect.lib_version().context("ask libvirt for its version")?;
        Ok(format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000))
    }

    /// Starts a transient domain.
    pub(crate) fn start(&self, xml: &str) -> Result<Machine> {
        let domain = self.connect.create_domain_xml(xml, TRANSIENT).context("start the domain")?;
        Ok(Machine { domain, let_go: false })
    }
}

impl Machine {
    /// How it is now.
    pub(crate) fn condition(&self) -> Condition {
        // A transient domain whose QEMU has ended is unknown to libvirt, which is an error and the answer. Asked first,
        // since `state` of the crate virt 0.5.0 is no error then.
        if !self.domain.is_active().unwrap_or(false) {
            return Condition::Gone;
        }
        match self.domain.state() {
            Ok((DomainStateEnum::Known(DomainState::Paused | DomainState::Crashed), _)) => Condition::Paused,
            _ => Condition::Running,
        }
    }

    /// Leaves it running when this value goes.
    pub(crate) fn let_go(&mut self) {
        self.let_go = true;
    }

    /// virDomainDestroy: QEMU gets SIGTERM, then SIGKILL, and the guest nothing.
    pub(crate) fn destroy(&mut self) -> Result<()> {
        // Whatever comes of it: the next machine of the run has the same name and identity.
        self.let_go = true;
        match self.domain.destroy() {
            Ok(()) => Ok(()),
            Err(_) if self.condition() == Condition::Gone => Ok(()),
            Err(error) => Err(error).context("destroy the domain"),
        }
    }

    /// The port on 127.0.0.1 that leads to the guest's ssh, as QEMU chose it.
    pub(crate) fn ssh_port(&self) -> Result<u16> {
        let table = self
            .domain
            .qemu_monitor_command("info usernet", virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
            .context("ask QEMU for its forwarded ports")?;
        forwarded_port(&table)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.let_go {
            // The run's directory is cleaned in any case, by the processes that name it.
            drop(self.destroy());
        }
    }
}

/// The row `TCP[HOST_FORWARD]  14  127.0.0.1 37787  10.0.2.15  22 …` of `info usernet`.
fn forwarded_port(table: &str) -> Result<u16> {
    for line in table.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["TCP[HOST_FORWARD]", _, "127.0.0.1", port, _, "22", ..] = words.as_slice() {
            return port.parse().with_context(|| format!("read the port in {line:?}"));
        }
    }
    bail!("QEMU forwards no port to the guest's ssh: {table:?}")
}

/// No virtlogd for the console's file; QEMU as this user, who owns the files; and nothing that a container lacks (mount
/// namespaces, cgroups, extended attributes, a security driver's helpers), since the run's directory is private.
fn qemu_conf() -> String {
    let mut conf = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\n\
                    cgroup_controllers = []\nremember_owner = 0\ndynamic_ownership = 0\n"
        .to_owned();
    if rustix::process::geteuid().is_root() {
        conf.push_str("user = \"+0\"\ngroup = \"+0\"\n");
    }
    conf
}

/// libvirt's driver needs a loop for QEMU's monitor and its own timers; without it a start hangs.
fn start_event_loop() -> Result<()> {
    static STARTED: Once = Once::new();
    let mut result = Ok(());
    STARTED.call_once(|| {
        result = virt::event::event_register_default_impl().context("register libvirt's event loop");
        std::thread::spawn(|| {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    eprintln!("warning: libvirt's event loop: {error}");
                    std::thread::sleep(limits::POLL);
                }
            }
        });
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forwarded_port_is_read_from_qemus_table() {
        let table = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n\
                     \x20 TCP[ESTABLISHED]   15  10.0.2.15 40000  127.0.0.1 4222 0 0\r\n\
                     \x20 TCP[HOST_FORWARD]  14       127.0.0.1 37787       10.0.2.15    22     0     0\r\n";
        assert_eq!(forwarded_port(table).unwrap(), 37787);
        assert!(forwarded_port("Hub -1 (net0):").unwrap_err().to_string().contains("no port"));
    }

    /// libvirt's own mock driver: the connection's side of this file, on any host.
    #[test]
    fn a_domain_of_libvirts_test_driver_lives_and_is_destroyed() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let hypervisor = Hypervisor { connect };
        assert!(hypervisor.version().unwrap().split('.').count() == 3);
        let xml = "<domain type='test'><name>x</name><memory>8192</memory><os><type>hvm</type></os></domain>";
        let mut machine = hypervisor.start(xml).unwrap();
        assert_eq!(machine.condition(), Condition::Running);
        machine.destroy().unwrap();
        assert_eq!(machine.condition(), Condition::Gone);
        machine.destroy().unwrap();
        drop(hypervisor.start(xml).unwrap());
        assert!(hypervisor.connect.lookup_domain_by_name("x").is_err(), "dropped is destroyed");
        assert!(hypervisor.start("<domain/>").is_err());
    }
}
