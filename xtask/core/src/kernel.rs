//! Debian's kernels that `cargo xtask try` boots, and their names in the cache. The crate `xtask-attempt` downloads
//! them, and `image prune` deletes those that no device uses any more.

use std::path::PathBuf;

use crate::arch::VmArchitecture;
use crate::cache::Cache;

/// Debian's suite of the kernels: Debian 13 is the first release with a kernel for pages of 16 KiB.
pub const SUITE: &str = "trixie";

/// The version of the layout of a kernel's directory. Raise it when the layout or the list of modules changes.
const FORMAT: u32 = 2;

/// A kernel of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub arch: VmArchitecture,
    /// The name of the package that depends on the newest version of the kernel.
    pub package: &'static str,
    /// The size of the kernel's pages in bytes.
    pub page_size: u64,
}

impl Kernel {
    /// Returns the kernels of every architecture.
    pub fn all() -> impl Iterator<Item = Self> {
        VmArchitecture::ALL.into_iter().flat_map(|arch| {
            let kernels = arch.profile().debian_kernels.iter();
            kernels.map(move |(page_size, package)| Self { arch, package, page_size: *page_size })
        })
    }

    /// Returns the kernel with the largest pages among `page_sizes`; `None` if Debian has no such kernel. A program that
    /// runs with the largest pages also runs with smaller ones.
    pub fn for_pages(arch: VmArchitecture, page_sizes: &[u64]) -> Option<Self> {
        let fits = |kernel: &Self| kernel.arch == arch && page_sizes.contains(&kernel.page_size);
        Self::all().filter(fits).max_by_key(|kernel| kernel.page_size)
    }

    /// Returns the name of the kernel's directory.
    pub fn key(self) -> String {
        format!("{}-{}-{FORMAT}", self.package, self.arch)
    }

    /// Returns the kernel's directory in the cache.
    pub fn directory(self, cache: &Cache) -> PathBuf {
        cache.kernels().join(self.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_the_kernel_with_its_largest_pages() {
        let package = |arch, sizes: &[u64]| Kernel::for_pages(arch, sizes).map(|kernel| kernel.package);
        assert_eq!(package(VmArchitecture::Aarch64, &[4096, 16384]), Some("linux-image-arm64-16k"));
        assert_eq!(package(VmArchitecture::Aarch64, &[4096]), Some("linux-image-arm64"));
        assert_eq!(package(VmArchitecture::Aarch64, &[65536]), None);
        assert_eq!(package(VmArchitecture::X86_64, &[4096]), Some("linux-image-amd64"));
        let keys: std::collections::BTreeSet<_> = Kernel::all().map(Kernel::key).collect();
        assert_eq!(keys.len(), Kernel::all().count(), "two kernels share a directory");
    }
}
