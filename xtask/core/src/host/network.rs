//! The services on this host's loopback that the guest of a machine with internet access can use.

use std::collections::BTreeSet;

/// The TCP ports by which a guest reaches the internet: ssh, DNS, HTTP and HTTPS. Landlock does not distinguish
/// addresses, so these ports of the host's loopback can be reached, too.
pub const INTERNET_PORTS: [u16; 4] = [22, 53, 80, 443];

/// The kernel's lists of TCP sockets (proc_net_tcp in proc_pid_net(5)).
const SOCKETS: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// The state of a socket that listens.
const LISTENS: &str = "0A";
/// The addresses of the loopback, and those that stand for all addresses, as the kernel prints them: 127.0.0.1,
/// 0.0.0.0, ::1 and ::. A byte order other than that of x86 and aarch64 would have other texts.
const LOOPBACK: [&str; 4] =
    ["0100007F", "00000000", "00000000000000000000000001000000", "00000000000000000000000000000000"];

/// Returns the ports among [`INTERNET_PORTS`] on which a service of this host's loopback listens.
pub fn loopback_services() -> Vec<u16> {
    let lists = SOCKETS.iter().filter_map(|path| std::fs::read_to_string(path).ok());
    let listening: BTreeSet<u16> = lists.flat_map(|list| listening(&list).collect::<Vec<_>>()).collect();
    INTERNET_PORTS.into_iter().filter(|port| listening.contains(port)).collect()
}

/// Returns the ports of the loopback on which a socket in the kernel's list listens.
fn listening(list: &str) -> impl Iterator<Item = u16> {
    list.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (address, port) = fields.next()?.split_once(':')?;
        let is_open = LOOPBACK.contains(&address) && fields.nth(1) == Some(LISTENS);
        u16::from_str_radix(port, 16).ok().filter(|_| is_open)
    })
}

/// Returns the sentence about these ports; `None` if there are none.
pub fn reached_services(ports: &[u16]) -> Option<String> {
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    (!ports.is_empty()).then(|| {
        format!(
            "the guest of a machine of `cargo xtask vm up`, and a guest that installs packages, can connect to the \
             services on this host's loopback with the TCP ports {}",
            ports.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_service_on_the_loopback_is_found_and_a_port_that_does_not_listen_is_not() {
        let listeners = ["127.0.0.1:0", "0.0.0.0:0"].map(|address| TcpListener::bind(address).unwrap());
        let ports = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
        let list = std::fs::read_to_string(SOCKETS[0]).unwrap();
        let found: Vec<_> = listening(&list).filter(|port| ports.contains(port)).collect();
        assert_eq!(found.len(), 2, "{list}");
        drop(listeners);
        let list = std::fs::read_to_string(SOCKETS[0]).unwrap();
        assert!(!listening(&list).any(|port| ports.contains(&port)), "{list}");
    }

    #[test]
    fn another_address_and_another_state_are_no_service_of_the_loopback() {
        let line =
            |address: &str, state: &str| format!("   0: {address} 00000000:0000 {state} 00000000:00000000\n");
        let list = line("0100007F:0016", "0A")
            + &line("0200A8C0:0050", "0A")
            + &line("0100007F:01BB", "01")
            + &line("00000000000000000000000001000000:0035", "0A");
        assert_eq!(listening(&list).collect::<Vec<_>>(), [22, 53]);
        assert!(reached_services(&[22, 53]).unwrap().ends_with("the TCP ports 22, 53"));
        assert_eq!(reached_services(&[]), None);
    }
}
