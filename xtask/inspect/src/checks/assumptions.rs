//! `page-size`, `address-space`: texts in the file that show known assumptions about the kernel, other than jemalloc's
//! (`allocator-page-size`).

use memchr::memmem::find;

use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;

/// What the code with a text needs.
enum Needs {
    /// Pages of at most this many bytes.
    Pages(u64),
    /// Addresses of at least this many bits.
    Bits(u32),
}

/// A text that only code with an assumption has.
struct Known {
    text: &'static [u8],
    what: &'static str,
    needs: Needs,
    then: &'static str,
    remedy: &'static str,
}

const KNOWN: [Known; 4] = [
    // kuzu's src/storage/buffer_manager/vm_region.cpp; abhigyanpatwari/GitNexus#1231.
    Known {
        text: b"Releasing physical memory associated with a frame failed",
        what: "it has the buffer manager of Kuzu (Ladybug), which releases memory in units of 4096 bytes",
        needs: Needs::Pages(4096),
        then: "madvise(2) fails as soon as the buffer manager evicts a page: \"Releasing physical memory … Invalid argument\"",
        remedy: "run it on a kernel with pages of 4096 bytes, or take a release that was built for larger pages",
    },
    // hardened_malloc's h_malloc.c compares sysconf(_SC_PAGESIZE) with the constant of its build.
    Known {
        text: b"fatal allocator error: ",
        what: "it has hardened_malloc, which is built for pages of 4096 bytes",
        needs: Needs::Pages(4096),
        then: "the process ends at its first allocation: \"page size mismatch\"",
        remedy: "build it without hardened_malloc, or run it on a kernel with pages of 4096 bytes",
    },
    // Google's tcmalloc, tcmalloc/internal/system_allocator.h; reports of Envoy on the Raspberry Pi.
    Known {
        text: b"is something limiting address placement?",
        what: "it has Google's tcmalloc, which expects addresses of 48 bits unless it was built with TCMALLOC_ADDRESS_BITS",
        needs: Needs::Bits(47),
        then: "the process ends at its first allocation: \"MmapAligned() failed\"",
        remedy: "build it with another allocator, or run it on a kernel with CONFIG_ARM64_VA_BITS=48",
    },
    // LLVM's compiler-rt/lib/tsan/rtl/tsan_platform_linux.cpp; Go's race detector knows 48 bits only.
    Known {
        text: b"unsupported VMA range",
        what: "it has a sanitizer (ThreadSanitizer, or Go's race detector), which knows few sizes of the address space",
        needs: Needs::Bits(48),
        then: "the process ends at its start: \"unsupported VMA range\"",
        remedy: "build it without the sanitizer",
    },
];

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    for known in &KNOWN {
        let (id, offers) = match known.needs {
            Needs::Pages(most) => {
                let larger = target.pages.iter().filter(|page| page.bytes > most);
                let larger: Vec<_> =
                    larger.map(|page| format!("{} with pages of {} bytes", page.whose, page.bytes)).collect();
                ("page-size", larger.join(", "))
            }
            Needs::Bits(least) => {
                let smaller = target.device.address_bits.iter().filter(|bits| **bits < least);
                let smaller: Vec<_> = smaller.map(u32::to_string).collect();
                let with = |bits: String| {
                    format!("a kernel of {} with addresses of {bits} bits", target.device.name)
                };
                (
                    "address-space",
                    Some(smaller.join(" or ")).filter(|bits| !bits.is_empty()).map(with).unwrap_or_default(),
                )
            }
        };
        let has_text =
            || elf.loads().filter_map(|load| elf.loaded(load)).any(|bytes| find(bytes, known.text).is_some());
        if !offers.is_empty() && has_text() {
            let offers = format!("{offers}; {}", known.then);
            findings.push(Finding::warned(id, known.what, &offers, known.remedy));
        }
    }
}
