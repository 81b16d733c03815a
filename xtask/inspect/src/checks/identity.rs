//! `stripped`, `sections`, `debug-link`, `build-id`, `size`: facts about the file.

use crate::elf::{Elf, shown};
use crate::finding::Finding;

pub(super) fn check(elf: &Elf<'_>, findings: &mut Vec<Finding>) {
    let stripped = match (elf.has_debug_information(), elf.has_symbols()) {
        (true, _) => "no: it has line numbers",
        (false, true) => "in part: it has symbols, and no line numbers",
        (false, false) => "yes: it has neither symbols nor line numbers",
    };
    findings.push(Finding::informs("stripped", stripped));
    if let Some(name) = elf.debug_link() {
        findings.push(Finding::informs("debug-link", shown(name)));
    }
    if elf.sections_are_lost {
        let found = "the section headers that its header names are not in the file, or damaged";
        let remedy = "the kernel and the loader do not read them; if the file is a copy, compare its size with the original's";
        findings.push(Finding::informs("sections", found).remedy(remedy));
    }
    let id = elf.build_id().map_or_else(
        || "none: a crash cannot be matched with its symbols".to_owned(),
        |id| id.iter().take(32).map(|byte| format!("{byte:02x}")).collect(),
    );
    findings.push(Finding::informs("build-id", id));
    let loaded: u64 = elf.loads().map(|load| load.memory_size).fold(0, u64::saturating_add);
    let (segments, sections) = elf.counts();
    let bytes = elf.data.len();
    let headers = format!("{segments} program headers, {sections} sections");
    findings.push(Finding::informs("size", format!("{bytes} bytes, {loaded} of them in memory; {headers}")));
}
