//! Tests downloads by the real `xtask-vm` from a real server, which misbehaves as each test requests. In every case,
//! the file with the final name is the whole image, or there is no such file.

mod disks;
mod processes;
mod routes;
mod server;

use std::time::{Duration, Instant};

use self::server::client::Client;
use self::server::{Image, Reply, Server};
use crate::scratch::random;

const MIB: usize = 1 << 20;

#[test]
fn a_whole_download() {
    let (client, image) = (Client::new(), Image::new(3 * MIB + 7, 1));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request));
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!((server.seen().len(), server.sent()), (1, image.len()));
    assert_eq!(server.seen()[0].range(), None);

    // An existing file is hashed, and not downloaded again. If the digest differs, the command fails.
    client.assert_whole(&client.fetch(&server.url(), &image.sha512()), &image);
    let other = Image::new(10, 2).sha256();
    let ended = client.fetch(&server.url(), &other);
    assert_eq!(ended.code, Some(69), "{}", ended.message);
    assert!(ended.message.contains(&other) && ended.message.contains(&image.sha256()), "{}", ended.message);
    assert_eq!((server.seen().len(), client.names()), (1, vec!["image".to_owned()]));
}

#[test]
fn a_sha512_is_verified_as_well() {
    let (client, image) = (Client::new(), Image::new(MIB, 3));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request).chunked());
    let wrong = Image::new(1, 4).sha512();
    client.assert_refused(&client.fetch(&server.url(), &wrong), 69, &[&wrong, &image.sha512()]);
    client.assert_whole(&client.fetch(&server.url(), &image.sha512()), &image);
}

#[test]
fn a_cut_at_a_random_byte_is_resumed_there() {
    for chunked in [false, true] {
        let (client, image) = (Client::new(), Image::new(2 * MIB, 5));
        let cut = random("cut at, modulo 2 MiB:") as usize % (2 * MIB - 1) + 1;
        let good = image.clone();
        let server = Server::start(move |number, request| {
            let reply = Reply { chunked, ..Reply::file(&good, request) };
            if number == 0 { reply.cut(cut) } else { reply }
        });
        client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
        let seen = server.seen();
        assert_eq!(seen.len(), 2, "{seen:?}");
        // If the connection was cut within a chunk, the client may have dropped the end of the chunk.
        let from = seen[1].range().unwrap();
        assert!(from == cut || chunked && from < cut, "{from} after {cut}");
        assert_eq!(seen[1].header("if-range"), Some(image.etag));
        assert_eq!((seen[0].sent, seen[1].sent), (cut as u64, image.len() - from as u64));
    }
}

#[test]
fn without_ranges_it_starts_over() {
    let (client, image) = (Client::new(), Image::new(MIB, 6));
    let good = image.clone();
    let server = Server::start(move |number, _| match number {
        0 => Reply::whole(&good).cut(MIB / 2),
        _ => Reply::whole(&good),
    });
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!(server.seen()[1].range(), Some(MIB / 2));
    assert_eq!(server.seen()[1].sent, image.len());
}

#[test]
fn without_a_validator_nothing_is_resumed() {
    let (client, image) = (Client::new(), Image::new(MIB, 7));
    let good = image.clone();
    let server = Server::start(move |number, request| {
        let mut reply = Reply::file(&good, request);
        reply.headers.retain(|(name, _)| *name != "etag");
        if number == 0 { reply.cut(MIB / 2) } else { reply }
    });
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!((server.seen()[1].range(), server.seen()[1].sent), (None, image.len()));
}

#[test]
fn a_file_that_changes_meanwhile_starts_over() {
    let new = Image { etag: "\"two\"", ..Image::new(MIB + 5, 9) };
    // The replies of a correct server, of one that ignores If-Range, of one that sends another range than requested,
    // and of one that refuses the range.
    let table: [fn(&Image, usize) -> Reply; 4] = [
        |new, _| Reply::whole(new),
        |new, from| Reply::part(new, from, from),
        |new, from| Reply::part(new, 0, from + 1),
        |_, _| Reply::status(416),
    ];
    for answer in table {
        let (client, old, changed) = (Client::new(), Image::new(MIB, 8), new.clone());
        let server = Server::start(move |number, request| match (number, request.range()) {
            (0, _) => Reply::whole(&old).cut(MIB / 3),
            (_, Some(from)) => answer(&changed, from),
            (_, None) => Reply::whole(&changed),
        });
        let ended = client.fetch(&server.url(), &new.sha256());
        client.assert_whole(&ended, &new);
        assert!(server.seen().len() <= 3, "{}", ended.message);
        assert_eq!(server.seen()[1].range(), Some(MIB / 3));
    }
}

#[test]
fn a_stall_is_noticed_and_resumed() {
    let (client, image) = (Client::new(), Image::new(MIB, 10));
    let good = image.clone();
    let server = Server::start(move |number, request| match number {
        0 => Reply::file(&good, request).hang(MIB / 4),
        _ => Reply::file(&good, request),
    });
    let started = Instant::now();
    let ended = client.fetch(&server.url(), &image.sha256());
    client.assert_whole(&ended, &image);
    assert!(started.elapsed() > Duration::from_millis(1400), "a stall of {:?}", started.elapsed());
    assert!(ended.message.contains("received nothing for"), "{}", ended.message);
    assert_eq!(server.seen()[1].range(), Some(MIB / 4));
}

#[test]
fn a_wrong_digest_leaves_nothing() {
    let (client, image) = (Client::new(), Image::new(MIB, 11));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request));
    let wrong = Image::new(MIB, 12).sha256();
    client.assert_refused(&client.fetch(&server.url(), &wrong), 69, &[&wrong, &image.sha256()]);
    assert_eq!(server.seen().len(), 1, "another attempt would get the same bytes");
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
}

#[test]
fn a_partial_file_that_was_damaged_is_found_out() {
    let (client, image) = (Client::new(), Image::new(MIB, 13));
    let good = image.clone();
    let server = Server::start(move |number, request| match number {
        0..6 => Reply::file(&good, request).cut(if number == 0 { MIB / 2 } else { 0 }),
        _ => Reply::file(&good, request),
    });
    // One attempt receives the first half, and five more receive nothing. The half is kept.
    let ended = client.fetch(&server.url(), &image.sha256());
    assert_eq!(ended.code, Some(69), "{}", ended.message);
    assert_eq!(client.names(), ["image.partial", "image.partial.json"]);
    let mut bytes = std::fs::read(client.path("image.partial")).unwrap();
    assert_eq!(bytes, image.bytes[..MIB / 2]);
    bytes[100] ^= 1;
    std::fs::write(client.path("image.partial"), &bytes).unwrap();
    let ended = client.fetch(&server.url(), &image.sha256());
    client.assert_refused(&ended, 69, &[&image.sha256(), "run again: it starts from the beginning"]);
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
}

#[test]
fn what_is_of_another_download_is_not_used() {
    let (client, image) = (Client::new(), Image::new(MIB, 14));
    let good = image.clone();
    let server = Server::start(move |_, request| Reply::file(&good, request));
    let url = server.url();
    let right = image.sha256();
    let notes = [
        format!(r#"{{"url":"{url}?v=2","digest":"{right}","validator":"\"one\"","total":null}}"#),
        format!(r#"{{"url":"{url}","digest":null,"validator":"\"one\"","total":null}}"#),
        format!(r#"{{"url":"{url}","digest":"{right}","validator":null,"total":null}}"#),
        format!(r#"{{"url":"{url}","digest":"{right}","validator":"\"one\"","total":99}}"#),
        "{".to_owned(),
    ];
    for note in notes {
        std::fs::write(client.path("image.partial"), &image.bytes[..1000]).unwrap();
        std::fs::write(client.path("image.partial.json"), &note).unwrap();
        let before = server.seen().len();
        client.assert_whole(&client.fetch(&url, &right), &image);
        assert_eq!(server.seen()[before].range(), None, "{note}");
        std::fs::remove_file(client.target()).unwrap();
    }
    // The same file is used if its note matches, so the files above were refused because of their notes.
    std::fs::write(client.path("image.partial"), &image.bytes[..1000]).unwrap();
    let note = format!(r#"{{"url":"{url}","digest":"{right}","validator":"\"one\"","total":{MIB}}}"#);
    std::fs::write(client.path("image.partial.json"), note).unwrap();
    client.assert_whole(&client.fetch(&url, &right), &image);
    assert_eq!(server.seen().last().unwrap().range(), Some(1000));
}

#[test]
fn what_is_whole_already_needs_no_server() {
    let (client, image) = (Client::new(), Image::new(MIB, 15));
    let server = Server::start(|_, _| Reply::status(500));
    std::fs::write(client.path("image.partial"), &*image.bytes).unwrap();
    let note = format!(
        r#"{{"url":"{}","digest":"{}","validator":null,"total":null}}"#,
        server.url(),
        image.sha256()
    );
    std::fs::write(client.path("image.partial.json"), note).unwrap();
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!(server.seen().len(), 0);
}

#[test]
fn a_status_that_will_stay_is_not_tried_again() {
    for status in [400, 401, 403, 404, 410, 416, 501] {
        let client = Client::new();
        let server = Server::start(move |_, _| Reply::status(status));
        let ended = client.fetch(&server.url(), &Image::new(1, 1).sha256());
        client.assert_refused(&ended, 69, &[&format!("the server answers {status}")]);
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[test]
fn a_status_that_may_pass_is_tried_again_but_not_forever() {
    for status in [408, 425, 429, 500, 502, 503, 504] {
        let (client, image) = (Client::new(), Image::new(MIB, 16));
        let good = image.clone();
        let server = Server::start(move |number, request| match number {
            0 => Reply::status(status).header("retry-after", "0"),
            _ => Reply::file(&good, request),
        });
        client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
        assert_eq!(server.seen().len(), 2, "{status}");
    }
    let client = Client::new();
    let server = Server::start(|_, _| Reply::status(503));
    let ended = client.fetch(&server.url(), &Image::new(1, 1).sha256());
    client.assert_refused(&ended, 69, &["the server answers 503", "5 attempts"]);
    assert_eq!(server.seen().len(), 5);
}

#[test]
fn the_servers_wish_for_patience_is_heard() {
    let (client, image) = (Client::new(), Image::new(100, 17));
    let good = image.clone();
    let server = Server::start(move |number, request| match number {
        0 => Reply::status(429).header("retry-after", "2"),
        _ => Reply::file(&good, request),
    });
    let started = Instant::now();
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert!(started.elapsed() > Duration::from_secs(2), "{:?}", started.elapsed());
}
