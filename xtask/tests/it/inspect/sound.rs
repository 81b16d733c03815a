//! The table of sound executables, which must not be refused.

use super::build::Tool;

/// A row of the table: name, tool, flags, source and device.
pub(crate) type Sound = (&'static str, Tool, &'static str, &'static str, &'static str);

const PLAIN: &str = "#include <stdio.h>\n#include <math.h>\nint main(int c, char **v) { printf(\"%f\\n\", sqrt(c)); return 0; }\n";
const CXX: &str = "#include <iostream>\n#include <vector>\n#include <stdexcept>\nint main(int c, char **v) { std::vector<int> a(c); \
                   try { a.at(99); } catch (std::exception &e) { std::cout << e.what() << a.size() << std::endl; } return 0; }\n";
const ATOMICS: &str = "#include <stdatomic.h>\natomic_long n; atomic_int m;\nint main(void) { atomic_fetch_add(&n, 1); int e = 0; \
                       atomic_compare_exchange_strong(&m, &e, 5); atomic_exchange(&n, 3); return n - 3; }\n";
const IFUNC: &str = "#include <sys/auxv.h>\nstatic int plain(int x) { return x; }\nint fast_sve(int x);\n__asm__(\".arch_extension sve\\n.text\\n\
                     .type fast_sve,%function\\nfast_sve: cntb x0\\n ret\\n.size fast_sve,.-fast_sve\\n\");\ntypedef int f(int);\nstatic f *resolve(unsigned long h) \
                     { return h >> 22 & 1 ? fast_sve : plain; }\nint chosen(int) __attribute__((ifunc(\"resolve\")));\nint main(void) { return chosen(0); }\n";
const AUXV: &str = "#include <sys/auxv.h>\nint counted(void);\n__asm__(\".arch_extension sve\\n.text\\n.type counted,%function\\ncounted: cntb x0\\n ret\\n\
                    .size counted,.-counted\\n\");\nint main(void) { if (getauxval(AT_HWCAP) >> 22 & 1) return counted() == 0; return 0; }\n";
const FLAG: &str = "#include <sys/auxv.h>\nint counted(void);\nstatic volatile int has;\n__asm__(\".arch_extension sve\\n.text\\n.type counted,%function\\n\
                    counted: cntb x0\\n ret\\n.size counted,.-counted\\n\");\n__attribute__((constructor)) void look(void) { has = getauxval(AT_HWCAP) >> 22 & 1; }\n\
                    __attribute__((noinline)) int work(void) { return has ? counted() : 0; }\nint main(void) { return work(); }\n";
const PREDICATE: &str = "#include <sys/auxv.h>\nint counted(void);\n__asm__(\".arch_extension sve\\n.text\\n.type counted,%function\\ncounted: cntb x0\\n ret\\n\\
                    .size counted,.-counted\\n\");\n__attribute__((noinline)) int can(void) { return getauxval(AT_HWCAP) >> 22 & 1; }\n\
                    int main(void) { if (can()) return counted() == 0; return 0; }\n";
const TABLE: &str = "__asm__(\".text\\n.type table,%function\\ntable: ret\\n.word 0x04e0e3e0,0x25208028,0,0xffffffff,0,0xffffffff,0x04e0e3e0\\n.size table,.-table\\n\");\n\
                     void table(void);\nint main(void) { table(); return 0; }\n";
const CPUID: &str = "__attribute__((target(\"avx2\"))) static int fast(int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i]; return s; }\n\
                     static int slow(int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s ^= a[i]; return s; }\nstatic int a[999];\n\
                     int main(void) { __builtin_cpu_init(); return __builtin_cpu_supports(\"avx2\") ? fast(a, 999) : slow(a, 999); }\n";
const GO: &str = "__attribute__((section(\".go.buildinfo\"), used)) static const char told[] = \"build\\tGOARM64=v8.0,lse\\n\";\n\
                  static volatile int has;\nint main(void) { if (has) __asm__ volatile(\".arch armv8.4-a\\n cfinv\" ::: \"cc\"); return 0; }\n";
const ALLOCATOR: &str = "#include <unistd.h>\n#include <stdlib.h>\nstatic const char s[] = \"<jemalloc>: Unsupported system page size\\n\";\n\
     __attribute__((noinline)) void boot(void) { long page = sysconf(_SC_PAGESIZE); if (page > 65536) { write(2, s, sizeof s); abort(); } }\n\
     int main(void) { boot(); return 0; }\n";
const RUST: &str = "use std::sync::atomic::{AtomicU64, Ordering};\nstatic N: AtomicU64 = AtomicU64::new(0);\nfn main() { \
     std::thread::spawn(|| N.fetch_add(1, Ordering::SeqCst)).join().unwrap(); println!(\"{}\", N.load(Ordering::SeqCst)); }\n";
const RUST_DETECTS: &str = "#[cfg(target_arch = \"aarch64\")]\n#[target_feature(enable = \"sve\")]\nfn fast(a: &[u32]) -> u32 { a.iter().map(|x| x.wrapping_mul(*x)).fold(0, u32::wrapping_add) }\n\
     fn main() { let a: Vec<u32> = (0..std::env::args().count() as u32 * 999).collect();\n if std::arch::is_aarch64_feature_detected!(\"sve\") \
     { println!(\"{}\", unsafe { fast(&a) }) } else { println!(\"{}\", a.len()) } }\n";
const RUST_X86: &str = "#[target_feature(enable = \"avx2\")]\nfn fast(a: &[u32]) -> u32 { a.iter().map(|x| x.wrapping_mul(*x)).fold(0, u32::wrapping_add) }\n\
     fn main() { let a: Vec<u32> = (0..std::env::args().count() as u32 * 999).collect();\n if std::arch::is_x86_feature_detected!(\"avx2\") \
     { println!(\"{}\", unsafe { fast(&a) }) } else { println!(\"{}\", a.len()) } }\n";

pub(crate) const SOUND: &[Sound] = &[
    ("dynamic", Tool::Arm, "-lm", PLAIN, "pi5"),
    ("stripped", Tool::Arm, "-lm -s", PLAIN, "pi5"),
    ("no-pie", Tool::Arm, "-lm -no-pie", PLAIN, "pi5"),
    ("static", Tool::Arm, "-static -lm", PLAIN, "pi5"),
    ("static-stripped", Tool::Arm, "-static -lm -s", PLAIN, "generic-v8.0"),
    ("static-pie", Tool::Arm, "-static-pie -lm", PLAIN, "pi5"),
    ("debug", Tool::Arm, "-g -O0 -lm", PLAIN, "pi4"),
    ("now", Tool::Arm, "-lm -Wl,-z,now -Wl,-z,relro", PLAIN, "pi5"),
    ("protected", Tool::Arm, "-lm -mbranch-protection=standard", PLAIN, "pi5"),
    ("pages-of-16k", Tool::Arm, "-lm -Wl,-z,max-page-size=16384", PLAIN, "pi5"),
    ("a76", Tool::Arm, "-lm -O3 -mcpu=cortex-a76", PLAIN, "pi5"),
    ("cxx", Tool::ArmCxx, "", CXX, "pi5"),
    ("cxx-stripped", Tool::ArmCxx, "-s", CXX, "generic-v8.0"),
    ("cxx-static", Tool::ArmCxx, "-static", CXX, "pi5"),
    ("outline-atomics", Tool::Arm, "-moutline-atomics", ATOMICS, "pi4"),
    ("outline-atomics-stripped", Tool::Arm, "-moutline-atomics -s", ATOMICS, "pi4"),
    ("outline-atomics-static", Tool::Arm, "-moutline-atomics -static -s", ATOMICS, "generic-v8.0"),
    ("lse", Tool::Arm, "-march=armv8.1-a", ATOMICS, "pi5"),
    ("ifunc", Tool::Arm, "", IFUNC, "pi5"),
    ("ifunc-stripped", Tool::Arm, "-s", IFUNC, "pi5"),
    ("auxv", Tool::Arm, "", AUXV, "pi5"),
    ("auxv-stripped", Tool::Arm, "-s", AUXV, "pi5"),
    ("predicate", Tool::Arm, "-O2", PREDICATE, "pi5"),
    ("predicate-stripped", Tool::Arm, "-O2 -s", PREDICATE, "pi5"),
    ("flag", Tool::Arm, "", FLAG, "pi5"),
    ("flag-stripped", Tool::Arm, "-s", FLAG, "pi5"),
    ("table-in-code", Tool::Arm, "", TABLE, "pi5"),
    ("allocator", Tool::Arm, "", ALLOCATOR, "pi5"),
    ("rust", Tool::Rust, "", RUST, "pi5"),
    ("rust-stripped", Tool::Rust, "-C strip=symbols", RUST, "pi4"),
    ("rust-detects", Tool::Rust, "-C opt-level=3", RUST_DETECTS, "pi5"),
    ("rust-detects-stripped", Tool::Rust, "-C opt-level=3 -C strip=symbols", RUST_DETECTS, "pi5"),
    ("go", Tool::Arm, "", GO, "pi5"),
    ("x86", Tool::X86, "-lm", PLAIN, "x86-64-v1"),
    ("x86-static", Tool::X86, "-lm -static", PLAIN, "x86-64-v1"),
    ("x86-static-stripped", Tool::X86, "-lm -static -s", PLAIN, "x86-64-v1"),
    ("x86-detects", Tool::X86, "-O3", CPUID, "x86-64-v1"),
    ("x86-detects-stripped", Tool::X86, "-O3 -s", CPUID, "x86-64-v1"),
    ("x86-v3", Tool::X86, "-lm -O3 -march=x86-64-v3", PLAIN, "x86-64-v3"),
    ("musl-static", Tool::Musl, "-static", PLAIN, "x86-64-v1"),
    ("musl-static-stripped", Tool::Musl, "-static -s", PLAIN, "x86-64-v1"),
    ("rust-x86", Tool::RustX86, "", RUST, "x86-64-v1"),
    ("rust-x86-detects", Tool::RustX86, "-C opt-level=3", RUST_X86, "x86-64-v1"),
];
