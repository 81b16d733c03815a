//! Tests of each login to the bus, against a real nats-server. They also test TLS with a certificate
//! authority of the fleet, and with a certificate that is not valid yet.

use std::path::Path;

use crate::device::{password_login, secret, write_config};
use crate::fleet::{self, Agent, Broker, Fleet, users, wait_until};
use async_nats::ConnectOptions;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, date_time_ymd};

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

/// Writes a CA and a server's certificate that is valid from the year `from`, and returns the broker's
/// configuration for them.
fn certificates(directory: &Path, from: i32) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.not_before = date_time_ymd(from, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = params.signed_by(&key, &ca).unwrap();
    std::fs::write(directory.join("ca.pem"), ca.pem()).unwrap();
    std::fs::write(directory.join("server.pem"), server.pem()).unwrap();
    secret(directory, "server.key", &key.serialize_pem());
    format!(
        "tls {{ cert_file: \"{0}/server.pem\", key_file: \"{0}/server.key\" }}\n{1}",
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
    let mut broker = Broker::start(&certificates(directory, 2090));
    let url = format!("tls://localhost:{}", broker.server.port);
    let ca = format!("ca_file = \"{}/ca.pem\"", directory.display());
    configure(home, &shared, &url, &ca);
    let agent = Agent::start(home);
    logged(&agent, "not valid yet by this device's clock").await;
    broker.down();
    certificates(directory, 2020);
    broker.up();
    // The CA has changed too, and the agent reads it again.
    let options = fleet::password_login().add_root_certificates(directory.join("ca.pem")).require_tls(true);
    let fleet = Fleet::enter_at(&format!("tls://localhost:{}", broker.server.port), DEVICE, options).await;
    fleet.status("a status over TLS", |status| status.sequence > 0).await;
    agent.stop();
    // Neither a wrong CA nor the system's CAs accept the broker's certificate.
    let other = tempfile::tempdir().unwrap();
    certificates(other.path(), 2020);
    for more in [format!("ca_file = \"{}/ca.pem\"", other.path().display()), String::new()] {
        let home = tempfile::tempdir().unwrap();
        configure(home.path(), &shared, &url, &more);
        let agent = Agent::start(home.path());
        logged(&agent, "invalid peer certificate").await;
        agent.stop();
    }
}

/// Checks that the agent can read the configuration that the smoke test writes.
#[test]
fn the_configuration_of_a_run_is_one_that_the_agent_reads() {
    let directory = tempfile::tempdir().unwrap();
    let broker =
        xtask_fleet::Broker::start(directory.path(), "dev-1", None, &xtask_jobs::Ui::quiet()).unwrap();
    let config = iot_agent::config::Config::parse(&broker.agent_config()).unwrap();
    assert_eq!(config.agent.device_id, "dev-1");
    broker.stop().unwrap();
}
