//! `exec-stack`, `text-relocations`, `relro`, `pie`, `bti-pac`: reports which protections the builder of the file has chosen.

use object::elf::{ET_DYN, PF_X};

use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;
use crate::isa::Isa;

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    findings.push(stack(elf, target));
    findings.extend(text_relocations(elf, target));
    findings.push(relro(elf));
    let pie = if elf.kind() == ET_DYN {
        "yes: it is loaded at a random address"
    } else {
        "no: it is loaded at a fixed address"
    };
    findings.push(Finding::informs("pie", pie));
    findings.push(branches(elf, target));
}

/// Returns whether the program certainly runs in a hardened service, and a text about such services.
pub(super) fn hardened(target: &Target<'_>) -> (bool, String) {
    match &target.hardened {
        Some(unit) => (true, format!("{unit} runs it with MemoryDenyWriteExecute=, which refuses that")),
        None => (false, "hardened kernels and services (MemoryDenyWriteExecute=) refuse it".to_owned()),
    }
}

fn stack(elf: &Elf<'_>, target: &Target<'_>) -> Finding {
    let remedy =
        "an assembler file without .note.GNU-stack does that: add the note, or link with -z noexecstack";
    let (certain, offers) = hardened(target);
    match elf.stack_flags() {
        Some(flags) if flags & PF_X.0 == 0 => Finding::informs("exec-stack", "no"),
        // The stacks of threads are made executable by mprotect(2) or mmap(2), which fail then.
        Some(_) => Finding::refused_if(certain, "exec-stack", "its stack is executable", &offers, remedy),
        None => Finding::informs(
            "exec-stack",
            "the file does not say; the kernel's default for the architecture applies",
        ),
    }
}

/// The loader makes the code writable for these relocations, and then executable again (glibc's elf/dl-reloc.c).
fn text_relocations(elf: &Elf<'_>, target: &Target<'_>) -> Option<Finding> {
    elf.dynamic.has_text_relocations().then(|| {
        let found = "it has text relocations: the loader must write into its code";
        let remedy = "compile all of its code, assembler files too, with -fPIC or -fPIE; link with -z text to see which does not";
        let (certain, offers) = hardened(target);
        Finding::refused_if(certain, "text-relocations", found, &offers, remedy)
    })
}

fn relro(elf: &Elf<'_>) -> Finding {
    let found = match (elf.relro, elf.dynamic.binds_now()) {
        (Some(_), true) => "full: relocations are read-only once it runs",
        (Some(_), false) => "partial: the table of lazily bound functions stays writable",
        (None, _) => "none",
    };
    Finding::informs("relro", found)
}

/// Reports the protection of branches. A core without these features treats their instructions as hints, which cost
/// nothing and do not fail.
fn branches(elf: &Elf<'_>, target: &Target<'_>) -> Finding {
    let names: &[(u32, &str)] = match target.device.isa {
        Isa::Aarch64 => &[(1, "BTI"), (2, "PAC"), (4, "GCS")],
        Isa::X86_64 => &[(1, "IBT"), (2, "SHSTK")],
    };
    let bits = elf.branch_protection().unwrap_or(0);
    let found: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    let found = if found.is_empty() { "no branch protection".to_owned() } else { found.join(", ") };
    Finding::informs("bti-pac", found)
}
