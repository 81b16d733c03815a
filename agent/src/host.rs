//! What the device says of itself, read once at start: none of it changes while a process lives, but for the
//! uptime.

use std::path::Path;

use anyhow::{Context, Result};

use crate::digest;
use crate::protocol::{DeviceStatus, OsRelease, STATUS_SCHEMA};

/// The device as this process found it at start.
#[derive(Debug, Clone)]
pub struct Host {
    /// SHA-256 of the running executable, lower-case hex.
    pub exe_sha256: String,
    /// random(4)'s id of this boot.
    pub boot_id: String,
    /// `uname -m`.
    pub machine: String,
    /// `uname -r`.
    pub kernel: String,
    /// From os-release(5).
    pub os_release: OsRelease,
}

impl Host {
    /// Reads everything from procfs, uname(2) and os-release(5).
    ///
    /// # Errors
    /// Names the file that could not be read.
    pub fn read() -> Result<Self> {
        let uname = rustix::system::uname();
        Ok(Self {
            // Through procfs, not through the path: this is what runs, even if the file has been replaced.
            exe_sha256: digest::of_file(Path::new("/proc/self/exe"))?,
            boot_id: read_text("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            machine: uname.machine().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            os_release: parse_os_release(&read_text("/etc/os-release")?),
        })
    }

    /// The status document number `sequence` of this process.
    ///
    /// # Errors
    /// When the uptime cannot be read.
    pub fn status(&self, device_id: &str, sequence: u64) -> Result<DeviceStatus> {
        Ok(DeviceStatus {
            schema: STATUS_SCHEMA,
            device_id: device_id.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            exe_sha256: self.exe_sha256.clone(),
            boot_id: self.boot_id.clone(),
            machine: self.machine.clone(),
            os_release: self.os_release.clone(),
            kernel: self.kernel.clone(),
            uptime_seconds: uptime_seconds()?,
            sequence,
            desired_revision: 0,
            deployments: Vec::new(),
            deployments_omitted: 0,
            events: Vec::new(),
        })
    }
}

/// Seconds since the kernel started: the one clock of a device without a battery that is right from the start.
///
/// # Errors
/// When procfs cannot be read.
pub fn uptime_seconds() -> Result<u64> {
    parse_uptime(&read_text("/proc/uptime")?)
}

fn read_text(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {path}"))
}

fn parse_os_release(text: &str) -> OsRelease {
    let field = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.trim_matches(['"', '\'']).to_owned())
            .unwrap_or_default()
    };
    OsRelease { id: field("ID"), version_id: field("VERSION_ID") }
}

fn parse_uptime(text: &str) -> Result<u64> {
    let seconds = text.split('.').next().unwrap_or_default();
    seconds.parse().with_context(|| format!("/proc/uptime holds {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_with_and_without_quotes() {
        let table = [
            ("PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n", ("debian", "12")),
            ("ID=\"ubuntu\"\nID_LIKE=debian\nVERSION_ID='24.04'\n", ("ubuntu", "24.04")),
            ("ID=arch\n", ("arch", "")),
        ];
        for (text, (id, version_id)) in table {
            assert_eq!(
                parse_os_release(text),
                OsRelease { id: id.into(), version_id: version_id.into() },
                "{text:?}"
            );
        }
    }

    #[test]
    fn uptime_is_whole_seconds() {
        assert_eq!(parse_uptime("61.93 100.00\n").unwrap(), 61);
        assert!(parse_uptime("soon\n").is_err());
    }

    #[test]
    fn this_process_can_describe_its_host() {
        let status = Host::read().unwrap().status("pi-7", 3).unwrap();
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(status.exe_sha256, digest::of_bytes(&exe));
        assert_eq!(status.machine, std::env::consts::ARCH);
        assert_eq!((status.schema, status.sequence, status.boot_id.len()), (STATUS_SCHEMA, 3, 36));
    }
}
