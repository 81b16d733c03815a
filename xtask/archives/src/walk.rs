//! Follows paths in an unpacked tree as a process in a chroot does: no link leads out of the tree.

use std::io;
use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};

/// The number of links that Linux follows in a path (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The meaning of the archive's root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The root directory of a system: a layer, or a package of a distribution. Absolute paths begin there, and `..`
    /// does not leave it.
    System,
    /// A directory somewhere in a system. An absolute path, and a `..` in this directory, lead outside.
    Directory,
}

/// A path that a walk reached, relative to the tree and without links.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Path(PathBuf),
    /// This component does not exist.
    Missing(PathBuf),
}

/// Follows each component of a path, which is relative to the tree, and follows each link. With `make`, missing
/// directories are made, and the whole path must lead to a directory.
///
/// # Errors
/// Returns an error if the path leads through a file, if it leads outside (only in [`Scope::Directory`]), or if it has
/// too many links.
pub(crate) fn follow(root: &Path, path: &Path, scope: Scope, make: bool) -> Result<Found> {
    let mut pending = vec![path.to_owned()];
    let (mut current, mut links) = (PathBuf::new(), 0);
    while let Some(rest) = pending.pop() {
        let mut components = rest.components();
        let Some(first) = components.next() else { continue };
        let after = components.as_path();
        let is_last = after.as_os_str().is_empty() && pending.iter().all(|path| path.as_os_str().is_empty());
        pending.push(after.to_owned());
        match first {
            Component::CurDir => {}
            Component::RootDir if scope == Scope::System => current.clear(),
            Component::ParentDir if current.pop() || scope == Scope::System => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => {
                bail!("it leads outside of the directory, through the links of {}", path.display())
            }
            Component::Normal(name) => {
                let next = current.join(name);
                let full = root.join(&next);
                match std::fs::symlink_metadata(&full) {
                    Ok(found) if found.is_symlink() => {
                        links += 1;
                        if links > MAX_LINKS {
                            bail!("{} has more than {MAX_LINKS} links", path.display());
                        }
                        pending.push(fs_err::read_link(&full)?);
                    }
                    Ok(found) if !found.is_dir() && (make || !is_last) => {
                        bail!("{} is not a directory", next.display())
                    }
                    Ok(_) => current = next,
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                    Err(_) if !make => return Ok(Found::Missing(next)),
                    Err(_) => {
                        fs_err::create_dir(&full)?;
                        current = next;
                    }
                }
            }
        }
    }
    Ok(Found::Path(current))
}

/// Returns the path in an unpacked tree to which `path` leads, as a process in a chroot of this tree sees it: absolute
/// links begin at the root. The result is relative to `root` and contains no link. Returns `None` if the path does not
/// exist. Read files of an unpacked tree only through this function, because the links in the tree may lead to files of
/// this host.
///
/// # Errors
/// Returns an error if a directory cannot be read, if the path leads through a file, or if it has too many links.
pub fn resolve(root: &Path, path: &Path) -> Result<Option<PathBuf>> {
    match follow(root, path, Scope::System, false)? {
        Found::Path(path) => Ok(Some(path)),
        Found::Missing(_) => Ok(None),
    }
}

/// Parses the name of an entry. Returns a path of normal components only, which is empty for the root directory.
///
/// # Errors
/// Returns an error if the name is empty, contains `..`, or is absolute. In [`Scope::System`], an absolute name is
/// relative to the root directory.
pub(crate) fn parse(name: &Path, scope: Scope) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    if name.as_os_str().is_empty() {
        bail!("its name is empty");
    }
    for component in name.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => path.push(part),
            Component::RootDir if scope == Scope::System => {}
            Component::RootDir | Component::Prefix(_) => bail!("its path is absolute"),
            Component::ParentDir => bail!("its path contains \"..\""),
        }
    }
    Ok(path)
}
