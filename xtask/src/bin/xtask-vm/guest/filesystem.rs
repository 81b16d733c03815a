//! Checks the file systems of a guest that lost its power: replays the journal as the next boot would, and then checks
//! the whole file system. The check also finds a disk that QEMU has read without one of its backing files, which the
//! guest itself does not notice.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use fs_err::File;
use fs_err::os::unix::fs::FileExt as _;
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::remove_file;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_images::inventory::{Partition, partitions, unpack};
use xtask_jobs::{Ui, child};

/// The program that checks file systems. A run with `--fsck` looks for it before it begins.
pub(crate) const CHECKER: &str = "e2fsck";
/// The files of a check: the disk, merged with its backing files into one raw file, and one partition. Both are sparse.
const RAW: &str = "checked.raw";
const PART: &str = "checked.part";
/// The superblock at the beginning of ext2, ext3 and ext4 (linux, fs/ext4/ext4.h): the offset of its magic number, the
/// magic number, the offset of its state, and the bit that a kernel sets in the state when it finds errors.
const MAGIC_AT: u64 = 1024 + 56;
const MAGIC: [u8; 2] = [0x53, 0xef];
const STATE_AT: u64 = 1024 + 58;
const ERRORS_FOUND: u8 = 2;
/// The files with the blocks that the repairs have replaced, one for each call of e2fsck that repairs.
const UNDO_FILES: [&str; 2] = ["journal.undo", "orphans.undo"];
/// e2fsck says this of a transaction whose commit was torn. It then sets the state, too, although no kernel has found errors.
const CUT_OFF: &str = "was corrupt, replay was aborted";
/// The bit of e2fsck's exit code for damage that it may not repair without a user (e2fsck(8)).
const UNCORRECTED: i32 = 4;

/// Checks every ext4 file system on a disk that no process has open, and returns their number. Meanwhile, the files in
/// `scratch` take at most twice the space of the data on the disk.
///
/// # Errors
/// Returns a failure of the guest with e2fsck's output if a file system is damaged. It also returns a failure of the
/// guest if the disk has no ext4 file system, since then nothing was checked. Any other error is a failure of the host.
pub(crate) fn check(disk: &Path, scratch: &Path, ui: &Ui) -> Result<usize> {
    let (raw, part) = (scratch.join(RAW), scratch.join(PART));
    let checked = unpack(disk, &raw, ui).and_then(|()| check_raw(&raw, &part, ui));
    let removed = remove_file(&raw).and_then(|()| remove_file(&part));
    let hint = "see the causes; the run itself did not fail, and --fsck is optional";
    let attempted = format!("check the file systems on {}", disk.display());
    checked.and_then(|count| removed.map(|()| count)).map_err(|error| host_fault(error, attempted, hint))
}

fn check_raw(raw: &Path, part: &Path, ui: &Ui) -> Result<usize> {
    let mut checked = 0;
    for Partition { start, bytes } in ext4_partitions(raw)? {
        // The partition is copied, because e2fsck 1.47.0 loses the offset of a file system after it has replayed the
        // journal.
        cut_out(raw, start, bytes, part, ui)?;
        check_one(part, start, None, ui)?;
        checked += 1;
    }
    let nothing = "the disk has no ext4 file system to check";
    let hint = "--fsck supports ext4 on GPT disks; leave it out for this image";
    ensure!(checked > 0, Failure::guest(nothing, hint));
    Ok(checked)
}

/// Returns the partitions with ext4 file systems of a raw disk that has a GPT.
pub(crate) fn ext4_partitions(raw: &Path) -> Result<Vec<Partition>> {
    let disk = File::open(raw)?;
    let mut found = partitions(raw).context("read the disk's partitions")?;
    found.retain(|partition| {
        let mut magic = [0; MAGIC.len()];
        // If this cannot be read, the partition is too small for these file systems.
        disk.read_exact_at(&mut magic, partition.start + MAGIC_AT).is_ok() && magic == MAGIC
    });
    Ok(found)
}

/// Copies a partition of a raw disk to a sparse file.
pub(crate) fn cut_out(raw: &Path, start: u64, bytes: u64, part: &Path, ui: &Ui) -> Result<()> {
    let options = format!(
        "driver=raw,offset={start},size={bytes},file.driver=file,file.filename={}",
        // In these options, a comma ends a value, and two commas stand for one.
        raw.display().to_string().replace(',', ",,")
    );
    let mut arguments = ["convert", "-O", "raw", "--image-opts", &options].map(OsString::from).to_vec();
    arguments.push(part.into());
    let copied = child::read(&tools::require("qemu-img")?, &arguments, limits::INVENTORY, ui);
    copied.map(drop).context("copy a partition")
}

/// First repairs the file system as a boot does: the journal, then the inodes that were deleted while they were open.
/// Then checks it without any change. Damage that is still there existed before the power cut. If `undo` is a
/// directory, [`undo_repairs`] can undo the repairs with the files that are written there.
///
/// # Errors
/// Returns a failure of the guest with e2fsck's output if the file system is damaged.
pub(crate) fn check_one(part: &Path, start: u64, undo: Option<&Path>, ui: &Ui) -> Result<()> {
    let damaged = |how: String| {
        Failure::guest(
            format!("the guest's file system at byte {start} of its disk is damaged: {how}"),
            "the disk is kept as damaged.qcow2 in the run's directory; run again with --cold. If the damage \
             returns, suspect the guest's kernel or the image; otherwise the snapshot",
        )
    };
    let has_errors = || -> Result<bool> {
        let mut state = [0];
        File::open(part)?.read_exact_at(&mut state, STATE_AT).context("read the file system's state")?;
        Ok(state[0] & ERRORS_FOUND != 0)
    };
    // The second value is the highest permitted exit code: e2fsck returns 1 after a repair, and 0 if it finds no
    // errors.
    let undo = undo.map(|directory| UNDO_FILES.map(|name| directory.join(name)));
    let calls = [(&["-p", "-E", "journal_only"][..], 1), (&["-p"], 1), (&["-f", "-n"], 0)];
    let mut is_cut_off = false;
    for (number, (flags, most)) in calls.into_iter().enumerate() {
        // The state is read before and after the journal is replayed, because e2fsck clears it when it makes repairs.
        ensure!(
            is_cut_off || !has_errors()?,
            damaged("the guest's kernel has recorded errors in it".to_owned())
        );
        let mut arguments: Vec<_> = flags.iter().map(OsString::from).collect();
        if let Some(file) = undo.as_ref().and_then(|files| files.get(number)) {
            arguments.extend(["-z".into(), file.into()]);
        }
        arguments.push(part.into());
        let output = child::output(&tools::require(CHECKER)?, &arguments, limits::INVENTORY, ui)?;
        let call = format!("{CHECKER} {}", flags.join(" "));
        is_cut_off = String::from_utf8_lossy(&output.stdout).contains(CUT_OFF);
        match output.status.code() {
            Some(code) if (0..=most).contains(&code) => {}
            Some(code) if code & UNCORRECTED != 0 => {
                let message = String::from_utf8_lossy(&output.stdout);
                let words = message.lines().map(str::trim).filter(|line| !line.is_empty());
                let words = words.take(6).collect::<Vec<_>>().join("; ");
                return Err(damaged(format!("{call}: {words}")).into());
            }
            _ => {
                bail!("{call}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
            }
        }
    }
    Ok(())
}

/// Undoes the repairs of [`check_one`] with the files in `directory`, and deletes these files.
pub(crate) fn undo_repairs(part: &Path, directory: &Path, ui: &Ui) -> Result<()> {
    let undo = tools::require("e2undo")?;
    for file in UNDO_FILES.iter().rev().map(|name| directory.join(name)).filter(|file| file.exists()) {
        child::read(&undo, &["-f".into(), file.clone().into(), part.into()], limits::INVENTORY, ui)
            .context("undo the repairs of a file system")?;
        remove_file(&file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use xtask_core::error::Kind;

    /// The offset of the partition in the tests, in bytes.
    const START: u64 = 1 << 20;

    fn run(program: &str, arguments: &[&str]) {
        let program = tools::require(program).unwrap();
        let output = Command::new(&program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}: {output:?}", program.display());
    }

    /// Makes a qcow2 disk with one partition, formats the partition if `format` is set, applies `change` to the file
    /// system, and checks the disk.
    fn checked(format: bool, change: Option<&str>) -> Result<usize> {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (raw, table, disk) = (at("raw"), at("table"), at("disk"));
        File::create(&raw).unwrap().set_len(80 << 20).unwrap();
        std::fs::write(&table, "label: gpt\nstart=2048, size=131072\n").unwrap();
        let sfdisk = tools::require("sfdisk").unwrap();
        let table = File::open(&table).unwrap().into_file();
        let wrote = Command::new(sfdisk).arg("--quiet").arg(&raw).stdin(table).status();
        assert!(wrote.unwrap().success());
        if format {
            run("mke2fs", &["-q", "-t", "ext4", "-E", &format!("offset={START}"), &raw, "64M"]);
        }
        if let Some(change) = change {
            run("debugfs", &["-w", "-R", change, &format!("{raw}?offset={START}")]);
        }
        run("qemu-img", &["convert", "-q", "-O", "qcow2", &raw, &disk]);
        let checked = check(Path::new(&disk), directory.path(), &Ui::quiet());
        assert!(!directory.path().join(RAW).exists());
        checked
    }

    #[test]
    fn what_is_whole_passes_and_what_is_damaged_is_told_in_the_checkers_words() {
        assert_eq!(checked(true, None).unwrap(), 1);
        // After a power cut there is a journal to replay.
        assert_eq!(checked(true, Some("feature needs_recovery")).unwrap(), 1);
        let changes = [
            ("clri lost+found", "lost+found"),
            // The directory has a block of another file, as on a disk that was read without one of its backing files.
            ("sif lost+found block[5] 7", "damaged"),
            ("ssv state 3", "the guest's kernel has recorded errors"),
        ];
        for (change, words) in changes {
            let error = checked(true, Some(change)).unwrap_err();
            assert!(Kind::Guest.is(&error), "{change}: {error:#}");
            assert!(format!("{error:#}").contains(words), "{change}: {error:#}");
        }
    }

    /// Only the first sector of a commit is on the disk, and behind it is older content of the journal.
    #[test]
    fn a_torn_commit_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (part, content, commands) = (at("part"), at("content"), at("commands"));
        File::create(&part).unwrap().set_len(32 << 20).unwrap();
        run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-J", "size=4", &part]);
        std::fs::write(&content, [1; 4096]).unwrap();
        let text = format!("journal_open -c -v 3\njournal_write -b 8000 {content}\njournal_close\n");
        std::fs::write(&commands, text).unwrap();
        run("debugfs", &["-w", "-f", &commands, &part]);
        let blocks = tools::read(&tools::require("debugfs").unwrap(), &["-R", "blocks <8>", &part]).unwrap();
        // The commit is behind the superblock, the descriptor and the content.
        let commit: u64 = blocks.split_whitespace().nth(3).unwrap().parse().unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&part).unwrap();
        let mut header = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut header, commit * 4096).unwrap();
        assert_eq!(header, [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2]);
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], commit * 4096 + 512).unwrap();
        check_one(Path::new(&part), 0, None, &Ui::quiet()).unwrap();
    }

    #[test]
    fn where_nothing_can_be_checked_nothing_passes() {
        let error = checked(false, None).unwrap_err();
        assert!(format!("{error:#}").contains("no ext4 file system"), "{error:#}");
        // If the file is not a disk, the failure is the host's.
        let directory = tempfile::tempdir().unwrap();
        let gone = directory.path().join("gone");
        let error = check(&gone, directory.path(), &Ui::quiet()).unwrap_err();
        assert!(Kind::Host.is(&error), "{error:#}");
    }
}
