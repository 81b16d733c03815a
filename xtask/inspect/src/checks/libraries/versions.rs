//! `symbol-version`: checks that the libraries define each version of symbols that is needed.

use std::collections::BTreeSet;

use super::resolve::{Loaded, Object};
use super::{OF_GLIBC, numbers};
use crate::Target;
use crate::elf::{Elf, Required, shown};
use crate::finding::Finding;
use crate::inventory::Library;

/// Upper bound for the versions that a finding names. A sound executable lacks fewer.
const MAX_NAMED: usize = 64;

/// A version that a library does not offer.
struct Lacking {
    /// The library that needs it; empty for the file itself.
    by: String,
    library: String,
    version: String,
    /// The newest version of the same family that the library has.
    newest: String,
    /// False if the loader may find another library of this name.
    certain: bool,
}

/// Checks the versions with the libraries that were loaded: those that the file needs, and those that the libraries
/// beside it need.
pub(super) fn by_library(elf: &Elf<'_>, loaded: &Loaded, target: &Target<'_>) -> Option<Finding> {
    let (mut lacking, mut judged) = (Vec::new(), 0);
    for (index, object) in loaded.objects.iter().enumerate().filter(|(_, object)| object.beside) {
        let by = if index == 0 { String::new() } else { object.library.name().to_owned() };
        for (name, version) in &object.library.requires {
            let Some(offering) = loaded.named(name) else { continue };
            judged += 1;
            if !offering.library.versions.contains(version) {
                lacking.push(lack(by.clone(), name, version, offering));
            }
        }
    }
    finding(elf, &lacking, judged, target)
}

fn lack(by: String, name: &str, version: &str, offering: &Object) -> Lacking {
    // Nobody delivers a glibc of his own without its loader, which the file would name.
    let certain = offering.unread.is_empty() || OF_GLIBC.contains(&name);
    let newest = newest_of(&offering.library, version);
    Lacking { by, library: name.to_owned(), version: version.to_owned(), newest, certain }
}

/// Checks the versions of glibc with the release of the target's glibc.
pub(super) fn by_release(elf: &Elf<'_>, glibc: &str, target: &Target<'_>) -> Option<Finding> {
    let (mut lacking, mut judged) = (Vec::new(), 0);
    for required in elf.dynamic.required().filter(|required| !required.weak) {
        let version = shown(required.version);
        let Some(release) = release_of(&version) else { continue };
        judged += 1;
        if release > numbers(glibc) {
            let (library, newest) = (shown(required.library), format!("GLIBC_{glibc}"));
            lacking.push(Lacking { by: String::new(), library, version, newest, certain: true });
        }
    }
    finding(elf, &lacking, judged, target)
}

/// Returns the release of glibc that has a version.
fn release_of(version: &str) -> Option<Vec<u32>> {
    match version.strip_prefix("GLIBC_")? {
        "ABI_DT_RELR" => Some(vec![2, 36]),
        rest => Some(numbers(rest)).filter(|numbers| !numbers.is_empty()),
    }
}

fn finding(elf: &Elf<'_>, lacking: &[Lacking], judged: usize, target: &Target<'_>) -> Option<Finding> {
    if lacking.is_empty() {
        let of_glibc = elf.dynamic.required().filter(|required| required.version.starts_with(b"GLIBC_"));
        let high = of_glibc.max_by_key(|required| release_of(&shown(required.version)));
        let high = high.filter(|_| judged > 0)?;
        let found = format!("{judged} versions of symbols; the newest of glibc is {}", shown(high.version));
        let finding = Finding::informs("symbol-version", found).offers("all of them are there");
        return Some(finding.details(users(elf, &[high.index])));
    }
    let named = &lacking[..lacking.len().min(MAX_NAMED)];
    let names = named.iter().map(|Lacking { by, library, version, .. }| match by.as_str() {
        "" => format!("{version} of {library}"),
        by => format!("{version} of {library} (for {by}, which is beside it)"),
    });
    let more = lacking.len() - named.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let found = format!("it needs {}{more}", names.collect::<Vec<_>>().join(", "));
    let newest: BTreeSet<String> =
        named.iter().map(|one| format!("{} of {} at most", one.newest, one.library)).collect();
    let offers = format!("{} offers {}", target.place, newest.into_iter().collect::<Vec<_>>().join(", "));
    let remedy = "build it against the older library: in a container of the target's distribution, with a sysroot of it, or \
                  link statically (musl); or move the image to a newer release";
    let certain = lacking.iter().any(|lacking| lacking.certain);
    let of_file: Vec<u16> = elf
        .dynamic
        .required()
        .filter(|required| named.iter().any(|one| one.by.is_empty() && is(one, required)))
        .map(|required| required.index)
        .take(MAX_NAMED)
        .collect();
    let finding = Finding::refused_if(certain, "symbol-version", &found, &offers, remedy);
    Some(finding.details(users(elf, &of_file)))
}

fn is(lacking: &Lacking, required: &Required<'_>) -> bool {
    lacking.version == shown(required.version) && lacking.library == shown(required.library)
}

/// Returns the symbols that need these versions.
fn users(elf: &Elf<'_>, versions: &[u16]) -> Vec<String> {
    let required = elf.dynamic.required().filter(|required| versions.contains(&required.index));
    let required: Vec<_> = required.take(MAX_NAMED).collect();
    let symbols = elf.imports().filter_map(|(index, name)| {
        let version = elf.dynamic.version_of(index)?;
        let required = required.iter().find(|required| required.index == version)?;
        Some(format!("{}@{}", shown(name), shown(required.version)))
    });
    symbols.collect()
}

/// Returns the newest version that the library offers in the family of `version`. `GLIBC_2.39` is of the family
/// `GLIBC`.
fn newest_of(library: &Library, version: &str) -> String {
    let family = version.split('_').next().unwrap_or_default();
    let of_family = library.versions.iter().filter(|offered| offered.split('_').next() == Some(family));
    let rank = |offered: &&String| numbers(offered.split_once('_').map_or("", |(_, rest)| rest));
    of_family.max_by_key(rank).cloned().unwrap_or_else(|| format!("no {family}_… version"))
}
