//! Confines QEMU, so that the guest cannot use the services of this host. With QEMU's user-mode network, each
//! connection of the guest is a connection that QEMU makes, and the guest's gateway stands for this host's loopback.
//!
//! Landlock lets QEMU connect only to given TCP ports (Linux 6.7, Documentation/userspace-api/landlock.rst). A seccomp
//! filter keeps QEMU from UDP and ICMP, for which QEMU uses sockets for datagrams and, as root, raw sockets. For a
//! guest that reaches the internet, and on a kernel without these rules, [`supervisor`] decides about each connection.
//! Where that is not possible, Landlock leaves the ports that a guest needs. None of these needs privileges or a
//! namespace. All apply to one thread and to the processes that this thread starts; libvirt's embedded driver starts
//! QEMU in the thread that calls it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use anyhow::{Context, Result};
use landlock::{
    AccessNet, CompatLevel, Compatible as _, NetPort, Ruleset, RulesetAttr as _, RulesetCreated,
    RulesetCreatedAttr as _, RulesetError,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use xtask_core::host::network::{INTERNET_PORTS, LoopbackServices, may_supervise};

use super::supervisor::{self, Policy, Supervisor};

/// The bits of a socket's type without its flags (socket(2)).
const SOCKET_TYPE: u64 = 0xf;

/// The network services that a guest can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reach {
    /// These TCP ports of this host: the servers of the run.
    Servers(Vec<u16>),
    /// Other hosts, and of this host's loopback the TCP ports `own` and the name servers. Without a supervisor: all
    /// these TCP ports and [`INTERNET_PORTS`] of any host, and UDP.
    Internet {
        own: Vec<u16>,
        /// The ports of the proxies on other hosts.
        proxies: Vec<u16>,
    },
    /// Everything that this host reaches.
    Everything,
}

/// Returns whether this host's kernel can confine QEMU.
pub(crate) fn is_possible() -> bool {
    ruleset().is_ok() || can_supervise()
}

/// Returns which services of this host's loopback a guest that reaches the internet can use, if nothing decides about
/// its single connections. `None` if there are no such services, or if QEMU cannot be confined at all.
pub(crate) fn services_in_reach() -> Option<String> {
    let is_weak = is_possible() && !can_supervise();
    is_weak.then(LoopbackServices::read).and_then(|services| services.sentence())
}

/// Returns whether a supervisor can decide about QEMU's connections.
fn can_supervise() -> bool {
    let tried = || std::thread::spawn(supervisor::stop_connections).join();
    may_supervise() && tried().is_ok_and(|listener| listener.is_ok())
}

/// Calls `start` in a thread of its own, whose child processes can reach only `reach`. If this host has neither such
/// rules of Landlock nor a supervisor, they can connect to every TCP port. In this case, preflight has a finding, and
/// the report says that QEMU was not confined. While the returned supervisor exists, it decides about the connections.
pub(super) fn confined<T: Send>(
    reach: &Reach,
    start: impl FnOnce() -> T + Send,
) -> Result<(T, Option<Supervisor>)> {
    std::thread::scope(|scope| {
        let (sender, listener) = mpsc::channel();
        let thread = scope.spawn(move || {
            // The first connection of this thread waits for the supervisor.
            sender.send(reach.confine_thread().context("confine QEMU's network")?).ok();
            anyhow::Ok(start())
        });
        let supervisor = match (listener.recv(), reach) {
            (Ok(Some(listener)), Reach::Internet { own, .. }) => {
                Some(Supervisor::start(listener, Policy { ports: own.clone(), others: true }))
            }
            (Ok(Some(listener)), Reach::Servers(ports)) => {
                Some(Supervisor::start(listener, Policy { ports: ports.clone(), others: false }))
            }
            _ => None,
        };
        let started = thread.join().expect("libvirt's calls do not panic")?;
        Ok((started, supervisor))
    })
}

impl Reach {
    /// Returns the network services that a guest can reach after it has installed its distribution's packages.
    pub(crate) fn without_internet(&self) -> Self {
        match self {
            Self::Internet { own, .. } => Self::Servers(own.clone()),
            Self::Servers(_) | Self::Everything => self.clone(),
        }
    }

    /// Confines this thread. Returns the descriptor for a supervisor, if one has to decide about the connections.
    fn confine_thread(&self) -> Result<Option<OwnedFd>> {
        let landlock = ruleset();
        let listener = match self {
            Self::Everything => return Ok(None),
            Self::Servers(_) if landlock.is_ok() => None,
            Self::Servers(_) | Self::Internet { .. } => {
                may_supervise().then(supervisor::stop_connections).and_then(Result::ok)
            }
        };
        let is_supervised = listener.is_some();
        if !is_supervised && let Ok(mut rules) = landlock {
            let ports = match self {
                Self::Servers(ports) => ports.clone(),
                Self::Internet { own, proxies } => [own, proxies, &INTERNET_PORTS[..]].concat(),
                Self::Everything => Vec::new(),
            };
            for port in ports {
                rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
            }
            rules.restrict_self()?;
        }
        if matches!(self, Self::Servers(_)) {
            apply_filter(&streams_alone()?)?;
        }
        Ok(listener)
    }
}

/// Returns an empty set of rules about connections, or an error if the kernel has no such rules.
fn ruleset() -> Result<RulesetCreated, RulesetError> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessNet::ConnectTcp)?.create()
}

/// Returns a filter that refuses sockets of the internet protocols other than streams.
fn streams_alone() -> Result<BpfProgram> {
    let is = |argument, operator, value: i32| -> Result<SeccompCondition> {
        Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.try_into()?)?)
    };
    let mut rules = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_DGRAM, libc::SOCK_RAW] {
            let of_kind = is(1, SeccompCmpOp::MaskedEq(SOCKET_TYPE), kind)?;
            rules.push(SeccompRule::new(vec![is(0, SeccompCmpOp::Eq, family)?, of_kind])?);
        }
    }
    let refuse = SeccompAction::Errno(u32::try_from(libc::EACCES)?);
    let architecture = std::env::consts::ARCH.try_into()?;
    let rules = BTreeMap::from([(libc::SYS_socket, rules)]);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture)?.try_into()?)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;

    /// Returns whether a child process can open a connection, as the guest's QEMU would.
    fn opens(protocol: &str, port: u16) -> bool {
        let connect = format!("exec 3<> /dev/{protocol}/127.0.0.1/{port}");
        let output = Command::new("bash").args(["-c", &connect]).output().unwrap();
        output.status.success()
    }

    #[test]
    fn a_child_reaches_only_the_given_ports() {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [own, other] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
        let reached = |reach: Reach| {
            let open = || (opens("tcp", own), opens("tcp", other), opens("udp", other));
            confined(&reach, open).unwrap().0
        };
        let is_open = !is_possible();
        assert_eq!(reached(Reach::Servers(vec![own])), (true, is_open, false));
        assert_eq!(reached(Reach::Servers(Vec::new())), (is_open, is_open, false));
        assert_eq!(reached(Reach::Everything), (true, true, true));
        assert!(opens("tcp", other), "only the thread that starts QEMU is confined");
    }

    #[test]
    fn a_guest_of_a_smoke_has_no_socket_for_udp_or_icmp() {
        use rustix::io::Errno;
        use rustix::net::{AddressFamily, SocketType, ipproto, socket};

        let families = [AddressFamily::INET, AddressFamily::INET6];
        let kinds = [(SocketType::DGRAM, None), (SocketType::RAW, Some(ipproto::ICMP))];
        for (family, (kind, protocol)) in families.into_iter().flat_map(|one| kinds.map(|kind| (one, kind))) {
            let open = || socket(family, kind, protocol).map(drop);
            let (refused, _) = confined(&Reach::Servers(Vec::new()), open).unwrap();
            assert_eq!(refused, Err(Errno::ACCESS), "{family:?} {kind:?}");
            let internet = Reach::Internet { own: Vec::new(), proxies: Vec::new() };
            assert_ne!(confined(&internet, open).unwrap().0, Err(Errno::ACCESS));
        }
    }
}
