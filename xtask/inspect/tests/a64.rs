//! Compares the table of A64 features, word by word, with a second decoder, whose tables come from binutils.

use std::collections::BTreeMap;

use disarm64::InsnOpcode as _;
use inspect::isa::a64::{decode, need};
use inspect::isa::features::A64;

/// Returns the name in the crate's table for one of binutils' feature sets. `None` stands for a feature that every core
/// has. `Some("?")` stands for a feature without a row in the crate's table, since no compiler uses it yet.
fn named(set: &str) -> Option<&'static str> {
    Some(match set {
        "V8" | "FP" | "SIMD" => return None,
        "CRC" => "crc32",
        "AES" => "aes",
        "SHA2" => "sha1|sha2",
        "LSE" => "lse",
        "RDMA" => "rdm",
        "LOR" => "lor",
        "FP_F16" | "SIMD_F16" | "FP_16_V8_2A" => "fp16|fhm",
        "DOTPROD" => "dotprod",
        "SHA3" => "sha3|sha512",
        "SM4" => "sm3|sm4",
        "BFLOAT16" => "bf16",
        "I8MM" => "i8mm",
        "RCPC" => "rcpc",
        "PAUTH" => "pauth",
        "COMPNUM" => "fcma",
        "JSCVT" => "jscvt",
        "FLAGM" => "flagm",
        "FLAGMANIP" => "flagm2",
        "RCPC2" => "rcpc2",
        "FRINTTS" => "frintts",
        "SB" => "sb",
        "MEMTAG" => "mte",
        "WFXT" => "wfxt",
        "LS64" => "ls64",
        "MOPS" | "MOPS_MEMTAG" => "mops",
        "CSSC" => "cssc",
        "THE" | "D128_THE" => "the",
        "RCPC3" => "rcpc3",
        "TME" => "tme",
        "GCS" => "gcs",
        "LSE128" => "lse128",
        "D128" => "d128",
        "CPA" => "cpa",
        "CMPBR" => "cmpbr",
        "LSFE" => "lsfe",
        "HBC" => "hbc",
        set if set.starts_with("SME") => "sme|sve|sve2",
        set if set.contains("SVE") => "sve|sve2|sme",
        _ => "?",
    })
}

#[test]
fn every_kind_of_word_has_the_feature_that_binutils_gives_it() {
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut wrong: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    let (mut compared, mut unknown) = (0, 0);
    for _ in 0..20_000_000u32 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let word = (random >> 16) as u32;
        let Some(theirs) = disarm64::decoder::decode(word) else { continue };
        let definition = theirs.definition();
        let set = format!("{:?}", definition.feature_set);
        let theirs = named(&set);
        if theirs == Some("?") {
            continue;
        }
        // These words have reserved sizes and shifts. The other decoder accepts them as instructions.
        if decode(word).is_none() {
            unknown += 1;
            continue;
        }
        compared += 1;
        let ours = need(word).iter().next().map(|index| A64[index].name);
        // One row of the other table covers single, double and half precision. For system registers, the other table
        // does not say which ones are newer.
        let broad =
            ["fcvtzs", "fcvtzu", "scvtf", "ucvtf", "mrs", "msr", "sys", "dc"].contains(&definition.mnemonic);
        let same = match (ours, theirs) {
            (None, Some(_)) if definition.mnemonic == "cntd" => true,
            // STG and its variants, with the same register for the tag and for the place.
            (None, Some("mte")) if word & 0xff20_0000 == 0xd920_0000 && word & 31 == word >> 5 & 31 => true,
            (None, Some("fp16|fhm")) | (Some("dit" | "ssbs" | "mte" | "rng" | "dpb" | "dpb2"), None)
                if broad =>
            {
                true
            }
            (None, None) => true,
            (Some(ours), Some(theirs)) => theirs.split('|').any(|name| name == ours),
            _ => false,
        };
        if !same {
            let entry =
                wrong.entry(format!("{} {set} ours {ours:?}", definition.mnemonic)).or_insert((0, word));
            entry.0 += 1;
        }
    }
    println!("{compared} words compared, {unknown} that only the other decodes");
    assert!(wrong.is_empty(), "{wrong:#x?}");
}
