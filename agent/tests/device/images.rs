//! Tests of downloads from a real registry, and of the images that stay on the device.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent_protocol::deployment::{ContainerSpec, Document};
use agent_protocol::{DeviceStatus, Phase};

use crate::device::{Device, document, secret, spec};
use crate::fleet::wait_until;
use crate::registry::{LOGIN, Registry};

/// The rate of a slow line, in bytes for each second.
const SLOW: u64 = 1 << 20;

pub(crate) fn of_image(reference: &str) -> Document {
    document(ContainerSpec { image: reference.to_owned(), ..spec(&[]) })
}

pub(crate) async fn device(name: &str, registry: &Registry, more: &str) -> Device {
    Device::start_with_images(name, &registry.configuration(), more).await
}

/// The download takes much longer than the limit for silence. The connection of a download that nobody wants any more
/// is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_download_ends_and_one_that_nobody_wants_is_given_up() {
    let registry = Registry::start();
    let (slow, unwanted) = (registry.push("slow:1", 5 << 20), registry.push("unwanted:1", 40 << 20));
    let device = device("slow", &registry, "pull_silence_seconds = 3").await;
    registry.line.rate.store(SLOW, Ordering::SeqCst);
    let revision = device.fleet.put("web", &of_image(&slow)).await;
    let downloads =
        |status: &DeviceStatus| status.deployment("web").is_some_and(|line| line.downloaded_bytes.is_some());
    device.fleet.status("a download", downloads).await;
    let line = device.fleet.line("web", revision, Phase::Running).await;
    assert_eq!(line.downloaded_bytes, None);
    let begun = Instant::now();
    device.fleet.put("web", &of_image(&unwanted)).await;
    // Podman also opens connections that it closes at once.
    let open = || {
        let is_open = || registry.line.open.load(Ordering::SeqCst) > 0;
        is_open() && {
            std::thread::sleep(Duration::from_secs(1));
            is_open()
        }
    };
    wait_until("a download", open).await;
    device.fleet.delete("web").await;
    wait_until("no download", || !open() && !open()).await;
    let rest = (40 << 20) / SLOW;
    assert!(begun.elapsed() < Duration::from_secs(rest), "it went on to the end: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_without_progress_fails_and_is_repeated() {
    let registry = Registry::start();
    let image = registry.push("silent:1", 4 << 20);
    let device = device("silent", &registry, "pull_silence_seconds = 2").await;
    registry.line.allowed.store(1 << 20, Ordering::SeqCst);
    let revision = device.fleet.put("web", &of_image(&image)).await;
    device.fleet.error("web", "podman has reported no progress for 2 s").await;
    registry.line.allowed.store(u64::MAX, Ordering::SeqCst);
    device.fleet.line("web", revision, Phase::Running).await;
}

/// The registry answers 404. The agent does not ask again soon.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_the_registry_lacks_is_not_asked_for_at_once_again() {
    let registry = Registry::start();
    let device = device("lacks", &registry, "").await;
    device.fleet.put("web", &of_image("registry.test/lacking:1")).await;
    device.fleet.error("web", "manifest unknown").await;
    let asked = registry.line.connections.load(Ordering::SeqCst);
    // The reconciler tries after 1, 2 and 4 s.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(registry.line.connections.load(Ordering::SeqCst), asked);
    // A user gives the device an image of this name.
    let there = registry.push("there:1", 1 << 10);
    device.pod.podman(&["pull", "--quiet", &there]);
    device.pod.podman(&["tag", &there, "registry.test/lacking:1"]);
    let given = ContainerSpec { image: "registry.test/lacking:1".into(), ..spec(&["words"]) };
    let revision = device.fleet.put("web", &document(given)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    // Another image is not affected.
    let revision = device.fleet.put("web", &of_image(&there)).await;
    device.fleet.line("web", revision, Phase::Running).await;
}

/// The file with the logins is replaced while the agent runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_login_gets_the_login_of_its_file() {
    let mut registry = Registry::start();
    let image = registry.direct(&registry.push("team/private:1", 1 << 10));
    registry.require_login();
    let host = image.split_once('/').unwrap().0;
    let file = registry.directory.path().join("registries.json");
    let write = |login: &str| {
        let auth = data_encoding::BASE64.encode(login.as_bytes());
        let text = format!(r#"{{"auths":{{"{host}/team":{{"auth":"{auth}"}},"registry.test":{{}}}}}}"#);
        let new = secret(registry.directory.path(), "registries.json.new", &text);
        std::fs::rename(new, &file).unwrap();
        auth
    };
    secret(registry.directory.path(), "registries.json", "{}");
    let device = device("login", &registry, &format!("registry_auth_file = {file:?}")).await;
    let revision = device.fleet.put("web", &of_image(&image)).await;
    device.fleet.error("web", "authentication required").await;
    let asked = registry.line.connections.load(Ordering::SeqCst);
    let wrong = write("pull:old-s3cret");
    wait_until("an attempt with it", || registry.line.connections.load(Ordering::SeqCst) > asked).await;
    device.fleet.error("web", "authentication required").await;
    // The pause after a refusal is a minute. New logins end it.
    let begun = Instant::now();
    let right = write(LOGIN);
    device.fleet.line("web", revision, Phase::Running).await;
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    let log = device.agent.as_ref().unwrap().log();
    let status = format!("{:?}", device.fleet.latest().await.unwrap().1);
    for shown in ["s3cret", &wrong, &right] {
        assert!(!log.contains(shown) && !status.contains(shown), "{log}{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_no_deployment_names_is_deleted_and_a_foreign_one_stays() {
    let registry = Registry::start();
    let images = ["a:1", "a:2", "a:3", "b:1"].map(|name| registry.push(name, 1 << 10));
    let device = device("collects", &registry, "").await;
    device.pod.podman(&["pull", "--quiet", &images[3]]);
    let listed = || device.pod.podman(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    let mut ids = Vec::new();
    for image in &images[..3] {
        let revision = device.fleet.put("web", &of_image(image)).await;
        let line = device.fleet.line("web", revision, Phase::Running).await;
        let id = device.pod.podman(&["image", "inspect", "--format", "{{.Id}}", image]);
        ids.push(line.container.unwrap().image);
        assert_eq!(ids.last().unwrap(), id.trim());
    }
    assert!(ids[0] != ids[1] && device.fleet.latest().await.unwrap().1.disk_free_mib.unwrap() > 0);
    wait_until("only the last image", || !listed().contains("a:1") && !listed().contains("a:2")).await;
    assert!(listed().contains(&images[2]) && listed().contains(&images[3]), "{}", listed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_downloaded_to_a_disk_that_is_too_full() {
    let registry = Registry::start();
    let image = registry.push("large:1", 1 << 10);
    let device = device("full", &registry, "min_free_mib = 1000000000").await;
    device.fleet.put("web", &of_image(&image)).await;
    device.fleet.error("web", "[podman] min_free_mib is 1000000000").await;
    assert_eq!(registry.line.connections.load(Ordering::SeqCst), 0);
}
