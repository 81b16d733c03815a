//! Tests images with real packages and machines: builds are reproducible, a smoke names the fallback image, and a
//! smoke does not boot an image with another digest. `cargo xtask ci` runs these tests after a preflight.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use xtask_core::error::Verdict;
use xtask_core::git::Commit;
use xtask_core::report::{Phase, Report};

use crate::scratch::{Scratch, XTASK, XTASK_VM, assert_code, command, message};

fn xtask_vm(arguments: &[&str]) -> Command {
    command(XTASK_VM, arguments)
}

/// Builds debian-12 in this user's own cache, and makes another cache with only this image.
fn with_debian_12() -> Scratch {
    Scratch::with_image(own_disk().0.parent().unwrap())
}

impl Scratch {
    /// Runs a smoke that can reach other machines only through a proxy. The proxy accepts connections and never
    /// answers.
    fn smoke_without_network(&self, arguments: &[&str]) -> (Output, Report) {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = format!("http://{}", silent.local_addr().unwrap());
        let directory = self.path().join("report");
        let mut command =
            self.xtask_vm(&["smoke", "--arch", "aarch64", "--report", directory.to_str().unwrap()]);
        command.args(arguments).env("HTTPS_PROXY", &proxy).env("https_proxy", &proxy);
        let output = command.env_remove("NO_PROXY").env_remove("no_proxy").output().unwrap();
        let report = std::fs::read(directory.join("report.json"))
            .unwrap_or_else(|error| panic!("{error}: {}", message(&output)));
        (output, serde_json::from_slice(&report).unwrap())
    }
}

/// Parses the output of `image build --json` or `image path --json`.
fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", message(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Builds debian-12. Returns its packages and its digest.
fn built(arch: &str, scratch: Option<&Scratch>) -> (serde_json::Value, String) {
    let build = ["image", "build", "debian-12", "--arch", arch, "--json", "-q"];
    let mut command = scratch.map_or_else(|| xtask_vm(&build), |scratch| scratch.xtask_vm(&build));
    let built = json(&command.output().unwrap());
    assert!(scratch.is_none() || built["how"] == "built");
    let manifest = Path::new(built["path"].as_str().unwrap()).with_file_name("manifest.json");
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    let packages = manifest["contents"]["packages"].clone();
    assert!(packages.as_array().unwrap().len() > 200);
    (packages, built["digest"].as_str().unwrap().to_owned())
}

#[test]
fn the_same_packages_make_the_same_bytes() {
    for arch in ["aarch64", "x86_64"] {
        let mut first = built(arch, None);
        let mut again = built(arch, Some(&Scratch::new()));
        if first.0 != again.0 {
            // The cached image is older than the mirror's newest package.
            first = again;
            again = built(arch, Some(&Scratch::new()));
        }
        assert_eq!(first.0, again.0, "the mirror changed between two builds: run again");
        assert_eq!(first.1, again.1, "{arch}: the same packages, another digest");
    }
}

#[test]
fn where_the_default_cannot_be_reached_another_stands_in_aloud() {
    let (output, report) = with_debian_12().smoke_without_network(&["--sabotage", "kernel-panic"]);
    let message = message(&output);
    assert_eq!(report.failure.as_ref().unwrap().phase, Phase::Boot, "{message}");
    let image = report.guest.image.as_ref().unwrap();
    assert_eq!(
        (image.name.as_str(), image.wanted.as_str(), image.requested.clone()),
        ("debian-12", "ubuntu-24.04", None)
    );
    let reason = image.fallback_reason.as_ref().unwrap();
    assert!(reason.starts_with("cloud-images.ubuntu.com cannot be reached: "), "{reason}");
    assert!(message.contains(&format!("ubuntu-24.04 is not tested: {reason}")), "{message}");
    let verdict = message.lines().last().unwrap();
    let words = "debian-12 instead of ubuntu-24.04, because cloud-images.ubuntu.com cannot be reached";
    assert!(verdict.contains(words), "{verdict}");
}

#[test]
fn an_image_that_was_asked_for_is_never_replaced() {
    for arguments in [["--image", "ubuntu-24.04"].as_slice(), &["--strict-image"]] {
        let (output, report) = with_debian_12().smoke_without_network(arguments);
        assert_code(&output, 69);
        assert_eq!(report.verdict, Verdict::Unavailable);
        assert!(report.guest.image.is_none(), "nothing was tested");
        let hint = report.failure.unwrap().hint.unwrap();
        assert!(hint.contains("--image debian-12"), "{hint}");
    }
}

#[test]
fn offline_nothing_is_fetched_nor_built() {
    let output = Scratch::new().run(XTASK_VM, &["smoke", "--arch", "aarch64", "--offline"]);
    assert_code(&output, 69);
    assert!(message(&output).contains("--offline forbids the network"), "{}", message(&output));
    // A cached image becomes the fallback image without any network.
    let (output, report) =
        with_debian_12().smoke_without_network(&["--offline", "--sabotage", "kernel-panic"]);
    assert_eq!(
        report.guest.image.unwrap().fallback_reason.as_deref(),
        Some("--offline"),
        "{}",
        message(&output)
    );
}

/// In this test, the run ends without an image, after the agent was read and inspected.
#[test]
fn a_report_says_which_agent_and_which_commit_were_tested() {
    let scratch = Scratch::new();
    let directory = scratch.path().join("report");
    let arguments = ["smoke", "--offline", "--agent", XTASK, "--report", directory.to_str().unwrap()];
    let output = scratch.run(XTASK_VM, &arguments);
    let report = Report::read(&directory).unwrap_or_else(|error| panic!("{error:#}: {}", message(&output)));
    assert_eq!(report.workspace, Commit::of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..")));
    let agent = report.agent.unwrap();
    assert_eq!((agent.given_as, agent.profile), (Some(XTASK.into()), None));
    let verdict = message(&output).lines().last().unwrap().to_owned();
    assert!(verdict.contains(&format!(", agent given as {XTASK}")), "{verdict}");
}

/// An instance of `--keep`, which is removed when the test ends.
struct Kept(String);

impl Drop for Kept {
    fn drop(&mut self) {
        let removed = command(XTASK, &["vm", "rm", &self.0]).output().unwrap();
        assert!(removed.status.success(), "{}", message(&removed));
    }
}

/// A build configures the system with tools of the host's architecture. The finished system must not show this.
#[test]
fn a_built_system_is_as_a_plainly_installed_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let arguments =
        ["smoke", "--cold", "--arch", "aarch64", "--image", "debian-13", "--keep", "--report", path];
    let output = xtask_vm(&arguments).output().unwrap();
    let report = std::fs::read(directory.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_slice(&report).unwrap();
    let machine = Kept(report.run_id);
    assert!(output.status.success(), "{}", message(&output));
    let ask = |line: &str| {
        let words = ["vm", "exec", "--machine", &machine.0, "--", "sh", "-c", line];
        let output = command(XTASK, &words).output().unwrap();
        assert!(output.status.success(), "{line}: {}", message(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let answers =
        ["systemctl --failed --no-legend --plain", "sudo dpkg --audit", "dpkg --print-architecture"].map(ask);
    let diverted = ask(
        "dpkg-divert --list | grep -v ' by '; grep -rs '^deb' /etc/apt; ls -A /etc/.resolv* 2>/dev/null; sudo find / -xdev \\( -name '*.guest' -o -name '*.later' -o -path '/acc*' -o -path '/.ahead*' -o -path '/.later*' \\) -prune -print",
    );
    assert_eq!(answers, ["", "", "arm64\n"]);
    assert_eq!(diverted, "");
}

/// Runs one of the build's scripts in `directory`.
fn build_script(name: &str, directory: &Path, arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/src/build").join(name);
    let mut command = Command::new("sh");
    command.arg(script).args(arguments).current_dir(directory).stdin(Stdio::null());
    command.output().unwrap()
}

/// dpkg must unpack and record the same content, byte for byte, although the package is no longer compressed.
#[test]
fn a_package_without_its_compression_is_the_same_package() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let deb = |arguments: &[&str]| {
        let output = Command::new("dpkg-deb").args(arguments).current_dir(directory.path()).output().unwrap();
        assert!(output.status.success(), "{}", message(&output));
        output.stdout
    };
    std::fs::create_dir_all(path("tree/DEBIAN")).unwrap();
    std::fs::create_dir(path("stored")).unwrap();
    let control =
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n";
    std::fs::write(path("tree/DEBIAN/control"), control).unwrap();
    std::fs::write(path("tree/file"), "content\n".repeat(1 << 16)).unwrap();
    for compression in ["xz", "gzip"] {
        deb(&["--root-owner-group", &format!("-Z{compression}"), "--build", "tree", "x.deb"]);
        // Several calls at once must each succeed.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let stored = build_script("store.sh", directory.path(), &["stored", "x.deb", "x.deb"]);
                    assert!(stored.status.success(), "{}", message(&stored));
                });
            }
        });
        assert_eq!(std::fs::read_dir(path("stored")).unwrap().count(), 1, "no parts are left");
        for part in ["--fsys-tarfile", "--ctrl-tarfile", "--field"] {
            assert_eq!(deb(&[part, "x.deb"]), deb(&[part, "stored/x.deb"]), "{compression} {part}");
        }
        assert!(path("x.deb").metadata().unwrap().len() < 1 << 16);
        assert!(path("stored/x.deb").metadata().unwrap().len() > 1 << 19);
    }
    std::fs::write(path("x.deb"), "no package").unwrap();
    let refused = build_script("store.sh", directory.path(), &["stored", "x.deb"]);
    assert!(!refused.status.success(), "a file that is no package is not stored");
}

/// The build must wait for jobs that maintainer scripts have started. If a job fails or is killed, the build must
/// fail.
#[test]
fn a_tree_is_not_finished_before_its_jobs_are() {
    for (job, passes) in
        [("sleep 1; echo done >&8", true), ("sleep 1", false), ("sleep 1; kill -9 $$; echo done >&8", false)]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["usr/bin", "var/lib/dpkg", ".later/jobs"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        for (name, text) in [
            ("usr/bin/py3compile", "stub"),
            ("usr/bin/py3compile.later", "tool"),
            (
                "var/lib/dpkg/diversions",
                "/a\n/a.dash\ndash\n/usr/bin/py3compile\n/usr/bin/py3compile.later\n:\n",
            ),
            (".later/list", "usr/bin/py3compile\n"),
            (".later/log", "what the tool said\n"),
        ] {
            std::fs::write(path(name), text).unwrap();
        }
        let started = format!("exec 8> .later/jobs/py3compile.x; flock 8; sh -c '{job}' & exit 0");
        let started = Command::new("sh").args(["-c", &started]).current_dir(directory.path()).status();
        assert!(started.unwrap().success());
        let finished = build_script("finish.sh", directory.path(), &["."]);
        let message = message(&finished);
        assert_eq!(finished.status.success(), passes, "{job}: {message}");
        let read = |name: &str| std::fs::read_to_string(path(name)).unwrap();
        if passes {
            assert_eq!(read("usr/bin/py3compile"), "tool");
            assert_eq!(read("var/lib/dpkg/diversions"), "/a\n/a.dash\ndash\n");
            assert!(!path("usr/bin/py3compile.later").exists() && !path(".later").exists());
        } else {
            assert!(message.contains("py3compile.x") && message.contains("what the tool said"), "{message}");
        }
    }
}

/// Returns the path and the digest of a cached image's disk, for use as a user's own file.
fn own_disk() -> (PathBuf, String) {
    let built = json(
        &xtask_vm(&["image", "build", "debian-12", "--arch", "aarch64", "--json", "-q"]).output().unwrap(),
    );
    let text = |name: &str| built[name].as_str().unwrap().to_owned();
    (text("path").into(), text("digest"))
}

#[test]
fn a_file_of_ones_own_is_what_its_digest_says_or_is_called_unverified() {
    let (disk, digest) = own_disk();
    let disk = disk.to_str().unwrap();
    let scratch = with_debian_12();
    let wrong = format!("sha256:{}", "0".repeat(64));
    let (output, _) = scratch.smoke_without_network(&["--image", disk, "--image-digest", &wrong]);
    assert_code(&output, 69);
    assert!(
        message(&output).contains(&wrong) && message(&output).contains(&digest),
        "both digests: {}",
        message(&output)
    );

    let (output, report) =
        scratch.smoke_without_network(&["--image", disk, "--unverified", "--sabotage", "kernel-panic"]);
    assert_eq!(report.failure.unwrap().phase, Phase::Boot, "it boots: {}", message(&output));
    assert!(message(&output).lines().last().unwrap().contains("UNVERIFIED"), "{}", message(&output));
    assert!(!report.guest.image.unwrap().verified);
}

#[test]
fn a_file_that_is_no_disk_of_its_own_is_refused_before_anything_boots() {
    let directory = tempfile::tempdir().unwrap();
    let layer = directory.path().join("layer.qcow2");
    let (disk, _) = own_disk();
    let made = Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            disk.to_str().unwrap(),
            layer.to_str().unwrap(),
        ])
        .status()
        .unwrap();
    assert!(made.success());
    let (output, report) =
        with_debian_12().smoke_without_network(&["--image", layer.to_str().unwrap(), "--unverified"]);
    assert_code(&output, 69);
    assert!(message(&output).contains("is an overlay over"), "{}", message(&output));
    assert_eq!(report.failure.unwrap().phase, Phase::Image);
}

#[test]
fn a_cached_image_that_was_changed_is_not_booted() {
    let (disk, _) = own_disk();
    let from = disk.parent().unwrap();
    let scratch = Scratch::new();
    let to = scratch.cache().join("images").join(from.file_name().unwrap());
    std::fs::create_dir_all(&to).unwrap();
    for name in ["disk", "manifest.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let run = |arguments: &[&str]| scratch.run(XTASK_VM, arguments);
    let sound = run(&["image", "verify", "debian-12"]);
    assert!(sound.status.success(), "{}", message(&sound));
    let path = to.join("disk");
    let mut permissions = path.metadata().unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "this test changes the file as its owner")]
    permissions.set_readonly(false);
    std::fs::set_permissions(&path, permissions).unwrap();
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
    let changed = run(&["image", "verify", "debian-12"]);
    assert_code(&changed, 1);
    let smoke = run(&["smoke", "--arch", "aarch64", "--image", "debian-12", "--offline"]);
    assert_code(&smoke, 69);
    assert!(message(&smoke).contains("was changed"), "{}", message(&smoke));
}
