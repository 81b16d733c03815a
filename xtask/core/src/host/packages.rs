//! The table of the packages that provide a program or a file, for each package manager.

use std::collections::BTreeSet;

use anyhow::Result;
use serde::Deserialize;

use crate::arch::VmArchitecture;
use crate::host::tools;
use crate::limits;

/// The command that updates apt's lists of packages.
const APT_UPDATE: &str = "apt-get update";

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
    LibvirtClient,
    Dnsmasq,
    Iptables,
    Iproute,
    Sshd,
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
    Mount,
    UserEmulation,
    Uidmap,
    Gpgv,
    Podman,
    Registry,
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
            .map(|(_, value)| value.trim_matches(['"', '\'']));
        let ids: Vec<_> = ids.flat_map(str::split_whitespace).collect();
        let there = || MANAGERS.iter().filter(|(program, ..)| is_there(program));
        let own = there().find(|(_, _, distributions)| ids.iter().any(|id| distributions.contains(id)));
        own.or_else(|| there().next()).map(|(_, manager, _)| *manager)
    }

    /// Returns the commands that install `packages`. The commands install no recommended packages and ask no question.
    /// If another process holds a lock of apt, dnf or zypper, the commands wait.
    pub fn install(self, packages: &[&str]) -> Vec<Vec<String>> {
        let seconds = limits::PACKAGE_LOCK.as_secs();
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let with =
            |line: &str| words(line).into_iter().chain(packages.iter().map(ToString::to_string)).collect();
        match self {
            Self::Apt => {
                let install = format!(
                    "apt-get install --yes --no-install-recommends --option=DPkg::Lock::Timeout={seconds}"
                );
                vec![words(APT_UPDATE), with(&install)]
            }
            Self::Dnf => vec![with("dnf install --assumeyes --setopt=install_weak_deps=False")],
            Self::Pacman => vec![with("pacman --sync --needed --noconfirm")],
            Self::Zypper => {
                let lock = format!("env ZYPP_LOCK_TIMEOUT={seconds}");
                vec![with(&format!("{lock} zypper --non-interactive install --no-recommends"))]
            }
        }
    }

    /// Returns whether a command only updates the lists of packages. The command may begin with `sudo` or `doas`.
    pub fn is_update(command: &[String]) -> bool {
        command.join(" ").ends_with(APT_UPDATE)
    }

    /// Returns whether a command of [`Self::install`] installs packages.
    pub fn is_install(self, command: &[String]) -> bool {
        let program = match self {
            Self::Apt => "apt-get",
            Self::Dnf => "dnf",
            Self::Pacman => "pacman",
            Self::Zypper => "zypper",
        };
        !Self::is_update(command) && command.iter().any(|word| word == program)
    }

    /// With apt, returns the names of the packages that the command of [`Self::install`] would newly install. With the
    /// other package managers, returns the names of all installed packages.
    ///
    /// # Errors
    /// Returns an error with the message of the package manager if it fails.
    pub fn names(self, command: &[String]) -> Result<BTreeSet<String>> {
        let (program, words) = match self {
            Self::Apt => {
                let after = command.iter().skip_while(|word| *word != "install").map(String::as_str);
                ("apt-get", ["--simulate"].into_iter().chain(after).collect())
            }
            Self::Dnf | Self::Zypper => ("rpm", vec!["--query", "--all", "--queryformat", "%{NAME}\n"]),
            Self::Pacman => ("pacman", vec!["--query", "--quiet"]),
        };
        let output = tools::read(&tools::require(program)?, &words)?;
        Ok(if self == Self::Apt { simulated(&output) } else { output.lines().map(str::to_owned).collect() })
    }

    /// Returns the names of the packages that contain a unit of systemd.
    ///
    /// # Errors
    /// Returns an error if no package contains the unit.
    pub fn owners(self, unit: &str) -> Result<BTreeSet<String>> {
        let path = format!("/usr/lib/systemd/system/{unit}");
        // Debian's packages may name the directory without `/usr`.
        let pattern = format!("*/systemd/system/{unit}");
        let (program, words) = match self {
            Self::Apt => ("dpkg-query", vec!["--search", &pattern]),
            Self::Dnf | Self::Zypper => {
                ("rpm", vec!["--query", "--queryformat", "%{NAME}\n", "--file", &path])
            }
            Self::Pacman => ("pacman", vec!["--query", "--owns", "--quiet", &path]),
        };
        Ok(owners_in(&tools::read(&tools::require(program)?, &words)?))
    }

    /// Returns the packages that provide `need` for guests of `arch`; none if the distribution has no such package.
    pub fn packages(self, need: Need, arch: VmArchitecture) -> Vec<&'static str> {
        let column = row(need, arch).split('|').nth(self as usize);
        column.unwrap_or_default().split_whitespace().collect()
    }
}

/// Returns the names of the packages that apt's simulation newly installs: `Inst NAME (VERSION …)`. A line about an
/// upgrade also has the old version: `Inst NAME [OLD] (VERSION …)`.
fn simulated(output: &str) -> BTreeSet<String> {
    let names = output.lines().filter_map(|line| line.strip_prefix("Inst ")?.split_once(" ("));
    names.filter(|(name, _)| !name.contains(' ')).map(|(name, _)| plain(name)).collect()
}

/// Returns the packages in the answer to the question which packages contain a file: `a:arm64, b: /path` or `a`.
fn owners_in(output: &str) -> BTreeSet<String> {
    let packages = output.lines().map(|line| line.split(": ").next().unwrap_or(line));
    packages.flat_map(|packages| packages.split(", ")).map(plain).collect()
}

/// Returns the name of a package without the architecture that dpkg and apt may append to it.
fn plain(package: &str) -> String {
    package.split(':').next().unwrap_or(package).to_owned()
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
        // On Debian 12, the package `libvirt-daemon` contains the drivers and virtlogd.
        (N::LibvirtDaemon, _) => {
            "libvirt-daemon \
             | libvirt-daemon libvirt-daemon-driver-network libvirt-daemon-driver-storage-core libvirt-daemon-log \
             | libvirt \
             | libvirt-daemon libvirt-daemon-driver-network libvirt-daemon-driver-storage-core libvirt-daemon-log"
        }
        (N::LibvirtClient, _) => "libvirt-clients | libvirt-client | libvirt | libvirt-client",
        // libvirt starts dnsmasq and iptables for a NAT network. On Debian, `dnsmasq-base` has no service.
        (N::Dnsmasq, _) => "dnsmasq-base | dnsmasq | dnsmasq | dnsmasq",
        (N::Iptables, _) => "iptables | iptables-nft | iptables | iptables",
        (N::Iproute, _) => "iproute2 | iproute | iproute2 | iproute2",
        (N::Sshd, _) => "openssh-server | openssh-server | openssh | openssh-server",
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
        (N::Mount, _) => "mount | util-linux | util-linux | util-linux",
        (N::UserEmulation, _) => {
            "qemu-user-static binfmt-support | qemu-user-static \
             | qemu-user-static qemu-user-static-binfmt | qemu-linux-user"
        }
        (N::Uidmap, _) => "uidmap | shadow-utils | shadow | shadow",
        (N::Gpgv, _) => "gpgv | gnupg2 | gnupg | gpg2",
        // runc is added because Debian 12's crun refuses the hybrid cgroup layout of some build machines.
        (N::Podman, _) => "podman runc | podman | podman | podman",
        // The tests of the agent pull images from this registry. Other distributions have no program of this name.
        (N::Registry, _) => "docker-registry | | |",
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
        assert_eq!(
            commands[1].join(" "),
            "apt-get install --yes --no-install-recommends --option=DPkg::Lock::Timeout=300 mtools ovmf"
        );
        assert_eq!(PackageManager::Pacman.install(&["ovmf"]).len(), 1);
    }

    #[test]
    fn a_held_lock_is_waited_for() {
        let zypper = PackageManager::Zypper.install(&["mtools"]);
        assert!(zypper[0].join(" ").starts_with("env ZYPP_LOCK_TIMEOUT=300 zypper "), "{zypper:?}");
        assert!(PackageManager::Zypper.is_install(&zypper[0]));
        let apt = PackageManager::Apt.install(&["mtools"]);
        assert!(PackageManager::is_update(&apt[0]) && !PackageManager::Apt.is_install(&apt[0]));
        assert!(apt[1].contains(&"--option=DPkg::Lock::Timeout=300".to_owned()), "{apt:?}");
    }

    #[test]
    fn new_packages_are_told_from_upgraded_ones() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let simulation = "Inst libc6 [2.36-9] (2.36-10 Debian:12 [amd64])\n\
            Inst nats-server (2.9.10 Debian:12 [amd64])\nInst libx:arm64 (1 Debian:12 [arm64])\nConf libc6 (2.36-10)\n";
        assert_eq!(simulated(simulation), names(&["nats-server", "libx"]));
        let answer = "a, b:amd64: /lib/systemd/system/x.service\n";
        assert_eq!(owners_in(answer), names(&["a", "b"]));
        assert_eq!(owners_in("nats-server\n"), names(&["nats-server"]));
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
        assert_eq!(all("ID='nobara'\nID_LIKE='rhel fedora'\n"), Some(PackageManager::Dnf));
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
