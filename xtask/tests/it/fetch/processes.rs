//! Tests the downloading process: two at once, killed, and interrupted.

use std::io::Read as _;
use std::time::Duration;

use rustix::process::Signal;

use super::server::client::{Client, ended};
use super::server::{Image, Reply, Server};
use crate::scratch::{random, signal, wait_until};

const MIB: usize = 1 << 20;
/// The limit of a wait; it is long because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn two_at_once_download_once() {
    let (client, image) = (Client::new(), Image::new(2 * MIB, 31));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request).rate(2 * MIB));
    let children = [(); 2].map(|()| client.start(&server.url(), &image.sha256()));
    for child in children {
        client.assert_whole(&ended(&child.wait_with_output().unwrap()), &image);
    }
    assert_eq!((server.seen().len(), server.sent()), (1, image.len()));
}

#[test]
fn killed_at_any_moment_the_next_run_goes_on() {
    let (client, image) = (Client::new(), Image::new(16 * MIB, 32));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request).rate(3 * MIB));
    for _ in 0..10 {
        let mut child = client.start(&server.url(), &image.sha256());
        std::thread::sleep(Duration::from_millis(random("killed after ms, modulo 600:") % 600));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!client.target().exists(), "16 MiB at 3 MiB/s are not there after 6 s");
        let partial = std::fs::read(client.path("image.partial")).unwrap_or_default();
        assert!(partial == image.bytes[..partial.len()], "other bytes");
    }
    let there = client.path("image.partial").metadata().unwrap().len();
    assert!(there > 0, "none of ten runs received anything");
    let before = server.seen().len();
    client.assert_whole(
        &ended(&client.start(&server.url(), &image.sha256()).wait_with_output().unwrap()),
        &image,
    );
    assert_eq!(server.seen()[before].range().map(|from| from as u64), Some(there));
}

#[test]
fn ctrl_c_keeps_what_has_come() {
    let (client, image) = (Client::new(), Image::new(4 * MIB, 33));
    let good = image.clone();
    let server = Server::start(move |number, request| match number {
        0 => Reply::file(&good, request).hang(MIB),
        _ => Reply::file(&good, request),
    });
    let mut child = client.start(&server.url(), &image.sha256());
    let length = || client.path("image.partial").metadata().map_or(0, |meta| meta.len());
    wait_until("the first MiB arrives", PATIENCE, || length() >= MIB as u64);
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert!(
        message.contains("interrupted") && message.contains("kept 1024 KiB of the download"),
        "{message}"
    );
    assert_eq!(client.names(), ["image.partial", "image.partial.json"]);
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!(server.seen()[1].range(), Some(MIB));
}

#[test]
fn ctrl_c_before_the_first_byte_leaves_nothing() {
    let (client, image) = (Client::new(), Image::new(MIB, 34));
    let server = Server::start(move |_, request| Reply::file(&image, request).hang(0));
    let child = client.start(&server.url(), &Image::new(1, 1).sha256());
    wait_until("the request arrives", PATIENCE, || !server.seen().is_empty());
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(client.names(), Vec::<String>::new());
}
