//! Tests of the configuration.

use super::*;
use std::os::unix::fs::PermissionsExt as _;

const GOOD: &str = r#"
    [agent]
    device_id = "pi-7"
    [credentials]
    type = "toml-shared"
    username = "device"
    password = "s3cret"
    [nats]
    urls = ["tls://10.0.2.2:4222", "tls://bus.example:4222"]
"#;

#[test]
fn a_good_file_is_parsed() {
    let config = Config::parse(GOOD).unwrap();
    assert_eq!(config.agent.device_id, "pi-7");
    let AgentConfig { heartbeat_seconds, status_seconds, resync_seconds, .. } = config.agent;
    assert_eq!((heartbeat_seconds, status_seconds, resync_seconds), (30, 600, 600));
    assert_eq!(config.podman.without_memory_limits, WithoutMemoryLimits::Refuse);
    let run = Config::parse(&format!("{GOOD}\n[podman]\nwithout_memory_limits = \"run\"")).unwrap();
    assert_eq!(run.podman.without_memory_limits, WithoutMemoryLimits::Run);
    assert_eq!(config.nats.urls.len(), 2, "each URL is an element of its own");
    assert_eq!(config.podman.socket, Path::new("/run/iot-agent/podman.sock"));
}

#[test]
fn the_password_is_never_printed() {
    assert!(!format!("{:?}", Config::parse(GOOD).unwrap()).contains("s3cret"));
    let pin = format!("{:#}", Config::parse(&GOOD.replace("\"s3cret\"", "7654321")).unwrap_err());
    assert!(!pin.contains("7654321") && pin.contains("expected a string"), "{pin}");
    for torn in [GOOD.replace("\"s3cret\"", "\"s3cret\"\""), GOOD.replace("\"s3cret\"", "s3cret")] {
        let error = format!("{:#}", Config::parse(&torn).unwrap_err());
        assert!(!error.contains("s3cret") && error.contains("near line"), "{error}");
    }
    for url in ["nats://me:s3cret@bus:4222", "nats://me:s3cret@"] {
        let text = GOOD.replace("tls://10.0.2.2:4222", url);
        let error = format!("{:#}", Config::parse(&text).unwrap_err());
        assert!(!error.contains("s3cret"), "{error}");
    }
}

#[test]
fn errors_name_the_wrong_key() {
    let known = "`toml-shared`, `user-password`, `token`, `nkey`, `creds`";
    let table = [
        (GOOD.replace("pi-7", "pi 7"), "device_id = \"pi 7\""),
        (GOOD.replace("pi-7", ""), "device_id = \"\""),
        (
            GOOD.replace("toml-shared", "zitadel"),
            &format!("near line 5: unknown variant `zitadel`, expected one of {known}"),
        ),
        (GOOD.replace("password", "pasword"), "pasword"),
        (GOOD.replace("urls = [", "urls = [] # ["), "urls is empty"),
        (GOOD.replace("tls://bus.example:4222", "tls://"), "names no host"),
        (GOOD.replace("tls://10", "tls://a:b@10"), "move the login into [credentials]"),
        (GOOD.replace("tls://10", "tls://:b@10"), "move the login into [credentials]"),
        (GOOD.replace("tls://10", "wss://10"), "neither nats://HOST:PORT nor tls://HOST:PORT"),
        (GOOD.replace("tls://10", "10"), "neither nats://HOST:PORT nor tls://HOST:PORT"),
        (GOOD.replace("tls://10", "nats://10"), "use tls:// for each"),
        (GOOD.replace("[nats]", "[nats]\nkey_file = \"x\""), "give both or neither"),
        (GOOD.replace("[nats]", "[nats]\njetstream_domain = \"a.b\""), "jetstream_domain = \"a.b\""),
        (GOOD.replace("[nats]", "[mqtt]\n[nats]"), "mqtt"),
        (GOOD.replace("[credentials]", "heartbeat_seconds = 0\n[credentials]"), "outside 1 to 3600"),
        (format!("{GOOD}\n[podman]\npull_silence_seconds = 0"), "pull_silence_seconds = 0 is outside"),
        (format!("{GOOD}\n[podman]\ntag_check_seconds = 0"), "tag_check_seconds = 0 is outside"),
        (GOOD.replace("[credentials]", "resync_seconds = 0\n[credentials]"), "outside 1 to 86400"),
        (GOOD.replace("[credentials]", "status_seconds = 0\n[credentials]"), "status_seconds = 0 is outside"),
    ];
    for (text, expected) in table {
        let error = format!("{:#}", Config::parse(&text).unwrap_err());
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn the_logins_to_registries_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str, mode| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let text = format!("{GOOD}\n[podman]\nregistry_auth_file = \"registries.json\"");
    let config = write("config.toml", &text, 0o600);
    let error = || format!("{:#}", Config::load(&config).unwrap_err());
    assert!(error().contains("registries.json: No such file"), "{}", error());
    write("registries.json", r#"{"auths":{"r.example":{"auth":"s3cret!"}}}"#, 0o600);
    assert!(error().contains("auths.\"r.example\"") && !error().contains("s3cret"), "{}", error());
    write("registries.json", "{}", 0o644);
    assert!(error().contains("others can read it"), "{}", error());
    let logins = write("registries.json", "{}", 0o600);
    assert_eq!(Config::load(&config).unwrap().podman.registry_auth_file, Some(logins));
}

#[test]
fn archives_are_found_by_their_image() {
    assert_eq!(archive_names("localhost/iot-workload:1")[1], "localhost_iot-workload_1.tar");
    assert_eq!(archive_names("r.example:5000/a/b@sha256:00")[1], "r.example_5000_a_b_sha256_00.tar");
    let [one, two] = ["r.example/a/b:1", "r.example/a_b:1"].map(archive_names);
    assert!(one[0] != two[0] && one[1] == two[1], "{one:?} {two:?}");
    // printf %s r.example/a/b:1 | sha256sum
    assert_eq!(one[0], "f7986410d0463fa8ebb7734e783ea07c7304d7d204dc1dc21f3bae881feac12d.tar");
}
