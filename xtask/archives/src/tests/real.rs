//! A real podman makes the archives.

use std::path::Path;
use std::process::Command;

use super::{Place, pairs};
use crate::{Kind, Request, unpack};

/// Runs podman with a storage of its own, below `directory`.
fn podman(directory: &Path, arguments: &[&str]) {
    let (root, run) = (directory.join("storage"), directory.join("run"));
    let mut command = Command::new("podman");
    command.arg("--root").arg(root).arg("--runroot").arg(run).args(["--storage-driver", "vfs"]);
    let output = command.args(arguments).current_dir(directory).output().expect("podman is installed");
    assert!(output.status.success(), "podman {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_archives_of_podman_are_unpacked() {
    let made = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| std::fs::write(made.path().join(name), content).unwrap();
    // podman compares sizes and times to find the files of a layer.
    write("first", "the old content");
    write("second", "new");
    write(
        "Containerfile",
        "FROM scratch\nCOPY first /usr/bin/app\nCOPY second /usr/bin/app\nCOPY second /etc/second\n\
         ENTRYPOINT [\"/usr/bin/app\"]\nENV NAME=value\nWORKDIR /etc\n",
    );
    podman(made.path(), &["build", "--layers", "--platform", "linux/arm64", "--tag", "localhost/app:1", "."]);
    let formats = [
        ("docker-archive", Kind::DockerArchive),
        ("oci-archive", Kind::OciArchive),
        ("oci-dir", Kind::OciLayout),
    ];
    for (format, kind) in formats {
        podman(made.path(), &["save", "--quiet", "--format", format, "--output", format, "localhost/app:1"]);
        let place = Place::new();
        let unpacked =
            unpack(&made.path().join(format), &place.root(), &Request::default(), &mut |_, _| Ok(()))
                .unwrap();
        assert_eq!(unpacked.kind, kind);
        assert_eq!(place.tree(), pairs(&[("etc/second", "new"), ("usr/bin/app", "new")]), "{format}");
        let image = unpacked.image.as_ref().unwrap();
        assert_eq!((image.config.architecture.as_str(), image.config.os.as_str()), ("arm64", "linux"));
        assert_eq!(
            (image.name.as_str(), image.config.working_directory.as_str()),
            ("localhost/app:1", "/etc")
        );
        assert_eq!(image.config.entrypoint, ["/usr/bin/app"]);
        assert!(image.config.env.contains(&"NAME=value".to_owned()), "{:?}", image.config.env);
        let layer = unpacked.layers_by_file()[Path::new("usr/bin/app")];
        assert!(image.layers.len() >= 3 && *layer == image.layers[1], "{:?}", image.layers);
    }
}
