//! The kernel of the machine: a package of Debian, which apt downloads and verifies. The cache keeps the kernel and
//! the modules that a machine needs.
//!
//! ```text
//! kernels/<key>/vmlinuz          the kernel
//! kernels/<key>/version          the name of the package's file
//! kernels/<key>/modules/NN-name  the modules, in the order in which they are loaded
//! kernels/<key>.making/          a kernel that is being made; if its run died, the next one deletes it
//! kernels/<key>.lock             held while a process makes, borrows or deletes the kernel
//! ```

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask_core::cache::Cache;
use xtask_core::error::host_fault;
use xtask_core::fs::{
    directories, entries, lock, make_own_dir, make_private_dir, remove_tree, write_private,
};
use xtask_core::host::local::DEBIAN_KEYRING;
use xtask_core::host::tools;
use xtask_core::kernel::{Kernel, SUITE};
use xtask_core::runs::RunDir;
use xtask_jobs::child::{self, Job};
use xtask_jobs::{Step, Ui, mirror};

/// The script that downloads and unpacks the package.
const SCRIPT: &str = include_str!("kernel.sh");

/// The modules, in the order in which they are loaded: no module needs one after it. Each of them is a file of the
/// package or built into the kernel.
const MODULES: &[&str] = &[
    // The devices of QEMU.
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
    // The shares with this host, and the writable layer above them.
    "netfs",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
    // The disk of an image. ext4 asks for crc32c by the name of an algorithm, which no file of the initramfs answers.
    "virtio_blk",
    "crc32c_generic",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
];

/// A kernel that a run can boot.
#[derive(Debug)]
pub(crate) struct Bootable {
    /// The kernel, in the directory of the run.
    pub(crate) image: PathBuf,
    /// The names of the modules' files and their contents, in the order in which they are loaded.
    pub(crate) modules: Vec<(String, Vec<u8>)>,
}

/// Returns the kernel, and downloads it if it is not in the cache.
pub(crate) fn ensure(cache: &Cache, kernel: Kernel, run: &RunDir, ui: &Ui) -> Result<Bootable> {
    make_private_dir(&cache.kernels())?;
    let _held = lock(&cache.kernels().join(format!("{}.lock", kernel.key())), || ui.check())?;
    let directory = kernel.directory(cache);
    if !directory.exists() {
        let step = Step { kind: "kernel", what: kernel.package, title: "kernel" };
        ui.step(cache, step, || {
            let version = make(cache, kernel, run, ui).map_err(|error| {
                let attempted = format!("get the package {} of Debian {SUITE} for the cache", kernel.package);
                host_fault(
                    error,
                    attempted,
                    "connect this host to its package mirror; the next try needs no network",
                )
            })?;
            Ok(((), version))
        })?;
    }
    // The time of the last use, for `image prune`.
    write_private(&directory.join("used"), "")?;
    borrow(&directory, &run.work())
}

/// Gives a run its own name of the kernel, and reads the modules. After that, the run needs no lock: another process may
/// delete the directory.
fn borrow(directory: &Path, work: &Path) -> Result<Bootable> {
    let (kept, image) = (directory.join("vmlinuz"), work.join("vmlinuz"));
    match std::fs::hard_link(&kept, &image) {
        // The kernels may be on another file system, behind a symbolic link.
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            fs_err::copy(&kept, &image)?;
        }
        linked => linked.with_context(|| format!("link {} to {}", kept.display(), image.display()))?,
    }
    let mut modules = Vec::new();
    for path in entries(&directory.join("modules")) {
        modules.push((file_name(&path), fs_err::read(&path)?));
    }
    modules.sort();
    Ok(Bootable { image, modules })
}

/// Makes the kernel's directory beside its final place, and renames it when it is complete. The caller holds the lock.
fn make(cache: &Cache, kernel: Kernel, run: &RunDir, ui: &Ui) -> Result<String> {
    let making = cache.kernels().join(format!("{}.making", kernel.key()));
    // The processes of a run that died were ended when this run began.
    remove_tree(&making)?;
    make_own_dir(&making)?;
    let made = download(&making, kernel, run, ui).and_then(|()| arrange(&making));
    let version = made.inspect_err(|_| drop(remove_tree(&making)))?;
    fs_err::rename(&making, kernel.directory(cache))?;
    Ok(version)
}

fn download(directory: &Path, kernel: Kernel, run: &RunDir, ui: &Ui) -> Result<()> {
    let configuration = configure(directory, kernel.arch.profile().debian_arch, ui)?;
    write_private(&directory.join("kernel.sh"), SCRIPT)?;
    let mut environment = mirror::proxies(ui)?;
    environment.push(("APT_CONFIG", configuration.into()));
    let change = r#"cd "$1" && exec sh ./kernel.sh "$2""#;
    let arguments = ["-c".into(), change.into(), "sh".into(), directory.into(), kernel.package.into()];
    let log = directory.join("log");
    let (program, arguments) = (tools::require("sh")?, arguments.into_iter().collect::<Vec<OsString>>());
    for name in ["apt-get", "dpkg-deb"] {
        tools::require(name)?;
    }
    let job = Job { program: &program, arguments, owner: &run.work(), log: log.clone(), environment };
    child::run(&job, ui, || child::last_lines(&log, 1).pop().unwrap_or_default())
}

/// Writes a configuration with which apt uses only files below `directory`, this host's mirror, and Debian's keys.
/// Returns its path.
fn configure(directory: &Path, arch: &str, ui: &Ui) -> Result<PathBuf> {
    let apt = directory.join("apt");
    for part in ["apt.conf.d", "preferences.d", "sources.list.d", "trusted.gpg.d"] {
        make_private_dir(&apt.join("etc/apt").join(part))?;
    }
    for part in ["lib/apt/lists/partial", "cache/apt/archives/partial"] {
        make_private_dir(&apt.join("var").join(part))?;
    }
    let mut lines = mirror::debian_sources(SUITE, ui)?;
    if lines.is_empty() {
        lines = mirror::public_sources(SUITE);
    }
    write_private(&apt.join("etc/apt/sources.list"), sources(&lines))?;
    write_private(&apt.join("status"), "")?;
    let path = directory.join("apt.conf");
    // apt reads APT_CONFIG before any other file, and `Dir` then keeps it from this host's own files. As root, apt would
    // download as the user _apt, who may not enter the cache.
    let text = format!(
        "Dir \"{0}\";\nDir::State::status \"{0}/status\";\nAPT::Architecture \"{arch}\";\n\
         APT::Architectures {{ \"{arch}\"; }};\nAPT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n",
        apt.display()
    );
    write_private(&path, text)?;
    Ok(path)
}

/// Adds Debian's keyring to source lines, so that no other key of this host counts.
fn sources(lines: &[String]) -> String {
    let signed = format!("deb [signed-by={DEBIAN_KEYRING}] ");
    lines.iter().map(|line| line.replacen("deb ", &signed, 1) + "\n").collect()
}

/// Keeps the kernel and its modules, and deletes everything else. Returns the name of the package's file.
fn arrange(directory: &Path) -> Result<String> {
    let package = entries(directory).find(|path| path.extension().is_some_and(|ending| ending == "deb"));
    let version = file_name(&package.context("find the package that apt downloaded")?);
    let tree = directory.join("tree");
    let files = files(&tree);
    let kernel = files.iter().find(|path| file_name(path).starts_with("vmlinuz-"));
    fs_err::rename(
        kernel.with_context(|| format!("find the kernel in {version}"))?,
        directory.join("vmlinuz"),
    )?;
    let list = files.iter().find(|path| file_name(path) == "modules.builtin");
    let builtin =
        fs_err::read_to_string(list.with_context(|| format!("find modules.builtin in {version}"))?)?;
    make_private_dir(&directory.join("modules"))?;
    for (number, name) in MODULES.iter().enumerate() {
        let is_it =
            |path: &&PathBuf| file_name(path).split_once(".ko").is_some_and(|(stem, _)| stem == *name);
        match files.iter().find(is_it) {
            Some(path) => {
                let place = directory.join("modules").join(format!("{number:02}-{}", file_name(path)));
                fs_err::rename(path, place)?;
            }
            None => {
                let is_builtin = builtin.lines().any(|line| line.ends_with(&format!("/{name}.ko")));
                anyhow::ensure!(is_builtin, "{version} has no module {name}");
            }
        }
    }
    write_private(&directory.join("version"), &version)?;
    for path in entries(directory) {
        let keep = ["vmlinuz", "modules", "version", xtask_core::fs::MARKER];
        match keep.contains(&file_name(&path).as_str()) {
            true => {}
            false if path.is_dir() => remove_tree(&path)?,
            false => fs_err::remove_file(&path)?,
        }
    }
    Ok(version)
}

/// Returns the files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let own = entries(directory).filter(|path| path.is_file());
    own.chain(directories(directory).iter().flat_map(|path| files(path))).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use xtask_core::fs::{MARKER, is_own};

    use super::*;

    /// Makes the tree of a package in which `missing` is neither a file nor built in.
    fn unpacked(missing: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put(MARKER, "");
        put("linux-image-6.12.1-arm64_6.12.1-1_arm64.deb", "package");
        put("data.tar", "");
        put("tree/boot/vmlinuz-6.12.1-arm64", "kernel");
        let (files, builtin) = MODULES.split_at(3);
        for name in files.iter().filter(|name| **name != missing) {
            put(&format!("tree/usr/lib/modules/6.12.1/kernel/fs/{name}.ko.xz"), name);
        }
        let line = |name: &&str| format!("kernel/drivers/{name}.ko\n");
        let lines: String = builtin.iter().filter(|name| **name != missing).map(line).collect();
        put("tree/usr/lib/modules/6.12.1/modules.builtin", &lines);
        directory
    }

    #[test]
    fn only_the_kernel_and_its_modules_stay() {
        let directory = unpacked("");
        let version = arrange(directory.path()).unwrap();
        assert_eq!(version, "linux-image-6.12.1-arm64_6.12.1-1_arm64.deb");
        let mut left: Vec<_> = entries(directory.path()).map(|path| file_name(&path)).collect();
        left.sort();
        assert_eq!(left, [MARKER, "modules", "version", "vmlinuz"]);
        assert!(is_own(directory.path()));
        let work = tempfile::tempdir().unwrap();
        let Bootable { image, modules } = borrow(directory.path(), work.path()).unwrap();
        std::fs::remove_dir_all(directory.path()).unwrap();
        assert_eq!(std::fs::read_to_string(image).unwrap(), "kernel");
        let names: Vec<_> = modules.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["00-virtio.ko.xz", "01-virtio_ring.ko.xz", "02-virtio_pci_legacy_dev.ko.xz"]);
    }

    #[test]
    fn a_package_without_a_module_is_refused() {
        for missing in [MODULES[0], MODULES[MODULES.len() - 1]] {
            let error = arrange(unpacked(missing).path()).unwrap_err().to_string();
            assert!(error.ends_with(&format!("has no module {missing}")), "{error}");
        }
    }

    #[test]
    fn only_debians_keys_count() {
        let lines = sources(&["deb http://m/debian trixie main".to_owned()]);
        assert_eq!(lines, format!("deb [signed-by={DEBIAN_KEYRING}] http://m/debian trixie main\n"));
    }
}
