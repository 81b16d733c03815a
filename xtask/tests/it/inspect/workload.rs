//! Tests `inspect` on the archives of the smoke's workload: the sound one, and those of planted faults.

#[path = "../../../src/bin/xtask-vm/guest/workload/archive.rs"]
mod archive;
#[path = "../../../src/bin/xtask-vm/guest/workload/programs.rs"]
mod programs;

use xtask_core::arch::VmArchitecture;
use xtask_core::cache::Cache;
use xtask_core::workspace::Workspace;

use super::emulator;
use super::many::{ids, inspect, pair, report};
use crate::scratch::{Scratch, message};

#[test]
fn only_the_workload_with_small_pages_is_refused() {
    let scratch = Scratch::new();
    let workspace = Workspace::find().unwrap();
    let refused = pair("refused", "allocator-page-size");
    let programs = [
        (programs::SOUND, 0, vec![]),
        (programs::UNSYNCED_VOLUME, 0, vec![]),
        (programs::SMALL_PAGES, 1, vec![refused]),
    ];
    for (source, code, expected) in programs {
        let cache = Cache::at(&scratch.cache());
        let (program, compiled) = source.executable(&workspace, &cache, VmArchitecture::Aarch64).unwrap();
        let path = scratch.path().join("workload.tar");
        let layer = [(archive::PROGRAM.to_owned(), 0o755, program.as_slice())];
        let packed = archive::Packed::new("arm64", &[&layer]).unwrap();
        std::fs::write(&path, packed.archive("localhost/w:1").unwrap()).unwrap();
        let output = inspect(&scratch, &[&path], &["--device", "pi5", "--json"]);
        assert_eq!(output.status.code(), Some(code), "{}", message(&output));
        // The image has no C library, so its static program is warned of name service modules.
        let found = ids(&report(&output), ".tar/workload");
        let refused: Vec<_> = found.into_iter().filter(|(severity, _)| severity == "refused").collect();
        assert_eq!(refused, expected);
        // The program itself agrees. Without its volume, the sound one ends with an error.
        for pages in ["4096", "16384"] {
            let ran = emulator().args(["-p", pages]).arg(&compiled).output().unwrap();
            let complains = message(&ran).contains("<jemalloc>: Unsupported system page size");
            assert_eq!(complains, code == 1 && pages == "16384", "{pages}: {}", message(&ran));
        }
    }
}
