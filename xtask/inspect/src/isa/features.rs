//! The features that instructions are told apart by, and when they came. A set of them is a `u64`.

use std::ops::{BitAnd, BitOr, Not};

/// A feature: its name in `devices.toml`, and the level of the architecture that brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// As Linux' HWCAPs or CPUID call it.
    pub name: &'static str,
    /// `Armv8.1-A`, `x86-64-v3`; what no level asks for is an extension.
    pub level: &'static str,
}

/// A set of features of one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Set(pub u64);

impl Set {
    /// None.
    pub const NONE: Self = Self(0);

    /// The one at `index` of its table.
    pub const fn of(index: usize) -> Self {
        Self(1 << index)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The indices.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |index| self.0 >> index & 1 == 1)
    }
}

impl BitAnd for Set {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Set {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Not for Set {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0)
    }
}

const fn feature(name: &'static str, level: &'static str) -> Feature {
    Feature { name, level }
}

/// A64.
pub const A64: &[Feature] = &[
    feature("crc32", "Armv8.0-A, optional"),
    feature("aes", "Armv8.0-A, optional"),
    feature("sha1", "Armv8.0-A, optional"),
    feature("sha2", "Armv8.0-A, optional"),
    feature("lse", "Armv8.1-A"),
    feature("rdm", "Armv8.1-A"),
    feature("lor", "Armv8.1-A"),
    feature("fp16", "Armv8.2-A, optional"),
    feature("dotprod", "Armv8.2-A, optional"),
    feature("fhm", "Armv8.2-A, optional"),
    feature("sha3", "Armv8.2-A, optional"),
    feature("sha512", "Armv8.2-A, optional"),
    feature("sm3", "Armv8.2-A, optional"),
    feature("sm4", "Armv8.2-A, optional"),
    feature("dpb", "Armv8.2-A"),
    feature("bf16", "Armv8.2-A, optional"),
    feature("i8mm", "Armv8.2-A, optional"),
    feature("sve", "Armv8.2-A, optional"),
    feature("rcpc", "Armv8.3-A"),
    feature("pauth", "Armv8.3-A"),
    feature("fcma", "Armv8.3-A"),
    feature("jscvt", "Armv8.3-A"),
    feature("flagm", "Armv8.4-A"),
    feature("rcpc2", "Armv8.4-A"),
    feature("dit", "Armv8.4-A"),
    feature("flagm2", "Armv8.5-A"),
    feature("frintts", "Armv8.5-A"),
    feature("sb", "Armv8.5-A"),
    feature("ssbs", "Armv8.5-A"),
    feature("dpb2", "Armv8.5-A"),
    feature("rng", "Armv8.5-A, optional"),
    feature("mte", "Armv8.5-A, optional"),
    feature("wfxt", "Armv8.7-A"),
    feature("ls64", "Armv8.7-A, optional"),
    feature("mops", "Armv8.8-A"),
    feature("hbc", "Armv8.8-A"),
    feature("cssc", "Armv8.9-A"),
    feature("the", "Armv8.9-A, optional"),
    feature("rcpc3", "Armv8.9-A, optional"),
    feature("sve2", "Armv9.0-A"),
    feature("tme", "Armv9.0-A, optional"),
    feature("sme", "Armv9.2-A, optional"),
    feature("gcs", "Armv9.4-A, optional"),
    feature("lse128", "Armv9.4-A, optional"),
    feature("d128", "Armv9.4-A, optional"),
    feature("pauth-lr", "Armv9.5-A, optional"),
    feature("cpa", "Armv9.5-A, optional"),
    feature("cmpbr", "Armv9.6-A"),
    feature("lsfe", "Armv9.6-A, optional"),
];

/// x86-64: x86-64 psABI, 3.1.1 "Processor architecture"; v1 is no feature, every processor has it.
pub const X86: &[Feature] = &[
    feature("cmpxchg16b", "x86-64-v2"),
    feature("popcnt", "x86-64-v2"),
    feature("sse3", "x86-64-v2"),
    feature("ssse3", "x86-64-v2"),
    feature("sse4_1", "x86-64-v2"),
    feature("sse4_2", "x86-64-v2"),
    feature("avx", "x86-64-v3"),
    feature("avx2", "x86-64-v3"),
    feature("bmi1", "x86-64-v3"),
    feature("bmi2", "x86-64-v3"),
    feature("f16c", "x86-64-v3"),
    feature("fma", "x86-64-v3"),
    feature("lzcnt", "x86-64-v3"),
    feature("movbe", "x86-64-v3"),
    feature("avx512f", "x86-64-v4"),
    feature("avx512bw", "x86-64-v4"),
    feature("avx512cd", "x86-64-v4"),
    feature("avx512dq", "x86-64-v4"),
    feature("avx512vl", "x86-64-v4"),
    feature("aes", "an extension"),
    feature("pclmulqdq", "an extension"),
    feature("sha", "an extension"),
    feature("adx", "an extension"),
    feature("rdrand", "an extension"),
    feature("rdseed", "an extension"),
    feature("gfni", "an extension"),
    feature("vaes", "an extension"),
    feature("vpclmulqdq", "an extension"),
    feature("rtm", "an extension"),
    feature("avx_vnni", "an extension"),
    feature("avx512_bf16", "an extension"),
    feature("avx512_fp16", "an extension"),
    feature("avx512_vnni", "an extension"),
    feature("avx512_vbmi", "an extension"),
    feature("avx512_vbmi2", "an extension"),
    feature("avx512_ifma", "an extension"),
    feature("avx512_bitalg", "an extension"),
    feature("avx512_vpopcntdq", "an extension"),
    feature("avx512_vp2intersect", "an extension"),
    feature("avx512er", "an extension"),
    feature("amx_tile", "an extension"),
    feature("amx_int8", "an extension"),
    feature("amx_bf16", "an extension"),
    feature("fma4", "an extension, AMD's"),
    feature("xop", "an extension, AMD's"),
    feature("tbm", "an extension, AMD's"),
    feature("sse4a", "an extension, AMD's"),
    feature("d3now", "an extension, AMD's"),
    feature("movdir64b", "an extension"),
    feature("serialize", "an extension"),
    feature("waitpkg", "an extension"),
    feature("sha512", "an extension"),
    feature("sm3", "an extension"),
    feature("sm4", "an extension"),
    feature("avx_ifma", "an extension"),
    feature("avx_vnni_int8", "an extension"),
    feature("avx_ne_convert", "an extension"),
    feature("cmpccxadd", "an extension"),
];
