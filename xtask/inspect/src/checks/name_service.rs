//! `static-nss`: a static executable that loads libraries of glibc at run time.

use memchr::memmem::find;

use crate::elf::{Elf, shown};
use crate::finding::Finding;
use crate::{Offers, Target};

/// The name of a source file of glibc that an assertion prints. A static executable has it if it contains the modules
/// `files` and `dns` themselves, as each does since glibc 2.34 (NEWS of that release).
const BUILT_IN_MODULES: &[u8] = b"nss_files/files-hosts.c";

/// A static glibc resolves names of hosts and users through modules (nss(5)), which it loads from the device. They must
/// be of the very release that the executable contains (glibc's FAQ, "static linking and NSS"). The texts are of glibc's
/// nss/nss_module.c and nss/nss_database.c. A static musl and Go have neither.
///
/// If the release is unknown and the executable contains the modules of the files in /etc and of DNS, it is not warned
/// of: it asks a module of the device only for the names that these two do not have.
pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>) -> Option<Finding> {
    let has = |text: &[u8]| {
        elf.loads().filter_map(|load| elf.loaded(load)).any(|bytes| find(bytes, text).is_some())
    };
    if !elf.is_static() || !has(b"libnss_") || !has(b"/etc/nsswitch.conf") {
        return None;
    }
    let own = release(elf);
    let theirs = match target.offers {
        Offers::Release { glibc } => Some(glibc.to_owned()),
        Offers::Inventory(inventory) => inventory.glibc(elf.machine(), target.tree),
        Offers::Nothing => None,
    };
    let whose = own.clone().map_or("an unknown release".to_owned(), |own| format!("release {own}"));
    let found =
        format!("it is static and resolves names with glibc ({whose}), whose modules it loads on the device");
    if own.is_some() && own == theirs {
        return Some(Finding::informs("static-nss", found).offers("the target has the same release"));
    }
    if own.is_none() && has(BUILT_IN_MODULES) {
        let modules =
            "it contains the modules for the files in /etc and for DNS, and may not use others of the device";
        return Some(Finding::informs("static-nss", found).offers(modules));
    }
    let theirs = theirs.map_or("an unknown release of glibc".to_owned(), |theirs| format!("glibc {theirs}"));
    let offers = format!(
        "{} has {theirs}; with modules of another release, names are not found or the process ends",
        target.place
    );
    let remedy =
        "link it dynamically, or statically with musl, or build it on the target's own release of glibc";
    Some(Finding::warned("static-nss", &found, &offers, remedy))
}

/// Returns the release that glibc writes in its banner (csu/version.c): `GNU C Library (…) stable release version 2.36.`
/// Some programs have only the text of confstr(3): `glibc 2.36`.
fn release(elf: &Elf<'_>) -> Option<String> {
    let after = |start: &[u8], before: &[u8]| {
        elf.loads().filter_map(|load| elf.loaded(load)).find_map(|bytes| {
            let text = &bytes[find(bytes, start)?..];
            let text = &text[..text.len().min(200)];
            let number = &text[find(text, before)? + before.len()..];
            let end = number.iter().position(|byte| !byte.is_ascii_digit() && *byte != b'.')?;
            Some(shown(&number[..end]).trim_end_matches('.').to_owned())
        })
    };
    after(b"GNU C Library (", b"release version ").or_else(|| after(b"glibc 2.", b"glibc "))
}
