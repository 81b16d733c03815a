//! Prepares podman's storage before podman's service starts, when no other process uses the storage. This is a program
//! of its own, and not a part of the agent's service, since podman's API has no request for it.
//!
//! Podman does not sync the layers that it unpacks, but it syncs the list of the layers. After a power cut, the list
//! can therefore have layers whose files are empty, and the next download would use them again (podman#16214). A layer
//! of a complete image is synced by the agent. All other layers are marked as incomplete at the first start after a
//! boot. Podman then deletes them itself, with the user ids of their files.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, fcntl_lock};
use serde_json::{Map, Value, json};

use crate::reset::Reset;
use crate::{files, lost_processes};

/// The directories and files that podman's service uses (`dist/iot-podman.service`).
#[derive(Debug, Clone)]
pub struct Places {
    /// Podman's storage (`graphroot` of containers-storage.conf(5)) with the driver overlay.
    pub storage: PathBuf,
    /// The directory for podman's temporary files (TMPDIR).
    pub temporary: PathBuf,
    /// The agent's state directory, in which the agent requests a reset of the storage.
    pub state: PathBuf,
    /// The file that exists if podman has been started since the boot.
    pub started: PathBuf,
    /// The program podman(1).
    pub podman: PathBuf,
}

/// The time in which podman lists its containers, in seconds.
const LISTING_SECONDS: &str = "60";
/// The lists of podman's storage: the layers, and the images and containers that use them.
pub const LAYERS: &str = "overlay-layers/layers.json";
pub const USERS: [&str; 3] = [
    "overlay-images/images.json",
    "overlay-containers/containers.json",
    "overlay-containers/volatile-containers.json",
];

/// Deletes podman's temporary files, carries out a requested reset, renames lists that podman cannot read, and ends
/// processes of containers that podman does not have. At the first start after a boot, or if a list was renamed, also
/// marks the layers that no image and no container uses. Returns a line for each change.
///
/// # Errors
/// Returns an error if a file cannot be read, written or deleted. Podman can be started nevertheless.
pub fn prepare(places: &Places) -> Result<Vec<String>> {
    let emptied = empty(&places.temporary);
    let reset = Reset::new(&places.state);
    let mut changes = Vec::new();
    if reset.is_for_silence() && answers(&places.podman) {
        reset.withdraw().context("withdraw the request of a reset")?;
        changes.push("podman's storage is not reset, since podman answers".to_owned());
    } else if let Some(reason) = reset.carry_out(&places.storage)? {
        changes.push(format!("reset podman's storage: {reason}"));
    }
    for list in [LAYERS].iter().chain(&USERS) {
        changes.extend(set_aside_if_unreadable(&places.storage.join(list))?);
    }
    if !places.started.exists() || !changes.is_empty() {
        let count = mark_unused_layers(&places.storage)
            .with_context(|| format!("look for unused layers in {}", places.storage.display()))?;
        if count > 0 {
            changes.push(format!("podman deletes {count} layer(s) that no image uses"));
        }
        File::create(&places.started).with_context(|| format!("create {}", places.started.display()))?;
    }
    let ended = lost_processes::end(&places.storage, &containers(&places.storage)?);
    if ended > 0 {
        changes.push(format!("ended the processes of {ended} container(s) that podman no longer has"));
    }
    emptied.map(|()| changes)
}

/// Returns whether podman can list its containers. Podman's service may have been stopped, and the storage may be sound.
fn answers(podman: &Path) -> bool {
    let mut list = Command::new("timeout");
    list.arg(LISTING_SECONDS).arg(podman).args(["ps", "--all", "--quiet"]);
    list.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    list.status().is_ok_and(|status| status.success())
}

/// Returns the ids of the containers in the storage.
fn containers(storage: &Path) -> Result<HashSet<String>> {
    let [_, lists @ ..] = USERS;
    let lists = lists.map(|list| read_list(&storage.join(list))).into_iter().collect::<Result<Vec<_>>>()?;
    let id = |container: &Map<String, Value>| container.get("id")?.as_str().map(str::to_owned);
    Ok(lists.iter().flatten().filter_map(id).collect())
}

/// Renames a list that is not JSON. Podman 5 does not start with such a list, and podman 4.3 takes it as an empty one.
fn set_aside_if_unreadable(path: &Path) -> Result<Option<String>> {
    match read_list(path) {
        Err(error) if error.downcast_ref::<serde_json::Error>().is_some() => {
            let aside = path.with_extension("corrupt");
            fs::rename(path, &aside).with_context(|| format!("rename {}", path.display()))?;
            Ok(Some(format!("{error:#}; it was renamed to {}", aside.display())))
        }
        list => list.map(|_| None),
    }
}

/// Deletes the content of a directory. If podman is ended during a download or while it loads an archive, a file as
/// large as the image stays there.
fn empty(directory: &Path) -> Result<()> {
    let failed = || format!("empty the directory {}", directory.display());
    fs::create_dir_all(directory).with_context(failed)?;
    for entry in fs::read_dir(directory).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let is_directory = entry.file_type().with_context(failed)?.is_dir();
        let remove = if is_directory { fs::remove_dir_all } else { fs::remove_file };
        remove(&entry.path()).with_context(failed)?;
    }
    Ok(())
}

/// Marks the layers that no image and no container uses as incomplete, like those that podman was unpacking when it was
/// killed. Returns their number.
fn mark_unused_layers(storage: &Path) -> Result<usize> {
    let directory = storage.join("overlay-layers");
    let lock = match File::options().read(true).write(true).open(directory.join("layers.lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        lock => lock.context("open the lock of the layers")?,
    };
    // Podman waits for this lock before it reads the list. The lock ends with the file.
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive).context("lock the layers")?;
    let path = storage.join(LAYERS);
    let mut layers = read_list(&path)?;
    let users = USERS.map(|list| read_list(&storage.join(list))).into_iter().collect::<Result<Vec<_>>>()?;
    let used = used_layers(&layers, users.iter().flatten());
    let is_unused = |layer: &&mut Map<String, Value>| {
        layer.get("id").and_then(Value::as_str).is_some_and(|id| !used.contains(id))
    };
    let mut count = 0;
    for layer in layers.iter_mut().filter(is_unused) {
        match layer.entry("flags").or_insert_with(|| json!({})) {
            Value::Object(flags) => drop(flags.insert("incomplete".to_owned(), json!(true))),
            flags => *flags = json!({ "incomplete": true }),
        }
        count += 1;
    }
    if count > 0 {
        let bytes = serde_json::to_vec(&layers).context("serialise the list of the layers")?;
        files::replace_durably(&path, &bytes).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(count)
}

/// Returns the ids of the layers of these images and containers, with all layers below them. An id may be missing in
/// `layers`.
pub fn used_layers<'a>(
    layers: &[Map<String, Value>],
    users: impl Iterator<Item = &'a Map<String, Value>>,
) -> HashSet<String> {
    let text = |object: &Map<String, Value>, key: &str| object.get(key)?.as_str().map(str::to_owned);
    let parents: HashMap<_, _> =
        layers.iter().filter_map(|layer| Some((text(layer, "id")?, text(layer, "parent")?))).collect();
    let mut used = HashSet::new();
    for user in users {
        // An image that containers with other user ids use has more than one top layer.
        let mapped = user.get("mapped-layers").and_then(Value::as_array).into_iter().flatten();
        let mapped = mapped.filter_map(|layer| layer.as_str().map(str::to_owned));
        for top in text(user, "layer").into_iter().chain(mapped) {
            let mut next = Some(top);
            while let Some(id) = next.filter(|id| !used.contains(id)) {
                next = parents.get(&id).cloned();
                used.insert(id);
            }
        }
    }
    used
}

/// Reads one of the storage's lists. Like podman, takes a file that is missing as an empty list.
fn read_list(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes.with_context(|| format!("read {}", path.display()))?,
    };
    parse_list(&bytes).with_context(|| format!("read the list {}", path.display()))
}

/// Parses one of the storage's lists. Like podman, takes an empty file as an empty list.
///
/// # Errors
/// Returns an error if the file is not a list in JSON. [`prepare`] renames such a file.
pub fn parse_list(bytes: &[u8]) -> serde_json::Result<Vec<Map<String, Value>>> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let list: Option<_> = serde_json::from_slice(bytes)?;
    Ok(list.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(directory: &Path) -> Places {
        Places {
            storage: directory.join("storage"),
            temporary: directory.join("tmp"),
            state: directory.to_owned(),
            started: directory.join("started"),
            podman: directory.join("podman"),
        }
    }

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn incomplete(places: &Places) -> Vec<String> {
        let layers = read_list(&places.storage.join("overlay-layers/layers.json")).unwrap();
        let is_incomplete =
            |layer: &&Map<String, Value>| layer.get("flags").is_some_and(|flags| flags["incomplete"] == true);
        layers.iter().filter(is_incomplete).map(|layer| layer["id"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_layers_without_an_image_or_a_container_are_marked_once_after_a_boot() {
        let directory = tempfile::tempdir().unwrap();
        let (places, nothing) = (places(directory.path()), Vec::<String>::new());
        assert_eq!(prepare(&places).unwrap(), nothing, "there is no storage yet");
        fs::remove_file(&places.started).unwrap();
        let layers = r#"[{"id":"a"},{"id":"b","parent":"a","diff-size":9007199254740993},{"id":"c","parent":"b","flags":{"x":1}},
                         {"id":"d","parent":"b"},{"id":"e","parent":"a"},{"id":"m"},{"id":"v"}]"#;
        for (path, text) in [
            ("overlay-layers/layers.lock", ""),
            ("overlay-layers/layers.json", layers),
            ("overlay-images/images.json", r#"[{"id":"i","layer":"b","mapped-layers":["m"]},{"id":"j"}]"#),
            ("overlay-containers/containers.json", r#"[{"id":"k","layer":"d"}]"#),
            ("overlay-containers/volatile-containers.json", r#"[{"id":"l","layer":"v"}]"#),
        ] {
            write(&places.storage.join(path), text);
        }
        assert_eq!(prepare(&places).unwrap(), ["podman deletes 2 layer(s) that no image uses"]);
        assert_eq!(incomplete(&places), ["c", "e"]);
        let path = places.storage.join("overlay-layers/layers.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(r#""x":1"#) && text.contains("9007199254740993"), "{text}");
        // Podman is started again in the same boot, during which a download may have left complete layers.
        fs::write(&path, layers).unwrap();
        assert_eq!(prepare(&places).unwrap(), nothing);
        assert!(incomplete(&places).is_empty());
    }

    #[test]
    fn a_list_that_cannot_be_read_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        write(&places.storage.join("overlay-layers/layers.lock"), "");
        write(&places.storage.join(LAYERS), r#"[{"id":"a"},{"id":"b"}]"#);
        write(&places.storage.join("overlay-containers/containers.json"), r#"[{"id":"k","layer":"b"}]"#);
        let images = places.storage.join("overlay-images/images.json");
        write(&images, r#"[{"id":"i","layer":"a"}]"#);
        assert!(prepare(&places).unwrap().is_empty());
        write(&images, r#"[{"id":"i","layer":"#);
        let changes = prepare(&places).unwrap();
        assert!(changes[0].contains("images.json") && changes[0].contains("images.corrupt"), "{changes:?}");
        assert_eq!(incomplete(&places), ["a"]);
        assert!(!images.exists());
        write(&places.storage.join(LAYERS), "[{");
        assert_eq!(prepare(&places).unwrap().len(), 1);
        assert!(incomplete(&places).is_empty());
    }

    #[test]
    fn the_unit_names_a_directory_that_exists() {
        let unit = include_str!("../dist/iot-podman.service");
        let directory = unit.lines().find_map(|line| line.strip_prefix("Environment=TMPDIR=")).unwrap();
        assert!(unit.contains("iot-agent prepare-storage --temporary ${TMPDIR}\n"));
        let made = format!("d {directory} 0700 iot-agent iot-agent -\n");
        assert!(include_str!("../dist/iot-agent.tmpfiles").contains(&made));
    }

    #[test]
    fn temporary_files_are_deleted_at_each_start() {
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        for _ in 0..2 {
            write(&places.temporary.join("libpod-images-load.tar1"), "x");
            write(&places.temporary.join("container_images_1/x"), "x");
            prepare(&places).unwrap();
            assert_eq!(fs::read_dir(&places.temporary).unwrap().count(), 0);
        }
    }

    #[test]
    fn the_storage_of_a_podman_that_answers_is_not_reset() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let places = places(directory.path());
        let (image, request) = (places.storage.join("image"), directory.path().join("storage-reset.request"));
        for (code, is_kept) in [(0, true), (1, false)] {
            write(&image, "");
            write(&request, "podman has not answered for 60 minutes");
            write(&places.podman, &format!("#!/bin/sh\nexit {code}\n"));
            fs::set_permissions(&places.podman, fs::Permissions::from_mode(0o755)).unwrap();
            let changes = prepare(&places).unwrap();
            assert_eq!((image.exists(), request.exists()), (is_kept, false), "{changes:?}");
        }
    }
}
