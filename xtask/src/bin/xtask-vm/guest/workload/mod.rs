//! The smoke's workload as a container image: one of [`programs`], compiled for the guest, and packed by [`archive`] in a
//! form that podman loads. `torture` also has the device pull an image with this program from a registry.

mod archive;
mod programs;

use anyhow::{Context, Result};
use xtask_core::arch::VmArchitecture;
use xtask_core::build::standalone::Standalone;
use xtask_core::cache::Cache;
use xtask_core::workspace::Workspace;
use xtask_fleet::RegistryImage;
use xtask_inspection::check_header;

pub(crate) use archive::PROGRAM;
use archive::Packed;

/// The reference of the image in the archive.
pub(crate) const IMAGE: &str = "localhost/iot-workload:1";

/// The path and the content of the file that only the image of the registry has. The file is in the layer below the
/// program. Therefore the two images have no layer in common, and a loss names the layer of one of them.
pub(crate) const PULLED_FILE: (&str, &[u8]) = ("pulled", b"This image comes from a registry.\n");

/// The program and the archive of the image that runs it.
pub(crate) struct Workload {
    pub(crate) program: Vec<u8>,
    pub(crate) archive: Vec<u8>,
}

/// The programs of the workload's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Sound,
    /// The program of the planted fault `small-pages`.
    SmallPages,
    /// The program of the planted fault `unsynced-volume`.
    UnsyncedVolume,
}

/// Returns the name of the archive's file in the directory in which the agent looks for images. The name is the image's
/// reference in the form of a file name.
pub(crate) fn file_name() -> String {
    format!("{}.tar", IMAGE.replace(['/', ':'], "_"))
}

/// Returns the workload for `arch`.
///
/// # Errors
/// Returns an error if rustc fails, or if the linker's output is not an executable for `arch`.
pub(crate) fn made(
    workspace: &Workspace,
    cache: &Cache,
    arch: VmArchitecture,
    program: Program,
) -> Result<Workload> {
    let source = match program {
        Program::Sound => programs::SOUND,
        Program::SmallPages => programs::SMALL_PAGES,
        Program::UnsyncedVolume => programs::UNSYNCED_VOLUME,
    };
    let program = compiled(&source, workspace, cache, arch).context("compile the smoke's workload")?;
    let packed = Packed::new(arch.profile().debian_arch, &[&[file_of(&program)]]);
    let archive = packed
        .and_then(|packed| packed.archive(IMAGE))
        .context("pack the workload's image for an archive")?;
    Ok(Workload { program, archive })
}

/// Returns the image with the workload's program that a registry has for `arch`.
pub(crate) fn in_registry(arch: VmArchitecture, program: &[u8]) -> Result<RegistryImage> {
    let (path, content) = PULLED_FILE;
    let layers = [[(path.to_owned(), 0o644, content)], [file_of(program)]];
    let Packed { manifest, config, layers } =
        Packed::new(arch.profile().debian_arch, &[&layers[0], &layers[1]])
            .context("pack the workload's image for a registry")?;
    let blobs = [vec![config], layers].concat();
    Ok(RegistryImage { repository: "iot-workload".to_owned(), tag: "1".to_owned(), manifest, blobs })
}

/// Returns the workload's program as a file of an image.
fn file_of(program: &[u8]) -> archive::ImageFile<'_> {
    (PROGRAM.to_owned(), 0o755, program)
}

fn compiled(
    source: &Standalone,
    workspace: &Workspace,
    cache: &Cache,
    arch: VmArchitecture,
) -> Result<Vec<u8>> {
    let (program, path) = source.executable(workspace, cache, arch)?;
    check_header(&program, arch).with_context(|| format!("check {}", path.display()))?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::process::{Command, Output};

    use super::*;

    /// podman with a store of its own, for a build machine: it has no systemd, and crun of Debian 12 refuses its cgroup
    /// layout. Therefore the tests use runc (`cargo xtask ci --fix` installs podman and runc).
    struct Podman {
        directory: tempfile::TempDir,
    }

    impl Podman {
        fn run(&self, arguments: &[&str]) -> Output {
            let path = |name: &str| self.directory.path().join(name);
            let mut command = Command::new("podman");
            command.arg("--root").arg(path("root")).arg("--runroot").arg(path("runroot"));
            command.args(["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
            command.args(["--storage-driver", "vfs"]).args(arguments);
            command.output().expect("run podman: cargo xtask ci --fix installs it")
        }

        fn says(&self, arguments: &[&str]) -> String {
            let output = self.run(arguments);
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        }
    }

    fn image(cache: &Cache, arch: VmArchitecture) -> Vec<u8> {
        made(&Workspace::find().unwrap(), cache, arch, Program::Sound).unwrap().archive
    }

    #[test]
    fn podman_loads_and_runs_it_and_ends_it_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let podman = Podman { directory: tempfile::tempdir().unwrap() };
        let archive = directory.path().join(file_name());
        let load = |bytes: &[u8]| {
            std::fs::write(&archive, bytes).unwrap();
            podman.says(&["load", "--quiet", "--input", archive.to_str().unwrap()])
        };
        let host = VmArchitecture::of_host().unwrap();
        let architecture = ["image", "inspect", "--format", "{{.Os}}/{{.Architecture}}", IMAGE];
        for arch in VmArchitecture::ALL.into_iter().filter(|arch| *arch != host).chain([host]) {
            assert!(load(&image(&cache, arch)).contains(IMAGE));
            assert_eq!(podman.says(&architecture), format!("linux/{}", arch.profile().debian_arch));
        }
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--network", "none"];
        let named = ["--name", "w", "--volume", "data:/data", "--env", "GENERATION=3"];
        for starts in 1..=2 {
            podman.says(&[&["run", "--detach"], limits.as_slice(), named.as_slice(), &[IMAGE]].concat());
            let started = std::time::Instant::now();
            // A process that has not started yet would be ended before it answers.
            while podman.says(&["logs", "w"]).is_empty() {
                assert!(started.elapsed() < xtask_core::limits::SERVER_START, "it has not answered");
                std::thread::sleep(xtask_core::limits::POLL);
            }
            let stopped = std::time::Instant::now();
            podman.says(&["stop", "--time", "30", "w"]);
            assert!(
                stopped.elapsed() < xtask_core::limits::CHILD_STOP,
                "SIGTERM ends the first process of a container"
            );
            let answer: xtask_core::report::WorkloadEvidence =
                serde_json::from_str(&podman.says(&["logs", "w"])).unwrap();
            assert_eq!(
                (answer.machine.as_str(), answer.generation, answer.starts),
                (host.profile().machine, 3, starts)
            );
            assert_eq!(answer.page_size, Some(rustix::param::page_size() as u64));
            assert_eq!(
                answer.boot_id,
                std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim()
            );
            assert_eq!(podman.says(&["inspect", "--format", "{{.State.ExitCode}}", "w"]), "0");
            podman.says(&["rm", "w"]);
        }
        podman.says(&["rmi", "--all", "--force"]);
    }

    #[test]
    fn podman_pulls_another_image_with_the_program_from_a_registry() {
        let directory = tempfile::tempdir().unwrap();
        let podman = Podman { directory: tempfile::tempdir().unwrap() };
        let host = VmArchitecture::of_host().unwrap();
        let workspace = Workspace::find().unwrap();
        let Workload { program, archive } =
            made(&workspace, &Cache::at(directory.path()), host, Program::Sound).unwrap();
        let image = in_registry(host, &program).unwrap();
        let registry =
            xtask_fleet::Registry::start(directory.path(), None, &xtask_jobs::Ui::quiet()).unwrap();
        registry.add(&image).unwrap();
        let reference = image.reference("127.0.0.1", registry.port());
        let pulled = podman.says(&["pull", "--quiet", "--tls-verify=false", &reference]);
        let mounted = std::path::PathBuf::from(podman.says(&["image", "mount", &reference]));
        assert_eq!(std::fs::read(mounted.join(PROGRAM)).unwrap(), program);
        assert_eq!(std::fs::read(mounted.join(PULLED_FILE.0)).unwrap(), PULLED_FILE.1);
        let path = directory.path().join(file_name());
        std::fs::write(&path, archive).unwrap();
        podman.says(&["load", "--quiet", "--input", path.to_str().unwrap()]);
        let layers = |reference: &str| {
            let layers = podman.says(&["image", "inspect", "--format", "{{.RootFS.Layers}}", reference]);
            (podman.says(&["image", "inspect", "--format", "{{.Id}}", reference]), layers)
        };
        let (of_archive, of_registry) = (layers(IMAGE), layers(&reference));
        assert!(of_registry.0 == pulled && of_archive.0 != pulled, "{of_archive:?} {of_registry:?}");
        assert_eq!([&of_archive, &of_registry].map(|(_, layers)| layers.matches("sha256:").count()), [1, 2]);
        podman.says(&["image", "unmount", &reference]);
        podman.says(&["rmi", "--all", "--force"]);
        registry.stop().unwrap();
    }

    #[test]
    fn the_same_source_is_the_same_archive_and_is_compiled_once() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let host = VmArchitecture::of_host().unwrap();
        let first = image(&cache, host);
        let kept: Vec<_> =
            std::fs::read_dir(cache.workloads()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(kept.len(), 2, "the executable and its digest: {kept:?}");
        let executable = kept.iter().find(|path| path.extension().is_none()).unwrap();
        let inode = || executable.metadata().unwrap().ino();
        let before = inode();
        assert_eq!(image(&cache, host), first);
        assert_eq!(inode(), before, "it was compiled again");
        std::fs::remove_file(executable).unwrap();
        assert!(image(&cache, host) == first, "compiled again it is the same");
        assert_eq!(file_name(), "localhost_iot-workload_1.tar");
    }
}
