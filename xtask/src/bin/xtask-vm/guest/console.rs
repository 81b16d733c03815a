//! The guest's serial console, and the *markers*: lines that the guest prints to report its progress. QEMU writes both
//! to files from the first byte. This module reads the files as they grow, and removes the control codes of terminals.
//! A line that shows a panic or an emergency shell ends a wait at once.

use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use fs_err::File;
use xtask_core::bail_guest;
use xtask_core::error::Failure;
use xtask_core::format::human_bytes;
use xtask_core::limits;
use xtask_core::output::clean;

/// The number of console lines that a report shows.
const TAIL_LINES: usize = 30;

/// The size in bytes at which a log of the guest ends the run, before it fills the disk and this process's memory. The
/// output of a boot with all of systemd's debug messages is smaller.
const LARGEST_LOG: u64 = 16 << 20;

/// The prompt of a getty.
const LOGIN_PROMPT: &str = " login:";

/// The place of a text on the console.
#[derive(Debug, Clone, Copy)]
enum Sign {
    Anywhere(&'static str),
    /// At the start of a line, as a prompt is. The line may be incomplete.
    Start(&'static str),
    /// In the last line of a console that has been silent for [`limits::FIRMWARE_SILENCE`].
    Last(&'static str),
}

/// Signs that the guest will never be up. Each row has the sign, the message, and the remedy.
const FAULTS: &[(Sign, &str, &str)] = &[
    (
        Sign::Anywhere("Kernel panic - not syncing"),
        "the guest's kernel panicked",
        "read the lines before the panic in console.log; a guest with too little \
         memory for its initramfs panics in the same way",
    ),
    (
        Sign::Anywhere("You are in emergency mode"),
        "the guest fell into systemd's emergency shell",
        "read in console.log which unit failed, usually a file system of /etc/fstab",
    ),
    (Sign::Anywhere("Entering emergency mode"), INITRAMFS_SHELL, NO_ROOT),
    (
        Sign::Anywhere("You are in rescue mode"),
        "the guest fell into systemd's rescue shell",
        "read in console.log what requested it",
    ),
    (Sign::Anywhere("Gave up waiting for root"), INITRAMFS_SHELL, NO_ROOT),
    (Sign::Start("(initramfs)"), INITRAMFS_SHELL, NO_ROOT),
    (Sign::Start("grub>"), BOOT_LOADER, NO_CONFIGURATION),
    (Sign::Start("grub rescue>"), BOOT_LOADER, NO_CONFIGURATION),
    (Sign::Anywhere("UEFI Interactive Shell"), NO_BOOT_DEVICE, NO_BOOT_LOADER),
    (Sign::Start("Shell>"), NO_BOOT_DEVICE, NO_BOOT_LOADER),
    (Sign::Anywhere("No bootable option or device was found"), NO_BOOT_DEVICE, NO_BOOT_LOADER),
    // The firmware tries its boot entries one after the other, so the guest may still boot from a later one.
    (
        Sign::Last("BdsDxe: failed to load Boot"),
        "the firmware could not load the image's boot entry",
        NO_BOOT_LOADER,
    ),
    (Sign::Anywhere("Synchronous Exception at"), FIRMWARE, OTHER_FIRMWARE),
    (Sign::Anywhere("SError Exception at"), FIRMWARE, OTHER_FIRMWARE),
    (Sign::Start("ASSERT ["), FIRMWARE, OTHER_FIRMWARE),
    (
        Sign::Anywhere("Remounting filesystem read-only"),
        "the guest's kernel has remounted a file system read-only",
        "read the lines before it in console.log: the disk or the file system has met an error",
    ),
];

const INITRAMFS_SHELL: &str = "the guest's initramfs gave up and opened a shell";
const NO_ROOT: &str =
    "the root file system was not found or is damaged: the image or its boot entry is wrong";
const BOOT_LOADER: &str = "the image's boot loader, GRUB, stopped at its prompt";
const NO_CONFIGURATION: &str = "GRUB found no configuration or no kernel: the image is incomplete or damaged";
const NO_BOOT_DEVICE: &str = "the firmware found no bootable device";
const NO_BOOT_LOADER: &str =
    "use another image: this one has no boot loader for this architecture on its ESP, or its disk is damaged";
const FIRMWARE: &str = "the UEFI firmware crashed and stands still";
const OTHER_FIRMWARE: &str = "some releases of the firmware do not run on QEMU's CPU max: use --cpu cortex-a76, or another release of the \
     firmware's package (qemu-efi-aarch64 or edk2-aarch64); if other images boot, this image's boot loader is broken";

/// The console of one machine, over all of its boots.
#[derive(Debug, Default)]
pub(crate) struct Console {
    serial: Output,
    /// The output of the virtio-serial port that only markers go to.
    markers: Output,
}

/// A file that grows.
#[derive(Debug, Default)]
struct Output {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
    lines: Vec<String>,
    /// The number of lines from earlier boots.
    earlier: usize,
    /// The time at which the file last grew.
    grown: Option<Instant>,
}

impl Output {
    fn read(&mut self) -> Result<Vec<String>> {
        let mut file = match File::open(&self.path) {
            // QEMU has not created the file yet.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            file => file?,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let rest = (LARGEST_LOG + 1).saturating_sub(self.offset);
        let more = file.take(rest).read_to_end(&mut self.partial)? as u64;
        if more > 0 {
            (self.offset, self.grown) = (self.offset + more, Some(Instant::now()));
        }
        if self.offset > LARGEST_LOG {
            bail_guest!(
                "the guest has written more than {} to {}", human_bytes(LARGEST_LOG), self.path.display();
                "read the end of this log for what the guest repeats"
            );
        }
        let end = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let complete: Vec<u8> = self.partial.drain(..end).collect();
        let known = self.lines.len();
        self.lines.extend(lines_of(&complete));
        Ok(self.lines[known..].to_vec())
    }

    fn new_boot(&mut self) -> Result<()> {
        self.read()?;
        self.partial.clear();
        self.earlier = self.lines.len();
        Ok(())
    }

    fn of_this_boot(&self) -> impl Iterator<Item = &str> {
        self.lines[self.earlier..].iter().map(String::as_str)
    }
}

impl Console {
    /// Returns a console without markers of its own.
    pub(crate) fn new(path: &Path) -> Self {
        Self { serial: Output { path: path.to_owned(), ..Output::default() }, ..Self::default() }
    }

    /// Returns the same console with the file of the markers.
    pub(crate) fn with_markers(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.markers.path);
        self
    }

    /// Reads the new output and returns the complete lines of the serial console.
    pub(crate) fn read(&mut self) -> Result<Vec<String>> {
        self.markers.read()?;
        self.serial.read()
    }

    /// Begins a new boot: the lines so far count as lines of earlier boots.
    pub(crate) fn new_boot(&mut self) -> Result<()> {
        self.markers.new_boot()?;
        self.serial.new_boot()
    }

    /// Returns the first line of this boot that contains `needle`. Markers come first, because the kernel can write
    /// into the line of a marker on the serial console.
    pub(crate) fn line_with(&self, needle: &str) -> Option<&str> {
        self.markers.of_this_boot().chain(self.serial.of_this_boot()).find(|line| line.contains(needle))
    }

    /// Returns how many lines of the serial console of this boot contain `needle`.
    pub(crate) fn count(&self, needle: &str) -> usize {
        self.serial.of_this_boot().filter(|line| line.contains(needle)).count()
    }

    /// Returns the text after `marker` in the first line of this boot that contains it.
    pub(crate) fn after(&self, marker: &str) -> Option<&str> {
        Some(self.line_with(marker)?.split_once(marker)?.1)
    }

    /// Returns whether a getty on the console has shown its prompt. The line of the prompt may be incomplete.
    pub(crate) fn has_login_prompt(&self) -> bool {
        self.line_with(LOGIN_PROMPT).is_some()
            || String::from_utf8_lossy(&self.serial.partial).contains(LOGIN_PROMPT)
    }

    /// Returns the fault that the console of this boot shows, if any. A wait for the guest ends on a fault.
    pub(crate) fn fault(&self) -> Option<Failure> {
        let incomplete = lines_of(&self.serial.partial);
        let lines = || self.serial.of_this_boot().chain(incomplete.iter().map(String::as_str));
        let is_silent = self.serial.grown.is_some_and(|grown| grown.elapsed() > limits::FIRMWARE_SILENCE);
        let shows = |sign: &Sign| match *sign {
            Sign::Anywhere(text) => lines().any(|line| line.contains(text)),
            Sign::Start(text) => lines().any(|line| line.starts_with(text)),
            Sign::Last(text) => is_silent && lines().last().is_some_and(|line| line.contains(text)),
        };
        let (_, what, hint) = FAULTS.iter().find(|(sign, ..)| shows(sign))?;
        Some(Failure::guest(*what, *hint))
    }

    pub(crate) fn last(&self) -> &str {
        self.serial.lines.last().map_or("", String::as_str)
    }

    /// Returns the last lines, for a report.
    pub(crate) fn tail(&self) -> Vec<String> {
        let lines = &self.serial.lines;
        lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
    }
}

/// Returns the lines of a text that are not empty, without escape sequences and other control characters. Firmware and
/// boot loaders place their texts with sequences that move the cursor (ECMA-48, CUP and HVP), so each of these
/// sequences begins a new line.
fn lines_of(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split("\x1b[");
    let mut lines = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        match end.strip_prefix(['H', 'f']) {
            Some(rest) => lines.extend(["\n", rest]),
            None => lines.extend(["\x1b[", part]),
        }
    }
    let lines = lines.split(['\n', '\r']).map(|line| clean(line).trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use xtask_core::error::Kind;

    fn console(content: &[u8]) -> (tempfile::TempDir, Console) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, content).unwrap();
        let console = Console::new(&path);
        (directory, console)
    }

    fn append(console: &Console, content: &[u8]) {
        std::fs::OpenOptions::new()
            .append(true)
            .open(&console.serial.path)
            .unwrap()
            .write_all(content)
            .unwrap();
    }

    #[test]
    fn lines_come_as_the_file_grows_and_without_codes() {
        let (_directory, mut console) = console(b"\x1b[2J[\x1b[0;32m  OK  \x1b[0m] Started\r\nhalf");
        assert_eq!(console.read().unwrap(), ["[  OK  ] Started"]);
        append(&console, b" a line\n");
        assert_eq!(console.read().unwrap(), ["half a line"]);
        assert_eq!(console.line_with("a line"), Some("half a line"));
        assert!(console.fault().is_none());
    }

    #[test]
    fn every_fault_is_seen_and_a_new_boot_forgets_it() {
        for (sign, what, _) in FAULTS {
            let (text, silent) = match sign {
                Sign::Anywhere(text) => (format!("[    3.2] {text}: x\r\nmore\n"), false),
                Sign::Start(text) => (format!("\x1b[2J\x1b[01;01H{text} "), false),
                Sign::Last(text) => (format!("{text}0001\r\n"), true),
            };
            let (_directory, mut console) = console(text.as_bytes());
            console.read().unwrap();
            if silent {
                assert!(console.fault().is_none(), "{text}");
                let silence = limits::FIRMWARE_SILENCE + limits::POLL;
                console.serial.grown = Instant::now().checked_sub(silence);
            }
            assert_eq!(console.fault().unwrap().to_string(), *what);
            console.new_boot().unwrap();
            assert!(console.fault().is_none());
        }
    }

    #[test]
    fn a_line_that_only_names_a_prompt_is_no_fault() {
        let lines = "[    1.0] Unpacking (initramfs)\nthe prompt grub> and the prompt Shell>\nsh: ASSERT [ -e x ]\n\
                     BdsDxe: failed to load Boot0001\nBdsDxe: starting Boot0002\n";
        let (_directory, mut console) = console(lines.as_bytes());
        console.read().unwrap();
        console.serial.grown = Instant::now().checked_sub(limits::FIRMWARE_SILENCE * 2);
        assert!(console.fault().is_none(), "{:?}", console.fault());
    }

    #[test]
    fn a_guest_that_does_not_stop_printing_ends_the_run() {
        let (directory, mut console) = console(b"a line\n");
        let log = std::fs::File::options().write(true).open(directory.path().join("console.log")).unwrap();
        log.set_len(LARGEST_LOG).unwrap();
        console.read().unwrap();
        append(&console, b"one more\n");
        let error = console.read().unwrap_err();
        assert!(Kind::Guest.is(&error) && error.to_string().contains("console.log"), "{error:#}");
        // The log may grow faster than it is read.
        log.set_len(100 * LARGEST_LOG).unwrap();
        console.read().unwrap_err();
        assert!(console.serial.partial.len() as u64 <= LARGEST_LOG + 1, "the memory is not bounded");
    }

    #[test]
    fn a_marker_is_seen_though_the_kernel_wrote_into_it() {
        let (directory, console) = console(b"iot-xtask: prov[   41.2] eth0: link up\nision done\n");
        let markers = directory.path().join("markers.log");
        let mut console = console.with_markers(&markers);
        console.read().unwrap();
        assert_eq!(console.line_with("provision done"), None);
        std::fs::write(&markers, "iot-xtask: provision done\n").unwrap();
        console.read().unwrap();
        assert_eq!(console.after("provision"), Some(" done"));
        console.new_boot().unwrap();
        assert_eq!(console.line_with("provision done"), None, "a marker of an earlier boot");
    }

    #[test]
    fn a_console_that_is_not_there_yet_is_silent() {
        let mut console = Console::new(Path::new("/nonexistent/console.log"));
        assert!(console.read().unwrap().is_empty());
    }
}
