//! An honest disk, as a directory and as a real file system.

mod legal;
mod pulled;
mod sabotages;

use std::cell::Cell;
use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use agent_protocol::deployment::Volume;
use agent_protocol::{ContainerSpec, Deployment, Document};
use ext4_view::Ext4Read;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::files::Directory;

const DEVICE: &str = "pi-7";
const IMAGE: &str = "localhost/iot-workload:1";
const STATE: &str = "/var/lib/iot-agent/state";
const STORAGE: &str = "/var/lib/iot-agent/.local/share/containers/storage";
const LINK: &str = "/usr/local/bin/iot-agent";
const LAYER: &str = "aa11";
const ID: &str = "bb22";
/// The point at which the honest disk has everything that was acknowledged.
const END: usize = 100;

fn sha(bytes: &[u8]) -> String {
    Algorithm::Sha256.of(bytes).hex().to_owned()
}

/// The executables: an old one, the current one, and one that is never installed.
fn executable(version: u8) -> Vec<u8> {
    [vec![version; 5000], vec![0x7f; 5000]].concat()
}

fn workload() -> Vec<u8> {
    b"ELF".repeat(3000)
}

fn document(generation: u64) -> String {
    let spec = ContainerSpec {
        env: BTreeMap::from([("GENERATION".to_owned(), generation.to_string())]),
        volumes: vec![Volume { name: "data".to_owned(), mount: "/data".to_owned(), read_only: false }],
        ..ContainerSpec::of(IMAGE)
    };
    String::from_utf8(Document::of(Deployment::PodmanContainer(spec)).to_bytes()).unwrap()
}

fn desired(name: &str, revision: u64, wish: Wish) -> EventKind {
    EventKind::Desired { name: name.to_owned(), revision, wish }
}

/// A device that is installed, upgraded, and gets two deployments, of which one is deleted.
fn events() -> Vec<Event> {
    let [old, current] = [1, 2].map(|version| sha(&executable(version)));
    let kinds = [
        (0, EventKind::InstallBegan { sha256: old.clone() }),
        (10, EventKind::Installed { sha256: old }),
        (20, EventKind::InstallBegan { sha256: current.clone() }),
        (30, EventKind::Installed { sha256: current }),
        (40, desired("web", 5, Wish::Put(document(1)))),
        (45, desired("job", 6, Wish::Put(document(1)))),
        (50, EventKind::Acknowledged { revision: 6 }),
        (60, EventKind::Loaded { reference: IMAGE.to_owned() }),
        (65, EventKind::Answered { deployment: "web".to_owned(), generation: 1, starts: 3 }),
        (70, desired("web", 7, Wish::Put(document(2)))),
        (75, desired("job", 8, Wish::Delete)),
        (80, EventKind::Acknowledged { revision: 8 }),
        (90, EventKind::Answered { deployment: "web".to_owned(), generation: 2, starts: 4 }),
        (END, desired("web", 9, Wish::Purge)),
    ];
    kinds.into_iter().map(|(position, kind)| Event { position, kind }).collect()
}

fn judge_of(events: Vec<Event>) -> Judge {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../agent/dist");
    let secrets = BTreeMap::from([("device.creds".to_owned(), "key".to_owned())]);
    let names = ["the old agent", "the agent under test", "another agent"];
    let blobs: Vec<_> = (1..=3).map(executable).chain([workload()]).collect();
    let recording = Recording {
        device_id: DEVICE.to_owned(),
        executables: blobs.iter().zip(names).map(|(blob, name)| (sha(blob), name.to_owned())).collect(),
        files: installed_files(&dist, "[agent]\n", &secrets).unwrap(),
        images: BTreeMap::from([(
            IMAGE.to_owned(),
            BTreeMap::from([("workload".to_owned(), sha(&workload()))]),
        )]),
        events,
    };
    Judge::new(recording, blobs).unwrap()
}

fn state(revision: u64, deployments: &[(&str, u64, Wish)]) -> Vec<u8> {
    let entry = |(name, revision, wish): &(&str, u64, Wish)| {
        ((*name).to_owned(), json!({ "revision": revision, "wish": wish, "applied": null }))
    };
    let deployments: serde_json::Map<_, _> = deployments.iter().map(entry).collect();
    let body = json!({ "revision": revision, "deployments": deployments }).to_string();
    format!("iot-agent-state-1 {DEVICE} sha256:{}\n{body}", sha(body.as_bytes())).into_bytes()
}

/// A directory in place of the device's disk.
struct Disk {
    directory: TempDir,
    files: Directory,
}

impl Disk {
    fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.files.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.files.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(fs::remove_file(&path));
        symlink(target, path).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.files.path(path)).unwrap();
    }

    /// Makes a file empty, as a rename before the content is on disk leaves it.
    fn empty(&self, path: &str) {
        assert!(self.files.path(path).exists(), "{path}");
        self.write(path, "");
    }

    fn record(&self, directory: &str, name: &str, text: &str) {
        self.write(&format!("/var/lib/iot-agent/{directory}/{}", sha(name.as_bytes())), text);
    }

    /// The disk at [`END`].
    fn honest() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Self { files: Directory(directory.path().join("disk")), directory };
        disk.write(STATE, state(8, &[("web", 7, Wish::Put(document(2))), ("job", 8, Wish::Delete)]));
        disk.write("/var/lib/iot-agent/state.old", state(6, &[("web", 5, Wish::Put(document(1)))]));
        disk.write(&starts("web"), "4\n");
        disk.write(&starts("job"), "1\n");
        disk.write(&format!("{STORAGE}/volumes/of-somebody-else/_data/starts"), "");
        disk.install(2);
        disk.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\niot-agent:x:987:986::/:/usr/sbin/nologin\n");
        for InstalledFile { path, kind } in judge_of(Vec::new()).recording.files {
            let path = path.replace("{uid}", "987");
            match kind {
                InstalledKind::Renamed { content } | InstalledKind::Prepared { content } => {
                    disk.write(&path, &content);
                }
                InstalledKind::Link { name } => disk.link(&path, &format!("/somewhere/{name}")),
                InstalledKind::Marker => disk.write(&path, ""),
            }
        }
        disk.record("fetched", &format!("{IMAGE}\n{ID}"), &format!("{IMAGE}\n{ID}"));
        disk.fill_storage();
        disk
    }

    fn install(&self, version: u8) {
        let path = executable_path(version);
        self.write(&path, executable(version));
        self.link(LINK, &path);
    }

    /// Writes an image of two layers, as podman lists it, and a layer that no image uses.
    fn fill_storage(&self) {
        let layers =
            json!([{ "id": "cc33" }, { "id": LAYER, "parent": "cc33" }, { "id": "dd44", "parent": LAYER }]);
        self.write(&format!("{STORAGE}/overlay-layers/layers.json"), layers.to_string());
        let digest = |text: &str| Algorithm::Sha256.of(text.as_bytes()).to_string();
        let digests = json!({ "manifest": digest("{}"), "sha256:1f": digest("[]") });
        let image = json!({ "id": ID, "names": [IMAGE], "layer": LAYER, "big-data-digests": digests });
        self.write(&format!("{STORAGE}/overlay-images/images.json"), json!([image]).to_string());
        self.write(&format!("{STORAGE}/overlay-images/{ID}/manifest"), "{}");
        self.write(&format!("{STORAGE}/overlay-images/{ID}/=c2hhMjU2OjFm"), "[]");
        self.write(&format!("{STORAGE}/overlay-containers/containers.json"), "[]");
        for layer in [LAYER, "cc33"] {
            fs::create_dir_all(self.files.path(&format!("{STORAGE}/overlay/{layer}/diff"))).unwrap();
            self.write(&format!("{STORAGE}/overlay/{layer}/link"), format!("SHORT{layer}"));
            self.link(&format!("{STORAGE}/overlay/l/SHORT{layer}"), &format!("../{layer}/diff"));
        }
        self.write(&format!("{STORAGE}/overlay/{LAYER}/lower"), "l/SHORTcc33");
        self.write(&program(), workload());
        self.write(&format!("{STORAGE}/overlay/dd44/diff/workload"), "");
    }

    fn write_empty(&self, path: &str) {
        self.write(path, "");
    }

    fn before_any_deployment(&self) {
        for directory in ["fetched", ".local"] {
            fs::remove_dir_all(self.files.path("/var/lib/iot-agent").join(directory)).unwrap();
        }
        self.remove(STATE);
        self.remove("/var/lib/iot-agent/state.old");
    }

    fn judged(&self, point: usize) -> Judgement {
        judge_of(events()).judge_files(point, &self.files).unwrap()
    }
}

fn starts(deployment: &str) -> String {
    format!("{STORAGE}/volumes/iot-{DEVICE}.{deployment}.data/_data/starts")
}

fn program() -> String {
    format!("{STORAGE}/overlay/{LAYER}/diff/workload")
}

fn executable_path(version: u8) -> String {
    format!("/usr/local/lib/iot-agent/versions/{}/iot-agent", &sha(&executable(version))[..16])
}

#[test]
fn an_honest_disk_has_no_loss() {
    let judgement = Disk::honest().judged(END);
    assert_eq!(judgement.losses, []);
    assert!(!judgement.is_odd);
    assert_eq!(judgement.executable, Some(sha(&executable(2))));
}

#[test]
fn an_answer_of_an_old_container_counts_for_nothing_after_a_purge() {
    let answered =
        |generation, starts| EventKind::Answered { deployment: "web".to_owned(), generation, starts };
    let kinds = [
        desired("web", 1, Wish::Put(document(1))),
        answered(1, 7),
        desired("web", 2, Wish::Purge),
        answered(1, 7),
        desired("web", 3, Wish::Put(document(2))),
        answered(1, 7),
        answered(2, 1),
        desired("web", 4, Wish::Delete),
        desired("web", 5, Wish::Put(document(3))),
    ];
    let events = kinds.into_iter().enumerate().map(|(position, kind)| Event { position, kind }).collect();
    let judge = judge_of(events);
    let floors: Vec<_> = (0..10)
        .map(|point| judge.timeline.at(point).starts.values().map(|floor| floor.number).next())
        .collect();
    assert_eq!(floors, [None, Some(7), Some(7), None, None, None, Some(1), Some(1), Some(1), Some(1)]);
}

#[test]
fn a_file_that_the_agent_has_set_aside_makes_a_state_odd() {
    for (path, is_odd) in [
        ("/var/lib/iot-agent/state.corrupt", true),
        ("/var/lib/iot-agent/state.new", false),
        ("/var/lib/iot-agent/fetched/x.new", false),
        ("/etc/iot-agent/staged", false),
    ] {
        let disk = Disk::honest();
        disk.write(path, "x");
        let judgement = disk.judged(END);
        assert!(judgement.losses.is_empty() && judgement.is_odd == is_odd, "{path}: {:?}", judgement.losses);
    }
}

#[test]
fn threads_may_share_a_judge() {
    let judge = judge_of(events());
    let disk = Disk::honest();
    let image = image(&disk);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (judge, image) = (&judge, image.clone());
            scope.spawn(move || {
                let disk = Ext4::load(Box::new(image)).unwrap();
                assert_eq!(judge.judge(END, &disk).unwrap().losses, []);
            });
        }
    });
}

#[test]
fn a_recording_needs_the_contents_that_it_names() {
    let Judge { recording, known, .. } = judge_of(events());
    for missing in known.0.keys() {
        let blobs = known.0.iter().filter(|(sha256, _)| *sha256 != missing).map(|(_, blob)| blob.clone());
        let error = Judge::new(recording.clone(), blobs.collect()).unwrap_err().to_string();
        assert!(error.contains(missing), "{error}");
    }
    let text = serde_json::to_string(&recording).unwrap();
    assert!(text.contains(r#"{"position":50,"event":"acknowledged","revision":6}"#), "{text}");
    assert_eq!(serde_json::from_str::<Recording>(&text).unwrap(), recording);
}

#[test]
fn the_places_are_those_of_the_agent_and_its_installer() {
    let program = include_str!("../../../../agent/src/main.rs");
    assert!(program.contains(&format!("default_value = \"{STORAGE}\"")));
    let scripts = [
        include_str!("../../../../agent/dist/install.sh"),
        include_str!("../../../../agent/dist/prerequisites.sh"),
    ];
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../agent/dist");
    for name in fs::read_dir(dist).unwrap().map(|entry| entry.unwrap().file_name()) {
        let name = name.to_str().unwrap();
        let stays_in_bundle = ["check-host.sh", "install.sh", "prerequisites.sh"].contains(&name);
        assert!(
            stays_in_bundle || scripts.iter().any(|script| script.contains(name)),
            "{name} is not installed"
        );
        let source = include_str!("../installation.rs");
        assert!(stays_in_bundle || source.contains(&format!("(\"{name}\", ")), "{name} is not judged");
    }
}

/// Returns an ext4 file system with the content of a directory.
fn image(disk: &Disk) -> Vec<u8> {
    let image = disk.directory.path().join("image");
    let program = xtask_core::host::tools::require("mke2fs").unwrap();
    let mut make = Command::new(program);
    make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&disk.files.0).arg(&image).arg("16M");
    assert!(make.output().unwrap().status.success());
    fs::read(image).unwrap()
}

#[test]
fn a_real_file_system_is_judged() {
    let judge = judge_of(events());
    let disk = Disk::honest();
    let judgement = judge.judge(END, &Ext4::load(Box::new(image(&disk))).unwrap()).unwrap();
    assert_eq!(judgement.losses, []);
    assert_eq!(judgement.executable, Some(sha(&executable(2))));
    disk.empty(STATE);
    disk.empty(&program());
    disk.write(&executable_path(2), [&executable(2)[..4096], &[0; 5904]].concat());
    let losses = judge.judge(END, &Ext4::load(Box::new(image(&disk))).unwrap()).unwrap().losses;
    let rules: Vec<_> = losses.iter().map(|loss| loss.rule).collect();
    assert_eq!(rules, [Rule::StateWhole, Rule::Executable, Rule::ImageComplete], "{losses:?}");
}

/// A reader that fails once its flag is set.
struct Breakable {
    image: Vec<u8>,
    is_broken: Rc<Cell<bool>>,
}

impl Ext4Read for Breakable {
    fn read(&mut self, start: u64, target: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.is_broken.get() { Err("the disk is gone".into()) } else { self.image.read(start, target) }
    }
}

#[test]
fn damage_of_the_file_system_is_a_loss_and_a_broken_reader_is_not() {
    let judge = judge_of(events());
    let mut image = image(&Disk::honest());
    let is_broken = Rc::new(Cell::new(false));
    let disk =
        Ext4::load(Box::new(Breakable { image: image.clone(), is_broken: Rc::clone(&is_broken) })).unwrap();
    is_broken.set(true);
    let error = format!("{:#}", judge.judge(END, &disk).unwrap_err());
    assert!(error.contains("the disk is gone") && error.contains("/var/lib/iot-agent/state"), "{error}");
    // The directory with this name has a checksum.
    let name = b"state.old";
    let at = image.windows(name.len()).position(|window| window == name).unwrap();
    image[at] ^= 1;
    let losses = judge.judge(END, &Ext4::load(Box::new(image)).unwrap()).unwrap().losses;
    assert!(losses.iter().any(|loss| loss.rule == Rule::FileSystem && loss.path == STATE), "{losses:?}");
}
