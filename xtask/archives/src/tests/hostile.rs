//! Each safety rule has an entry that would break it.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use tar::{EntryType, Header};

use super::make::{Built, Tarball, deb, gzip, xz, zip, zstd};
use super::{Place, pairs, text};
use crate::{LeftOut, Limits, resolve};

/// Unpacks an archive that must be refused. Beside the directory, nothing may be made or changed.
fn refused(archive: &[u8], entry: &str, why: &str) {
    let place = Place::new();
    let outside = place.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "untouched").unwrap();
    let found = text(place.unpack(archive));
    let names = format!("shipped: refuse the entry {entry:?}");
    assert!(found.contains(&names) && found.contains(why), "{found}");
    assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "untouched");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3);
}

#[test]
fn no_name_leads_outside() {
    for name in ["../outside/new", "a/../../outside/new", "a/b/..", "../outside/file"] {
        refused(&Tarball::new().file(name, "x").done(), name, "contains \"..\"");
        refused(&Tarball::new().directory(name).done(), name, "contains \"..\"");
        refused(&zip(&[(name, 0o10_0644, b"x")]), name, "contains \"..\"");
        refused(&deb("data.tar", &Tarball::new().file(name, "x").done()), name, "contains \"..\"");
        refused(&Built::plain(&[Tarball::new().file(name, "x").done()]).docker(), name, "contains \"..\"");
    }
    let absolute = std::env::temp_dir().join("outside-of-the-archive");
    let name = absolute.to_str().unwrap();
    refused(&Tarball::new().file(name, "x").done(), name, "is absolute");
    assert!(!absolute.exists());
}

#[test]
fn no_link_leads_outside() {
    let through = "link/new";
    for target in ["../outside", "/tmp", "a/../../outside"] {
        let archive = Tarball::new().directory("a").symlink("link", target);
        refused(&archive.file(through, "x").done(), through, "it leads outside of the directory");
    }
    let chain = Tarball::new().symlink("first", "..").symlink("link", "first/outside");
    refused(&chain.file(through, "x").done(), through, "it leads outside of the directory");
    // The link replaces a directory into which an earlier entry was written.
    let replaced = Tarball::new().file("link/first", "x").symlink("link", "../outside").file(through, "x");
    refused(&replaced.done(), through, "it leads outside of the directory");
    let entries: &[(&str, u32, &[u8])] = &[("link", 0o12_0777, b"../outside"), (through, 0o10_0644, b"x")];
    refused(&zip(entries), through, "it leads outside of the directory");
    let circle = Tarball::new().symlink("link", "other").symlink("other", "link");
    refused(&circle.file(through, "x").done(), through, "more than 40 links");
    // A file replaces a link, and is never written through it.
    let place = Place::new();
    std::fs::write(place.path().join("outside"), "untouched").unwrap();
    place.unpack(&Tarball::new().symlink("link", "../outside").file("link", "new").done()).unwrap();
    assert_eq!(place.tree(), pairs(&[("link", "new")]));
    assert_eq!(std::fs::read_to_string(place.path().join("outside")).unwrap(), "untouched");
}

/// In the root directory of a system, an absolute link leads to the same system, as in a chroot.
#[test]
fn the_links_of_a_system_lead_to_the_system() {
    let data = Tarball::new()
        .symlink("lib", "usr/lib")
        .symlink("data", "/srv/data")
        .symlink("up", "../../../etc")
        .file("lib/a.so", "a")
        .file("data/b", "b")
        .file("up/c", "c")
        .file("/absolute", "d");
    let place = Place::new();
    place.unpack(&deb("data.tar", &data.done())).unwrap();
    let tree = [
        ("absolute", "d"),
        ("data", "-> /srv/data"),
        ("etc/c", "c"),
        ("lib", "-> usr/lib"),
        ("srv/data/b", "b"),
        ("up", "-> ../../../etc"),
        ("usr/lib/a.so", "a"),
    ];
    assert_eq!(place.tree(), pairs(&tree));
    let resolved = |path: &str| resolve(&place.root(), Path::new(path)).unwrap();
    assert_eq!(resolved("/up/c").as_deref(), Some(Path::new("etc/c")));
    assert_eq!(resolved("data/b").as_deref(), Some(Path::new("srv/data/b")));
    assert_eq!(resolved("data/../../../lib/a.so").as_deref(), Some(Path::new("usr/lib/a.so")));
    assert_eq!(resolved("lib/missing"), None);
    assert!(text(resolve(&place.root(), Path::new("absolute/x"))).contains("is not a directory"));
}

#[test]
fn hard_links_lead_only_to_earlier_files() {
    let place = Place::new();
    let outside = place.path().join("outside");
    std::fs::write(&outside, "secret").unwrap();
    let targets = [
        ("../outside", "contains \"..\""),
        (outside.to_str().unwrap(), "is absolute"),
        ("link/outside", "it leads outside"),
        ("missing", "a hard link to \"missing\", which is no earlier file"),
        ("directory", "a hard link to \"directory\", which is no earlier file"),
        (".", "a hard link to the root directory"),
    ];
    for (target, why) in targets {
        let place = Place::new();
        let archive = Tarball::new().directory("directory").symlink("link", "..").link("new", target);
        let found = text(place.unpack(&archive.done()));
        assert!(
            found.contains("shipped: refuse the entry \"new\"") && found.contains(why),
            "{target}: {found}"
        );
        assert!(!place.root().join("new").exists());
    }
    // Writing to one name does not change the other one.
    let place = Place::new();
    place.unpack(&Tarball::new().file("a", "old").link("b", "a").file("a", "new").done()).unwrap();
    assert_eq!(place.tree(), pairs(&[("a", "new"), ("b", "old")]));
    let found = text(Place::new().unpack(&Tarball::new().file("a", "x").link("a", "a").done()));
    assert!(found.contains("a hard link to \"a\", which is no earlier file"), "{found}");
    // A link to a link is no copy of the file outside.
    let place = Place::new();
    place.unpack(&Tarball::new().symlink("link", "/etc/hostname").link("b", "link").done()).unwrap();
    assert_eq!(place.tree(), pairs(&[("b", "-> /etc/hostname"), ("link", "-> /etc/hostname")]));
}

#[test]
fn no_device_fifo_or_setuid_bit_is_made() {
    let place = Place::new();
    let archive = Tarball::new()
        .file("dev/zero", "replaced")
        .mode(0o666)
        .entry(EntryType::Char, "dev/zero", "", b"")
        .mode(0o660)
        .entry(EntryType::Block, "dev/sda", "", b"")
        .mode(0o666)
        .entry(EntryType::Fifo, "run/fifo", "", b"")
        .link("run/same", "run/fifo")
        .mode(0o6755)
        .file("bin/su", "su")
        .mode(0o7000)
        .directory("tmp");
    let unpacked = place.unpack(&archive.done()).unwrap();
    let left_out = |path: &str, what| LeftOut { path: path.into(), what };
    let wanted = [
        left_out("dev/zero", "device"),
        left_out("dev/sda", "device"),
        left_out("run/fifo", "FIFO"),
        left_out("run/same", "link to a device or FIFO"),
    ];
    assert_eq!(unpacked.left_out, wanted);
    assert_eq!(place.tree(), pairs(&[("bin/su", "su")]));
    for path in ["bin/su", "tmp", "dev"] {
        let found = std::fs::metadata(place.root().join(path)).unwrap();
        assert!(found.mode() & 0o7000 == 0 && !found.file_type().is_char_device(), "{path}");
    }
}

#[test]
fn the_user_can_read_and_delete_everything() {
    let place = Place::new();
    let archive = Tarball::new().mode(0).directory("closed").mode(0).file("closed/file", "x");
    place.unpack(&archive.done()).unwrap();
    let mode = |path: &str| std::fs::metadata(place.root().join(path)).unwrap().permissions().mode();
    assert_eq!((mode("closed") & 0o700, mode("closed/file") & 0o700), (0o700, 0o600));
    assert_eq!(mode("closed/file") & 0o022, 0);
}

#[test]
fn only_an_empty_directory_is_written_to() {
    let place = Place::new();
    std::fs::create_dir(place.root()).unwrap();
    std::fs::write(place.root().join("old"), "old").unwrap();
    let found = text(place.unpack(&Tarball::new().file("new", "new").done()));
    assert!(found.contains("the directory is not empty"), "{found}");
    assert_eq!(place.tree(), pairs(&[("old", "old")]));
}

#[test]
fn the_limits_hold_in_each_kind() {
    let content = vec![b'x'; 3000];
    let tar = Tarball::new().bytes_file("a", &content).bytes_file("b", &content).done();
    let bytes = Limits { bytes: 5000, ..Limits::default() };
    let entries = Limits { entries: 1, ..Limits::default() };
    let archives = [
        tar.clone(),
        gzip(&tar),
        deb("data.tar.xz", &xz(&tar)),
        zip(&[("a", 0o10_0644, &content), ("b", 0o10_0644, &content)]),
        Built::plain(std::slice::from_ref(&tar)).docker(),
        gzip(&Built::compressed(&[tar], zstd).docker()),
    ];
    for (at, archive) in archives.iter().enumerate() {
        let found = text(Place::new().limited(archive, bytes));
        assert!(found.contains("its content exceeds the limit of 5 KiB"), "{at}: {found}");
        let found = text(Place::new().limited(archive, entries));
        assert!(found.contains("is one entry more than the limit of 1; if you trust"), "{at}: {found}");
    }
    // The content of an entry that is no file counts, too.
    let skipped = Tarball::new().entry(EntryType::Fifo, "fifo", "", &content);
    let skipped = skipped.entry(EntryType::Char, "device", "", &content);
    let found = text(Place::new().limited(&skipped.done(), bytes));
    assert!(found.contains("exceeds the limit"), "{found}");
}

#[test]
fn a_bomb_is_refused_by_its_ratio() {
    let zeros = vec![0; 80 << 20];
    let limits = Limits { ratio: 20, ..Limits::default() };
    let tar = Tarball::new().bytes_file("zeros", &zeros).done();
    let archives = [
        zstd(&tar),
        deb("data.tar.zst", &zstd(&tar)),
        Built::compressed(&[tar], zstd).docker(),
        zip(&[("zeros", 0o10_0644, &zeros)]),
    ];
    for archive in archives {
        let found = text(Place::new().limited(&archive, limits));
        assert!(found.contains("decompress to more than 64 MiB, as in a decompression bomb"), "{found}");
    }
}

/// A sparse file has a size of its own, whatever the archive has.
#[test]
fn a_sparse_file_is_limited_by_its_size() {
    let mut header = Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize.copy_from_slice(b"77777777777\0");
    gnu.sparse[0].offset.copy_from_slice(b"77777777777\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    header.set_cksum();
    let bytes = [header.as_bytes().as_slice(), &Tarball::new().done()].concat();
    let found = text(Place::new().limited(&bytes, Limits { bytes: 1 << 20, ..Limits::default() }));
    assert!(found.contains("its content exceeds the limit of 1 MiB"), "{found}");
}

/// The crate `tar` holds long names in memory.
#[test]
fn a_long_name_does_not_fill_the_memory() {
    for kind in [EntryType::GNULongName, EntryType::XHeader] {
        let archive = Tarball::new().file("first", "x");
        let archive = archive.entry(kind, "long", "", &vec![b'n'; 2 << 20]).file("last", "x").done();
        for archive in [archive.clone(), gzip(&archive), Built::plain(&[archive]).docker()] {
            let found = text(Place::new().unpack(&archive));
            assert!(
                found.contains("\"first\", the headers of an entry exceed the limit of 1 MiB"),
                "{found}"
            );
        }
    }
}

#[test]
fn formats_that_are_not_read_are_named() {
    let place = Place::new();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_pax_extensions([("GNU.sparse.major", b"1".as_slice())]).unwrap();
    let mut bytes = builder.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(Tarball::new().file("sparse", "map").done());
    let found = text(place.unpack(&bytes));
    assert!(found.contains("refuse the entry \"sparse\"") && found.contains("without --sparse"), "{found}");
    let unknown = Tarball::new().entry(EntryType::new(b'V'), "volume", "", b"");
    let found = text(Place::new().unpack(&unknown.done()));
    assert!(
        found.contains("refuse the entry \"volume\"") && found.contains("its type 'V' is unknown"),
        "{found}"
    );
}
