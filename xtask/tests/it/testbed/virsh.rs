//! Asks a libvirtd of the testbed with virsh.

use std::collections::BTreeMap;
use std::process::Output;

use super::namespaces::Testbed;
use crate::scratch::{command, message};

/// A libvirtd of the testbed.
#[derive(Clone, Copy)]
pub(crate) struct Virsh<'a> {
    pub(super) testbed: &'a Testbed,
    pub(super) is_session: bool,
}

impl Virsh<'_> {
    /// Runs virsh's commands, each of which is one line of words, and returns their output. Panics if one fails.
    #[track_caller]
    pub(crate) fn run(&self, lines: &[&str]) -> String {
        let output = self.try_run(lines);
        assert!(output.status.success(), "virsh {lines:?}: {}", message(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs virsh's commands, which may fail.
    pub(crate) fn try_run(&self, lines: &[&str]) -> Output {
        let uri = if self.is_session { "qemu:///session" } else { "qemu:///system" };
        let mut virsh = command("virsh", &["--quiet", "--connect", uri, &lines.join("; ")]);
        virsh.env("LC_ALL", "C");
        let mut entered =
            if self.is_session { self.testbed.as_user(&virsh) } else { self.testbed.here(&virsh) };
        entered.output().unwrap()
    }

    /// Returns the names that a list command prints, one a line.
    pub(super) fn names(&self, list: &str) -> Vec<String> {
        let names = self.run(&[list]);
        names.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// Runs virsh once with all these commands, each of which has a label, and returns their outputs by label.
    #[track_caller]
    pub(super) fn answers(&self, questions: &[(String, String)]) -> BTreeMap<String, String> {
        const MARK: &str = "@@ next @@";
        let mark = format!("echo '{MARK}'");
        let lines: Vec<_> =
            questions.iter().flat_map(|(_, question)| [mark.as_str(), question.as_str()]).collect();
        if lines.is_empty() {
            return BTreeMap::new();
        }
        let output = self.run(&lines);
        let answers: Vec<_> = output.split(MARK).skip(1).map(|answer| answer.trim().to_owned()).collect();
        assert_eq!(answers.len(), questions.len(), "{output}");
        questions.iter().map(|(label, _)| label.clone()).zip(answers).collect()
    }

    /// Returns pool, name and path of each volume in an active pool.
    pub(super) fn volumes(&self) -> Vec<(String, String, String)> {
        let mut volumes = Vec::new();
        for pool in self.names("pool-list --name") {
            // Other programs may have changed the pool's directory.
            let listed = self.run(&[&format!("pool-refresh {pool}"), &format!("vol-list {pool}")]);
            let columns = listed.lines().filter_map(|line| line.split_once(" /"));
            volumes.extend(
                columns
                    .map(|(name, path)| (pool.clone(), name.trim().to_owned(), format!("/{}", path.trim()))),
            );
        }
        volumes
    }
}
