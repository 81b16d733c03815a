//! The targets of an inspection: a device of `devices.toml`, and the files of a cached image or of a sysroot. The crate
//! `inspect` reads the executable and evaluates it.

use std::path::{Path, PathBuf};

use inspect::device::{self, Device};
use inspect::finding::{LoadedLibrary, Report};
use inspect::inventory::{Inventory, Overlay, Sysroot, Tree};
use inspect::isa::Isa;
use inspect::{Offers, Origin, Page, Target};

use xtask_core::arch::VmArchitecture;
use xtask_core::cache::Cache;
use xtask_core::cli::InspectArgs;
use xtask_core::error::Failure;
use xtask_core::image::Image;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::image::choice::Choice;

mod devices;
mod header;
pub mod inventory;
mod judge;
mod kept;
mod preload;

pub use devices::{arch_of_file, device_named, requested_arch};
pub use header::{check_agent, check_header};
pub use judge::Judge;

use devices::unknown_device;
use kept::{Kept, KeptTree};

/// The target with which an executable is compared.
#[derive(Debug)]
pub struct Inspection {
    pub arch: VmArchitecture,
    /// The device: its core and its page sizes.
    pub device: Device,
    /// The files on the device and, for an image, its kernel.
    pub place: DeviceRoot,
    /// The directory of an unpacked package, whose files lie over those of `place`.
    package: Option<PathBuf>,
    /// True if the package is one of a distribution with musl.
    is_for_musl: bool,
    /// The directories of `LD_LIBRARY_PATH`.
    library_path: Vec<String>,
    /// True if the kernel is that of the image. Otherwise it may be any kernel of the device.
    kernel_is_known: bool,
    /// The unit that runs the executable, if it is the agent.
    hardened: Option<String>,
    /// The name of the files for messages, if it is not that of `place`.
    label: Option<String>,
    /// The libraries that were read.
    kept: Kept,
}

/// The agent's unit, which sets `MemoryDenyWriteExecute=yes` (agent/dist/iot-agent.service).
const UNIT: &str = "iot-agent.service";

/// The source of the files on the device.
#[derive(Debug)]
pub enum DeviceRoot {
    /// An image of the catalogue. Without an inventory, only the values of the catalogue are known.
    Image(Box<Image>, Option<Inventory>),
    /// A directory with the file system of a device.
    Sysroot(PathBuf, Inventory),
}

/// Returns the architecture in the notation of the crate `inspect`.
pub fn isa(arch: VmArchitecture) -> Isa {
    arch.pick(Isa::X86_64, Isa::Aarch64)
}

fn target(arch: VmArchitecture, device: &Device) -> Target<'_> {
    let (directory, name) = arch.profile().loader;
    Target::new(&arch.to_string(), &format!("{directory}{name}"), device)
}

impl Inspection {
    /// Returns the target that the flags request.
    ///
    /// # Errors
    /// Returns a usage error for a device, an image or a directory that does not exist.
    pub fn from_args(args: &InspectArgs) -> Result<Self, Failure> {
        let arch = requested_arch(args).unwrap_or_default();
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
        let hardened = args.paths.is_empty().then(|| UNIT.to_owned());
        Ok(Self {
            arch,
            device,
            place,
            package: None,
            is_for_musl: false,
            library_path: Vec::new(),
            kernel_is_known: args.image.is_some(),
            hardened,
            label: None,
            kept: Kept::default(),
        })
    }

    /// Returns the target for the files of a package that is unpacked in a directory. Its libraries come before those
    /// of the target.
    #[must_use]
    pub fn with_package(mut self, directory: &Path) -> Self {
        if let DeviceRoot::Image(_, Some(inventory)) = &mut self.place {
            let multiarch = self.arch.profile().multiarch;
            let own = Inventory::of_tree(&Sysroot(directory.to_owned()), &inventory.source, multiarch);
            inventory.libraries.splice(0..0, own.libraries);
            inventory.interpreters.extend(own.interpreters);
        }
        Self { package: Some(directory.to_owned()), ..self }
    }

    /// Returns the target for a package of a distribution with musl.
    #[must_use]
    pub fn with_musl(self) -> Self {
        Self { is_for_musl: true, ..self }
    }

    /// Returns the target whose loader also searches these directories (`LD_LIBRARY_PATH`, ld.so(8)).
    #[must_use]
    pub fn with_library_path(self, directories: impl IntoIterator<Item = String>) -> Self {
        Self { library_path: directories.into_iter().collect(), ..self }
    }

    /// Returns the directories in which the loader looks for each library, in order. They are empty if the target's
    /// libraries are not known.
    pub fn library_directories(&self) -> impl Iterator<Item = &str> {
        let inventory = match &self.place {
            DeviceRoot::Sysroot(_, inventory) | DeviceRoot::Image(_, Some(inventory)) => Some(inventory),
            DeviceRoot::Image(_, None) => None,
        };
        let search = inventory.into_iter().flat_map(|inventory| &inventory.search);
        self.library_path.iter().chain(search).map(String::as_str)
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
        let hardened = Some(UNIT.to_owned());
        Self {
            arch: image.arch,
            device,
            place,
            package: None,
            is_for_musl: false,
            library_path: Vec::new(),
            kernel_is_known: true,
            hardened,
            label: None,
            kept: Kept::default(),
        }
    }

    /// Returns the same target for a program that the agent's unit does not run, such as one in a container.
    #[must_use]
    pub fn without_unit(self) -> Self {
        Self { hardened: None, ..self }
    }

    /// Returns the source of the libraries if they were read: the digest of an image, or a path. Returns `None` if only
    /// the release of glibc is known.
    pub fn source(&self) -> Option<&str> {
        match &self.place {
            DeviceRoot::Image(_, inventory) => inventory.as_ref().map(|inventory| inventory.source.as_str()),
            DeviceRoot::Sysroot(_, inventory) => Some(&inventory.source),
        }
    }

    /// Returns the same target, whose files have this name in messages.
    #[must_use]
    pub fn with_label(self, label: String) -> Self {
        Self { label: Some(label), ..self }
    }

    /// Returns the label, the name of the image, or the path of the directory.
    pub fn name(&self) -> String {
        if let Some(label) = &self.label {
            return label.clone();
        }
        match &self.place {
            DeviceRoot::Image(image, _) => image.name.clone(),
            DeviceRoot::Sysroot(path, _) => path.display().to_string(),
        }
    }

    /// Inspects an executable whose path is not known.
    pub fn look_at(&self, bytes: &[u8]) -> Report {
        self.look(bytes, None)
    }

    /// Inspects an executable and the libraries beside it.
    pub fn look_at_file(&self, path: &Path, bytes: &[u8]) -> Report {
        let Some(directory) = path.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned))
        else {
            return self.look(bytes, None);
        };
        let root = self.root_above(&directory);
        let inside = directory.strip_prefix(&root).ok().and_then(Path::to_str);
        let inside = inside.map(|inside| format!("/{inside}"));
        let tree = self.tree(root);
        let origin = inside.as_deref().map(|directory| Origin { tree: &tree, directory });
        self.look(bytes, origin)
    }

    fn tree(&self, root: PathBuf) -> KeptTree<'_> {
        KeptTree { tree: Sysroot(root), kept: &self.kept }
    }

    /// Returns the directories with files of the target: the package, and then the sysroot.
    fn roots(&self) -> impl Iterator<Item = &PathBuf> {
        let sysroot = match &self.place {
            DeviceRoot::Sysroot(root, _) => Some(root),
            DeviceRoot::Image(..) => None,
        };
        [self.package.as_ref(), sysroot].into_iter().flatten()
    }

    /// Returns the root directory of the tree that a directory is in. A file of the package or of the sysroot finds its
    /// libraries in the same tree, as on the device.
    fn root_above(&self, directory: &Path) -> PathBuf {
        let mut real = self.roots().filter_map(|root| root.canonicalize().ok());
        real.find(|root| directory.starts_with(root)).unwrap_or_else(|| PathBuf::from("/"))
    }

    /// Returns the path on this host of a library that was found for a file. Returns `None` if the library is in an
    /// image of the catalogue, of which only a list is known.
    fn host_path(&self, file: &Path, library: &LoadedLibrary) -> Option<PathBuf> {
        let roots: Vec<PathBuf> = match library.beside {
            true => vec![self.root_above(file.parent()?)],
            false => self.roots().cloned().collect(),
        };
        let mut paths = roots.into_iter().filter_map(|root| Sysroot(root).resolve(&library.path));
        paths.find(|path| path.is_file())
    }

    /// Checks by the first bytes of a file whether it is an executable for the target.
    pub fn header(&self, start: &[u8]) -> Option<Report> {
        let target = target(self.arch, &self.device);
        inspect::header(start, &target).map(|finding| Report::new(vec![finding]))
    }

    fn look(&self, bytes: &[u8], origin: Option<Origin<'_>>) -> Report {
        let mut target = target(self.arch, &self.device);
        target.pages = self.pages();
        target.place = self.name();
        target.origin = origin;
        target.hardened = self.hardened.clone();
        target.packaged = self.package.is_some();
        target.lacks_musl = self.is_for_musl && matches!(self.place, DeviceRoot::Image(..));
        target.library_path.clone_from(&self.library_path);
        let (upper, lower, overlay);
        match &self.place {
            DeviceRoot::Sysroot(path, inventory) => {
                lower = self.tree(path.clone());
                target.tree = Some(match &self.package {
                    None => &lower as &dyn Tree,
                    Some(package) => {
                        upper = self.tree(package.clone());
                        overlay = Overlay { upper: &upper, lower: &lower };
                        &overlay
                    }
                });
                target.offers = Offers::Inventory(inventory);
            }
            DeviceRoot::Image(_, Some(inventory)) => target.offers = Offers::Inventory(inventory),
            DeviceRoot::Image(image, None) => {
                if let Some(expected) = &image.expected {
                    target.offers = Offers::Release { glibc: &expected.glibc };
                    target.place = format!("{} (glibc {}, by the catalogue)", image.name, expected.glibc);
                }
                target.hint = format!(
                    "to check the image's own libraries, fetch it: cargo xtask image fetch {} --arch {}",
                    image.name, image.arch
                );
            }
        }
        inspect::inspect(bytes, &target)
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

fn sysroot(directory: &Path, arch: VmArchitecture) -> Result<DeviceRoot, Failure> {
    if !directory.is_dir() {
        return Err(Failure::usage(format!("--sysroot {}: not a directory", directory.display())));
    }
    let source = directory.display().to_string();
    let tree = Sysroot(directory.to_owned());
    let inventory = Inventory::without_libraries(&tree, &source, arch.profile().multiarch);
    Ok(DeviceRoot::Sysroot(directory.to_owned(), inventory))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The agent is refused for what its unit does not allow. Another file may be for another service.
    #[test]
    fn only_the_agent_is_known_to_run_in_a_hardened_service() {
        let image = Catalogue::built_in().find("debian-12", VmArchitecture::Aarch64).unwrap();
        assert_eq!(Inspection::for_smoke(&image, None, None).hardened.as_deref(), Some(UNIT));
        let unit = include_str!("../../../agent/dist/iot-agent.service");
        assert!(unit.lines().any(|line| line == "MemoryDenyWriteExecute=yes"));
    }
}
