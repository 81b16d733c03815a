//! The origin of an executable: built here with a profile and compiler flags, or given by the user.

use std::path::PathBuf;

/// The origin of an executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `cargo xtask` built the executable.
    Built {
        profile: String,
        /// The compiler flags from environment variables, such as `RUSTFLAGS`.
        rustflags: Option<String>,
    },
    /// The value of `--agent FILE`, as it was typed.
    Given(PathBuf),
}

impl Origin {
    /// Returns the origin of an executable that this process builds, with the compiler flags from its environment.
    pub fn built(profile: &str, triple: &str) -> Self {
        let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
        Self::Built { profile: profile.to_owned(), rustflags: rustflags(variable, triple) }
    }
}

/// Returns the compiler flags from the environment. If several of these variables are set, cargo reads only the first
/// one.
fn rustflags(variable: impl Fn(&str) -> Option<String>, triple: &str) -> Option<String> {
    let of_target = format!("CARGO_TARGET_{}_RUSTFLAGS", triple.to_uppercase().replace('-', "_"));
    let names = ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", &of_target, "CARGO_BUILD_RUSTFLAGS"];
    let flags = names.into_iter().find_map(variable)?;
    // In `CARGO_ENCODED_RUSTFLAGS`, this character separates the flags.
    let flags = flags.replace('\x1f', " ");
    let flags = flags.trim();
    (!flags.is_empty()).then(|| flags.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Environment = [(&'static str, &'static str)];

    #[test]
    fn the_flags_are_those_that_cargo_takes() {
        let table: &[(&Environment, Option<&str>)] = &[
            (&[], None),
            (&[("RUSTFLAGS", " ")], None),
            (&[("RUSTFLAGS", "-Ctarget-cpu=native")], Some("-Ctarget-cpu=native")),
            (&[("RUSTFLAGS", ""), ("CARGO_BUILD_RUSTFLAGS", "-Cx")], None),
            (&[("CARGO_ENCODED_RUSTFLAGS", "-C\x1fy"), ("RUSTFLAGS", "-Cx")], Some("-C y")),
            (&[("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Cz")], Some("-Cz")),
            (&[("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Cz")], None),
        ];
        for (environment, expected) in table {
            let variable = |name: &str| {
                let found = environment.iter().find(|(set, _)| *set == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let flags = rustflags(variable, "aarch64-unknown-linux-gnu");
            assert_eq!(flags.as_deref(), *expected, "{environment:?}");
        }
    }
}
