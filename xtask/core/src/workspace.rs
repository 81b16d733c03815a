//! The cargo workspace on which a command works.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cargo_config2::de;
use cargo_metadata::MetadataCommand;

use crate::arch::{MachineProfile, VmArchitecture};
use crate::bail_host;
use crate::digest::Algorithm;
use crate::error::Failure;

/// The package that provides `cargo xtask`.
const PACKAGE: &str = "xtask";
/// The directory of this crate, relative to the workspace.
const CRATE: &str = "xtask/core";
/// The directory in which this crate was compiled. It is used only to detect the program of another checkout.
const COMPILED_IN: &str = env!("CARGO_MANIFEST_DIR");

/// The linker that rustc uses for a linux-gnu target if no linker is configured.
pub const NATIVE_LINKER: &str = "cc";

/// The value of `--target` and CARGO_BUILD_TARGET that means this host (since cargo 1.91).
const HOST: &str = "host-tuple";

/// The workspace of the command.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
    /// The directory of cargo's intermediate files (build.build-dir). By default, it is the target directory.
    build: PathBuf,
}

impl Workspace {
    /// Finds the workspace in which the command was typed. `cargo run` passes the directory of the package in
    /// CARGO_MANIFEST_DIR. If this variable is not set, the current directory decides. The path at which the program
    /// was compiled is not used, because the workspace may have been copied since then.
    ///
    /// # Errors
    /// Returns a usage error if no workspace with the package `xtask` is found. Returns a failure of the host if
    /// another checkout shares the target directory and may have built this program.
    pub fn find() -> Result<Self> {
        let typed = std::env::current_dir().context("find the current directory")?;
        let named = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let program = std::env::current_exe().context("find this program")?;
        let of_cargo = named.filter(|directory| directory.ends_with(PACKAGE));
        let workspace = match of_cargo.map(|directory| Self::around(&typed, &directory)) {
            Some(Ok(workspace)) => workspace,
            _ => Self::around(&typed, &typed)?,
        };
        let program = canonical(program);
        workspace.check_program(&program, Path::new(COMPILED_IN))?;
        Ok(workspace)
    }

    /// Returns the workspace that contains `directory`. Cargo runs in the directory `typed`, to which a relative
    /// CARGO_TARGET_DIR refers.
    ///
    /// # Errors
    /// Returns a usage error if cargo finds no workspace there, or if the workspace has no package `xtask`.
    fn around(typed: &Path, directory: &Path) -> Result<Self> {
        let mut command = MetadataCommand::new();
        if typed != directory {
            command.manifest_path(directory.join("Cargo.toml"));
        }
        let metadata = command.current_dir(typed).no_deps().exec();
        let metadata = metadata.map_err(|error| {
            let what = format!("find the workspace of {}", directory.display());
            match error {
                cargo_metadata::Error::Io(error) => Failure::host(
                    format!("{what}: run {}: {error}", Path::new(&cargo()).display()),
                    "install Rust, or correct the variables PATH and CARGO",
                ),
                error => {
                    let remedy = "change to a checkout, or correct what cargo reports";
                    Failure::usage(format!("{what}: {error}; {remedy}"))
                }
            }
        })?;
        if !metadata.packages.iter().any(|package| package.name == PACKAGE) {
            let usage = format!("{} has no package {PACKAGE}; change to a checkout", metadata.workspace_root);
            return Err(Failure::usage(usage).into());
        }
        let target = canonical(metadata.target_directory.into_std_path_buf());
        Ok(Self {
            root: canonical(metadata.workspace_root.into_std_path_buf()),
            build: metadata.build_directory.map_or_else(|| target.clone(), |path| canonical(path.into())),
            target,
        })
    }

    /// Returns an error if `program` may belong to another checkout. If checkouts share a target or build directory,
    /// they use the same file names there, and cargo does not notice that a file is from another checkout
    /// (rust-lang/cargo#2383).
    fn check_program(&self, program: &Path, compiled_in: &Path) -> Result<()> {
        let own = self.root.join(CRATE);
        let in_shared_target = program.starts_with(&self.target) && !self.target.starts_with(&self.root);
        let is_shared = in_shared_target || !self.build_is_own();
        if !is_shared || same_directory(compiled_in, &own) {
            return Ok(());
        }
        bail_host!(
            "{} may be the program of another checkout: it was compiled in {}, and both use {}",
            program.display(), compiled_in.display(), self.build.display();
            "give each checkout its own directory: unset CARGO_TARGET_DIR and CARGO_BUILD_BUILD_DIR, and build.target-dir \
             and build.build-dir in cargo's configuration, or set both to {}", self.root.join("target").display()
        )
    }

    /// Returns the target directory for builds that this program starts. If the configured target directory is outside
    /// the workspace, other checkouts may share it, and their executables could be mistaken for those of this checkout.
    /// In that case, the result is a subdirectory whose name is a digest of this checkout's path.
    pub fn target_dir(&self) -> PathBuf {
        if self.target.starts_with(&self.root) {
            return self.target.clone();
        }
        let digest = Algorithm::Sha256.of(self.root.as_os_str().as_encoded_bytes());
        let name = format!("xtask-{}", &digest.hex()[..16]);
        if self.target.ends_with(&name) { self.target.clone() } else { self.target.join(name) }
    }

    /// Returns whether the build directory belongs to this checkout alone: it is in the workspace or in the target
    /// directory.
    fn build_is_own(&self) -> bool {
        self.build.starts_with(&self.root) || self.build.starts_with(&self.target)
    }

    /// Returns a command that runs cargo in this workspace. The variables that the outer cargo has set for this package
    /// are removed. Every such command builds for this host unless it has a flag `--target`, even if the user has
    /// configured another target. The alias `cargo xtask` also names this host as the target, so the alias and these
    /// commands share their artifacts.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(cargo());
        let target = self.target_dir();
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", &target);
        command.env("CARGO_BUILD_TARGET", HOST).envs(self.native_linker());
        if !self.build_is_own() {
            command.env("CARGO_BUILD_BUILD_DIR", target);
        }
        for name in inherited_from_cargo() {
            command.env_remove(name);
        }
        command
    }

    /// Returns cargo's variable that selects this host's own linker for this host's target. The variable is needed if
    /// the workspace's configuration names a linker for this target, because it is then the cross-linker of other
    /// hosts. On aarch64, only Debian and Ubuntu have the native linker under the name of the cross-linker. If the user
    /// has set the variable, returns `None`.
    pub fn native_linker(&self) -> Option<(OsString, OsString)> {
        self.native_linker_of(VmArchitecture::of_host()?.profile(), |name| std::env::var_os(name).is_some())
    }

    fn native_linker_of(
        &self,
        host: &MachineProfile,
        is_set: impl Fn(&str) -> bool,
    ) -> Option<(OsString, OsString)> {
        let variable = host.cargo_variable("LINKER");
        // If the file cannot be read, every cargo command reports the reason.
        let configuration = de::Config::load_file(self.root.join(".cargo/config.toml")).ok()?;
        let names_linker = configuration.target.get(host.triple)?.linker.is_some();
        (names_linker && !is_set(&variable)).then(|| (variable.into(), NATIVE_LINKER.into()))
    }

    /// Returns the directory of the workspace's Cargo.toml.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// Returns the names of the variables that the outer cargo has set for this package. An inner cargo must not see them:
/// their values would differ, and the build scripts that read them would run again.
fn inherited_from_cargo() -> impl Iterator<Item = OsString> {
    const PREFIXES: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CFG_"];
    std::env::vars_os().map(|(name, _)| name).filter(|name| {
        name.to_str().is_some_and(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
    })
}

/// Returns the path of the cargo that started this program; otherwise `cargo`, which is searched on PATH.
pub fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Resolves symbolic links, so that two spellings of one path compare equal. If the path does not exist yet, it is
/// returned unchanged.
fn canonical(path: PathBuf) -> PathBuf {
    path.canonicalize().unwrap_or(path)
}

fn same_directory(one: &Path, other: &Path) -> bool {
    one == other || one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(root: &str, target: &str) -> Workspace {
        Workspace { root: root.into(), target: target.into(), build: target.into() }
    }

    #[test]
    fn checkouts_that_share_a_target_directory_do_not_share_executables() {
        let (one, other) = (workspace("/a", "/t"), workspace("/b", "/t"));
        assert_ne!(one.target_dir(), other.target_dir());
        assert!(one.target_dir().starts_with("/t"));
        assert_eq!(workspace("/a", "/a/target").target_dir(), Path::new("/a/target"));
    }

    #[test]
    fn cargo_gets_directories_that_no_other_checkout_has() {
        let directories = |workspace: &Workspace| {
            let command = workspace.cargo();
            let value = |name: &str| {
                let mut set = command.get_envs().filter(|(key, _)| *key == name);
                set.find_map(|(_, value)| value).map(PathBuf::from)
            };
            (value("CARGO_TARGET_DIR").unwrap(), value("CARGO_BUILD_BUILD_DIR"))
        };
        let build =
            |root: &str| Workspace { build: "/t".into(), ..workspace(root, &format!("{root}/target")) };
        assert_eq!(directories(&build("/a")), ("/a/target".into(), Some("/a/target".into())));
        assert_ne!(directories(&build("/a")), directories(&build("/b")));
        assert_eq!(directories(&workspace("/a", "/a/target")), ("/a/target".into(), None));
    }

    #[test]
    fn a_configured_target_does_not_change_what_cargo_builds() {
        let command = workspace("/a", "/a/target").cargo();
        let mut set = command.get_envs().filter(|(name, _)| *name == "CARGO_BUILD_TARGET");
        assert_eq!(set.next().unwrap().1, Some(HOST.as_ref()));
    }

    #[test]
    fn no_host_links_its_own_programs_with_a_cross_linker() {
        let own = Workspace::find().unwrap();
        let (arm, x86) = (VmArchitecture::Aarch64.profile(), VmArchitecture::X86_64.profile());
        let variable = "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER";
        assert_eq!(own.native_linker_of(arm, |_| false), Some((variable.into(), NATIVE_LINKER.into())));
        assert_eq!(own.native_linker_of(arm, |name| name == variable), None);
        assert_eq!(own.native_linker_of(x86, |_| false), None);
    }

    #[test]
    fn the_program_of_another_checkout_is_refused_and_a_copied_checkout_is_not() {
        let shared = workspace("/b", "/t");
        let refused =
            shared.check_program(Path::new("/t/debug/xtask"), Path::new("/a/xtask/core")).unwrap_err();
        assert_eq!(crate::error::code(&refused), 69);
        assert!(crate::error::hint(&refused).unwrap().contains("CARGO_TARGET_DIR"));
        assert!(shared.check_program(Path::new("/t/debug/xtask"), Path::new("/b/xtask/core")).is_ok());
        let build = Workspace { build: "/t".into(), ..workspace("/b", "/b/target") };
        let refused = build.check_program(Path::new("/b/target/debug/xtask"), Path::new("/a/xtask/core"));
        assert_eq!(crate::error::code(&refused.unwrap_err()), 69);
        let copy = workspace("/b", "/b/target");
        assert!(copy.check_program(Path::new("/b/target/debug/xtask"), Path::new("/a/xtask/core")).is_ok());
        assert!(shared.check_program(Path::new("/elsewhere/xtask"), Path::new("/a/xtask/core")).is_ok());
    }

    #[test]
    fn the_workspace_is_that_of_the_directory() {
        let around = |directory: &Path| Workspace::around(directory, directory);
        let here = around(Path::new(COMPILED_IN)).unwrap();
        assert!(same_directory(&here.root().join(CRATE), Path::new(COMPILED_IN)));
        let empty = tempfile::tempdir().unwrap();
        let refused = around(empty.path()).unwrap_err();
        assert_eq!(crate::error::code(&refused), 2, "{refused:#}");
        std::fs::create_dir(empty.path().join("src")).unwrap();
        std::fs::write(empty.path().join("src/lib.rs"), "").unwrap();
        let manifest = "[package]\nname = \"other\"\nversion = \"0.1.0\"\n";
        std::fs::write(empty.path().join("Cargo.toml"), manifest).unwrap();
        let refused = around(empty.path()).unwrap_err();
        assert!(refused.to_string().contains("no package xtask"), "{refused:#}");
    }
}
