//! Serves the hosts of both publishers on loopback: listings, lists of digests and a signature, from `test_data/bump/`.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub(crate) const SUMS: &str = "/releases/noble/release-20260905/SHA256SUMS";
pub(crate) const SIGNATURE: &str = "/releases/noble/release-20260905/SHA256SUMS.gpg";
pub(crate) const UBUNTU_INDEX: &str = "/releases/noble/";
pub(crate) const DEBIAN_SUMS: &str = "/images/cloud/bookworm/20260712-2537/SHA512SUMS";
pub(crate) const DEBIAN_FILE: &str =
    "/images/cloud/bookworm/20260712-2537/debian-12-genericcloud-arm64-20260712-2537.qcow2";
/// The answer of a host.
#[derive(Clone)]
pub(crate) enum Answer {
    Content(Vec<u8>),
    /// The answer for an image. The tests request only its length. `None` means that the host does not tell the
    /// length.
    Length(Option<u64>),
    Status(&'static str),
}

type Answers = Arc<Mutex<HashMap<String, Answer>>>;

/// A server for the hosts of both publishers.
pub(crate) struct Publisher {
    pub(crate) address: String,
    answers: Answers,
}

impl Publisher {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let content = |path: &str| Answer::Content(std::fs::read(data(path)).unwrap());
        let image =
            |arch: &str| format!("/releases/noble/release-20260905/ubuntu-24.04-server-cloudimg-{arch}.img");
        let answers = HashMap::from([
            (UBUNTU_INDEX.to_owned(), content("ubuntu/index.html")),
            (SUMS.to_owned(), content("ubuntu/release-20260905/SHA256SUMS")),
            (SIGNATURE.to_owned(), content("ubuntu/release-20260905/SHA256SUMS.gpg")),
            (image("amd64"), Answer::Length(Some(612_345_678))),
            (image("arm64"), Answer::Length(Some(598_765_432))),
            ("/images/cloud/bookworm/".to_owned(), content("debian/index.html")),
            (DEBIAN_SUMS.to_owned(), content("debian/20260712-2537/SHA512SUMS")),
            (DEBIAN_FILE.to_owned(), Answer::Length(None)),
        ]);
        let answers = Arc::new(Mutex::new(answers));
        let shared = Arc::clone(&answers);
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &shared);
            }
        });
        Self { address, answers }
    }

    pub(crate) fn serve(&self, path: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(path.to_owned(), answer);
    }

    /// Replaces `from` by `to` in the content that is served at `path`.
    pub(crate) fn serve_changed(&self, path: &str, from: &str, to: &str) {
        let Some(Answer::Content(content)) = self.answers.lock().unwrap().get(path).cloned() else {
            panic!("no content is served at {path}");
        };
        let text = String::from_utf8(content).unwrap();
        assert!(text.contains(from), "{path} has no {from}");
        self.serve(path, Answer::Content(text.replace(from, to).into_bytes()));
    }
}

/// Answers one request of a connection and closes it.
fn answer(mut stream: TcpStream, answers: &Answers) {
    let mut head = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = head.next() else { return };
    head.take_while(|line| !line.is_empty()).for_each(drop);
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let known = answers.lock().unwrap().get(path).cloned();
    let (status, length, body) = match known {
        Some(Answer::Content(content)) => ("200 OK", Some(content.len() as u64), content),
        Some(Answer::Length(length)) => ("200 OK", length, Vec::new()),
        Some(Answer::Status(status)) => (status, Some(0), Vec::new()),
        None => ("404 Not Found", Some(0), Vec::new()),
    };
    let length = length.map_or_else(String::new, |length| format!("Content-Length: {length}\r\n"));
    let body = if method == "HEAD" { Vec::new() } else { body };
    // An error means that the client has read enough and closed the connection.
    _ = write!(stream, "HTTP/1.1 {status}\r\n{length}Connection: close\r\n\r\n")
        .and_then(|()| stream.write_all(&body));
}

pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data/bump").join(path)
}
