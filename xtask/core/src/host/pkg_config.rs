//! Asks pkg-config for libvirt, as the build of `xtask-vm` does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::tools;
use crate::arch::VmArchitecture;

/// The variable that names the program instead of `pkg-config`.
const PROGRAM: &str = "PKG_CONFIG";
/// The variables that change where pkg-config searches.
const SEARCH: [&str; 3] = ["PKG_CONFIG_PATH", "PKG_CONFIG_LIBDIR", "PKG_CONFIG_SYSROOT_DIR"];

/// The pkg-config of this environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkgConfig {
    /// The path of the program; `None` if it is missing.
    pub program: Option<PathBuf>,
    /// The variables that name the program or change where it searches, each with a value: `PKG_CONFIG_LIBDIR=/x`.
    pub variables: Vec<String>,
    /// The values for the program's environment. The value of a variable for one target is under the general name.
    environment: Vec<(&'static str, OsString)>,
}

impl PkgConfig {
    /// Returns the pkg-config that the crate `pkg-config` runs for a build for this host.
    pub fn find() -> Self {
        Self::of(|name| std::env::var_os(name))
    }

    fn of(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &'static str| {
            names(name).into_iter().find_map(|known| Some((known.clone(), variable(&known)?)))
        };
        let named = set(PROGRAM);
        let program = match &named {
            Some((_, value)) if value.as_encoded_bytes().contains(&b'/') => {
                Some(PathBuf::from(value)).filter(|path| tools::is_executable(path))
            }
            Some((_, value)) => value.to_str().and_then(tools::find),
            None => tools::find("pkg-config").or_else(|| tools::find("pkgconf")),
        };
        let search: Vec<_> = SEARCH.into_iter().filter_map(|name| Some((name, set(name)?))).collect();
        let all = named.iter().chain(search.iter().map(|(_, variable)| variable));
        let variables = all.map(|(name, value)| format!("{name}={}", value.display())).collect();
        Self { program, variables, environment: search.into_iter().map(|(name, (_, v))| (name, v)).collect() }
    }

    /// Returns a pkg-config without variables, for tests.
    #[cfg(test)]
    pub(crate) fn at(path: &str) -> Self {
        Self { program: Some(path.into()), variables: Vec::new(), environment: Vec::new() }
    }

    /// Returns the version of libvirt. Like the build script of virt-sys, this asks for `libvirt` and for
    /// `libvirt-qemu`, which provides access to QEMU's monitor.
    pub(super) fn libvirt_version(&self) -> Result<String, String> {
        let program = self.program.as_deref().ok_or("pkg-config is missing")?;
        let ask = |library| tools::read_with(program, &["--modversion", library], &self.environment);
        ask("libvirt-qemu")
            .and_then(|_| ask("libvirt"))
            .map(|version| version.trim().to_owned())
            .map_err(|error| format!("{error:#}"))
    }

    /// Returns the variable that names the program, with its value.
    pub fn naming_variable(&self) -> Option<&str> {
        let searches = |name: &str| SEARCH.iter().any(|search| name.contains(search));
        let of_program = self.variables.iter().find(|variable| !variable.split('=').take(1).any(searches));
        of_program.map(String::as_str)
    }

    /// Describes the program and the variables: `/usr/bin/pkg-config with PKG_CONFIG_LIBDIR=/x`.
    pub fn describe(&self) -> String {
        let program = self.program.as_deref().unwrap_or(Path::new("pkg-config")).display().to_string();
        let with = if self.variables.is_empty() { "" } else { " with " };
        program + with + &self.variables.join(" and ")
    }
}

/// Returns the names of a variable in the order in which the crate `pkg-config` reads them: for this host's target, for
/// the host, and for all.
fn names(name: &str) -> Vec<String> {
    let triple = VmArchitecture::of_host().map(|arch| arch.profile().triple);
    let targets = triple.into_iter().flat_map(|triple| [triple.to_owned(), triple.replace('-', "_")]);
    targets
        .map(|target| format!("{name}_{target}"))
        .chain([format!("HOST_{name}"), name.to_owned()])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> PkgConfig {
        PkgConfig::of(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_variable_that_wins_is_named() {
        let found =
            with(&[("PKG_CONFIG_LIBDIR", "/a"), ("HOST_PKG_CONFIG_LIBDIR", "/b"), ("PKG_CONFIG", "/bin/sh")]);
        assert_eq!(found.describe(), "/bin/sh with PKG_CONFIG=/bin/sh and HOST_PKG_CONFIG_LIBDIR=/b");
        assert_eq!(found.naming_variable(), Some("PKG_CONFIG=/bin/sh"));
        assert_eq!(with(&[("PKG_CONFIG_PATH", "/a")]).naming_variable(), None);
        assert_eq!(found.environment, [("PKG_CONFIG_LIBDIR", OsString::from("/b"))]);
        assert_eq!(with(&[("PKG_CONFIG", "sh")]).program, tools::find("sh"));
        assert_eq!(with(&[("PKG_CONFIG", "/nonexistent/pkg-config")]).program, None);
    }
}
