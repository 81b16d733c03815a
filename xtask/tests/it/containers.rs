//! Tests `inspect` and `try` with container images that are made of Debian's packages for arm64 and of wheels of PyPI.
//! `inspect` judges each image whole, and `try` runs its entrypoint: what is refused must fail, and the rest must run.
//! `cargo xtask soak --all` runs this test. It needs the network and pip, and downloads 400 MB.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xtask_archives::{Request, unpack};

use crate::scratch::{Scratch, XTASK_INSPECT, XTASK_TRY, docker_archive, message};

/// A container image.
struct Container {
    name: &'static str,
    packages: &'static str,
    /// A wheel that is unpacked in the second layer: its name, its version, and the directory.
    wheel: Option<(&'static str, &'static str, &'static str)>,
    command: &'static [&'static str],
    /// The check that refuses a file of the image; `None` if the entrypoint runs.
    fault: Option<&'static str>,
}

const MODULES: &str = "usr/lib/python3/dist-packages";

const CONTAINERS: &[Container] = &[
    debian("curl", "curl", &["curl", "--version"], None),
    debian("nginx", "nginx-light", &["/usr/sbin/nginx", "-v"], None),
    debian("node", "nodejs", &["node", "--eval", "0"], None),
    debian("postgres", "postgresql-15", &["/usr/lib/postgresql/15/bin/postgres", "--version"], None),
    debian("redis", "redis-server", &["redis-server", "--version"], None),
    // The packages are not configured, so the links to the libraries of BLAS are missing.
    debian("ffmpeg", "ffmpeg", &["ffmpeg", "-version"], Some("needed")),
    Container {
        wheel: Some(("numpy", "2.2.6", MODULES)),
        ..debian("numpy", "python3", &["python3", "-c", "import numpy"], None)
    },
    // These two have jemalloc for pages of 4 KiB.
    Container {
        wheel: Some(("polars", "0.16.18", MODULES)),
        ..debian("polars", "python3", &["python3", "-c", "import polars"], Some("allocator-page-size"))
    },
    Container {
        wheel: Some(("ruff", "0.0.260", "opt")),
        ..debian(
            "ruff",
            "",
            &["/opt/ruff-0.0.260.data/scripts/ruff", "--version"],
            Some("allocator-page-size"),
        )
    },
    Container {
        wheel: Some(("uv", "0.1.0", "opt")),
        ..debian("uv", "", &["/opt/uv-0.1.0.data/scripts/uv", "--version"], None)
    },
];

const fn debian(
    name: &'static str,
    packages: &'static str,
    command: &'static [&'static str],
    fault: Option<&'static str>,
) -> Container {
    Container { name, packages, wheel: None, command, fault }
}

impl Container {
    /// Makes the image's archive in a directory.
    fn make(&self, directory: &Path) -> PathBuf {
        let mut layers = vec![packages(directory, self.packages)];
        layers.extend(self.wheel.map(|(name, version, into)| wheel(directory, name, version, into)));
        let archive = directory.join(self.name).with_extension("tar");
        std::fs::write(&archive, docker_archive(&layers, &json!({ "Entrypoint": self.command }))).unwrap();
        archive
    }
}

/// Returns the files of Debian's packages and of those on which they depend, as a tar archive. No script of a package
/// runs.
fn packages(directory: &Path, names: &str) -> Vec<u8> {
    let tree = directory.join("packages.tar");
    let mut command = Command::new("mmdebstrap");
    command.args([
        "--quiet",
        "--architectures=arm64",
        "--variant=extract",
        &format!("--include=dash,{names}"),
    ]);
    done(command.arg("bookworm").arg(&tree));
    std::fs::read(tree).unwrap()
}

/// Returns the files of a wheel as a tar archive.
fn wheel(directory: &Path, name: &str, version: &str, into: &str) -> Vec<u8> {
    let downloads = directory.join("wheels");
    let mut command = Command::new("pip");
    command.args(["download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]);
    command.args(["--platform", "manylinux2014_aarch64", "--platform", "manylinux_2_28_aarch64", "--dest"]);
    done(command.arg(&downloads).arg(format!("{name}=={version}")));
    let found = xtask_core::fs::entries(&downloads).next().unwrap();
    let files = directory.join("files");
    unpack(&found, &files, &Request::default(), &mut |_, _| Ok(())).unwrap();
    let mut layer = tar::Builder::new(Vec::new());
    layer.append_dir_all(into, &files).unwrap();
    layer.into_inner().unwrap()
}

fn done(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", message(&output));
}

#[test]
fn inspect_and_try_agree_on_container_images() {
    let scratch = Scratch::new();
    let (mut wrong, mut bytes, mut judged) = (Vec::new(), 0, Duration::ZERO);
    for container in CONTAINERS {
        let directory = tempfile::tempdir().unwrap();
        let archive = container.make(directory.path());
        bytes += archive.metadata().unwrap().len();
        let path = archive.to_str().unwrap();
        let started = Instant::now();
        let output = scratch.run(XTASK_INSPECT, &["inspect", "--json", path]);
        judged += started.elapsed();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let refused = refused(&report);
        let expected: Vec<_> = container.fault.into_iter().collect();
        if refused.iter().any(|id| !expected.contains(&id.as_str()))
            || refused.is_empty() != expected.is_empty()
        {
            wrong.push(format!("{}: inspect refuses {refused:?}: {}", container.name, message(&output)));
        }
        let tried = directory.path().join("tried.json");
        scratch
            .run(XTASK_TRY, &["try", "--quiet", "--timeout=600", "--report", tried.to_str().unwrap(), path]);
        let tried: Value = serde_json::from_slice(&std::fs::read(tried).unwrap()).unwrap();
        let runs = tried["outcome"] == "exited" && tried["code"] == 0;
        let fails = tried["outcome"] == "signal" || (tried["outcome"] == "exited" && tried["code"] == 127);
        if (runs, fails) != (container.fault.is_none(), container.fault.is_some()) {
            wrong.push(format!("{}: try says {tried:#}", container.name));
        }
        println!(
            "{}: {} files, {}",
            container.name,
            report["files"].as_array().unwrap().len(),
            tried["outcome"]
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let gigabytes = bytes as f64 / 1e9;
    println!("{gigabytes:.1} GB in {:.1} s", judged.as_secs_f64());
    assert!(judged.as_secs_f64() < 15.0 * gigabytes, "the limit is 15 s for each GB");
}

/// Returns the ids of the refused findings, each once.
fn refused(report: &Value) -> Vec<String> {
    let files = report["files"].as_array().unwrap().iter();
    let findings = files.flat_map(|file| file["findings"].as_array().unwrap());
    let refused = findings.filter(|finding| finding["severity"] == "refused");
    let mut ids: Vec<_> = refused.map(|finding| finding["id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids.dedup();
    ids
}
