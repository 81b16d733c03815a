//! The file system below the program: an image of the cache, a directory of this host, or nothing.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use xtask_archives::{Kind, MAX_SCRIPTS};
use xtask_core::arch::VmArchitecture;
use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::cli::TryArgs;
use xtask_core::error::Failure;
use xtask_core::image::Format;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::image::choice::Choice;
use xtask_inspection::inventory::{CachedDisk, disk_of};

use crate::container::{file_in, is_image, kind_of};
use crate::subject::{Core, Runner};

/// The file system below the program. The program sees a writable layer above it, whose content is lost at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// Only the kernel's file systems. This is enough for a static program.
    Nothing,
    /// A directory of this host with the file system of a device. `name` is that of the directory, or of the archive
    /// that was unpacked there.
    Directory { path: PathBuf, name: String },
    /// The disk of an image.
    Disk { name: String, directory: PathBuf, disk: PathBuf, format: Format },
}

/// The file system that the flags request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Base {
    Ready(Root),
    /// A container image or a tar archive, which is not unpacked yet.
    Archive(PathBuf),
}

impl Base {
    /// Returns the file system that the flags request. Without flags, this is the image that a smoke would use, if it
    /// is in the cache.
    ///
    /// # Errors
    /// Returns a usage error if the directory, the archive or the name does not exist, and a failure of the host if a
    /// named image is not in the cache.
    pub(crate) fn from_args(args: &TryArgs, arch: VmArchitecture, cache: &Cache) -> Result<Self> {
        match &args.sysroot {
            Some(path) => Self::of_sysroot(path),
            None => Root::from_image(args, arch, cache).map(Self::Ready),
        }
    }

    fn of_sysroot(path: &Path) -> Result<Self> {
        let refuse = |why: String| Failure::usage(format!("--sysroot {}: {why}", path.display()));
        let real = path.canonicalize().map_err(|error| refuse(error.to_string()))?;
        if !real.is_dir() && !real.is_file() {
            return Err(refuse("it is neither a directory nor an archive".to_owned()).into());
        }
        match kind_of(&real)? {
            Some(kind) if is_image(kind) || kind == Kind::Tar => Ok(Self::Archive(real)),
            Some(kind) => {
                let why = format!("it is a {kind}; name a directory, a container image or a tar archive");
                Err(refuse(why).into())
            }
            None if real.is_dir() => {
                let name = real.display().to_string();
                Ok(Self::Ready(Root::Directory { path: real, name }))
            }
            None => Err(refuse("it is neither a directory nor an archive".to_owned()).into()),
        }
    }
}

impl Root {
    fn from_image(args: &TryArgs, arch: VmArchitecture, cache: &Cache) -> Result<Self> {
        if let Some(name) = &args.image {
            let image = Catalogue::built_in().find(name, arch)?;
            let Some(found) = disk_of(cache, &image) else {
                let verb = if image.is_built() { "build" } else { "fetch" };
                bail_host!(
                    "use the image {name} for {arch}: it is not in the cache";
                    "run cargo xtask image {verb} {name} --arch {arch}"
                );
            };
            return Ok(Self::of_disk(found));
        }
        let choice = Choice::from_args(&Default::default(), arch)?;
        let images = [Some(choice.image), choice.fallback].into_iter().flatten();
        Ok(images
            .filter_map(|image| disk_of(cache, &image))
            .map(Self::of_disk)
            .next()
            .unwrap_or(Self::Nothing))
    }

    fn of_disk(CachedDisk { directory, manifest, disk }: CachedDisk) -> Self {
        Self::Disk { name: manifest.name, directory, disk, format: manifest.format }
    }

    /// Describes the file system for messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Nothing => "no image".to_owned(),
            Self::Directory { name, .. } => name.clone(),
            Self::Disk { name, .. } => name.clone(),
        }
    }

    /// Returns the path of a host's file within the file system; `None` if the file is not in it. On this
    /// path, an absolute link leads to a file of the directory, not to a file of this host.
    pub(crate) fn within(&self, path: &Path) -> Option<PathBuf> {
        let Self::Directory { path: directory, .. } = self else { return None };
        // Above a link, `..` is the parent of its target.
        let goes_up = path.components().any(|part| part == Component::ParentDir);
        let path = if goes_up { path.canonicalize() } else { std::path::absolute(path) }.ok()?;
        let ancestors: Vec<_> = path.ancestors().collect();
        let is_it = |ancestor: &&&Path| ancestor.canonicalize().is_ok_and(|real| real == *directory);
        let top = ancestors.iter().rev().find(is_it)?;
        path.strip_prefix(top).ok().map(|inner| Path::new("/").join(inner))
    }

    /// Returns an error if a file that executes the program is known to be missing: its dynamic loader, its
    /// interpreter, or a file that executes the interpreter. The files of a disk are not known here.
    pub(crate) fn check_has(&self, runner: &Runner, core: Core<'_>) -> Result<(), Missing> {
        match self {
            Self::Nothing => {
                let (Runner { file, what }, arch) = (runner, core.arch);
                Err(Missing {
                    sentence: format!(
                        "the program needs {what} {file}, and no image for {arch} is in the cache"
                    ),
                    remedy: Some(format!(
                        "name the device's file system with --sysroot, or run cargo xtask image build {} --arch {arch}",
                        default_image(arch)
                    )),
                })
            }
            Self::Directory { path, name } => match first_missing(path, runner, core) {
                Some(Runner { file, what }) => {
                    Err(Missing { sentence: missing(&file, what, name), remedy: None })
                }
                None => Ok(()),
            },
            Self::Disk { .. } => Ok(()),
        }
    }
}

/// Returns the name of the image that a smoke uses by default.
fn default_image(arch: VmArchitecture) -> String {
    Choice::from_args(&Default::default(), arch)
        .map_or_else(|_| "NAME".to_owned(), |choice| choice.image.name)
}

/// Follows the interpreter and the dynamic loader of each file that executes the one before it. Returns the first one
/// that the tree does not have. A file that cannot be read counts as one that needs nothing: the kernel says why it
/// fails.
fn first_missing(root: &Path, runner: &Runner, core: Core<'_>) -> Option<Runner> {
    let mut next = Some(runner.clone());
    for _ in 0..=MAX_SCRIPTS {
        let needed = next?;
        let Some(found) = file_in(root, &needed.file) else { return Some(needed) };
        next = crate::subject::runner(&found, core).ok().flatten();
    }
    None
}

/// A file without which the kernel does not execute the program.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) sentence: String,
    /// The remedy, if the file system itself is missing.
    pub(crate) remedy: Option<String>,
}

/// Returns the sentence about a loader or an interpreter that the program's file system lacks.
pub(crate) fn missing(file: &str, what: &str, place: &str) -> String {
    format!("the program needs {what} {file}, and {place} does not have it")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PI5: Core<'_> = Core { arch: VmArchitecture::Aarch64, device: "pi5" };

    #[test]
    fn a_loader_is_looked_for_within_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let (path, name) = (directory.path().to_owned(), "the tree".to_owned());
        let root = Root::Directory { path, name };
        std::fs::create_dir_all(directory.path().join("usr/lib")).unwrap();
        // On this host, the link would lead to the host's own /usr.
        std::os::unix::fs::symlink("/usr/lib", directory.path().join("lib")).unwrap();
        let runner = |file: &str| Runner { file: file.to_owned(), what: "the dynamic loader" };
        let check = |root: &Root| root.check_has(&runner("/lib/ld-linux-aarch64.so.1"), PI5);
        let missing = check(&root).unwrap_err();
        assert!(
            missing.sentence.contains("/lib/ld-linux-aarch64.so.1") && missing.remedy.is_none(),
            "{missing:?}"
        );
        std::fs::write(directory.path().join("usr/lib/ld-linux-aarch64.so.1"), "").unwrap();
        check(&root).unwrap();
        assert!(check(&Root::Nothing).unwrap_err().remedy.unwrap().contains("--sysroot"));
        // The interpreter is a script itself, and its interpreter is missing.
        std::fs::write(directory.path().join("usr/lib/script"), "#!/bin/none\n").unwrap();
        let missing = root.check_has(&runner("/lib/script"), PI5).unwrap_err();
        assert_eq!(
            missing.sentence,
            "the program needs the interpreter /bin/none, and the tree does not have it"
        );
        let inner = directory.path().join("lib/x");
        assert_eq!(root.within(&inner), Some(PathBuf::from("/lib/x")), "a link of the directory");
        let other = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(directory.path(), other.path().join("link")).unwrap();
        assert_eq!(root.within(&other.path().join("link/lib/x")), Some(PathBuf::from("/lib/x")));
        assert_eq!(root.within(&directory.path().join("usr/../usr/lib")), Some(PathBuf::from("/usr/lib")));
        assert_eq!(root.within(&directory.path().join("..")), None);
        assert_eq!(root.within(Path::new("/elsewhere")), None);
    }

    #[test]
    fn a_sysroot_is_a_directory_or_an_archive_of_a_file_system() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        let ready = Base::Ready(Root::Directory { path: real.clone(), name: real.display().to_string() });
        assert_eq!(Base::of_sysroot(directory.path()).unwrap(), ready);
        let of = |bytes: &[u8]| {
            std::fs::write(real.join("archive"), bytes).unwrap();
            Base::of_sysroot(&directory.path().join("archive"))
        };
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        tar.append_data(&mut header, "usr/lib/x", &b""[..]).unwrap();
        assert_eq!(of(&tar.into_inner().unwrap()).unwrap(), Base::Archive(real.join("archive")));
        let refused: [(&[u8], &str); 2] = [
            (
                b"hsqs....",
                "it is a squashfs file system; name a directory, a container image or a tar archive",
            ),
            (b"text", "it is neither a directory nor an archive"),
        ];
        for (bytes, words) in refused {
            let error = of(bytes).unwrap_err();
            assert_eq!(xtask_core::error::code(&error), 2, "{error:#}");
            assert!(error.to_string().ends_with(words), "{error}");
        }
        let error = Base::of_sysroot(&real.join("missing")).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 2, "{error:#}");
    }
}
