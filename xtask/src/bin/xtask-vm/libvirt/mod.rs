//! libvirt's embedded QEMU driver, with one root for each run. It needs no daemon, no group and no network, and two
//! runs cannot collide. This file and `remote.rs` are the only ones that name `virt::`.

pub(crate) mod isolation;
pub(crate) mod paused;
mod reaper;
pub(crate) mod remote;

pub(crate) use isolation::Reach;
pub(crate) use reaper::children;

use std::cell::Cell;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};
use virt::connect::Connect;
use virt::domain::{Domain, DomainState, DomainStateEnum};
use xtask_core::cache::Cache;
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::limits;
use xtask_core::machine::DOMAIN_NAME;
use xtask_core::message;
use xtask_core::processes::emulator;

use crate::guest::monitor::returned;

/// The flag starts a domain with its processors stopped, so that QEMU's machine can be read before any guest code runs.
/// The domain is also transient: libvirt deletes the definition when QEMU ends.
const PAUSED: virt::sys::virDomainCreateFlags = virt::sys::VIR_DOMAIN_START_PAUSED;

/// An open connection to the embedded driver.
pub(crate) struct Hypervisor {
    connect: Connect,
    /// The directory that owns the QEMUs of the root.
    owner: PathBuf,
    /// The QEMU that was started last.
    qemu: Cell<Option<Pid>>,
}

/// A started domain. If this value is dropped, the domain is destroyed, so that no QEMU is left if a run ends early.
pub(crate) struct Machine {
    domain: Domain,
    /// True if a drop must not destroy the domain, because it is already destroyed or becomes an instance.
    let_go: bool,
}

/// The state of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// QEMU runs, and so do the guest's processors.
    Running,
    /// QEMU runs but has stopped the guest, because it cannot write the guest's disk, or because KVM failed.
    Paused,
    /// The guest has shut itself down, and its QEMU waits for libvirt to end it.
    Off,
    /// QEMU has ended.
    Gone,
}

impl Hypervisor {
    /// Opens the embedded driver below `root`. A process can open only one root: libvirt refuses a second one.
    /// libvirt's record of QEMU's capabilities is stored in `cache` for later roots.
    pub(crate) fn open(root: &Path, cache: &Cache) -> Result<Self> {
        // libvirt returns its errors as values. By default, it prints them as well.
        virt::error::clear_error_callback();
        start_event_loop()?;
        make_private_dir(&root.join("etc"))?;
        write_private(&root.join("etc/qemu.conf"), qemu_conf())?;
        keep_capabilities(root, &cache.libvirt())?;
        let uri = format!("qemu:///embed?root={}", root.display());
        reaper::adopt_daemons()?;
        let connect = on_one_processor(|| Connect::open(Some(&uri)))
            .with_context(|| format!("open libvirt's embedded driver {uri}"))?;
        let owner = root.parent().unwrap_or(root).to_owned();
        Ok(Self { connect, owner, qemu: Cell::new(None) })
    }

    /// Checks that no signal has ended the QEMU that was started last. The caller waits for `what`.
    ///
    /// # Errors
    /// A failure of the host. A QEMU that ended by itself, for example because the guest shut down, is no error here.
    pub(crate) fn check_signal(&self, what: &str) -> Result<(), Failure> {
        self.qemu.get().and_then(reaper::signal_that_ended).map_or(Ok(()), |signal| Err(killed(signal, what)))
    }

    fn started(&self, domain: Domain) -> Machine {
        self.qemu.set(emulator(&self.owner).map(|process| process.pid));
        Machine { domain, let_go: false }
    }

    /// Returns libvirt's version.
    pub(crate) fn version(&self) -> Result<String> {
        self.connect.lib_version().map(remote::version).context("ask libvirt for its version")
    }

    /// Starts a transient domain whose processors are stopped, and whose guest can reach only `reach`.
    pub(crate) fn start_paused(&self, xml: &str, reach: &Reach) -> Result<Machine> {
        self.start(xml, PAUSED, reach)
    }

    fn start(&self, xml: &str, flags: virt::sys::virDomainCreateFlags, reach: &Reach) -> Result<Machine> {
        let connect = &self.connect;
        let create = || reaper::reaping(|| connect.create_domain_xml(xml, flags));
        let started = isolation::confined(reach, create)?;
        Ok(self.started(started.context("start the domain")?))
    }

    /// Returns the machine of this root that another process started and left running, or `None` if there is none.
    pub(crate) fn running(&self) -> Option<Machine> {
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).ok()?;
        Some(Machine { domain, let_go: true })
    }

    /// Restores the machine whose memory was saved to `memory`, with its processors stopped. The domain in `xml` names
    /// the files that replace those of the saved machine. Its guest can reach only `reach`.
    pub(crate) fn restore_paused(&self, memory: &Path, xml: &str, reach: &Reach) -> Result<Machine> {
        let path = memory.to_str().context("a path in the cache is not UTF-8")?;
        let flags = virt::sys::VIR_DOMAIN_SAVE_PAUSED;
        let connect = &self.connect;
        let restore = || reaper::reaping(|| connect.restore_domain_flags(path, Some(xml), flags));
        isolation::confined(reach, restore)?
            .with_context(|| format!("restore the machine whose memory is in {path}"))?;
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).context("find the restored domain")?;
        Ok(self.started(domain))
    }
}

/// Returns the failure for a QEMU that a signal has ended. The guest cannot send signals to QEMU, so the host is at
/// fault.
fn killed(signal: i32, what: &str) -> Failure {
    if signal == Signal::KILL.as_raw() {
        return Failure::host(
            format!(
                "QEMU was killed (signal 9) while waiting for {what}; the kernel's out-of-memory killer does that"
            ),
            "read the host's kernel log (dmesg); close programs, or give the guest less memory with --memory 1024; \
             nothing is known about the agent",
        );
    }
    Failure::host(
        format!("QEMU was ended by signal {signal} while waiting for {what}"),
        "read qemu.log in the report's directory and the host's kernel log (dmesg); nothing is known about the agent",
    )
}

impl Machine {
    /// Returns the current state of the domain.
    pub(crate) fn condition(&self) -> Condition {
        // libvirt does not know a transient domain whose QEMU has ended, so an error means that the domain is gone.
        // `is_active` comes first, because `state` of the crate virt 0.5.0 returns no error in this case.
        if !self.domain.is_active().unwrap_or(false) {
            return Condition::Gone;
        }
        match self.domain.state() {
            Ok((DomainStateEnum::Known(DomainState::Paused | DomainState::Crashed), _)) => Condition::Paused,
            Ok((DomainStateEnum::Known(DomainState::Shutdown | DomainState::Shutoff), _)) => Condition::Off,
            _ => Condition::Running,
        }
    }

    /// Starts the guest's processors.
    pub(crate) fn resume(&self) -> Result<()> {
        self.domain.resume().context("start the guest's processors")
    }

    /// Sends a command of QEMU's machine protocol (QEMU, qemu-qmp-ref) and returns the answer.
    pub(crate) fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let question = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = self.monitor(&question, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)?;
        returned(&answer).with_context(|| format!("ask QEMU: {question}"))
    }

    /// Sends a command to QEMU's human monitor, for facts that the machine protocol does not have. Returns the output.
    pub(crate) fn hmp(&self, command: &str) -> Result<String> {
        self.monitor(command, virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
    }

    fn monitor(&self, command: &str, protocol: u32) -> Result<String> {
        let answer = self.domain.qemu_monitor_command(command, protocol);
        answer.with_context(|| format!("ask QEMU: {command}")).map_err(|error| {
            let hint =
                "read qemu.log in the report's directory, and run again; nothing is known about the agent";
            host_fault(error, "use QEMU's monitor on this host", hint)
        })
    }

    /// Leaves the domain running when this value is dropped.
    pub(crate) fn let_go(&mut self) {
        self.let_go = true;
    }

    /// Stops the domain, writes its memory and the state of its devices to `memory`, and ends it (virDomainSave).
    pub(crate) fn save(&mut self, memory: &Path) -> Result<()> {
        let path =
            CString::new(memory.as_os_str().as_encoded_bytes()).context("the path contains a NUL byte")?;
        // SAFETY: the domain lives as long as `self`, and libvirt copies the path. The crate virt 0.5 does not wrap
        // this call.
        let saved =
            reaper::reaping(|| unsafe { virt::sys::virDomainSave(self.domain.as_ptr(), path.as_ptr()) });
        if saved < 0 {
            return Err(virt::error::Error::last_error())
                .with_context(|| format!("save the machine's memory to {}", memory.display()));
        }
        self.let_go = true;
        Ok(())
    }

    /// Ends QEMU with SIGTERM and then SIGKILL, and does not notify the guest (virDomainDestroy).
    pub(crate) fn destroy(&mut self) -> Result<()> {
        // Even after an error, a drop must not destroy the run's next machine, which has the same name and identity.
        self.let_go = true;
        let destroyed = reaper::reaping(|| self.domain.destroy()).context("destroy the domain");
        if self.condition() == Condition::Gone { Ok(()) } else { destroyed }
    }

    /// Returns the port on 127.0.0.1 that is forwarded to `guest_port`. The kernel chose this port.
    pub(crate) fn port_to(&self, guest_port: u16) -> Result<u16> {
        forwarded_port(&self.hmp("info usernet")?, guest_port)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.let_go {
            // The error is ignored: the clean-up of the run's directory ends all processes of the run.
            drop(self.destroy());
        }
    }
}

/// Links the `cache` of a root to one directory for all roots, because libvirt takes seconds to probe QEMU. The record
/// is valid as long as QEMU, libvirt's modules and the host stay the same, which libvirt checks itself. libvirt does
/// not write the files atomically. A file that another run has not finished does not parse; libvirt then probes again
/// and writes the file anew.
fn keep_capabilities(root: &Path, kept: &Path) -> Result<()> {
    make_private_dir(kept)?;
    let link = root.join("cache");
    if link.is_symlink() { Ok(()) } else { Ok(fs_err::os::unix::fs::symlink(kept, &link)?) }
}

/// Runs `call` on the first processor that this process may use. When libvirt opens a connection, it reads the
/// processor's CPUID. libvirt's record of an emulator with KVM is valid only for the same CPUID. Parts of the CPUID
/// (the APIC's id) differ between processors, so libvirt must always ask the same processor.
fn on_one_processor<T>(call: impl FnOnce() -> T) -> T {
    let allowed = sched_getaffinity(None).ok();
    let first = allowed.and_then(|set| (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu)));
    if let Some(first) = first {
        let mut one = CpuSet::new();
        one.set(first);
        // If the kernel refuses this, libvirt may probe once more than necessary.
        let _ = sched_setaffinity(None, &one);
    }
    let result = call();
    if let Some(allowed) = allowed {
        let _ = sched_setaffinity(None, &allowed);
    }
    result
}

/// Returns the host's port that is forwarded to `guest_port`, from a row of `info usernet` like
/// `TCP[HOST_FORWARD]  14  127.0.0.1 37787  10.0.2.15  22 …`.
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

/// Returns libvirt's `qemu.conf`. libvirt writes the console's file without virtlogd, and QEMU runs as this user, who
/// owns the files. libvirt uses nothing that a container lacks: mount namespaces, cgroups, extended attributes, a
/// security driver's helpers. The run does not need them, since its directory is private.
fn qemu_conf() -> String {
    let conf = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\n\
                    cgroup_controllers = []\nremember_owner = 0\ndynamic_ownership = 0\n";
    let of_root = "user = \"+0\"\ngroup = \"+0\"\n";
    format!("{conf}{}", if rustix::process::geteuid().is_root() { of_root } else { "" })
}

/// Starts libvirt's event loop. The embedded driver needs the loop for QEMU's monitor and for its timers: without the
/// loop, a start hangs.
fn start_event_loop() -> Result<()> {
    static STARTED: Once = Once::new();
    let mut result = Ok(());
    STARTED.call_once(|| {
        result = virt::event::event_register_default_impl().context("register libvirt's event loop");
        std::thread::spawn(|| {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    message!("warning: libvirt's event loop: {error}");
                    std::thread::sleep(limits::POLL);
                }
            }
        });
    });
    result
}

#[cfg(test)]
mod tests {
    use xtask_core::error::Kind;

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
    fn a_qemu_that_a_signal_ended_is_the_hosts_fault() {
        for (signal, words) in [(9, "out-of-memory killer"), (11, "ended by signal 11")] {
            let failure = killed(signal, "the agent's first status");
            assert_eq!(failure.kind, Kind::Host);
            assert!(failure.to_string().contains(words) && failure.hint().is_some(), "{failure}");
        }
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
        assert!(kept.join("known").exists(), "the link is deleted, but not its target");
    }

    /// Tests the connection with libvirt's mock driver, which works on any host. That driver cannot start a domain
    /// paused.
    #[test]
    fn a_domain_of_libvirts_test_driver_lives_and_is_destroyed() {
        let connect = Connect::open(Some("test:///default")).unwrap();
        let hypervisor = Hypervisor { connect, owner: PathBuf::new(), qemu: Cell::new(None) };
        assert!(hypervisor.version().unwrap().split('.').count() == 3);
        let xml = "<domain type='test'><name>x</name><memory>8192</memory><os><type>hvm</type></os></domain>";
        let mut machine = hypervisor.start(xml, 0, &Reach::Everything).unwrap();
        machine.domain.suspend().unwrap();
        assert_eq!(machine.condition(), Condition::Paused);
        machine.resume().unwrap();
        assert_eq!(machine.condition(), Condition::Running);
        machine.destroy().unwrap();
        assert_eq!(machine.condition(), Condition::Gone);
        machine.destroy().unwrap();
        drop(hypervisor.start(xml, 0, &Reach::Everything).unwrap());
        assert!(hypervisor.connect.lookup_domain_by_name("x").is_err(), "a dropped machine is destroyed");
        assert!(hypervisor.start("<domain/>", 0, &Reach::Everything).is_err());
    }
}
