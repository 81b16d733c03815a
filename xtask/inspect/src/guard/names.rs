//! Reads the names of functions and the settings that Go's compiler has written into the file. The name of a function
//! may contain the features for which the function is chosen at run time.

use std::borrow::Cow;

use crate::isa::Isa;
use crate::isa::features::{Feature, Set};

/// The families of features for which functions are chosen at run time, and the parts of names that stand for them. Among
/// them are OpenBLAS' names of cores.
const CHOSEN: [(Family, &str); 12] = [
    (Family::Sve, "_sve _armv8sve _a64fx _neoversev _neoversen _cortexa _cortexx"),
    (Family::Sme, "_sme _armv9sme _vortexm"),
    (Family::Only(&["sme"]), "_za _tpidr2"),
    (Family::Only(&["mops"]), "_mops"),
    (Family::Only(&["lse", "lse128"]), "_lse"),
    (Family::Only(&["pauth", "pauth-lr"]), "_pauth"),
    (Family::Only(&["mte"]), "_mte _mtag"),
    (Family::Only(&["rng"]), "_rng _rndr _rndrrs"),
    (
        Family::Neon,
        "_neon _dotprod _i8mm _bf16 _sha3 _sha512 _ce _armv8 _thunderx _thunderx2t _thunderx3t _tsv _vortex",
    ),
    (Family::Sse, "_sse2 _sse4 _ssse3"),
    (Family::Avx, "_avx _avx2 _erms _fma _aesni"),
    (Family::Avx512, "_avx512 _evex _vnni"),
];

/// The parts of names that follow a word of [`CHOSEN`] without a gap, as in `_neonbfdot` and `_sve2aes`.
const FOLLOWING: [&str; 14] =
    ["aes", "sha", "sm4", "bf", "i8", "f16", "f32", "fp", "half", "sdot", "udot", "dot", "fhm", "v8"];

/// Features whose instructions no compiler uses unless the source asks for them by an intrinsic, an attribute or
/// assembly: no `-mcpu` and no `-march` makes them of ordinary code. Whoever asks for them knows that cores lack them.
const ON_REQUEST: [&str; 18] = [
    "rng",
    "mte",
    "dit",
    "ssbs",
    "dpb",
    "dpb2",
    "lor",
    "wfxt",
    "ls64",
    "tme",
    "sme",
    "gcs",
    "d128",
    "rdrand",
    "rdseed",
    "rtm",
    "waitpkg",
    "serialize",
];

/// Features of which compilers use single instructions in ordinary code: atomics, pointer authentication, copies, small
/// sums. There are no kernels to choose from for them.
const EVERYWHERE: [&str; 16] = [
    "lse", "lse128", "rcpc", "rcpc2", "rcpc3", "pauth", "pauth-lr", "flagm", "flagm2", "cssc", "cmpbr",
    "popcnt", "bmi1", "bmi2", "lzcnt", "movbe",
];

/// The features that a name stands for. A family has all features of one kind of registers, because code that checks
/// for one of these features also checks for the related ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Sse,
    Avx,
    Avx512,
    Neon,
    Sve,
    Sme,
    Only(&'static [&'static str]),
}

/// A64's features that use the registers of Advanced SIMD, and CRC32, which goes with them.
const NEON: [&str; 14] = [
    "crc32", "aes", "sha1", "sha2", "sha3", "sha512", "sm3", "sm4", "rdm", "fp16", "dotprod", "fhm", "bf16",
    "i8mm",
];

impl Family {
    fn has(self, isa: Isa, feature: &Feature) -> bool {
        let name = feature.name;
        let neon = || isa == Isa::Aarch64 && (NEON.contains(&name) || ["fcma", "frintts"].contains(&name));
        let x86 = |most: &str| {
            let level = feature.level;
            let wide = name.starts_with("avx512") || name.starts_with("amx");
            let extension = level.starts_with("an extension");
            isa == Isa::X86_64 && (!extension && level <= most || extension && (most == "x86-64-v4" || !wide))
        };
        match self {
            Self::Sse => {
                x86("x86-64-v2") && !["avx", "vaes", "vpclmul"].iter().any(|wide| name.starts_with(wide))
            }
            Self::Avx => x86("x86-64-v3"),
            Self::Avx512 => x86("x86-64-v4"),
            Self::Neon => neon(),
            Self::Sve => neon() || ["sve", "sve2"].contains(&name),
            Self::Sme => neon() || ["sve", "sve2", "sme"].contains(&name),
            Self::Only(names) => isa == Isa::Aarch64 && names.contains(&name),
        }
    }
}

/// Returns the features for which a function is chosen according to its name. The set is empty if the name says
/// nothing about features.
pub(crate) fn chosen_for(isa: Isa, name: &[u8]) -> Set {
    let name = String::from_utf8_lossy(name);
    let text = without_crate(&name).map_or_else(|| name.clone(), Cow::Owned);
    let name = text.to_ascii_lowercase();
    let says = |word: &str| name.match_indices(word).any(|(at, _)| word_ends(&text, &name, at + word.len()));
    // These are libgcc's outline atomics, which test a variable of their own.
    let outline = name.starts_with("__aarch64_")
        && ["_relax", "_acq", "_rel", "_sync"].iter().any(|end| name.ends_with(end));
    let outline = outline.then_some(Family::Only(&["lse"]));
    let named = CHOSEN.iter().filter(|(_, words)| words.split(' ').any(says));
    let families = named.map(|(family, _)| *family).chain(outline).chain(vector_variant(text.as_bytes()));
    families.fold(Set::NONE, |all, family| all | set(isa, |feature| family.has(isa, feature)))
}

/// Returns a mangled name of Rust without the name of the crate, which says nothing about a function. In rustc's legacy
/// mangling, the crate comes first, and a hash comes last: `_ZN5crate8function17h0123456789abcdefE`. Returns `None` for
/// other names.
fn without_crate(name: &str) -> Option<String> {
    let path = name.strip_prefix("_ZN")?;
    let (_, hash) = path.strip_suffix('E')?.rsplit_once("17h")?;
    let rest = path.trim_start_matches(|next: char| next.is_ascii_digit());
    let length: usize = path[..path.len() - rest.len()].parse().ok()?;
    let is_rust = hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_rust.then(|| format!("_ZN{}", rest.get(length..).unwrap_or_default()))
}

/// Returns whether a word of a name ends at `at`. Digits, other words of this kind, and the `I` before the arguments of a
/// template may follow it without a gap. The second text is the first one in lower case.
fn word_ends(text: &str, lower: &str, at: usize) -> bool {
    let rest = lower[at..].trim_start_matches(|next: char| next.is_ascii_digit());
    let behind = lower.len() - rest.len();
    rest.chars().next().is_none_or(|next| !next.is_ascii_alphanumeric())
        || text[behind..].starts_with('I')
        || FOLLOWING.iter().any(|word| rest.starts_with(word))
        || (at..=behind).any(|end| is_end_of_identifier(lower, end))
}

/// Returns whether an identifier of a mangled name ends at `at`. Such names have the length before each identifier.
fn is_end_of_identifier(lower: &str, at: usize) -> bool {
    let digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    let bytes = lower.as_bytes();
    // A digit may belong to the identifier before: `_ZN4x2659dct8_sve` has `x265` and `dct8_sve`.
    let starts = (1..at).filter(|start| digit(bytes.get(*start)) && bytes[*start] != b'0');
    lower.starts_with("_z")
        && starts.into_iter().any(|start| {
            let end = start + bytes[start..at].iter().take_while(|byte| digit(Some(byte))).count();
            lower[start..end].parse() == Ok(at - end)
        })
}

/// Returns the features of a vector variant of a function: `_ZGVs…` for SVE, `_ZGVd…` for AVX2. Only code with such
/// instructions calls it (Vector Function ABI for AArch64, 3.5; the same for x86-64).
fn vector_variant(name: &[u8]) -> Option<Family> {
    match name.strip_prefix(b"_ZGV")?.first()? {
        b's' => Some(Family::Sve),
        b'c' | b'd' => Some(Family::Avx),
        b'e' => Some(Family::Avx512),
        _ => None,
    }
}

/// Returns whether a function is a vector variant, which only code with the same instructions calls.
pub(crate) fn is_vector_variant(name: &[u8]) -> bool {
    vector_variant(name).is_some()
}

/// Returns the features of [`ON_REQUEST`].
pub(crate) fn on_request(isa: Isa) -> Set {
    set(isa, |feature| ON_REQUEST.contains(&feature.name))
}

/// Returns the features of [`EVERYWHERE`].
pub(crate) fn everywhere(isa: Isa) -> Set {
    set(isa, |feature| EVERYWHERE.contains(&feature.name))
}

/// Returns the setting by which Go's compiler was allowed to use features without a check, and these features. Go
/// writes the setting into its programs since 1.18 (GOAMD64) and 1.23 (GOARM64), see go.dev/wiki/MinimumRequirements.
pub(crate) fn go_level(isa: Isa, bytes: &[u8]) -> Option<(String, Set)> {
    const LONGEST: usize = 40;
    let key = match isa {
        Isa::Aarch64 => &b"build\tGOARM64="[..],
        Isa::X86_64 => b"build\tGOAMD64=",
    };
    let start = memchr::memmem::find(bytes, key)? + key.len();
    let rest = bytes.get(start..)?;
    let end = rest.iter().take(LONGEST).position(|byte| *byte == b'\n')?;
    let setting = std::str::from_utf8(rest.get(..end)?).ok()?;
    let mut parts = setting.split(',');
    let level = parts.next()?;
    let options: Vec<&str> = parts.collect();
    let needs = match isa {
        Isa::X86_64 => set(isa, |feature| {
            feature.level <= &*format!("x86-64-{level}") && feature.level.starts_with("x86")
        }),
        Isa::Aarch64 => set(isa, |feature| {
            let option = match feature.name {
                "lse" => "lse",
                "aes" | "sha1" | "sha2" => "crypto",
                _ => "",
            };
            let of_level = armv8(level).zip(minor(feature.level)).is_some_and(|(told, first)| told >= first);
            options.contains(&option) || of_level
        }),
    };
    Some((setting.to_owned(), needs))
}

/// Returns the minor version of Armv8 that corresponds to one of Go's levels: v9.N has the features of v8.(N+5).
fn armv8(level: &str) -> Option<u32> {
    match level.split_once('.') {
        Some(("v8", minor)) => minor.parse().ok(),
        Some(("v9", minor)) => Some(minor.parse::<u32>().ok()?.saturating_add(5)),
        _ => None,
    }
}

/// Returns N if every core since Armv8.N has the feature. Optional features have no such N, since no level requires
/// them.
fn minor(level: &str) -> Option<u32> {
    level.strip_prefix("Armv8.")?.strip_suffix("-A")?.parse().ok()
}

fn set(isa: Isa, has: impl Fn(&Feature) -> bool) -> Set {
    let all = isa.features().iter().enumerate();
    all.filter(|(_, feature)| has(feature)).fold(Set::NONE, |set, (index, _)| set | Set::of(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(isa: Isa, set: Set) -> Vec<&'static str> {
        set.iter().map(|index| isa.features()[index].name).collect()
    }

    #[test]
    fn a_name_promises_its_own_kind_of_registers_and_no_other() {
        let promises =
            |isa, name: &str, feature: &str| names(isa, chosen_for(isa, name.as_bytes())).contains(&feature);
        let table = [
            (Isa::Aarch64, "__memcpy_sve", "sve", true),
            (Isa::Aarch64, "__memcpy_sve", "mops", false),
            (Isa::Aarch64, "__memcpy_service", "sve", false),
            (Isa::Aarch64, "sha512_block_armv8", "sha512", true),
            (Isa::Aarch64, "filter_neon", "sve", false),
            (Isa::Aarch64, "__aarch64_ldadd8_acq_rel", "lse", true),
            (Isa::Aarch64, "ldadd8_acq_rel", "lse", false),
            (Isa::Aarch64, "ff_hevc_put_sme2", "sme", true),
            (Isa::Aarch64, "_ZN5arrow6Filter11scan_sve256EPKhl", "sve", true),
            (Isa::Aarch64, "sz_hash_sve2aes", "sve2", true),
            (Isa::Aarch64, "simsimd_dot_neonbfdot", "bf16", true),
            (Isa::Aarch64, "dgemm_kernel_NEOVERSEV1", "sve", true),
            (Isa::Aarch64, "_ZN4x26510filter_i8mmILi8EEEvPh", "i8mm", true),
            (Isa::Aarch64, "_Z8sums_svePKfi", "sve", true),
            (Isa::Aarch64, "_Z10sums_svelterPKfi", "sve", false),
            (Isa::Aarch64, "filter_i8mmish", "i8mm", false),
            (Isa::Aarch64, "_ZN8uses_sve4main17h663d6a54474ad26bE", "sve", false),
            (Isa::Aarch64, "_ZN4dots8sum_sve217h663d6a54474ad26bE", "sve", true),
            (Isa::Aarch64, "_ZN8simd_sve3dotEPKf", "sve", true),
            (Isa::Aarch64, "_ZN4x2659dct16_sveEPKsPsl", "sve", true),
            (Isa::Aarch64, "_ZN4x26510dct16_svelEPKsPsl", "sve", false),
            (Isa::Aarch64, "_armv8_rng_probe", "rng", true),
            (Isa::Aarch64, "OPENSSL_rndr_asm", "rng", true),
            (Isa::Aarch64, "__arm_tpidr2_restore", "sme", true),
            (Isa::Aarch64, "__libunwind_Registers_arm64_za_disable", "sme", true),
            (Isa::Aarch64, "_ZGVsMxv_acosf", "sve", true),
            (Isa::Aarch64, "_ZGVnN4v_acosf", "sve", false),
            (Isa::X86_64, "_ZGVdN4v_sin", "avx2", true),
            (Isa::X86_64, "_ZGVbN2v_sin", "avx2", false),
            (Isa::X86_64, "__memmove_avx_unaligned_erms", "avx2", true),
            (Isa::X86_64, "__memmove_avx_unaligned_erms", "avx512f", false),
            (Isa::X86_64, "__strlen_evex", "avx512vl", true),
            (Isa::X86_64, "__strcpy_ssse3", "ssse3", true),
            (Isa::X86_64, "__strcpy_ssse3", "avx2", false),
            (Isa::X86_64, "aes_gcm_vaes_avx2", "vaes", true),
            (Isa::X86_64, "x_sve", "avx", false),
        ];
        for (isa, name, feature, promised) in table {
            assert_eq!(promises(isa, name, feature), promised, "{name}: {feature}");
        }
    }

    #[test]
    fn the_lists_name_features_of_the_table() {
        let is_known = |name| [Isa::Aarch64, Isa::X86_64].iter().any(|isa| isa.feature(name).is_some());
        assert_eq!(EVERYWHERE.iter().chain(&ON_REQUEST).find(|name| !is_known(name)), None);
    }

    #[test]
    fn what_go_was_told_is_read_as_far_as_it_is_a_level() {
        let read = |isa, text: &[u8]| go_level(isa, text).map(|(setting, set)| (setting, names(isa, set)));
        let (setting, arm) = read(Isa::Aarch64, b"\0build\tGOARM64=v8.2,crypto\nx").unwrap();
        assert_eq!(setting, "v8.2,crypto");
        assert_eq!(arm, ["aes", "sha1", "sha2", "lse", "rdm", "lor", "dpb"]);
        assert_eq!(read(Isa::Aarch64, b"build\tGOARM64=v8.0\n").unwrap().1, [""; 0]);
        assert_eq!(read(Isa::Aarch64, b"build\tGOARM64=v8.0,lse\n").unwrap().1, ["lse"]);
        assert!(read(Isa::Aarch64, b"build\tGOARM64=v9.0\n").unwrap().1.contains(&"sb"));
        assert!(read(Isa::X86_64, b"build\tGOAMD64=v3\n").unwrap().1.contains(&"avx2"));
        assert_eq!(read(Isa::X86_64, b"build\tGOAMD64=v1\n").unwrap().1, [""; 0]);
        for no in [&b"build\tGOARM64="[..], b"build\tGOARM64=v8.0", b"GOARM64=v8.0\n", b""] {
            assert_eq!(read(Isa::Aarch64, no), None);
        }
    }
}
