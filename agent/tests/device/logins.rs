//! Tests of each login to the bus, against a real nats-server. They also test TLS with a certificate
//! authority of the fleet, and with a certificate that is not valid yet.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::device::{password_login, secret, write_config};
use crate::fleet::{self, Agent, Broker, Fleet, users, wait_until};
use async_nats::ConnectOptions;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, date_time_ymd};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const DEVICE: &str = "pi-7";

fn configure(home: &Path, credentials: &str, url: &str, more: &str) {
    let nats = format!("urls = [\"{url}\"]\n{more}");
    write_config(home, DEVICE, credentials, &nats, &format!("socket = \"{}/no-podman\"", home.display()));
}

/// Returns two URLs for the configuration. No server listens at the first one, so the agent must use the
/// second one.
fn two_urls(port: u16) -> String {
    format!("nats://127.0.0.1:9\", \"nats://127.0.0.1:{port}")
}

async fn joins(broker: &Broker, fleet: &Fleet, home: &Path, credentials: &str) {
    configure(home, credentials, &two_urls(broker.server.port), "");
    let agent = Agent::start(home);
    let status = fleet.status(credentials, |status| status.sequence > 1).await;
    assert_eq!(status.device_id, DEVICE);
    // There is no podman in this test. The agent must report that.
    assert!(status.events.iter().any(|event| event.what.contains("no-podman")), "{:?}", status.events);
    let log = agent.log();
    // A user's seed is a word of 58 letters that begins with SU (NKeys).
    let is_seed = |word: &str| word.len() == 58 && word.starts_with("SU");
    let seed = log.split(|c: char| !c.is_ascii_alphanumeric()).any(is_seed);
    assert!(!log.contains("s3cret") && !seed, "a secret is in its log: {log}");
    agent.stop();
    fleet.statuses.purge(DEVICE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn by_password_in_the_file_and_in_a_file_of_its_own() {
    let broker = Broker::start(&users(DEVICE));
    let fleet = Fleet::enter(&broker, DEVICE).await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let shared = password_login(DEVICE);
    joins(&broker, &fleet, home, &shared).await;
    let file = secret(home, "password", "device-s3cret\n");
    let own =
        format!("type = \"user-password\"\nusername = \"{DEVICE}\"\npassword_file = \"{}\"", file.display());
    joins(&broker, &fleet, home, &own).await;
    // The file changes while the agent runs: the broker refuses the agent until the password is correct.
    std::fs::write(&file, "wr0ng-s3cret").unwrap();
    configure(home, &own, &two_urls(broker.server.port), "");
    let agent = Agent::start(home);
    logged(&agent, "authorization violation").await;
    std::fs::write(&file, "device-s3cret").unwrap();
    fleet.status("the right password", |status| status.sequence > 0).await;
    agent.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn by_token() {
    let broker = Broker::start("authorization { token: fleet-s3cret }\n");
    let fleet =
        Fleet::enter_at(&broker.url(), DEVICE, ConnectOptions::with_token("fleet-s3cret".into())).await;
    let home = tempfile::tempdir().unwrap();
    let file = secret(home.path(), "token", "fleet-s3cret");
    joins(&broker, &fleet, home.path(), &format!("type = \"token\"\ntoken_file = \"{}\"", file.display()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_nkey() {
    let (device, own) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {{ nkey: {} }}, {{ nkey: {} }} ] }}\n",
        device.public_key(),
        own.public_key()
    );
    let broker = Broker::start(&config);
    let fleet = Fleet::enter_at(&broker.url(), DEVICE, ConnectOptions::with_nkey(own.seed().unwrap())).await;
    let home = tempfile::tempdir().unwrap();
    let file = secret(home.path(), "seed", &device.seed().unwrap());
    joins(&broker, &fleet, home.path(), &format!("type = \"nkey\"\nseed_file = \"{}\"", file.display()))
        .await;
}

/// Returns a signed claim as nsc writes it (JWT with the algorithm `ed25519-nkey`).
fn jwt(issuer: &KeyPair, subject: &str, nats: &serde_json::Value) -> String {
    use data_encoding::BASE64URL_NOPAD;
    let part = |value: &serde_json::Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let head = part(&serde_json::json!({ "typ": "JWT", "alg": "ed25519-nkey" }));
    let claim = serde_json::json!({ "jti": subject, "iat": 1, "iss": issuer.public_key(), "name": "test", "sub": subject, "nats": nats });
    let text = format!("{head}.{}", part(&claim));
    format!("{text}.{}", BASE64URL_NOPAD.encode(&issuer.sign(text.as_bytes()).unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn by_a_creds_file() {
    let (operator, account, system) =
        (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let open = serde_json::json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
        "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1 });
    let operator_jwt =
        jwt(&operator, &operator.public_key(), &serde_json::json!({ "type": "operator", "version": 2 }));
    let account_jwt = |account: &KeyPair, limits: &serde_json::Value| {
        jwt(
            &operator,
            &account.public_key(),
            &serde_json::json!({ "type": "account", "version": 2, "limits": limits }),
        )
    };
    // JetStream starts for an operator's accounts only if there is a system account.
    let mut none = open.clone();
    for limit in ["mem_storage", "disk_storage", "streams", "consumer"] {
        none[limit] = 0.into();
    }
    let config = format!(
        "operator: \"{operator_jwt}\"\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: \"{}\", {}: \"{}\" }}\n",
        system.public_key(),
        system.public_key(),
        account_jwt(&system, &none),
        account.public_key(),
        account_jwt(&account, &open)
    );
    let broker = Broker::start(&config);
    let creds = |user: &KeyPair| {
        let claim = serde_json::json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {} });
        format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            jwt(&account, &user.public_key(), &claim),
            user.seed().unwrap()
        )
    };
    let own = ConnectOptions::with_credentials(&creds(&KeyPair::new_user())).unwrap();
    let fleet = Fleet::enter_at(&broker.url(), DEVICE, own).await;
    let home = tempfile::tempdir().unwrap();
    let file = secret(home.path(), "device.creds", &creds(&KeyPair::new_user()));
    joins(&broker, &fleet, home.path(), &format!("type = \"creds\"\nfile = \"{}\"", file.display())).await;
}

/// Writes a CA, a device's certificate and a server's certificate that is valid from the year `from`. Returns the
/// broker's configuration for them, which demands a device's certificate if `is_mutual` is true.
fn certificates(directory: &Path, from: i32, is_mutual: bool) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.not_before = date_time_ymd(from, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = params.signed_by(&key, &ca).unwrap();
    let own_key = rcgen::KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec![DEVICE.into()]).unwrap().signed_by(&own_key, &ca).unwrap();
    std::fs::write(directory.join("device.pem"), own.pem()).unwrap();
    secret(directory, "device.key", &own_key.serialize_pem());
    std::fs::write(directory.join("ca.pem"), ca.pem()).unwrap();
    std::fs::write(directory.join("server.pem"), server.pem()).unwrap();
    secret(directory, "server.key", &key.serialize_pem());
    let mutual = if is_mutual {
        format!("ca_file: \"{}/ca.pem\", verify: true", directory.display())
    } else {
        String::new()
    };
    format!(
        "tls {{ cert_file: \"{0}/server.pem\", key_file: \"{0}/server.key\", {mutual} }}\n{1}",
        directory.display(),
        users(DEVICE)
    )
}

async fn logged(agent: &Agent, words: &str) {
    wait_until(words, || agent.log().contains(words)).await;
}

/// The certificate is not valid yet for a device whose clock is in the past. The device connects once the
/// certificate is valid.
#[tokio::test(flavor = "multi_thread")]
async fn over_tls_and_with_a_clock_of_the_past() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let shared = password_login(DEVICE);
    let mut broker = Broker::start(&certificates(directory, 2090, false));
    let url = format!("tls://localhost:{}", broker.server.port);
    let ca = format!("ca_file = \"{}/ca.pem\"", directory.display());
    configure(home, &shared, &url, &ca);
    let agent = Agent::start(home);
    logged(&agent, "not valid yet by this device's clock").await;
    broker.down();
    certificates(directory, 2020, false);
    broker.up();
    // The CA has changed too, and the agent reads it again.
    let options = fleet::password_login().add_root_certificates(directory.join("ca.pem")).require_tls(true);
    let fleet = Fleet::enter_at(&format!("tls://localhost:{}", broker.server.port), DEVICE, options).await;
    fleet.status("a status over TLS", |status| status.sequence > 0).await;
    agent.stop();
    // Neither a wrong CA nor the system's CAs accept the broker's certificate.
    let other = tempfile::tempdir().unwrap();
    certificates(other.path(), 2020, false);
    for more in [format!("ca_file = \"{}/ca.pem\"", other.path().display()), String::new()] {
        let home = tempfile::tempdir().unwrap();
        configure(home.path(), &shared, &url, &more);
        let agent = Agent::start(home.path());
        logged(&agent, "invalid peer certificate").await;
        agent.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_a_certificate_of_the_device() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let broker = Broker::start(&certificates(directory, 2020, true));
    let url = format!("tls://localhost:{}", broker.server.port);
    let file = |name| directory.join(name);
    let options = fleet::password_login()
        .add_root_certificates(file("ca.pem"))
        .add_client_certificate(file("device.pem"), file("device.key"));
    let fleet = Fleet::enter_at(&url, DEVICE, options).await;
    let home = tempfile::tempdir().unwrap();
    // The paths are relative to the directory of the configuration.
    for name in ["ca.pem", "device.pem", "device.key"] {
        std::fs::copy(file(name), home.path().join(name)).unwrap();
    }
    let own = "certificate_file = \"device.pem\"\nkey_file = \"device.key\"\n";
    for (more, joins) in [("", false), (own, true)] {
        configure(home.path(), &password_login(DEVICE), &url, &format!("ca_file = \"ca.pem\"\n{more}"));
        let agent = Agent::start(home.path());
        if joins {
            fleet.status("a status over mutual TLS", |status| status.sequence > 0).await;
        } else {
            logged(&agent, "cannot connect to the bus").await;
        }
        agent.stop();
    }
}

/// Answers one connection as a nats-server with TLS that names another server, and ends the connection after the login.
fn serve_one_login(listener: &TcpListener, directory: &Path, other: SocketAddr) {
    let (mut stream, _) = listener.accept().unwrap();
    let info = format!(
        "INFO {{\"server_id\":\"x\",\"max_payload\":1048576,\"tls_required\":true,\"connect_urls\":[\"{other}\"]}}\r\n"
    );
    stream.write_all(info.as_bytes()).unwrap();
    let pem = |name: &str| std::fs::read(directory.join(name)).unwrap();
    let certificate = CertificateDer::from_pem_slice(&pem("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&pem("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let session = rustls::ServerConnection::new(config.into()).unwrap();
    let mut stream = BufReader::new(rustls::StreamOwned::new(session, stream));
    let mut line = String::new();
    while !line.ends_with("PING\r\n") {
        assert!(stream.read_line(&mut line).unwrap() > 0, "{line}");
    }
    assert!(line.contains("device-s3cret"), "{line}");
    stream.get_mut().write_all(b"PONG\r\n").unwrap();
}

/// A server of the bus names another one, which speaks no TLS. The agent must not log in there after the connection to
/// the first one has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_not_configured_gets_no_login() {
    let (directory, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates(directory.path(), 2020, false);
    let (bus, other) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let url = format!("tls://localhost:{}", bus.local_addr().unwrap().port());
    let ca = format!("ca_file = \"{}/ca.pem\"", directory.path().display());
    configure(home.path(), &password_login(DEVICE), &url, &ca);
    let agent = Agent::start(home.path());
    serve_one_login(&bus, directory.path(), other.local_addr().unwrap());
    drop(bus);
    let sent = Arc::new(Mutex::new(Vec::new()));
    let received = Arc::clone(&sent);
    std::thread::spawn(move || {
        for stream in other.incoming() {
            let (mut stream, mut bytes) = (stream.unwrap(), [0; 4096]);
            stream.write_all(b"INFO {\"server_id\":\"x\",\"max_payload\":1048576}\r\n").unwrap();
            let count = stream.read(&mut bytes).unwrap();
            received.lock().unwrap().extend_from_slice(&bytes[..count]);
        }
    });
    logged(&agent, "cannot connect to the bus").await;
    agent.stop();
    let sent = sent.lock().unwrap();
    assert!(sent.is_empty(), "{}", sent.escape_ascii());
}

/// Checks that the agent can read the configuration that the smoke test writes.
#[test]
fn the_configuration_of_a_run_is_one_that_the_agent_reads() {
    let directory = tempfile::tempdir().unwrap();
    let broker =
        xtask_fleet::Broker::start(directory.path(), "dev-1", None, &xtask_jobs::Ui::quiet()).unwrap();
    let config = iot_agent::config::Config::parse(&broker.agent_config("10.0.2.2")).unwrap();
    assert_eq!(config.agent.device_id, "dev-1");
    broker.stop().unwrap();
}
