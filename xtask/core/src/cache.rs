//! Where things are kept, outside `target/` so that a `cargo clean` costs no image.
//!
//! ```text
//! <cache>/images/<key>/        a disk image and its manifest
//! <cache>/runs/<id>/           one run: report.json, console.log; w/ while it lives
//! <cache>/snapshots/<key>.<run>/  a machine after its first boot: disk, memory, NVRAM, seed
//! <cache>/compared/            what `smoke --verify-cold` compares
//! <cache>/history/             how long phases took on this machine
//! <cache>/workload/            the smoke's workload as an executable, by what it is made of
//! <cache>/libvirt/             what libvirt has learned of QEMU, for every run's embedded root
//! ```

use std::path::{Path, PathBuf};

use anyhow::Result;

/// The variable that moves the cache.
pub const CACHE_VARIABLE: &str = "IOT_XTASK_CACHE";

/// The length of `sockaddr_un.sun_path` with its final zero (unix(7)).
const SOCKET_PATH_BYTES: usize = 108;
/// What libvirt appends to an embedded root for QEMU's monitor socket, with a two-digit domain number to spare.
const MONITOR_SOCKET: &str = "/lib/qemu/domain-99-vm/monitor.sock";

/// The cache's directories.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// From `IOT_XTASK_CACHE`, else `XDG_CACHE_HOME/iot-xtask`, else `~/.cache/iot-xtask`.
    ///
    /// # Errors
    /// Where none of the three is set, where the path is relative or so long that the run's sockets would not fit.
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

    /// A cache in this very directory.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Disk images by content key.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// One directory per run.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Machines after their first boot, by content key.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// What earlier runs learned of this machine.
    pub fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    /// The smoke's workload, compiled.
    pub fn workloads(&self) -> PathBuf {
        self.root.join("workload")
    }

    /// What libvirt has learned of the emulators here. It may be deleted at any time: the next run probes them again.
    pub fn libvirt(&self) -> PathBuf {
        self.root.join("libvirt")
    }
}

/// Why the cache cannot be used.
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
    /// The number is the bytes in a socket's path below it.
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
