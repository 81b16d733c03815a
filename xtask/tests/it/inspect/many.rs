//! Tests `inspect` on directories, container images and packages, and the flags that decide which findings count.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use xtask_core::arch::VmArchitecture;

use super::build::{Tool, build};
use super::corpus;
use crate::scratch::{Scratch, XTASK_INSPECT, docker_archive, message};

const LIBRARIES: &str = "usr/lib/aarch64-linux-gnu";
const MAIN: &str = "int work(void); int main(void) { return work(); }\n";
/// The segments are aligned to 4 KiB, so a kernel with larger pages cannot map them.
const SMALL_PAGES: &str = "-Wl,-z,max-page-size=4096 -Wl,-z,common-page-size=4096";

/// A directory with a program, `bin/program`, and its library, whose flags are given.
struct Shipped {
    directory: tempfile::TempDir,
}

impl Shipped {
    fn new(flags: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for made in ["bin", LIBRARIES] {
            std::fs::create_dir_all(root.join(made)).unwrap();
        }
        let libraries = root.join(LIBRARIES);
        let shared = format!("-shared -fPIC -Wl,-soname,libwork.so.1 {flags}");
        let library = build(&libraries, "libwork.so.1", Tool::Arm, &shared, "int work(void) { return 0; }\n");
        let program = build(&root.join("bin"), "program", Tool::Arm, &library.display().to_string(), MAIN);
        for source in [libraries.join("libwork.so.1.c"), program.with_extension("c")] {
            std::fs::remove_file(source).unwrap();
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

pub(super) fn inspect(scratch: &Scratch, paths: &[&Path], flags: &[&str]) -> Output {
    let paths = paths.iter().map(|path| path.to_str().unwrap());
    let arguments: Vec<_> = ["inspect"].into_iter().chain(paths).chain(flags.iter().copied()).collect();
    scratch.run(XTASK_INSPECT, &arguments)
}

pub(super) fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", message(output)))
}

/// Returns the ids of the refused and warned findings of a file whose path ends like this, with their severities.
pub(super) fn ids(report: &Value, end: &str) -> Vec<(String, String)> {
    let files = report["files"].as_array().unwrap();
    let file = files.iter().find(|file| file["file"]["path"].as_str().unwrap().ends_with(end));
    let file = file.unwrap_or_else(|| panic!("{end} is not in {report:#}"));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let findings = file["findings"].as_array().unwrap().iter();
    let found = findings.map(|finding| (text(&finding["severity"]), text(&finding["id"])));
    found.filter(|(severity, _)| severity != "informs").collect()
}

pub(super) fn pair(severity: &str, id: &str) -> (String, String) {
    (severity.to_owned(), id.to_owned())
}

/// Writes a container image with two layers: the files of the corpus's sysroot, and those of the tree.
fn image(shipped: &Shipped, command: &[&str], environment: &[&str]) -> PathBuf {
    let layers = [corpus().root(VmArchitecture::Aarch64), shipped.directory.path()].map(|root| {
        let mut layer = tar::Builder::new(Vec::new());
        layer.follow_symlinks(false);
        layer.append_dir_all(".", root).unwrap();
        layer.into_inner().unwrap()
    });
    let process = json!({ "Entrypoint": command, "Env": environment });
    let path = shipped.directory.path().with_extension("tar");
    std::fs::write(&path, docker_archive(&layers, &process)).unwrap();
    path
}

#[test]
fn a_directory_is_judged_file_by_file() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(SMALL_PAGES));
    let sound = corpus().directory.join("sound-dynamic");
    std::fs::copy(&sound, shipped.path("bin/sound")).unwrap();
    std::fs::hard_link(shipped.path("bin/sound"), shipped.path("bin/again")).unwrap();
    std::os::unix::fs::symlink("sound", shipped.path("bin/link")).unwrap();
    build(&shipped.path(""), "part.o", Tool::Arm, "-c", MAIN);
    let root = corpus().root(VmArchitecture::Aarch64).to_str().unwrap();
    let output = inspect(&scratch, &[&shipped.path("")], &["--json", "--sysroot", root]);
    assert_eq!(output.status.code(), Some(1), "{}", message(&output));
    let report = report(&output);
    assert_eq!(report["files"].as_array().unwrap().len(), 3, "{report:#}");
    assert_eq!(report["not_judged"]["objects"], 1);
    assert_eq!(ids(&report, "libwork.so.1"), [pair("refused", "segment-alignment")]);
    let text = message(&inspect(&scratch, &[&shipped.path("")], &["--sysroot", root]));
    let rows: Vec<_> = text.lines().filter(|line| line.starts_with("refused ")).collect();
    assert_eq!(rows.len(), 2, "the program needs a library that the sysroot lacks: {text}");
    assert!(
        text.lines().last().unwrap().starts_with("REFUSED: 3 files, 2 refused, 0 warned, 1 object"),
        "{text}"
    );
}

#[test]
fn a_damaged_archive_is_one_row_and_the_other_paths_are_judged() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(""));
    let sound = corpus().directory.join("sound-dynamic");
    let (broken, image) = (shipped.path("broken.whl"), image(&shipped, &["/bin/program"], &[]));
    std::fs::write(&broken, b"PK\x03\x04broken").unwrap();
    let half = shipped.path("half.tar");
    let bytes = std::fs::read(&image).unwrap();
    std::fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    let output = inspect(&scratch, &[&broken, &sound, &half], &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", message(&output));
    let (report, text) = (report(&output), message(&output));
    assert_eq!(ids(&report, "broken.whl"), [pair("refused", "archive")]);
    assert_eq!(ids(&report, "half.tar"), [pair("refused", "archive")]);
    assert_eq!(ids(&report, "sound-dynamic"), []);
    assert!(text.contains("archive: it cannot be read: "), "{text}");
    assert!(text.contains("REFUSED: 3 files, 2 refused"), "{text}");
}

#[test]
fn a_path_without_executables_is_an_error() {
    let (scratch, empty) = (Scratch::new(), tempfile::tempdir().unwrap());
    std::fs::write(empty.path().join("text"), "text").unwrap();
    let output = inspect(&scratch, &[empty.path()], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(message(&output).contains("no executable and no library"), "{}", message(&output));
}

/// If a library is refused, the program that loads the library is refused, too.
#[test]
fn an_image_is_judged_with_its_own_libraries() {
    let scratch = Scratch::new();
    for (flags, code, expected) in [("", 0, vec![]), (SMALL_PAGES, 1, vec![pair("refused", "library")])] {
        let shipped = Shipped::new(flags);
        let output = inspect(&scratch, &[&image(&shipped, &["/bin/program"], &[])], &["--json"]);
        assert_eq!(output.status.code(), Some(code), "{}", message(&output));
        let report = report(&output);
        assert_eq!(ids(&report, ".tar/bin/program"), expected);
        let files = report["files"].as_array().unwrap();
        let started: Vec<_> = files.iter().filter(|file| file["container"]["entrypoint"] == true).collect();
        assert_eq!(started.len(), 1);
        assert_eq!(started[0]["container"]["layer"], "COPY 2");
    }
    assert_eq!(std::fs::read_dir(scratch.cache().join("runs")).unwrap().filter(is_run).count(), 0);
}

fn is_run(entry: &std::io::Result<std::fs::DirEntry>) -> bool {
    entry.as_ref().unwrap().file_type().unwrap().is_dir()
}

#[test]
fn the_environment_of_an_image_adds_libraries() {
    let scratch = Scratch::new();
    let shipped = Shipped::new("");
    let hidden = shipped.path("opt");
    std::fs::create_dir(&hidden).unwrap();
    std::fs::rename(shipped.path(LIBRARIES).join("libwork.so.1"), hidden.join("libwork.so.1")).unwrap();
    let judged = |environment: &[&str]| {
        let output = inspect(&scratch, &[&image(&shipped, &["program"], environment)], &["--json"]);
        ids(&report(&output), "bin/program")
    };
    assert_eq!(judged(&[]), [pair("refused", "needed")]);
    let output = inspect(&scratch, &[&image(&shipped, &["program"], &[])], &["--explain"]);
    let text = message(&output);
    assert!(text.contains(".tar has no such library") && !text.contains("/runs/"), "{text}");
    assert_eq!(judged(&["LD_LIBRARY_PATH=/opt"]), []);
    build(&hidden, "libsmall.so", Tool::Arm, &format!("-shared -fPIC {SMALL_PAGES}"), "int small;\n");
    // The loader goes on without a library that it cannot load. It searches a name without a slash.
    for preload in ["LD_PRELOAD=/opt/libsmall.so", "LD_PRELOAD=libsmall.so"] {
        assert_eq!(judged(&["LD_LIBRARY_PATH=/opt", preload]), [pair("warned", "library")], "{preload}");
    }
    // glibc's loader adds the libraries of this file to each program.
    std::fs::create_dir(shipped.path("etc")).unwrap();
    let file = shipped.path("etc/ld.so.preload");
    std::fs::write(&file, "# a comment\n/opt/libsmall.so\n").unwrap();
    assert_eq!(judged(&["LD_LIBRARY_PATH=/opt"]), [pair("warned", "library")]);
    std::fs::remove_file(file).unwrap();
    // A static program has no loader.
    build(&shipped.path("bin"), "program", Tool::Arm, "-static", "int main(void) { return 0; }\n");
    assert_eq!(judged(&["LD_PRELOAD=/opt/libsmall.so"]), []);
}

#[test]
fn a_container_that_cannot_start_is_refused() {
    let scratch = Scratch::new();
    let shipped = Shipped::new("");
    for (name, content) in
        [("bin/start", "#!/bin/absent\n"), ("bin/windows", "#!/bin/program\r\n"), ("bin/text", "program\n")]
    {
        let script = shipped.path(name);
        std::fs::write(&script, content).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    for (command, words) in [
        (["/bin/start"], "/bin/start needs /bin/absent"),
        (["/bin/other"], "/bin/other is not there"),
        (["/bin/windows"], r"/bin/windows needs /bin/program\r, which"),
        (["/bin/text"], "does not execute /bin/text (\"exec format error\")"),
    ] {
        let output = inspect(&scratch, &[&image(&shipped, &command, &[])], &["--json"]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(ids(&report(&output), ".tar"), [pair("refused", "container-command")]);
        assert!(message(&output).contains(words), "{}", message(&output));
    }
}

/// Packages of many languages bring prebuilt modules for all platforms, of which only one is loaded.
#[test]
fn a_file_for_another_platform_counts_only_if_something_may_start_it() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(""));
    let foreign = build(&shipped.path(""), "module.node", Tool::X86, "-shared -fPIC", "int module;\n");
    let judged = |command: &[&str], end: &str| {
        let output = inspect(&scratch, &[&image(&shipped, command, &[])], &["--json"]);
        (output.status.code().unwrap(), ids(&report(&output), end))
    };
    assert_eq!(judged(&["/bin/program"], ".tar/module.node"), (0, vec![]));
    assert_eq!(judged(&["/module.node"], ".tar/module.node"), (1, vec![pair("refused", "elf-machine")]));
    std::fs::copy(&foreign, shipped.path("bin/tool")).unwrap();
    assert_eq!(judged(&["/bin/program"], ".tar/bin/tool"), (0, vec![pair("warned", "elf-machine")]));
}

/// A program of a package finds the package's own libraries. Another package may have a library that this one lacks.
#[test]
fn a_package_is_judged_over_the_sysroot() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(""));
    std::fs::create_dir(shipped.path("DEBIAN")).unwrap();
    let control = "Package: shipped\nVersion: 1\nArchitecture: arm64\nMaintainer: nobody <nobody@localhost>\nDescription: a test\n";
    std::fs::write(shipped.path("DEBIAN/control"), control).unwrap();
    let root = corpus().root(VmArchitecture::Aarch64).to_str().unwrap();
    let package = shipped.directory.path().with_extension("deb");
    let judged = || {
        let mut packing = Command::new("dpkg-deb");
        packing.args(["--build", "--root-owner-group"]).args([shipped.path("").as_path(), &package]);
        let packed = packing.output().unwrap();
        assert!(packed.status.success(), "{}", message(&packed));
        let output = inspect(&scratch, &[&package], &["--json", "--sysroot", root]);
        assert_eq!(output.status.code(), Some(0), "{}", message(&output));
        ids(&report(&output), ".deb/bin/program")
    };
    assert_eq!(judged(), []);
    std::fs::remove_file(shipped.path(LIBRARIES).join("libwork.so.1")).unwrap();
    assert_eq!(judged(), [pair("warned", "needed")]);
}

#[test]
fn a_baseline_and_flags_decide_what_counts() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(SMALL_PAGES));
    let library = shipped.path(LIBRARIES).join("libwork.so.1");
    let code = |flags: &[&str]| {
        let output = inspect(&scratch, &[&library], flags);
        (output.status.code().unwrap(), message(&output))
    };
    assert_eq!(code(&[]).0, 1);
    let (allowed, text) = code(&["--allow", "segment-alignment"]);
    assert!(allowed == 0 && text.contains("(accepted by --allow)"), "{text}");
    let path = shipped.path("baseline.json");
    let baseline = ["--baseline", path.to_str().unwrap()];
    assert_eq!(code(&baseline).0, 2, "there is none yet");
    assert_eq!(code(&[&baseline[..], &["--write-baseline"]].concat()).0, 0);
    assert_eq!(code(&baseline).0, 0);
    let output = inspect(&scratch, &[&library], &["--sarif"]);
    assert_eq!(output.status.code(), Some(1));
    let results = report(&output)["runs"][0]["results"].clone();
    assert_eq!(results[0]["ruleId"], "segment-alignment");
}

/// root can read every file of a disk, but nobody can read /proc/PID/task/TID/clear_refs (proc(5)).
#[test]
fn what_cannot_be_read_is_not_called_sound() {
    let (scratch, shipped) = (Scratch::new(), Shipped::new(""));
    let output = inspect(&scratch, &[&shipped.path("bin"), Path::new("/proc/self/task")], &["--json"]);
    assert_eq!(output.status.code(), Some(2), "{}", message(&output));
    assert_eq!(report(&output)["verdict"], "incomplete");
}
