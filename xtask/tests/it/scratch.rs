//! Helpers of many tests: the binaries, a private cache, a command's output, and waiting.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use xtask_core::cache::{CACHE_VARIABLE, Cache};
use xtask_core::digest::Algorithm;
use xtask_core::fs::make_private_dir;

pub(crate) const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
pub(crate) const XTASK_INSPECT: &str = env!("CARGO_BIN_EXE_xtask-inspect");
pub(crate) const XTASK_TRY: &str = env!("CARGO_BIN_EXE_xtask-try");
pub(crate) const XTASK_VM: &str = env!("CARGO_BIN_EXE_xtask-vm");

/// A private cache, which no other test uses. Dropping this value deletes it.
pub(crate) struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    /// Makes an empty cache.
    pub(crate) fn new() -> Self {
        let scratch = Self { directory: tempfile::tempdir().unwrap() };
        make_private_dir(&scratch.cache()).unwrap();
        scratch
    }

    /// Makes a cache with the images of this user's cache.
    pub(crate) fn with_images() -> Self {
        let scratch = Self::new();
        let images = Cache::from_env().unwrap().images();
        std::os::unix::fs::symlink(images, scratch.cache().join("images")).unwrap();
        scratch
    }

    /// Makes a cache with one image, whose directory is `image`.
    pub(crate) fn with_image(image: &Path) -> Self {
        let scratch = Self::new();
        let images = scratch.cache().join("images");
        std::fs::create_dir(&images).unwrap();
        std::os::unix::fs::symlink(image, images.join(image.file_name().unwrap())).unwrap();
        scratch
    }

    /// Also deletes the cache when this process ends, because a value in a `static` is never dropped.
    pub(crate) fn until_exit(self) -> Self {
        // The shell's stdin ends when this process ends, in any way.
        let mut shell = Command::new("sh");
        shell.args(["-c", "read -r line; exec rm -rf \"$0\""]).arg(self.path());
        let child = shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::mem::forget(child);
        self
    }

    /// Returns a directory for the test's files. The cache is in it.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.path().join("c")
    }

    /// Returns a command that uses this cache.
    pub(crate) fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = command(program, arguments);
        command.env(CACHE_VARIABLE, self.cache());
        command
    }

    pub(crate) fn xtask_vm(&self, arguments: &[&str]) -> Command {
        self.command(XTASK_VM, arguments)
    }

    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Output {
        self.command(program, arguments).output().unwrap()
    }
}

pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Returns a command's output: stdout, followed by stderr.
pub(crate) fn message(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
pub(crate) fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", message(output));
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until `holds` returns true, and panics after `limit`.
#[track_caller]
pub(crate) fn wait_until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out after {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns a random number, and prints it so that a failure can be repeated.
pub(crate) fn random(name: &str) -> u64 {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    let random = u64::from_le_bytes(bytes);
    println!("{name} {random}");
    random
}

/// Makes an archive as `docker save` does, of an image for arm64. `process` is the part of its configuration about the
/// program. Each layer is a tar archive.
pub(crate) fn docker_archive(layers: &[Vec<u8>], process: &Value) -> Vec<u8> {
    let digests: Vec<_> = layers.iter().map(|layer| Algorithm::Sha256.of(layer).to_string()).collect();
    let history: Vec<_> =
        (1..=layers.len()).map(|number| json!({ "created_by": format!("COPY {number}") })).collect();
    let config = json!({
        "architecture": "arm64", "os": "linux", "config": process,
        "rootfs": { "type": "layers", "diff_ids": digests }, "history": history,
    });
    let names: Vec<_> = (1..=layers.len()).map(|number| format!("{number}/layer.tar")).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["t:1"], "Layers": names }]);
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).unwrap();
    };
    add("config.json", config.to_string().as_bytes());
    names.iter().zip(layers).for_each(|(name, layer)| add(name, layer));
    add("manifest.json", manifest.to_string().as_bytes());
    archive.into_inner().unwrap()
}
