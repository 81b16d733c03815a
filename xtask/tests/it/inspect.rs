//! Tests `inspect` with executables that are built for these tests. A compiler or a change of bytes plants a fault in
//! some of them, and `inspect` must find each fault under its id. Sound executables must not be refused. readelf must
//! read the same as `inspect`. On an emulated core of the Pi 5, a refused executable must fail, and an accepted one
//! must run. `cargo xtask ci` runs these tests after a preflight, which asks for the compilers.

mod agree;
mod build;
mod distribution;
mod faults;
mod files;
mod many;
mod sound;
mod workload;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use inspect::elf::Elf;
use inspect::finding::{Report, Severity};
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::InspectArgs;
use xtask_inspection::Inspection;

use self::agree::{bracketed, disassembly, readelf};
use self::build::{Tool, build, sysroot};
use self::faults::{BUILT, PATCHED};
use self::sound::SOUND;
use crate::scratch::{Scratch, XTASK_INSPECT, message};

/// The directory with the executables, which are built once, and a sysroot for each architecture.
struct Corpus {
    directory: PathBuf,
    roots: [PathBuf; 2],
}

impl Corpus {
    fn root(&self, arch: VmArchitecture) -> &Path {
        arch.pick(&self.roots[0], &self.roots[1])
    }

    fn inspection(&self, arch: VmArchitecture, device: &str) -> Inspection {
        Inspection::from_args(&InspectArgs {
            arch: Some(arch),
            device: Some(device.to_owned()),
            sysroot: Some(self.root(arch).to_owned()),
            ..InspectArgs::default()
        })
        .unwrap()
    }

    fn look(&self, path: &Path, arch: VmArchitecture, device: &str) -> Report {
        self.inspection(arch, device).look_at(&std::fs::read(path).unwrap())
    }

    /// Runs an executable on an emulated core of the Pi 5, with 16 KiB pages and the sysroot's libraries.
    fn run(&self, path: &Path) -> ExitStatus {
        emulator()
            .args(["-cpu", "cortex-a76", "-p", "16384", "-L"])
            .arg(self.root(VmArchitecture::Aarch64))
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
    }
}

/// Returns a command that emulates one process.
fn emulator() -> Command {
    let program = ["qemu-aarch64-static", "qemu-aarch64"]
        .into_iter()
        .find(|name| xtask_core::host::tools::find(name).is_some())
        .expect("QEMU's user emulation: cargo xtask ci --fix installs it");
    Command::new(program)
}

fn corpus() -> &'static Corpus {
    static CORPUS: OnceLock<Corpus> = OnceLock::new();
    CORPUS.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("inspect-corpus");
        drop(std::fs::remove_dir_all(&directory));
        std::fs::create_dir_all(&directory).unwrap();
        let roots = VmArchitecture::ALL.map(|arch| sysroot(&directory, arch));
        libraries(&directory, &roots[1]);
        std::thread::scope(|scope| {
            let faults = scope.spawn(|| {
                for fault in BUILT {
                    let name = format!("fault-{}", fault.name);
                    build(&directory, &name, fault.tool, fault.flags, fault.source);
                }
            });
            for (name, tool, flags, source, _) in SOUND {
                build(&directory, &format!("sound-{name}"), *tool, flags, source);
            }
            faults.join().unwrap();
        });
        Corpus { directory, roots }
    })
}

/// Builds a library that the sysroot lacks, a library that needs the first one, and a newer version of a library that
/// the sysroot has.
fn libraries(directory: &Path, root: &Path) {
    let into = root.join("usr/lib/aarch64-linux-gnu");
    let text = "int nothing(void) { return 0; }\n";
    build(directory, "libabsent.so", Tool::Arm, "-shared -fPIC -Wl,-soname,libabsent.so.1", text);
    build(
        directory,
        "libbehind.so",
        Tool::Arm,
        "-shared -fPIC -Wl,-soname,libbehind.so.1 -Wl,--no-as-needed -L. -labsent",
        text,
    );
    std::fs::copy(directory.join("libbehind.so"), into.join("libbehind.so.1")).unwrap();
    let versions =
        [("old", "V_1 { global: older; };"), ("new", "V_1 { global: older; };\nV_2 { global: newer; } V_1;")];
    for (name, script) in versions {
        std::fs::write(directory.join(format!("{name}.map")), script).unwrap();
    }
    let flags = "-shared -fPIC -Wl,-soname,libversioned.so.1 -Wl,--version-script=";
    let old = build(
        directory,
        "libold.so",
        Tool::Arm,
        &format!("{flags}old.map"),
        "int older(void) { return 0; }\n",
    );
    std::fs::copy(old, into.join("libversioned.so.1")).unwrap();
    let both = "int older(void) { return 0; }\nint newer(void) { return 0; }\n";
    build(directory, "libversioned.so", Tool::Arm, &format!("{flags}new.map"), both);
}

/// Returns the ids of the findings that refuse.
fn refused(report: &Report) -> BTreeSet<&'static str> {
    report.refused().map(|finding| finding.id).collect()
}

#[test]
fn every_planted_fault_is_found_under_its_id() {
    let corpus = corpus();
    let mut wrong = Vec::new();
    for fault in BUILT {
        let arch =
            if fault.device.starts_with("x86") { VmArchitecture::X86_64 } else { VmArchitecture::Aarch64 };
        let report = corpus.look(&corpus.directory.join(format!("fault-{}", fault.name)), arch, fault.device);
        let mut ids = refused(&report);
        if fault.id == "interpreter" {
            // With the loader of another C library, the image also lacks that library.
            ids.remove("needed");
        }
        if ids != BTreeSet::from([fault.id]) {
            wrong.push(format!("{} should be refused for {}: {:#?}", fault.name, fault.id, report.findings));
        }
        let says = report.refused().all(|finding| {
            !finding.found.is_empty() && !finding.offers.is_empty() && !finding.remedy.is_empty()
        });
        assert!(
            says,
            "{}: a refusal must say what was found, what the target offers and what to do: {report:#?}",
            fault.name
        );
    }
    let sound = std::fs::read(corpus.directory.join("sound-dynamic")).unwrap();
    let inspection = corpus.inspection(VmArchitecture::Aarch64, "pi5");
    for (name, id, patch) in PATCHED {
        let mut bytes = sound.clone();
        patch(&mut bytes);
        std::fs::write(corpus.directory.join(format!("patched-{name}")), &bytes).unwrap();
        let report = inspection.look_at(&bytes);
        if !refused(&report).contains(id) {
            wrong.push(format!("{name} should be refused for {id}: {:#?}", report.findings));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), BUILT.len() + PATCHED.len(), wrong.join("\n"));
    assert!(BUILT.len() + PATCHED.len() >= 40);
}

#[test]
fn no_sound_executable_is_refused() {
    let corpus = corpus();
    let mut wrong = Vec::new();
    for (name, tool, _, _, device) in SOUND {
        let report = corpus.look(&corpus.directory.join(format!("sound-{name}")), tool.arch(), device);
        if !report.is_sound() {
            wrong.push(format!("{name} on {device}: {:#?}", report.refused().collect::<Vec<_>>()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), SOUND.len(), wrong.join("\n"));
    assert!(SOUND.len() >= 20);
}

#[test]
fn the_core_itself_agrees() {
    let corpus = corpus();
    let mut wrong = Vec::new();
    for fault in BUILT.iter().filter(|fault| fault.fails) {
        let path = corpus.directory.join(format!("fault-{}", fault.name));
        let status = corpus.run(&path);
        if status.success() {
            wrong.push(format!("{} is refused, and runs", fault.name));
        }
    }
    for (name, tool, _, _, device) in SOUND {
        let path = corpus.directory.join(format!("sound-{name}"));
        if tool.is_arm() && !corpus.run(&path).success() {
            wrong.push(format!("{name} is accepted on {device}, and does not run: {}", corpus.run(&path)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn readelf_reads_the_same() {
    let corpus = corpus();
    let mut compared = 0;
    for entry in std::fs::read_dir(&corpus.directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_executable = name.starts_with("sound-") && !name.contains('.');
        if !is_executable || name.ends_with(".o") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let elf = Elf::parse(&bytes).unwrap_or_else(|why| panic!("{name}: {why}"));
        agrees(&elf, &path);
        compared += 1;
    }
    assert!(compared >= SOUND.len(), "{compared}");
}

/// Checks that `inspect` and readelf read the same needed libraries, versions, loader, build id, segments and
/// functions.
fn agrees(elf: &Elf<'_>, path: &Path) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let dynamic = readelf(path, "--dynamic");
    let needed: Vec<_> = elf.dynamic.needed().map(text).collect();
    assert_eq!(needed, bracketed(&dynamic, "Shared library: ["), "{}", path.display());
    let headers = readelf(path, "--segments");
    let loader = elf.interpreter().unwrap().map(text);
    assert_eq!(
        loader.as_deref(),
        bracketed(&headers, "program interpreter: ").first().copied(),
        "{}",
        path.display()
    );
    let loads = headers.lines().filter(|line| line.trim_start().starts_with("LOAD ")).count();
    assert_eq!(elf.loads().count(), loads, "{}", path.display());
    let versions = readelf(path, "--version-info");
    let mut required: Vec<_> = elf.dynamic.required().map(|required| text(required.version)).collect();
    let mut theirs: Vec<_> = versions
        .lines()
        .filter(|line| line.contains("Flags:") && line.contains("Version:"))
        .filter_map(|line| Some(line.split_once("Name: ")?.1.split_whitespace().next()?.to_owned()))
        .collect();
    required.sort();
    theirs.sort();
    assert_eq!(required, theirs, "{}", path.display());
    let notes = readelf(path, "--notes");
    let id = notes.lines().find_map(|line| line.split_once("Build ID: ")).map(|(_, id)| id.trim().to_owned());
    let ours = elf.build_id().map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    assert_eq!(ours, id, "{}", path.display());
    let symbols = readelf(path, "--symbols");
    let functions = symbols
        .lines()
        .filter(|line| line.contains(" FUNC ") || line.contains(" IFUNC "))
        .filter(|line| !line.contains(" UND "))
        .count();
    let ours = elf.symbols().filter(|symbol| symbol.function).count();
    assert_eq!(ours, functions, "{}", path.display());
}

/// `inspect` must not refuse any program in the images of both Debian suites. For every 16th program, readelf must
/// read the same.
#[test]
fn no_program_of_the_distribution_is_refused() {
    for image in ["debian-12", "debian-13"] {
        let unpacked = distribution::unpack(image);
        let inspection = Inspection::from_args(&InspectArgs {
            arch: Some(VmArchitecture::Aarch64),
            device: Some("pi5".to_owned()),
            image: Some(image.to_owned()),
            ..InspectArgs::default()
        })
        .unwrap();
        assert!(inspection.source().is_some(), "the image's libraries are known once it is in the cache");
        let programs = distribution::programs(unpacked.path());
        assert!(programs.len() > 300, "{image} has {} programs", programs.len());
        let mut wrong = Vec::new();
        for (index, path) in programs.iter().enumerate() {
            let bytes = std::fs::read(path).unwrap();
            let report = inspection.look_at(&bytes);
            if !report.is_sound() {
                wrong.push(format!("{}: {:#?}", path.display(), report.refused().collect::<Vec<_>>()));
            }
            if index % 16 == 0 {
                agrees(&Elf::parse(&bytes).unwrap(), path);
            }
        }
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), programs.len(), wrong.join("\n"));
        println!("{image}: {} programs accepted", programs.len());
    }
}

#[test]
fn objdump_disassembles_the_same_at_what_is_refused() {
    let corpus = corpus();
    let mut compared = 0;
    for fault in BUILT.iter().filter(|fault| fault.id == "instructions" && fault.tool.is_arm()) {
        // binutils of Debian 12 cannot name the instructions of `mops`. `go-level` is refused for a build setting, not
        // for an instruction.
        if ["mops", "go-level"].contains(&fault.name) {
            continue;
        }
        let path = corpus.directory.join(format!("fault-{}", fault.name));
        let report = corpus.look(&path, VmArchitecture::Aarch64, fault.device);
        let detail = &report.refused().next().unwrap().details[0];
        let words: Vec<_> = detail.split(' ').collect();
        let address = u64::from_str_radix(words[2].trim_start_matches("0x"), 16).unwrap();
        // Disassemble with aliases and without them, because our decoder uses one of the two names.
        let message: String =
            ["aliases", "no-aliases"].iter().map(|names| disassembly(&path, address, names)).collect();
        assert!(message.contains(&format!("\t{}", words[0])), "{}: {detail}: {message}", fault.name);
        compared += 1;
    }
    assert!(compared >= 20, "{compared}");
}

#[test]
fn xtask_says_it_in_json_with_an_exit_code() {
    let corpus = corpus();
    let inspect = |name: &str, more: &[&str]| {
        let mut command = Command::new(XTASK_INSPECT);
        command
            .arg("inspect")
            .arg(corpus.directory.join(name))
            .args(["--device", "pi5", "--json"])
            .args(more);
        command.arg("--sysroot").arg(corpus.root(VmArchitecture::Aarch64)).output().unwrap()
    };
    for (name, code, verdict) in [("sound-rust", 0, "sound"), ("fault-sve", 1, "refused")] {
        let output = inspect(name, &[]);
        assert_eq!(output.status.code(), Some(code), "{name}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((json["schema"].as_u64(), json["verdict"].as_str()), (Some(1), Some(verdict)));
        assert!(json["findings"].as_array().unwrap().len() > 8);
    }
    let output = inspect("fault-sve", &["--quiet"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    for (arguments, words) in [
        (vec!["inspect", "/proc/nonexistent"], "/proc/nonexistent"),
        (vec!["inspect", "/bin/sh", "--device", "pi9"], "there are"),
        (vec!["inspect", "/bin/sh", "--image", "ubuntu-95"], "there are"),
        (vec!["inspect", "/bin/sh", "--sysroot", "/proc/nonexistent"], "not a directory"),
    ] {
        let output = Command::new(XTASK_INSPECT).args(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{arguments:?}");
    }
}

/// If the image is not in the cache, only the catalogue's facts are known. The inspection says what it could not check.
#[test]
fn without_the_image_the_release_is_known_and_the_rest_is_said() {
    let corpus = corpus();
    let empty = Scratch::new();
    let inspect = |name: &str| {
        let path = corpus.directory.join(name);
        let inspect = ["inspect", path.to_str().unwrap(), "--arch", "aarch64", "--image", "debian-12"];
        let output = empty.run(XTASK_INSPECT, &inspect);
        (output.status.code(), message(&output))
    };
    let (code, message) = inspect("patched-later-glibc");
    assert!(code == Some(1) && message.contains("glibc 2.36, by the catalogue"), "{message}");
    let (code, message) = inspect("sound-cxx");
    assert_eq!(code, Some(0), "{message}");
    assert!(
        message.contains("not checked: whether libstdc++.so.6")
            && message.contains("cargo xtask image fetch debian-12"),
        "{message}"
    );
    assert!(
        corpus
            .look(&corpus.directory.join("sound-cxx"), VmArchitecture::Aarch64, "pi5")
            .of(Severity::Warned)
            .count()
            < 2
    );
}
