//! The kernel of the machine: a package of Debian, which apt downloads and verifies. The cache keeps the kernel and
//! the modules that a machine needs.
//!
//! ```text
//! kernels/<key>/vmlinuz          the kernel
//! kernels/<key>/version          the name of the package's file
//! kernels/<key>/modules/NN-name  the modules, in the order in which they are loaded, without compression
//! kernels/<key>.making/          a kernel that is being made; if its run died, the next one deletes it
//! kernels/<key>.lock             held while a process makes, uses or deletes the kernel
//! ```

use std::ffi::OsString;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
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

/// The reason why a machine needs a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Always,
    /// A directory of this host is shared with the machine.
    Share,
    /// The machine has the disk of an image.
    Disk,
}

/// The modules, in the order in which they are loaded: no module needs one after it. Each of them is a file of the
/// package or built into the kernel.
const MODULES: &[(Use, &str)] = &[
    // The devices of QEMU.
    (Use::Always, "virtio"),
    (Use::Always, "virtio_ring"),
    (Use::Always, "virtio_pci_legacy_dev"),
    (Use::Always, "virtio_pci_modern_dev"),
    (Use::Always, "virtio_pci"),
    (Use::Always, "virtio_console"),
    (Use::Share, "netfs"),
    (Use::Share, "9pnet"),
    (Use::Share, "9pnet_virtio"),
    (Use::Share, "9p"),
    // The writable layer above shares and disks.
    (Use::Always, "overlay"),
    // ext4 asks for crc32c by the name of an algorithm, which no file of the initramfs answers.
    (Use::Disk, "virtio_blk"),
    (Use::Disk, "crc32c_generic"),
    (Use::Disk, "crc16"),
    (Use::Disk, "mbcache"),
    (Use::Disk, "jbd2"),
    (Use::Disk, "ext4"),
];

/// A kernel that a run can boot.
#[derive(Debug)]
pub(crate) struct Bootable {
    /// The kernel, in the directory of the run.
    pub(crate) image: PathBuf,
    /// The names of the modules' files and their contents, in the order in which they are loaded.
    pub(crate) modules: Vec<(String, Vec<u8>)>,
}

/// Returns the kernel with the modules for `uses`, and downloads it if it is not in the cache.
pub(crate) fn ensure(cache: &Cache, kernel: Kernel, uses: &[Use], run: &RunDir, ui: &Ui) -> Result<Bootable> {
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
    prepare_for_run(&directory, &run.work(), uses)
}

/// Gives a run its own name of the kernel, and reads the modules for `uses`. After that, the run needs no lock: another
/// process may delete the directory.
fn prepare_for_run(directory: &Path, work: &Path, uses: &[Use]) -> Result<Bootable> {
    let (kept, image) = (directory.join("vmlinuz"), work.join("vmlinuz"));
    match std::fs::hard_link(&kept, &image) {
        // The kernels may be on another file system, behind a symbolic link.
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            fs_err::copy(&kept, &image)?;
        }
        linked => linked.with_context(|| format!("link {} to {}", kept.display(), image.display()))?,
    }
    let mut modules = Vec::new();
    for (number, (needed, name)) in MODULES.iter().enumerate() {
        let name = module_file_name(number, name);
        let path = directory.join("modules").join(&name);
        // A module without a file is built into the kernel.
        if uses.contains(needed) && path.exists() {
            modules.push((name, fs_err::read(&path)?));
        }
    }
    Ok(Bootable { image, modules })
}

/// Returns the name of a module's file in the cache.
fn module_file_name(number: usize, name: &str) -> String {
    format!("{number:02}-{name}.ko")
}

/// Returns the content of a module without compression. The emulated machine would take longer to decompress it.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let content = fs_err::read(path)?;
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("ko") => Ok(content),
        Some("xz") => {
            let mut plain = Vec::new();
            lzma_rust2::XzReader::new(content.as_slice(), true)
                .read_to_end(&mut plain)
                .with_context(|| format!("decompress {}", path.display()))?;
            Ok(plain)
        }
        _ => bail!("decompress {}: it is not compressed with xz", path.display()),
    }
}

/// Makes the kernel's directory beside its final place, and renames it when it is complete. The caller holds the lock.
fn make(cache: &Cache, kernel: Kernel, run: &RunDir, ui: &Ui) -> Result<String> {
    let making = cache.kernels().join(format!("{}.making", kernel.key()));
    // The processes of a run that died were ended when this run began.
    remove_tree(&making)?;
    make_own_dir(&making)?;
    let made = download(&making, kernel, run, ui).and_then(|()| keep_needed_files(&making));
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
    // apt reads APT_CONFIG before any other file, and `Dir` then keeps it from this host's own files. As root, apt
    // would download as the user _apt, who may not enter the cache.
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
fn keep_needed_files(directory: &Path) -> Result<String> {
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
    for (number, (_, name)) in MODULES.iter().enumerate() {
        let is_it =
            |path: &&PathBuf| file_name(path).split_once(".ko").is_some_and(|(stem, _)| stem == *name);
        match files.iter().find(is_it) {
            Some(path) => {
                let place = directory.join("modules").join(module_file_name(number, name));
                write_private(&place, read_module(path)?)?;
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
    use std::io::Write as _;

    use xtask_core::fs::{MARKER, is_own};

    use super::*;

    /// Makes the tree of a package in which `missing` is neither a file nor built in.
    fn unpacked(missing: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        put(MARKER, b"");
        put("linux-image-6.12.1-arm64_6.12.1-1_arm64.deb", b"package");
        put("data.tar", b"");
        put("tree/boot/vmlinuz-6.12.1-arm64", b"kernel");
        let (builtin, files) = MODULES.split_at(6);
        for (_, name) in files.iter().filter(|(_, name)| *name != missing) {
            put(&format!("tree/usr/lib/modules/6.12.1/kernel/fs/{name}.ko.xz"), &xz(name.as_bytes()));
        }
        let line = |(_, name): &(Use, &str)| format!("kernel/drivers/{name}.ko\n");
        let lines: String = builtin.iter().filter(|(_, name)| *name != missing).map(line).collect();
        put("tree/usr/lib/modules/6.12.1/modules.builtin", lines.as_bytes());
        directory
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut writer =
            lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn a_module_is_decompressed() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str, bytes: &[u8]| {
            std::fs::write(directory.path().join(name), bytes).unwrap();
            read_module(&directory.path().join(name))
        };
        assert_eq!(read("a.ko.xz", &xz(b"code")).unwrap(), b"code");
        assert_eq!(read("a.ko", b"code").unwrap(), b"code");
        for name in ["a.ko.xz", "a.ko.zst"] {
            assert!(read(name, b"code").unwrap_err().to_string().starts_with("decompress "));
        }
    }

    #[test]
    fn only_the_kernel_and_its_modules_stay() {
        let directory = unpacked("");
        let version = keep_needed_files(directory.path()).unwrap();
        assert_eq!(version, "linux-image-6.12.1-arm64_6.12.1-1_arm64.deb");
        let mut left: Vec<_> = entries(directory.path()).map(|path| file_name(&path)).collect();
        left.sort();
        assert_eq!(left, [MARKER, "modules", "version", "vmlinuz"]);
        assert!(is_own(directory.path()));
        let work = tempfile::tempdir().unwrap();
        let names = |uses: &[Use], work: &Path| {
            let Bootable { image, modules } = prepare_for_run(directory.path(), work, uses).unwrap();
            std::fs::remove_file(image).unwrap();
            modules.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let shares = ["06-netfs.ko", "07-9pnet.ko", "08-9pnet_virtio.ko", "09-9p.ko", "10-overlay.ko"];
        assert_eq!(names(&[Use::Always, Use::Share], work.path()), shares);
        assert_eq!(names(&[Use::Always, Use::Disk], work.path())[..2], ["10-overlay.ko", "11-virtio_blk.ko"]);
        let Bootable { image, modules } =
            prepare_for_run(directory.path(), work.path(), &[Use::Always]).unwrap();
        std::fs::remove_dir_all(directory.path()).unwrap();
        assert_eq!(std::fs::read_to_string(image).unwrap(), "kernel");
        assert_eq!(modules, [("10-overlay.ko".to_owned(), b"overlay".to_vec())]);
    }

    #[test]
    fn a_package_without_a_module_is_refused() {
        for missing in [MODULES[0].1, MODULES[MODULES.len() - 1].1] {
            let error = keep_needed_files(unpacked(missing).path()).unwrap_err().to_string();
            assert!(error.ends_with(&format!("has no module {missing}")), "{error}");
        }
    }

    #[test]
    fn only_debians_keys_count() {
        let lines = sources(&["deb http://m/debian trixie main".to_owned()]);
        assert_eq!(lines, format!("deb [signed-by={DEBIAN_KEYRING}] http://m/debian trixie main\n"));
    }
}
