//! Tests of everything but instructions, with an executable that is made by hand and changed byte by byte: what the
//! kernel and the loader of a target do with it.

mod contained;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use inspect::device::{self, Device};
use inspect::finding::{Finding, Report, Severity};
use inspect::inventory::{Inventory, Library, Tree};
use inspect::isa::Isa;
use inspect::{Offers, Origin, Page, Target};
use object::elf::gnu_hash;

const LOADER: &str = "/lib/ld-linux-aarch64.so.1";
const RET: u32 = 0xd65f_03c0;

/// Files in memory.
struct Files(BTreeMap<&'static str, Vec<u8>>);

impl Tree for Files {
    fn list(&self, directory: &str) -> Vec<String> {
        let below = self.0.keys().filter_map(|path| path.strip_prefix(directory)?.strip_prefix('/'));
        below.filter(|name| !name.contains('/')).map(str::to_owned).collect()
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.0.get(path).cloned()
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Returns an executable that needs libc.so.6, with getauxval@GLIBC_2.17 and puts@GLIBC_2.34, and has a RUNPATH.
fn sound() -> Vec<u8> {
    support::executable(183, &words(&[RET; 8]))
}

/// Replaces a text by one of the same length.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the text is there");
    bytes[at..at + to.len()].copy_from_slice(to);
}

/// Changes the type of a program header.
fn retype(bytes: &mut [u8], segment: usize, kind: u32) {
    bytes[64 + segment * 56..][..4].copy_from_slice(&kind.to_le_bytes());
}

/// Replaces the entry with a tag in the dynamic section.
fn entry(bytes: &mut [u8], tag: u64, new: (u64, u64)) {
    let at = u64::from_le_bytes(bytes[64 + 3 * 56 + 8..][..8].try_into().unwrap()) as usize;
    let found = (at..).step_by(16).find(|at| bytes[*at..][..8] == tag.to_le_bytes()).unwrap();
    bytes[found..][..8].copy_from_slice(&new.0.to_le_bytes());
    bytes[found + 8..][..8].copy_from_slice(&new.1.to_le_bytes());
}

fn libc() -> Library {
    Library {
        path: "/lib/libc.so.6".to_owned(),
        machine: 183,
        versions: ["GLIBC_2.17", "GLIBC_2.34"].map(str::to_owned).to_vec(),
        symbols: hashes(&["getauxval", "puts"]),
        ..Library::default()
    }
}

fn hashes(names: &[&str]) -> Vec<u32> {
    let mut hashes: Vec<u32> = names.iter().map(|name| gnu_hash(name.as_bytes())).collect();
    hashes.sort_unstable();
    hashes
}

fn inventory(libc: Library) -> Inventory {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let (search, interpreters, roots) =
        (texts(&["/lib"]), texts(&[LOADER]), texts(&["/lib", "/opt", "/opt/own"]));
    Inventory { search, interpreters, roots, libraries: vec![libc], ..Inventory::default() }
}

fn target<'a>(device: &'a Device, inventory: &'a Inventory) -> Target<'a> {
    let pages = [4096, 16384].map(|bytes| Page { bytes, whose: "a test".to_owned(), certain: true });
    Target {
        pages: pages.to_vec(),
        offers: Offers::Inventory(inventory),
        place: "a test".to_owned(),
        ..Target::new("aarch64", LOADER, device)
    }
}

/// Inspects for a target that has this libc.so.6.
fn with(libc: Library, bytes: &[u8]) -> Report {
    let (device, inventory) = (device::find(Isa::Aarch64, "pi5").unwrap(), inventory(libc));
    inspect::inspect(bytes, &target(&device, &inventory))
}

fn hardened(bytes: &[u8]) -> Report {
    let (device, inventory) = (device::find(Isa::Aarch64, "pi5").unwrap(), inventory(libc()));
    let target = Target { hardened: Some("a.service".to_owned()), ..target(&device, &inventory) };
    inspect::inspect(bytes, &target)
}

fn finding<'a>(report: &'a Report, id: &str) -> &'a Finding {
    let found = report.findings.iter().find(|finding| finding.id == id);
    found.unwrap_or_else(|| panic!("no {id}: {report:#?}"))
}

fn severity(report: &Report, id: &str) -> Severity {
    finding(report, id).severity
}

#[test]
fn the_executable_is_sound_unless_a_test_changes_it() {
    let report = with(libc(), &sound());
    assert!(report.is_sound() && report.of(Severity::Warned).next().is_none(), "{report:#?}");
}

#[test]
fn sections_beyond_the_file_are_only_told() {
    let mut bytes = sound();
    bytes[40..48].copy_from_slice(&(u64::MAX >> 1).to_le_bytes());
    let report = with(libc(), &bytes);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(severity(&report, "sections"), Severity::Informs);
}

#[test]
fn a_loader_is_found_at_any_path_of_the_target() {
    let (device, inventory) = (device::find(Isa::Aarch64, "pi5").unwrap(), inventory(libc()));
    let mut elsewhere = sound();
    replace(&mut elsewhere, b"/lib/ld-linux", b"/opt/ld-linux");
    let other = support::executable(62, &[0xc3; 16]);
    let loaders = [(sound(), Severity::Informs), (other, Severity::Refused)];
    for (loader, expected) in loaders {
        let tree = Files(BTreeMap::from([("/opt/ld-linux-aarch64.so.1", loader)]));
        let report =
            inspect::inspect(&elsewhere, &Target { tree: Some(&tree), ..target(&device, &inventory) });
        assert_eq!(severity(&report, "interpreter"), expected);
    }
    assert_eq!(severity(&with(libc(), &elsewhere), "interpreter"), Severity::Refused);
    let spelt = Inventory { interpreters: vec!["/li/ld-linux-aarch64.so.1".to_owned()], ..inventory.clone() };
    let mut doubled = sound();
    replace(&mut doubled, b"/lib/ld-linux", b"//li/ld-linux");
    let report = inspect::inspect(&doubled, &target(&device, &spelt));
    assert_eq!(severity(&report, "interpreter"), Severity::Informs);
}

#[test]
fn packed_relocations_need_a_loader_that_knows_them() {
    let mut bytes = sound();
    entry(&mut bytes, 30, (36, 8));
    let mut newer = libc();
    newer.versions.push("GLIBC_ABI_DT_RELR".to_owned());
    for (libc, words) in [(libc(), "older than glibc 2.36"), (newer, "DT_RELR without GLIBC_ABI_DT_RELR")] {
        let report = with(libc, &bytes);
        let relr = finding(&report, "relr");
        assert!(relr.severity == Severity::Refused && relr.offers.contains(words), "{relr:#?}");
    }
}

#[test]
fn directories_of_a_build_machine_are_warned_of() {
    for (runpath, expected) in [
        (b"$ORIGIN/lib", Severity::Informs),
        (b"$ORIGIN/li:", Severity::Informs),
        (b"$ORIGIN:lib", Severity::Warned),
        (b"/home/x/lib", Severity::Warned),
    ] {
        let mut bytes = sound();
        replace(&mut bytes, b"$ORIGIN/lib", runpath);
        assert_eq!(severity(&with(libc(), &bytes), "rpath"), expected, "{}", runpath.escape_ascii());
    }
}

#[test]
fn a_runpath_that_leads_nowhere_excuses_nothing() {
    let mut older = libc();
    older.versions.pop();
    let mut own = sound();
    replace(&mut own, b"libc.so.6", b"libx.so.9");
    for (runpath, of_glibc, of_others) in [
        (b"/nix/st/lib", Severity::Refused, Severity::Refused),
        // The directory is there, and was not read. Nobody has a glibc of his own in it.
        (b"/opt/own/li", Severity::Refused, Severity::Warned),
    ] {
        let mut bytes = sound();
        replace(&mut bytes, b"$ORIGIN/lib", runpath);
        assert_eq!(severity(&with(older.clone(), &bytes), "symbol-version"), of_glibc);
        replace(&mut bytes, b"libc.so.6", b"libx.so.9");
        let other = Library { path: "/lib/libx.so.9".to_owned(), ..older.clone() };
        assert_eq!(severity(&with(other, &bytes), "symbol-version"), of_others);
        assert_eq!(severity(&with(libc(), &bytes), "needed"), of_others);
    }
    assert_eq!(severity(&with(libc(), &own), "needed"), Severity::Warned);
}

#[test]
fn a_library_beside_the_file_is_found() {
    let (device, inventory) = (device::find(Isa::Aarch64, "pi5").unwrap(), inventory(libc()));
    let mut bytes = sound();
    replace(&mut bytes, b"libc.so.6", b"libx.so.9");
    let tree = Files(BTreeMap::from([("/app/lib/libx.so.9", sound())]));
    for (directory, expected) in [("/app", Severity::Informs), ("/elsewhere", Severity::Warned)] {
        let origin = Some(Origin { tree: &tree, directory });
        let report = inspect::inspect(&bytes, &Target { origin, ..target(&device, &inventory) });
        assert_eq!(severity(&report, "needed"), expected, "{report:#?}");
    }
    // A needed library with a slash is a path.
    let mut by_path = sound();
    replace(&mut by_path, b"libc.so.6", b"/opt/x.so");
    let tree = Files(BTreeMap::from([("/opt/x.so", sound()), ("/lib/libc.so.6", sound())]));
    let report = inspect::inspect(&by_path, &Target { tree: Some(&tree), ..target(&device, &inventory) });
    assert_eq!(severity(&report, "needed"), Severity::Informs, "{report:#?}");
}

#[test]
fn a_symbol_that_no_library_has_is_refused_if_it_is_needed_at_the_start() {
    let lacking = Library { symbols: hashes(&["getauxval"]), ..libc() };
    let mut now = sound();
    replace(&mut now, b"$ORIGIN/lib", b"/nix/st/lib");
    let report = with(lacking.clone(), &now);
    let symbol = finding(&report, "symbol");
    assert_eq!(symbol.severity, Severity::Refused);
    assert_eq!(symbol.details, ["puts@GLIBC_2.34 of libc.so.6"]);
    let mut lazy = now;
    entry(&mut lazy, 0x6fff_fffb, (0x6fff_fffb, 0));
    entry(&mut lazy, 30, (30, 0));
    assert_eq!(severity(&with(lacking, &lazy), "symbol"), Severity::Warned);
}

#[test]
fn a_hardened_service_refuses_what_others_only_may_refuse() {
    let mut relocated = sound();
    entry(&mut relocated, 30, (22, 0));
    let mut stack = sound();
    stack[64 + 7 * 56 + 4] = 7;
    let mut packed = sound();
    packed[40..48].fill(0);
    packed[60..64].fill(0);
    packed[64 + 9 * 56 + 4..][..4].copy_from_slice(b"UPX!");
    for (bytes, id) in [(relocated, "text-relocations"), (stack, "exec-stack"), (packed, "packed")] {
        assert_eq!(severity(&with(libc(), &bytes), id), Severity::Warned);
        assert_eq!(severity(&hardened(&bytes), id), Severity::Refused);
    }
}

#[test]
fn packed_data_is_not_decoded() {
    // Without a signature, this word is an instruction of SVE, which the core lacks.
    let mut bytes = support::executable(183, &words(&[0x04e0_e3e0, RET, RET, RET]));
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    let is_decoded = |report: &Report| report.findings.iter().any(|finding| finding.id == "instructions");
    assert!(is_decoded(&with(libc(), &bytes)));
    bytes[64 + 9 * 56 + 4..][..4].copy_from_slice(b"UPX!");
    let report = with(libc(), &bytes);
    assert!(!is_decoded(&report), "{report:#?}");
}

#[test]
fn executables_of_other_systems_are_refused() {
    for system in [2, 9, 12, 97, 200] {
        let mut bytes = sound();
        bytes[7] = system;
        assert_eq!(severity(&with(libc(), &bytes), "elf-osabi"), Severity::Refused);
    }
    let mut gnu = sound();
    gnu[7] = 3;
    assert!(with(libc(), &gnu).is_sound());
    let mut noted = sound();
    replace(
        &mut noted,
        &[&words(&[4, 8, 3])[..], b"GNU\0"].concat(),
        &[&words(&[8, 4, 1])[..], b"Free"].concat(),
    );
    replace(&mut noted, b"\x01\x02\x03\x04", b"BSD\0");
    assert_eq!(severity(&with(libc(), &noted), "elf-osabi"), Severity::Refused);
}

#[test]
fn a_second_c_library_is_refused() {
    let mut bytes = sound();
    replace(&mut bytes, b"libc.so.6\0", b"libc.so\0\0\0");
    let report = with(libc(), &bytes);
    let needed = finding(&report, "needed");
    assert!(needed.severity == Severity::Refused && needed.found.contains("musl"), "{needed:#?}");
}

#[test]
fn a_file_without_an_interpreter_is_a_library_whatever_its_entry_is() {
    let mut bytes = sound();
    retype(&mut bytes, 0, 0);
    replace(&mut bytes, b"$ORIGIN/lib", b"/nix/st/lib");
    replace(&mut bytes, b"libc.so.6", b"libx.so.9");
    assert_eq!(severity(&with(libc(), &bytes), "needed"), Severity::Warned);
    // DF_1_PIE marks an executable.
    entry(&mut bytes, 0x6fff_fffb, (0x6fff_fffb, 0x0800_0001));
    assert_eq!(severity(&with(libc(), &bytes), "needed"), Severity::Refused);
}

#[test]
fn files_of_other_formats_are_named() {
    for (bytes, words) in [
        (&b"!<arch>\ndebian-binary   "[..], "Debian package"),
        (b"!<arch>\n/               ", "static library"),
        (b"PK\x03\x04", "ZIP"),
        (b"MZ\x90\0", "Windows"),
        (b"#!/bin/sh\n", "script"),
    ] {
        let report = with(libc(), bytes);
        let malformed = finding(&report, "malformed");
        assert!(malformed.found.contains(words) && !malformed.remedy.contains("digest"), "{malformed:#?}");
    }
}

#[test]
fn details_are_complete() {
    let details: Vec<_> = (0..200).map(|number| number.to_string()).collect();
    assert_eq!(Finding::informs("needed", "").details(details.clone()).details, details);
}
