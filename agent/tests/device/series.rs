//! Long series that `cargo xtask soak --agent` runs: kills at random moments of pulls and changes, and releases on a
//! small disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use agent_protocol::deployment::{ContainerSpec, Document, Volume};
use agent_protocol::{DeviceStatus, Phase};
use serde_json::Value;

use crate::device::{Device, document, spec};
use crate::endurance::{next, rand_seed};
use crate::fleet::wait_until;
use crate::registry::Registry;

const KILLS: u32 = 200;
/// The deployments of the series of kills.
const NAMES: [&str; 3] = ["a", "b", "c"];
const IMAGES: usize = 6;
/// The rate of the line to the registry in bytes for each second, with which a pull takes about as long as a round.
const RATE: u64 = 6 << 20;

const RELEASES: usize = 60;
const RELEASE_BYTES: usize = 50 << 20;
/// Each release of this many ends at once, so that the one before it must go on.
const FAULTY: usize = 7;

fn of_image(reference: &str, words: &[&str]) -> ContainerSpec {
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    ContainerSpec { image: reference.to_owned(), volumes: vec![data], ..spec(words) }
}

/// Kills the agent, and in half of the cases podman's service too, at random moments while documents are put and
/// deleted. In the end, everything is as desired and nothing else is left.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes five minutes: cargo xtask soak --agent runs it"]
async fn the_desired_state_is_reached_after_two_hundred_kills() {
    let registry = Registry::start();
    let mut contents = BTreeMap::new();
    for number in 0..IMAGES {
        let image = registry.push(&format!("series:{number}"), 2 << 20);
        contents.insert(image, registry.layer(0));
    }
    let images: Vec<_> = contents.keys().cloned().collect();
    let mut device = Device::start_with_images("series", &registry.configuration(), "").await;
    registry.line.rate.store(RATE, Ordering::SeqCst);
    // Each volume has a token, which is lost if the volume is made again.
    for name in NAMES {
        let revision = device.fleet.put(name, &document(of_image(&images[0], &[]))).await;
        device.fleet.line(name, revision, Phase::Running).await;
        std::fs::write(token(&device, name), name).unwrap();
    }
    let mut desired: [Option<String>; 3] = NAMES.map(|_| Some(images[0].clone()));
    let mut random = rand_seed();
    let begun = Instant::now();
    for round in 0..KILLS {
        for (which, name) in NAMES.iter().enumerate() {
            match next(&mut random) % 4 {
                0 | 1 => {
                    let image = &images[next(&mut random) as usize % IMAGES];
                    let mut spec = of_image(image, &[]);
                    spec.env.insert("GENERATION".into(), round.to_string());
                    device.fleet.put(name, &document(spec)).await;
                    desired[which] = Some(image.clone());
                }
                2 if desired[which].is_some() => {
                    device.fleet.delete(name).await;
                    desired[which] = None;
                }
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(next(&mut random) % 2500)).await;
        if round % 20 == 19 {
            eprintln!("{} kills in {} s", round + 1, begun.elapsed().as_secs());
        }
        device.kill();
        if next(&mut random).is_multiple_of(2) {
            device.pod.stop_service();
            device.pod.start_service();
        }
        device.up();
    }
    registry.line.rate.store(u64::MAX, Ordering::SeqCst);
    let end = Instant::now();
    is_as_desired(&device, &desired).await;
    eprintln!("as desired {} s after the last kill", end.elapsed().as_secs());
    check_storage(&mut device, &desired, &contents).await;
}

fn token(device: &Device, name: &str) -> std::path::PathBuf {
    device.pod.in_storage(&format!("volumes/iot-series.{name}.data/_data/token"))
}

async fn is_as_desired(device: &Device, desired: &[Option<String>; 3]) {
    let revision = device.fleet.put("end", &document(spec(&[]))).await;
    let holds = |status: &DeviceStatus| {
        let phase = |name: &str| status.deployment(name).map(|line| line.phase);
        status.desired_revision >= revision
            && phase("end") == Some(Phase::Running)
            && NAMES
                .iter()
                .zip(desired)
                .all(|(name, image)| phase(name) == image.as_ref().map(|_| Phase::Running))
    };
    // A pull that podman's end has cut is repeated after a pause.
    let deadline = Instant::now() + Duration::from_secs(300);
    while !device.fleet.latest().await.is_some_and(|(_, status)| holds(&status)) {
        assert!(Instant::now() < deadline, "not as desired: {:#?}", device.fleet.latest().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Checks that podman has the desired containers, images and volumes, and nothing else.
async fn check_storage(
    device: &mut Device,
    desired: &[Option<String>; 3],
    contents: &BTreeMap<String, Vec<u8>>,
) {
    let wanted = desired.iter().flatten().count() + 1;
    let listed = || -> Vec<Value> {
        let listed = device.pod.podman(&["ps", "--all", "--external", "--format", "json"]);
        serde_json::from_str::<Option<_>>(&listed).unwrap().unwrap_or_default()
    };
    // The agent removes a leftover after two searches, and an image after its last container.
    let deadline = Instant::now() + Duration::from_secs(180);
    while listed().len() != wanted {
        assert!(Instant::now() < deadline, "{:#?}", listed());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    for container in listed() {
        let name = container["Labels"]["io.iot-agent.deployment"].as_str().unwrap();
        assert_eq!(container["State"], "running", "{container:#?}");
        if let Some(which) = NAMES.iter().position(|known| *known == name) {
            assert_eq!(container["Image"].as_str(), desired[which].as_deref(), "{name}");
        }
    }
    for name in NAMES {
        assert_eq!(std::fs::read_to_string(token(device, name)).unwrap(), name, "a volume was lost");
    }
    let named: BTreeSet<_> = desired.iter().flatten().cloned().collect();
    let images = || device.pod.podman(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    let of_registry = || -> BTreeSet<String> {
        images().lines().filter(|name| name.contains("series")).map(str::to_owned).collect()
    };
    // The record of an image whose pull was cut off stays for a minute.
    let deadline = Instant::now() + Duration::from_secs(180);
    while named != of_registry() {
        assert!(Instant::now() < deadline, "{}", images());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    for image in &named {
        device.pod.podman(&["image", "inspect", image]);
        let place = device.pod.podman(&["image", "mount", image]);
        let content = std::fs::read(Path::new(place.trim()).join("random0")).unwrap();
        assert!(content == contents[image], "{image} is damaged");
        device.pod.podman(&["image", "unmount", image]);
    }
    let monitors = device.pod.monitors();
    // Podman's start ends processes that it no longer knows. Layers of pulls that were cut off are deleted at a boot.
    let unused = device.pod.unused_layers();
    device.kill();
    device.pod.stop_service();
    device.pod.boot();
    device.pod.start_service();
    device.up();
    wait_until("all containers", || device.pod.containers().len() == wanted).await;
    let (count, lost) = (named.len() + 1, monitors - wanted);
    eprintln!(
        "{wanted} containers, {count} images; until the boot: {unused} unused layers, {lost} lost processes"
    );
    assert_eq!((device.pod.unused_layers(), device.pod.temporary_files()), (0, Vec::new()));
    assert_eq!(device.pod.monitors(), wanted, "processes of containers that podman no longer has");
}

/// A file system of 2 GiB, mounted over a loop device.
struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Self { directory };
        let image = disk.directory.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(2 << 30).unwrap();
        run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
        std::fs::create_dir(disk.path()).unwrap();
        run("mount", &["-o", "loop", image.to_str().unwrap(), disk.path().to_str().unwrap()]);
        disk
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("disk")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("umount", &["--recursive", self.path().to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}; this test needs root and a loop device");
}

fn release(image: &str, words: &[&str]) -> Document {
    document(ContainerSpec { probation_seconds: Some(1), ..of_image(image, words) })
}

/// A device whose podman and whose agent have a disk of 2 GiB gets 60 releases of a 50 MB image. Some releases do not
/// work. Without deletions, the disk would be full after about 35 releases.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes ten minutes: cargo xtask soak --agent runs it"]
async fn sixty_releases_do_not_fill_the_disk() {
    let disk = Disk::mount();
    let registry = Registry::start();
    let device = Device::start_at(&disk.path(), "releases", &registry.configuration()).await;
    let begun = Instant::now();
    let mut works = String::new();
    let mut least_free = u64::MAX;
    for number in 1..=RELEASES {
        let image = registry.push(&format!("release:{number}"), RELEASE_BYTES);
        let is_faulty = number % FAULTY == 0;
        let words: &[&str] = if is_faulty { &["exit", "3"] } else { &[] };
        let revision = device.fleet.put("web", &release(&image, words)).await;
        let phase = if is_faulty { Phase::RolledBack } else { Phase::Running };
        device.fleet.line("web", revision, phase).await;
        if !is_faulty {
            works = image;
        }
        let running = || {
            let containers = device.pod.containers();
            let of = |container: &&Value| container["State"] == "running";
            containers
                .iter()
                .filter(of)
                .map(|it| it["Image"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        wait_until("the newest release that works", || running() == [works.clone()]).await;
        let (_, status) = device.fleet.latest().await.unwrap();
        if number % 10 == 0 {
            eprintln!("{number} releases in {} s", begun.elapsed().as_secs());
        }
        least_free = least_free.min(status.disk_free_mib.unwrap());
        let line = status.deployment("web").unwrap();
        let error = line.last_error.clone().unwrap_or_default();
        assert!(!error.contains("space") && !error.contains("min_free_mib"), "release {number}: {error}");
        for event in &status.events {
            assert!(!event.what.contains("no space"), "release {number}: {}", event.what);
        }
    }
    let images = device.pod.podman(&["images", "--quiet"]).lines().count();
    eprintln!("{RELEASES} releases: at least {least_free} MiB were free; {images} images at the end");
    assert!(images <= 3 && least_free > 1000, "{images} images, {least_free} MiB");
}
