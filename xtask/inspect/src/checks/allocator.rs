//! `allocator-page-size`: jemalloc is compiled for a page size, and ends the process if the kernel's pages are larger.

use memchr::memmem::find;

use crate::Target;
use crate::elf::{Code, Elf, Load};
use crate::finding::Finding;
use crate::functions::{Functions, Section, starts};
use crate::guard::first_user;
use crate::isa::{Event, Isa};

/// The message that every jemalloc since 4.0 prints before it ends the process (src/pages.c, `pages_boot`).
const COMPLAINT: &[u8] = b"<jemalloc>: Unsupported system page size";

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let address = |load: Load| Some(find(elf.loaded(load)?, COMPLAINT)? as u64 + load.address);
    let place = elf.loads().find_map(address);
    let Some(place) = place else { return };
    let Some(built) = page_size(target.device.isa, elf, place) else {
        if target.pages.iter().any(|page| page.bytes > SMALLEST) {
            let remedy = "check how it was built: JEMALLOC_SYS_WITH_LG_PAGE=16, or --with-lg-page=16, supports every page size";
            let found = "it has jemalloc, and the page size that it was built for is unknown";
            findings.push(Finding::warned("allocator-page-size", found, &target.describe_pages(), remedy));
        }
        return;
    };
    let found = format!("it has jemalloc, built for pages of at most {built} bytes");
    let small = target.pages.iter().filter(|page| page.bytes > built);
    let count = findings.len();
    for page in small {
        let (whose, bytes) = (&page.whose, page.bytes);
        let offers = format!("{whose} with pages of {bytes} bytes; the process ends at its first allocation");
        let remedy = "build jemalloc for 64 KiB: JEMALLOC_SYS_WITH_LG_PAGE=16 (tikv-jemallocator), --with-lg-page=16 (configure)";
        findings.push(Finding::refused_if(page.certain, "allocator-page-size", &found, &offers, remedy));
    }
    if findings.len() == count {
        findings.push(Finding::informs("allocator-page-size", found));
    }
}

const SMALLEST: u64 = 4096;
/// The page sizes for which jemalloc can be built.
const PAGES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];

/// Returns the page size that jemalloc was compiled for, from `if (os_page > PAGE) malloc_write(COMPLAINT)`. The
/// function with this code is found because it computes the address of the message. If it compares values with exactly
/// one possible page size, that is the result. If it compares with several of them, for example in code that the
/// compiler has inlined, the page size is not known.
fn page_size(isa: Isa, elf: &Elf<'_>, place: u64) -> Option<u64> {
    let starts = starts(elf);
    elf.code().iter().find_map(|code| {
        let functions = Functions::of(&starts, code)?;
        let section = Section { isa, elf, code, functions: &functions };
        let (start, end) = functions.range(first_user(&section, place)?);
        compared_before(isa, code, (start, end), place).or_else(|| compared(isa, code, start, end))
    })
}

/// Returns the page size in the last comparison before the code that computes the message's address, if a branch after
/// the comparison decides whether that code is executed. This also works if the range consists of several functions,
/// because the C compiler wrote no unwind tables.
fn compared_before(isa: Isa, code: &Code<'_>, (start, end): (usize, usize), place: u64) -> Option<u64> {
    const FAR: usize = 0x300;
    if isa != Isa::Aarch64 {
        return None;
    }
    let mut user = None;
    isa.events(code.bytes.get(start..end)?, code.address + start as u64, |at, event| {
        if event == Event::Address(place) {
            user = user.or(Some(at));
        }
    });
    let user = usize::try_from(user?.checked_sub(code.address)?).ok()?;
    let word = |at: usize| code.bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let first = user.saturating_sub(FAR).max(start);
    (first..user).rev().filter(|at| at % 4 == start % 4).find_map(|at| {
        let bytes = page_of_cmp(word(at)?)?;
        // The branch is one of the next instructions.
        let decides = |branch: usize| is_decided(word(branch).unwrap_or(0), branch, user);
        (1..=4).map(|step| at + step * 4).filter(|branch| *branch < user).any(decides).then_some(bytes)
    })
}

/// Decodes `cmp Xn, #imm, lsl #12` (Arm ARM, C6.2: SUBS, immediate) with a possible page size.
fn page_of_cmp(word: u32) -> Option<u64> {
    let is_cmp = word & 0xffc0_001f == 0xf140_001f;
    let bytes = u64::from(word >> 10 & 0xfff) << 12;
    (is_cmp && PAGES.contains(&bytes)).then_some(bytes)
}

/// Returns whether a word is `b.hi` to the code at `user` or shortly before it, or `b.ls` over that code.
fn is_decided(word: u32, at: usize, user: usize) -> bool {
    const HIGHER: u32 = 8;
    const LOWER_OR_SAME: u32 = 9;
    let distance = i64::from((word as i32) << 8 >> 13) * 4;
    let to = at as i64 + distance;
    let user = user as i64;
    word & 0xff00_0010 == 0x5400_0000
        && match word & 0xf {
            HIGHER => (user - 32..=user).contains(&to) && distance > 0,
            LOWER_OR_SAME => to > user,
            _ => false,
        }
}

fn compared(isa: Isa, code: &Code<'_>, start: usize, end: usize) -> Option<u64> {
    let body = code.bytes.get(start..end)?;
    let found: Vec<u64> = isa.comparisons(body);
    // Compilers also write `> PAGE` as `>= PAGE + 1`.
    let page = |value: u64| PAGES.into_iter().find(|page| [*page, page + 1].contains(&value));
    let mut pages = found.into_iter().filter_map(page);
    let first = pages.next()?;
    pages.all(|other| other == first).then_some(first)
}
