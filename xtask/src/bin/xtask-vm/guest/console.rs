//! The guest's serial console: a file that QEMU writes from the first byte. Read as it grows, cleaned of a terminal's
//! codes, and judged: a panic or an emergency shell ends a wait at once.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What a report shows of the console.
const TAIL_LINES: usize = 30;

/// A console line that means that the guest will never be up, and what that says.
const FAULTS: &[(&str, &str, &str)] = &[
    (
        "Kernel panic - not syncing",
        "the guest's kernel panicked",
        "read the lines before the panic in console.log; a guest with too little memory for its initramfs panics in the same way",
    ),
    (
        "You are in emergency mode",
        "the guest fell into systemd's emergency shell",
        "read in console.log which unit failed, usually a file system of /etc/fstab",
    ),
    (
        "You are in rescue mode",
        "the guest fell into systemd's rescue shell",
        "read in console.log what requested it",
    ),
    (
        "(initramfs)",
        "the guest's initramfs gave up and opened a shell",
        "the root file system was not found: the image or its boot entry is wrong",
    ),
    (
        "UEFI Interactive Shell",
        "the firmware found no bootable device",
        "use another image: this one has no boot loader for this architecture on its ESP",
    ),
    (
        "BdsDxe: failed to load Boot",
        "the firmware could not load the image's boot entry",
        "use another image: this one has no boot loader for this architecture on its ESP",
    ),
];

/// A reason to stop waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConsoleFault {
    /// What happened.
    pub(crate) what: &'static str,
    /// What to do.
    pub(crate) hint: &'static str,
}

/// The console of one machine, over all of its boots.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
    tail: VecDeque<String>,
    /// The lines of the present boot that some wait looks for.
    seen: Vec<String>,
    fault: Option<ConsoleFault>,
}

impl Console {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            offset: 0,
            partial: Vec::new(),
            tail: VecDeque::new(),
            seen: Vec::new(),
            fault: None,
        }
    }

    /// Reads what has come since; returns the new lines.
    pub(crate) fn read(&mut self) -> Result<Vec<String>> {
        let mut bytes = Vec::new();
        match File::open(&self.path) {
            Ok(mut file) => {
                file.seek(SeekFrom::Start(self.offset))
                    .and_then(|_| file.read_to_end(&mut bytes))
                    .with_context(|| format!("read the console {}", self.path.display()))?;
            }
            // QEMU has not opened it yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("open the console {}", self.path.display()));
            }
        }
        self.offset += bytes.len() as u64;
        self.partial.extend(bytes);
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else { return Ok(Vec::new()) };
        let complete: Vec<u8> = self.partial.drain(..=end).collect();
        let text = String::from_utf8_lossy(&complete);
        let lines: Vec<String> =
            text.split(['\n', '\r']).map(clean).filter(|line| !line.is_empty()).collect();
        for line in &lines {
            self.take(line);
        }
        Ok(lines)
    }

    fn take(&mut self, line: &str) {
        if self.fault.is_none() {
            self.fault = FAULTS
                .iter()
                .find(|(needle, ..)| line.contains(needle))
                .map(|(_, what, hint)| ConsoleFault { what, hint });
        }
        self.tail.push_back(line.to_owned());
        if self.tail.len() > TAIL_LINES {
            self.tail.pop_front();
        }
        self.seen.push(line.to_owned());
    }

    /// From here on a new boot is read; what the last one said is no sign of it.
    pub(crate) fn new_boot(&mut self) -> Result<()> {
        self.read()?;
        self.partial.clear();
        self.seen.clear();
        self.fault = None;
        Ok(())
    }

    /// The first line of this boot that contains `needle`.
    pub(crate) fn line_with(&self, needle: &str) -> Option<&str> {
        self.seen.iter().find(|line| line.contains(needle)).map(String::as_str)
    }

    /// Whether the console waits behind `prompt`, which has no line end.
    pub(crate) fn prompts(&self, prompt: &str) -> bool {
        String::from_utf8_lossy(&self.partial).contains(prompt)
    }

    /// What this boot died of.
    pub(crate) fn fault(&self) -> Option<ConsoleFault> {
        // A prompt has no line end.
        let prompt = String::from_utf8_lossy(&self.partial);
        let prompted = FAULTS.iter().find(|(needle, ..)| prompt.contains(needle));
        self.fault.or(prompted.map(|(_, what, hint)| ConsoleFault { what, hint }))
    }

    /// The last line.
    pub(crate) fn last(&self) -> &str {
        self.tail.back().map_or("", String::as_str)
    }

    /// The last lines.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }
}

/// Without escape sequences (ECMA-48 CSI and OSC) and other control characters.
fn clean(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => match characters.next() {
                Some('[') => while characters.next().is_some_and(|c| !('\x40'..='\x7e').contains(&c)) {},
                Some(']') => while characters.next().is_some_and(|c| c != '\x07') {},
                _ => {}
            },
            '\t' => text.push(' '),
            c if c.is_control() => {}
            c => text.push(c),
        }
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn console(content: &[u8]) -> (tempfile::TempDir, Console) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, content).unwrap();
        let console = Console::new(&path);
        (directory, console)
    }

    fn append(console: &Console, content: &[u8]) {
        std::fs::OpenOptions::new().append(true).open(&console.path).unwrap().write_all(content).unwrap();
    }

    #[test]
    fn lines_come_as_the_file_grows_and_without_codes() {
        let (_directory, mut console) = console(b"\x1b[2J[\x1b[0;32m  OK  \x1b[0m] Started\r\nhalf");
        assert_eq!(console.read().unwrap(), ["[  OK  ] Started"]);
        append(&console, b" a line\n");
        assert_eq!(console.read().unwrap(), ["half a line"]);
        assert_eq!(console.line_with("a line"), Some("half a line"));
        assert_eq!(console.fault(), None);
    }

    #[test]
    fn every_fault_is_seen_and_a_new_boot_forgets_it() {
        for (needle, what, _) in FAULTS {
            let (_directory, mut console) = console(format!("[    3.2] {needle}: x\n").as_bytes());
            console.read().unwrap();
            assert_eq!(console.fault().unwrap().what, *what);
            console.new_boot().unwrap();
            assert_eq!(console.fault(), None);
        }
    }

    #[test]
    fn a_shell_prompt_without_a_line_end_is_a_fault() {
        let (_directory, mut console) = console(b"BusyBox v1.35\n(initramfs) ");
        console.read().unwrap();
        assert!(console.fault().unwrap().what.contains("initramfs"));
    }

    #[test]
    fn a_console_that_is_not_there_yet_is_silent() {
        let mut console = Console::new(Path::new("/nonexistent/console.log"));
        assert!(console.read().unwrap().is_empty());
    }
}
