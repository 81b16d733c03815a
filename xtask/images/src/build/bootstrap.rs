//! Runs mmdebstrap, which makes a distribution's directory tree from its packages and packs the tree as a tar file. If
//! there is enough memory, the tree is in a tmpfs. If this host can run the guest's programs only under emulation, its
//! own tools replace them while packages are configured.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;
use xtask_core::arch::VmArchitecture;
use xtask_core::format::name_of;
use xtask_core::fs::write_private;
use xtask_core::host::local::DEBIAN_KEYRING;
use xtask_core::host::memory;
use xtask_core::host::mounts::can_have_own_mounts;
use xtask_core::host::tools;
use xtask_core::image::scripts::TOOLS;
use xtask_core::image::{Image, Recipe};

use super::run;
use crate::store::Store;
use xtask_jobs::child::Job;
use xtask_jobs::mirror;

/// The script that downloads and decompresses packages while mmdebstrap runs.
pub(super) const AHEAD: &str = include_str!("ahead.sh");
/// The script that decompresses packages.
pub(super) const STORE: &str = include_str!("store.sh");
/// The script that moves work of maintainer scripts into background jobs. It moves only work whose results maintainer
/// scripts do not read.
pub(super) const LATER: &str = include_str!("later.sh");
/// The script that waits for the jobs, and deletes the files that [`AHEAD`] and [`LATER`] made.
pub(super) const FINISH: &str = include_str!("finish.sh");
/// The script that replaces the guest's tools in the new tree by this host's build of them. It runs before the packages
/// of the tree are configured, so that these tools need no emulation.
pub(super) const ACCELERATE: &str = include_str!("accelerate.sh");
/// The script that runs in the new tree before the tree is packed.
pub(super) const CUSTOMIZE: &str = include_str!("customize.sh");
/// The script that makes the initramfs from the guest's own programs.
pub(super) const INITRAMFS: &str = include_str!("initramfs.sh");
/// The script that puts the guest's own tools back.
pub(super) const RESTORE: &str = include_str!("restore.sh");
/// The size of the tmpfs for a tree and its packages.
const TMPFS: &str = "3g";
/// Bytes of memory that must be available for the tmpfs. The rest of the machine needs some memory too.
const MEMORY_FOR_TMPFS: u64 = 5 << 30;

/// Mounts a tmpfs for mmdebstrap's tree, in a mount namespace that unshare(1) has made. $1 is the mount point, $2 the
/// size, and the other arguments are the command to run afterwards.
const IN_MEMORY: &str = r#"mount -t tmpfs -o "size=$2,mode=755" tmpfs "$1" && TMPDIR=$1 && export TMPDIR && shift 2 && exec "$@""#;
/// The setup hook that mounts such a tmpfs if mmdebstrap runs as an ordinary user, in a user namespace. $1 is the
/// tree, whose few files are copied into the tmpfs.
const IN_MEMORY_AS_USER: &str = r#"mount --no-mtab -t tmpfs -o "size=$IOT_TMPFS,mode=755" tmpfs /mnt && cp -a "$1/." /mnt/ && mount --no-mtab --move /mnt "$1""#;

/// The directory with the hooks by which mmdebstrap merges /bin and /lib into /usr. The second of them would call apt
/// once more, for one package.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/merged-usr";
/// The essential hook that waits until the download ahead ([`AHEAD`]) is complete or has failed. apt installs the
/// other packages after this hook.
const DOWNLOADED: &str = r#"while [ -e "$1/.ahead/go" ] && [ ! -e "$1/.ahead/linked" ] && ! flock -n "$1/.ahead/worker" true; do sleep 0.02; done"#;

/// The speed of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speed {
    /// The build is as fast as this host allows.
    Full,
    /// The build runs mmdebstrap without any acceleration. `bench image` compares both.
    Plain,
}

/// Makes the image's tree and packs it as `root.tar` in `directory`.
pub fn bootstrap(
    store: &Store<'_>,
    directory: &Path,
    image: &Image,
    recipe: &Recipe,
    speed: Speed,
) -> Result<()> {
    let packages = recipe.packages.join(",");
    let mut call = Call::new(image.arch, &recipe.suite, "root.tar");
    call.words.extend(["--variant=minbase".to_owned(), format!("--include={packages}")]);
    if speed == Speed::Plain {
        call.words.push(format!("--hook-dir={MERGED_USR}"));
        return call.make(store, directory);
    }
    // The second hook in the directory would install this package.
    call.words.push("--include=usr-is-merged".to_owned());
    call.words.push(format!("--setup-hook={MERGED_USR}/setup00.sh"));
    call.memory = in_memory(store);
    if call.memory.is_some() {
        call.environment.push(("IOT_STORE", STORE.to_owned()));
        call.words.push(format!("--setup-hook={AHEAD}"));
        call.words.push(format!("--essential-hook={DOWNLOADED}"));
    }
    call.words.push(format!("--extract-hook={LATER}"));
    // Without this, the installation of the kernel would make an initramfs, and the last step would make it again.
    call.environment.push(("INITRD", "No".to_owned()));
    call.environment.push(("IOT_LAYOUT", name_of(&recipe.layout)));
    call.environment.push(("IOT_LOGIN_USER", image.login_user.clone()));
    call.environment.push(("IOT_SUITE", recipe.suite.clone()));
    let foreign_host = VmArchitecture::of_host().filter(|host| *host != image.arch);
    if let Some(host) = foreign_host {
        let mut tools = Call::new(host, &recipe.suite, "tools.tar");
        tools.words.extend(["--variant=extract".to_owned(), format!("--include={TOOLS}")]);
        tools.words.push("--skip=output/dev".to_owned());
        tools.words.push(format!("--setup-hook={MERGED_USR}/setup00.sh"));
        tools.memory = call.memory;
        tools.make(store, directory)?;
        call.accelerate(host, image.arch, &directory.join("tools.tar"));
    }
    let elf_machine = image.arch.profile().elf_machine;
    call.environment.push(("IOT_ELF_MACHINE", elf_machine.to_string()));
    call.words.push(format!("--customize-hook={CUSTOMIZE}"));
    call.words.push(format!("--customize-hook={INITRAMFS}"));
    call.words.push(format!("--customize-hook={FINISH}"));
    if foreign_host.is_some() {
        call.words.push(format!("--customize-hook={RESTORE}"));
    }
    call.make(store, directory)
}

/// Returns the size of the tmpfs for the tree. Returns `None` if this host has too little memory, or if this process
/// cannot have its own mounts.
pub(super) fn in_memory(store: &Store<'_>) -> Option<&'static str> {
    if !can_have_own_mounts() {
        store.ui.note("building on the disk, which is slower: / is not a mount point here");
        return None;
    }
    let enough = memory::available().is_some_and(|free| free.bytes >= MEMORY_FOR_TMPFS);
    if !enough {
        store.ui.note("building on the disk, which is slower: there is too little memory for the tree");
    }
    enough.then_some(TMPFS)
}

/// Debian's directory of libraries, which has a subdirectory for each architecture.
const LIBRARIES: &str = "/usr/lib/";

/// Returns the path of a directory below `own` that is exactly as long as [`LIBRARIES`]. [`ACCELERATE`] overwrites
/// [`LIBRARIES`] with this path in the bytes of this host's executables, so the length must not change.
fn same_length(own: &str) -> String {
    let name = "l".repeat(LIBRARIES.len() - own.len() - 1);
    format!("{own}{name}/")
}

/// One call of mmdebstrap.
struct Call<'a> {
    arch: VmArchitecture,
    suite: &'a str,
    /// The name of the tar file in the directory.
    output: &'static str,
    words: Vec<String>,
    environment: Vec<(&'static str, String)>,
    /// The size of the tmpfs for the tree; `None` if the tree is on the disk.
    memory: Option<&'static str>,
}

impl<'a> Call<'a> {
    fn new(arch: VmArchitecture, suite: &'a str, output: &'static str) -> Self {
        Self { arch, suite, output, words: Vec::new(), environment: Vec::new(), memory: None }
    }

    /// Adds the hooks that replace the guest's tools with those of `host`.
    fn accelerate(&mut self, host: VmArchitecture, guest: VmArchitecture, tools: &Path) {
        let (directory, file) = host.profile().loader;
        let other = directory.replace("lib", "acc");
        self.words.push(format!("--extract-hook=mkdir -p \"$1{other}tree\""));
        self.words.push(format!("--extract-hook=tar-in {} {other}tree", tools.display()));
        self.words.push(format!("--extract-hook={ACCELERATE}"));
        let name = |arch: VmArchitecture| arch.profile().debian_arch.to_owned();
        self.environment.extend([
            ("IOT_HOST_ARCH", name(host)),
            ("IOT_GUEST_ARCH", name(guest)),
            ("IOT_LIBRARIES", format!("{LIBRARIES}{}", host.profile().multiarch)),
            ("IOT_OTHER_LIBRARIES", format!("{}{}", same_length(&other), host.profile().multiarch)),
            ("IOT_LOADER", format!("{directory}{file}")),
            ("IOT_OTHER_LOADER", format!("{other}{file}")),
        ]);
    }

    /// Runs mmdebstrap, and writes its log beside the output.
    fn make(self, store: &Store<'_>, directory: &Path) -> Result<()> {
        let root = rustix::process::geteuid().is_root();
        let mut environment = mirror::proxies(store.ui)?;
        environment.extend(self.environment.iter().map(|(name, value)| (*name, OsString::from(value))));
        let mut arguments = self.arguments(root);
        arguments.extend(self.words.iter().map(OsString::from));
        arguments.extend([OsString::from(self.suite), directory.join(self.output).into()]);
        let sources = mirror::debian_sources(self.suite, store.ui)?;
        if !sources.is_empty() {
            // Pass the list as a file: every user can read a command line, and a mirror's address may contain a
            // password.
            let list = directory.join("sources.list");
            write_private(&list, sources.join("\n") + "\n")?;
            arguments.push(list.into());
        }
        let mut program = tools::require("mmdebstrap")?;
        if let Some(size) = self.memory {
            environment.push(("IOT_TMPFS", size.into()));
        }
        if root && !can_have_own_mounts() {
            environment.push(("TMPDIR", directory.into()));
        } else if root {
            // mmdebstrap 1.3 mounts the host's /proc and /sys into the tree, and leaves them there if it is killed. If
            // it has a mount namespace of its own, these mounts and the memory of the tmpfs disappear with the last
            // process of that namespace.
            let mut words: Vec<OsString> = vec!["--mount".into()];
            if let Some(size) = self.memory {
                let tree = directory.join("memory");
                fs_err::create_dir_all(&tree)?;
                words.extend(["sh", "-c", IN_MEMORY, "sh"].map(OsString::from));
                words.extend([tree.into(), size.into()]);
            } else {
                // This is for root only. The tree of an ordinary user belongs to subordinate ids. They may not enter a
                // private directory, so that tree stays in /tmp.
                environment.push(("TMPDIR", directory.into()));
            }
            words.push(program.into());
            arguments.splice(0..0, words);
            program = tools::require("unshare")?;
        }
        let log = directory.join(format!("{}.log", self.output));
        run(store, &Job { program: &program, owner: directory, arguments, log, environment })
    }

    fn arguments(&self, root: bool) -> Vec<OsString> {
        let mut words = vec![
            "--verbose".to_owned(),
            format!("--mode={}", if root { "root" } else { "unshare" }),
            format!("--architectures={}", self.arch.profile().debian_arch),
            "--components=main".to_owned(),
            "--format=tar".to_owned(),
            format!("--keyring={DEBIAN_KEYRING}"),
        ];
        if self.memory.is_some() && !root {
            words.push(format!("--setup-hook={IN_MEMORY_AS_USER}"));
        }
        words.into_iter().map(OsString::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_replaced_in_a_program_has_the_same_length() {
        for host in VmArchitecture::ALL {
            let guest = VmArchitecture::ALL.into_iter().find(|arch| *arch != host).unwrap();
            let mut call = Call::new(guest, "bookworm", "root.tar");
            call.accelerate(host, guest, Path::new("/c/tools.tar"));
            let of =
                |wanted: &str| call.environment.iter().find(|(name, _)| *name == wanted).unwrap().1.clone();
            for (from, to) in [
                ("IOT_LOADER", "IOT_OTHER_LOADER"),
                ("IOT_LIBRARIES", "IOT_OTHER_LIBRARIES"),
                ("IOT_HOST_ARCH", "IOT_GUEST_ARCH"),
            ] {
                let (from, to) = (of(from), of(to));
                assert_eq!(from.len(), to.len(), "{from} and {to}");
                assert_ne!(from, to);
            }
            assert!(!of("IOT_OTHER_LIBRARIES").starts_with("/usr"));
        }
    }
}
