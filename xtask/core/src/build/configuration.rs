//! cargo's configuration of a target, by cargo's own rules: the linker and rustc's flags.
//!
//! The last `-Clinker` in rustc's flags decides. Without one, the linker is the first of these (The Cargo Book,
//! Configuration): the environment variable, `.cargo/config.toml` in the workspace and its parent directories, the
//! configuration in `$CARGO_HOME`, and rustc's default. The crate `cargo-config2` reads all of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_config2::{Config, ResolveOptions, de};

use super::linker::{Linker, LinkerOrigin};
use crate::arch::MachineProfile;
use crate::workspace::{NATIVE_LINKER, Workspace};

/// cargo's configuration in one directory.
pub struct Configuration {
    config: Config,
    /// The configuration files alone, without the environment. They tell where a value is defined.
    files: de::Config,
    variables: BTreeMap<OsString, OsString>,
}

impl Configuration {
    /// Reads the configuration that cargo uses for `workspace`.
    ///
    /// # Errors
    /// Returns an error if a configuration file cannot be read or is not valid TOML.
    pub fn load(workspace: &Workspace) -> Result<Self> {
        let variables: BTreeMap<_, _> = std::env::vars_os().chain(workspace.native_linker()).collect();
        let variable = |name: &str| variables.get(&OsString::from(name)).map(PathBuf::from);
        let home = variable("CARGO_HOME").or_else(|| Some(variable("HOME")?.join(".cargo")));
        Self::load_from(workspace.root(), home, variables)
    }

    fn load_from(
        directory: &Path,
        home: Option<PathBuf>,
        variables: BTreeMap<OsString, OsString>,
    ) -> Result<Self> {
        let what = || format!("read cargo's configuration for {}", directory.display());
        let options = ResolveOptions::default().cargo_home(home.clone()).env(variables.clone());
        Ok(Self {
            config: Config::load_with_options(directory, options).with_context(what)?,
            files: de::Config::load_with_options(directory, home).with_context(what)?,
            variables,
        })
    }

    /// Finds the linker that cargo uses for the target of `machine`.
    ///
    /// # Errors
    /// Returns an error if the configuration of the target is not valid.
    pub fn linker(&self, machine: &MachineProfile) -> Result<Linker> {
        let flags = self.flags(machine)?;
        if let Some(program) = linker_in(&flags) {
            return Ok(Linker {
                program: program.into(),
                origin: LinkerOrigin::Flags(self.place_of_flags(machine)),
            });
        }
        let configured = self.config.linker(machine.triple);
        let configured = configured.with_context(|| format!("read the linker for {}", machine.triple))?;
        let variable = machine.cargo_variable("LINKER");
        let (program, origin) = match configured {
            None => (NATIVE_LINKER.into(), LinkerOrigin::Default),
            Some(program) if self.is_set(&variable) => (program, LinkerOrigin::Variable(variable)),
            Some(program) => (program, LinkerOrigin::File(self.file_of_linker(machine))),
        };
        Ok(Linker { program, origin })
    }

    /// Returns the flags that cargo passes to rustc for the target of `machine`, or `None` if there are none.
    ///
    /// # Errors
    /// Returns an error if the configuration of the flags is not valid.
    pub fn rustflags(&self, machine: &MachineProfile) -> Result<Option<String>> {
        let flags = self.flags(machine)?.join(" ");
        Ok((!flags.is_empty()).then_some(flags))
    }

    fn flags(&self, machine: &MachineProfile) -> Result<Vec<String>> {
        let flags = self.config.rustflags(machine.triple);
        let flags = flags.with_context(|| format!("read rustc's flags for {}", machine.triple))?;
        Ok(flags.map(|flags| flags.flags).unwrap_or_default())
    }

    /// Returns the value that a build script sees for an environment variable, and the name of the variable for a
    /// message. `None` if the value is not UTF-8.
    pub(super) fn variable(&self, name: &str) -> Option<(String, String)> {
        let (value, of_table) = self.seen(name)?;
        let place = if of_table { " in [env] of cargo's configuration" } else { "" };
        Some((value.to_str()?.to_owned(), format!("{name}{place}")))
    }

    /// Returns whether a build script sees a value that is not empty.
    pub(super) fn has_variable(&self, name: &str) -> bool {
        self.seen(name).is_some_and(|(value, _)| !value.is_empty())
    }

    /// Returns the value of a variable, and whether the table `[env]` sets it. The table sets a variable that the
    /// environment does not set, or that has `force`. `cargo run` passes these values on in the environment.
    fn seen(&self, name: &str) -> Option<(&OsString, bool)> {
        let of_environment = self.variables.get(&OsString::from(name));
        let of_table = self.config.env.get(name);
        let of_table =
            of_table.filter(|entry| entry.force || of_environment.is_none_or(|value| *value == entry.value));
        of_table.map(|entry| (&entry.value, true)).or_else(|| Some((of_environment?, false)))
    }

    fn is_set(&self, variable: &str) -> bool {
        self.variables.contains_key(&OsString::from(variable))
    }

    /// Returns the variable with rustc's flags, or a phrase for cargo's configuration. If several variables are set,
    /// cargo reads only the first one.
    fn place_of_flags(&self, machine: &MachineProfile) -> String {
        let of_target = machine.cargo_variable("RUSTFLAGS");
        let names = ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", &of_target, "CARGO_BUILD_RUSTFLAGS"];
        let set = names.into_iter().find(|name| self.is_set(name));
        set.unwrap_or("the rustflags of cargo's configuration").to_owned()
    }

    fn file_of_linker(&self, machine: &MachineProfile) -> String {
        let of_target = self.files.target.get(machine.triple).and_then(|target| target.linker.as_ref());
        match of_target.and_then(|linker| linker.definition.as_ref()) {
            Some(definition) => definition.to_string(),
            None => "a table [target.'cfg(…)'] of cargo's configuration".to_owned(),
        }
    }
}

#[cfg(test)]
impl Configuration {
    pub(super) fn of_test(directory: &Path, home: &Path, variables: &[(&str, &str)]) -> Self {
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self::load_from(directory, Some(home.join(".cargo")), variables).unwrap()
    }
}

/// Returns the linker that rustc's flags name. Of several, rustc uses the last one.
fn linker_in(flags: &[String]) -> Option<&str> {
    let joined =
        flags.iter().filter_map(|flag| flag.strip_prefix("-C").or_else(|| flag.strip_prefix("--codegen=")));
    let separate = flags.windows(2).filter(|pair| ["-C", "--codegen"].contains(&pair[0].as_str()));
    let values = joined.chain(separate.map(|pair| pair[1].as_str()));
    values.filter_map(|value| value.trim_start().strip_prefix("linker=")).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;

    const TRIPLE: &str = "aarch64-unknown-linux-gnu";

    fn write(directory: &Path, file: &str, text: &str) {
        std::fs::create_dir_all(directory.join(".cargo")).unwrap();
        std::fs::write(directory.join(".cargo").join(file), text).unwrap();
    }

    fn config(directory: &Path, file: &str, linker: &str) {
        write(directory, file, &format!("[target.{TRIPLE}]\nlinker = \"{linker}\"\n"));
    }

    fn load(directory: &Path, home: &Path, variables: &[(&str, &str)]) -> Configuration {
        Configuration::of_test(directory, home, variables)
    }

    fn arm() -> &'static MachineProfile {
        VmArchitecture::Aarch64.profile()
    }

    #[test]
    fn the_search_goes_as_cargos_does() {
        let root = tempfile::tempdir().unwrap();
        let (inner, home) = (root.path().join("a/b"), root.path().join("home"));
        std::fs::create_dir_all(&inner).unwrap();
        let resolve = |variables: &[(&str, &str)]| load(&inner, &home, variables).linker(arm()).unwrap();
        let program = |variables| resolve(variables).program;
        assert_eq!(program(&[]), Path::new("cc"), "rustc's default");
        write(&home, "config.toml", "[target.'cfg(target_arch = \"aarch64\")']\nlinker = \"by-cfg\"\n");
        assert_eq!(program(&[]), Path::new("by-cfg"));
        config(&home, "config.toml", "from-home");
        assert_eq!(program(&[]), Path::new("from-home"));
        config(&root.path().join("a"), "config.toml", "from-parent");
        assert_eq!(program(&[]), Path::new("from-parent"));
        config(&inner, "config.toml", "tools/ld");
        assert_eq!(program(&[]), inner.join("tools/ld"), "relative to the directory of .cargo");
        config(&inner, "config", "older-name");
        let older = resolve(&[]);
        assert_eq!(older.program, Path::new("older-name"), "cargo prefers the name without an ending");
        assert!(older.origin.to_string().ends_with("/a/b/.cargo/config"), "{}", older.origin);
        let variable = ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "mine");
        assert_eq!(program(&[variable]), Path::new("mine"));
        let flags = resolve(&[variable, ("RUSTFLAGS", "-Clinker=one -C linker=/opt/two -Copt-level=1")]);
        assert_eq!(flags.program, Path::new("/opt/two"));
        assert_eq!(flags.origin, LinkerOrigin::Flags("RUSTFLAGS".to_owned()));
    }

    #[test]
    fn a_broken_configuration_is_named() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "config.toml", "[target\n");
        let error = Configuration::load_from(root.path(), None, BTreeMap::new()).err().unwrap();
        assert!(format!("{error:#}").contains(".cargo/config.toml"), "{error:#}");
    }

    #[test]
    fn the_flags_are_those_that_cargo_takes() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "config.toml", "[build]\nrustflags = [\"-Cfile\"]\n");
        type Environment<'a> = &'a [(&'a str, &'a str)];
        let table: &[(Environment<'_>, Option<&str>)] = &[
            (&[], Some("-Cfile")),
            (&[("RUSTFLAGS", " ")], None),
            (&[("RUSTFLAGS", "-Ctarget-cpu=native")], Some("-Ctarget-cpu=native")),
            (&[("RUSTFLAGS", ""), ("CARGO_BUILD_RUSTFLAGS", "-Cx")], None),
            (&[("CARGO_ENCODED_RUSTFLAGS", "-C\x1fy"), ("RUSTFLAGS", "-Cx")], Some("-C y")),
            (&[("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Cz")], Some("-Cfile")),
        ];
        for (environment, expected) in table {
            let flags = load(root.path(), root.path(), environment).rustflags(arm()).unwrap();
            assert_eq!(flags.as_deref(), *expected, "{environment:?}");
        }
        let of_target = [("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Cz")];
        let flags = load(root.path(), root.path(), &of_target).rustflags(arm()).unwrap().unwrap();
        assert!(flags.contains("-Cz"), "{flags}");
    }
}
