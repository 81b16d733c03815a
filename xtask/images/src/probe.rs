//! Asks qemu-img about a disk image before anything boots from it.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use xtask_core::error::Failure;
use xtask_core::format::name_of;
use xtask_core::host::tools;
use xtask_core::image::{Format, Image};
use xtask_core::limits;

use xtask_jobs::{Ui, child};

/// The output of `qemu-img info` (qemu-img(1)).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    /// True for a qcow2 file with AES or LUKS.
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: serde_json::Value,
}

/// Returns the format and the size of a bootable disk.
///
/// # Errors
/// Returns an error if the disk cannot be examined, is not bootable, or needs another file.
pub(crate) fn look_at(disk: &Path, image: &Image, ui: &Ui) -> Result<(Format, u64)> {
    examine(disk, image, ui)?
}

/// Returns the format and the size like [`look_at`], but distinguishes two errors. The outer one means that the disk
/// could not be examined. The inner one means that the file is no bootable disk, even if it has the right digest. Some
/// files are refused although `qemu-img info` accepts them: a qcow2 file that names other files of this host as its
/// backing file or its data file, an encrypted file, a file that was cut off, and a file of unknown format, such as a
/// login page, which qemu-img takes for a raw disk.
pub(crate) fn examine(disk: &Path, image: &Image, ui: &Ui) -> Result<Result<(Format, u64)>> {
    let qemu_img = tools::require("qemu-img")?;
    let ask = |words: &[&str]| {
        let words = words.iter().map(OsString::from);
        let arguments: Vec<_> = words.chain([disk.as_os_str().to_owned()]).collect();
        child::output(&qemu_img, &arguments, limits::SERVER_START, ui)
            .with_context(|| format!("look at the image {}", disk.display()))
    };
    let looked = ask(&["info", "--output=json", "-U"])?;
    let words = String::from_utf8_lossy(&looked.stderr);
    ensure!(looked.status.success(), "look at the image {}: {}", disk.display(), words.trim());
    let info: Info = serde_json::from_slice(&looked.stdout).context("parse qemu-img's output")?;
    let promised = image.expected.as_ref().map(|_| image.format);
    let checked = match check_format(&info, promised) {
        Ok(Format::Raw) => check_raw(disk, info.virtual_size).map(|()| Format::Raw),
        // The check reads only the tables of the file, and not the data.
        Ok(Format::Qcow2) => {
            let checked = ask(&["check", "-q", "-f", "qcow2", "-U"])?;
            check_tables(checked.status.code(), &checked.stderr).map(|()| Format::Qcow2)
        }
        Err(problem) => Err(problem),
    };
    let checked = checked.map(|format| (format, info.virtual_size));
    Ok(checked.map_err(|problem| {
        let hint =
            "use a complete, uncompressed and unencrypted qcow2 or raw disk image that needs no other file";
        anyhow!("it {problem}").context(Failure::host(format!("use the image {}", disk.display()), hint))
    }))
}

/// Checks that a raw disk begins with the signature of an MBR, as a disk with a GPT does (UEFI 2.10, 5.2). If it has a
/// GPT, checks that the backup of the GPT is not beyond the end of the disk (5.3.2, AlternateLBA).
fn check_raw(disk: &Path, bytes: u64) -> Result<(), String> {
    let mut start = [0; 2 * SECTOR as usize];
    let read = File::open(disk).and_then(|mut file| file.read_exact(&mut start));
    let [mbr, gpt] = [&start[..512], &start[512..]];
    if read.is_err() || mbr[510..] != [0x55, 0xaa] {
        return Err("is neither qcow2 nor a disk with partitions".to_owned());
    }
    let backup = gpt[32..40].try_into().map_or(0, u64::from_le_bytes);
    if gpt.starts_with(b"EFI PART") && backup >= bytes / SECTOR {
        return Err(format!(
            "was cut off: its partition table needs {} sectors, and it has {}",
            backup + 1,
            bytes / SECTOR
        ));
    }
    Ok(())
}

/// The size of a sector in bytes.
const SECTOR: u64 = 512;

/// Evaluates `qemu-img check`. The exit code is 2 for a file with damaged tables, and 3 for a file that only has leaked
/// clusters (qemu-img(1)).
fn check_tables(code: Option<i32>, stderr: &[u8]) -> Result<(), String> {
    if matches!(code, Some(0 | 3)) {
        return Ok(());
    }
    let words = String::from_utf8_lossy(stderr);
    Err(format!("is damaged or was cut off: {}", words.lines().next().unwrap_or("qemu-img check fails")))
}

fn check_format(info: &Info, promised: Option<Format>) -> Result<Format, String> {
    if info.encrypted || info.format == "luks" {
        return Err("is encrypted".to_owned());
    }
    if let Some(backing) = &info.backing_filename {
        return Err(format!("is an overlay over {backing}"));
    }
    if let Some(data) = info.format_specific.pointer("/data/data-file") {
        return Err(format!("keeps its data in {data}"));
    }
    let format = match info.format.as_str() {
        "qcow2" => Format::Qcow2,
        "raw" => Format::Raw,
        other => return Err(format!("has the unsupported format {other}")),
    };
    match promised {
        Some(promised) if promised != format => {
            Err(format!("is {}, and the catalogue says {}", name_of(&format), name_of(&promised)))
        }
        _ => Ok(format),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_needs_another_file_is_refused() {
        let info = |text: &str| serde_json::from_str::<Info>(text).unwrap();
        let sound = r#"{"format":"qcow2","virtual-size":1,"format-specific":{"type":"qcow2","data":{"compat":"1.1"}}}"#;
        assert_eq!(check_format(&info(sound), None), Ok(Format::Qcow2));
        let layer = r#"{"format":"qcow2","virtual-size":1,"backing-filename":"/etc/shadow"}"#;
        assert!(check_format(&info(layer), None).unwrap_err().contains("/etc/shadow"));
        let split =
            r#"{"format":"qcow2","virtual-size":1,"format-specific":{"data":{"data-file":"/dev/sda"}}}"#;
        assert!(check_format(&info(split), None).unwrap_err().contains("/dev/sda"));
        assert!(check_format(&info(r#"{"format":"vmdk","virtual-size":1}"#), None).is_err());
        for locked in [
            r#"{"format":"qcow2","virtual-size":1,"encrypted":true}"#,
            r#"{"format":"luks","virtual-size":1}"#,
        ] {
            assert_eq!(check_format(&info(locked), None).unwrap_err(), "is encrypted");
        }
        assert!(
            check_format(&info(sound), Some(Format::Raw)).unwrap_err().contains("the catalogue says raw")
        );
    }

    #[test]
    fn a_web_page_and_a_raw_disk_that_was_cut_off_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("page");
        let check = |content: &[u8]| {
            std::fs::write(&file, content).unwrap();
            check_raw(&file, content.len() as u64)
        };
        let page = "<html>log in</html>".repeat(100);
        assert!(check(page.as_bytes()).unwrap_err().contains("neither qcow2"));
        let mut disk = vec![0; 8 * 512];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(check(&disk), Ok(()), "a disk with an MBR alone");
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[544] = 7;
        assert_eq!(check(&disk), Ok(()));
        assert!(check(&disk[..7 * 512]).unwrap_err().contains("needs 8 sectors, and it has 7"));
    }

    /// Returns a disk with the header of LUKS1 and no key (LUKS1 On-Disk Format Specification 1.2.3, 2.2). qemu-img does
    /// not create one: before that it measures the CPU time of a key derivation, and it fails if the kernel counts none.
    #[cfg(feature = "real")]
    fn luks() -> Vec<u8> {
        const STRIPES: u32 = 4000;
        const SLOT_SECTORS: u32 = 256;
        let mut disk = vec![0; 2 << 20];
        let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"LUKS\xba\xbe\x00\x01");
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, b"sha256");
        put(104, &(8 + 8 * SLOT_SECTORS).to_be_bytes());
        put(108, &32_u32.to_be_bytes());
        put(164, &1000_u32.to_be_bytes());
        put(168, b"00000000-0000-4000-8000-000000000000");
        for slot in 0..8_u32 {
            let at = 208 + 48 * slot as usize;
            put(at, &0x0000_dead_u32.to_be_bytes());
            put(at + 40, &(8 + slot * SLOT_SECTORS).to_be_bytes());
            put(at + 44, &STRIPES.to_be_bytes());
        }
        disk
    }

    /// Makes images with qemu-img, and looks at them.
    #[cfg(feature = "real")]
    #[test]
    fn an_encrypted_disk_and_one_that_was_cut_off_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (raw, disk) = (directory.path().join("raw"), directory.path().join("disk"));
        let arch = xtask_core::arch::VmArchitecture::Aarch64;
        let built_in = xtask_core::image::catalogue::Catalogue::built_in();
        let image = Image { expected: None, ..built_in.find("debian-12", arch).unwrap() };
        let qemu_img = |words: &str| {
            let files = [&raw, &disk].map(|path| path.to_str().unwrap().to_owned());
            let words =
                words.split(' ').map(|word| word.replace("RAW", &files[0]).replace("DISK", &files[1]));
            let status = std::process::Command::new(tools::require("qemu-img").unwrap()).args(words).status();
            assert!(status.unwrap().success());
        };
        let refused = || {
            let examined = examine(&disk, &image, &Ui::quiet()).unwrap();
            examined.err().map_or(String::new(), |error| format!("{error:#}"))
        };
        qemu_img(
            "create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=aes,encrypt.key-secret=s DISK 1M",
        );
        assert!(refused().contains("is encrypted"), "{}", refused());
        std::fs::write(&disk, luks()).unwrap();
        assert!(refused().contains("is encrypted"), "{}", refused());
        std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
        qemu_img("convert -O qcow2 RAW DISK");
        assert_eq!(refused(), "");
        let file = File::options().write(true).open(&disk).unwrap();
        file.set_len(file.metadata().unwrap().len() - (1 << 16)).unwrap();
        assert!(refused().contains("was cut off"), "{}", refused());
    }
}
