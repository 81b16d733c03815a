//! The features that distinguish instructions, and the level that introduced each feature. A set of features is a
//! `u64`.

use std::ops::{BitAnd, BitOr, Not};
use std::sync::LazyLock;

/// A feature, with its name in `devices.toml` and the level of the architecture that introduced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// The name in Linux' HWCAPs or in CPUID.
    pub name: &'static str,
    /// The level, such as `Armv8.1-A` or `x86-64-v3`. A feature that no level requires is an extension.
    pub level: &'static str,
}

/// A set of features of one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Set(pub u64);

impl Set {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Returns the set with the feature at `index` of its table.
    pub const fn of(index: usize) -> Self {
        Self(1 << index)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the indices of the features.
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

/// Returns the features in the order of the levels that introduced them.
fn table(levels: &[(&'static str, &'static str)]) -> Vec<Feature> {
    let each = |(level, names): &(&'static str, &'static str)| {
        let level = *level;
        names.split_whitespace().map(move |name| Feature { name, level })
    };
    levels.iter().flat_map(each).collect()
}

/// The features of A64.
pub static A64: LazyLock<Vec<Feature>> = LazyLock::new(|| {
    table(&[
        ("Armv8.0-A, optional", "crc32 aes sha1 sha2"),
        ("Armv8.1-A", "lse rdm lor"),
        ("Armv8.2-A, optional", "fp16 dotprod fhm sha3 sha512 sm3 sm4"),
        ("Armv8.2-A", "dpb"),
        ("Armv8.2-A, optional", "bf16 i8mm sve"),
        ("Armv8.3-A", "rcpc pauth fcma jscvt"),
        ("Armv8.4-A", "flagm rcpc2 dit"),
        ("Armv8.5-A", "flagm2 frintts sb ssbs dpb2"),
        ("Armv8.5-A, optional", "rng mte"),
        ("Armv8.7-A", "wfxt"),
        ("Armv8.7-A, optional", "ls64"),
        ("Armv8.8-A", "mops hbc"),
        ("Armv8.9-A", "cssc"),
        ("Armv8.9-A, optional", "the rcpc3"),
        ("Armv9.0-A", "sve2"),
        ("Armv9.0-A, optional", "tme"),
        ("Armv9.2-A, optional", "sme"),
        ("Armv9.4-A, optional", "gcs lse128 d128"),
        ("Armv9.5-A, optional", "pauth-lr cpa"),
        ("Armv9.6-A", "cmpbr"),
        ("Armv9.6-A, optional", "lsfe"),
    ])
});

/// The features of x86-64 (x86-64 psABI, 3.1.1 "Processor architecture"). The level v1 has no entry, since every
/// processor has it.
pub static X86: LazyLock<Vec<Feature>> = LazyLock::new(|| {
    table(&[
        ("x86-64-v2", "cmpxchg16b popcnt sse3 ssse3 sse4_1 sse4_2"),
        ("x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma lzcnt movbe"),
        ("x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
        ("an extension", "aes pclmulqdq sha adx rdrand rdseed gfni vaes vpclmulqdq rtm avx_vnni"),
        ("an extension", "avx512_bf16 avx512_fp16 avx512_vnni avx512_vbmi avx512_vbmi2 avx512_ifma"),
        ("an extension", "avx512_bitalg avx512_vpopcntdq avx512_vp2intersect avx512er amx_tile amx_int8"),
        ("an extension", "amx_bf16"),
        ("an extension, AMD's", "fma4 xop tbm sse4a d3now"),
        ("an extension", "movdir64b serialize waitpkg sha512 sm3 sm4 avx_ifma avx_vnni_int8"),
        ("an extension", "avx_ne_convert cmpccxadd"),
    ])
});
