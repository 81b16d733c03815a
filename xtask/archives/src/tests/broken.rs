//! Damaged and incomplete archives are errors that say where, whatever was cut off or changed.

use super::make::{Built, Tarball, apk, bzip2, deb, gzip, noise, oci, xz, zip, zstd};
use super::{Place, text};

fn tarball() -> Tarball {
    Tarball::new().file("etc/first", "first").bytes_file("usr/noise", &noise(9000)).file("zzz", "last")
}

/// Returns an archive of each kind, in each compression.
fn all() -> Vec<(&'static str, Vec<u8>)> {
    let tar = tarball().done();
    let image = Built::plain(&[tar.clone(), Tarball::new().file("second", "layer").done()]);
    let compressed = Built::compressed(&image.layers, gzip);
    vec![
        ("tar", tar.clone()),
        ("tar.gz", gzip(&tar)),
        ("tar.zst", zstd(&tar)),
        ("tar.xz", xz(&tar)),
        ("tar.bz2", bzip2(&tar)),
        ("deb, plain", deb("data.tar", &tar)),
        ("deb, xz", deb("data.tar.xz", &xz(&tar))),
        ("deb, zstd", deb("data.tar.zst", &zstd(&tar))),
        ("apk", apk(tarball())),
        ("zip", zip(&[("a", 0o10_0644, &noise(9000)), ("b", 0o10_0644, b"b")])),
        ("docker", image.docker()),
        ("docker, gzip", gzip(&image.docker())),
        ("oci", oci(&[&image])),
        ("oci, gzip in gzip", gzip(&oci(&[&compressed]))),
    ]
}

#[test]
fn an_incomplete_archive_is_an_error_that_names_it() {
    for (kind, bytes) in all() {
        assert!(Place::new().unpack(&bytes).is_ok(), "{kind}");
        for sixteenth in 0..16 {
            // The last byte may only fill a block.
            let cut = bytes.len() * sixteenth / 16;
            let found = text(Place::new().unpack(&bytes[..cut]));
            assert!(
                found.contains("shipped") && !found.ends_with("no remedy"),
                "{kind}, {cut} bytes: {found}"
            );
        }
    }
}

/// A changed byte may be in a name or in padding, so it need not be an error. It must not be a panic, and where the format
/// has check sums, the content must not differ.
#[test]
fn a_changed_byte_makes_no_wrong_content() {
    for (kind, bytes) in all() {
        let has_sums = kind.contains("docker") || kind.contains("oci") || kind == "zip" || kind == "tar.gz";
        let place = Place::new();
        place.unpack(&bytes).unwrap();
        let file = if kind == "zip" { "a" } else { "usr/noise" };
        let sound = std::fs::read(place.root().join(file)).unwrap();
        let mut refused = 0;
        for at in (0..bytes.len()).step_by(bytes.len() / 61) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            let place = Place::new();
            match place.unpack(&changed) {
                Err(error) => {
                    assert!(format!("{error:#}").contains("shipped"), "{kind}, byte {at}: {error:#}");
                    refused += 1;
                }
                Ok(_) if has_sums => {
                    let found = std::fs::read(place.root().join(file));
                    assert!(found.is_ok_and(|found| found == sound), "{kind}, byte {at}");
                }
                Ok(_) => {}
            }
        }
        assert!(!has_sums || refused > 30, "{kind}: only {refused} of 61 changes were refused");
    }
}

#[test]
fn the_error_says_where_the_archive_is_damaged() {
    let tar = tarball().done();
    let found = text(Place::new().unpack(&tar[..4096]));
    assert!(
        found.contains("it is damaged or incomplete at \"usr/noise\", after 4096 bytes of 4096"),
        "{found}"
    );
    assert!(found.ends_with("; download or make the archive again, and compare its digest"), "{found}");
    // The check sum of the last header.
    let mut damaged = tar.clone();
    let at = damaged.windows(3).position(|window| window == b"zzz").unwrap();
    damaged[at] = b'y';
    let found = text(Place::new().unpack(&damaged));
    assert!(found.contains("at \"usr/noise\"") && found.contains("checksum"), "{found}");
    // Without its two blocks of zeros, an archive may have lost files.
    let found = text(Place::new().unpack(&tarball().without_end()));
    assert!(
        found.contains("at \"zzz\"") && found.contains("the end of the tar archive is missing"),
        "{found}"
    );
    let found = text(Place::new().unpack(&tar[..tar.len() - 512]));
    assert!(found.contains("the end of the tar archive is missing"), "{found}");
    let package = deb("data.tar", &tar);
    let found = text(Place::new().unpack(&package[..package.len() - 1]));
    assert!(found.contains("the member at byte ") && found.contains("is incomplete"), "{found}");
    let found = text(Place::new().unpack(&deb("data.other", b"x")));
    assert!(found.contains("the member data.tar is missing"), "{found}");
    // The list of files at the end promises more content than there is. The field follows 24 bytes (APPNOTE.TXT, 4.3.12).
    let mut short = zip(&[("a", 0o10_0644, b"content")]);
    let at = short.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    short[at + 24] += 1;
    let found = text(Place::new().unpack(&short));
    assert!(found.contains("it is damaged or incomplete at \"a\""), "{found}");
}
