//! libvirt's embedded QEMU driver, with one root for each run. It needs no daemon, no group and no network, and two
//! runs cannot collide. [`daemon`] runs a guest on a libvirt daemon instead. Only this folder names `virt::`.

pub(crate) mod connection;
pub(crate) mod daemon;
mod device_faults;
pub(crate) mod isolation;
mod machine;
pub(crate) mod paused;
mod reaper;
mod recording;
pub(crate) mod remote;
pub(crate) mod supervisor;
mod throttle;

pub(crate) use isolation::Reach;
pub(crate) use machine::{Condition, Machine, forwarded_port};

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use virt::connect::Connect;
use virt::domain::Domain;
use xtask_core::cache::Cache;
use xtask_core::error::Failure;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::limits;
use xtask_core::machine::DOMAIN_NAME;
use xtask_core::message;
use xtask_core::processes::emulator;

use supervisor::Supervisor;

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

    /// Returns the machine of a domain that was just started. If a supervisor decides about QEMU's connections, a
    /// process of its own does so from now on, because a machine may outlive this process.
    fn started(&self, domain: Domain, supervisor: Option<Supervisor>) -> Result<Machine> {
        let qemu = emulator(&self.owner).map(|process| process.pid);
        self.qemu.set(qemu);
        let machine = Machine::of(domain);
        if let Some(supervisor) = supervisor {
            supervisor.hand_over(qemu.context("find the domain's QEMU")?)?;
        }
        Ok(machine)
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
        let (started, supervisor) = isolation::confined(reach, create)?;
        self.started(started.context("start the domain")?, supervisor)
    }

    /// Returns the machine of this root that another process started and left running, or `None` if there is none.
    pub(crate) fn running(&self) -> Option<Machine> {
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).ok()?;
        Some(Machine::left_by_another(domain))
    }

    /// Restores the machine whose memory was saved to `memory`, with its processors stopped. The domain in `xml` names
    /// the files that replace those of the saved machine. Its guest can reach only `reach`.
    pub(crate) fn restore_paused(&self, memory: &Path, xml: &str, reach: &Reach) -> Result<Machine> {
        let path = memory.to_str().context("a path in the cache is not UTF-8")?;
        let flags = virt::sys::VIR_DOMAIN_SAVE_PAUSED;
        let connect = &self.connect;
        let restore = || reaper::reaping(|| connect.restore_domain_flags(path, Some(xml), flags));
        let (restored, supervisor) = isolation::confined(reach, restore)?;
        restored.with_context(|| format!("restore the machine whose memory is in {path}"))?;
        let domain = self.connect.lookup_domain_by_name(DOMAIN_NAME).context("find the restored domain")?;
        self.started(domain, supervisor)
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
