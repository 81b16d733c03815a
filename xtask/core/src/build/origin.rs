//! The origin of an executable: built here with a profile and compiler flags, or given by the user.

use std::path::PathBuf;

/// The origin of an executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `cargo xtask` built the executable.
    Built {
        profile: String,
        /// rustc's flags from environment variables, such as `RUSTFLAGS`, and from cargo's configuration.
        rustflags: Option<String>,
    },
    /// The value of `--agent FILE`, as it was typed.
    Given(PathBuf),
}
