//! The table of planted faults, each with the id under which it must be found.

use super::build::Tool;

/// A change of the bytes of a sound executable.
pub(crate) type Patch = fn(&mut Vec<u8>);

/// A fault that a compiler plants.
pub(crate) struct Built {
    pub(crate) name: &'static str,
    pub(crate) tool: Tool,
    pub(crate) flags: &'static str,
    pub(crate) source: &'static str,
    pub(crate) device: &'static str,
    pub(crate) id: &'static str,
    /// True if the executable also fails under QEMU's user emulation of the Pi 5's core.
    pub(crate) fails: bool,
}

#[expect(clippy::too_many_arguments, reason = "one for each column of the table of faults")]
const fn built(
    name: &'static str,
    tool: Tool,
    flags: &'static str,
    source: &'static str,
    device: &'static str,
    id: &'static str,
    fails: bool,
) -> Built {
    Built { name, tool, flags, source, device, id, fails }
}

const PLAIN: &str = "#include <stdio.h>\nint main(void) { puts(\"sound\"); return 0; }\n";
const SUM: &str = "#include <stdlib.h>\nstatic float a[999], b[999];\nint main(int c, char **v) { for (int i = 0; i < 999; i++) \
                   { a[i] = i * c; b[i] = c; }\n float s = 0; for (int i = 0; i < 999; i++) { b[i] = a[i] * b[i] + i; }\n \
                   for (int i = 0; i < 999; i++) s += b[i]; return s == 1; }\n";
const COUNT: &str =
    "static _Atomic int n;\nint main(void) { return __atomic_fetch_add(&n, 1, 5) + n - 1; }\n";
const MASK: &str = "#include <stdlib.h>\nint main(int c, char **v) { unsigned long x = c * 77777ul, m = atol(\"4080\") ; \
                    return __builtin_popcountl(x * m) == 63 || (~m & x) == 1; }\n";
const ALLOCATOR: &str = "#include <unistd.h>\n#include <stdlib.h>\n#include <string.h>\nstatic const char s[] = \"<jemalloc>: Unsupported \
     system page size\\n\";\n__attribute__((noinline)) void boot(void) { long page = sysconf(_SC_PAGESIZE); if (page > PAGE) { \
     write(2, s, sizeof s); abort(); } }\nint main(void) { boot(); return 0; }\n";
/// A program with a function whose name suggests that it is called only on a core with SVE. It is always called.
const NAMED: &str = "int counted_sve(void);\n__asm__(\".arch_extension sve\\n.text\\n.type counted_sve,%function\\ncounted_sve: cntb x0\\n ret\\n\
                     .size counted_sve,.-counted_sve\\n\");\nint main(void) { return counted_sve() == 0; }\n";
/// A program with a function whose name suggests another feature than the one that it uses.
const MISNAMED: &str = "#include <sys/auxv.h>\nint counted_lse(void);\n__asm__(\".arch_extension sve\\n.text\\n.type counted_lse,%function\\n\
                        counted_lse: cntb x0\\n ret\\n.size counted_lse,.-counted_lse\\n\");\n\
                        __attribute__((noinline)) int asks(void) { return getauxval(AT_HWCAP) >> 8 & 1; }\nint other;\n\
                        __attribute__((constructor)) void look(void) { other = asks(); }\nint main(void) { return counted_lse() == 0; }\n";
const NAMED_AVX: &str = "static int a[999];\n__attribute__((noinline, target(\"avx2\"))) int sum_avx2(int n) { int s = 0; \
                         for (int i = 0; i < 999; i++) s += a[i] * n; return s; }\nint main(int c, char **v) { for (int i = 0; i < 999; i++) a[i] = i ^ c; return sum_avx2(c); }\n";
/// A program with a build setting in the form in which Go records it (debug/buildinfo).
const GO: &str = "__attribute__((section(\".go.buildinfo\"), used)) static const char told[] = \"build\\tGOARM64=\" LEVEL \"\\n\";\n\
                  int main(void) { __asm__ volatile(\".arch armv8.4-a\\n cfinv\" ::: \"cc\"); return 0; }\n";
const RUST: &str = "fn main() { let n = std::env::args().count(); let a: Vec<u32> = (0..n as u32 * 1000).collect(); \
     let s: u32 = a.iter().map(|x| x.wrapping_mul(*x) ^ 3).fold(0, u32::wrapping_add); println!(\"{s}\"); }\n";

pub(crate) const BUILT: &[Built] = &[
    built("machine", Tool::X86, "", PLAIN, "pi5", "elf-machine", true),
    built("object", Tool::Arm, "-c", PLAIN, "pi5", "elf-type", true),
    built(
        "musl-loader",
        Tool::Arm,
        "-Wl,--dynamic-linker=/lib/ld-musl-aarch64.so.1",
        PLAIN,
        "pi5",
        "interpreter",
        true,
    ),
    built(
        "nix-loader",
        Tool::Arm,
        "-Wl,--dynamic-linker=/nix/store/abc-glibc/lib/ld-linux-aarch64.so.1",
        PLAIN,
        "pi5",
        "interpreter",
        true,
    ),
    built(
        "x86-loader",
        Tool::X86,
        "-Wl,--dynamic-linker=/lib/ld-linux.so.2",
        PLAIN,
        "x86-64-v1",
        "interpreter",
        false,
    ),
    built("absent-library", Tool::Arm, "-Wl,--no-as-needed -L. -labsent", PLAIN, "pi5", "needed", true),
    built(
        "absent-behind",
        Tool::Arm,
        "-L. -Wl,--no-as-needed -lbehind -Wl,--allow-shlib-undefined",
        PLAIN,
        "pi5",
        "needed",
        true,
    ),
    built(
        "newer-library",
        Tool::Arm,
        "-L. -lversioned",
        "int newer(void); int main(void) { return newer(); }\n",
        "pi5",
        "symbol-version",
        true,
    ),
    built(
        "pages-of-4k",
        Tool::Arm,
        "-Wl,-z,max-page-size=4096 -Wl,-z,common-page-size=4096",
        PLAIN,
        "pi5",
        "segment-alignment",
        false,
    ),
    built(
        "static-4k",
        Tool::Arm,
        "-static -Wl,-z,max-page-size=4096",
        PLAIN,
        "pi5",
        "segment-alignment",
        false,
    ),
    built(
        "cxx-4k",
        Tool::ArmCxx,
        "-Wl,-z,max-page-size=4096 -Wl,-z,common-page-size=4096",
        PLAIN,
        "pi5",
        "segment-alignment",
        false,
    ),
    built(
        "pages-of-16k",
        Tool::Arm,
        "-Wl,-z,max-page-size=16384",
        PLAIN,
        "generic-v8.0",
        "segment-alignment",
        false,
    ),
    built("jemalloc-4k", Tool::Arm, "-DPAGE=4096", ALLOCATOR, "pi5", "allocator-page-size", true),
    built("jemalloc-4k-stripped", Tool::Arm, "-DPAGE=4096 -s", ALLOCATOR, "pi5", "allocator-page-size", true),
    built("jemalloc-16k", Tool::Arm, "-DPAGE=16384", ALLOCATOR, "generic-v8.0", "allocator-page-size", false),
    built("sve", Tool::Arm, "-O3 -march=armv8.2-a+sve", SUM, "pi5", "instructions", true),
    built("sve-stripped", Tool::Arm, "-O3 -march=armv8.2-a+sve -s", SUM, "pi5", "instructions", true),
    built("sve-static", Tool::Arm, "-O3 -march=armv8.2-a+sve -static", SUM, "pi5", "instructions", true),
    built(
        "pauth",
        Tool::Arm,
        "-march=armv8.3-a -mbranch-protection=pac-ret",
        PLAIN,
        "pi5",
        "instructions",
        true,
    ),
    built(
        "sve2",
        Tool::ArmAsm,
        "-march=armv8-a+sve2",
        " sqrdmlah z0.s, z1.s, z2.s",
        "pi5",
        "instructions",
        true,
    ),
    built("rcpc2", Tool::ArmAsm, "-march=armv8.4-a", " ldapur w0, [sp, #4]", "pi5", "instructions", true),
    built("flagm", Tool::ArmAsm, "-march=armv8.4-a", " cfinv", "pi5", "instructions", true),
    built("flagm2", Tool::ArmAsm, "-march=armv8.5-a", " axflag", "pi5", "instructions", true),
    built("jscvt", Tool::ArmAsm, "-march=armv8.3-a", " fjcvtzs w0, d0", "pi5", "instructions", true),
    built(
        "fcma",
        Tool::ArmAsm,
        "-march=armv8.3-a",
        " fcadd v0.4s, v1.4s, v2.4s, #90",
        "pi5",
        "instructions",
        true,
    ),
    built(
        "i8mm",
        Tool::ArmAsm,
        "-march=armv8.2-a+i8mm",
        " smmla v0.4s, v1.16b, v2.16b",
        "pi5",
        "instructions",
        true,
    ),
    built(
        "bf16",
        Tool::ArmAsm,
        "-march=armv8.2-a+bf16",
        " bfdot v0.4s, v1.8h, v2.8h",
        "pi5",
        "instructions",
        true,
    ),
    built(
        "sha3",
        Tool::ArmAsm,
        "-march=armv8.2-a+sha3",
        " eor3 v0.16b, v1.16b, v2.16b, v3.16b",
        "pi5",
        "instructions",
        true,
    ),
    built(
        "sha512",
        Tool::ArmAsm,
        "-march=armv8.2-a+sha3",
        " sha512su0 v0.2d, v1.2d",
        "pi5",
        "instructions",
        true,
    ),
    built("sm4", Tool::ArmAsm, "-march=armv8.2-a+sm4", " sm4e v0.4s, v1.4s", "pi5", "instructions", true),
    built("mte", Tool::ArmAsm, "-march=armv8.5-a+memtag", " irg x0, sp", "pi5", "instructions", true),
    built("frintts", Tool::ArmAsm, "-march=armv8.5-a", " frint32z s0, s1", "pi5", "instructions", true),
    built(
        "fhm",
        Tool::ArmAsm,
        "-march=armv8.2-a+fp16fml",
        " fmlal v0.4s, v1.4h, v2.4h",
        "pi5",
        "instructions",
        true,
    ),
    built("rng", Tool::ArmAsm, "-march=armv8.5-a+rng", " mrs x0, rndr", "pi5", "instructions", true),
    built(
        "mops",
        Tool::ArmAsm,
        "-march=armv8-a",
        " .inst 0x19010440\n .inst 0x19410440\n .inst 0x19810440",
        "pi5",
        "instructions",
        true,
    ),
    built("lse", Tool::Arm, "-march=armv8.1-a", COUNT, "pi4", "instructions", false),
    built(
        "dotprod",
        Tool::ArmAsm,
        "-march=armv8.2-a+dotprod",
        " udot v0.4s, v1.16b, v2.16b",
        "pi4",
        "instructions",
        false,
    ),
    built("aes", Tool::ArmAsm, "-march=armv8-a+crypto", " aese v0.16b, v1.16b", "pi4", "instructions", false),
    built("fp16", Tool::ArmAsm, "-march=armv8.2-a+fp16", " fadd h0, h1, h2", "pi4", "instructions", false),
    built("rcpc", Tool::ArmAsm, "-march=armv8.3-a", " ldapr w0, [sp]", "pi4", "instructions", false),
    built(
        "crc32",
        Tool::ArmAsm,
        "-march=armv8-a+crc",
        " crc32b w0, w0, w0",
        "generic-v8.0",
        "instructions",
        false,
    ),
    built(
        "rdm",
        Tool::ArmAsm,
        "-march=armv8.1-a",
        " sqrdmlah s0, s1, s2",
        "generic-v8.0",
        "instructions",
        false,
    ),
    built(
        "rust-sve",
        Tool::Rust,
        "-C target-feature=+sve,+sve2 -C opt-level=3",
        RUST,
        "pi5",
        "instructions",
        true,
    ),
    built(
        "rust-pauth",
        Tool::Rust,
        "-C target-cpu=neoverse-v1 -C strip=symbols -C opt-level=3",
        RUST,
        "pi5",
        "instructions",
        true,
    ),
    built("named-sve", Tool::Arm, "-O2", NAMED, "pi5", "instructions", true),
    built("misnamed", Tool::Arm, "-O2", MISNAMED, "pi5", "instructions", true),
    built("go-level", Tool::Arm, "-DLEVEL=\"v8.4\"", GO, "pi5", "instructions", true),
    built("named-avx2", Tool::X86, "-O3", NAMED_AVX, "x86-64-v1", "instructions", false),
    built("avx2", Tool::X86, "-O3 -mavx2", SUM, "x86-64-v2", "instructions", false),
    built("avx2-stripped", Tool::X86, "-O3 -mavx2 -s", SUM, "x86-64-v1", "instructions", false),
    built(
        "avx512",
        Tool::X86,
        "-O3 -march=x86-64-v4 -mprefer-vector-width=512",
        SUM,
        "x86-64-v3",
        "instructions",
        false,
    ),
    built("fma", Tool::X86, "-O3 -mfma", SUM, "x86-64-v2", "instructions", false),
    built("popcnt", Tool::X86, "-mpopcnt", MASK, "x86-64-v1", "instructions", false),
    built("bmi1", Tool::X86, "-mbmi", MASK, "x86-64-v2", "instructions", false),
    built("avx-musl", Tool::Musl, "-O3 -mavx -static", SUM, "x86-64-v1", "instructions", false),
    built("musl-loader-x86", Tool::Musl, "", PLAIN, "x86-64-v1", "interpreter", false),
    built(
        "rust-avx2",
        Tool::RustX86,
        "-C target-cpu=x86-64-v3 -C opt-level=3",
        RUST,
        "x86-64-v1",
        "instructions",
        false,
    ),
];

/// Faults in the bytes of a sound executable for the Pi 5.
pub(crate) const PATCHED: &[(&str, &str, Patch)] = &[
    ("class", "elf-class", |bytes| bytes[4] = 1),
    ("endianness", "elf-endianness", |bytes| bytes[5] = 2),
    ("riscv", "elf-machine", |bytes| bytes[18] = 243),
    ("core-dump", "elf-type", |bytes| bytes[16] = 4),
    ("flags", "elf-flags", |bytes| bytes[48] = 5),
    ("script", "malformed", |bytes| *bytes = b"#!/bin/sh\nexec agent\n".to_vec()),
    ("empty", "malformed", Vec::clear),
    ("half", "malformed", |bytes| bytes.truncate(bytes.len() / 2)),
    ("freebsd", "elf-osabi", |bytes| bytes[7] = 9),
    ("header-alone", "malformed", |bytes| bytes.truncate(64)),
    ("far-headers", "malformed", |bytes| bytes[38] = 0xff),
    ("odd-headers", "malformed", |bytes| bytes[54] = 57),
    ("nothing-to-load", "malformed", |bytes| each_load(bytes, |header| header[0] = 0)),
    ("larger-in-the-file", "malformed", |bytes| each_load(bytes, |header| header[40..48].fill(0))),
    ("wraps", "malformed", |bytes| each_load(bytes, |header| header[40..48].fill(0xff))),
    ("overlaps", "malformed", |bytes| each_load(bytes, |header| header[16..24].fill(0))),
    ("entry", "entry-point", |bytes| bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes())),
    ("odd-alignment", "segment-alignment", |bytes| each_load(bytes, |header| header[48] = 3)),
    ("crooked", "segment-alignment", |bytes| each_load(bytes, |header| header[9] ^= 0x01)),
    ("endless-loader", "interpreter", |bytes| {
        replace(bytes, b"ld-linux-aarch64.so.1\0", b"ld-linux-aarch64.so.1x")
    }),
    ("later-glibc", "symbol-version", |bytes| replace(bytes, b"GLIBC_2.34\0", b"GLIBC_2.99\0")),
    ("other-library", "needed", |bytes| replace(bytes, b"libc.so.6\0", b"libc.so.7\0")),
];

/// Changes every `PT_LOAD`.
fn each_load(bytes: &mut [u8], change: impl Fn(&mut [u8])) {
    for header in bytes[64..].chunks_mut(56).take(9).filter(|header| header[0] == 1) {
        change(header);
    }
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the text is there");
    bytes[at..at + to.len()].copy_from_slice(to);
}
