//! Tests the way to the server: TLS, redirects, proxies, credentials, and a server that cannot be reached.

use std::net::TcpListener;

use super::server::client::{Client, Ended, assert_says, ended};
use super::server::proxy::Proxy;
use super::server::tls::Ca;
use super::server::{Image, Reply, Server};

/// Downloads with additional environment variables.
fn fetch(client: &Client, url: &str, digest: Option<&str>, environment: &[(&str, &str)]) -> Ended {
    ended(&client.command(url, digest).envs(environment.iter().copied()).output().unwrap())
}

/// Makes a CA with this name, and a file with its certificate.
fn trusted(name: &str) -> (Ca, tempfile::TempPath) {
    let (ca, file) = (Ca::new(name), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(&file, ca.pem()).unwrap();
    (ca, file.into_temp_path())
}

#[test]
fn https_by_a_ca_of_its_own_and_by_nobody_elses() {
    let (client, image) = (Client::new(), Image::new(3 << 20, 21));
    let (ca, pem) = trusted("a test's own");
    let good = image.clone();
    let server = Server::start_tls(&ca, move |_, request| Reply::file(&good, request));
    // Neither another CA nor a missing file of root certificates verifies the server.
    let (_other, other_pem) = trusted("another");
    let ended = fetch(
        &client,
        &server.url(),
        Some(&image.sha256()),
        &[("SSL_CERT_FILE", other_pem.to_str().unwrap())],
    );
    client.assert_refused(&ended, 69, &["reach https://127.0.0.1", "UnknownIssuer", "SSL_CERT_FILE"]);
    let ended = fetch(&client, &server.url(), Some(&image.sha256()), &[("SSL_CERT_FILE", "/nonexistent")]);
    client.assert_refused(&ended, 69, &["TLS", "ca-certificates"]);
    assert_eq!(server.seen().len(), 0);
    // Over https, `--unverified` accepts any content.
    let ended = fetch(&client, &server.url(), None, &[("SSL_CERT_FILE", pem.to_str().unwrap())]);
    client.assert_whole(&ended, &image);
}

#[test]
fn what_nobody_could_verify_is_a_usage_error() {
    let client = Client::new();
    let server = Server::start(|_, _| Reply::status(200));
    let digest = Image::new(1, 1).sha256();
    let ended = fetch(&client, &server.url(), None, &[]);
    client.assert_refused(&ended, 2, &["plain http", "give its digest"]);
    for url in ["file:///etc/hostname", "ftp://127.0.0.1/image"] {
        client.assert_refused(&client.fetch(url, &digest), 2, &["https"]);
    }
    let ended = fetch(&client, &server.url(), Some(&digest), &[("IOT_XTASK_FETCH_PACE", "soon")]);
    client.assert_refused(&ended, 2, &["IOT_XTASK_FETCH_PACE=soon"]);
    assert_eq!(server.seen().len(), 0);
}

#[test]
fn redirects_are_followed_ten_times_and_never_around() {
    let (client, image) = (Client::new(), Image::new(1 << 20, 22));
    let good = image.clone();
    let server = Server::start(move |number, request| match request.target.as_str() {
        "/image" => Reply::redirect("/mirror/1"),
        "/mirror/9" if number < 12 => Reply::file(&good, request).cut(1000),
        "/mirror/9" => Reply::file(&good, request),
        "/around" => Reply::redirect("/about"),
        "/about" => Reply::redirect("/around"),
        path => {
            let (before, number) = path.rsplit_once('/').unwrap();
            Reply::redirect(format!("{before}/{}", number.parse::<u32>().unwrap() + 1))
        }
    });
    client.assert_whole(&client.fetch(&server.url(), &image.sha256()), &image);
    assert_eq!(server.seen().last().unwrap().range(), Some(1000), "the range goes along");

    let client = Client::new();
    let around = server.url().replace("/image", "/around");
    client.assert_refused(&client.fetch(&around, &image.sha256()), 69, &["a redirect loop", "/around"]);
    let endless = server.url().replace("/image", "/endless/1");
    let before = server.seen().len();
    client.assert_refused(&client.fetch(&endless, &image.sha256()), 69, &["more than 10 redirects"]);
    assert_eq!(server.seen().len() - before, 11);
}

#[test]
fn a_redirect_from_https_to_http_is_refused() {
    let (client, image) = (Client::new(), Image::new(1000, 23));
    let (ca, pem) = trusted("a test's own");
    let good = image.clone();
    let plain = Server::start(move |_, request| Reply::file(&good, request));
    let to = plain.url();
    let server = Server::start_tls(&ca, move |_, _| Reply::redirect(to.clone()));
    let ended =
        fetch(&client, &server.url(), Some(&image.sha256()), &[("SSL_CERT_FILE", pem.to_str().unwrap())]);
    client.assert_refused(&ended, 69, &["a redirect from https to http://"]);
    assert_eq!(plain.seen().len(), 0);
}

#[test]
fn proxies_of_the_environment_are_used() {
    let (client, image) = (Client::new(), Image::new(1 << 20, 24));
    let (ca, pem) = trusted("a test's own");
    let (good, digest) = (image.clone(), image.sha256());
    let plain = Server::start(move |_, request| Reply::file(&good, request));
    let good = image.clone();
    let tls = Server::start_tls(&ca, move |_, request| Reply::file(&good, request));
    let proxy = Proxy::start(None);
    let host = format!("127.0.0.1:{}", tls.address.port());
    let table = [
        (plain.url(), "HTTP_PROXY", format!("GET {} HTTP/1.1", plain.url())),
        (plain.url(), "http_proxy", format!("GET {} HTTP/1.1", plain.url())),
        (tls.url(), "HTTPS_PROXY", format!("CONNECT {host} HTTP/1.1")),
        (tls.url(), "https_proxy", format!("CONNECT {host} HTTP/1.1")),
    ];
    for (number, (url, variable, line)) in table.iter().enumerate() {
        let environment = [(*variable, &*proxy.url()), ("SSL_CERT_FILE", pem.to_str().unwrap())];
        client.assert_whole(&fetch(&client, url, Some(&digest), &environment), &image);
        assert_eq!(proxy.lines().len(), number + 1, "{variable}");
        assert_eq!(proxy.lines().last(), Some(line));
        std::fs::remove_file(client.target()).unwrap();
    }
    for variable in ["NO_PROXY", "no_proxy"] {
        let environment = [("HTTP_PROXY", &*proxy.url()), (variable, "127.0.0.1")];
        client.assert_whole(&fetch(&client, &plain.url(), Some(&digest), &environment), &image);
        assert_eq!(proxy.lines().len(), table.len(), "{variable}");
        std::fs::remove_file(client.target()).unwrap();
    }
}

#[test]
fn a_proxy_that_refuses_is_named() {
    let (client, digest) = (Client::new(), Image::new(1, 1).sha256());
    let (ca, pem) = trusted("a test's own");
    let tls = Server::start_tls(&ca, |_, _| Reply::status(200));
    let plain = Server::start(|_, _| Reply::status(200));
    let table = [
        (407, tls.url(), "HTTPS_PROXY", 1),
        // hyper reports every other status in the same way as a 503, which may be temporary.
        (403, tls.url(), "HTTPS_PROXY", 5),
        (407, plain.url(), "HTTP_PROXY", 1),
    ];
    for (status, url, variable, requests) in table {
        let proxy = Proxy::start(Some(status));
        let address = proxy.url().replace("http://", "http://user:secret@");
        let ended = fetch(
            &client,
            &url,
            Some(&digest),
            &[(variable, &address), ("SSL_CERT_FILE", pem.to_str().unwrap())],
        );
        client.assert_refused(&ended, 69, &["reach http", "the proxy", "check HTTPS_PROXY"]);
        assert!(!ended.message.contains("secret"), "{}", ended.message);
        assert_eq!(proxy.lines().len(), requests, "{status}");
    }
    assert_eq!((tls.seen().len(), plain.seen().len()), (0, 0));
}

#[test]
fn nobody_there_is_tried_again_and_said() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (client, digest) = (Client::new(), Image::new(1, 1).sha256());
    let ended = client.fetch(&format!("http://{nobody}/image"), &digest);
    client.assert_refused(&ended, 69, &[&format!("reach http://{nobody}/image"), "refused", "5 attempts"]);
    let ended = client.fetch("http://no-such-host.invalid/image", &digest);
    client.assert_refused(&ended, 69, &["reach http://no-such-host.invalid"]);
    let proxy = [("HTTPS_PROXY", &*format!("http://user:secret@{nobody}"))];
    let ended = fetch(&client, "https://no-such-host.invalid/image", Some(&digest), &proxy);
    let words = format!("through the proxy http://{nobody} of the environment");
    client.assert_refused(&ended, 69, &[&words, "refused", "check HTTPS_PROXY"]);
    assert!(!ended.message.contains("secret"), "{}", ended.message);
}

#[test]
fn credentials_reach_the_server_and_nobody_else() {
    let (client, image) = (Client::new(), Image::new(1 << 20, 25));
    let good = image.clone();
    let server = Server::start(move |number, request| match number {
        0 => Reply::file(&good, request).cut(1000),
        1..=5 => Reply::status(503),
        _ => Reply::status(404),
    });
    let url = server.url().replace("http://", "http://user:secret@") + "?token=secret";
    for words in ["the server answers 503", "the server answers 404"] {
        let ended = ended(&client.command(&url, Some(&image.sha256())).arg("--verbose").output().unwrap());
        assert_says(&ended, 69, &[words, "/image?…"]);
        assert!(!ended.message.contains("secret"), "{}", ended.message);
    }
    let note = std::fs::read_to_string(client.path("image.partial.json")).unwrap();
    assert!(!note.contains("user"), "{note}");
    assert!(
        server.seen().iter().all(|request| request.header("authorization") == Some("Basic dXNlcjpzZWNyZXQ="))
    );
}
