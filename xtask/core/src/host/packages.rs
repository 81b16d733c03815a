//! The table of the packages that provide a program or a file, for each package manager.

use serde::Deserialize;

use crate::arch::VmArchitecture;
use crate::host::tools;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PackageManager {
    Apt,
    Dnf,
    Pacman,
    Zypper,
}

/// A program or a file that a package provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    Emulator,
    Firmware,
    QemuImg,
    LibvirtHeaders,
    LibvirtDriver,
    LibvirtIohelper,
    LibvirtDaemon,
    PkgConfig,
    CrossLinker,
    StaticLibc,
    NatsServer,
    Ssh,
    Mmdebstrap,
    Keyring,
    Mtools,
    Dosfstools,
    E2fsprogs,
    Sfdisk,
    UserEmulation,
    Uidmap,
    Gpgv,
    Podman,
    CrossCxx,
    Musl,
    Binutils,
}

impl PackageManager {
    /// Returns the package manager of the distribution that os-release(5) names. It is not enough that a manager is
    /// installed, because some distributions also package the managers of others. If the distribution is unknown,
    /// returns the first manager that is installed.
    pub fn find() -> Option<Self> {
        let os_release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self::for_ids(&os_release, |program| tools::find(program).is_some())
    }

    fn for_ids(os_release: &str, is_there: impl Fn(&str) -> bool) -> Option<Self> {
        const MANAGERS: [(&str, PackageManager, &[&str]); 4] = [
            ("apt-get", PackageManager::Apt, &["debian", "ubuntu"]),
            ("dnf", PackageManager::Dnf, &["fedora", "rhel"]),
            ("pacman", PackageManager::Pacman, &["arch"]),
            ("zypper", PackageManager::Zypper, &["suse", "opensuse"]),
        ];
        let lines = os_release.lines().filter_map(|line| line.split_once('='));
        let ids = lines
            .filter(|(name, _)| ["ID", "ID_LIKE"].contains(name))
            .map(|(_, value)| value.trim_matches('"'));
        let ids: Vec<_> = ids.flat_map(str::split_whitespace).collect();
        let there = || MANAGERS.iter().filter(|(program, ..)| is_there(program));
        let own = there().find(|(_, _, distributions)| ids.iter().any(|id| distributions.contains(id)));
        own.or_else(|| there().next()).map(|(_, manager, _)| *manager)
    }

    /// Returns the commands that install `packages`. They install no recommended packages and ask no question.
    pub fn install(self, packages: &[&str]) -> Vec<Vec<String>> {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let with =
            |line: &str| words(line).into_iter().chain(packages.iter().map(ToString::to_string)).collect();
        match self {
            Self::Apt => {
                vec![words("apt-get update"), with("apt-get install --yes --no-install-recommends")]
            }
            Self::Dnf => vec![with("dnf install --assumeyes --setopt=install_weak_deps=False")],
            Self::Pacman => vec![with("pacman --sync --needed --noconfirm")],
            Self::Zypper => vec![with("zypper --non-interactive install --no-recommends")],
        }
    }

    /// Returns the packages that provide `need` for guests of `arch`; none if the distribution has no such package.
    pub fn packages(self, need: Need, arch: VmArchitecture) -> Vec<&'static str> {
        let column = row(need, arch).split('|').nth(self as usize);
        column.unwrap_or_default().split_whitespace().collect()
    }
}

/// Returns a row of the table: the names of the packages, in the columns apt | dnf | pacman | zypper.
fn row(need: Need, arch: VmArchitecture) -> &'static str {
    use Need as N;
    use VmArchitecture::{Aarch64, X86_64};
    match (need, arch) {
        (N::Emulator, Aarch64) => {
            "qemu-system-arm | qemu-system-aarch64-core | qemu-system-aarch64 | qemu-arm"
        }
        (N::Emulator, X86_64) => "qemu-system-x86 | qemu-system-x86-core | qemu-system-x86 | qemu-x86",
        (N::Firmware, Aarch64) => "qemu-efi-aarch64 | edk2-aarch64 | edk2-aarch64 | qemu-uefi-aarch64",
        (N::Firmware, X86_64) => "ovmf | edk2-ovmf | edk2-ovmf | qemu-ovmf-x86_64",
        (N::QemuImg, _) => "qemu-utils | qemu-img | qemu-img | qemu-img",
        (N::LibvirtHeaders, _) => "libvirt-dev | libvirt-devel | libvirt | libvirt-devel",
        (N::LibvirtDriver, _) => {
            "libvirt-daemon-driver-qemu | libvirt-daemon-driver-qemu | libvirt | libvirt-daemon-driver-qemu"
        }
        // On Debian and its derivatives, the package of libvirt's driver does not contain this program. On Debian 12 it
        // is in the package of the daemon, and on Debian 13 in a package on which that package depends.
        (N::LibvirtIohelper, _) => "libvirt-daemon | libvirt-daemon-common | libvirt | libvirt-daemon-common",
        // On Debian 12, the package `libvirt-daemon` contains the network driver.
        (N::LibvirtDaemon, _) => {
            "libvirt-daemon | libvirt-daemon libvirt-daemon-driver-network | libvirt \
             | libvirt-daemon libvirt-daemon-driver-network"
        }
        (N::PkgConfig, _) => "pkg-config | pkgconf-pkg-config | pkgconf | pkgconf-pkg-config",
        // There is no package for openSUSE, whose cross-compilers have no C library.
        (N::CrossLinker, Aarch64) => {
            "gcc-aarch64-linux-gnu libc6-dev-arm64-cross | gcc-aarch64-linux-gnu sysroot-aarch64-fc41-glibc \
             | aarch64-linux-gnu-gcc |"
        }
        (N::CrossLinker, X86_64) => {
            "gcc-x86-64-linux-gnu libc6-dev-amd64-cross | gcc-x86_64-linux-gnu | x86_64-linux-gnu-gcc |"
        }
        // This row is for guests of the host's own architecture. The C library of a cross-compiler already contains the
        // static library.
        (N::StaticLibc, _) => "libc6-dev | glibc-static | glibc | glibc-devel-static",
        (N::NatsServer, _) => "nats-server | nats-server | nats-server | nats-server",
        (N::Ssh, _) => "openssh-client | openssh-clients | openssh | openssh-clients",
        // Arch Linux has mmdebstrap only in the user repository, from which pacman does not install.
        (N::Mmdebstrap, _) => "mmdebstrap arch-test | mmdebstrap | |",
        (N::Keyring, _) => "debian-archive-keyring | debian-keyring | debian-archive-keyring |",
        (N::Mtools, _) => "mtools | mtools | mtools | mtools",
        (N::Dosfstools, _) => "dosfstools | dosfstools | dosfstools | dosfstools",
        (N::E2fsprogs, _) => "e2fsprogs | e2fsprogs | e2fsprogs | e2fsprogs",
        (N::Sfdisk, _) => "fdisk | util-linux | util-linux | util-linux",
        // On Debian, mount(8) is in a separate package, which a minimal container lacks.
        (N::UserEmulation, _) => {
            "qemu-user-static binfmt-support mount | qemu-user-static \
             | qemu-user-static qemu-user-static-binfmt | qemu-linux-user"
        }
        (N::Uidmap, _) => "uidmap | shadow-utils | shadow | shadow",
        (N::Gpgv, _) => "gpgv | gnupg2 | gnupg | gpg2",
        // runc is added because Debian 12's crun refuses the hybrid cgroup layout of some build machines.
        (N::Podman, _) => "podman runc | podman | podman | podman",
        // The tests of `inspect` compile their sample programs with this compiler.
        (N::CrossCxx, _) => "g++-aarch64-linux-gnu | gcc-c++-aarch64-linux-gnu | aarch64-linux-gnu-gcc |",
        (N::Musl, _) => "musl-tools | musl-gcc | musl |",
        (N::Binutils, _) => "binutils | binutils | binutils | binutils",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_one_transaction_without_questions() {
        let commands = PackageManager::Apt.install(&["mtools", "ovmf"]);
        assert_eq!(commands[1].join(" "), "apt-get install --yes --no-install-recommends mtools ovmf");
        assert_eq!(PackageManager::Pacman.install(&["ovmf"]).len(), 1);
    }

    #[test]
    fn the_distributions_own_manager_is_taken() {
        let all = |text| PackageManager::for_ids(text, |_| true);
        assert_eq!(all("ID=fedora\n"), Some(PackageManager::Dnf));
        assert_eq!(all("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), Some(PackageManager::Apt));
        assert_eq!(
            all("ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\n"),
            Some(PackageManager::Zypper)
        );
        assert_eq!(all("ID=arch\n"), Some(PackageManager::Pacman));
        assert_eq!(all(""), Some(PackageManager::Apt));
        let without = PackageManager::for_ids("ID=fedora\n", |program| program == "apt-get");
        assert_eq!(without, Some(PackageManager::Apt));
        assert_eq!(PackageManager::for_ids("ID=fedora\n", |_| false), None);
    }

    #[test]
    fn each_manager_reads_its_own_column() {
        for (manager, package) in [
            (PackageManager::Apt, "qemu-efi-aarch64"),
            (PackageManager::Dnf, "edk2-aarch64"),
            (PackageManager::Pacman, "edk2-aarch64"),
            (PackageManager::Zypper, "qemu-uefi-aarch64"),
        ] {
            assert_eq!(manager.packages(Need::Firmware, VmArchitecture::Aarch64), [package]);
        }
    }
}
