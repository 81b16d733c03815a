//! libvirt, and with `remote.rs` the only file that names `virt::`: an embedded QEMU driver with a root per run, so that
//! there is no daemon, no group and no network to set up, and two runs cannot collide.

pub(crate) mod paused;
mod reaper;
pub(crate) mod remote;

pub(crate) use reaper::children;

use std::ffi::CString;
use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};
use virt::connect::Connect;
use virt::domain::{Domain, DomainState, DomainStateEnum};
use xtask_core::cache::Cache;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::limits;
use xtask_core::machine::DOMAIN_NAME;

/// A domain is transient for libvirt, so that its end is the end of its definition; and it starts with its processors
/// stopped, so that what QEMU made of it can be read before any of the guest's code runs.
const PAUSED: virt::sys::virDomainCreateFlags = virt::sys::VIR_DOMAIN_START_PAUSED;

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
    /// The guest has shut itself down, and its QEMU waits for libvirt to end it.
    Off,
    /// QEMU has ended.
    Gone,
}

impl Hypervisor {
    /// Opens the embedded driver below `root`. One root per process: a libvirt that has one refuses another. What libvirt
    /// learns of QEMU is kept in `cache` for the next root.
    pub(crate) fn open(root: &Path, cache: &Cache) -> Result<Self> {
        // Its errors come back as values; by default libvirt prints them as well.
        virt::error::clear_error_callback();
        start_event_loop()?;
        make_private_dir(&root.join("etc"))?;
        write_private(&root.join("etc/qemu.conf"), qemu_conf())?;
        keep_capabilities(root, &cache.libvirt())?;
        let uri = format!("qemu:///embed?root={}", root.display());
        reaper::adopt_daemons()?;
        let connect = on_one_processor(|| Connect::open(Some(&uri)))
            .with_context(|| format!("open libvirt's embedded driver {uri}"))?;
        Ok(Self { connect })
    }

    /// libvirt's version.
    pub(crate) fn version(&self) -> Result<String> {
        self.connect.lib_version().map(remote::version).context("ask libvirt for its version")
    }

    /// Starts a transient domain whose guest does not run yet.
    pub(crate) fn start_paused(&self, xml: &str) -> Result<Machine> {
        self.start(xml, PAUSED)
    }

    /// The machine of this root that another process started and let go; `None` where there is none any more.
    pub(crate) fn running(&self) -> Option<Machine> {
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).ok()?;
        Some(Machine { domain, let_go: true })
    }

    /// The machine whose memory was saved to `memory`, with this domain's files in the place of its own, its processors stopped.
    pub(crate) fn restore_paused(&self, memory: &Path, xml: &str) -> Result<Machine> {
        let path = memory.to_str().context("encode a path of the cache")?;
        let flags = virt::sys::VIR_DOMAIN_SAVE_PAUSED;
        reaper::reaping(|| self.connect.restore_domain_flags(path, Some(xml), flags))
            .with_context(|| format!("restore the machine whose memory is in {path}"))?;
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).context("find the restored domain")?;
        Ok(Machine { domain, let_go: false })
    }

    fn start(&self, xml: &str, flags: virt::sys::virDomainCreateFlags) -> Result<Machine> {
        let started = reaper::reaping(|| self.connect.create_domain_xml(xml, flags));
        let domain = started.context("start the domain")?;
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
            Ok((DomainStateEnum::Known(DomainState::Shutdown | DomainState::Shutoff), _)) => Condition::Off,
            _ => Condition::Running,
        }
    }

    /// The guest's processors run from now on.
    pub(crate) fn resume(&self) -> Result<()> {
        self.domain.resume().context("let the guest's processors run")
    }

    /// What QEMU answers to a command of its machine protocol (QEMU, qemu-qmp-ref).
    pub(crate) fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let question = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = self.monitor(&question, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)?;
        returned(&answer).with_context(|| format!("ask QEMU: {question}"))
    }

    /// What QEMU prints at a command of its human monitor, for what its machine protocol does not have.
    pub(crate) fn hmp(&self, command: &str) -> Result<String> {
        self.monitor(command, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
    }

    fn monitor(&self, command: &str, protocol: u32) -> Result<String> {
        let answer = self.domain.qemu_monitor_command(command, protocol);
        answer.with_context(|| format!("ask QEMU: {command}"))
    }

    /// Leaves it running when this value goes.
    pub(crate) fn let_go(&mut self) {
        self.let_go = true;
    }

    /// Stops it, writes its memory and its devices to `memory`, and ends it (virDomainSave).
    pub(crate) fn save(&mut self, memory: &Path) -> Result<()> {
        let path = CString::new(memory.as_os_str().as_encoded_bytes()).context("encode the path")?;
        // SAFETY: the domain lives as long as `self`, and libvirt copies the path; the crate virt 0.5 has no call of its own for it.
        let saved =
            reaper::reaping(|| unsafe { virt::sys::virDomainSave(self.domain.as_ptr(), path.as_ptr()) });
        if saved < 0 {
            return Err(virt::error::Error::last_error())
                .with_context(|| format!("save the machine's memory to {}", memory.display()));
        }
        self.let_go = true;
        Ok(())
    }

    /// virDomainDestroy: QEMU gets SIGTERM, then SIGKILL, and the guest nothing.
    pub(crate) fn destroy(&mut self) -> Result<()> {
        // Whatever comes of it: the next machine of the run has the same name and identity.
        self.let_go = true;
        let destroyed = reaper::reaping(|| self.domain.destroy()).context("destroy the domain");
        if self.condition() == Condition::Gone { Ok(()) } else { destroyed }
    }

    /// The port on 127.0.0.1 that leads to one of the guest's ports that are forwarded, as the kernel chose it.
    pub(crate) fn port_to(&self, guest_port: u16) -> Result<u16> {
        forwarded_port(&self.hmp("info usernet")?, guest_port)
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

/// The value in QEMU's reply, or its error.
pub(crate) fn returned(answer: &str) -> Result<Value> {
    let mut answer: Value = serde_json::from_str(answer).context("parse QEMU's answer")?;
    if let Some(value) = answer.get_mut("return") {
        return Ok(value.take());
    }
    let described = answer["error"]["desc"].as_str();
    bail!("{}", described.unwrap_or("QEMU's answer has neither a value nor an error"))
}

/// A root's `cache` leads to one directory for all of them. Probing QEMU takes 1 to 2 s, and what comes of it is valid as
/// long as QEMU, libvirt's modules and the host are the same, which libvirt compares itself. It does not write atomically; a
/// file that another run has not finished does not parse, and is then probed and written again.
fn keep_capabilities(root: &Path, kept: &Path) -> Result<()> {
    make_private_dir(kept)?;
    let link = root.join("cache");
    if link.is_symlink() { Ok(()) } else { Ok(fs_err::os::unix::fs::symlink(kept, &link)?) }
}

/// Opening, libvirt asks the processor for its CPUID, and what it knows of an emulator with KVM is valid as long as that is
/// the same. Parts of it (the APIC's id) are each processor's own, so that what is asked must be always the same one.
fn on_one_processor<T>(call: impl FnOnce() -> T) -> T {
    let allowed = sched_getaffinity(None).ok();
    let first = allowed.and_then(|set| (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu)));
    if let Some(first) = first {
        let mut one = CpuSet::new();
        one.set(first);
        // Where it is refused, libvirt probes once more than it had to.
        let _ = sched_setaffinity(None, &one);
    }
    let result = call();
    if let Some(allowed) = allowed {
        let _ = sched_setaffinity(None, &allowed);
    }
    result
}

/// The row `TCP[HOST_FORWARD]  14  127.0.0.1 37787  10.0.2.15  22 …` of `info usernet`.
pub(crate) fn forwarded_port(table: &str, guest_port: u16) -> Result<u16> {
    let wanted = guest_port.to_string();
    let port = table.lines().find_map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
        ["TCP[HOST_FORWARD]", _, "127.0.0.1", port, _, to, ..] if to == wanted => Some(port),
        _ => None,
    });
    let port =
        port.with_context(|| format!("QEMU forwards no port to the guest's port {guest_port}: {table:?}"));
    port?.parse().with_context(|| format!("read the port in {table:?}"))
}

/// No virtlogd for the console's file; QEMU as this user, who owns the files; and nothing that a container lacks (mount
/// namespaces, cgroups, extended attributes, a security driver's helpers), since the run's directory is private.
fn qemu_conf() -> String {
    let conf = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\n\
                    cgroup_controllers = []\nremember_owner = 0\ndynamic_ownership = 0\n";
    let of_root = "user = \"+0\"\ngroup = \"+0\"\n";
    format!("{conf}{}", if rustix::process::geteuid().is_root() { of_root } else { "" })
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
                     \x20 TCP[HOST_FORWARD]  14       127.0.0.1 37787       10.0.2.15    22     0     0\r\n\
                     \x20 TCP[HOST_FORWARD]  15       127.0.0.1 41002       10.0.2.15  8080     0     0\r\n";
        assert_eq!(forwarded_port(table, 22).unwrap(), 37787);
        assert_eq!(forwarded_port(table, 8080).unwrap(), 41002);
        assert!(forwarded_port(table, 8081).unwrap_err().to_string().contains("no port"));
    }

    #[test]
    fn an_answer_of_qemus_is_its_value_or_its_error() {
        assert_eq!(returned(r#"{"return":{"running":false},"id":"libvirt-9"}"#).unwrap()["running"], false);
        let refused = r#"{"id":"libvirt-9","error":{"class":"GenericError","desc":"no such property"}}"#;
        assert_eq!(returned(refused).unwrap_err().to_string(), "no such property");
        assert!(returned("{}").is_err());
    }

    #[test]
    fn what_is_learned_of_qemu_outlives_a_root() {
        let directory = tempfile::tempdir().unwrap();
        let kept = directory.path().join("libvirt");
        for root in ["first", "second", "second"].map(|name| directory.path().join(name)) {
            make_private_dir(&root).unwrap();
            keep_capabilities(&root, &kept).unwrap();
            std::fs::write(root.join("cache/known"), "x").unwrap();
        }
        std::fs::remove_dir_all(directory.path().join("first")).unwrap();
        assert!(kept.join("known").exists(), "the link is deleted, and not what it leads to");
    }

    /// libvirt's own mock driver: the connection's side of this file, on any host. It knows no start that is paused.
    #[test]
    fn a_domain_of_libvirts_test_driver_lives_and_is_destroyed() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let hypervisor = Hypervisor { connect };
        assert!(hypervisor.version().unwrap().split('.').count() == 3);
        let xml = "<domain type='test'><name>x</name><memory>8192</memory><os><type>hvm</type></os></domain>";
        let mut machine = hypervisor.start(xml, 0).unwrap();
        machine.domain.suspend().unwrap();
        assert_eq!(machine.condition(), Condition::Paused);
        machine.resume().unwrap();
        assert_eq!(machine.condition(), Condition::Running);
        machine.destroy().unwrap();
        assert_eq!(machine.condition(), Condition::Gone);
        machine.destroy().unwrap();
        drop(hypervisor.start(xml, 0).unwrap());
        assert!(hypervisor.connect.lookup_domain_by_name("x").is_err(), "dropped is destroyed");
        assert!(hypervisor.start("<domain/>", 0).is_err());
    }
}
