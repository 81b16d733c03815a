//! Asks qemu-img about a disk image before anything boots from it.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
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
/// could not be examined. The inner one means that the file is no bootable disk, even if it has the right digest. Two
/// kinds of files are refused although qemu-img accepts them: a qcow2 file that names other files of this host as its
/// backing file or its data file, and a file of unknown format, such as a login page, which qemu-img takes for a raw
/// disk.
pub(crate) fn examine(disk: &Path, image: &Image, ui: &Ui) -> Result<Result<(Format, u64)>> {
    let words = ["info", "--output=json", "-U"].map(OsString::from);
    let arguments: Vec<_> = words.into_iter().chain([disk.as_os_str().to_owned()]).collect();
    let output = child::read(&tools::require("qemu-img")?, &arguments, limits::SERVER_START, ui)
        .with_context(|| format!("look at the image {}", disk.display()))?;
    let info: Info = serde_json::from_str(&output).context("parse qemu-img's output")?;
    let promised = image.expected.as_ref().map(|_| image.format);
    let checked = check_format(&info, promised).and_then(|format| match format {
        Format::Raw if !has_partitions(disk) => Err("is neither qcow2 nor a disk with partitions".to_owned()),
        format => Ok((format, info.virtual_size)),
    });
    Ok(checked.map_err(|problem| {
        let hint = "use an uncompressed qcow2 or raw disk image that needs no other file";
        anyhow!("it {problem}").context(Failure::host(format!("use the image {}", disk.display()), hint))
    }))
}

/// Checks the last two bytes of the first sector for the signature of an MBR. A GPT has a protective MBR (UEFI 2.10,
/// 5.2).
fn has_partitions(disk: &Path) -> bool {
    let mut sector = [0; 512];
    let read = File::open(disk).and_then(|mut file| file.read_exact(&mut sector));
    read.is_ok() && sector[510..] == [0x55, 0xaa]
}

fn check_format(info: &Info, promised: Option<Format>) -> Result<Format, String> {
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
        assert!(
            check_format(&info(sound), Some(Format::Raw)).unwrap_err().contains("the catalogue says raw")
        );
    }

    #[test]
    fn a_web_page_is_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("page");
        std::fs::write(&file, "<html>log in</html>".repeat(100)).unwrap();
        assert!(!has_partitions(&file));
        let mut disk = vec![0; 1024];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&file, disk).unwrap();
        assert!(has_partitions(&file));
    }
}
