//! `needed` and `symbol-version`: checks that the image has the libraries, and that they are new enough.

use std::collections::BTreeSet;

use crate::elf::{Elf, Required, shown};
use crate::finding::Finding;
use crate::inventory::{Inventory, Library};
use crate::{Offers, Target};

/// The libraries of glibc itself. Every release of it has all of them.
const OF_GLIBC: [&str; 9] = [
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libutil.so.1",
    "libresolv.so.2",
    "libanl.so.1",
    "libmvec.so.1",
];

/// Upper bound for the versions that a finding names. A sound executable lacks fewer.
const MAX_NAMED: usize = 64;

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let needed: Vec<String> = elf.dynamic.needed().map(shown).collect();
    if needed.is_empty() {
        return;
    }
    match target.offers {
        Offers::Inventory(inventory) => {
            let own = own_directories(elf);
            let image = Image { elf, target, inventory, own: own.as_deref() };
            findings.push(image.needed(&needed));
            findings.extend(versions(elf, own.is_some(), target, |required| {
                let name = shown(required.library);
                let library = image.of_its_own(&name).or_else(|| inventory.find(&name, elf.machine()))?;
                let version = shown(required.version);
                Some((library.versions.contains(&version), newest_of(library, &version)))
            }));
        }
        Offers::Release { glibc, .. } => {
            findings.extend(versions(elf, false, target, |required| {
                let version = shown(required.version);
                let release =
                    version.strip_prefix("GLIBC_").map(numbers).filter(|numbers| !numbers.is_empty())?;
                Some((release <= numbers(glibc), format!("GLIBC_{glibc}")))
            }));
            findings.push(not_checked(&needed, target));
        }
        Offers::Nothing => findings.push(not_checked(&needed, target)),
    }
}

/// Parses `2.39` into numbers.
fn numbers(text: &str) -> Vec<u32> {
    text.split('.').map_while(|part| part.parse().ok()).collect()
}

/// Returns the directories in which the executable itself looks for libraries. These may contain libraries that the
/// image lacks.
fn own_directories(elf: &Elf<'_>) -> Option<String> {
    let text =
        elf.dynamic.text(object::elf::DT_RUNPATH).or_else(|| elf.dynamic.text(object::elf::DT_RPATH))?;
    Some(shown(text)).filter(|path| !path.is_empty())
}

/// An image whose libraries are known, and an executable for it.
struct Image<'a, 'b> {
    elf: &'b Elf<'a>,
    target: &'b Target<'b>,
    inventory: &'b Inventory,
    /// The directories in which the executable itself looks for libraries.
    own: Option<&'b str>,
}

impl Image<'_, '_> {
    /// Returns the library called `name` from the executable's own directories.
    fn of_its_own(&self, name: &str) -> Option<&Library> {
        self.own.and_then(|path| self.inventory.find_in(path, name))
    }

    /// Checks that the image has all libraries, including those that the libraries need themselves.
    fn needed(&self, needed: &[String]) -> Finding {
        let Self { elf, target, inventory, own } = self;
        let mut pending: Vec<(String, String)> =
            needed.iter().rev().map(|name| (name.clone(), String::new())).collect();
        let mut seen = BTreeSet::new();
        let (mut count, mut absent) = (0, Vec::new());
        while let Some((name, by)) = pending.pop() {
            if !seen.insert(name.clone()) {
                continue;
            }
            count += 1;
            // A library's own RUNPATH is not read. The libraries that such a library needs may therefore be in any
            // directory.
            let anywhere = || {
                let mut all = inventory.libraries.iter().filter(|_| !by.is_empty());
                all.find(|library| library.name() == name && library.machine == elf.machine())
            };
            let found = inventory.find(&name, elf.machine()).or_else(|| self.of_its_own(&name));
            match found.or_else(anywhere) {
                Some(library) => {
                    pending.extend(library.needed.iter().map(|next| (next.clone(), name.clone())))
                }
                None => absent.push(if by.is_empty() { name } else { format!("{name}, which {by} needs") }),
            }
        }
        if absent.is_empty() {
            let found = format!("{} ({count} with what they need themselves)", needed.join(", "));
            return Finding::informs("needed", shown(found.as_bytes())).offers("all of them are there");
        }
        let found = format!("it needs {}", absent.join(", "));
        let offers = format!("{} has no such library in {}", target.place, inventory.search.join(", "));
        let remedy = "install the package that has it in the image (packages of xtask/core/images.toml), or link it statically";
        // If the file is a library, the program that loads it may have loaded the missing libraries already.
        let certain = own.is_none() && !elf.is_library();
        let finding = Finding::refused_if(certain, "needed", &found, &offers, remedy);
        finding.details(own.map(|path| format!("it also looks in {path}, which was not read")))
    }
}

/// Checks the versions of symbols. `offer` returns whether a library has a version, and the newest version that the
/// library has. It returns `None` if nothing is known about the library.
fn versions<'a>(
    elf: &Elf<'a>,
    brings_its_own: bool,
    target: &Target<'_>,
    offer: impl Fn(&Required<'a>) -> Option<(bool, String)>,
) -> Option<Finding> {
    let mut highest: Option<Required<'a>> = None;
    let (mut lacking, mut newest, mut judged) = (Vec::new(), String::new(), 0);
    for required in elf.dynamic.required() {
        if required.version.starts_with(b"GLIBC_")
            && highest.as_ref().is_none_or(|high| later(&required, high))
        {
            highest = Some(required.clone());
        }
        let Some((is_there, has)) = offer(&required) else { continue };
        judged += 1;
        if !is_there && !required.weak {
            newest = has;
            lacking.push(required);
        }
    }
    if lacking.is_empty() {
        let high = highest.filter(|_| judged > 0)?;
        let found = format!("{judged} versions of symbols; the newest of glibc is {}", shown(high.version));
        let finding = Finding::informs("symbol-version", found).offers("all of them are there");
        return Some(finding.details(users(elf, &[high])));
    }
    let named = &lacking[..lacking.len().min(MAX_NAMED)];
    let name =
        |required: &Required<'_>| format!("{} of {}", shown(required.version), shown(required.library));
    let names: Vec<_> = named.iter().map(name).collect();
    let more = lacking.len() - named.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let found = format!("it needs {}{more}", names.join(", "));
    let offers = format!("{} offers {newest} at most", target.place);
    let remedy = "build it against the older library: in a container of the target's distribution, with a sysroot of it, or \
                  link statically (musl); or move the image to a newer release";
    // A library that is delivered with the executable may be newer.
    let finding = Finding::refused_if(!brings_its_own, "symbol-version", &found, &offers, remedy);
    Some(finding.details(users(elf, named)))
}

fn later(one: &Required<'_>, other: &Required<'_>) -> bool {
    let of =
        |required: &Required<'_>| numbers(shown(required.version).strip_prefix("GLIBC_").unwrap_or_default());
    of(one) > of(other)
}

/// Returns the symbols that need these versions.
fn users<'a>(elf: &Elf<'a>, versions: &[Required<'a>]) -> Vec<String> {
    let symbols = elf.imports().filter_map(|(index, name)| {
        let version = elf.dynamic.version_of(index)?;
        let required = versions.iter().find(|required| required.index == version)?;
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
    of_family.max_by_key(rank).cloned().unwrap_or_else(|| "no such version".to_owned())
}

fn not_checked(needed: &[String], target: &Target<'_>) -> Finding {
    let by_release = matches!(target.offers, Offers::Release { .. });
    let others: Vec<_> =
        needed.iter().filter(|name| !by_release || !OF_GLIBC.contains(&name.as_str())).cloned().collect();
    if others.is_empty() {
        return Finding::informs("needed", needed.join(", ")).offers("all of them are glibc's");
    }
    let found = format!("not checked: whether {} are there, and in which version", others.join(", "));
    let offers = format!("{}; its other libraries are not known", target.place);
    Finding::informs("needed", found).offers(offers).remedy(&*target.hint)
}
