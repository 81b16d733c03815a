//! Facts about the device. All but the uptime and the footprint are read once, since they do not change while
//! a process runs.

use std::path::Path;

use agent_protocol::{DeviceStatus, Footprint, OsRelease, STATUS_SCHEMA};
use anyhow::{Context, Result};

use crate::digest;

/// The names of this device and of its current boot.
#[derive(Debug, Clone)]
pub(crate) struct DeviceIdentity {
    pub(crate) device_id: String,
    pub(crate) boot_id: String,
}

/// Reads procfs, uname(2) and os-release(5) for a status that has no deployments, events or footprint yet.
pub(crate) fn read_status(device_id: &str) -> Result<DeviceStatus> {
    let uname = rustix::system::uname();
    Ok(DeviceStatus {
        schema: STATUS_SCHEMA,
        device_id: device_id.to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        // Procfs leads to the running executable even if the file at its path has been replaced.
        exe_sha256: digest::of_file(Path::new("/proc/self/exe"))?,
        boot_id: read_text("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
        machine: uname.machine().to_string_lossy().into_owned(),
        os_release: parse_os_release(&read_text("/etc/os-release")?),
        kernel: uname.release().to_string_lossy().into_owned(),
        uptime_seconds: uptime_seconds()?,
        ..DeviceStatus::default()
    })
}

/// Returns the seconds since the kernel started. A device without a battery has no other clock that is
/// correct at boot.
pub(crate) fn uptime_seconds() -> Result<u64> {
    parse_uptime(&read_text("/proc/uptime")?)
}

pub(crate) fn footprint() -> Result<Footprint> {
    parse_footprint(
        &read_text("/proc/self/stat")?,
        &read_text("/proc/self/status")?,
        &read_text("/proc/uptime")?,
        rustix::param::clock_ticks_per_second(),
    )
}

/// Parses the documents of procfs. In proc_pid_stat(5), utime, stime and starttime are the fields 14, 15 and
/// 22. Field 2 ends at the last `)`.
fn parse_footprint(stat: &str, status: &str, uptime: &str, ticks: u64) -> Result<Footprint> {
    let (_, fields) = stat.rsplit_once(") ").context("/proc/self/stat has no name")?;
    let milliseconds = |number: usize| -> Result<u64> {
        let field = fields.split(' ').nth(number - 3);
        let text = field.with_context(|| format!("/proc/self/stat has no field {number}"))?;
        let count = text.parse::<u64>();
        let count = count.with_context(|| format!("/proc/self/stat's field {number} is {text:?}"))?;
        Ok(count * 1000 / ticks.max(1))
    };
    let uptime: f64 =
        uptime.split(' ').next().unwrap_or_default().parse().context("/proc/uptime has no number")?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.context("/proc/self/status has no VmRSS")?.trim().trim_end_matches("kB").trim();
    Ok(Footprint {
        age_milliseconds: ((uptime * 1000.0) as u64).saturating_sub(milliseconds(22)?),
        cpu_milliseconds: milliseconds(14)? + milliseconds(15)?,
        resident_kib: resident.parse().with_context(|| format!("VmRSS is {resident:?}"))?,
    })
}

fn read_text(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {path}"))
}

fn parse_os_release(text: &str) -> OsRelease {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
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
    fn a_footprint_is_read_out_of_procfs() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 3 0 100000 1 2 3";
        let footprint =
            parse_footprint(stat, "Name:\tx\nVmRSS:\t    5120 kB\n", "1010.50 9.00\n", 100).unwrap();
        let expected = Footprint { age_milliseconds: 10_500, cpu_milliseconds: 2000, resident_kib: 5120 };
        assert_eq!(footprint, expected);
        assert!(parse_footprint("7 (a) S 1", "VmRSS: 1 kB", "1.0 1.0", 100).is_err());
    }

    #[test]
    fn this_process_can_describe_its_host() {
        let status = read_status("pi-7").unwrap();
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(status.exe_sha256, digest::of_bytes(&exe));
        assert_eq!(status.machine, std::env::consts::ARCH);
        assert_eq!((status.schema, status.boot_id.len()), (STATUS_SCHEMA, 36));
    }
}
