//! Each kind is recognised and unpacked, whatever its file is called.

use std::os::unix::fs::PermissionsExt as _;

use super::make::{Built, Tarball, apk, ar, bzip2, deb, gzip, noise, oci, oci_layout, xz, zip, zstd};
use super::{Place, pairs, text};
use crate::{Kind, Request, unpack};

/// Returns a tar archive with what the kinds have in common.
fn tarball() -> Tarball {
    Tarball::new()
        .directory("./")
        .directory("usr/bin/")
        .mode(0o4755)
        .file("usr/bin/app", "program")
        .symlink("usr/bin/alias", "app")
        .link("usr/bin/same", "usr/bin/app")
}

const TREE: &[(&str, &str)] =
    &[("usr/bin/alias", "-> app"), ("usr/bin/app", "program"), ("usr/bin/same", "program")];

#[test]
fn tar_archives_are_unpacked_from_each_compression() {
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip, zstd, xz, bzip2] {
        let place = Place::new();
        let archive = compress(&tarball().done());
        assert_eq!(Kind::of(&place.archive(&archive)).unwrap(), Some(Kind::Tar));
        let unpacked = place.unpack(&archive).unwrap();
        assert_eq!((unpacked.kind, unpacked.root), (Kind::Tar, place.root()));
        assert_eq!(place.tree(), pairs(TREE));
        let mode =
            |name: &str| std::fs::metadata(place.root().join(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode("usr/bin/app"), 0o755 & mode("usr/bin"), "the setuid bit must not be kept");
    }
}

#[test]
fn debian_packages_are_unpacked_from_each_compression() {
    let data = tarball().done();
    for (name, data) in [
        ("data.tar", data.clone()),
        ("data.tar.gz", gzip(&data)),
        ("data.tar.xz", xz(&data)),
        ("data.tar.zst", zstd(&data)),
        // As dpkg, but unlike ar(1): names may end with a slash.
        ("data.tar.xz/", xz(&data)),
    ] {
        let place = Place::new();
        assert_eq!(place.unpack(&deb(name, &data)).unwrap().kind, Kind::Deb, "{name}");
        assert_eq!(place.tree(), pairs(TREE));
    }
    let found = text(Place::new().unpack(&deb("data.tar.lzma", b"x")));
    assert!(found.contains("use xz"), "{found}");
    let place = Place::new();
    let library = place.archive(&ar(&[("a.o", b"object")]));
    assert_eq!(Kind::of(&library).unwrap(), None);
}

#[test]
fn alpine_packages_have_no_files_of_the_package_manager() {
    let place = Place::new();
    assert_eq!(place.unpack(&apk(tarball())).unwrap().kind, Kind::Apk);
    assert_eq!(place.tree(), pairs(TREE));
}

#[test]
fn zip_archives_and_wheels_are_unpacked() {
    let entries: &[(&str, u32, &[u8])] = &[
        ("app/", 0o4_0755, b""),
        ("app/run", 0o10_4755, b"program"),
        ("app/alias", 0o12_0777, b"run"),
        ("app-1.dist-info/WHEEL", 0o10_0644, b"Wheel-Version: 1.0\n"),
    ];
    let place = Place::new();
    assert_eq!(place.unpack(&zip(entries)).unwrap().kind, Kind::Wheel);
    let tree =
        [("app-1.dist-info/WHEEL", "Wheel-Version: 1.0\n"), ("app/alias", "-> run"), ("app/run", "program")];
    assert_eq!(place.tree(), pairs(&tree));
    let mode = std::fs::metadata(place.root().join("app/run")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7700, 0o700);
    let place = Place::new();
    assert_eq!(place.unpack(&zip(&entries[..3])).unwrap().kind, Kind::Zip);
    assert_eq!(place.tree(), pairs(&tree[1..]));
    assert_eq!(Place::new().unpack(&zip(&[])).unwrap().kind, Kind::Zip);
}

#[test]
fn images_are_recognised_in_archives_and_in_directories() {
    let image = Built::plain(&[tarball().done()]);
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip, zstd] {
        for (bytes, kind) in [(image.docker(), Kind::DockerArchive), (oci(&[&image]), Kind::OciArchive)] {
            let place = Place::new();
            assert_eq!(place.unpack(&compress(&bytes)).unwrap().kind, kind);
            assert_eq!(place.tree(), pairs(TREE));
        }
    }
    let place = Place::new();
    let layout = place.path().join("layout");
    oci_layout(&layout, &[&image]);
    let unpacked = unpack(&layout, &place.root(), &Request::default(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(unpacked.kind, Kind::OciLayout);
    assert_eq!(place.tree(), pairs(TREE));
}

/// Bazel, Nix and others give the layers names of their own.
#[test]
fn an_image_is_recognised_by_other_names_of_layers() {
    let (image, layer) = (Built::plain(&[tarball().done()]), tarball().done());
    let manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": null, "Layers": ["layers/app.tar"] }]);
    let archive = Tarball::new()
        .directory("layers/")
        .bytes_file("layers/app.tar", &layer)
        .file("layers/VERSION", "1.0")
        .file("layers/json", "{}")
        .file("config.json", &image.config())
        .file("manifest.json", &manifest.to_string())
        .done();
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip] {
        let place = Place::new();
        assert_eq!(place.unpack(&compress(&archive)).unwrap().kind, Kind::DockerArchive);
        assert_eq!(place.tree(), pairs(TREE));
    }
}

#[test]
fn an_empty_tar_archive_is_recognised() {
    for length in [1024, 10240] {
        for bytes in [vec![0; length], gzip(&vec![0; length])] {
            let place = Place::new();
            assert_eq!(place.unpack(&bytes).unwrap().kind, Kind::Tar);
            assert_eq!(place.tree(), []);
        }
    }
}

#[test]
fn a_file_that_is_called_like_a_manifest_makes_no_image() {
    for compress in [|bytes: &[u8]| bytes.to_vec(), gzip] {
        let place = Place::new();
        let extension =
            Tarball::new().file("manifest.json", r#"{"manifest_version": 3}"#).file("app.js", "1").done();
        assert_eq!(place.unpack(&compress(&extension)).unwrap().kind, Kind::Tar);
        assert_eq!(place.tree().len(), 2);
    }
}

#[test]
fn other_files_are_no_archives() {
    let place = Place::new();
    let others: [&[u8]; 6] =
        [b"", b"\x7fELF\x02\x01\x01", &[0; 2048], &gzip(b"text"), &xz(&[7; 4096]), &[b'a'; 600]];
    for other in others {
        assert_eq!(Kind::of(&place.archive(other)).unwrap(), None, "{:?}", &other[..other.len().min(8)]);
        let found = text(place.unpack(other));
        assert!(
            found.contains("shipped: it is no archive of a known kind; name a container image"),
            "{found}"
        );
    }
    assert_eq!(Kind::of(place.path()).unwrap(), None);
    let found = text(Kind::of(&place.path().join("missing")));
    assert!(found.contains("missing"), "{found}");
    let squashfs = [b"hsqs".as_slice(), &[0; 1000]].concat();
    assert_eq!(Kind::of(&place.archive(&squashfs)).unwrap(), Some(Kind::Squashfs));
    let found = text(Place::new().unpack(&squashfs));
    assert!(found.contains("squashfs file system; unpack it with: unsquashfs"), "{found}");
}

#[test]
fn long_names_and_the_first_format_of_tar_are_read() {
    let place = Place::new();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let mut first = tar::Header::new_old();
    first.set_path("old/").unwrap();
    first.set_size(0);
    first.set_mode(0o755);
    first.set_cksum();
    let mut bytes = first.as_bytes().to_vec();
    bytes.extend(Tarball::new().long(&long, "content").done());
    place.unpack(&bytes).unwrap();
    assert!(place.root().join("old").is_dir());
    assert_eq!(place.tree(), pairs(&[(&long, "content")]));
}

#[test]
fn the_progress_is_shown_and_can_end_the_unpacking() {
    let place = Place::new();
    let content = noise(6 << 20);
    let archive = place.archive(&gzip(&Tarball::new().bytes_file("big", &content).done()));
    let total = std::fs::metadata(&archive).unwrap().len();
    let mut seen = Vec::new();
    unpack(&archive, &place.root(), &Request::default(), &mut |read, of| {
        seen.push((read, of));
        Ok(())
    })
    .unwrap();
    assert!(
        seen.len() >= 2 && seen.is_sorted() && seen.iter().all(|(read, of)| read <= of && *of == total),
        "{seen:?}"
    );
    let ended = unpack(&archive, &place.path().join("other"), &Request::default(), &mut |_, _| {
        Err(xtask_core::error::Failure::interrupted().into())
    });
    assert_eq!(text(ended), "interrupted; no remedy");
}

/// An image is told from another archive by all of its names, so an archive is not read twice for that.
#[test]
fn a_known_kind_is_not_looked_for_again() {
    let image = super::make::Built::plain(&[Tarball::new().file("app", "").done()]).docker();
    let place = Place::new();
    let request = Request { kind: Some(Kind::Tar), ..Request::default() };
    assert_eq!(place.unpack_with(&image, &request).unwrap().kind, Kind::Tar);
    assert!(place.root().join("manifest.json").is_file());
}
