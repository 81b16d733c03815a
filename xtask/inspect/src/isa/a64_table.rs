//! The architecture feature of each A64 encoding: mask, value, feature. Source: Arm Architecture Reference Manual for
//! A-profile (DDI 0487), C4.1 "A64 instruction set encoding" and A2 "Armv8-A architecture extensions". The tests
//! compare the table with a decoder whose tables come from binutils. Hints (BTI, PACIASP and similar ones) execute as
//! NOP on every core and have no rows. If several rows of a group fit, the first one counts. [`BASE`] marks encodings
//! of Armv8.0 inside a newer feature's space.

use std::collections::HashSet;
use std::sync::LazyLock;

/// The feature of encodings that every core has.
pub(super) const BASE: &str = "";

/// A row: mask, value, feature.
pub(super) type Row = (u32, u32, &'static str);

/// Data processing with immediates and registers, branches, exceptions, system: C4.1.86 to C4.1.95.
pub(super) const SCALAR: &[Row] = &[
    // Data-processing (immediate): tags, minimum and maximum.
    (0xffc0_c000, 0x9180_0000, "mte"),
    (0xffc0_c000, 0xd180_0000, "mte"),
    (0x7ff0_0000, 0x11c0_0000, "cssc"),
    (0xffc0_001f, 0xf380_001f, "pauth-lr"),
    // Data-processing (2 source).
    (0xffe0_fc00, 0x9ac0_0000, "mte"),
    (0xffe0_fc00, 0xbac0_0000, "mte"),
    (0xffe0_fc00, 0x9ac0_1000, "mte"),
    (0xffe0_fc00, 0x9ac0_1400, "mte"),
    (0xffe0_fc00, 0x9ac0_3000, "pauth"),
    (0x7fe0_e000, 0x1ac0_4000, "crc32"),
    (0x7fe0_f000, 0x1ac0_6000, "cssc"),
    // Data-processing (1 source).
    (0x7fff_fc00, 0x5ac0_2000, "cssc"),
    (0x7fff_fc00, 0x5ac0_1c00, "cssc"),
    (0x7fff_fc00, 0x5ac0_1800, "cssc"),
    (0xffff_8000, 0xdac1_0000, "pauth"),
    (0xffff_8000, 0xdac1_8000, "pauth-lr"),
    // Add/subtract (checked pointer), multiply-add (checked pointer).
    (0xbfe0_e000, 0x9a00_2000, "cpa"),
    (0xffe0_0000, 0x9b60_0000, "cpa"),
    // Rotate right into flags, evaluate into flags.
    (0xffe0_7c10, 0xba00_0400, "flagm"),
    (0xffff_bc1f, 0x3a00_080d, "flagm"),
    // Branches (register), compare and branch, consistent conditional branches.
    (0xffdf_f800, 0xd61f_0800, "pauth"),
    (0xffdf_f800, 0xd71f_0800, "pauth"),
    (0xffff_fbff, 0xd65f_0bff, "pauth"),
    (0xffff_fbff, 0xd69f_0bff, "pauth"),
    (0xffc0_001f, 0x5500_001f, "pauth-lr"),
    (0xffff_fbe0, 0xd65f_0be0, "pauth-lr"),
    (0xff00_0010, 0x5400_0010, "hbc"),
    (0x7e00_0000, 0x7400_0000, "cmpbr"),
    // System: flags, barriers, waits, transactions, register pairs.
    (0xffff_ffff, 0xd500_401f, "flagm"),
    (0xffff_ffdf, 0xd500_401f, "flagm2"),
    (0xffff_ffff, 0xd500_405f, "flagm2"),
    (0xffff_ffff, 0xd503_30ff, "sb"),
    (0xffff_ffc0, 0xd503_1000, "wfxt"),
    (0xffff_ffe0, 0xd523_3060, "tme"),
    (0xffff_ffff, 0xd503_307f, "tme"),
    (0xffe0_001f, 0xd460_0000, "tme"),
    (0xffd0_0000, 0xd550_0000, "d128"),
    (0xfff8_0000, 0xd548_0000, "d128"),
    // MSR and MRS of registers that user space may write or read: DIT, SSBS, TCO, random numbers.
    (0xffff_f0ff, 0xd503_405f, "dit"),
    (0xffdf_ffe0, 0xd51b_42a0, "dit"),
    (0xffff_f0ff, 0xd503_403f, "ssbs"),
    (0xffdf_ffe0, 0xd51b_42c0, "ssbs"),
    (0xffff_f0ff, 0xd503_409f, "mte"),
    (0xffdf_ffe0, 0xd51b_42e0, "mte"),
    (0xffff_ffc0, 0xd53b_2400, "rng"),
    // DC CVAP, CVADP.
    (0xffff_ffe0, 0xd50b_7c20, "dpb"),
    (0xffff_ffe0, 0xd50b_7d20, "dpb2"),
];

/// Loads and stores: C4.1.94.
pub(super) const LOADS: &[Row] = &[
    // Compare and swap, its pairs.
    (0x3fa0_7c00, 0x08a0_7c00, "lse"),
    (0xbfa0_7c00, 0x0820_7c00, "lse"),
    // Load-acquire and store-release of limited ordering regions.
    (0x3fff_fc00, 0x08df_7c00, "lor"),
    (0x3fff_fc00, 0x089f_7c00, "lor"),
    // Atomic memory operations.
    (0x3fff_fc00, 0x38bf_c000, "rcpc"),
    (0x3f20_8c00, 0x3820_0000, "lse"),
    (0x3f20_fc00, 0x3820_8000, "lse"),
    (0xffff_fc00, 0xf83f_9000, "ls64"),
    (0xffff_fc00, 0xf83f_d000, "ls64"),
    (0xffe0_fc00, 0xf820_b000, "ls64"),
    (0xffe0_fc00, 0xf820_a000, "ls64"),
    (0x3f20_cc00, 0x3820_8000, "the"),
    (0x3f20_0c00, 0x3c20_0000, "lsfe"),
    (0xbf20_f800, 0x1920_0800, "the"),
    (0xbf20_fc00, 0x1920_9000, "the"),
    (0xbf20_fc00, 0x1920_a000, "the"),
    (0xbf20_fc00, 0x1920_b000, "the"),
    (0xff20_fc00, 0x1920_1000, "lse128"),
    (0xff20_fc00, 0x1920_3000, "lse128"),
    (0xff20_fc00, 0x1920_8000, "lse128"),
    // Loads with pointer authentication.
    (0xff20_0400, 0xf820_0400, "pauth"),
    // Load-acquire and store-release with offsets.
    (0x3f20_0c00, 0x1900_0000, "rcpc2"),
    (0xbfa0_ec00, 0x9900_0800, "rcpc3"),
    (0xbfff_fc00, 0x99c0_0800, "rcpc3"),
    (0xbfff_fc00, 0x9980_0800, "rcpc3"),
    (0x3f20_0c00, 0x1d00_0800, "rcpc3"),
    (0xbfbf_fc00, 0x0d01_8400, "rcpc3"),
    // Tags.
    (0xff20_0000, 0xd920_0000, "mte"),
    (0xfe40_0000, 0x6800_0000, "mte"),
    // Memory copy and set.
    (0xfb20_0c00, 0x1900_0400, "mops"),
    // Guarded control stack.
    (0xffff_ec00, 0xd91f_0c00, "gcs"),
];

/// SIMD and floating point: C4.1.96.
pub(super) const SIMD: &[Row] = &[
    // Cryptography.
    (0xffff_cc00, 0x4e28_4800, "aes"),
    (0xbfe0_fc00, 0x0ee0_e000, "aes"),
    (0xffe0_cc00, 0x5e00_0000, "sha1"),
    (0xffff_ec00, 0x5e28_0800, "sha1"),
    (0xffe0_cc00, 0x5e00_4000, "sha2"),
    (0xffff_fc00, 0x5e28_2800, "sha2"),
    (0xffe0_fc00, 0xce60_8c00, "sha3"),
    (0xffe0_f000, 0xce60_8000, "sha512"),
    (0xffff_fc00, 0xcec0_8000, "sha512"),
    (0xffe0_8000, 0xce00_0000, "sha3"),
    (0xffe0_8000, 0xce20_0000, "sha3"),
    (0xffe0_0000, 0xce80_0000, "sha3"),
    (0xffe0_8000, 0xce40_0000, "sm3"),
    (0xffe0_c000, 0xce40_8000, "sm3"),
    (0xffe0_f800, 0xce60_c000, "sm3"),
    (0xffff_fc00, 0xcec0_8400, "sm4"),
    (0xffe0_fc00, 0xce60_c800, "sm4"),
    // Dot products and matrices.
    (0x9fe0_fc00, 0x0e80_9400, "dotprod"),
    (0x9fc0_f400, 0x0f80_e000, "dotprod"),
    (0xbfe0_fc00, 0x0e80_9c00, "i8mm"),
    (0xbf40_f400, 0x0f00_f000, "i8mm"),
    (0xdfe0_fc00, 0x4e80_a400, "i8mm"),
    (0xffe0_fc00, 0x4e80_ac00, "i8mm"),
    (0xbfe0_fc00, 0x2e40_fc00, "bf16"),
    (0xbf40_f400, 0x0f40_f000, "bf16"),
    (0xbfe0_fc00, 0x2ec0_fc00, "bf16"),
    (0xffe0_fc00, 0x6e40_ec00, "bf16"),
    (0xbfff_fc00, 0x0ea1_6800, "bf16"),
    (0xffff_fc00, 0x1e63_4000, "bf16"),
    // Rounding doubling multiply accumulate.
    (0xbf20_f400, 0x2e00_8400, "rdm"),
    (0xff20_f400, 0x7e00_8400, "rdm"),
    (0xbf00_d400, 0x2f00_d000, "rdm"),
    (0xff00_d400, 0x7f00_d000, "rdm"),
    // Complex numbers.
    (0xbf20_e400, 0x2e00_c400, "fcma"),
    (0xbf20_ec00, 0x2e00_e400, "fcma"),
    (0xbfc0_9400, 0x2f40_1000, "fcma"),
    (0xffc0_9400, 0x6f80_1000, "fcma"),
    // Conversions and roundings.
    (0xffff_fc00, 0x1e7e_0000, "jscvt"),
    (0xffbe_7c00, 0x1e28_4000, "frintts"),
    (0x9fbf_ec00, 0x0e21_e800, "frintts"),
    // Half precision multiplied into single.
    (0xbf60_fc00, 0x0e20_ec00, "fhm"),
    (0xbf60_fc00, 0x2e20_cc00, "fhm"),
    (0xbfc0_b400, 0x0f80_0000, "fhm"),
    (0xbfc0_b400, 0x2f80_8000, "fhm"),
    // Half precision. Conversions to and from it are in Armv8.0.
    (0xffff_7c00, 0x1ee2_4000, BASE),
    (0x7fe0_0000, 0x1ee0_0000, "fp16"),
    (0x7fe0_0000, 0x1ec0_0000, "fp16"),
    (0xffc0_0000, 0x1fc0_0000, "fp16"),
    (0x9f60_c400, 0x0e40_0400, "fp16"),
    (0xdf60_c400, 0x5e40_0400, "fp16"),
    (0x9f7e_0c00, 0x0e78_0800, "fp16"),
    (0xdf7e_0c00, 0x5e78_0800, "fp16"),
    (0xbf7f_cc00, 0x0e30_c800, "fp16"),
    (0xff7f_fc00, 0x5e30_c800, "fp16"),
    (0xff7f_fc00, 0x5e30_d800, "fp16"),
    (0xff7f_fc00, 0x5e30_f800, "fp16"),
    (0xbfc0_b400, 0x0f00_1000, "fp16"),
    (0x9fc0_f400, 0x0f00_9000, "fp16"),
    (0xffc0_b400, 0x5f00_1000, "fp16"),
    (0xdfc0_f400, 0x5f00_9000, "fp16"),
    (0xbff8_fc00, 0x0f00_fc00, "fp16"),
    (0x9ff0_fc00, 0x0f10_e400, "fp16"),
    (0x9ff0_fc00, 0x0f10_fc00, "fp16"),
    (0xdff0_fc00, 0x5f10_e400, "fp16"),
    (0xdff0_fc00, 0x5f10_fc00, "fp16"),
];

/// The mnemonics that are new in SVE2. The other encodings of SVE2 share a mnemonic with SVE, and count as SVE.
pub(super) static SVE2: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    let names = "
        adclb adclt addhnb addhnt bcax bdep bext bgrp bsl bsl1n bsl2n cadd cdot cmla eor3 eorbt eortb fcvtlt
        fcvtnt fcvtxnt flogb fmlalb fmlalt fmlslb fmlslt histcnt histseg match nbsl nmatch pmullb pmullt
        raddhnb raddhnt rshrnb rshrnt rsubhnb rsubhnt sabalb sabalt sabdlb sabdlt saddlb saddlbt saddlt
        saddwb saddwt sbclb sbclt shadd shrnb shrnt shsub shsubr smlalb smlalt smlslb smlslt smullb smullt
        sqcadd sqdmlalb sqdmlalbt sqdmlalt sqdmlslb sqdmlslbt sqdmlslt sqdmullb sqdmullt sqrdcmlah sqrdmlah
        sqrdmlsh sqrshl sqrshlr sqrshrnb sqrshrnt sqrshrunb sqrshrunt sqshl sqshlr sqshlu sqshrnb sqshrnt
        sqshrunb sqshrunt sqxtnb sqxtnt sqxtunb sqxtunt srhadd srshl srshlr srshr srsra ssra sshllb sshllt
        ssublb ssublbt ssublt ssubltb ssubwb ssubwt subhnb subhnt suqadd tbx uabalb uabalt uabdlb uabdlt
        uaddlb uaddlt uaddwb uaddwt uhadd uhsub uhsubr umlalb umlalt umlslb umlslt umullb umullt uqrshl
        uqrshlr uqrshrnb uqrshrnt uqshl uqshlr uqshrnb uqshrnt uqxtnb uqxtnt urecpe urhadd urshl urshlr
        urshr ursqrte ursra ushllb ushllt usqadd usra usublb usublt usubwb usubwt whilege whilegt whilehi
        whilehs whilerw whilewr xar
    ";
    names.split_whitespace().collect()
});
