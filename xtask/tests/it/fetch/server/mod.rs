//! A real HTTP server on loopback. It misbehaves as a test requests, to imitate the faults that a download may meet.

pub(crate) mod client;
pub(crate) mod proxy;
pub(crate) mod tls;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256, Sha512};

/// The content of a download.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) etag: &'static str,
}

impl Image {
    /// Makes pseudorandom bytes. They differ between seeds.
    pub(crate) fn new(length: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(length);
        Self { bytes: Arc::new(bytes), etag: "\"one\"" }
    }

    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns the digest, which is not computed by the code under test.
    pub(crate) fn sha256(&self) -> String {
        format!("sha256:{}", hex(&Sha256::digest(&*self.bytes)))
    }

    pub(crate) fn sha512(&self) -> String {
        format!("sha512:{}", hex(&Sha512::digest(&*self.bytes)))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request that the server received; `sent` is the number of body bytes in the answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) target: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) sent: u64,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Returns the first byte of the requested range.
    pub(crate) fn range(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// An answer, and the way in which it goes wrong.
#[derive(Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// The number of body bytes after which the answer is cut, if it is cut.
    pub(crate) cut: Option<usize>,
    /// True if the server then sends nothing more but keeps the connection open.
    pub(crate) hang: bool,
    /// True if the body is sent in chunks, without a length.
    pub(crate) chunked: bool,
    /// The limit in bytes per second.
    pub(crate) rate: Option<usize>,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        let (headers, body) = (Vec::new(), b"sorry".to_vec());
        Self { status, headers, body, cut: None, hang: false, chunked: false, rate: None }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Answers with the whole image, even if a range was requested.
    pub(crate) fn whole(image: &Image) -> Self {
        let body = image.bytes.to_vec();
        Self { body, ..Self::status(200) }.header("etag", image.etag)
    }

    /// Answers like a correct server: with the range if the version is still the same, or else with the whole image.
    pub(crate) fn file(image: &Image, request: &Request) -> Self {
        match request.range() {
            Some(from) if request.header("if-range") == Some(image.etag) => Self::part(image, from, from),
            _ => Self::whole(image),
        }
    }

    /// Answers with the bytes from `from` on. The header says that they begin at `message`, which may be wrong.
    pub(crate) fn part(image: &Image, from: usize, message: usize) -> Self {
        let range = format!("bytes {message}-{}/{}", image.len() - 1, image.len());
        let body = image.bytes[from..].to_vec();
        Self { body, ..Self::status(206) }.header("etag", image.etag).header("content-range", range)
    }

    pub(crate) fn redirect(to: impl Into<String>) -> Self {
        Self::status(302).header("location", to)
    }

    pub(crate) fn cut(self, at: usize) -> Self {
        Self { cut: Some(at), ..self }
    }

    pub(crate) fn hang(self, at: usize) -> Self {
        Self { cut: Some(at), hang: true, ..self }
    }

    pub(crate) fn chunked(self) -> Self {
        Self { chunked: true, ..self }
    }

    pub(crate) fn rate(self, bytes_per_second: usize) -> Self {
        Self { rate: Some(bytes_per_second), ..self }
    }
}

type Script = dyn Fn(usize, &Request) -> Reply + Send + Sync;

/// A server that listens until the test's process ends.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    scheme: &'static str,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Starts a server. `script` gets each request and its number, counted from 0.
    pub(crate) fn start(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen("http", script, |stream| Box::new(stream))
    }

    pub(crate) fn start_tls(
        ca: &tls::Ca,
        script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let config = ca.server_config();
        Self::listen("https", script, move |stream| tls::accept(&config, stream))
    }

    fn listen(
        scheme: &'static str,
        script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
        wrap: impl Fn(TcpStream) -> Box<dyn Stream> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (all, script, wrap): (_, Arc<Script>, _) = (Arc::clone(&seen), Arc::new(script), Arc::new(wrap));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (all, script, wrap) = (Arc::clone(&all), Arc::clone(&script), Arc::clone(&wrap));
                // In many tests the client closes the connection early. That ends the thread of the connection.
                std::thread::spawn(move || serve(wrap(stream.unwrap()), &all, &*script));
            }
        });
        Self { address, scheme, seen }
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}/image", self.scheme, self.address)
    }

    /// Returns every request so far.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the number of body bytes of all answers.
    pub(crate) fn sent(&self) -> u64 {
        self.seen().iter().map(|request| request.sent).sum()
    }
}

pub(crate) trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Reads the first line and the headers of a request. Returns `None` if the connection ends before the first line.
pub(crate) fn read_head(stream: &mut dyn BufRead) -> Option<(String, BTreeMap<String, String>)> {
    let mut lines = stream.lines().map_while(|line| line.ok().filter(|line| !line.is_empty()));
    let first = lines.next()?;
    let pairs = lines.filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_lowercase(), value.to_owned()))
    });
    Some((first, pairs.collect()))
}

fn serve(stream: Box<dyn Stream>, all: &Mutex<Vec<Request>>, script: &Script) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let (line, headers) = read_head(&mut stream)?;
    let request = Request { target: line.split(' ').nth(1)?.to_owned(), headers, sent: 0 };
    let number = {
        let mut all = all.lock().unwrap();
        all.push(request.clone());
        all.len() - 1
    };
    let reply = script(number, &request);
    let out = stream.get_mut();
    let mut head = format!("HTTP/1.1 {} Scripted\r\nconnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&if reply.chunked {
        "transfer-encoding: chunked\r\n\r\n".to_owned()
    } else {
        format!("content-length: {}\r\n\r\n", reply.body.len())
    });
    out.write_all(head.as_bytes()).ok()?;
    let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    send(out.as_mut(), &reply, end, |count| all.lock().unwrap()[number].sent += count)?;
    if reply.hang {
        out.flush().ok()?;
        std::thread::sleep(Duration::from_secs(600));
    }
    if reply.chunked && reply.cut.is_none() {
        out.write_all(b"0\r\n\r\n").ok()?;
    }
    out.flush().ok()
}

fn send(out: &mut dyn Stream, reply: &Reply, end: usize, mut sent: impl FnMut(u64)) -> Option<()> {
    let started = Instant::now();
    let mut done = 0;
    for piece in reply.body[..end].chunks(16 << 10) {
        if reply.chunked {
            write!(out, "{:x}\r\n", piece.len()).ok()?;
        }
        out.write_all(piece).ok()?;
        if reply.chunked {
            out.write_all(b"\r\n").ok()?;
        }
        done += piece.len();
        sent(piece.len() as u64);
        if let Some(rate) = reply.rate {
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    Some(())
}
