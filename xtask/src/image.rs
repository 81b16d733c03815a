//! What can be booted: an image is a name, an architecture, a source and a digest. Here is the catalogue; the
//! back room's `image` module makes what it names.

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::agent_build::hex;
use crate::arch::VmArchitecture;
use crate::exit::Usage;
use crate::report::OsReleaseReport;

/// The image of a run that names none.
pub const DEFAULT_IMAGE: &str = "debian-12";

/// Raised when the way an image is made changes, so that images made the old way are not taken for new ones.
const FORMAT: u32 = 1;

/// One image of the catalogue, for one architecture.
#[derive(Debug, Clone, Serialize)]
pub struct Image {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its architecture.
    pub arch: VmArchitecture,
    /// Where it comes from.
    pub source: Source,
    /// How it boots.
    pub boot: Boot,
    /// What its os-release must say; the guest's own word is checked against it.
    pub os_release: OsReleaseReport,
}

/// Where an image comes from.
#[derive(Debug, Clone, Serialize)]
pub enum Source {
    /// Built on this host from a distribution's packages. Its digest is taken when it is built, and kept beside it.
    Packages(Recipe),
}

/// How an image boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Boot {
    /// By the loader on its ESP.
    Uefi,
}

/// A distribution to be built from its packages.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    /// The suite: `bookworm`.
    pub suite: &'static str,
    /// The packages beyond the essential ones and the kernel.
    pub packages: &'static [&'static str],
    /// The kernel's package.
    pub kernel: &'static str,
    /// The disk's size, in MiB; the file is sparse.
    pub disk_mib: u64,
}

/// What a Debian cloud image has, with podman, less what a device does not use.
const DEBIAN_PACKAGES: &[&str] = &[
    "ca-certificates",
    "cloud-guest-utils",
    "cloud-init",
    "crun",
    "dbus",
    "dbus-user-session",
    "e2fsprogs",
    "fuse-overlayfs",
    "initramfs-tools",
    "iproute2",
    "iptables",
    "libpam-systemd",
    "netbase",
    "nftables",
    "openssh-server",
    "podman",
    "procps",
    "slirp4netns",
    "sudo",
    "systemd-boot-efi",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "uidmap",
    "zstd",
];

/// The image `name` for `arch`.
///
/// # Errors
/// [`Usage`], with the names that there are.
pub fn find(name: &str, arch: VmArchitecture) -> Result<Image, Usage> {
    let images = catalogue(arch);
    let names: Vec<_> = images.iter().map(|image| image.name).collect();
    let unknown = Usage(format!("--image {name}: no such image; there are: {}", names.join(", ")));
    images.into_iter().find(|image| image.name == name).ok_or(unknown)
}

fn catalogue(arch: VmArchitecture) -> Vec<Image> {
    vec![Image {
        name: "debian-12",
        arch,
        source: Source::Packages(Recipe {
            suite: "bookworm",
            packages: DEBIAN_PACKAGES,
            kernel: arch.profile().kernel_package,
            disk_mib: 4096,
        }),
        boot: Boot::Uefi,
        os_release: OsReleaseReport { id: "debian".to_owned(), version_id: "12".to_owned() },
    }]
}

impl Image {
    /// The name of its directory in the cache: a digest over everything that decides what it contains, among that
    /// `scripts`, the texts that the build runs.
    pub fn key(&self, scripts: &[&str]) -> String {
        let recipe = serde_json::to_string(self).expect("an image is plain data");
        let mut hash = Sha256::new();
        for part in [FORMAT.to_string().as_str(), &recipe].iter().chain(scripts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        format!("{}-{}-{}", self.name, self.arch, &hex(&hash.finalize())[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_follows_every_input() {
        let arm = find("debian-12", VmArchitecture::Aarch64).unwrap();
        let x86 = find("debian-12", VmArchitecture::X86_64).unwrap();
        let key = arm.key(&["a", "b"]);
        assert_eq!(key, arm.key(&["a", "b"]));
        assert!(key.starts_with("debian-12-aarch64-"));
        for other in [arm.key(&["ab", ""]), arm.key(&["a", "c"]), x86.key(&["a", "b"])] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = find("ubuntu-95", VmArchitecture::X86_64).unwrap_err().to_string();
        assert_eq!(error, "--image ubuntu-95: no such image; there are: debian-12");
    }
}
