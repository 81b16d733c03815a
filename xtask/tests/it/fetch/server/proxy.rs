//! An HTTP proxy. It relays absolute-form requests for http and CONNECT for https, or refuses every request.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::read_head;

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// Starts a proxy. With `refusal`, it answers every request with that status.
    pub(crate) fn start(refusal: Option<u16>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&lines);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let all = Arc::clone(&all);
                std::thread::spawn(move || relay(stream.unwrap(), refusal, &all));
            }
        });
        Self { address, lines }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the first line of every request.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

fn relay(stream: TcpStream, refusal: Option<u16>, all: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (line, headers) = read_head(&mut reader)?;
    all.lock().unwrap().push(line.clone());
    let mut stream = stream;
    if let Some(status) = refusal {
        return write!(stream, "HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n").ok();
    }
    let mut words = line.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    if method == "CONNECT" {
        let there = TcpStream::connect(target).ok()?;
        stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").ok()?;
        let (mut from, mut to) = (there.try_clone().unwrap(), stream.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        std::io::copy(&mut reader, &mut &there).ok()?;
        return Some(());
    }
    let (host, path) = target.strip_prefix("http://")?.split_once('/')?;
    let mut there = TcpStream::connect(host).ok()?;
    write!(there, "{method} /{path} HTTP/1.1\r\n").ok()?;
    for (name, value) in headers {
        write!(there, "{name}: {value}\r\n").ok()?;
    }
    there.write_all(b"\r\n").ok()?;
    std::io::copy(&mut there, &mut stream).ok().map(drop)
}
