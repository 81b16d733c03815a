//! The services on this host's loopback that the guest of a machine with internet access can use.

use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

/// The TCP ports by which a guest reaches the internet: ssh, DNS, HTTP and HTTPS. Landlock does not distinguish
/// addresses, so these ports of the host's loopback can be reached, too.
pub const INTERNET_PORTS: [u16; 4] = [22, 53, 80, 443];

/// The time after which a port of the loopback counts as closed.
const LOOPBACK_ANSWERS: Duration = Duration::from_millis(200);

/// Returns the ports among `ports` on which a service of this host's loopback listens.
pub fn listening_on_loopback(ports: &[u16]) -> Vec<u16> {
    let listens =
        |port: u16| TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), LOOPBACK_ANSWERS).is_ok();
    ports.iter().copied().filter(|port| listens(*port)).collect()
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
    fn a_port_with_a_service_is_named_and_a_closed_one_is_not() {
        let [open, closed] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [served, free] = [&open, &closed].map(|listener| listener.local_addr().unwrap().port());
        drop(closed);
        assert_eq!(listening_on_loopback(&[free, served]), [served]);
        assert!(reached_services(&[served]).unwrap().ends_with(&format!("the TCP ports {served}")));
        assert_eq!(reached_services(&[]), None);
    }
}
