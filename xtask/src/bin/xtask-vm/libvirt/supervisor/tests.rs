//! Tests of the decisions about connections.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};

use super::*;
use crate::libvirt::isolation::{Reach, confined};

#[test]
fn only_the_given_services_of_the_loopback_are_reached() {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [own, other] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let connects = |port: u16| {
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let addresses: [SocketAddr; 3] =
            [(Ipv4Addr::LOCALHOST, port).into(), (Ipv4Addr::UNSPECIFIED, port).into(), (mapped, port).into()];
        addresses.map(|address| TcpStream::connect(address).is_ok())
    };
    let sends = |port: u16| socket.send_to(b"x", ("127.0.0.1", port)).map_err(|error| error.raw_os_error());
    let reach = Reach::Internet { own: vec![own], proxies: vec![other] };
    let (seen, supervisor) =
        confined(&reach, || (connects(own), connects(other), sends(own), sends(other))).unwrap();
    let refused = Err(Some(libc::EACCES));
    assert_eq!(seen, ([true, false, true], [false; 3], refused, refused));
    assert!(supervisor.is_some() && connects(other) == [true; 3], "only that thread is confined");
}

/// A supervisor that has only the memory of a process decides about its connections. Without a supervisor, the process
/// cannot connect.
#[test]
fn a_process_is_supervised_through_its_memory_alone() {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [own, other] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
    // A redirection of a group does not fork. A child would have a memory of its own.
    let script = "while read port; do
            if { :; } 3<> /dev/tcp/127.0.0.1/$port; then echo yes; else echo no; fi
        done 2> /dev/null";
    let mut shell = Command::new("bash");
    shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let (child, supervisor) =
        confined(&Reach::Internet { own: vec![own], proxies: Vec::new() }, || shell.spawn().unwrap())
            .unwrap();
    let (mut child, mut supervisor) = (child, supervisor.unwrap());
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut connects = |port: u16| {
        writeln!(input, "{port}").unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line == "yes\n"
    };
    assert!(connects(own) && !connects(other));
    supervisor.end();
    let memory = File::open(format!("/proc/{}/mem", child.id())).unwrap();
    let memory = Memory::OfQemu(Pid::from_child(&child), memory);
    let (policy, is_over) = (supervisor.policy.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(supervisor.listener.as_fd(), &memory, &policy, Some(&is_over)));
        assert!(connects(own) && !connects(other));
        is_over.store(true, Ordering::Relaxed);
        serving.join().unwrap();
    });
    drop(supervisor);
    assert!(!connects(own), "nothing decides any more");
    drop(input);
    child.wait().unwrap();
}

#[test]
fn a_port_of_the_loopback_must_be_given_and_others_need_not() {
    let policy = |others| Policy { ports: vec![8080], others };
    let allows = |address: &str, call| policy(true).allows(address.parse().unwrap(), call);
    assert!(allows("127.0.0.1:8080", Call::Connect) && allows("[::ffff:127.0.0.1]:8080", Call::Connect));
    assert!(!allows("127.0.0.1:8080", Call::SendTo), "it is a TCP port");
    let here = ["127.0.0.1:22", "127.1.2.3:8080", "0.0.0.0:8080", "[::1]:8080", "[::]:80"];
    assert!(here.iter().all(|address| !allows(address, Call::Connect)));
    let others = ["192.0.2.1:80", "[2001:db8::1]:22"];
    assert!(others.iter().all(|address| allows(address, Call::Connect) && allows(address, Call::SendTo)));
    let is_refused = |address: &&str| !policy(false).allows(address.parse().unwrap(), Call::Connect);
    assert!(others.iter().all(is_refused), "the guest of a smoke");
}

#[test]
fn name_servers_are_read_as_the_resolver_does() {
    let text = "# nameserver 1.1.1.1\nnameserver 127.0.0.53 # local\n nameserver\t::1\nnameservers 9.9.9.9\nnameserver\n";
    let expected: [IpAddr; 2] = ["127.0.0.53".parse().unwrap(), "::1".parse().unwrap()];
    assert_eq!(parse_name_servers(text).collect::<Vec<_>>(), expected);
}

#[test]
fn addresses_are_parsed_as_the_kernel_takes_them() {
    let family = |family: i32| u16::try_from(family).unwrap().to_ne_bytes().to_vec();
    let v4 = [family(libc::AF_INET), vec![0x1f, 0x90, 127, 0, 0, 1], vec![0; 8]].concat();
    assert_eq!(parse(&v4), Some((Ipv4Addr::LOCALHOST, 8080).into()));
    let address = Ipv6Addr::LOCALHOST.octets().to_vec();
    let v6 = [family(libc::AF_INET6), vec![0, 80], vec![7; 4], address, vec![0; 4]].concat();
    assert_eq!(parse(&v6), Some((Ipv6Addr::LOCALHOST, 80).into()));
    assert_eq!(parse(&v6[..20]), None);
    assert_eq!(parse(&[family(libc::AF_UNIX), b"/run/x".to_vec()].concat()), None);
    assert_eq!(parse(&[]), None);
}
