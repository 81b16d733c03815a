//! Tests `try` with container images: an OCI archive and an archive of `docker save`, as the program and as the file
//! system of another one.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use xtask_core::digest::Algorithm;

use super::{Place, stderr, stdout};
use crate::scratch::{assert_code, message};

/// Makes a tar archive of executable files and of links, whose targets begin with `->`.
fn tarball(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        if let Some(target) = content.strip_prefix(b"->") {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, name, std::str::from_utf8(target).unwrap()).unwrap();
            continue;
        }
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// Makes the configuration of an image with one layer. `process` is its part about the program.
fn config(architecture: &str, layer: &[u8], process: &Value) -> Vec<u8> {
    let digests = [Algorithm::Sha256.of(layer).to_string()];
    let rootfs = json!({ "type": "layers", "diff_ids": digests });
    let config = json!({ "architecture": architecture, "os": "linux", "config": process, "rootfs": rootfs });
    config.to_string().into_bytes()
}

/// Makes an OCI archive with images of several architectures.
fn oci(images: &[(&str, &[u8], &Value)]) -> Vec<u8> {
    let (mut members, mut manifests) = (Vec::new(), Vec::new());
    let mut add = |kind: &str, blob: Vec<u8>| {
        let digest = Algorithm::Sha256.of(&blob);
        let kind = format!("application/vnd.oci.image.{kind}");
        let described = json!({ "mediaType": kind, "digest": digest.to_string(), "size": blob.len() });
        members.push((format!("blobs/sha256/{}", digest.hex()), blob));
        described
    };
    for (architecture, layer, process) in images {
        let config = add("config.v1+json", config(architecture, layer, process));
        let layers = [add("layer.v1.tar", layer.to_vec())];
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        manifests.push(add("manifest.v1+json", manifest.to_string().into_bytes()));
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into_bytes();
    members.push(("index.json".to_owned(), index));
    members.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    let entries: Vec<_> = members.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    tarball(&entries)
}

/// Makes an archive of `docker save`, compressed with zstd.
fn docker(layer: &[u8], process: &Value) -> Vec<u8> {
    let config = config("arm64", layer, process);
    let digest = |bytes: &[u8]| Algorithm::Sha256.of(bytes).hex().to_owned();
    let names = [format!("{}.json", digest(&config)), format!("{}/layer.tar", digest(layer))];
    let manifest = json!([{ "Config": names[0], "RepoTags": ["t:1"], "Layers": [names[1]] }]).to_string();
    let files: [(&str, &[u8]); 3] =
        [(&names[0], &config), (&names[1], layer), ("manifest.json", manifest.as_bytes())];
    zstd::encode_all(tarball(&files).as_slice(), 1).unwrap()
}

fn put(place: &Place, name: &str, bytes: &[u8]) -> PathBuf {
    let path = place.path(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Prints the arguments, the environment and the identity, and writes to a directory that belongs to another user.
const TELLS: &str = r#"#include <stdio.h>
#include <unistd.h>
extern char **environ;
int main(int argc, char **argv) {
    char here[64];
    gid_t groups[8];
    int count = getgroups(8, groups);
    printf("%d %d %d %d %s\n", getuid(), getgid(), count, count == 1 ? groups[0] : -1, getcwd(here, 64));
    for (int i = 0; i < argc; i++) puts(argv[i]);
    for (char **one = environ; *one; one++) puts(*one);
    FILE *file = fopen("/srv/written", "w");
    return file ? 3 : 4;
}
"#;

#[test]
fn an_oci_archive_runs_its_entry_point() {
    let place = Place::new();
    let program = std::fs::read(place.compile("tells", &["-static"], TELLS)).unwrap();
    let layer = tarball(&[
        ("srv/tells", &program),
        ("bin", b"->/srv"),
        ("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:50::/home/app:/bin/sh\n"),
        ("etc/group", b"video:x:44:app\n"),
    ]);
    let process = json!({
        "Entrypoint": ["tells", "first"], "Cmd": ["second"], "Env": ["PATH=/bin", "WORD=a b"],
        "WorkingDir": "/var/lib/app", "User": "app",
    });
    let foreign = json!({ "Entrypoint": ["/foreign"] });
    let archive = put(&place, "image.oci", &oci(&[("amd64", &layer, &foreign), ("arm64", &layer, &process)]));
    let (output, report) = place.report(&archive, &["--env", "ADDED=1"]);
    assert_code(&output, 3);
    let identity = "1000 50 1 44 /var/lib/app\n";
    let environment = "ADDED=1\nHOME=/home/app\nPATH=/bin\nWORD=a b\n";
    assert_eq!(stdout(&output), format!("{identity}tells\nfirst\nsecond\n{environment}"));
    assert_eq!((&report["outcome"], &report["code"]), (&"exited".into(), &3.into()), "{report}");
    assert!(place.runs().is_empty(), "the files of the image are deleted");
    // The arguments replace the command, as those of podman run do.
    let layer = tarball(&[("srv/tells", &program)]);
    let process = json!({ "Entrypoint": ["/srv/tells", "first"], "Cmd": ["second"] });
    let archive = put(&place, "image.oci", &oci(&[("arm64", &layer, &process)]));
    let output = place.run(&archive, &[], &["-x", "y z"]);
    assert_code(&output, 3);
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let expected = format!("0 0 0 -1 /\n/srv/tells\nfirst\n-x\ny z\nHOME=/root\nPATH={path}\n");
    assert_eq!(stdout(&output), expected);
}

/// Returns the C library for a layer, with its dynamic loader.
fn library() -> [(&'static str, Vec<u8>); 2] {
    ["ld-linux-aarch64.so.1", "libc.so.6"].map(|name| {
        let content = std::fs::read(Path::new("/usr/aarch64-linux-gnu/lib").join(name)).unwrap();
        (if name.starts_with("ld") { "usr/lib/ld-linux-aarch64.so.1" } else { "usr/lib/libc.so.6" }, content)
    })
}

#[test]
fn a_docker_archive_is_a_program_and_a_file_system() {
    let place = Place::new();
    let source = "#include <stdio.h>\nint main(int c, char **v) { puts(v[0]); return access(\"/mark\", 0) ? 5 : 0; }\n";
    let source = format!("#include <unistd.h>\n{source}");
    let dynamic = place.compile("dynamic", &[], &source);
    let program = std::fs::read(&dynamic).unwrap();
    let library = library();
    let mut entries: Vec<(&str, &[u8])> =
        library.iter().map(|(name, content)| (*name, &content[..])).collect();
    // The link is absolute. On this host, it would lead to the host's own libraries.
    entries.extend([("lib", &b"->/usr/lib"[..]), ("app", &program), ("mark", b"")]);
    let process = json!({ "Entrypoint": null, "Cmd": ["/app"] });
    let archive = put(&place, "image.docker", &docker(&tarball(&entries), &process));
    let output = place.run(&archive, &[], &[]);
    assert_code(&output, 0);
    assert_eq!(stdout(&output), "/app\n");
    let output = place.run(&dynamic, &["--sysroot", archive.to_str().unwrap()], &[]);
    assert_code(&output, 0);
    assert_eq!(stdout(&output), "/try/dynamic\n");
    assert!(place.runs().is_empty(), "the files of the archive are deleted");
}

#[test]
fn an_archive_that_cannot_run_ends_before_a_machine_starts() {
    let place = Place::new();
    let program = std::fs::read(place.compile("dynamic", &[], "int main(void) { return 0; }\n")).unwrap();
    let layer = tarball(&[("app", &program)]);
    let image =
        |architecture: &str, entry: &str| oci(&[(architecture, &layer, &json!({ "Entrypoint": [entry] }))]);
    let loader = "the program needs the dynamic loader /lib/ld-linux-aarch64.so.1, and";
    let table = [
        (image("amd64", "/app"), 2, "the image is for linux/amd64, and pi5 is linux/arm64"),
        (image("arm64", "/gone"), 127, "the entry point /gone is no executable file of"),
        (image("arm64", "/app"), 127, loader),
        (layer.clone(), 2, "it is a tar archive, which names no program to run"),
    ];
    for (bytes, code, words) in table {
        let archive = put(&place, "archive", &bytes);
        let (output, report) = place.report(&archive, &[]);
        assert_code(&output, code);
        assert!(stderr(&output).contains(words), "{}", message(&output));
        assert!(!stderr(&output).contains("boot"), "{}", message(&output));
        let outcome = if code == 2 { "not-started" } else { "refused" };
        assert_eq!(report["outcome"], outcome);
    }
    let output = place.run(&put(&place, "archive", &image("arm64", "/app")), &["--sysroot", "/"], &[]);
    assert_code(&output, 2);
    assert!(stderr(&output).contains("has its own file system"), "{}", message(&output));
    assert!(place.runs().is_empty());
}
