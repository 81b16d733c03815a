//! The services on this host's loopback that the guest of a machine with internet access can use.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::process::{Command, Stdio};

use super::tools::release;

/// The TCP ports by which a guest reaches the internet: ssh, DNS, HTTP and HTTPS. Landlock does not distinguish
/// addresses, so these ports of the host's loopback can be reached, too.
pub const INTERNET_PORTS: [u16; 4] = [22, 53, 80, 443];

/// Returns whether the kernel can stop the connections of QEMU until another process has decided about them, and
/// whether this process may read the memory of its descendants. Linux 5.5 and newer can (seccomp_unotify(2)), unless a
/// security module forbids it, such as Yama with a `ptrace_scope` above 1 (Documentation/admin-guide/LSM/Yama.rst).
pub fn may_supervise() -> bool {
    let kernel = rustix::system::uname();
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    release(&kernel.release().to_string_lossy()) >= NOTIFIES
        && actions.split_whitespace().any(|action| action == "user_notif")
        && reads_memory_of_child().unwrap_or(false)
}

/// The first kernel on which a process can let a stopped call go on (seccomp_unotify(2)).
const NOTIFIES: (u32, u32) = (5, 5);

/// Returns whether this process may open the memory of a child.
fn reads_memory_of_child() -> io::Result<bool> {
    // cat ends when its input ends.
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let is_opened = File::open(format!("/proc/{}/mem", child.id())).is_ok();
    drop(child.stdin.take());
    child.wait()?;
    Ok(is_opened)
}

/// The services of this host's loopback that a guest with internet access can use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoopbackServices {
    /// The ports among [`INTERNET_PORTS`] on which a TCP socket listens.
    pub tcp: Vec<u16>,
    /// The ports of the UDP sockets without a peer, except for ephemeral ports, which clients have. A guest with
    /// internet access may send to every UDP port.
    pub udp: Vec<u16>,
}

impl LoopbackServices {
    /// Reads the services from the kernel's lists of sockets (proc_net_tcp and proc_net_udp in proc_pid_net(5)).
    pub fn read() -> Self {
        let ports = |names: [&str; 2], state| -> BTreeSet<u16> {
            let lists = names
                .into_iter()
                .filter_map(|name| std::fs::read_to_string(format!("/proc/net/{name}")).ok());
            lists.flat_map(|list| ports_in(&list, state).collect::<Vec<_>>()).collect()
        };
        let listening = ports(["tcp", "tcp6"], LISTENS);
        let tcp = INTERNET_PORTS.into_iter().filter(|port| listening.contains(port)).collect();
        let ephemeral = ephemeral_ports();
        let udp = ports(["udp", "udp6"], HAS_NO_PEER).into_iter().filter(|port| !ephemeral.contains(port));
        Self { tcp, udp: udp.collect() }
    }

    /// Returns the sentence about these services; `None` if there are none.
    pub fn sentence(&self) -> Option<String> {
        let named: Vec<_> = [("TCP", &self.tcp), ("UDP", &self.udp)]
            .into_iter()
            .filter(|(_, ports)| !ports.is_empty())
            .map(|(protocol, ports)| {
                let named: Vec<_> = ports.iter().take(NAMED).map(u16::to_string).collect();
                let others = ports.len() - named.len();
                let others = if others > 0 { format!(" and {others} more") } else { String::new() };
                format!("{protocol} {}{others}", named.join(", "))
            })
            .collect();
        (!named.is_empty()).then(|| {
            format!(
                "the guest of a machine of `cargo xtask vm up`, and a guest that installs packages, can use these services on \
                 this host's loopback: {}",
                named.join("; ")
            )
        })
    }
}

/// The state of a TCP socket that listens, as the kernel prints it.
const LISTENS: &str = "0A";
/// The state of a UDP socket without a peer, as the kernel prints it.
const HAS_NO_PEER: &str = "07";
/// The addresses outside 127.0.0.0/8 that reach the loopback, as the kernel prints them: 0.0.0.0 and ::. A guest does
/// not reach ::1, because its network has no IPv6.
const LOOPBACK: [&str; 2] = ["00000000", "00000000000000000000000000000000"];

/// The beginning of an IPv6 address that stands for an IPv4 address (::ffff:0:0/96), as the kernel prints it.
const MAPPED: &str = "0000000000000000FFFF0000";
/// The maximum number of ports of a protocol that the sentence names.
const NAMED: usize = 10;

/// Returns the ports that the kernel gives to sockets that ask for any port (ip_local_port_range in ip(7)).
/// If the range cannot be read, returns the kernel's default.
fn ephemeral_ports() -> RangeInclusive<u16> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = range.split_whitespace().filter_map(|port| port.parse().ok());
    let default = 32_768..=60_999;
    ports.next().zip(ports.next()).map_or(default, |(first, last)| first..=last)
}

/// Returns the ports of the loopback that sockets in this state have in the kernel's list.
fn ports_in(list: &str, state: &str) -> impl Iterator<Item = u16> {
    list.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (address, port) = fields.next()?.split_once(':')?;
        let address = address.strip_prefix(MAPPED).unwrap_or(address);
        // Each address of 127.0.0.0/8 belongs to the loopback. The kernel prints the first octet last.
        let is_loopback = LOOPBACK.contains(&address) || address.len() == 8 && address.ends_with("7F");
        let is_service = is_loopback && fields.nth(1) == Some(state);
        u16::from_str_radix(port, 16).ok().filter(|_| is_service)
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_service_on_the_loopback_is_found_and_a_port_that_does_not_listen_is_not() {
        let listeners =
            ["127.0.0.1:0", "127.0.0.53:0", "0.0.0.0:0"].map(|address| TcpListener::bind(address).unwrap());
        let ports = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
        let found = || {
            let list = std::fs::read_to_string("/proc/net/tcp").unwrap();
            ports_in(&list, LISTENS).filter(|port| ports.contains(port)).count()
        };
        assert_eq!(found(), 3);
        drop(listeners);
        assert_eq!(found(), 0);
    }

    #[test]
    fn a_udp_service_is_found_and_a_client_is_not() {
        let ephemeral = ephemeral_ports();
        let mut ports = (1024..*ephemeral.start()).rev();
        let service = ports.find_map(|port| UdpSocket::bind(("127.0.0.1", port)).ok()).unwrap();
        let [client, connected] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        connected.connect(service.local_addr().unwrap()).unwrap();
        let [service_port, client_port, connected_port] =
            [&service, &client, &connected].map(|socket| socket.local_addr().unwrap().port());
        let services = LoopbackServices::read();
        assert!(services.udp.contains(&service_port), "{services:?}");
        assert!(
            !services.udp.contains(&client_port) && !services.udp.contains(&connected_port),
            "{services:?}"
        );
        let list = std::fs::read_to_string("/proc/net/udp").unwrap();
        let found: Vec<_> = ports_in(&list, HAS_NO_PEER).collect();
        assert!(found.contains(&client_port) && !found.contains(&connected_port), "{list}");
        drop(service);
        assert!(!LoopbackServices::read().udp.contains(&service_port));
    }

    #[test]
    fn another_address_and_another_state_are_no_service_of_the_loopback() {
        let line =
            |address: &str, state: &str| format!("   0: {address} 00000000:0000 {state} 00000000:00000000\n");
        let list = line("0100007F:0016", "0A")
            + &line("0200A8C0:0050", "0A")
            + &line("0100007F:01BB", "01")
            + &line("00000000000000000000000001000000:0035", "0A")
            + &line("0000000000000000FFFF00000100007F:0050", "0A")
            + &line("0000000000000000FFFF00000200A8C0:0051", "0A")
            + &line("000080FE00000000000000000000007F:0052", "0A")
            + &line("7F000001:0053", "0A")
            + &line("00000000000000000000000000000000:14E9", "07");
        assert_eq!(ports_in(&list, LISTENS).collect::<Vec<_>>(), [22, 80]);
        assert_eq!(ports_in(&list, HAS_NO_PEER).collect::<Vec<_>>(), [5353]);
    }

    #[test]
    fn the_sentence_names_the_services_of_both_protocols() {
        let sentence =
            |tcp: &[u16], udp: &[u16]| LoopbackServices { tcp: tcp.to_vec(), udp: udp.to_vec() }.sentence();
        assert!(sentence(&[22, 53], &[]).unwrap().ends_with("loopback: TCP 22, 53"));
        assert!(sentence(&[22], &[68]).unwrap().ends_with("loopback: TCP 22; UDP 68"));
        let many: Vec<_> = (1..=13).collect();
        assert!(sentence(&[], &many).unwrap().ends_with("UDP 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more"));
        assert_eq!(sentence(&[], &[]), None);
    }
}
