//! The git commit of a workspace.

use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The commit of a workspace, and whether its files differ from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The full hash of the commit.
    pub commit: String,
    /// True if a file was changed, added or deleted since the commit. Ignored files do not count.
    pub dirty: bool,
}

impl Commit {
    /// Returns the commit of the workspace at `root`. Returns `None` if git is missing, refuses the directory, or does
    /// not track the workspace. git does not track an archive that was unpacked inside another repository.
    pub fn of(root: &Path) -> Option<Self> {
        let commit = head(root)?;
        git(root, &["ls-files", "--error-unmatch", "--", "Cargo.toml"])?;
        // With `--no-optional-locks`, this command cannot make a simultaneous commit of the user fail.
        let status = git(root, &["--no-optional-locks", "status", "--porcelain", "--", "."])?;
        Some(Self { commit, dirty: !status.is_empty() })
    }

    /// Formats the commit for a message: the first digits of the hash, and `(dirty)` if files differ from the commit.
    pub fn describe(&self) -> String {
        let dirty = if self.dirty { " (dirty)" } else { "" };
        format!("commit {}{dirty}", self.commit.get(..12).unwrap_or(&self.commit))
    }
}

/// Returns the hash of the commit that is checked out at `root`, or `None` if git fails.
pub fn head(root: &Path) -> Option<String> {
    Some(git(root, &["rev-parse", "HEAD"])?.trim().to_owned())
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    if !output.status.success() {
        return None;
    }
    String::from_utf8(output.stdout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commit_is_that_of_the_tree_and_says_whether_it_was_changed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let run = |arguments: &[&str]| git(root, arguments).expect("run git, which this test needs");
        run(&["init", "-q"]);
        assert_eq!(Commit::of(root), None, "no commit yet");
        std::fs::write(root.join("Cargo.toml"), "").unwrap();
        run(&["add", "."]);
        run(&["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "t"]);
        let clean = Commit::of(root).unwrap();
        assert!(clean.commit.len() >= 40 && !clean.dirty);
        assert_eq!(clean.describe(), format!("commit {}", &clean.commit[..12]));
        std::fs::write(root.join("new"), "").unwrap();
        let dirty = Commit::of(root).unwrap();
        assert!(dirty.dirty && dirty.describe().ends_with(" (dirty)"));
        let unpacked = root.join("unpacked");
        std::fs::create_dir(&unpacked).unwrap();
        std::fs::write(unpacked.join("Cargo.toml"), "").unwrap();
        assert_eq!(Commit::of(&unpacked), None, "the other repository does not track it");
    }
}
