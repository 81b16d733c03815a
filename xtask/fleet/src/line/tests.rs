//! Tests of the line with a server that sends each byte back.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use tokio::runtime::Runtime;

use super::*;

/// The limit for bytes that must arrive.
const ARRIVAL: Duration = Duration::from_secs(30);
/// The time in which a byte that must not arrive would arrive.
const ABSENCE: Duration = Duration::from_millis(300);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Starts a server that sends `greeting`, and then each byte that it receives. Returns its port.
fn echo(greeting: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                stream.write_all(greeting).and_then(|()| std::io::copy(&mut stream.try_clone()?, &mut stream))
            });
        }
    });
    port
}

fn device(line: &Line) -> TcpStream {
    let device = TcpStream::connect(("127.0.0.1", line.port())).unwrap();
    device.set_read_timeout(Some(ARRIVAL)).unwrap();
    device
}

/// Sends bytes and waits until all of them have come back.
fn echoed(mut device: &TcpStream, bytes: &[u8]) {
    device.write_all(bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    device.read_exact(&mut back).unwrap();
    assert!(back == bytes, "{} bytes", bytes.len());
}

/// Reads a byte until `limit`.
fn read(mut device: &TcpStream, limit: Duration) -> std::io::Result<usize> {
    device.set_read_timeout(Some(limit)).unwrap();
    device.read(&mut [0])
}

fn is_silent(device: &TcpStream) -> bool {
    read(device, ABSENCE).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn is_reset(device: &TcpStream) -> bool {
    read(device, ARRIVAL).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn an_open_line_passes_all_bytes_and_the_end() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"")).unwrap();
    let (first, second) = (device(&line), device(&line));
    echoed(&first, b"x");
    let many: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| (&second).write_all(&many).and_then(|()| second.shutdown(Shutdown::Write)).unwrap());
        let mut back = Vec::new();
        (&second).read_to_end(&mut back).unwrap();
        assert!(back == many, "{} bytes came back", back.len());
    });
    assert_eq!((line.accepted(), line.passage()), (2, Passage::Open));
}

#[test]
fn a_cut_resets_the_connections_and_accepts_new_ones() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"")).unwrap();
    let cut = device(&line);
    echoed(&cut, b"x");
    line.cut();
    assert!(is_reset(&cut));
    echoed(&device(&line), b"x");
    assert_eq!(line.accepted(), 2);
}

#[test]
fn a_silent_connection_is_never_closed_and_never_recovers() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"hello")).unwrap();
    let before = device(&line);
    (&before).read_exact(&mut [0; 5]).unwrap();
    line.set(Passage::Silent).unwrap();
    let during = device(&line);
    for device in [&before, &during] {
        (&*device).write_all(b"lost").unwrap();
        assert!(is_silent(device), "nothing passes, and nothing is closed");
    }
    line.set(Passage::Open).unwrap();
    for device in [&before, &during] {
        (&*device).write_all(b"also lost").unwrap();
        assert!(is_silent(device), "the connection does not recover");
    }
    let after = device(&line);
    (&after).read_exact(&mut [0; 5]).unwrap();
    echoed(&after, b"x");
    line.cut();
    assert!([before, during, after].iter().all(is_reset), "a cut ends silent connections, too");
}

#[test]
fn a_silence_that_ends_at_once_still_silences() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"")).unwrap();
    let before = device(&line);
    echoed(&before, b"x");
    line.set(Passage::Silent).unwrap();
    line.set(Passage::Open).unwrap();
    (&before).write_all(b"lost").unwrap();
    assert!(is_silent(&before));
}

#[test]
fn a_refusing_line_keeps_its_port() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"")).unwrap();
    let before = device(&line);
    echoed(&before, b"x");
    line.set(Passage::Refused).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], line.port()));
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(is_reset(&before));
    let other = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let taken = other.bind(&address.into()).expect_err("the port is reserved");
    assert_eq!((taken.kind(), line.accepted()), (ErrorKind::AddrInUse, 1));
    line.set(Passage::Refused).unwrap();
    line.set(Passage::Open).unwrap();
    echoed(&device(&line), b"x");

    let port = line.port();
    let taken = Line::open(runtime.handle().clone(), Some(port), 1).unwrap_err();
    assert!(xtask_core::error::Kind::Host.is(&taken), "{taken:#}");
    drop(line);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let again = Line::open(runtime.handle().clone(), Some(port), echo(b"")).unwrap();
    echoed(&device(&again), b"x");
}

#[test]
fn a_delay_and_a_rate_also_apply_to_an_existing_connection() {
    const DELAY: Duration = Duration::from_millis(400);
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"")).unwrap();
    let device = device(&line);
    let taken = |passage, bytes: &[u8]| {
        line.set(passage).unwrap();
        let start = Instant::now();
        echoed(&device, bytes);
        start.elapsed()
    };
    echoed(&device, b"x");
    let delayed = taken(Passage::Delayed(DELAY), b"x");
    assert!(delayed >= 2 * DELAY, "the delay holds in each direction: {delayed:?}");
    let many = taken(Passage::Delayed(DELAY), &vec![1; 100 * 16_384]);
    assert!(many < 100 * DELAY / 2, "the delay does not limit the rate: {many:?}");
    let limited = taken(Passage::Limited(20_000), &[2; 20_000]);
    assert!(limited >= Duration::from_millis(950), "at most a twentieth passes at once: {limited:?}");
    let tiny = taken(Passage::Limited(0), b"abc");
    assert!(tiny >= Duration::from_secs(2), "the rate is at least a byte in a second: {tiny:?}");
    echoed(&device, b"x");
}

#[test]
fn the_portal_is_another_server() {
    let runtime = runtime();
    let line = Line::open(runtime.handle().clone(), None, echo(b"server")).unwrap();
    let missing = line.set(Passage::Portal).unwrap_err();
    assert!(format!("{missing:#}").contains("open the portal first"), "{missing:#}");
    line.lead_to(echo(b"portal"));
    let greeted = |word: &[u8]| {
        let device = device(&line);
        let mut greeting = [0; 6];
        (&device).read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, word);
        device
    };
    let of_server = greeted(b"server");
    line.set(Passage::Portal).unwrap();
    assert!(is_reset(&of_server));
    let of_portal = greeted(b"portal");
    line.set(Passage::Open).unwrap();
    assert!(is_reset(&of_portal));
    greeted(b"server");
}

#[test]
fn a_server_that_is_gone_resets_the_connection() {
    let runtime = runtime();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let line = Line::open(runtime.handle().clone(), None, gone).unwrap();
    assert!(is_reset(&device(&line)));
    assert_eq!(line.accepted(), 1);
}
