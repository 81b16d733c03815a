//! Whether a port of the host is free. Podman notices only at the start of a container that a port is not,
//! when the previous container has been stopped already. The agent runs as podman's user, so it may bind the
//! same ports.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};

use agent_protocol::deployment::{Port, Protocol};

/// Returns the reason why the port cannot be had.
pub(crate) fn unavailable(port: &Port) -> Option<String> {
    let address = (port.address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port.host);
    let bound = match port.protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp => UdpSocket::bind(address).map(drop),
    };
    let (number, error) = (port.host, bound.err()?);
    match error.kind() {
        ErrorKind::AddrInUse => Some(format!("port {number} of the device is in use")),
        ErrorKind::PermissionDenied => Some(format!(
            "port {number} of the device needs privileges: use a port from \
             net.ipv4.ip_unprivileged_port_start on, or lower that sysctl"
        )),
        ErrorKind::AddrNotAvailable => Some(format!("the device does not have the address {}", address.0)),
        // Podman may be able to bind what the agent's sandbox cannot.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host: u16, address: Option<IpAddr>, protocol: Protocol) -> Port {
        Port { host, container: 80, address, protocol }
    }

    #[test]
    fn a_port_in_use_is_found() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let number = listener.local_addr().unwrap().port();
        for address in [None, Some([127, 0, 0, 1].into())] {
            let reason = unavailable(&port(number, address, Protocol::Tcp)).unwrap();
            assert!(reason.contains(&format!("port {number} of the device is in use")), "{reason}");
        }
        drop(listener);
        assert_eq!(unavailable(&port(number, None, Protocol::Tcp)), None);
        let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let number = socket.local_addr().unwrap().port();
        assert!(unavailable(&port(number, None, Protocol::Udp)).unwrap().contains("in use"));
    }

    #[test]
    fn an_address_of_another_device_is_found() {
        // 192.0.2.0/24 is for documentation (RFC 5737).
        let reason = unavailable(&port(8080, Some([192, 0, 2, 1].into()), Protocol::Tcp)).unwrap();
        assert_eq!(reason, "the device does not have the address 192.0.2.1");
    }
}
