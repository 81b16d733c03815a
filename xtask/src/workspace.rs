//! This workspace, as cargo describes it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;

/// The workspace that is worked on.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// Asks cargo, from this package's own manifest.
    ///
    /// # Errors
    /// Where `cargo metadata` fails.
    pub fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let metadata = MetadataCommand::new()
            .manifest_path(&manifest)
            .no_deps()
            .exec()
            .with_context(|| format!("ask cargo for the workspace of {}", manifest.display()))?;
        Ok(Self { root: metadata.workspace_root.into_std_path_buf() })
    }

    /// The directory of the workspace's Cargo.toml.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// What the cargo that runs this has set for this package. An inner cargo must not see it: build scripts that read such
/// variables would be run anew for it.
pub fn inherited_from_cargo() -> impl Iterator<Item = OsString> {
    const PREFIXES: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CFG_"];
    std::env::vars_os().map(|(name, _)| name).filter(|name| {
        name.to_str().is_some_and(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
    })
}

/// The cargo that runs this.
pub fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
