//! The command of an image leads to a file and to the interpreters of scripts.

use std::path::PathBuf;

use super::Place;
use super::make::Tarball;
use crate::{ImageConfig, Program};

fn place() -> Place {
    let place = Place::new();
    let root = Tarball::new()
        .symlink("bin", "usr/bin")
        .mode(0o755)
        .file("usr/bin/app", "\x7fELF")
        .mode(0o755)
        .file("usr/bin/start", "#!/bin/sh -e\nexec app\n")
        .mode(0o755)
        .file("usr/bin/dash", "\x7fELF")
        .symlink("usr/bin/sh", "/usr/bin/dash")
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
