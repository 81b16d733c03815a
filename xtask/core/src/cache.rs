//! The directories of the cache. They are outside `target/`, so `cargo clean` deletes no image.
//!
//! ```text
//! <cache>/images/<key>/        a disk image and its manifest
//! <cache>/runs/<id>/           one run: report.json, console.log; w/ while it lives
//! <cache>/snapshots/<key>.<run>/  a machine after its first boot: disk, memory, NVRAM, seed
//! <cache>/compared/            the reports that `smoke --verify-cold` compares
//! <cache>/history/             the durations of phases on this machine
//! <cache>/workload/            the smoke's workload, compiled, by a digest of its inputs
//! <cache>/libvirt/             libvirt's record of QEMU's capabilities, for every run's embedded root
//! ```

use std::path::{Path, PathBuf};

use anyhow::Result;

/// The environment variable that sets the cache's directory.
pub const CACHE_VARIABLE: &str = "IOT_XTASK_CACHE";

/// The length of `sockaddr_un.sun_path` with its final zero (unix(7)).
const SOCKET_PATH_BYTES: usize = 108;
/// The path that libvirt appends to an embedded root for QEMU's monitor socket. The number of the domain is assumed to
/// have two digits, which is enough for the domains of one run.
const MONITOR_SOCKET: &str = "/lib/qemu/domain-99-vm/monitor.sock";

/// The cache's directories.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Returns the cache in the directory that `IOT_XTASK_CACHE` names. If this variable is not set, the cache is in
    /// `XDG_CACHE_HOME/iot-xtask`. If that variable is not set either, the cache is in `~/.cache/iot-xtask`.
    ///
    /// # Errors
    /// Returns an error if none of the three variables is set, or if the path is relative, has characters that a tool
    /// does not allow, or is too long for the sockets of a run.
    pub fn from_env() -> Result<Self, Unusable> {
        Self::locate(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }

    fn locate(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, Unusable> {
        let root = match (variable(CACHE_VARIABLE), variable("XDG_CACHE_HOME"), variable("HOME")) {
            (Some(own), _, _) => own,
            (_, Some(xdg), _) => xdg.join("iot-xtask"),
            (_, _, Some(home)) => home.join(".cache/iot-xtask"),
            _ => return Err(Unusable::Nowhere),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@~".contains(c);
        if !root.is_absolute() {
            return Err(Unusable::Relative(root));
        }
        if !root.to_str().is_some_and(|path| path.chars().all(plain)) {
            return Err(Unusable::Characters(root));
        }
        let cache = Self { root };
        let socket = cache.runs().join("0000-000000-0000/w/v").as_os_str().len() + MONITOR_SOCKET.len();
        if socket < SOCKET_PATH_BYTES { Ok(cache) } else { Err(Unusable::TooLong(cache.root, socket)) }
    }

    /// Returns a cache with `root` as its directory.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the directory of the disk images. Each image has a directory there, whose name is the key of the image.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Returns the directory that contains the directories of the runs.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Returns the directory of the snapshots, which are machines after their first boot.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// Returns the directory with the durations of phases in earlier runs on this machine.
    pub fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    /// Returns the directory with the compiled workload of the smoke.
    pub fn workloads(&self) -> PathBuf {
        self.root.join("workload")
    }

    /// Returns the directory in which libvirt records the capabilities of the emulators. It may be deleted at any time,
    /// because libvirt then probes the emulators again.
    pub fn libvirt(&self) -> PathBuf {
        self.root.join("libvirt")
    }
}

/// The reason why the cache cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("find the cache: set {CACHE_VARIABLE}, XDG_CACHE_HOME or HOME to a directory")]
    Nowhere,
    #[error("use the cache {}: the path must be absolute", .0.display())]
    Relative(PathBuf),
    #[error(
        "use the cache {}: libvirt's, QEMU's and ssh's own syntaxes allow letters, digits and /._-+@~ in it; \
         set {CACHE_VARIABLE} to such a directory", .0.display()
    )]
    Characters(PathBuf),
    /// The number is the length in bytes of the longest path of a socket in the cache.
    #[error(
        "use the cache {}: sockets below it would have paths of {} bytes, and {} is the system's limit; \
         set {CACHE_VARIABLE} to a shorter directory", .0.display(), .1, SOCKET_PATH_BYTES - 1
    )]
    TooLong(PathBuf, usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locate(set: &[(&str, &str)]) -> Result<Cache, Unusable> {
        let set: Vec<_> = set.iter().map(|(name, value)| (name.to_string(), PathBuf::from(value))).collect();
        Cache::locate(move |name| set.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone()))
    }

    #[test]
    fn the_cache_is_found_as_people_expect() {
        let table = [
            (vec![("HOME", "/home/u")], "/home/u/.cache/iot-xtask"),
            (vec![("HOME", "/home/u"), ("XDG_CACHE_HOME", "/c")], "/c/iot-xtask"),
            (vec![("HOME", "/home/u"), ("XDG_CACHE_HOME", "/c"), (CACHE_VARIABLE, "/mine")], "/mine"),
        ];
        for (set, expected) in table {
            assert_eq!(locate(&set).unwrap().root(), Path::new(expected));
        }
    }

    #[test]
    fn a_cache_that_cannot_work_is_refused_before_anything_starts() {
        assert!(locate(&[]).unwrap_err().to_string().contains("set IOT_XTASK_CACHE"));
        assert!(locate(&[(CACHE_VARIABLE, "here")]).unwrap_err().to_string().contains("absolute"));
        let spaced = locate(&[(CACHE_VARIABLE, "/my cache")]).unwrap_err().to_string();
        assert!(spaced.contains("letters, digits"), "{spaced}");
        let long = format!("/{}", "x".repeat(60));
        assert!(locate(&[(CACHE_VARIABLE, &long)]).unwrap_err().to_string().contains("shorter directory"));
    }
}
