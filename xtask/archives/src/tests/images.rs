//! Container images: layers, whiteouts, digests, platforms.

use std::path::Path;

use xtask_core::arch::VmArchitecture;

use super::make::{Built, Tarball, docker, gzip, oci, oci_layout, sha256, zstd};
use super::{Place, pairs, text};
use crate::{ImageConfig, Request, Unpacked, unpack};

fn base() -> Tarball {
    Tarball::new()
        .symlink("bin", "usr/bin")
        .file("usr/bin/app", "old")
        .file("usr/bin/tool", "tool")
        .file("etc/a", "a")
        .file("etc/sub/b", "b")
        .file("srv/data/c", "c")
        .file("srv/data/d", "d")
}

fn layers() -> [Vec<u8>; 3] {
    let second = Tarball::new()
        .file("bin/app", "new")
        .file("etc/.wh.sub", "")
        // What this layer adds stays, before and after the whiteout.
        .file("srv/data/before", "1")
        .file("srv/data/.wh..wh..opq", "")
        .file("srv/data/after", "2")
        .file(".wh..wh.plnk", "AUFS")
        .file(".wh.missing", "");
    let third = Tarball::new()
        .file("usr/bin/.wh.tool", "")
        .file("usr/bin/tool2", "tool2")
        .symlink("etc/a", "/srv/data");
    [base().done(), second.done(), third.done()]
}

const TREE: &[(&str, &str)] = &[
    ("bin", "-> usr/bin"),
    ("etc/a", "-> /srv/data"),
    ("srv/data/after", "2"),
    ("srv/data/before", "1"),
    ("usr/bin/app", "new"),
    ("usr/bin/tool2", "tool2"),
];

fn check(place: &Place, unpacked: &Unpacked) {
    assert_eq!(place.tree(), pairs(TREE));
    let image = unpacked.image.as_ref().unwrap();
    let strings = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    let config = ImageConfig {
        architecture: "arm64".to_owned(),
        os: "linux".to_owned(),
        entrypoint: strings(&["/usr/bin/app"]),
        cmd: strings(&["--serve"]),
        env: strings(&["PATH=/usr/bin:/bin"]),
        working_directory: "/srv".to_owned(),
        ..ImageConfig::default()
    };
    assert_eq!(image.config, config);
    assert_eq!(image.config.command().collect::<Vec<_>>(), ["/usr/bin/app", "--serve"]);
    let files =
        |at: usize| image.layers[at].files.iter().map(|file| file.to_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(files(1), ["usr/bin/app", "srv/data/before", "srv/data/after"]);
    assert_eq!(files(2), ["usr/bin/tool2", "etc/a"]);
    let layers = unpacked.layers_by_file();
    let made = |file: &str| layers.get(Path::new(file)).map(|layer| layer.created_by.as_str());
    assert_eq!([made("bin"), made("usr/bin/app"), made("etc/a")], ["step 0", "step 1", "step 2"].map(Some));
    assert_eq!(made("usr/bin/nothing"), None);
}

#[test]
fn the_last_layer_sees_the_layers_in_order() {
    let layers = layers();
    for image in [Built::plain(&layers), Built::compressed(&layers, gzip), Built::compressed(&layers, zstd)] {
        for archive in [image.docker(), oci(&[&image])] {
            let place = Place::new();
            check(&place, &place.unpack(&archive).unwrap());
        }
        let place = Place::new();
        oci_layout(&place.path().join("layout"), &[&image]);
        let unpacked =
            unpack(&place.path().join("layout"), &place.root(), &Request::default(), &mut |_, _| Ok(()));
        check(&place, &unpacked.unwrap());
    }
}

#[test]
fn whiteouts_of_directories_keep_what_their_own_layer_made() {
    let second = Tarball::new()
        .file("etc/sub/new", "new")
        .file("etc/.wh.sub", "")
        .file("bin/.wh.app", "")
        .file(".wh.srv", "")
        .directory("srv");
    let place = Place::new();
    place.unpack(&Built::plain(&[base().done(), second.done()]).docker()).unwrap();
    let tree = [("bin", "-> usr/bin"), ("etc/a", "a"), ("etc/sub/new", "new"), ("usr/bin/tool", "tool")];
    assert_eq!(place.tree(), pairs(&tree));
    assert!(place.root().join("srv").is_dir() && !place.root().join("srv/data").exists());
    let place = Place::new();
    let all = Tarball::new().file("kept", "kept").file(".wh..wh..opq", "");
    place.unpack(&Built::plain(&[base().done(), all.done()]).docker()).unwrap();
    assert_eq!(place.tree(), pairs(&[("kept", "kept")]));
}

#[test]
fn a_directory_replaces_a_link_and_a_file_replaces_a_directory() {
    let second =
        Tarball::new().directory("bin").file("bin/own", "own").file("etc", "file").file("srv/data/c/x", "x");
    let place = Place::new();
    let found = text(place.unpack(&Built::plain(&[base().done(), second.done()]).docker()));
    assert!(found.contains("\"srv/data/c/x\"") && found.contains("srv/data/c is not a directory"), "{found}");
    let second =
        Tarball::new().directory("bin").file("bin/own", "own").file("etc", "file").file("usr/bin/x", "x");
    let place = Place::new();
    place.unpack(&Built::plain(&[base().done(), second.done()]).docker()).unwrap();
    let tree = [
        ("bin/own", "own"),
        ("etc", "file"),
        ("srv/data/c", "c"),
        ("srv/data/d", "d"),
        ("usr/bin/app", "old"),
        ("usr/bin/tool", "tool"),
        ("usr/bin/x", "x"),
    ];
    assert_eq!(place.tree(), pairs(&tree));
}

#[test]
fn a_whiteout_removes_nothing_outside() {
    for name in [".wh...", "a/.wh...", "a/.wh..", ".wh.", "../.wh.outside", "link/.wh.outside"] {
        let place = Place::new();
        std::fs::write(place.path().join("outside"), "kept").unwrap();
        let layer = Tarball::new().file("a/b", "b").symlink("link", "..").done();
        let second = Tarball::new().file(name, "").done();
        let result = place.unpack(&Built::plain(&[layer, second]).docker());
        assert_eq!(std::fs::read_to_string(place.path().join("outside")).unwrap(), "kept", "{name}");
        if name != "link/.wh.outside" {
            let found = text(result);
            assert!(found.contains(&format!("refuse the entry {name:?}")), "{found}");
        }
        assert_eq!(std::fs::read_to_string(place.root().join("a/b")).unwrap(), "b", "{name}");
    }
}

/// A plain archive may contain such names.
#[test]
fn whiteouts_are_files_outside_of_images() {
    let place = Place::new();
    place.unpack(&Tarball::new().file("a", "a").file(".wh.a", "b").done()).unwrap();
    assert_eq!(place.tree(), pairs(&[(".wh.a", "b"), ("a", "a")]));
}

#[test]
fn each_digest_is_verified() {
    let layers = layers();
    let image = Built::compressed(&layers, gzip);
    // The other layer is sound, but not that of the manifest.
    let other = Built {
        blobs: vec![
            gzip(&base().file("planted", "x").done()),
            image.blobs[1].clone(),
            image.blobs[2].clone(),
        ],
        ..Built::plain(&layers)
    };
    let found = text(Place::new().unpack(&other.docker()));
    assert!(found.contains("has the digest sha256:") && found.contains("compare its digest"), "{found}");
    let place = Place::new();
    let layout = place.path().join("layout");
    oci_layout(&layout, &[&image]);
    let blobs = layout.join("blobs/sha256");
    let mut changed = 0;
    for blob in std::fs::read_dir(&blobs).unwrap().map(|entry| entry.unwrap().path()) {
        let sound = std::fs::read(&blob).unwrap();
        // A space at the end of a document, or another level of compression, changes no content.
        let mut bytes = sound.clone();
        let at = if sound.starts_with(&[0x1f, 0x8b]) { 8 } else { sound.len() - 1 };
        bytes[at] = bytes[at].wrapping_add(1);
        std::fs::write(&blob, &bytes).unwrap();
        let root = place.path().join(format!("root{changed}"));
        let found = text(unpack(&layout, &root, &Request::default(), &mut |_, _| Ok(())));
        let name = blob.file_name().unwrap().to_str().unwrap();
        let names = format!("the content of blobs/sha256/{name} has the digest {}", sha256(&bytes));
        assert!(found.contains(&names), "{found}");
        std::fs::write(&blob, [sound.as_slice(), b" "].concat()).unwrap();
        let root = place.path().join(format!("longer{changed}"));
        text(unpack(&layout, &root, &Request::default(), &mut |_, _| Ok(())));
        std::fs::remove_file(&blob).unwrap();
        let root = place.path().join(format!("missing{changed}"));
        let found = text(unpack(&layout, &root, &Request::default(), &mut |_, _| Ok(())));
        assert!(found.contains(&format!("it does not contain blobs/sha256/{name}")), "{found}");
        std::fs::write(&blob, &sound).unwrap();
        changed += 1;
    }
    assert_eq!(changed, 3 + 3, "three layers, the configuration, the manifest and the inner index");
}

#[test]
fn a_document_that_is_too_large_is_an_error() {
    let place = Place::new();
    let layout = place.path().join("layout");
    oci_layout(&layout, &[&Built::plain(&[base().done()])]);
    std::fs::write(layout.join("index.json"), vec![b' '; 17 << 20]).unwrap();
    let found = text(unpack(&layout, &place.root(), &Request::default(), &mut |_, _| Ok(())));
    assert!(
        found.contains("index.json in") && found.contains("it has 17 MiB, and a document may have 16 MiB"),
        "{found}"
    );
}

#[test]
fn the_image_of_the_architecture_is_chosen() {
    let arm = Built::plain(&[Tarball::new().file("arm", "").done()]);
    let amd = Built { architecture: "amd64", ..Built::plain(&[Tarball::new().file("amd", "").done()]) };
    let riscv = Built { architecture: "riscv64", ..Built::plain(&[Tarball::new().file("riscv", "").done()]) };
    let for_arch = |arch| Request { arch: Some(arch), ..Request::default() };
    for archive in [docker(&[&amd, &arm]), oci(&[&amd, &arm])] {
        for (arch, name) in [(VmArchitecture::Aarch64, "arm"), (VmArchitecture::X86_64, "amd")] {
            let place = Place::new();
            place.unpack_with(&archive, &for_arch(arch)).unwrap();
            assert_eq!(place.tree(), pairs(&[(name, "")]));
        }
        let unpacked = Place::new().unpack(&archive);
        assert_eq!(xtask_core::error::code(unpacked.as_ref().unwrap_err()), 2);
        let found = text(unpacked);
        assert!(
            found.contains("it contains images for linux/amd64, linux/arm64; name the architecture"),
            "{found}"
        );
    }
    for archive in [docker(&[&amd, &riscv]), oci(&[&amd, &riscv])] {
        let found = text(Place::new().unpack_with(&archive, &for_arch(VmArchitecture::Aarch64)));
        assert!(found.contains("images for linux/amd64, linux/riscv64, and none for linux/arm64"), "{found}");
    }
    // A single image is judged whatever it is for.
    for archive in [amd.docker(), oci(&[&amd])] {
        let unpacked = Place::new().unpack_with(&archive, &for_arch(VmArchitecture::Aarch64)).unwrap();
        let config = unpacked.image.unwrap().config;
        assert_eq!((config.architecture.as_str(), config.arch()), ("amd64", Some(VmArchitecture::X86_64)));
    }
    assert_eq!(Place::new().unpack(&riscv.docker()).unwrap().image.unwrap().config.arch(), None);
    let second = Built::plain(&[Tarball::new().file("second", "").done()]);
    let found = text(Place::new().unpack_with(&docker(&[&arm, &second]), &for_arch(VmArchitecture::Aarch64)));
    assert!(found.contains("2 images: \"example/app:0\", \"example/app:1\"; save one image"), "{found}");
}

/// An index for Arm often has several variants. A device of which nothing else is known runs the lowest one.
#[test]
fn the_lowest_variant_of_an_architecture_is_chosen() {
    let with = |variant, name| Built { variant, ..Built::plain(&[Tarball::new().file(name, "").done()]) };
    let (none, eight, nine) = (with(None, "none"), with(Some("v8"), "eight"), with(Some("v9"), "nine"));
    let request = Request { arch: Some(VmArchitecture::Aarch64), ..Request::default() };
    for (images, chosen) in
        [(vec![&nine, &eight], "eight"), (vec![&eight, &none, &nine], "none"), (vec![&nine], "nine")]
    {
        let place = Place::new();
        place.unpack_with(&oci(&images), &request).unwrap();
        assert_eq!(place.tree(), pairs(&[(chosen, "")]));
    }
    let other = Built { layers: none.layers.clone(), ..with(Some("v8"), "other") };
    let found = text(Place::new().unpack_with(&oci(&[&eight, &other]), &request));
    assert!(found.contains("2 images"), "{found}");
    // These images have different names.
    let found = text(Place::new().unpack_with(&docker(&[&nine, &eight]), &request));
    assert!(found.contains("2 images"), "{found}");
}

#[test]
fn the_name_of_the_image_is_known() {
    let image = Built::plain(&[base().done()]);
    let name = |bytes: &[u8]| Place::new().unpack(bytes).unwrap().image.unwrap().name;
    assert_eq!(
        (name(&image.docker()), name(&oci(&[&image]))),
        ("example/app:0".to_owned(), "example/app:1".to_owned())
    );
}

/// The digest shows that nothing is missing.
#[test]
fn a_layer_needs_no_end() {
    let place = Place::new();
    place.unpack(&Built::plain(&[Tarball::new().file("a", "a").without_end()]).docker()).unwrap();
    assert_eq!(place.tree(), pairs(&[("a", "a")]));
}

/// A layout also has documents about its images, and manifests of platforms whose content was not saved.
#[test]
fn other_manifests_of_a_layout_are_left_out() {
    for (kind, config) in [
        ("application/vnd.oci.empty.v1+json", Some("{}")),
        ("application/vnd.oci.image.config.v1+json", None),
    ] {
        let place = Place::new();
        let layout = place.path().join("layout");
        oci_layout(&layout, &[&Built::plain(&[Tarball::new().file("app", "").done()])]);
        let add = |bytes: &[u8]| {
            std::fs::write(layout.join("blobs/sha256").join(&sha256(bytes)["sha256:".len()..]), bytes)
                .unwrap();
        };
        config.iter().for_each(|config| add(config.as_bytes()));
        let digest = sha256(config.unwrap_or("absent").as_bytes());
        let config = serde_json::json!({ "mediaType": kind, "digest": digest, "size": 2 });
        let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": [] }).to_string();
        add(manifest.as_bytes());
        let index = std::fs::read(layout.join("index.json")).unwrap();
        let mut index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let manifests = index["manifests"].as_array_mut().unwrap();
        manifests.push(serde_json::json!({ "digest": sha256(manifest.as_bytes()), "size": manifest.len() }));
        std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
        unpack(&layout, &place.root(), &Request::default(), &mut |_, _| Ok(())).unwrap();
        assert_eq!(place.tree(), pairs(&[("app", "")]), "{kind}");
    }
}
