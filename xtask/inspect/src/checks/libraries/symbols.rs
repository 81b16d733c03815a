//! `symbol`: checks that the libraries have the symbols that the executable uses. A library has one version for many
//! symbols (libcurl), or none at all (SQLite), so an older one may have the version and lack the symbol.

use std::collections::BTreeMap;

use object::elf::gnu_hash;

use super::resolve::{Loaded, Object};
use crate::Target;
use crate::elf::{Elf, Required, shown};
use crate::finding::Finding;

/// Returns a finding if no library has a symbol. Nothing is known if a library is missing. The symbols of a library may
/// be in the program that loads it. If the library lacks the symbol's version, `symbol-version` says so.
pub(super) fn check(elf: &Elf<'_>, loaded: &Loaded, target: &Target<'_>) -> Option<Finding> {
    if elf.is_library() || !loaded.absent.is_empty() {
        return None;
    }
    let versions: BTreeMap<u16, Required<'_>> =
        elf.dynamic.required().map(|required| (required.index, required)).collect();
    let version = |index: usize| elf.dynamic.version_of(index).and_then(|version| versions.get(&version));
    let has_version = |required: &Required<'_>| {
        let library = loaded.named(&shown(required.library));
        library.is_none_or(|object| object.library.versions.contains(&shown(required.version)))
    };
    let has = |hash: u32, object: &Object| object.library.symbols.binary_search(&hash).is_ok();
    let mut lacking = elf.required_symbols();
    lacking.retain(|(index, name, _)| {
        !loaded.objects.iter().any(|object| has(gnu_hash(name), object))
            && version(*index).is_none_or(has_version)
    });
    let found = match lacking.as_slice() {
        [] => return None,
        [(_, name, _)] => format!("it uses {}, which none of its libraries has", shown(name)),
        several => format!("it uses {} symbols that none of its libraries has", several.len()),
    };
    let at_start = lacking.iter().any(|(_, _, at_start)| *at_start);
    let when = if at_start { "when the program starts" } else { "when the program calls it" };
    let offers = format!("the loader of {} ends the process with \"undefined symbol\" {when}", target.place);
    let remedy = "build it against the libraries of the target, or install newer ones in the image";
    // A library that the loader finds earlier, in a directory that was not read, may have it.
    let certain = at_start && loaded.objects.iter().all(|object| object.unread.is_empty());
    let details = lacking.iter().map(|(index, name, _)| match version(*index) {
        Some(required) => {
            format!("{}@{} of {}", shown(name), shown(required.version), shown(required.library))
        }
        None => shown(name),
    });
    Some(Finding::refused_if(certain, "symbol", &found, &offers, remedy).details(details))
}
