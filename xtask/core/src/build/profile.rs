//! Checks that a cargo profile exists, before cargo builds with it.

use std::path::Path;

use anyhow::{Context, Result};

use crate::error::Failure;

/// The profiles for ordinary executables that cargo itself defines.
const BUILT_IN: [&str; 2] = ["dev", "release"];

/// Checks that a profile is defined by cargo or by the workspace's manifest.
///
/// # Errors
/// If the profile is not defined, returns a usage error that lists the defined profiles. Also returns an error if the
/// manifest cannot be read.
pub fn check(workspace: &Path, profile: &str) -> Result<()> {
    let path = workspace.join("Cargo.toml");
    let text = fs_err::read_to_string(&path)?;
    let manifest: toml::Table = text.parse().with_context(|| format!("parse {}", path.display()))?;
    known(&manifest, profile)
}

fn known(manifest: &toml::Table, profile: &str) -> Result<()> {
    let own = manifest.get("profile").and_then(toml::Value::as_table);
    let mut names: Vec<&str> = BUILT_IN.to_vec();
    names.extend(own.into_iter().flatten().map(|(name, _)| name.as_str()).filter(|n| !BUILT_IN.contains(n)));
    if !names.contains(&profile) {
        let names = names.join(", ");
        return Err(Failure::usage(format!(
            "--profile {profile}: no such cargo profile; there are: {names}"
        ))
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_and_built_in_profiles_are_known() {
        let manifest = "[profile.release]\n[profile.device]\ninherits = 'release'".parse().unwrap();
        for name in ["dev", "release", "device"] {
            known(&manifest, name).unwrap();
        }
        let error = known(&manifest, "fast").unwrap_err().to_string();
        assert_eq!(error, "--profile fast: no such cargo profile; there are: dev, release, device");
    }
}
