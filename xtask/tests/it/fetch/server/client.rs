//! Runs the real `xtask-vm` as a child that downloads into its own directory, and checks the files that it leaves
//! there.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use xtask_images::fetch::limits::FETCH_PACE_VARIABLE;

use super::Image;
use crate::scratch::XTASK_VM;

/// A pace that shortens all waits to a twentieth, so that a stall takes 1.5 s.
const PACE: &str = "0.05";

/// The directory into which one test downloads.
pub(crate) struct Client {
    directory: tempfile::TempDir,
}

/// The result of a download.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) message: String,
    pub(crate) printed: String,
}

impl Client {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// Returns the path of the finished download.
    pub(crate) fn target(&self) -> PathBuf {
        self.path("image")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the names of all files in the directory.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Returns the arguments of a download.
    pub(crate) fn arguments(&self, url: &str, digest: Option<&str>) -> Vec<String> {
        let mut arguments: Vec<String> = ["image", "fetch", url].map(str::to_owned).into();
        match digest {
            Some(digest) => arguments.extend(["--image-digest".to_owned(), digest.to_owned()]),
            None => arguments.push("--unverified".to_owned()),
        }
        arguments.extend(["--to".to_owned(), self.target().to_str().unwrap().to_owned()]);
        arguments
    }

    pub(crate) fn command(&self, url: &str, digest: Option<&str>) -> Command {
        let mut command = Command::new(XTASK_VM);
        command.args(self.arguments(url, digest));
        clean(&mut command);
        command
    }

    /// Downloads and waits for the end.
    pub(crate) fn fetch(&self, url: &str, digest: &str) -> Ended {
        ended(&self.command(url, Some(digest)).output().unwrap())
    }

    pub(crate) fn start(&self, url: &str, digest: &str) -> Child {
        self.command(url, Some(digest)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Checks that the download succeeded: the path was printed, and the directory has only the image, which is
    /// read-only.
    pub(crate) fn assert_whole(&self, ended: &Ended, image: &Image) {
        assert_eq!(ended.code, Some(0), "{}", ended.message);
        assert_eq!(ended.printed, format!("{}\n", self.target().display()), "{}", ended.message);
        assert!(std::fs::read(self.target()).unwrap() == *image.bytes, "other bytes: {}", ended.message);
        assert_eq!(self.target().metadata().unwrap().permissions().mode() & 0o777, 0o400);
        assert_eq!(self.names(), ["image"], "{}", ended.message);
    }

    /// Checks that the download failed with this exit code and these words, and has left no file.
    pub(crate) fn assert_refused(&self, ended: &Ended, code: i32, words: &[&str]) {
        assert_says(ended, code, words);
        assert_eq!(self.names(), Vec::<String>::new(), "{}", ended.message);
    }
}

/// Checks the exit code, and that the message has these words and a remedy. stdout must be empty.
pub(crate) fn assert_says(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.message);
    for words in words {
        assert!(ended.message.contains(words), "no {words:?} in: {}", ended.message);
    }
    assert!(code == 2 || ended.message.contains("what to do: "), "no remedy: {}", ended.message);
    assert_eq!(ended.printed, "", "{}", ended.message);
}

/// Removes this machine's network settings from the environment, and shortens the waits.
pub(crate) fn clean(command: &mut Command) {
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_DIR"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.env(FETCH_PACE_VARIABLE, PACE).stdin(Stdio::null());
}

pub(crate) fn ended(output: &Output) -> Ended {
    Ended {
        code: output.status.code(),
        message: String::from_utf8_lossy(&output.stderr).into_owned(),
        printed: String::from_utf8_lossy(&output.stdout).into_owned(),
    }
}
