//! The targets of an inspection: a device of `devices.toml`, and the files of a cached image or of a sysroot. The crate
//! `inspect` reads the executable and evaluates it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use inspect::device::{self, Device};
use inspect::finding::{Finding, Report};
use inspect::inventory::{Inventory, Sysroot};
use inspect::isa::Isa;
use inspect::{Offers, Page, Target};

use xtask_core::arch::VmArchitecture;
use xtask_core::build::Agent;
use xtask_core::cache::Cache;
use xtask_core::cli::InspectArgs;
use xtask_core::error::Failure;
use xtask_core::image::Image;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::image::choice::Choice;

pub mod inventory;

/// The target with which an executable is compared.
#[derive(Debug)]
pub struct Inspection {
    pub arch: VmArchitecture,
    /// The device: its core and its page sizes.
    pub device: Device,
    /// The files on the device and, for an image, its kernel.
    pub place: DeviceRoot,
    /// True if the kernel is that of the image. Otherwise it may be any kernel of the device.
    kernel_is_known: bool,
}

/// The source of the files on the device.
#[derive(Debug)]
pub enum DeviceRoot {
    /// An image of the catalogue. Without an inventory, only the values of the catalogue are known.
    Image(Box<Image>, Option<Inventory>),
    /// A directory with the file system of a device.
    Sysroot(PathBuf, Inventory),
}

/// Returns the architecture in the notation of the crate `inspect`.
fn isa(arch: VmArchitecture) -> Isa {
    arch.pick(Isa::X86_64, Isa::Aarch64)
}

/// Checks by the header that the bytes are a 64-bit little-endian executable for `arch`.
///
/// # Errors
/// Returns an error with the header's value and the required value.
pub fn check_header(bytes: &[u8], arch: VmArchitecture) -> Result<()> {
    let device = device::default_of(isa(arch));
    let target = target(arch, &device);
    match inspect::header(bytes, &target) {
        None => Ok(()),
        Some(finding) => Err(diagnosis(&finding).into()),
    }
}

/// Checks by the header that the agent is an executable for its architecture.
///
/// # Errors
/// Returns the errors of [`check_header`] with the agent's path.
pub fn check_agent(agent: &Agent) -> Result<()> {
    check_header(&agent.content, agent.arch)
        .with_context(|| format!("check the agent {}", agent.path.display()))
}

fn diagnosis(finding: &Finding) -> Failure {
    let offers = if finding.offers.is_empty() { String::new() } else { format!("; {}", finding.offers) };
    // The offer of this finding is only the architecture's name, which `found` already contains.
    let offers = if finding.id == "elf-machine" { String::new() } else { offers };
    Failure::guest(format!("{}{offers}", finding.found), finding.remedy.clone())
}

fn target(arch: VmArchitecture, device: &Device) -> Target<'_> {
    let (directory, name) = arch.profile().loader;
    Target {
        arch: arch.to_string(),
        loader: format!("{directory}{name}"),
        device,
        pages: Vec::new(),
        offers: Offers::Nothing,
        place: String::new(),
        hint: String::new(),
    }
}

impl Inspection {
    /// Returns the target that the flags request.
    ///
    /// # Errors
    /// Returns a usage error for a device, an image or a directory that does not exist.
    pub fn from_args(args: &InspectArgs) -> Result<Self, Failure> {
        let arch = args.arch.or_else(|| args.device.as_deref().and_then(arch_of)).unwrap_or_default();
        let device = match &args.device {
            None => device::default_of(isa(arch)),
            Some(name) => device::find(isa(arch), name).ok_or_else(|| unknown_device(arch, name))?,
        };
        let place = match (&args.sysroot, &args.image) {
            (Some(directory), _) => sysroot(directory, arch)?,
            (None, Some(name)) => {
                let image = Catalogue::built_in().find(name, arch)?;
                let inventory = Cache::from_env().ok().and_then(|cache| inventory::cached(&cache, &image));
                DeviceRoot::Image(Box::new(image), inventory)
            }
            (None, None) => DeviceRoot::of_choice(Choice::from_args(&Default::default(), arch)?),
        };
        Ok(Self { arch, device, place, kernel_is_known: args.image.is_some() })
    }

    /// Returns the target for the agent in a smoke: the image to boot with its kernel, and the core that `--cpu`
    /// names. An unknown core counts as one that has all features. Without `--cpu`, the target is the default device
    /// of the architecture.
    pub fn for_smoke(image: &Image, inventory: Option<Inventory>, cpu: Option<&str>) -> Self {
        let isa = isa(image.arch);
        let everything = || device::find(isa, "max").unwrap_or_else(|| device::default_of(isa));
        let device = match cpu {
            None => device::default_of(isa),
            Some(name) => device::find(isa, name).unwrap_or_else(everything),
        };
        let place = DeviceRoot::Image(Box::new(image.clone()), inventory);
        Self { arch: image.arch, device, place, kernel_is_known: true }
    }

    /// Returns the source of the libraries if they were read: the digest of an image, or a path. Returns `None` if only
    /// the release of glibc is known.
    pub fn source(&self) -> Option<&str> {
        match &self.place {
            DeviceRoot::Image(_, inventory) => inventory.as_ref().map(|inventory| inventory.source.as_str()),
            DeviceRoot::Sysroot(_, inventory) => Some(&inventory.source),
        }
    }

    /// Returns the name of the image or the path of the directory.
    pub fn name(&self) -> String {
        match &self.place {
            DeviceRoot::Image(image, _) => image.name.clone(),
            DeviceRoot::Sysroot(path, _) => path.display().to_string(),
        }
    }

    /// Inspects an executable.
    pub fn look_at(&self, bytes: &[u8]) -> Report {
        let mut target = target(self.arch, &self.device);
        target.pages = self.pages();
        target.place = self.name();
        match &self.place {
            DeviceRoot::Sysroot(_, inventory) | DeviceRoot::Image(_, Some(inventory)) => {
                target.offers = Offers::Inventory(inventory);
                inspect::inspect(bytes, &target)
            }
            DeviceRoot::Image(image, None) => {
                let glibc = image.expected.as_ref().map(|expected| expected.glibc.clone());
                if let Some(glibc) = &glibc {
                    target.offers = Offers::Release { glibc };
                    target.place = format!("{} (glibc {glibc}, by the catalogue)", image.name);
                }
                target.hint = format!(
                    "to check the image's own libraries, fetch it: cargo xtask image fetch {} --arch {}",
                    image.name, image.arch
                );
                inspect::inspect(bytes, &target)
            }
        }
    }

    fn pages(&self) -> Vec<Page> {
        let mut pages = Vec::new();
        if let DeviceRoot::Image(image, _) = &self.place
            && let Some(expected) = &image.expected
            && self.kernel_is_known
        {
            let whose = format!("the kernel of {}", image.name);
            pages.push(Page { bytes: expected.page_size, whose, certain: true });
        }
        for bytes in &self.device.page_sizes {
            if pages.iter().all(|page| page.bytes != *bytes) {
                let whose = format!("a kernel of {}", self.device.name);
                pages.push(Page { bytes: *bytes, whose, certain: !self.kernel_is_known });
            }
        }
        pages
    }
}

impl DeviceRoot {
    /// Returns the image of a smoke. This is the default image, or the fallback image if only the fallback image's
    /// inventory is in the cache.
    fn of_choice(choice: Choice) -> Self {
        let cache = Cache::from_env().ok();
        let kept = |image: &Image| cache.as_ref().and_then(|cache| inventory::cached(cache, image));
        let own = kept(&choice.image);
        let fallback = choice.fallback.filter(|_| own.is_none());
        match fallback.map(|image| (kept(&image), image)) {
            Some((Some(inventory), image)) => Self::Image(Box::new(image), Some(inventory)),
            _ => Self::Image(Box::new(choice.image), own),
        }
    }
}

/// Returns the architecture that has a device of this name, if there is exactly one.
fn arch_of(device: &str) -> Option<VmArchitecture> {
    let mut having =
        VmArchitecture::ALL.into_iter().filter(|arch| device::find(isa(*arch), device).is_some());
    having.next().filter(|_| having.next().is_none())
}

fn unknown_device(arch: VmArchitecture, name: &str) -> Failure {
    let devices = device::built_in().into_iter().filter(|device| device.isa == isa(arch));
    let names: Vec<_> = devices.map(|device| device.name).collect();
    Failure::usage(format!("--device {name}: no such device for {arch}; there are: {}", names.join(", ")))
}

fn sysroot(directory: &Path, arch: VmArchitecture) -> Result<DeviceRoot, Failure> {
    if !directory.is_dir() {
        return Err(Failure::usage(format!("--sysroot {}: not a directory", directory.display())));
    }
    let source = directory.display().to_string();
    let tree = Sysroot(directory.to_owned());
    let inventory = Inventory::of_tree(&tree, &source, arch.profile().multiarch);
    Ok(DeviceRoot::Sysroot(directory.to_owned(), inventory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_executable_is_described_in_one_sentence() {
        let needs = "; the target needs an ELF file with valid headers";
        let table: [(&[u8], String); 4] = [
            (b"", format!("it is no 64-bit ELF file, because it is empty{needs}")),
            (
                b"text",
                format!("it is no 64-bit ELF file, because it does not begin with ELF's magic number{needs}"),
            ),
            (
                b"\x7fELF\x02",
                format!("it is no 64-bit ELF file, because it ends after 5 bytes, within its header{needs}"),
            ),
            (
                b"#!/bin/sh\n",
                "it is a script, not an executable; the target needs an ELF executable".to_owned(),
            ),
        ];
        for (bytes, expected) in table {
            let error = check_header(bytes, VmArchitecture::Aarch64).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
