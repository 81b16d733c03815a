//! Checks that a cargo profile exists, before cargo builds with it.

use std::process::Stdio;

use anyhow::{Context, Result};

use crate::error::Failure;
use crate::workspace::Workspace;

/// Checks that cargo knows a profile. The profile may be one of cargo's own, or be defined in the workspace's manifest,
/// in cargo's configuration or by variables. The check is a `cargo clean` that deletes nothing, because it fails for an
/// unknown profile.
///
/// # Errors
/// If cargo does not know the profile, returns a usage error with cargo's message.
pub fn check(workspace: &Workspace, profile: &str) -> Result<()> {
    let mut clean = workspace.cargo();
    clean.args(["clean", "--dry-run", "--quiet", "--color", "never", "--profile", profile]);
    // Another cargo may hold the lock of the real target directory.
    let empty = workspace.target_dir().join("no-such-directory");
    clean.env("CARGO_TARGET_DIR", &empty).env("CARGO_BUILD_BUILD_DIR", &empty).stdin(Stdio::null());
    let output = clean.output().context("ask cargo for the profile")?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.trim().trim_start_matches("error: ");
    Err(Failure::usage(format!("--profile {profile}: no such cargo profile; cargo says: {message}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_that_cargo_does_not_know_is_a_usage_error() {
        let workspace = Workspace::find().unwrap();
        for name in ["dev", "release", "bench"] {
            check(&workspace, name).unwrap();
        }
        let error = check(&workspace, "fast").unwrap_err();
        assert_eq!(crate::error::code(&error), 2);
        assert!(error.to_string().contains("profile `fast` is not defined"), "{error}");
    }
}
