//! What an executable contains of other software: a static C library, allocators, and texts of code with assumptions
//! about the kernel.

use inspect::finding::Severity;

use super::{RET, libc, retype, severity, support, with, words};

/// Returns a static executable with a text.
fn with_text(text: &[u8]) -> Vec<u8> {
    let mut code = words(&[RET; 4]);
    code.extend(text);
    code.resize(code.len().next_multiple_of(16), 0);
    let mut bytes = support::executable(183, &code);
    retype(&mut bytes, 0, 0);
    retype(&mut bytes, 3, 0);
    bytes
}

#[test]
fn a_static_glibc_that_resolves_names_needs_the_same_release() {
    let texts = b"libnss_\0/etc/nsswitch.conf\0GNU C Library (a test) stable release version 2.34.\n\0";
    assert_eq!(severity(&with(libc(), &with_text(texts)), "static-nss"), Severity::Informs);
    let short = with_text(b"libnss_\0/etc/nsswitch.conf\0glibc 2.34\0");
    assert_eq!(severity(&with(libc(), &short), "static-nss"), Severity::Informs);
    let mut older = libc();
    older.versions.pop();
    assert_eq!(severity(&with(older, &with_text(texts)), "static-nss"), Severity::Warned);
    let unknown = with_text(b"libnss_\0/etc/nsswitch.conf\0");
    assert_eq!(severity(&with(libc(), &unknown), "static-nss"), Severity::Warned);
    let built_in = b"libnss_\0/etc/nsswitch.conf\0nss_files/files-hosts.c\0";
    assert_eq!(severity(&with(libc(), &with_text(built_in)), "static-nss"), Severity::Informs);
    let other_release = [&built_in[..], b"glibc 2.33\0"].concat();
    assert_eq!(severity(&with(libc(), &with_text(&other_release)), "static-nss"), Severity::Warned);
    // Go reads nsswitch.conf itself.
    let go = with(libc(), &with_text(b"/etc/nsswitch.conf\0"));
    assert!(go.findings.iter().all(|finding| finding.id != "static-nss"));
}

#[test]
fn known_assumptions_about_the_kernel_are_warned_of() {
    for (text, id) in [
        (&b"Releasing physical memory associated with a frame failed with error code "[..], "page-size"),
        (b"fatal allocator error: ", "page-size"),
        (b"alignment=%v) - is something limiting address placement?", "address-space"),
        (b"FATAL: ThreadSanitizer: unsupported VMA range\n", "address-space"),
    ] {
        assert_eq!(severity(&with(libc(), &with_text(text)), id), Severity::Warned);
    }
}

#[test]
fn jemalloc_is_judged_by_the_comparison_before_its_message() {
    const COMPLAINT: &[u8] = b"<jemalloc>: Unsupported system page size\n\0";
    let made = |compared: u32, message: u32| {
        // cmp x1, #65536; b.hi; ret; nop; cmp x0, #compared; b.ls over; adrp; add; ret; ret
        let compare = 0xf140_001f | compared << 10;
        let address = 0x9100_0000 | message << 10;
        let code = [
            0xf140_403f,
            0x5400_0028,
            RET,
            0xd503_201f,
            compare,
            0x5400_0089,
            0x9000_0000,
            address,
            RET,
            RET,
        ];
        let mut code = words(&code);
        code.extend(COMPLAINT);
        code.resize(code.len().next_multiple_of(16), 0);
        let mut bytes = support::executable(183, &code);
        // Without sections and the unwinder's table, all code is one function.
        retype(&mut bytes, 6, 0);
        bytes[40..48].fill(0);
        bytes[60..64].fill(0);
        bytes
    };
    let text = u64::from_le_bytes(made(1, 0)[24..32].try_into().unwrap()) as u32;
    assert!(text + 40 < 4096, "adrp gives the first page");
    for (compared, expected) in [(1, Severity::Refused), (16, Severity::Informs)] {
        let report = with(libc(), &made(compared, text + 40));
        assert_eq!(severity(&report, "allocator-page-size"), expected, "{report:#?}");
    }
}
