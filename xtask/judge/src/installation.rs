//! The files, links and markers that `agent/dist/install.sh` and `agent/dist/prerequisites.sh` leave on a device, apart
//! from the executable.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Stands in a path for the numeric id of the agent's user, which `/etc/passwd` of the judged disk names.
pub(crate) const UID: &str = "{uid}";

/// A file of an installation. It may be absent until the first installation has succeeded, and must exist after that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstalledFile {
    /// The absolute path. `{uid}` stands for the id of the agent's user.
    pub path: String,
    #[serde(flatten)]
    pub kind: InstalledKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum InstalledKind {
    /// A file that install.sh syncs before it renames it: whenever the file exists, it has this content.
    Renamed { content: String },
    /// A file that prerequisites.sh writes. It may be torn until the first installation has succeeded, because a first
    /// installation that was interrupted must be repeated.
    Prepared { content: String },
    /// A symbolic link to a file with this name. The directory in the link differs between versions of systemd.
    Link { name: String },
    /// A file whose existence counts.
    Marker,
}

/// The files of `agent/dist` that install.sh renames, with their paths on the device.
const RENAMED: [(&str, &str); 4] = [
    ("iot-agent.service", "/etc/systemd/system/iot-agent.service"),
    ("iot-readahead.service", "/etc/systemd/system/iot-readahead.service"),
    ("readahead.sh", "/usr/local/lib/iot-agent/readahead.sh"),
    ("uninstall.sh", "/usr/local/lib/iot-agent/uninstall.sh"),
];
/// The files of `agent/dist` that prerequisites.sh writes.
const PREPARED: [(&str, &str); 7] = [
    ("iot-podman.socket", "/usr/local/lib/iot-agent/user-units/iot-podman.socket"),
    ("iot-podman.service", "/usr/local/lib/iot-agent/user-units/iot-podman.service"),
    ("containers.conf", "/var/lib/iot-agent/.config/containers/containers.conf"),
    ("storage.conf", "/var/lib/iot-agent/.config/containers/storage.conf"),
    ("iot-user.conf", "/etc/systemd/system/user@{uid}.service.d/iot-agent.conf"),
    ("iot-agent.sysusers", "/etc/sysusers.d/iot-agent.conf"),
    ("iot-agent.tmpfiles", "/etc/tmpfiles.d/iot-agent.conf"),
];
/// The links that enable units and the generator of the user's environment.
const LINKS: [&str; 4] = [
    "/etc/systemd/system/multi-user.target.wants/iot-agent.service",
    "/etc/systemd/system/multi-user.target.wants/iot-readahead.service",
    "/usr/local/lib/iot-agent/user-units/sockets.target.wants/iot-podman.socket",
    "/usr/local/lib/iot-agent/environment-generators/30-systemd-environment-d-generator",
];
/// The file with which logind starts the systemd of the agent's user at boot.
const LINGER: &str = "/var/lib/systemd/linger/iot-agent";
/// The directory with config.toml and the secrets.
pub(crate) const CONFIGURATION: &str = "/etc/iot-agent";

/// Returns what an installation leaves on the device. `dist` is the directory `agent/dist`, `config` is the content of
/// the bundle's config.toml, and `secrets` has the content of each file in the bundle's directory `secrets`, by its path
/// there.
///
/// # Errors
/// Returns an error if a file of `dist` cannot be read.
pub fn installed_files(
    dist: &Path,
    config: &str,
    secrets: &BTreeMap<String, String>,
) -> Result<Vec<InstalledFile>> {
    let mut files = Vec::new();
    for (name, path) in RENAMED {
        let content = fs_err::read_to_string(dist.join(name))?;
        files.push(InstalledFile { path: path.to_owned(), kind: InstalledKind::Renamed { content } });
    }
    for (name, path) in PREPARED {
        let content = fs_err::read_to_string(dist.join(name))?;
        files.push(InstalledFile { path: path.to_owned(), kind: InstalledKind::Prepared { content } });
    }
    let secrets = secrets.iter().map(|(path, content)| (format!("secrets/{path}"), content.as_str()));
    for (path, content) in [("config.toml".to_owned(), config)].into_iter().chain(secrets) {
        let kind = InstalledKind::Renamed { content: content.to_owned() };
        files.push(InstalledFile { path: format!("{CONFIGURATION}/{path}"), kind });
    }
    files.extend(LINKS.map(|path| {
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        InstalledFile { path: path.to_owned(), kind: InstalledKind::Link { name } }
    }));
    files.push(InstalledFile { path: LINGER.to_owned(), kind: InstalledKind::Marker });
    Ok(files)
}
