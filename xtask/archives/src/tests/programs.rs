//! The command of an image leads to a file and to the interpreters of scripts.

use std::path::PathBuf;

use super::Place;
use super::make::Tarball;
use crate::{ImageConfig, Program};

/// The start of an ELF executable, up to its type.
const ELF: &str = "\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0";

fn place() -> Place {
    let place = Place::new();
    let root = Tarball::new()
        .symlink("bin", "usr/bin")
        .mode(0o755)
        .file("usr/bin/app", ELF)
        .mode(0o755)
        .file("usr/bin/start", "#!/bin/sh -e\nexec app\n")
        .mode(0o755)
        .file("usr/bin/dash", ELF)
        .symlink("usr/bin/sh", "/usr/bin/dash")
        .mode(0o755)
        .file("usr/bin/env", ELF)
        .mode(0o755)
        .file("srv/run.py", "#!/usr/bin/env -S A=b python3 -u\n")
        .mode(0o755)
        .file("srv/old", "#! /opt/python2")
        .file("srv/data", "#!/bin/sh\n")
        .mode(0o755)
        .file("srv/circle", "#!/srv/circle\n");
    // The layer of an image has absolute links.
    place.unpack(&super::make::Built::plain(&[root.done()]).docker()).unwrap();
    place
}

#[test]
fn the_command_leads_to_files() {
    let place = place();
    let found = |entrypoint: &[&str], cmd: &[&str], env: &[&str], directory: &str| {
        let strings = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect();
        let config = ImageConfig {
            entrypoint: strings(entrypoint),
            cmd: strings(cmd),
            env: strings(env),
            working_directory: directory.to_owned(),
            ..ImageConfig::default()
        };
        config.program(&place.root()).unwrap()
    };
    let program = |files: &[&str], missing: Option<&str>| Program {
        files: files.iter().map(PathBuf::from).collect(),
        missing: missing.map(str::to_owned),
        is_no_program: false,
    };
    assert_eq!(found(&["/bin/app"], &["x"], &[], ""), program(&["usr/bin/app"], None));
    assert_eq!(found(&[], &["app", "x"], &[], ""), program(&["usr/bin/app"], None));
    assert_eq!(
        found(&["start"], &[], &["PATH=/opt:/bin"], ""),
        program(&["usr/bin/start", "usr/bin/dash"], None)
    );
    assert_eq!(found(&["start"], &[], &["PATH=/opt"], ""), program(&[], Some("start")));
    assert_eq!(found(&["./run.py"], &[], &[], "/srv"), program(&["srv/run.py"], Some("python3")));
    assert_eq!(found(&["./run.py"], &[], &[], ""), program(&[], Some("./run.py")));
    assert_eq!(found(&["/srv/old"], &[], &[], ""), program(&["srv/old"], Some("/opt/python2")));
    assert_eq!(found(&["/srv/data"], &[], &[], ""), program(&[], Some("/srv/data")), "it is not executable");
    assert_eq!(found(&["/srv"], &[], &[], ""), program(&[], Some("/srv")));
    assert_eq!(found(&[], &[], &[], ""), Program::default());
    let circle = found(&["/srv/circle"], &[], &[], "");
    assert_eq!((circle.files.len(), circle.missing.as_deref()), (6, Some("/srv/circle")));
}

#[test]
fn a_link_to_a_directory_is_no_program() {
    let place = place();
    let config = ImageConfig { entrypoint: vec!["/bin/app".to_owned()], ..ImageConfig::default() };
    let path = place.root().join("usr/bin/app");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/", &path).unwrap();
    assert_eq!(config.program(&place.root()).unwrap().missing.as_deref(), Some("/bin/app"));
}

/// Linux keeps a carriage return in the interpreter's name, and does not execute a file without one. `env` must be there
/// as well as the program that it looks up.
#[test]
fn a_script_needs_all_that_its_first_line_names() {
    let table: [(&str, &[&str], Option<&str>, bool); 15] = [
        ("#!/bin/sh -e\r\n", &["start", "usr/bin/dash"], None, false),
        ("#!/bin/sh\r\n", &["start"], Some("/bin/sh\r"), false),
        ("#! /bin/sh\t-e\n", &["start", "usr/bin/dash"], None, false),
        ("#!sh\n", &["start"], Some("./sh"), false),
        ("#!/usr/bin/env sh\n", &["start", "usr/bin/env", "usr/bin/dash"], None, false),
        ("#!/usr/bin/env sh\r\n", &["start"], Some("sh\r"), false),
        ("#!/usr/bin/env sh -e\n", &["start"], Some("sh -e"), false),
        ("#!/usr/bin/env -S sh -e\r\n", &["start", "usr/bin/env", "usr/bin/dash"], None, false),
        ("#!/usr/bin/env -S -i -u A sh\n", &["start", "usr/bin/env", "usr/bin/dash"], None, false),
        ("#!/opt/env sh\n", &["start"], Some("/opt/env"), false),
        ("#!/usr/bin/env\n", &["start", "usr/bin/env"], None, false),
        ("exec app\n", &["start"], None, true),
        ("#!\n", &["start"], None, true),
        ("", &["start"], None, true),
        ("\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0", &["start"], None, true),
    ];
    for (content, files, missing, is_no_program) in table {
        let place = place();
        let start = place.root().join("start");
        std::fs::write(&start, content).unwrap();
        std::fs::set_permissions(&start, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let config = ImageConfig { entrypoint: vec!["/start".to_owned()], ..ImageConfig::default() };
        let expected = Program {
            files: files.iter().map(PathBuf::from).collect(),
            missing: missing.map(str::to_owned),
            is_no_program,
        };
        assert_eq!(config.program(&place.root()).unwrap(), expected, "{content:?}");
        let found = config.missing_interpreter(&place.root(), std::path::Path::new("start")).unwrap();
        assert_eq!(found.as_deref(), missing, "{content:?}");
    }
}
