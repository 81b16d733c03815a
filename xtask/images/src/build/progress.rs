//! Reads the progress of a build, package by package, from the output of mmdebstrap and dpkg.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// The reader of a log that is still being written: the position up to which the log was read, and the progress that
/// the log has shown.
#[derive(Debug, Default)]
pub(super) struct Follower {
    log: PathBuf,
    read: u64,
    rest: Vec<u8>,
    wanted: u32,
    unpacked: u32,
    configured: u32,
    plan: String,
    now: String,
}

impl Follower {
    pub(super) fn new(log: &Path) -> Self {
        Self { log: log.to_owned(), ..Self::default() }
    }

    /// Processes the next line of the log.
    fn line(&mut self, line: &str) {
        let first = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
        if let Some((_, rest)) = line.split_once(" upgraded, ") {
            // apt prints this line once for the essential packages and once for the others. If apt 2.6 forks a hook
            // while the line is in its output buffer, the hook prints the line once more.
            if self.plan != line {
                line.clone_into(&mut self.plan);
                self.wanted += first(rest).parse().unwrap_or(0);
            }
        } else if let Some(package) = line.strip_prefix("Unpacking ") {
            self.unpacked += 1;
            self.now = format!("unpacking {}", first(package));
        } else if let Some(package) = line.strip_prefix("Setting up ") {
            self.configured += 1;
            self.now = format!("setting up {}", first(package));
        } else if let Some(what) = line.strip_prefix("I: ") {
            self.now = what.trim_end_matches('.').to_owned();
        } else if line.starts_with("update-initramfs: ") {
            self.now = "making the initramfs".to_owned();
        }
    }

    /// Reads the new lines and describes the progress. The description is only for people, so a log that cannot be
    /// read is no error.
    pub(super) fn describe(&mut self) -> String {
        let read = File::open(&self.log).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut self.rest)
        });
        self.read += read.unwrap_or(0) as u64;
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim());
        }
        if self.unpacked == 0 {
            return self.now.clone();
        }
        let total = self.wanted.max(self.unpacked);
        format!("{} ({} of {total} packages unpacked, {} set up)", self.now, self.unpacked, self.configured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_counted_by_package() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut follower = Follower::new(&log);
        assert_eq!(follower.describe(), "");
        let mut text = "I: running apt-get update...\n".to_owned();
        std::fs::write(&log, &text).unwrap();
        assert_eq!(follower.describe(), "running apt-get update");
        text += "0 upgraded, 236 newly installed, 0 to remove and 0 not upgraded.\nUnpacking dash (0.5) ...\nSetting ";
        std::fs::write(&log, &text).unwrap();
        assert_eq!(follower.describe(), "unpacking dash (1 of 236 packages unpacked, 0 set up)");
        text += "up dash (0.5) ...\n0 upgraded, 236 newly installed, 0 to remove and 0 not upgraded.\n";
        std::fs::write(&log, &text).unwrap();
        assert_eq!(follower.describe(), "setting up dash (1 of 236 packages unpacked, 1 set up)");
    }
}
