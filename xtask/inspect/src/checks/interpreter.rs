//! `interpreter`: checks that the target has the dynamic loader that the file asks for.

use crate::elf::{Elf, Ident, shown};
use crate::finding::Finding;
use crate::inventory::normalised;
use crate::{Offers, Target};

/// The remedy for a package of a distribution with musl, if the target's files are those of another distribution.
pub(super) const NAME_MUSL: &str =
    "unpack the root file system of the package's own distribution, and name the directory with --sysroot";

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let asked = match elf.interpreter() {
        Err(why) => {
            findings.push(Finding::refused("interpreter", &why, &target.loader, "link it again"));
            return;
        }
        Ok(None) => {
            let kind = if elf.is_library() { "a shared library" } else { "static" };
            findings.push(Finding::informs("interpreter", format!("none: it is {kind}")));
            return;
        }
        Ok(Some(path)) => shown(path),
    };
    let path = normalised(&asked);
    let (is_there, offers) = match target.offers {
        Offers::Inventory(inventory) => {
            let has = &inventory.interpreters;
            let list = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
            let is_there = has.contains(&path) || is_in_tree(elf, &asked, target);
            (is_there, format!("{} has {list}", target.place))
        }
        // Every glibc distribution has the psABI's loader, and nothing is known about other loaders.
        Offers::Release { .. } | Offers::Nothing => {
            (path == target.loader, format!("the distribution's loader is {}", target.loader))
        }
    };
    let found = format!("it asks for {asked}");
    if is_there {
        findings.push(Finding::informs("interpreter", found).offers("it is there"));
        return;
    }
    let is_missing_distribution = target.lacks_musl && asked.contains("musl");
    let remedy = if is_missing_distribution {
        NAME_MUSL.to_owned()
    } else if asked.contains("musl") {
        "link it statically (musl's default for Rust), or build it for the -gnu target".to_owned()
    } else {
        format!("link it with the target's own toolchain, or with -Wl,--dynamic-linker={}", target.loader)
    };
    let certain = !is_missing_distribution;
    findings.push(Finding::refused_if(certain, "interpreter", &found, &offers, &remedy));
}

/// Returns whether the target's files have a loader for this machine at any path.
fn is_in_tree(elf: &Elf<'_>, path: &str, target: &Target<'_>) -> bool {
    let bytes = target.tree.and_then(|tree| tree.read(path));
    let ident = bytes.and_then(|bytes| Ident::read(&bytes).ok());
    ident.is_some_and(|ident| ident.machine == elf.machine())
}
