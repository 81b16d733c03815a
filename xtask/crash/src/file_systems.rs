//! The tests with real file systems, which e2fsprogs makes, and with a log of QEMU.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use xtask_core::host::tools;

use crate::blame::describe;
use crate::disk::{BaseDisk, StateDisk};
use crate::log::{EntryKind, WriteLog, completed_entries};
use crate::samples::{Operation, Sample, flush, write_data};
use crate::state::{CrashState, MissingWrite};

const BLOCK: usize = 4096;
const OLD: &str = "/var/lib/iot-agent/old";
const NEW: &str = "/var/lib/iot-agent/state";

fn run(program: &str, arguments: &[&str]) -> String {
    tools::read(&tools::require(program).unwrap(), arguments).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Opens a file that has a file system and no partitions.
fn opened(path: &Path) -> Arc<BaseDisk> {
    let length = fs::metadata(path).unwrap().len();
    Arc::new(BaseDisk::open(path, 0..length).unwrap())
}

/// A base with the file `old`. Its log writes the file `state`, whose directory entry is only in the journal.
struct Case {
    directory: tempfile::TempDir,
    base: Arc<BaseDisk>,
    sample: Sample,
    log: Arc<WriteLog>,
}

impl Case {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("tree/var/lib/iot-agent")).unwrap();
        fs::write(at("tree").join(&OLD[1..]), "old").unwrap();
        fs::write(at("data"), "new".repeat(2000)).unwrap();
        let (base, new) = (at("base"), at("new"));
        fs::File::create(&base).unwrap().set_len(32 << 20).unwrap();
        let options = ["-q", "-F", "-b", "4096", "-J", "size=4", "-d"];
        run("mkfs.ext4", &[&options[..], &[path(&at("tree")), path(&base)]].concat());
        fs::copy(&base, &new).unwrap();
        run("debugfs", &["-w", "-R", &format!("write {} {NEW}", path(&at("data"))), path(&new)]);

        // The new content of the directory moves to the journal.
        let block = run("debugfs", &["-R", "blocks /var/lib/iot-agent", path(&new)]);
        let block: usize = block.trim().parse().unwrap();
        let (before, mut after) = (fs::read(&base).unwrap(), fs::read(&new).unwrap());
        let range = block * BLOCK..(block + 1) * BLOCK;
        assert_ne!(before[range.clone()], after[range.clone()]);
        fs::write(at("block"), &after[range.clone()]).unwrap();
        after[range.clone()].copy_from_slice(&before[range]);
        fs::write(&new, after).unwrap();
        let commands =
            format!("journal_open -c -v 3\njournal_write -b {block} {}\njournal_close\n", path(&at("block")));
        fs::write(at("commands"), commands).unwrap();
        run("debugfs", &["-w", "-f", path(&at("commands")), path(&new)]);
        let sample = Sample::new(&differences(&before, &fs::read(&new).unwrap()));
        Self { base: opened(&base), log: sample.log(), sample, directory }
    }

    /// Returns the state at the end of the log in which these writes are missing.
    fn state(&self, missing: Vec<usize>) -> CrashState {
        let whole = |entry: usize| MissingWrite::run(entry, 0..self.log.entries()[entry].sectors());
        CrashState { point: self.log.entries().len(), missing: missing.into_iter().map(whole).collect() }
    }

    fn disk(&self, missing: Vec<usize>) -> StateDisk {
        StateDisk::new(&self.base, &self.log, &self.state(missing))
    }

    fn described(&self, state: &CrashState) -> Vec<String> {
        let scratch = self.directory.path().join("scratch");
        fs::copy(self.directory.path().join("base"), &scratch).unwrap();
        describe(&self.base, &self.log, state, &scratch).unwrap()
    }

    /// Returns the entry whose description ends with a text.
    fn entry(&self, end: &str) -> usize {
        let all = self.described(&self.state((0..self.log.entries().len() - 1).collect()));
        all.iter().position(|one| one.ends_with(end)).unwrap_or_else(|| panic!("{end}: {all:#?}"))
    }
}

/// Returns a write for each block that differs, and a flush.
fn differences(before: &[u8], after: &[u8]) -> Vec<Operation> {
    let blocks = before.chunks(BLOCK).zip(after.chunks(BLOCK)).enumerate();
    let differing = blocks.filter(|(_, (before, after))| before != after);
    let writes = differing.map(|(block, (_, after))| write_data((block * BLOCK / 512) as u64, after));
    writes.chain([flush()]).collect()
}

/// The journal has a block, and a later transaction revokes it because a file has the block now. ext4-view 1.0 would read
/// the journal's copy.
#[test]
fn the_replay_is_that_of_e2fsck_also_for_revoked_blocks() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (base, replayed) = (at("base"), at("replayed"));
    fs::File::create(&base).unwrap().set_len(32 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-J", "size=4", path(&base)]);
    for (name, byte) in [("one", b'1'), ("two", b'2'), ("three", b'3')] {
        fs::write(at(name), vec![byte; 2 * BLOCK]).unwrap();
    }
    // The content of a block that begins like one of the journal's own is escaped.
    let escaped = [&[0xc0, 0x3b, 0x39, 0x98][..], &vec![b'e'; BLOCK - 4]].concat();
    fs::write(at("escaped"), escaped).unwrap();
    let write = |blocks: &str, name: &str| format!("journal_write -b {blocks} {}\n", path(&at(name)));
    let commands = [
        "journal_open -c -v 3\n".to_owned(),
        write("4000,4001", "one"),
        write("4002", "escaped"),
        "journal_write -r 4000\n".to_owned(),
        write("4003,4001", "two"),
        "journal_write -r 4003\n".to_owned(),
        write("4003,4004", "three"),
        "journal_close\n".to_owned(),
    ];
    fs::write(at("commands"), commands.concat()).unwrap();
    run("debugfs", &["-w", "-f", path(&at("commands")), path(&base)]);
    fs::copy(&base, &replayed).unwrap();
    let checked = std::process::Command::new(tools::require("e2fsck").unwrap())
        .args(["-p", "-E", "journal_only", path(&replayed)])
        .status();
    assert_eq!(checked.unwrap().code(), Some(0));
    let expected = fs::read(&replayed).unwrap();

    let (base, sample) = (opened(&base), Sample::new(&[flush()]));
    let disk = StateDisk::new(&base, &sample.log(), &CrashState { point: 0, missing: Vec::new() });
    let mut recovered = disk.recovered().unwrap();
    let block_of = |number: usize, disk: &mut dyn ext4_view::Ext4Read| {
        let mut block = vec![0; BLOCK];
        disk.read((number * BLOCK) as u64, &mut block).unwrap();
        block
    };
    for number in 4000..4010 {
        let (ours, theirs) =
            (block_of(number, &mut recovered), &expected[number * BLOCK..(number + 1) * BLOCK]);
        assert!(ours == theirs, "block {number}: {:?} and {:?}", &ours[..4], &theirs[..4]);
    }
    assert_eq!([4000, 4001, 4003].map(|number| block_of(number, &mut recovered)[0]), [0, b'2', b'3']);
    disk.load().unwrap();
}

/// A kernel that mounts a new file system asks for a replay before it writes the features of the journal.
#[test]
fn the_journal_of_a_file_system_that_was_never_mounted_is_empty() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base");
    fs::File::create(&base).unwrap().set_len(32 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-J", "size=4", path(&base)]);
    run("debugfs", &["-w", "-R", "feature needs_recovery", path(&base)]);
    let (base, sample) = (Arc::new(BaseDisk::open(&base, 0..32 << 20).unwrap()), Sample::new(&[flush()]));
    let disk = StateDisk::new(&base, &sample.log(), &CrashState { point: 0, missing: Vec::new() });
    assert!(disk.load().unwrap().exists("/lost+found").unwrap());
}

#[test]
fn files_are_read_through_the_journal() {
    let case = Case::new();
    let tree = case.disk(Vec::new()).load().unwrap();
    assert_eq!(tree.read_to_string(NEW).unwrap(), "new".repeat(2000));
    assert_eq!(tree.read_to_string(OLD).unwrap(), "old");
    let commit = case.entry("the journal: the commit of transaction 1 (the directory /var/lib/iot-agent)");
    let tree = case.disk(vec![commit]).load().unwrap();
    assert!(!tree.exists(NEW).unwrap() && tree.exists(OLD).unwrap());
    let content = case.entry("the content of /var/lib/iot-agent/state");
    let tree = case.disk(vec![content]).load().unwrap();
    assert_ne!(tree.read_to_string(NEW).unwrap(), "new".repeat(2000));
    // Nothing of the log.
    let tree =
        StateDisk::new(&case.base, &case.log, &CrashState { point: 0, missing: Vec::new() }).load().unwrap();
    assert!(!tree.exists(NEW).unwrap() && tree.exists(OLD).unwrap());
}

#[test]
fn missing_writes_have_the_names_of_their_files() {
    let case = Case::new();
    let count = case.log.entries().len();
    let all = case.described(&case.state((0..count - 1).collect()));
    for end in [
        "(8 sectors): the superblock",
        ": the group descriptors",
        ": the block bitmap of group 0",
        ": the inode bitmap of group 0",
        ": the content of /var/lib/iot-agent/state",
        ": the superblock of the journal",
        ": the journal: the descriptor of transaction 1 (the directory /var/lib/iot-agent)",
        ": the journal: the directory /var/lib/iot-agent",
    ] {
        assert!(all.iter().any(|one| one.ends_with(end)), "{end}: {all:#?}");
    }
    assert!(all.iter().any(|one| one.contains("the inode") && one.contains(NEW)), "{all:#?}");
    let entry = case.entry("the content of /var/lib/iot-agent/state");
    let state = CrashState { point: count, missing: vec![MissingWrite::run(entry, 3..4)] };
    let sentence = format!("write {entry} (1 sector): the content of /var/lib/iot-agent/state");
    assert_eq!(case.described(&state), [sentence]);
    drop(case.sample);
}

#[test]
fn the_root_file_system_is_read_in_its_partition() {
    let case = Case::new();
    let directory = case.directory.path();
    let (before, after) =
        (fs::read(directory.join("base")).unwrap(), fs::read(directory.join("new")).unwrap());
    let disk = directory.join("disk");
    fs::write(&disk, [&vec![0; 2 << 20], &before, &vec![0; 6 << 20]].map(Vec::as_slice).concat()).unwrap();
    let base = Arc::new(BaseDisk::open(&disk, 2 << 20..34 << 20).unwrap());
    let moved = |mut operation: Operation| {
        let moved = |sector: u64| sector + (2 << 20) / 512;
        operation.sectors = moved(operation.sectors.start)..moved(operation.sectors.end);
        operation
    };
    let mut operations: Vec<_> = differences(&before, &after).into_iter().map(moved).collect();
    operations.push(crate::samples::write(2048, 1));
    let sample = Sample::new(&operations);
    let state =
        CrashState { point: operations.len(), missing: vec![MissingWrite::run(operations.len() - 1, 0..1)] };
    let tree = StateDisk::new(&base, &sample.log(), &state).load().unwrap();
    assert_eq!(tree.read_to_string(NEW).unwrap(), "new".repeat(2000));
    let scratch = directory.join("scratch");
    fs::copy(&disk, &scratch).unwrap();
    let sentences = describe(&base, &sample.log(), &state, &scratch).unwrap();
    assert_eq!(
        sentences,
        [format!("write {} (1 sector): outside the root file system", operations.len() - 1)]
    );
}

#[test]
fn a_log_that_qemu_has_written_leads_to_the_disk_that_qemu_has_written() {
    let directory = tempfile::tempdir().unwrap();
    let [base, disk, log, copy] = ["base", "disk", "log", "copy"].map(|name| directory.path().join(name));
    fs::File::create(&base).unwrap().set_len(8 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", path(&base)]);
    for sector in ["512", "4096"] {
        fs::copy(&base, &disk).unwrap();
        fs::write(&log, "").unwrap();
        let options = format!(
            "driver=blklogwrites,file.driver=file,file.filename={},file.discard=unmap,log.driver=file,log.filename={},\
             log-super-update-interval=1,log-sector-size={sector}",
            path(&disk),
            path(&log)
        );
        let commands = [
            "write -P 1 1M 64k",
            "write -f -P 2 1M 4k",
            "write -z 1056k 8k",
            "discard 0 1M",
            "write -P 3 8k 4k",
        ];
        let commands: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        run(
            "qemu-io",
            &[&["-t", "writeback", "-d", "unmap", "--image-opts", &options][..], &commands].concat(),
        );

        let found = Arc::new(WriteLog::open(&log).unwrap());
        let count = found.entries().len();
        assert_eq!(completed_entries(&log).unwrap(), count as u64);
        // QEMU 7.2 logs a flush after a write with the flag FUA. At the end, it flushes.
        let kinds: Vec<_> = found.entries().iter().map(|entry| entry.kind).collect();
        let (write, flush) = (EntryKind::Write, EntryKind::Flush);
        assert_eq!(kinds, [write, write, flush, write, EntryKind::Discard, write, flush]);
        let state = CrashState { point: count, missing: Vec::new() };
        fs::copy(&base, &copy).unwrap();
        let copied = fs::File::options().write(true).open(&copy).unwrap();
        let base = opened(&base);
        StateDisk::new(&base, &found, &state).write_to(&copied).unwrap();
        assert!(fs::read(&copy).unwrap() == fs::read(&disk).unwrap(), "the disks differ");
    }
}
