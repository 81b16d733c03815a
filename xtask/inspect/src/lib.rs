//! Decides from an executable's bytes whether it will run on a device. The crate writes no file, starts no process, and
//! trusts nothing in the executable. It reads the files of the target only through an [`inventory::Tree`]. It needs
//! less memory than the executable has bytes.
//!
//! Modules in reading order: [`finding`] (the report), [`device`] (the features of a core), [`inventory`] (the
//! libraries of an image), [`elf`] (the file), [`isa`] (its instructions), `functions` (its functions), `guard`
//! (whether a check at run time decides that a function is executed), `checks`.

mod bounds;
mod checks;
pub mod device;
pub mod elf;
pub mod finding;
mod functions;
mod guard;
pub mod inventory;
pub mod isa;

use device::Device;
use elf::{Elf, Ident, is_detached};
use finding::{Finding, Report};
use inventory::{Inventory, Tree};

/// The target on which the executable is to run.
pub struct Target<'a> {
    /// The name of the architecture, for messages.
    pub arch: String,
    /// The psABI's dynamic loader.
    pub loader: String,
    pub device: &'a Device,
    /// The page sizes that the kernel may have, the certain ones first.
    pub pages: Vec<Page>,
    /// The libraries and loaders of the image or the sysroot, as far as they are known.
    pub offers: Offers<'a>,
    /// The target's files, if they can be read. The inventory then has no libraries.
    pub tree: Option<&'a dyn Tree>,
    /// The directories that the loader searches before the others (`LD_LIBRARY_PATH`).
    pub library_path: Vec<String>,
    /// True if the executable comes from a package. The packages on which it depends may have the libraries that the
    /// target lacks.
    pub packaged: bool,
    /// True if the package is one of a distribution with musl, and the target is of another distribution. The files of
    /// the package's own distribution are then not known.
    pub lacks_musl: bool,
    /// The directory of the executable, if it is known. `$ORIGIN` in its library paths stands for this directory.
    pub origin: Option<Origin<'a>>,
    /// The name of the hardened service that runs the executable: `iot-agent.service`. Hardened means
    /// `MemoryDenyWriteExecute=` (systemd.exec(5)).
    pub hardened: Option<String>,
    /// The name of the image or the sysroot, for messages: `debian-12`.
    pub place: String,
    /// A hint on how to learn more about the target's files.
    pub hint: String,
}

/// The directory of the executable.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    pub tree: &'a dyn Tree,
    /// The directory's path in the tree.
    pub directory: &'a str,
}

/// A page size that the kernel of the target may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub bytes: u64,
    /// The kernel with this page size, for messages.
    pub whose: String,
    /// True if the kernel certainly has this page size; false if it may have it.
    pub certain: bool,
}

/// The knowledge about the target's files.
#[derive(Debug, Clone, Copy)]
pub enum Offers<'a> {
    /// The libraries and the loaders are known.
    Inventory(&'a Inventory),
    /// Only the release of glibc is known.
    Release {
        /// The release, for example `2.36`.
        glibc: &'a str,
    },
    Nothing,
}

impl<'a> Target<'a> {
    /// Returns a target about whose files and pages nothing is known. `arch` is the name of the architecture, and
    /// `loader` the psABI's dynamic loader.
    pub fn new(arch: &str, loader: &str, device: &'a Device) -> Self {
        Self {
            arch: arch.to_owned(),
            loader: loader.to_owned(),
            device,
            pages: Vec::new(),
            offers: Offers::Nothing,
            tree: None,
            library_path: Vec::new(),
            packaged: false,
            lacks_musl: false,
            origin: None,
            hardened: None,
            place: String::new(),
            hint: String::new(),
        }
    }

    pub(crate) fn describe_pages(&self) -> String {
        let pages: Vec<_> =
            self.pages.iter().map(|page| format!("{} ({})", page.bytes, page.whose)).collect();
        format!("pages of {} bytes", pages.join(", "))
    }
}

/// Inspects a whole file.
pub fn inspect(bytes: &[u8], target: &Target<'_>) -> Report {
    match header(bytes, target) {
        Some(finding) => Report::new(vec![finding]),
        None if is_detached(bytes, |offset, length| part(bytes, offset, length)) => {
            Report::new(vec![checks::header::detached()])
        }
        None => match Elf::parse(bytes) {
            Ok(elf) => checks::all(&elf, target),
            Err(why) => Report::new(vec![checks::header::malformed(&why)]),
        },
    }
}

fn part(bytes: &[u8], offset: u64, length: usize) -> Option<Vec<u8>> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(length)?).map(<[u8]>::to_vec)
}

/// Inspects only the header. Returns `None` if it fits the target.
pub fn header(bytes: &[u8], target: &Target<'_>) -> Option<Finding> {
    match Ident::read(bytes) {
        Err(why) => Some(checks::header::no_elf(bytes, &why)),
        Ok(ident) => checks::header::machine(ident, target.device.isa, &target.arch),
    }
}
