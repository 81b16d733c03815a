//! The directories of the cache. They are outside `target/`, so `cargo clean` deletes no image.
//!
//! ```text
//! <cache>/images/<key>/        a disk image and its manifest
//! <cache>/runs/<id>/           one run: report.json, console.log; w/ while it lives
//! <cache>/snapshots/<key>.<run>/  a machine after its first boot: disk, memory, NVRAM, seed
//! <cache>/compared/            the reports that `smoke --verify-cold` compares
//! <cache>/history/             the durations of phases, the outcomes of the last runs, and the failures of KVM
//! <cache>/workload/            programs for guests, compiled, each by a digest of its inputs
//! <cache>/kernels/<key>/       a kernel of Debian and its modules, for `try`
//! <cache>/corpus/<sha256>/     a published package that `soak --corpus` judges
//! <cache>/libvirt/             libvirt's record of QEMU's capabilities, for every run's embedded root
//! ```

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::process::geteuid;

use crate::error::Failure;

/// The environment variable that sets the cache's directory.
pub const CACHE_VARIABLE: &str = "IOT_XTASK_CACHE";

/// The length of `sockaddr_un.sun_path` with its final zero (unix(7)).
const SOCKET_PATH_BYTES: usize = 108;
/// The path that libvirt appends to an embedded root for QEMU's monitor socket. The number of the domain is assumed to
/// have two digits, which is enough for the domains of one run.
const MONITOR_SOCKET: &str = "/lib/qemu/domain-99-vm/monitor.sock";
/// The bits of a mode (inode(7)) that let the group and others write, and the sticky bit.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

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
    /// does not allow, or is too long for the sockets of a run. Also returns an error if another user owns the
    /// directory or may replace files in it.
    pub fn from_env() -> Result<Self, Unusable> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = Self::locate(variable)?;
        check_safe(&cache.root, geteuid().as_raw())?;
        Ok(cache)
    }

    /// Returns the cache as [`Cache::from_env`] does, for a command that cannot work without it.
    ///
    /// # Errors
    /// Returns the errors of [`Cache::from_env`] as failures of the host, each with its remedy.
    pub fn open() -> Result<Self> {
        Self::from_env().map_err(|error| Failure::host(error.to_string(), error.remedy()).into())
    }

    fn locate(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, Unusable> {
        // The XDG Base Directory Specification requires that a relative path is ignored.
        let xdg = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let root = match (variable(CACHE_VARIABLE), xdg, variable("HOME")) {
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

    /// Returns the directory with the packages of the corpus.
    pub fn corpus(&self) -> PathBuf {
        self.root.join("corpus")
    }

    /// Returns the directory with the kernels that `try` boots.
    pub fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// Returns the directory with the compiled programs for guests, such as the workload of the smoke.
    pub fn workloads(&self) -> PathBuf {
        self.root.join("workload")
    }

    /// Returns the directory in which libvirt records the capabilities of the emulators. It may be deleted at any time,
    /// because libvirt then probes the emulators again.
    pub fn libvirt(&self) -> PathBuf {
        self.root.join("libvirt")
    }
}

/// Returns an error if a user other than `user` and root can replace files in the cache `root`: its images, keys and
/// sockets. A directory that does not exist yet is made with access for this user only.
fn check_safe(root: &Path, user: u32) -> Result<(), Unusable> {
    if let Ok(link) = root.symlink_metadata()
        && link.is_symlink()
        && ![0, user].contains(&link.uid())
    {
        return Err(Unusable::Foreign(root.to_owned(), link.uid()));
    }
    let resolved = root.canonicalize().unwrap_or_else(|_missing| root.to_owned());
    if resolved.exists() && !resolved.is_dir() {
        return Err(Unusable::NoDirectory(root.to_owned()));
    }
    for directory in resolved.ancestors() {
        let Ok(about) = directory.metadata() else { continue };
        let is_cache = directory == resolved;
        if is_cache && about.uid() != user {
            return Err(Unusable::Foreign(root.to_owned(), about.uid()));
        }
        // In a parent directory with the sticky bit, only the owner of the cache may rename it. Members of the group of
        // a parent directory are trusted, because groups share directories on purpose.
        let is_exposed = if is_cache {
            about.mode() & (GROUP_WRITES | OTHERS_WRITE) != 0
        } else {
            about.mode() & OTHERS_WRITE != 0 && about.mode() & STICKY == 0
        };
        if is_exposed {
            let (cache, directory) = (root.to_owned(), directory.to_owned());
            return Err(Unusable::Exposed { cache, directory, mode: about.mode() & 0o7777 });
        }
    }
    Ok(())
}

/// The reason why the cache cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("find the cache: neither {CACHE_VARIABLE} nor XDG_CACHE_HOME nor HOME names a directory")]
    Nowhere,
    #[error("use the cache {}: the path must be absolute", .0.display())]
    Relative(PathBuf),
    #[error(
        "use the cache {}: libvirt's, QEMU's and ssh's own syntaxes allow letters, digits and /._-+@~ in it",
        .0.display()
    )]
    Characters(PathBuf),
    /// The number is the length in bytes of the longest path of a socket in the cache.
    #[error(
        "use the cache {}: sockets below it would have paths of {} bytes, and {} is the system's limit",
        .0.display(), .1, SOCKET_PATH_BYTES - 1
    )]
    TooLong(PathBuf, usize),
    #[error("use the cache {}: it is not a directory", .0.display())]
    NoDirectory(PathBuf),
    /// The number is the id of the user who owns the cache.
    #[error("use the cache {}: it belongs to the user with the id {}, who can replace its images and keys", .0.display(), .1)]
    Foreign(PathBuf, u32),
    #[error(
        "use the cache {}: other users can replace its images and keys, because {} has the mode {mode:04o}",
        cache.display(), directory.display()
    )]
    Exposed { cache: PathBuf, directory: PathBuf, mode: u32 },
}

impl Unusable {
    /// Returns what the user can do.
    pub fn remedy(&self) -> String {
        let set = |to: &str| format!("set {CACHE_VARIABLE} to {to}");
        match self {
            Self::Nowhere | Self::NoDirectory(_) => set("a directory of this user"),
            Self::Relative(_) => set("an absolute path"),
            Self::Characters(_) => set("a directory whose path has only these characters"),
            Self::TooLong(..) => set("a shorter directory"),
            Self::Foreign(path, _) => {
                format!("{}, or delete {}", set("a directory of this user"), path.display())
            }
            Self::Exposed { directory, .. } => {
                let set = set("a directory to which only this user may write");
                format!("run chmod go-w {}, or {set}", directory.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

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
            (vec![("HOME", "/home/u"), ("XDG_CACHE_HOME", "relative")], "/home/u/.cache/iot-xtask"),
            (vec![("HOME", "/home/u"), ("XDG_CACHE_HOME", "/c"), (CACHE_VARIABLE, "/mine")], "/mine"),
        ];
        for (set, expected) in table {
            assert_eq!(locate(&set).unwrap().root(), Path::new(expected));
        }
    }

    #[test]
    fn a_cache_that_cannot_work_is_refused_before_anything_starts() {
        assert!(locate(&[]).unwrap_err().remedy().contains("set IOT_XTASK_CACHE"));
        assert!(locate(&[(CACHE_VARIABLE, "here")]).unwrap_err().remedy().contains("absolute"));
        let spaced = locate(&[(CACHE_VARIABLE, "/my cache")]).unwrap_err().to_string();
        assert!(spaced.contains("letters, digits"), "{spaced}");
        let long = format!("/{}", "x".repeat(60));
        assert!(locate(&[(CACHE_VARIABLE, &long)]).unwrap_err().remedy().contains("shorter directory"));
    }

    #[test]
    fn a_cache_whose_files_others_can_replace_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (parent, user) = (directory.path().join("parent"), geteuid().as_raw());
        let cache = parent.join("cache");
        std::fs::create_dir_all(&cache).unwrap();
        let set = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let table = [
            (0o755, 0o700, true),
            (0o755, 0o755, true),
            (0o755, 0o775, false),
            (0o755, 0o1777, false),
            (0o1777, 0o700, true),
            (0o777, 0o700, false),
            (0o775, 0o700, true),
        ];
        for (of_parent, of_cache, safe) in table {
            set(&parent, of_parent);
            set(&cache, of_cache);
            let checked = check_safe(&cache, user);
            assert_eq!(checked.is_ok(), safe, "{of_parent:o}, {of_cache:o}");
            if let Err(error) = checked {
                assert!(error.remedy().contains("chmod go-w"), "{error}");
            }
            assert_eq!(check_safe(&parent.join("missing/cache"), user).is_ok(), of_parent != 0o777);
        }
        let file = parent.join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(check_safe(&file, user), Err(Unusable::NoDirectory(file)));
        set(&cache, 0o700);
        assert_eq!(check_safe(&cache, user + 1), Err(Unusable::Foreign(cache.clone(), user)));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&cache, &link).unwrap();
        assert_eq!(check_safe(&link, user + 1), Err(Unusable::Foreign(link.clone(), user)));
    }
}
