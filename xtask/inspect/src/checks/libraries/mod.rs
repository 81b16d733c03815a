//! `needed`, `symbol-version`, `symbol`, `relr`: checks that the target has the libraries, and that they are new
//! enough.

mod cache;
mod musl;
mod relr;
mod resolve;
mod symbols;
mod versions;

use super::interpreter::NAME_MUSL;
use crate::elf::{Elf, shown};
use crate::finding::{Finding, LoadedLibrary};
use crate::inventory::{Inventory, Library};
use crate::{Offers, Target};

use self::resolve::{Absent, Broken, Files, Loaded};

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

/// Checks the libraries. Returns those that were found, for the inspection of each of them.
pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) -> Vec<LoadedLibrary> {
    let needed: Vec<String> = elf.dynamic.needed().map(shown).collect();
    if needed.is_empty() {
        return Vec::new();
    }
    findings.extend(other_c_library(elf, &needed, target));
    match target.offers {
        Offers::Inventory(inventory) => {
            let loaded = load(elf, &needed, target, inventory);
            findings.push(found_all(elf, &needed, &loaded, target));
            findings.extend(cache::check(elf, &loaded, target));
            findings.extend(versions::by_library(elf, &loaded, target));
            if !musl::is_asked_by(elf) {
                findings.extend(symbols::check(elf, &loaded, target));
            }
            let libc = loaded.named("libc.so.6").map(|object| &object.library);
            findings.extend(relr::check(elf, &needed, target, libc.map(relr::is_known_to)));
            return loaded.libraries().collect();
        }
        Offers::Release { glibc, .. } => {
            findings.extend(versions::by_release(elf, glibc, target));
            findings.extend(relr::check(elf, &needed, target, Some(relr::is_known_since(glibc))));
            findings.push(not_checked(&needed, target));
        }
        Offers::Nothing => findings.push(not_checked(&needed, target)),
    }
    Vec::new()
}

/// Parses `2.39` into numbers.
fn numbers(text: &str) -> Vec<u32> {
    text.split('.').map_while(|part| part.parse().ok()).collect()
}

/// Loads the libraries. musl's loader is itself the C library, so a process with it needs no file for that.
fn load(elf: &Elf<'_>, needed: &[String], target: &Target<'_>, inventory: &Inventory) -> Loaded {
    let mut file = Library::of("", elf);
    let is_musl = musl::loads(elf, needed, inventory);
    if is_musl && needed.iter().any(|name| musl::is_c_library(name)) {
        file.needed.retain(|name| !musl::is_part(name));
    }
    let search = if is_musl { musl::search(target, inventory) } else { inventory.search.clone() };
    Files::new(target, inventory, elf.machine(), search, is_musl).load(file)
}

/// Returns a finding if a library needs musl, and the target's programs use glibc. A process has only one C library.
fn other_c_library(elf: &Elf<'_>, needed: &[String], target: &Target<'_>) -> Option<Finding> {
    let name = needed.iter().find(|name| musl::is_c_library(name)).filter(|_| !musl::is_asked_by(elf))?;
    musl::is_excluded(target).then(|| {
        let found = format!("it is built for another C library, musl: it needs {name}");
        let offers = format!("the programs of {} use glibc, and a process cannot have both", target.place);
        let remedy = match target.lacks_musl {
            true => NAME_MUSL,
            false => {
                "take the build for glibc: a manylinux wheel instead of musllinux, an npm package or a Rust target with -gnu"
            }
        };
        Finding::refused_if(!target.lacks_musl, "needed", &found, &offers, remedy)
    })
}

/// Checks that the target has all libraries, including those that the libraries need themselves.
fn found_all(elf: &Elf<'_>, needed: &[String], loaded: &Loaded, target: &Target<'_>) -> Finding {
    let absent: Vec<&Absent> =
        loaded.absent.iter().filter(|absent| !musl::is_c_library(&absent.name)).collect();
    let beside = loaded.objects.iter().skip(1).filter(|object| object.beside).count();
    if absent.is_empty() {
        let count = loaded.objects.len() - 1;
        let found = format!("{} ({count} with what they need themselves)", needed.join(", "));
        let offers = match beside {
            0 => "all of them are there".to_owned(),
            some => format!("all of them are there, {some} of them beside the file"),
        };
        return Finding::informs("needed", shown(found.as_bytes())).offers(offers);
    }
    let names = absent.iter().map(|Absent { name, by, .. }| match by.as_str() {
        "" => name.clone(),
        by => format!("{name}, which {by} needs"),
    });
    let found = format!("it needs {}", names.collect::<Vec<_>>().join(", "));
    if let Some((absent, broken)) = absent.iter().find_map(|absent| Some((absent, absent.broken.as_ref()?))) {
        return broken_library(elf, absent, broken);
    }
    let offers = format!("{} has no such library in {}", target.place, loaded.searched.join(", "));
    let remedy = match target.packaged {
        true => {
            "inspect the package together with the packages on which it depends: unpack all of them, and name the directory with --sysroot"
        }
        false => {
            "install the package that has it in the image (for an image of the catalogue, `packages` in xtask/core/images.toml), or link it statically"
        }
    };
    // If the file is a library, the program that loads it may have loaded the missing libraries already. If it has
    // directories beside itself, they may be complete only on the device.
    let own = own_directories(loaded);
    let certain = !elf.is_library()
        && !target.packaged
        && absent.iter().any(|absent| absent.unread.is_empty() && (own.is_empty() || !absent.by.is_empty()));
    let mut unread: Vec<&String> = absent.iter().flat_map(|absent| &absent.unread).collect();
    unread.sort();
    unread.dedup();
    let details = unread.into_iter().map(|path| format!("it also looks in {path}, which was not read"));
    let details =
        details.chain(own.into_iter().map(|path| format!("it also looks in {path}, where it is not")));
    Finding::refused_if(certain, "needed", &found, &offers, remedy).details(details.collect::<Vec<_>>())
}

/// Returns the finding about a file with the name of a library at which the loader ends its search.
fn broken_library(elf: &Elf<'_>, absent: &Absent, broken: &Broken) -> Finding {
    let Broken { path, why } = broken;
    let found = format!(
        "it needs {}, and {path}, which the loader finds first, is no such library: {why}",
        absent.name
    );
    let offers = "the loader does not search the other directories then";
    let remedy = format!("replace {path} by the library, or remove it");
    Finding::refused_if(!elf.is_library() && absent.unread.is_empty(), "needed", &found, offers, &remedy)
}

/// Returns the directories relative to the file in which the loader looks, as they were read.
fn own_directories(loaded: &Loaded) -> Vec<String> {
    let Library { rpath, runpath, .. } = &loaded.objects[0].library;
    let path = if runpath.is_empty() { rpath } else { runpath };
    path.split(':').filter(|part| part.contains("ORIGIN")).map(str::to_owned).collect()
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
