//! Tests `cargo xtask image bump` with copies of the publishers' hosts, which this machine serves from
//! `test_data/bump/`. A real gpgv checks the signature in that folder. The key that made the signature no longer
//! exists.

mod publisher;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::publisher::{Answer, DEBIAN_FILE, DEBIAN_SUMS, Publisher, SIGNATURE, SUMS, UBUNTU_INDEX, data};

use crate::scratch::{XTASK_VM, command};

const SIGNED_BY: &str = "signed by iot-xtask test key, worthless (77236FDED351F7E9464F02E2BDB1DA86E438BF61)";

/// A catalogue with its keyring, and the publishers' hosts that it names.
struct House {
    publisher: Publisher,
    directory: tempfile::TempDir,
    catalogue: PathBuf,
    text: String,
}

/// The result of a bump.
struct Ended {
    code: Option<i32>,
    out: String,
    message: String,
}

impl House {
    fn new() -> Self {
        let publisher = Publisher::start();
        let directory = tempfile::tempdir().unwrap();
        let text =
            std::fs::read_to_string(data("images.toml")).unwrap().replace("{server}", &publisher.address);
        let catalogue = directory.path().join("images.toml");
        std::fs::copy(data("keyring.gpg"), directory.path().join("keyring.gpg")).unwrap();
        let house = Self { publisher, directory, catalogue, text: text.clone() };
        house.write(&text);
        house
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.catalogue, text).unwrap();
        std::fs::set_permissions(&self.catalogue, PermissionsExt::from_mode(0o640)).unwrap();
    }

    fn now(&self) -> String {
        std::fs::read_to_string(&self.catalogue).unwrap()
    }

    fn serve(&self, path: &str, answer: Answer) {
        self.publisher.serve(path, answer);
    }

    fn serve_changed(&self, path: &str, from: &str, to: &str) {
        self.publisher.serve_changed(path, from, to);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(XTASK_VM, &["image", "bump"]);
        command.args(arguments).arg("--catalogue").arg(&self.catalogue);
        command.env("NO_PROXY", "127.0.0.1").env_remove("no_proxy");
        command
    }

    fn bump(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments))
    }

    /// Checks that a bump exited with `code` and a message with all of `words`, printed nothing on stdout, and did not
    /// change the catalogue.
    fn assert_refused(&self, ended: &Ended, code: i32, words: &[&str]) {
        assert_eq!(ended.code, Some(code), "{}", ended.message);
        for words in words {
            assert!(ended.message.contains(words), "{:?} does not say {words:?}", ended.message);
        }
        assert_eq!(ended.out, "");
        assert_eq!(self.now(), self.text);
        let beside = std::fs::read_dir(self.directory.path()).unwrap().count();
        assert_eq!(beside, 2, "there is a file beside the catalogue and the keyring");
    }
}

fn ended(mut command: Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), out: text(output.stdout), message: text(output.stderr) }
}

/// Returns the digest of `file` in the list of digests called `list`.
fn listed(list: &str, file: &str) -> String {
    let text = std::fs::read_to_string(data(list)).unwrap();
    let line =
        text.lines().find(|line| line.ends_with(&format!(" {file}")) || line.ends_with(&format!("*{file}")));
    line.unwrap().split(' ').next().unwrap().to_owned()
}

/// Returns the fixture's catalogue after the change that a bump must make to the Ubuntu entry.
fn bumped_ubuntu(text: &str) -> String {
    let digest = |arch: &str| {
        let file = format!("ubuntu-24.04-server-cloudimg-{arch}.img");
        listed("ubuntu/release-20260905/SHA256SUMS", &file)
    };
    let arm_url = "release-20260905/ubuntu-24.04-server-cloudimg-arm64.img\"\n";
    text.replace("release-20260705", "release-20260905")
        .replace("ffe6203da54deeb6db5d2a98a83f9ec8e55f149d3f7ba622e1abe5fa966ee3d6", &digest("amd64"))
        .replace("7df0201546f75b8bcc1044594c806c35749421ad3c9bc1be2a3ab806cfae39cc", &digest("arm64"))
        .replace("629_145_600", "612345678")
        .replace(arm_url, &format!("{arm_url}bytes = 598765432\n"))
}

#[test]
fn a_signed_release_is_pinned_and_nothing_else_changes() {
    let house = House::new();
    let first = house.bump(&["ubuntu-24.04"]);
    assert_eq!(first.code, Some(0), "{}", first.message);
    assert!(
        first.message.contains(&format!("from release 20260705 to 20260905, {SIGNED_BY}")),
        "{}",
        first.message
    );
    assert!(!first.message.contains("WARNING"), "{}", first.message);
    let expected = bumped_ubuntu(&house.text);
    assert_eq!(house.now(), expected);
    assert_eq!(house.catalogue.metadata().unwrap().permissions().mode() & 0o777, 0o640);

    let lines: Vec<_> = first.out.lines().collect();
    assert!(
        lines[0].starts_with("--- ") && lines[1].starts_with("+++ ") && lines[0].ends_with("images.toml")
    );
    let signed = |sign: char, text: &str, other: &str| -> Vec<String> {
        let other: Vec<_> = other.lines().collect();
        text.lines().filter(|line| !other.contains(line)).map(|line| format!("{sign}{line}")).collect()
    };
    let shown =
        |sign: char| lines[2..].iter().filter(|line| line.starts_with(sign)).copied().collect::<Vec<_>>();
    assert_eq!(shown('-'), signed('-', &house.text, &expected));
    assert_eq!(shown('+'), signed('+', &expected, &house.text));
    assert!(lines[2].starts_with("@@ -") && shown('-').len() == 5 && shown('+').len() == 6, "{}", first.out);

    let before = house.catalogue.metadata().unwrap().modified().unwrap();
    let second = house.bump(&["ubuntu-24.04"]);
    assert_eq!((second.code, second.out.as_str()), (Some(0), ""), "{}", second.message);
    assert!(
        second.message.contains(&format!("up to date, release 20260905, {SIGNED_BY}")),
        "{}",
        second.message
    );
    assert_eq!((house.now(), house.catalogue.metadata().unwrap().modified().unwrap()), (expected, before));
}

#[test]
fn a_dry_run_shows_the_same_and_writes_nothing() {
    let house = House::new();
    let dry = house.bump(&["ubuntu-24.04", "--dry-run"]);
    assert_eq!(dry.code, Some(0), "{}", dry.message);
    assert!(dry.message.contains("nothing is written"), "{}", dry.message);
    assert_eq!(house.now(), house.text);
    assert_eq!(house.bump(&["ubuntu-24.04", "--quiet"]).out, dry.out);
    assert_eq!(house.now(), bumped_ubuntu(&house.text));
}

#[test]
fn the_outcome_is_told_as_json() {
    let house = House::new();
    let describe = |arguments: &[&str]| -> serde_json::Value {
        let ended = house.bump(arguments);
        assert_eq!(ended.code, Some(0), "{}", ended.message);
        serde_json::from_str(&ended.out).unwrap()
    };
    let first = describe(&["ubuntu-24.04", "--json"]);
    assert_eq!((&first["name"], &first["from"]), (&"ubuntu-24.04".into(), &"20260705".into()));
    assert_eq!((&first["to"], &first["changed"]), (&"20260905".into(), &true.into()));
    assert_eq!(first["signed_by"]["user"], "iot-xtask test key, worthless");
    let (x86, arm) = (&first["entries"][0], &first["entries"][1]);
    assert_eq!((&x86["arch"], &x86["bytes"]), (&"x86_64".into(), &612_345_678.into()));
    assert_eq!(arm["arch"], "aarch64");
    assert!(house.now().contains(arm["url"].as_str().unwrap()));
    assert!(house.now().contains(arm["digest"].as_str().unwrap()));
    assert_eq!(describe(&["ubuntu-24.04", "--json"])["changed"], false);
    let unsigned = describe(&["debian-12-cloud", "--unsigned", "--json"]);
    assert_eq!(
        (&unsigned["signed_by"], &unsigned["to"]),
        (&serde_json::Value::Null, &"20260712-2537".into())
    );
}

#[test]
fn digests_that_the_key_did_not_sign_are_fatal() {
    let house = House::new();
    let good = listed("ubuntu/release-20260905/SHA256SUMS", "ubuntu-24.04-server-cloudimg-arm64.img");
    let flipped = format!("{}{}", if good.starts_with('0') { "1" } else { "0" }, &good[1..]);
    house.serve_changed(SUMS, &good, &flipped);
    let tampered = house.bump(&["ubuntu-24.04"]);
    house.assert_refused(
        &tampered,
        1,
        &["BAD signature", "not signed by a key of", "left as it is", "do not use them"],
    );

    house.serve_changed(SUMS, &flipped, &good);
    let other = data("other-keyring.gpg");
    let ended = house.bump(&["ubuntu-24.04", "--keyring", other.to_str().unwrap()]);
    house.assert_refused(&ended, 1, &["No public key", "other-keyring.gpg", "left as it is"]);

    house.serve(SIGNATURE, Answer::Content(b"no signature at all".to_vec()));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["not signed by a key of"]);
    house.serve(SIGNATURE, Answer::Content(Vec::new()));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["not signed by a key of"]);
    house.serve(SIGNATURE, Answer::Status("404 Not Found"));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["fetch the signature", "404", "left as it is"]);
}

#[test]
fn what_the_judgement_needs_is_asked_for() {
    let house = House::new();
    let missing = house.bump(&["ubuntu-24.04", "--keyring", "/nonexistent/ubuntu-cloudimage-keyring.gpg"]);
    house.assert_refused(
        &missing,
        69,
        &["/nonexistent/", "install ubuntu-cloudimage-keyring", "--keyring FILE"],
    );
    let armoured = house.bump(&[
        "ubuntu-24.04",
        "--keyring",
        data("ubuntu/release-20260905/SHA256SUMS.gpg").to_str().unwrap(),
    ]);
    house.assert_refused(&armoured, 69, &["armoured", "gpg --dearmor"]);

    // This PATH has only the tools that cargo itself needs, and so no gpgv.
    let tools = tempfile::tempdir().unwrap();
    let beside = Path::new(env!("CARGO")).parent().unwrap();
    std::os::unix::fs::symlink(beside.join("rustc"), tools.path().join("rustc")).unwrap();
    let mut command = house.command(&["ubuntu-24.04"]);
    command.env("PATH", tools.path()).env("CARGO", env!("CARGO"));
    house.assert_refused(&ended(command), 69, &["find gpgv", "install"]);
}

#[test]
fn a_publisher_who_signs_nothing_is_believed_only_where_told_so() {
    let house = House::new();
    house.assert_refused(&house.bump(&["debian-12-cloud"]), 2, &["does not sign", "--unsigned"]);
    house.assert_refused(&house.bump(&["ubuntu-24.04", "--unsigned"]), 2, &["signs SHA256SUMS"]);

    let ended = house.bump(&["debian-12-cloud", "--unsigned"]);
    assert_eq!(ended.code, Some(0), "{}", ended.message);
    assert!(
        ended.message.contains("NOT SIGNED") && ended.message.contains("TLS connection"),
        "{}",
        ended.message
    );
    let file = "debian-12-genericcloud-arm64-20260712-2537.qcow2";
    let old = house.text.split("sha512:").nth(1).unwrap().split('"').next().unwrap();
    let expected = house
        .text
        .replace("20260712-900", "20260712-2537")
        .replace(old, &listed("debian/20260712-2537/SHA512SUMS", file))
        .replace("bytes = 1 # the host does not tell it\n", "");
    assert_eq!(house.now(), expected);
    assert!(house.bump(&["debian-12-cloud", "--unsigned"]).message.contains("up to date"));

    house.write(&house.text.replace(&house.publisher.address, "publisher.invalid"));
    let plain = house.bump(&["debian-12-cloud", "--unsigned"]);
    assert_eq!(plain.code, Some(2), "{}", plain.message);
    assert!(plain.message.contains("is not https"), "{}", plain.message);
}

#[test]
fn an_entry_that_cannot_be_bumped_is_a_usage_error() {
    let house = House::new();
    let known = "ubuntu-95: no such image; there are: debian-12, ubuntu-24.04, debian-12-cloud";
    house.assert_refused(&house.bump(&["ubuntu-95"]), 2, &[known]);
    house.assert_refused(&house.bump(&["debian-12"]), 2, &["built from packages"]);
    let elsewhere = ["image", "bump", "debian-12", "--catalogue", "/nonexistent/images.toml"];
    house.assert_refused(&ended(command(XTASK_VM, &elsewhere)), 2, &["/nonexistent/images.toml"]);
}

#[test]
fn a_listing_without_a_newer_release_changes_nothing() {
    let house = House::new();
    house.serve_changed(UBUNTU_INDEX, "release-2026", "release-2024");
    let older = house.bump(&["ubuntu-24.04"]);
    house.assert_refused(
        &older,
        1,
        &["20251120, the newest release", "older than 20260705", "nothing is changed"],
    );
    house.serve(
        UBUNTU_INDEX,
        Answer::Content(br#"<a href="?C=N">N</a> <a href="release/">release/</a>"#.to_vec()),
    );
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["no dated release among 1 links", "`release`"]);
    house.serve(UBUNTU_INDEX, Answer::Content(b"<h1>Welcome</h1>".to_vec()));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["not a directory listing"]);
    house.serve(UBUNTU_INDEX, Answer::Content(vec![b' '; (4 << 20) + 1]));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 1, &["longer than the limit of 4194304 bytes"]);
}

#[test]
fn a_release_that_is_not_whole_is_not_pinned() {
    let house = House::new();
    let bump = || house.bump(&["debian-12-cloud", "--unsigned"]);
    house.serve(DEBIAN_FILE, Answer::Status("404 Not Found"));
    house.assert_refused(&bump(), 1, &["check that the file", "20260712-2537.qcow2", "404"]);
    house.serve(DEBIAN_FILE, Answer::Status("405 Method Not Allowed"));
    assert_eq!(house.bump(&["debian-12-cloud", "--unsigned", "--dry-run"]).code, Some(0));
    house.serve_changed(DEBIAN_SUMS, "genericcloud-arm64", "genericcloud-riscv64");
    let file = "debian-12-genericcloud-arm64-20260712-2537.qcow2 is not among the 18 files of SHA512SUMS";
    house.assert_refused(&bump(), 1, &[file]);
}

#[test]
fn a_release_that_changed_under_its_name_is_told() {
    let house = House::new();
    let bumped = bumped_ubuntu(&house.text);
    let digest = listed("ubuntu/release-20260905/SHA256SUMS", "ubuntu-24.04-server-cloudimg-amd64.img");
    house.write(&bumped.replace(&digest, &"0".repeat(64)));
    let ended = house.bump(&["ubuntu-24.04"]);
    assert_eq!(ended.code, Some(0), "{}", ended.message);
    assert!(
        ended.message.contains("WARNING: release 20260905 is already pinned for x86_64"),
        "{}",
        ended.message
    );
    assert_eq!(house.now(), bumped);
}

#[test]
fn a_host_that_cannot_be_reached_is_no_verdict_and_tells_no_password() {
    let house = House::new();
    house.serve(UBUNTU_INDEX, Answer::Status("503 Service Unavailable"));
    house.assert_refused(&house.bump(&["ubuntu-24.04"]), 69, &["503", "try again later"]);
    let with_password = format!("u:secret@{}", house.publisher.address);
    house.write(&house.text.replace(&house.publisher.address, &with_password));
    let known = house.bump(&["debian-12-cloud", "--unsigned", "--dry-run"]);
    assert_eq!(known.code, Some(0), "{}", known.message);
    assert!(!known.out.is_empty() && !format!("{}{}", known.out, known.message).contains("secret"));

    // The port was bound a moment ago and is free again, so no server listens on it.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = house.text.replace(&house.publisher.address, &format!("u:secret@127.0.0.1:{port}"));
    house.write(&text);
    let ended = house.bump(&["ubuntu-24.04"]);
    assert_eq!(ended.code, Some(69), "{}", ended.message);
    assert!(
        ended.message.contains("cannot be reached") && ended.message.contains("network"),
        "{}",
        ended.message
    );
    assert!(!ended.message.contains("secret"), "{}", ended.message);
    assert_eq!(house.now(), text);
}
