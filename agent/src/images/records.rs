//! The records of images on disk. Podman does not sync the images that it unpacks. A record in the directory `fetching`
//! therefore covers each download until the image is synced. After that, a record in the directory `fetched` replaces
//! it. If a record is left in `fetching` after a power cut, the agent deletes the image and downloads it again.
//!
//! A record contains the reference and the id of an image. The name of its file is a digest, because a reference may be
//! too long for a file's name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{digest, files};

#[derive(Debug, Clone)]
pub(super) struct Records {
    fetching: PathBuf,
    fetched: PathBuf,
}

/// An image that the agent has downloaded or loaded, complete and synced. The tag may have moved to another image
/// since.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fetched {
    pub reference: String,
    pub id: String,
}

/// Returns the images that the agent takes as complete, and uses without another download: each image with a record in
/// `fetched`, unless a record in `fetching` says that a download of its reference has not ended and began without this
/// image. The arguments have the name and the content of each file of the two directories. Torn records are ignored.
/// `xtask/judge` calls this for a disk after a power cut, and checks that the images are complete.
pub fn complete_images(fetching: &[(String, Vec<u8>)], fetched: &[(String, Vec<u8>)]) -> Vec<Fetched> {
    let parsed = |records: &[(String, Vec<u8>)], is_named: fn(&str, &str) -> bool| {
        let records = records.iter().filter(|(name, _)| Path::new(name).extension().is_none());
        let parse = |(name, bytes): &(String, Vec<u8>)| parse(name, str::from_utf8(bytes).ok()?, is_named);
        records.filter_map(parse).collect::<Vec<_>>()
    };
    let downloads = parsed(fetching, is_name_of_download);
    let is_complete = |reference: &str, id: &str| {
        let mut downloads = downloads.iter().filter(|(other, _)| other == reference);
        !id.is_empty() && downloads.all(|(_, earlier)| earlier == id)
    };
    let images = parsed(fetched, is_name_of_image).into_iter();
    let images = images.filter(|(reference, id)| is_complete(reference, id));
    images.map(|(reference, id)| Fetched { reference, id }).collect()
}

impl Records {
    pub(super) fn new(directory: &Path) -> Self {
        Self { fetching: directory.join("fetching"), fetched: directory.join("fetched") }
    }

    /// Returns the id that the image had before a download that has not ended. The id is empty if there was no image.
    pub(super) fn interrupted(&self, reference: &str) -> Option<String> {
        let text = fs::read_to_string(self.fetching.join(name_of(reference))).ok()?;
        Some(text.split_once('\n').unwrap_or_default().1.to_owned())
    }

    /// Records that a download begins. The record is on disk when this returns.
    pub(super) fn begin(&self, reference: &str, earlier: &str) -> io::Result<()> {
        write(&self.fetching, &name_of(reference), &format!("{reference}\n{earlier}"))?;
        files::sync_parent(&self.fetching)
    }

    /// Records that an image is complete and synced.
    pub(super) fn finish(&self, reference: &str, id: &str) -> io::Result<()> {
        let text = format!("{reference}\n{id}");
        write(&self.fetched, &name_of(&text), &text)?;
        files::sync_parent(&self.fetched)?;
        self.end(reference)
    }

    /// Deletes the record of a download.
    pub(super) fn end(&self, reference: &str) -> io::Result<()> {
        remove(&self.fetching.join(name_of(reference)))
    }

    /// Deletes the record of an image.
    pub(super) fn forget(&self, image: &Fetched) -> io::Result<()> {
        remove(&self.fetched.join(name_of(&format!("{}\n{}", image.reference, image.id))))
    }

    /// Returns the references of the downloads that have not ended.
    pub(super) fn downloads(&self) -> io::Result<Vec<String>> {
        Ok(read(&self.fetching, is_name_of_download)?.into_iter().map(|(reference, _)| reference).collect())
    }

    /// Returns the images that the agent has downloaded or loaded.
    pub(super) fn fetched(&self) -> io::Result<Vec<Fetched>> {
        let records = read(&self.fetched, is_name_of_image)?;
        let records = records.into_iter().map(|(reference, id)| Fetched { reference, id });
        Ok(records.filter(|image| !image.id.is_empty()).collect())
    }

    /// Returns the references of the images whose records an earlier version of the agent has written, without an id.
    pub(super) fn without_id(&self) -> io::Result<Vec<String>> {
        let records = read(&self.fetched, is_name_of_image)?;
        Ok(records.into_iter().filter(|(_, id)| id.is_empty()).map(|(reference, _)| reference).collect())
    }

    /// Replaces the record of an image that has no id by one with this id, or deletes it if podman lacks the image.
    pub(super) fn identify(&self, reference: &str, id: Option<&str>) -> io::Result<()> {
        if let Some(id) = id {
            let text = format!("{reference}\n{id}");
            write(&self.fetched, &name_of(&text), &text)?;
        }
        remove(&self.fetched.join(name_of(reference)))
    }
}

/// Writes a record. It is on disk when this returns, if its directory is.
fn write(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    files::replace_durably(&directory.join(name), text.as_bytes())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| files::sync_parent(path)),
    }
}

/// Returns the references and ids in a directory. The id of a record of an earlier version of the agent is empty. A power
/// cut may leave a file without its content. Such a file, whose name does not belong to its content, is deleted.
fn read(directory: &Path, is_named: impl Fn(&str, &str) -> bool) -> io::Result<Vec<(String, String)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // The file is about to be renamed to a record, unless a power cut has left it.
        if path.extension().is_some() {
            continue;
        }
        let text = match fs::read_to_string(&path) {
            // The download has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text.unwrap_or_default(),
        };
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match parse(name, &text, &is_named) {
            Some(record) => records.push(record),
            None => fs::remove_file(&path)?,
        }
    }
    records.sort();
    Ok(records)
}

/// Returns the reference and the id in a record, or `None` if the record is torn.
fn parse(name: &str, text: &str, is_named: impl Fn(&str, &str) -> bool) -> Option<(String, String)> {
    match text.split_once('\n') {
        Some((reference, id)) => is_named(name, text).then(|| (reference.to_owned(), id.to_owned())),
        None => (name == name_of(text)).then(|| (text.to_owned(), String::new())),
    }
}

fn is_name_of_download(name: &str, text: &str) -> bool {
    name == name_of(text.split('\n').next().unwrap_or_default())
}

fn is_name_of_image(name: &str, text: &str) -> bool {
    name == name_of(text)
}

fn name_of(reference: &str) -> String {
    digest::of_bytes(reference.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_is_recorded_until_the_image_is_synced() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        let (first, second) = (format!("r.example/{}:1", "a".repeat(300)), "r.example/a/b:1".to_owned());
        assert!(records.downloads().unwrap().is_empty() && records.fetched().unwrap().is_empty());
        records.begin(&first, "").unwrap();
        records.begin(&second, "id0").unwrap();
        assert_eq!(
            (records.interrupted(&first), records.interrupted(&second)),
            (Some(String::new()), Some("id0".into()))
        );
        assert_eq!(records.interrupted("r.example/a_b:1"), None);
        assert_eq!(records.downloads().unwrap(), [second.clone(), first.clone()]);
        records.finish(&first, "id1").unwrap();
        records.end(&second).unwrap();
        assert_eq!((records.interrupted(&first), records.interrupted(&second)), (None, None));
        // The tag has moved to another image.
        records.begin(&first, "id1").unwrap();
        records.finish(&first, "id2").unwrap();
        let image = |id: &str| Fetched { reference: first.clone(), id: id.into() };
        assert_eq!(records.fetched().unwrap(), [image("id1"), image("id2")]);
        records.forget(&image("id1")).unwrap();
        assert_eq!(records.fetched().unwrap(), [image("id2")]);
    }

    #[test]
    fn an_image_is_complete_if_its_download_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        let files = |name: &str| {
            let Ok(entries) = fs::read_dir(directory.path().join(name)) else { return Vec::new() };
            let paths = entries.map(|entry| entry.unwrap().path());
            paths
                .map(|path| {
                    (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
                })
                .collect()
        };
        let complete = || complete_images(&files("fetching"), &files("fetched"));
        let reference = "r.example/a:1";
        records.begin(reference, "").unwrap();
        assert_eq!(complete(), []);
        records.finish(reference, "id1").unwrap();
        let image = Fetched { reference: reference.into(), id: "id1".into() };
        assert_eq!(complete(), std::slice::from_ref(&image));
        records.begin(reference, "id1").unwrap();
        assert_eq!(complete(), [image], "the image was complete before the download");
        records.begin(reference, "").unwrap();
        assert_eq!(complete(), [], "the image may come from the download");
        records.end(reference).unwrap();
        let torn =
            files("fetched").into_iter().map(|(name, bytes)| (name, bytes[..9].to_vec())).collect::<Vec<_>>();
        assert_eq!(complete_images(&[], &torn), []);
        let temporary = files("fetched")
            .into_iter()
            .map(|(name, bytes)| (format!("{name}.new"), bytes))
            .collect::<Vec<_>>();
        assert_eq!(complete_images(&[], &temporary), []);
    }

    /// The records of earlier versions have the reference alone, and its digest as the name.
    #[test]
    fn records_of_an_earlier_version_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        let references = ["r.example/a:1", "r.example/b:1"];
        for name in ["fetching", "fetched"] {
            for reference in references {
                write(&directory.path().join(name), &name_of(reference), reference).unwrap();
            }
        }
        let sorted = |mut list: Vec<String>| {
            list.sort();
            list
        };
        assert_eq!(sorted(records.downloads().unwrap()), references);
        assert_eq!(records.interrupted(references[0]), Some(String::new()));
        assert_eq!(sorted(records.without_id().unwrap()), references);
        assert_eq!(records.fetched().unwrap(), []);
        records.identify(references[0], Some("id1")).unwrap();
        records.identify(references[1], None).unwrap();
        assert!(records.without_id().unwrap().is_empty());
        assert_eq!(
            records.fetched().unwrap(),
            [Fetched { reference: references[0].into(), id: "id1".into() }]
        );
    }

    #[test]
    fn a_torn_record_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        for text in ["", "r.example/a:1\ni", "r.example"] {
            records.begin("r.example/a:1", "").unwrap();
            records.finish("r.example/a:1", "id1").unwrap();
            records.begin("r.example/a:1", "id1").unwrap();
            for name in ["fetching", "fetched"] {
                for file in fs::read_dir(directory.path().join(name)).unwrap() {
                    fs::write(file.unwrap().path(), text).unwrap();
                }
            }
            assert_eq!(records.fetched().unwrap(), [], "{text}");
            let has_reference = text.contains('\n');
            assert_eq!(records.downloads().unwrap().len(), usize::from(has_reference), "{text}");
            records.end("r.example/a:1").unwrap();
        }
    }
}
