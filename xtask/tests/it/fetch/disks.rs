//! Downloads to disks that are full or read-only: small file systems in a mount namespace, which any user can make.

use std::process::Command;

use super::server::client::{Client, Ended, assert_says, clean, ended};
use super::server::{Image, Reply, Server};
use crate::scratch::XTASK_VM;

const MIB: usize = 1 << 20;

/// Downloads to a tmpfs that ends with the child. Returns the result, and the names of the files that the download has
/// left.
fn fetch_to_tmpfs(
    client: &Client,
    options: &str,
    then: &str,
    url: &str,
    digest: &str,
) -> (Ended, Vec<String>) {
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs \"$DISK\" && {then} && {{ \"$0\" \"$@\"; code=$?; echo left: 1>&2; \
         ls -A \"$DISK\" 1>&2; exit $code; }}"
    );
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script, XTASK_VM]);
    command.args(client.arguments(url, Some(digest))).env("DISK", client.target().parent().unwrap());
    clean(&mut command);
    let ended = ended(&command.output().unwrap());
    let (message, left) = ended.message.split_once("left:\n").unwrap_or_else(|| panic!("{}", ended.message));
    let left = left.lines().map(str::to_owned).collect();
    (Ended { message: message.to_owned(), ..ended }, left)
}

#[test]
fn what_would_not_fit_is_refused_before_it_comes() {
    let (client, image) = (Client::new(), Image::new(12 * MIB, 41));
    let good = image.clone();
    // The server is slow, so that the bytes that it sent show how much the client received.
    let server = Server::start(move |_, request| Reply::file(&good, request).rate(8 * MIB));
    let (ended, left) = fetch_to_tmpfs(&client, "size=24m", "true", &server.url(), &image.sha256());
    assert_says(&ended, 69, &["24 MiB free, 28 MiB needed", "free space in"]);
    assert_eq!(left, Vec::<String>::new());
    assert!(server.sent() < 4 << 20, "{} bytes were sent", server.sent());
    let (ended, left) = fetch_to_tmpfs(&client, "size=32m", "true", &server.url(), &image.sha256());
    assert_eq!((ended.code, left), (Some(0), vec!["image".to_owned()]), "{}", ended.message);
}

#[test]
fn a_disk_that_gets_full_is_not_left_full() {
    let (client, image) = (Client::new(), Image::new(12 * MIB, 42));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request).chunked());
    let (ended, left) = fetch_to_tmpfs(&client, "size=8m", "true", &server.url(), &image.sha256());
    let partial = client.path("image.partial");
    assert_says(&ended, 69, &["the disk is full", "free space in", partial.to_str().unwrap()]);
    assert_eq!(left, Vec::<String>::new());
    assert_eq!(server.seen().len(), 1, "another attempt would end the same way");
}

#[test]
fn a_read_only_disk_is_named() {
    let (client, image) = (Client::new(), Image::new(1000, 43));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request));
    let then = "mount -o remount,ro \"$DISK\"";
    let (ended, left) = fetch_to_tmpfs(&client, "size=8m", then, &server.url(), &image.sha256());
    assert_says(&ended, 69, &["Read-only file system", "may write to", client.target().to_str().unwrap()]);
    assert_eq!((left, server.seen().len()), (Vec::<String>::new(), 0));
}
