//! The agent's executable, units and configuration.

use super::Case;
use crate::Rule;
use crate::files::{Checked, Kind, difference};
use crate::installation::{InstalledFile, InstalledKind, UID};

/// The link to the agent's executable.
const LINK: &str = "/usr/local/bin/iot-agent";
const PASSWD: &str = "/etc/passwd";
/// The agent's user (`agent/dist/iot-agent.sysusers`).
const USER: &str = "iot-agent";

impl Case<'_> {
    pub(super) fn judge_executable(&mut self) -> Checked<()> {
        let target = match self.files.kind(LINK)? {
            None if !self.is_installed() => return Ok(()),
            None => return self.lose_executable(LINK, "is missing"),
            Some(Kind::Link(target)) => target,
            Some(_) => return self.lose_executable(LINK, "is not a link"),
        };
        // install.sh names the directory after the first digits of the digest.
        let is_named = |sha256: &&String| target.contains(&sha256[..16]);
        let (named, others): (Vec<_>, Vec<_>) = self.recording.executables.keys().partition(is_named);
        let expected = named.first().copied();
        let mut found = None;
        for sha256 in named.iter().chain(&others).copied() {
            if self.files.has(LINK, self.known.blob(sha256))? == Some(true) {
                found = Some(sha256.clone());
                break;
            }
        }
        let Some(found) = found else {
            let Some(content) = self.files.read(LINK)? else {
                return self.lose_executable(LINK, &format!("leads to {target}, which is missing"));
            };
            let difference = expected.and_then(|sha256| difference(&content, self.known.blob(sha256)));
            let what = difference.as_deref().unwrap_or("is none of the executables that were installed");
            return self.lose_executable(&target, what);
        };
        if !self.facts.executables.contains(&found) {
            let name = &self.recording.executables[&found];
            let what = format!("leads to {target} ({name}), which may not be installed at this point");
            self.lose_executable(LINK, &what)?;
        }
        self.judgement.executable = Some(found);
        Ok(())
    }

    fn lose_executable(&mut self, path: &str, what: &str) -> Checked<()> {
        let name = |sha256: &String| {
            self.recording
                .executables
                .get(sha256)
                .map_or_else(|| sha256.clone(), |name| format!("\"{name}\""))
        };
        let names: Vec<_> = self.facts.executables.iter().map(name).collect();
        let text = match (self.facts.installed, names.as_slice()) {
            (_, []) => format!("{path} {what}, although no installation had begun."),
            (Some(position), [name]) => {
                format!("{path} {what}, although the installation of {name} succeeded at entry {position}.")
            }
            (Some(position), names) => format!(
                "{path} {what}, although an installation succeeded at entry {position}; since then, {} may be installed.",
                names.join(" or ")
            ),
            (None, names) => {
                format!(
                    "{path} {what}; install.sh syncs the executable before it makes the link to {}.",
                    names.join(" or ")
                )
            }
        };
        self.lose(Rule::Executable, path, text);
        Ok(())
    }

    pub(super) fn judge_installed_files(&mut self) -> Checked<()> {
        let passwd = self.files.read(PASSWD)?.unwrap_or_default();
        let uid = uid_of(USER, &String::from_utf8_lossy(&passwd));
        for InstalledFile { path, kind } in &self.recording.files {
            let path = match (&uid, path.contains(UID)) {
                (_, false) => path.clone(),
                (Some(uid), true) => path.replace(UID, uid),
                (None, true) if self.is_installed() => {
                    let text =
                        format!("{PASSWD} has no user {USER}, although an installation has succeeded.");
                    self.lose(Rule::InstalledFile, PASSWD, text);
                    continue;
                }
                (None, true) => continue,
            };
            if let Some(what) = self.fault_of(&path, kind)? {
                let text = match self.facts.installed {
                    Some(position) => {
                        format!("{path} {what}, although an installation succeeded at entry {position}.")
                    }
                    None => {
                        format!("{path} {what}, although install.sh syncs the file before it renames it.")
                    }
                };
                self.lose(Rule::InstalledFile, &path, text);
            }
        }
        Ok(())
    }

    /// Returns what is wrong with an installed file.
    fn fault_of(&self, path: &str, kind: &InstalledKind) -> Checked<Option<String>> {
        let missing = || Ok(self.is_installed().then(|| "is missing".to_owned()));
        let expected = match kind {
            InstalledKind::Prepared { .. } if !self.is_installed() => return Ok(None),
            InstalledKind::Renamed { content } | InstalledKind::Prepared { content } => content,
            InstalledKind::Link { name } => {
                return match self.files.kind(path)? {
                    None => missing(),
                    Some(Kind::Link(target)) if target.rsplit('/').next() == Some(name) => Ok(None),
                    Some(Kind::Link(target)) => Ok(Some(format!("leads to {target:?} instead of {name}"))),
                    Some(_) => Ok(Some("is not a link".to_owned())),
                };
            }
            InstalledKind::Marker => {
                let is_missing = self.files.kind(path)?.is_none();
                return if is_missing { missing() } else { Ok(None) };
            }
        };
        let Some(content) = self.files.read(path)? else { return missing() };
        Ok(difference(&content, expected.as_bytes()))
    }
}

fn uid_of(user: &str, passwd: &str) -> Option<String> {
    let line = passwd.lines().find_map(|line| line.strip_prefix(user)?.strip_prefix(':'))?;
    line.split(':').nth(1).map(str::to_owned)
}
