//! The catalogue for `image bump`: reads one entry, and replaces the file in one step.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow, ensure};
use fs_err as fs;
use reqwest::Url;
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;
use xtask_core::image::catalogue::{CatalogueFile, CataloguePin, DownloadTable};
use xtask_core::image::shown;

use super::index::{Date, Pattern};
use super::pin::Pin;
use super::rewrite;

/// The text of a catalogue, and the path of its file.
#[derive(Debug)]
pub(super) struct CatalogueText {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// The catalogue's entry of a downloaded image: where the publisher's releases are, and the current pins.
#[derive(Debug)]
pub(super) struct BumpEntry {
    /// The image's name in the catalogue.
    pub(super) name: String,
    /// The URL of the listing of releases, which ends in a slash.
    pub(super) index: Url,
    index_text: String,
    /// The pattern of the name of a release's directory.
    pub(super) release: Pattern,
    /// The name of the list of digests in that directory.
    pub(super) sums: String,
    /// The name of the list's detached signature; `None` if the publisher signs nothing.
    pub(super) signature: Option<String>,
    /// The file of the publisher's keys. A relative path in the catalogue starts at the catalogue's directory.
    pub(super) keyring: Option<PathBuf>,
    /// The current pins, at least one.
    pub(super) pins: Vec<(Pin, Date)>,
}

impl CatalogueText {
    /// Reads the catalogue at `path`.
    ///
    /// # Errors
    /// Returns a usage error if there is no such file.
    pub(super) fn load(path: &Path) -> Result<Self> {
        // The rename at the end must replace the file, not a link to it.
        let path = path
            .canonicalize()
            .map_err(|error| Failure::usage(format!("read the catalogue {}: {error}", path.display())))?;
        let text = fs::read_to_string(&path)?;
        Ok(Self { path, text })
    }

    /// Returns the entry called `name`.
    ///
    /// # Errors
    /// Returns a usage error if there is no such entry or if its image is not downloaded. If there is no such entry,
    /// the error lists the names of all entries. Returns another error if the catalogue or the entry is not valid.
    pub(super) fn entry(&self, name: &str) -> Result<BumpEntry> {
        let images = CatalogueFile::parse(&self.text).map_err(Error::msg);
        let mut images =
            images.with_context(|| format!("parse the catalogue {}", self.path.display()))?.image;
        let names: Vec<_> = images.iter().map(|image| image.name.clone()).collect();
        let at = names.iter().position(|known| known == name).ok_or_else(|| {
            Failure::usage(format!("{name}: no such image; there are: {}", names.join(", ")))
        })?;
        ensure!(
            !names[at + 1..].iter().any(|other| other == name),
            "{} has two entries called {name}",
            self.path.display()
        );
        let image = images.swap_remove(at);
        let download = image.download.ok_or_else(|| {
            Failure::usage(format!(
                "{name} is built from packages on this host: it has no pinned download to bump"
            ))
        })?;
        let beside = self.path.parent().unwrap_or(Path::new("/"));
        entry(name, &download, beside)
            .with_context(|| format!("read the entry {name} of {}", self.path.display()))
    }

    /// Returns the text with `pins` in the entry called `name`.
    pub(super) fn with(&self, name: &str, pins: &[Pin]) -> Result<String> {
        rewrite::pins(&self.text, name, pins)
            .with_context(|| format!("rewrite the entry {name} of {}", self.path.display()))
    }

    /// Replaces the file with `text`, completely or not at all.
    ///
    /// # Errors
    /// Returns an error if another process wrote the file meanwhile, or if the file cannot be written.
    pub(super) fn replace(&self, text: &str) -> Result<()> {
        let write = || format!("write the catalogue {}", self.path.display());
        ensure!(
            fs::read_to_string(&self.path)? == self.text,
            "{}: another process changed the file meanwhile; run again",
            write()
        );
        let beside = self.path.parent().with_context(write)?;
        let mut file = tempfile::Builder::new().prefix(".images-").tempfile_in(beside).with_context(write)?;
        file.write_all(text.as_bytes()).with_context(write)?;
        file.as_file().set_permissions(fs::metadata(&self.path)?.permissions()).with_context(write)?;
        file.as_file().sync_all().with_context(write)?;
        file.persist(&self.path).with_context(write)?;
        Ok(())
    }
}

fn entry(name: &str, download: &DownloadTable, beside: &Path) -> Result<BumpEntry> {
    let index_text = format!("{}/", download.index.trim_end_matches('/'));
    let index = Url::parse(&index_text).with_context(|| format!("read index = {:?}", shown(&index_text)))?;
    ensure!(
        matches!(index.scheme(), "http" | "https") && index.query().is_none() && index.fragment().is_none(),
        "read index = {:?}: write a directory's address, https://…/",
        shown(&index_text)
    );
    let mut entry = BumpEntry {
        name: name.to_owned(),
        index,
        index_text,
        release: Pattern::parse(&download.release)?,
        keyring: download.keyring.as_ref().map(|path| beside.join(path)),
        sums: download.sums.clone(),
        signature: download.signature.clone(),
        pins: Vec::new(),
    };
    for arch in VmArchitecture::ALL {
        let Some(CataloguePin { url, digest, bytes }) = download.pin(arch) else { continue };
        let (date, _) = entry.dated(url).with_context(|| format!("read {arch}"))?;
        entry.pins.push((Pin { arch, url: url.clone(), digest: digest.clone(), bytes: *bytes }, date));
    }
    ensure!(!entry.pins.is_empty(), "it pins no file for any architecture");
    Ok(entry)
}

impl BumpEntry {
    /// Returns the date of the release that contains a pinned file, and the file's name in that release.
    fn dated<'a>(&self, url: &'a str) -> Result<(Date, &'a str)> {
        let parts = url.strip_prefix(&self.index_text).and_then(|below| below.split_once('/'));
        let (directory, file) =
            parts.filter(|(_, file)| !file.is_empty() && !file.contains('/')).ok_or_else(|| {
                anyhow!("{} is not a file of a release below {}", shown(url), shown(&self.index_text))
            })?;
        let date = self
            .release
            .date_in(directory)
            .with_context(|| format!("{} is in {directory}, which does not match `release`", shown(url)))?;
        Ok((date, file))
    }

    /// Returns the URL of `file` in the release of `date`.
    pub(super) fn url(&self, date: &Date, file: &str) -> String {
        format!("{}{}/{file}", self.index_text, self.release.directory(date))
    }

    /// Returns the name that the file of `pin` has in the release of `to`. The name may contain the release's date.
    pub(super) fn file(&self, pin: &Pin, to: &Date) -> Result<String> {
        let (from, file) = self.dated(&pin.url)?;
        Ok(file.replace(&from.to_string(), &to.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bump::rewrite::tests::TEXT;

    fn catalogue(text: &str) -> CatalogueText {
        CatalogueText { path: PathBuf::from("/etc/images.toml"), text: text.to_owned() }
    }

    #[test]
    fn an_entry_says_where_its_releases_are() {
        let entry = catalogue(TEXT).entry("noble").unwrap();
        let newer = entry.release.date_in("release-20260905").unwrap();
        let (pin, from) = &entry.pins[0];
        assert_eq!((entry.pins.len(), from.to_string().as_str(), pin.bytes), (1, "20260705", Some(1000)));
        let file = entry.file(pin, &newer).unwrap();
        assert_eq!(
            entry.url(&newer, &file),
            "https://publisher.example/noble/release-20260905/noble-20260905-amd64.img"
        );
        assert_eq!(entry.keyring.as_deref(), Some(Path::new("/etc/keys.gpg")));
    }

    #[test]
    fn an_entry_that_cannot_be_bumped_says_why() {
        let change = |from: &str, to: &str| catalogue(&TEXT.replacen(from, to, 1));
        let table = [
            (change("", ""), "nobody", "there are: built, noble, inline, nothing"),
            (change("", ""), "built", "built from packages"),
            (change("name = \"built\"", "name = \"noble\""), "noble", "two entries"),
            (change("sums =", "sum ="), "noble", "unknown field `sum`"),
            (change("release-{date}\"", "release\""), "noble", "one {date}"),
            (change("/release-20260705", "/release"), "noble", "in release, which does not match `release`"),
            (
                change("https://publisher.example/noble\"", "https://u:pw@else.example\""),
                "noble",
                "https://else.example/",
            ),
            (change("https://publisher.example/noble\"", "ftp://p.example\""), "noble", "https://…/"),
            (change("x86_64", "riscv64"), "noble", "unknown field `riscv64`"),
            (change("", ""), "nothing", "pins no file"),
            (change("[[image]]", "[[image]"), "noble", "parse the catalogue"),
        ];
        for (catalogue, name, words) in table {
            let error = format!("{:#}", catalogue.entry(name).unwrap_err());
            assert!(error.contains(words) && !error.contains("pw"), "{error:?} does not say {words:?}");
        }
    }

    #[test]
    fn a_file_that_changed_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("images.toml");
        std::fs::write(&path, TEXT).unwrap();
        let catalogue = CatalogueText::load(&path).unwrap();
        std::fs::write(&path, "# mine").unwrap();
        assert!(catalogue.replace("").unwrap_err().to_string().contains("run again"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# mine");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
