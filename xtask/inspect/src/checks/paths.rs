//! `rpath`: reports the directories in which libraries are searched before the distribution's own directories.

use object::elf::{DT_RPATH, DT_RUNPATH};

use crate::elf::{Elf, shown};
use crate::finding::Finding;

/// What ld.so(8) does with an empty part.
const EMPTY_PART: &str =
    "an empty part stands for the working directory, which is / for a service without WorkingDirectory=";

pub(super) fn check(elf: &Elf<'_>, findings: &mut Vec<Finding>) {
    for (tag, name) in [(DT_RPATH, "RPATH"), (DT_RUNPATH, "RUNPATH")] {
        let Some(path) = elf.dynamic.text(tag).map(shown).filter(|path| !path.is_empty()) else { continue };
        let found = format!("{name} {path}");
        let of_build = |part: &str| {
            !part.is_empty()
                && !part.starts_with('/')
                && !part.starts_with("$ORIGIN")
                && !part.starts_with("${ORIGIN}")
        };
        let foreign = |part: &str| {
            ["/home/", "/root/", "/tmp/", "/build/", "/nix/", "/workspace/"]
                .iter()
                .any(|at| part.starts_with(at))
        };
        let strange: Vec<_> =
            path.split(':').filter(|part| of_build(part) || foreign(part)).map(str::to_owned).collect();
        findings.push(if strange.is_empty() {
            // CMake writes an empty part where it has removed a directory of the build (RPATH_CHANGE).
            let empty = path.split(':').any(str::is_empty).then(|| EMPTY_PART.to_owned());
            Finding::informs("rpath", found).details(empty)
        } else {
            let offers = "on a device, directories of a build machine or relative to the working directory may belong to somebody else";
            Finding::warned("rpath", &found, offers, "link without -rpath, or with $ORIGIN").details(strange)
        });
    }
}
