//! The signs on the console of a first boot that cloud-init will not provision the guest.

use std::time::{Duration, Instant};

use xtask_core::error::Failure;
use xtask_core::machine::seed::marker;

use super::console::Console;

/// Texts that show that cloud-init runs. The first two are in cloud-init's own lines and in systemd's lines about
/// cloud-init's units. The word cloud-init alone does not show it, because the kernel's command line may contain it.
const SIGNS: [&str; 3] = ["cloud-init[", "Cloud-init", "iot-xtask: "];
/// The name of the datasource that reads the seed, in cloud-init's last line.
const DATASOURCE: &str = "DataSourceNoCloud";

/// A wait for cloud-init during a first boot.
#[derive(Debug, Default)]
pub(crate) struct FirstBoot {
    /// The time at which the console first had a login prompt.
    prompted: Option<Instant>,
}

impl FirstBoot {
    /// Returns a failure of the guest if cloud-init has used another datasource, or if it has printed nothing within
    /// `limit` after the login prompt.
    pub(crate) fn check(&mut self, console: &Console, limit: Duration) -> Result<(), Failure> {
        let hint = "use an image with cloud-init that reads a NoCloud disk: install cloud-init in the image, delete its file \
                    /etc/cloud/cloud-init.disabled, and do not restrict its datasource_list to other datasources";
        let other = console.after(marker::CLOUD_INIT_FINISHED).and_then(datasource);
        if let Some(other) = other {
            let what = format!("cloud-init did not read the seed of the run: it used {other}");
            return Err(Failure::guest(what, hint));
        }
        if !console.has_login_prompt() || SIGNS.iter().any(|sign| console.line_with(sign).is_some()) {
            return Ok(());
        }
        if self.prompted.get_or_insert_with(Instant::now).elapsed() < limit {
            return Ok(());
        }
        let what =
            "the guest is up, but cloud-init did not run: it is missing, disabled or has another datasource";
        Err(Failure::guest(what, hint))
    }
}

/// Returns the datasource in cloud-init's last line, unless it is that of the seed. The kernel may have written into
/// the line, so the beginning of the name is enough.
fn datasource(line: &str) -> Option<&str> {
    let name = line.split_once("Datasource ")?.1;
    let name = name.split(|c: char| !c.is_ascii_alphanumeric()).next()?;
    (!DATASOURCE.starts_with(name)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str, limit: Duration) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, text).unwrap();
        let mut console = Console::new(&path);
        console.read().unwrap();
        FirstBoot::default().check(&console, limit).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_guest_without_cloud_init_is_noticed_after_its_login_prompt() {
        let prompt = "\r\niot-device login: ";
        let disabled = "[    0.0] Kernel command line: root=LABEL=rootfs cloud-init=disabled";
        let runs = "[   31.5] cloud-init[301]: Cloud-init v. 22.4.2 running 'init-local'";
        let ended = |source: &str| {
            format!(
                "[   61.5] cloud-init[571]: Cloud-init v. 22.4.2 finished at Sun, 29 Nov 2026 10:00:00 +0000. {source}"
            )
        };
        let none = ended("Datasource DataSourceNone.  Up 61.45 seconds");
        let seed = ended("Datasource DataSourceNoCloud [seed=/dev/vdb][dsmode=net].  Up 61.45 seconds");
        let torn = ended("Datasource DataSourceNoC[   61.5] eth0: link up");
        let table = [
            (format!("{disabled}{prompt}"), "cloud-init did not run"),
            (disabled.to_owned(), ""),
            (format!("{runs}{prompt}"), ""),
            (format!("iot-xtask: provision started{prompt}"), ""),
            (format!("{runs}{prompt}\n{none}\n"), "it used DataSourceNone"),
            (format!("{runs}{prompt}\n{seed}\n"), ""),
            (format!("{runs}{prompt}\n{torn}\n"), ""),
        ];
        for (text, words) in table {
            let found = checked(&text, Duration::ZERO);
            match words {
                "" => assert_eq!(found, Ok(()), "{text}"),
                words => assert!(found.unwrap_err().contains(words), "{text}"),
            }
        }
        assert_eq!(checked(&format!("{disabled}{prompt}"), Duration::from_secs(60)), Ok(()), "it may come");
    }
}
