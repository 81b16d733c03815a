//! Will this executable run on that device? Bytes in, findings out: no file is opened, no process started, nothing of the file
//! is trusted. Memory stays below the file's own size.
//!
//! Modules in reading order: [`finding`] (the report), [`device`] (what a core has), [`inventory`] (what an image has), [`elf`]
//! (the file), [`isa`] (its instructions), `functions` and `guard` (where they are, and who decides over them), `checks`.

mod checks;
pub mod device;
pub mod elf;
pub mod finding;
mod functions;
mod guard;
pub mod inventory;
pub mod isa;

use device::Device;
use elf::{Elf, Ident};
use finding::{Finding, Report};
use inventory::Inventory;

/// What the executable is to run on.
#[derive(Debug)]
pub struct Target<'a> {
    /// Its architecture's name, for messages.
    pub arch: String,
    /// The psABI's dynamic loader.
    pub loader: String,
    /// The device.
    pub device: &'a Device,
    /// The page sizes, the certain ones first.
    pub pages: Vec<Page>,
    /// What the image or the sysroot has.
    pub offers: Offers<'a>,
    /// Whose libraries those are, for messages: `debian-12`.
    pub place: String,
    /// How more of it becomes known.
    pub hint: String,
}

/// A page size that the executable meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In bytes.
    pub bytes: u64,
    /// Whose kernel has it.
    pub whose: String,
    /// Whether it meets it in any case; else it may.
    pub certain: bool,
}

/// What is known of the target's files.
#[derive(Debug, Clone, Copy)]
pub enum Offers<'a> {
    /// Everything that matters.
    Inventory(&'a Inventory),
    /// The release of glibc alone.
    Release {
        /// `2.36`.
        glibc: &'a str,
    },
    /// Nothing.
    Nothing,
}

impl Target<'_> {
    pub(crate) fn describe_pages(&self) -> String {
        let pages: Vec<_> =
            self.pages.iter().map(|page| format!("{} ({})", page.bytes, page.whose)).collect();
        format!("pages of {} bytes", pages.join(", "))
    }
}

/// Looks at a whole file.
pub fn inspect(bytes: &[u8], target: &Target<'_>) -> Report {
    let findings = match header(bytes, target) {
        Some(finding) => vec![finding],
        None => match Elf::parse(bytes) {
            Ok(elf) => checks::all(&elf, target),
            Err(why) => vec![checks::header::malformed(&why)],
        },
    };
    Report::new(findings)
}

/// Looks at the header alone.
pub fn header(bytes: &[u8], target: &Target<'_>) -> Option<Finding> {
    match Ident::read(bytes) {
        Err(why) => Some(checks::header::malformed(&format!("it is no 64-bit ELF file: {why}"))),
        Ok(ident) => checks::header::machine(ident, target.device.isa, &target.arch),
    }
}
