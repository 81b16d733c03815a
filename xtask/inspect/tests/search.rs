//! Where the loaders of glibc and of musl look for libraries.

mod support;

use std::collections::BTreeMap;

use inspect::device;
use inspect::finding::{Report, Severity};
use inspect::inventory::{Inventory, Tree};
use inspect::isa::Isa;
use inspect::{Offers, Target};

const GLIBC: &str = "/lib/ld-linux-aarch64.so.1";
const MUSL: &str = "/lib/ld-musl-aarch64.so.1";

/// Files in memory.
struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    /// Returns a tree with a loader and with these files.
    fn new<'a>(loaders: &[&str], files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Self {
        let loaders = loaders.iter().map(|path| ((*path).to_owned(), file()));
        Self(loaders.chain(files.into_iter().map(|(path, content)| (path.to_owned(), content))).collect())
    }
}

impl Tree for Files {
    fn list(&self, directory: &str) -> Vec<String> {
        let below = self.0.keys().filter_map(|path| path.strip_prefix(directory)?.strip_prefix('/'));
        below.filter(|name| !name.contains('/')).map(str::to_owned).collect()
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.0.get(path).cloned()
    }
}

/// Returns an executable that needs `libx.so.9` and has a RUNPATH.
fn file() -> Vec<u8> {
    let mut bytes = support::executable(183, &[0xd65f_03c0_u32; 8].map(u32::to_le_bytes).concat());
    replace(&mut bytes, "$ORIGIN/lib", "/nix/st/lib");
    replace(&mut bytes, "libc.so.6", "libx.so.9");
    bytes
}

fn for_musl() -> Vec<u8> {
    let mut bytes = file();
    replace(&mut bytes, GLIBC, &format!("{MUSL}\0"));
    bytes
}

/// Replaces a text by one of the same length.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

/// Returns a library that needs another one, and has no RUNPATH.
fn library(needed: &str) -> Vec<u8> {
    let mut bytes = file();
    replace(&mut bytes, "libx.so.9", needed);
    // PT_INTERP, and DT_RUNPATH in the dynamic section.
    bytes[64..68].fill(0);
    let start = u64::from_le_bytes(bytes[64 + 3 * 56 + 8..][..8].try_into().unwrap()) as usize;
    let entry = (start..).step_by(16).find(|at| bytes[*at..][..8] == 29_u64.to_le_bytes()).unwrap();
    bytes[entry..][..8].copy_from_slice(&21_u64.to_le_bytes());
    bytes
}

fn inspected(bytes: &[u8], tree: &Files, library_path: &[&str]) -> Report {
    let device = device::find(Isa::Aarch64, "pi5").unwrap();
    let inventory = Inventory::without_libraries(tree, "a test", "aarch64-linux-gnu");
    let target = Target {
        tree: Some(tree),
        offers: Offers::Inventory(&inventory),
        library_path: library_path.iter().map(|path| (*path).to_owned()).collect(),
        ..Target::new("aarch64", GLIBC, &device)
    };
    inspect::inspect(bytes, &target)
}

fn needed(report: &Report) -> Severity {
    report.findings.iter().find(|finding| finding.id == "needed").unwrap().severity
}

#[test]
fn musl_searches_directories_of_its_own() {
    let local = || Files::new(&[GLIBC, MUSL], [("/usr/local/lib/libx.so.9", library("liby.so.9"))]);
    let with_second = |mut tree: Files| {
        tree.0.insert("/usr/lib/liby.so.9".to_owned(), library("libx.so.9"));
        tree
    };
    assert_eq!(needed(&inspected(&for_musl(), &with_second(local()), &[])), Severity::Informs);
    assert_eq!(needed(&inspected(&for_musl(), &local(), &[])), Severity::Refused, "liby.so.9 is missing");
    assert_eq!(needed(&inspected(&file(), &with_second(local()), &[])), Severity::Refused);
    for (paths, expected) in
        [("/opt/a:/usr/lib\n", Severity::Refused), ("/usr/lib\n/usr/local/lib\n", Severity::Informs)]
    {
        let mut tree = with_second(local());
        tree.0.insert("/etc/ld-musl-aarch64.path".to_owned(), paths.into());
        assert_eq!(needed(&inspected(&for_musl(), &tree, &[])), expected, "{paths}");
    }
}

/// glibc's loader uses a RUNPATH only for the libraries of the file that has it (ld.so(8)).
#[test]
fn musl_uses_a_runpath_also_for_what_the_libraries_need() {
    let files =
        [("/nix/st/lib/libx.so.9", library("liby.so.9")), ("/nix/st/lib/liby.so.9", library("libx.so.9"))];
    let tree = Files::new(&[GLIBC, MUSL], files);
    assert_eq!(needed(&inspected(&for_musl(), &tree, &[])), Severity::Informs);
    assert_eq!(needed(&inspected(&file(), &tree, &[])), Severity::Refused);
}

/// Alpine's package gcompat adds a loader with the name of glibc's.
#[test]
fn a_library_for_musl_is_right_where_musl_is() {
    let bytes = library("libc.so\0\0");
    for (loaders, expected) in
        [(&[GLIBC][..], Some(Severity::Refused)), (&[GLIBC, MUSL], None), (&[MUSL], None)]
    {
        let report = inspected(&bytes, &Files::new(loaders, []), &[]);
        let refused = report.refused().find(|finding| finding.found.contains("another C library"));
        assert_eq!(refused.map(|finding| finding.severity), expected, "{loaders:?}: {report:#?}");
    }
}

/// If the target has another C library than the package, the files of the package's own system are not known.
#[test]
fn a_package_for_musl_is_only_warned_of_where_its_system_is_missing() {
    let tree = Files::new(&[GLIBC], []);
    let device = device::find(Isa::Aarch64, "pi5").unwrap();
    let inventory = Inventory::without_libraries(&tree, "a test", "aarch64-linux-gnu");
    let mut program = for_musl();
    replace(&mut program, "libx.so.9", "libc.so\0\0");
    for (lacks_musl, expected) in [(false, Severity::Refused), (true, Severity::Warned)] {
        let target = Target {
            offers: Offers::Inventory(&inventory),
            packaged: true,
            lacks_musl,
            ..Target::new("aarch64", GLIBC, &device)
        };
        for (bytes, id) in [(&program, "interpreter"), (&library("libc.so\0\0"), "needed")] {
            let report = inspect::inspect(bytes, &target);
            let finding = report.findings.iter().find(|finding| finding.id == id).unwrap();
            assert_eq!(finding.severity, expected, "{finding:?}");
            assert_eq!(finding.remedy.contains("--sysroot"), lacks_musl, "{finding:?}");
            assert_eq!(report.refused().next().is_some(), !lacks_musl, "{report:#?}");
        }
    }
}

#[test]
fn the_environment_counts_before_a_runpath() {
    let files = ["/ll/libx.so.9", "/nix/st/lib/libx.so.9"].map(|path| (path, library("libx.so.9")));
    let tree = Files::new(&[GLIBC], files);
    for (library_path, expected) in [(&["/ll"][..], "/ll/libx.so.9"), (&[], "/nix/st/lib/libx.so.9")] {
        let report = inspected(&file(), &tree, library_path);
        let found: Vec<_> = report.libraries.iter().map(|library| library.path.as_str()).collect();
        assert_eq!(found, [expected]);
    }
}

/// ldconfig writes the directories of ld.so.conf into the cache, and glibc's loader reads only the cache.
#[test]
fn a_directory_of_the_configuration_counts_only_with_the_cache() {
    let local = "/usr/local/lib/libx.so.9";
    let configured = [("/etc/ld.so.conf", b"/usr/local/lib\n".to_vec()), (local, library("libx.so.9"))];
    let mut tree = Files::new(&[GLIBC], configured);
    let warnings = |tree: &Files, library_path: &[&str]| {
        let report = inspected(&file(), tree, library_path);
        let warned = report.of(Severity::Warned).filter(|finding| finding.id == "needed");
        warned.map(|finding| finding.found.clone()).collect::<Vec<_>>()
    };
    let expected = format!("it needs {local}, which /etc/ld.so.cache does not list");
    assert_eq!(warnings(&tree, &[]), [expected]);
    assert!(warnings(&tree, &["/usr/local/lib"]).is_empty(), "LD_LIBRARY_PATH needs no cache");
    tree.0.insert("/etc/ld.so.cache".to_owned(), format!("glibc-ld.so.cache1.1\0{local}\0").into());
    assert!(warnings(&tree, &[]).is_empty());
    let trusted = [("/usr/lib/aarch64-linux-gnu/libx.so.9", library("libx.so.9"))];
    assert!(warnings(&Files::new(&[GLIBC], trusted), &[]).is_empty());
}

/// glibc's loader goes on after a library for another machine, and ends at any other file (elf/dl-load.c). musl's
/// loader loads the first file with the name (ldso/dynlink.c).
#[test]
fn a_file_that_is_no_library_ends_the_search() {
    let small_class = [&b"\x7fELF\x01\x01\x01"[..], &[0; 57]].concat();
    let foreign = |mut bytes: Vec<u8>| {
        bytes[18] = 62;
        bytes
    };
    let whole = library("libx.so.9");
    let table = [
        (whole.clone(), Severity::Informs, Severity::Informs),
        (foreign(whole.clone()), Severity::Informs, Severity::Refused),
        (small_class, Severity::Informs, Severity::Refused),
        (Vec::new(), Severity::Refused, Severity::Refused),
        (b"INPUT(libx.so)".to_vec(), Severity::Refused, Severity::Refused),
        (whole[..40].to_vec(), Severity::Refused, Severity::Refused),
        (whole[..70].to_vec(), Severity::Refused, Severity::Refused),
    ];
    for (first, of_glibc, of_musl) in table {
        let files = [("/ll/libx.so.9", first.clone()), ("/nix/st/lib/libx.so.9", whole.clone())];
        let tree = Files::new(&[GLIBC, MUSL], files);
        let found = [file(), for_musl()].map(|program| needed(&inspected(&program, &tree, &["/ll"])));
        assert_eq!(found, [of_glibc, of_musl], "{} bytes, {:?}", first.len(), &first[..first.len().min(20)]);
    }
}
