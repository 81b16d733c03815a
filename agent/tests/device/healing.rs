//! Tests of a podman whose storage a power cut has damaged.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::Phase;
use agent_protocol::deployment::{ContainerSpec, Volume};
use serde_json::Value;

use crate::device::{Device, document, generation, spec};
use crate::fleet::wait_until;
use crate::pod::Pod;
use crate::registry::Registry;

/// Podman's storage has the container, and podman's database, which the power cut has set back, does not. The volume
/// and its content stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_only_the_storage_knows_is_replaced() {
    let mut device = Device::start("lost").await;
    let database = device.pod.in_storage("libpod/bolt_state.db");
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    let with = |words| document(ContainerSpec { volumes: vec![data.clone()], ..spec(words) });
    device.fleet.status("first status", |_| true).await;
    let before = std::fs::read(&database).unwrap();
    let revision = device.fleet.put("web", &with(&["write"])).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.kill();
    device.pod.podman(&["stop", "--all", "--time", "0"]);
    device.pod.podman(&["create", "--name", "iot-other.web", "localhost/iot-agent-test:1"]);
    device.pod.stop_service();
    std::fs::write(&database, before).unwrap();
    device.pod.start_service();
    assert_eq!(device.pod.containers().len(), 0);
    device.up();
    wait_until("a container", || device.pod.running("web").len() == 1).await;
    let listed = device.pod.podman(&["ps", "--all", "--external", "--format", "json"]);
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let mut names: Vec<_> = listed.iter().map(|container| container["Names"][0].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["iot-lost.web", "iot-other.web"], "the one of another agent stays");
    let revision = device.fleet.put("web", &with(&["read"])).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let output = device.pod.podman(&["logs", &device.pod.running("web")[0]]);
    assert!(output.contains("by the first"), "{output}");
    device.pod.podman(&["rm", "--force", "iot-other.web"]);
}

/// A power cut comes after podman has unpacked a layer and before the whole image is there. The layer is in podman's
/// list, and its files are empty.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_layer_without_an_image_is_downloaded_again() {
    let registry = Registry::start();
    let image = registry.push("torn:1", 64 << 10);
    let mut device = device_with_torn_image("torn", &registry, &image).await;
    device.pod.stop_service();
    std::fs::write(device.pod.in_storage("overlay-images/images.json"), "[]").unwrap();
    device.pod.boot();
    device.pod.start_service();
    check_content(&mut device, &image, &registry).await;
}

/// The power cut comes before the image is synced.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_image_is_downloaded_again() {
    let registry = Registry::start();
    let image = registry.push("unsynced:1", 64 << 10);
    let mut device = device_with_torn_image("unsynced", &registry, &image).await;
    let record = ring::digest::digest(&ring::digest::SHA256, image.as_bytes());
    let record = record.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let fetching = device.home.path().join("fetching");
    std::fs::create_dir_all(&fetching).unwrap();
    std::fs::write(fetching.join(record), format!("{image}\n")).unwrap();
    check_content(&mut device, &image, &registry).await;
    assert_eq!(std::fs::read_dir(fetching).unwrap().count(), 0);
}

/// Returns a device without an agent. Its podman has pulled the image, and the files of the image's layer are empty.
async fn device_with_torn_image(name: &str, registry: &Registry, image: &str) -> Device {
    let mut device = Device::start_with_images(name, &registry.configuration(), "").await;
    device.fleet.status("first status", |_| true).await;
    device.kill();
    let pod = &device.pod;
    pod.podman(&["pull", "--quiet", image]);
    let layers = std::fs::read_dir(pod.in_storage("overlay")).unwrap();
    let files = layers.map(|layer| layer.unwrap().path().join("diff/random0"));
    let torn = files.filter(|file| file.exists()).inspect(|file| std::fs::write(file, "").unwrap());
    assert_eq!(torn.count(), 1);
    device
}

/// Starts the agent, deploys the image, and compares its content with the one that was pushed.
async fn check_content(device: &mut Device, image: &str, registry: &Registry) {
    device.up();
    let document = document(ContainerSpec { image: image.to_owned(), ..spec(&[]) });
    let revision = device.fleet.put("web", &document).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let place = device.pod.podman(&["image", "mount", image]);
    let content = std::fs::read(place.trim().to_owned() + "/random0").unwrap();
    device.pod.podman(&["image", "unmount", image]);
    assert!(content == registry.layer(0), "the torn layer was used again: {} bytes", content.len());
}

/// Podman is killed while it receives an archive.
#[test]
fn the_temporary_files_of_a_cut_load_are_deleted() {
    let mut pod = Pod::start("");
    let mut stream = UnixStream::connect(pod.socket()).unwrap();
    stream
        .write_all(
            b"POST /v4.0.0/libpod/images/load HTTP/1.1\r\nHost: podman\r\nContent-Length: 99999\r\n\r\nx",
        )
        .unwrap();
    let deadline = Instant::now() + crate::fleet::PATIENCE;
    while pod.temporary_files().is_empty() {
        assert!(Instant::now() < deadline, "podman writes no temporary file");
        std::thread::sleep(Duration::from_millis(20));
    }
    pod.stop_service();
    assert_eq!(pod.temporary_files().len(), 1);
    pod.start_service();
    assert!(pod.temporary_files().is_empty());
}

/// A damage of podman's storage, whose directory the function gets.
type Damage<'a> = (&'a str, &'a dyn Fn(&Path));

/// Damages podman's storage in several ways. Each time, the container runs again, and the content of its volume stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_storage_is_repaired() {
    let mut device = Device::start("damaged").await;
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    let with_data = || ContainerSpec { volumes: vec![data.clone()], ..spec(&[]) };
    let gone = device.fleet.put("gone", &document(with_data())).await;
    device.fleet.line("gone", gone, Phase::Running).await;
    device.fleet.delete("gone").await;
    device.fleet.gone("gone", gone + 1).await;
    let revision = device.fleet.put("web", &document(with_data())).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let token = device.pod.in_storage("volumes/iot-damaged.web.data/_data/token");
    std::fs::write(&token, "kept").unwrap();
    let state = device.home.path().to_owned();
    let damages: [Damage<'_>; 7] = [
        ("no list of the layers", &|root| write(root, "overlay-layers/layers.json", "[]")),
        ("a torn list of the images", &|root| write(root, "overlay-images/images.json", "[{")),
        ("a torn list of the containers", &|root| write(root, "overlay-containers/containers.json", "[{")),
        ("no layers", &|root| layers(root).iter().for_each(|layer| std::fs::remove_dir_all(layer).unwrap())),
        ("empty manifests", &|root| {
            for file in files(&root.join("overlay-images"), "") {
                std::fs::write(file, "").unwrap();
            }
        }),
        ("no program", &|root| {
            let programs = layers(root).into_iter().map(|layer| layer.join("diff/program"));
            programs.filter(|file| file.exists()).for_each(|file| std::fs::remove_file(file).unwrap());
        }),
        // The agent requests a reset if podman has not answered for an hour.
        ("a torn database", &|root| {
            write(root, "libpod/bolt_state.db", "torn");
            std::fs::write(state.join("storage-reset.request"), "podman has not answered").unwrap();
        }),
    ];
    for (what, change) in damages {
        let begun = Instant::now();
        device.kill();
        device.pod.podman(&["stop", "--all", "--time", "0"]);
        device.pod.damage(&state, change);
        device.up();
        let runs = || {
            let running = device.pod.running("web");
            std::thread::sleep(Duration::from_secs(1));
            running.len() == 1 && device.pod.running("web") == running
        };
        wait_until(what, runs).await;
        assert_eq!(device.pod.containers().len(), 1, "{what}");
        assert_eq!(std::fs::read_to_string(&token).unwrap(), "kept", "{what}");
        eprintln!("{:.1} s: {what}", begun.elapsed().as_secs_f64());
    }
    let is_told = |status: &agent_protocol::DeviceStatus| {
        let words = "podman's storage was reset (podman has not answered); 2 volume(s) were kept";
        status.events.iter().any(|event| event.what == words)
    };
    device.fleet.status("the reset", is_told).await;
    let label = |name: &str| format!("label=io.iot-agent.deployment={name}");
    for name in ["web", "gone"] {
        let listed = device.pod.podman(&["volume", "ls", "--quiet", "--filter", &label(name)]);
        assert_eq!(listed.trim(), format!("iot-damaged.{name}.data"));
    }
}

fn write(root: &Path, path: &str, text: &str) {
    std::fs::write(root.join(path), text).unwrap();
}

fn layers(root: &Path) -> Vec<PathBuf> {
    let directories = std::fs::read_dir(root.join("overlay")).unwrap().map(|entry| entry.unwrap().path());
    directories.filter(|path| path.is_dir() && path.file_name().is_some_and(|name| name != "l")).collect()
}

/// Returns the files below the subdirectories of a directory whose names begin with these words.
fn files(directory: &Path, words: &str) -> Vec<PathBuf> {
    let directories = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let entries = directories.filter(|path| path.is_dir()).flat_map(|path| std::fs::read_dir(path).unwrap());
    let named = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(words);
    entries.map(|entry| entry.unwrap().path()).filter(named).collect()
}

/// The container cannot be started, although its image was fetched again. The agent lets podman end, and its next start
/// resets the storage.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes seven minutes: cargo xtask soak --agent runs it"]
async fn a_storage_that_cannot_be_repaired_is_reset_once() {
    let mut device = Device::start("beyond").await;
    let revision = device.fleet.put("web", &document(spec(&[]))).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.kill();
    device.pod.podman(&["stop", "--all", "--time", "0"]);
    device.pod.break_storage(true);
    device.up();
    let state = device.home.path().to_owned();
    let request = state.join("storage-reset.request");
    let deadline = Instant::now() + Duration::from_secs(600);
    while !request.exists() {
        assert!(Instant::now() < deadline, "no request: {:#?}", device.fleet.latest().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    device.pod.break_storage(false);
    device.pod.damage(&state, |_| {});
    wait_until("the container", || device.pod.running("web").len() == 1).await;
    let (_, status) = device.fleet.latest().await.unwrap();
    let events: Vec<_> = status.events.iter().map(|event| event.what.as_str()).collect();
    let has = |words: &str| events.iter().any(|event| event.contains(words));
    assert!(has("which may be damaged, to fetch it again") && has("beyond repair"), "{events:#?}");
    assert!(has("was reset (the container of web could not be started 10 times)"), "{events:#?}");
}

/// Podman lets all requests wait, as it may after its file system was read-only for a while.
#[tokio::test(flavor = "multi_thread")]
async fn a_podman_that_no_longer_answers_is_ended() {
    let mut device = Device::start("hanging").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.pod.note_process();
    device.pod.hang(true);
    let revision = device.fleet.put("web", &generation(2)).await;
    // In the place of systemd's socket, the test starts the service again.
    device.pod.restart_when_ended();
    device.fleet.line("web", revision, Phase::Running).await;
    let status = device.fleet.status("an event", |status| {
        status.events.iter().any(|event| event.what.contains("ended podman, which no longer answers"))
    });
    status.await;
}
