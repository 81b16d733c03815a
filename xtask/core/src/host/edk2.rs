//! Reads the release of a UEFI firmware from its file, and lists the releases that are known to fail with a version of
//! QEMU.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use super::tools;
use crate::arch::Global;

/// The number of bytes of a firmware's file that are searched. An OVMF file is smaller than this. A file for Arm is
/// larger, but its uncompressed part is in the first megabyte.
const SEARCHED_BYTES: u64 = 4 << 20;

/// The GUID of LZMA-compressed sections (edk2, MdeModulePkg/Include/Guid/LzmaDecompress.h), in the byte order of the
/// file.
const LZMA: [u8; 16] =
    [0x98, 0x58, 0x4e, 0xee, 0x14, 0x39, 0x59, 0x42, 0x9d, 0x6e, 0xdc, 0x7b, 0xd7, 0x94, 0x03, 0xcf];
/// The type of a section that is defined by a GUID (PI specification, volume 3, EFI_SECTION_GUID_DEFINED). The next
/// constant is the length of such a section's header, with the size and type, the GUID, the offset and the attributes.
const GUIDED: u8 = 2;
const GUIDED_HEADER: usize = 24;

/// An edk2 release. Releases are named by year and month.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edk2 {
    /// The year of the release, such as 2022 in edk2-stable202211.
    pub year: u16,
    /// The month of the release, such as 11 in edk2-stable202211.
    pub month: u8,
}

impl fmt::Display for Edk2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.year, self.month)
    }
}

impl Edk2 {
    pub const fn new(year: u16, month: u8) -> Self {
        Self { year, month }
    }

    /// Returns the release that the firmware's file names. The name may be in plain text or, as in OVMF, in a
    /// compressed section. Returns `None` if the file names no release, such as Debian 12's OVMF. Also returns `None`
    /// if the section cannot be unpacked because xz(1) is missing.
    pub fn read(code: &Path) -> Option<Self> {
        let mut bytes = Vec::new();
        File::open(code).ok()?.take(SEARCHED_BYTES).read_to_end(&mut bytes).ok()?;
        Self::find(&bytes).or_else(|| Self::find(unpacked(compressed(&bytes)?)?.as_bytes()))
    }

    /// Returns the first release that `bytes` name: `edk2-2022.11/` in a build path (Debian), `edk2-stable202505`
    /// (Arch, openSUSE) or `edk2-20250523-` (Fedora), in ASCII or in UEFI's 16-bit characters.
    fn find(bytes: &[u8]) -> Option<Self> {
        // Bytes that are not UTF-8 become replacement characters, which occur in no name.
        let text = String::from_utf8_lossy(bytes);
        named_in(&text, "edk2-")
            .or_else(|| named_in(&text, "e\0d\0k\x002\0-\0"))
            .or_else(|| text.match_indices("2\x000\0").find_map(|(at, _)| dotted(&text[at..])))
    }
}

/// Parses a release such as `2025.02` in 16-bit characters. Debian writes it into PcdFirmwareVersionString in this
/// form.
fn dotted(text: &str) -> Option<Edk2> {
    let start: String = text.chars().take(2 * "2025.02".len()).filter(|c| *c != '\0').collect();
    let (year, month) = start.split_once('.')?;
    (year.len() == 4 && month.len() == 2).then(|| release(&format!("{year}{month}")))?
}

/// Returns the content of the first compressed section.
fn compressed(bytes: &[u8]) -> Option<&[u8]> {
    let at = bytes.windows(LZMA.len()).position(|window| window == LZMA)?.checked_sub(4)?;
    let [low, middle, high, GUIDED] = bytes[at..at + 4] else { return None };
    let size = usize::from(low) | usize::from(middle) << 8 | usize::from(high) << 16;
    bytes.get(at + GUIDED_HEADER..at + size)
}

fn unpacked(compressed: &[u8]) -> Option<String> {
    tools::ask(&tools::find("xz")?, &["--decompress", "--format=lzma", "--stdout"], compressed).ok()
}

fn named_in(text: &str, name: &str) -> Option<Edk2> {
    text.match_indices(name).find_map(|(at, name)| {
        let rest = text[at + name.len()..].chars().filter(|c| *c != '\0').take("stable20250523".len());
        let rest: String = rest.filter(|c| *c != '.').collect();
        let rest = rest.strip_prefix("stable").unwrap_or(&rest);
        release(&rest.chars().take_while(char::is_ascii_digit).collect::<String>())
    })
}

/// Parses `202211` or `20221115`.
fn release(digits: &str) -> Option<Edk2> {
    let (year, month) = (digits.get(..4)?.parse().ok()?, digits.get(4..6)?.parse().ok()?);
    ((2010..2100).contains(&year) && (1..=12).contains(&month)).then_some(Edk2 { year, month })
}

/// A combination of QEMU, edk2 and CPU model that is known to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownBad {
    /// The first edk2 release with the fault, and the first release without it.
    pub edk2: (Edk2, Edk2),
    /// The first QEMU with the fault, major and minor version.
    pub qemu: (u32, u32),
    /// The architecture of the guests that have the fault, as `uname -m` names it.
    pub machine: &'static str,
    /// QEMU's name of the CPU model with the fault.
    pub cpu: &'static str,
    /// The effect of the fault, and the address of the report about it.
    pub what: &'static str,
    /// The `-global` property that avoids the fault; `None` if none is known.
    pub global: Option<Global>,
}

/// The combinations that are known to fail.
pub const KNOWN_BAD: &[KnownBad] = &[
    // The reporter of the Debian bug found that the fault disappears without `lpa2`. In a test, 2026.08 booted with
    // QEMU 7.2.
    KnownBad {
        edk2: (Edk2::new(2025, 11), Edk2::new(2026, 8)),
        qemu: (7, 0),
        machine: "aarch64",
        cpu: "max",
        what: "hangs before its first line (github.com/tianocore/edk2/issues/11962)",
        global: Some(Global { driver: "max-arm-cpu", property: "lpa2", value: false }),
    },
    // This fault was reported. In a test, however, Debian 12's 2022.11 booted with QEMU 10.0.
    KnownBad {
        edk2: (Edk2::new(2010, 1), Edk2::new(2023, 11)),
        qemu: (9, 0),
        machine: "aarch64",
        cpu: "max",
        what: "was reported to fail now and then with a Synchronous Exception (github.com/gokrazy/tools/issues/80)",
        global: None,
    },
];

/// Returns the known fault of this combination, if there is one. `cpu` is QEMU's name of the model.
pub fn known_bad(
    machine: &str,
    qemu: (u32, u32),
    edk2: Option<Edk2>,
    cpu: &str,
) -> Option<&'static KnownBad> {
    let edk2 = edk2?;
    let fits = |bad: &&KnownBad| (bad.machine, bad.cpu) == (machine, cpu) && qemu >= bad.qemu;
    KNOWN_BAD.iter().filter(fits).find(|bad| (bad.edk2.0..bad.edk2.1).contains(&edk2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn each_distributions_way_to_name_a_release_is_read() {
        for (bytes, release) in [
            (b"\x01/build/edk2-2022.11/Build/ArmVirtQemu-AARCH64".to_vec(), Some((2022, 11))),
            (b"edk2-stable202505".to_vec(), Some((2025, 5))),
            (wide("edk2-20250523-14.fc42"), Some((2025, 5))),
            ([vec![7], wide("edk2-stable202511")].concat(), Some((2025, 11))),
            (b"edk2-aarch64 then edk2-2025.02+ds".to_vec(), Some((2025, 2))),
            (wide("\x012025.02-8+deb13u1"), Some((2025, 2))),
            (wide("Socket LGA2011-3"), None),
            (wide("in 20 of 2025"), None),
            (b"edk2-9999.99".to_vec(), None),
            (b"edk2-".to_vec(), None),
            (Vec::new(), None),
        ] {
            let found = Edk2::find(&bytes).map(|edk2| (edk2.year, edk2.month));
            assert_eq!(found, release, "{:?}", String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_release_in_a_compressed_volume_is_found() {
        // The text `edk2-stable202505` in 16-bit characters, packed by xz --format=lzma.
        let packed: [u8; 52] = [
            93, 0, 0, 128, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 50, 128, 8, 173, 155, 75, 126, 132,
            33, 13, 139, 19, 175, 69, 234, 47, 104, 140, 237, 154, 234, 191, 195, 53, 207, 185, 46, 76, 114,
            194, 228, 84, 23, 255, 254, 230, 104, 0,
        ];
        // This test must also pass on a machine without xz. There, the release is unknown.
        let described = tools::find("xz").map(|_| Edk2::new(2025, 5));
        let size = u32::try_from(GUIDED_HEADER + packed.len()).unwrap().to_le_bytes();
        let header = [&[size[0], size[1], size[2], GUIDED], LZMA.as_slice(), &[24, 0, 1, 0]].concat();
        let file = tempfile::NamedTempFile::new().unwrap();
        let code = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            Edk2::read(file.path())
        };
        let whole = [&[0; 100], header.as_slice(), &packed].concat();
        assert_eq!(compressed(&whole), Some(packed.as_slice()));
        assert_eq!(code(&whole), described);
        assert_eq!(code(&[header.as_slice(), &packed[..10]].concat()), None, "truncated");
        assert_eq!(code(&LZMA), None);
    }

    #[test]
    fn known_bad_pairs_have_edges() {
        let steered = |qemu, edk2, cpu| known_bad("aarch64", qemu, edk2, cpu).map(|bad| bad.global.is_some());
        let (good, bad, old) = (Edk2::new(2025, 2), Edk2::new(2025, 11), Edk2::new(2022, 11));
        assert_eq!(steered((10, 0), Some(bad), "max"), Some(true));
        assert_eq!(steered((10, 0), Some(bad), "cortex-a76"), None);
        assert_eq!(steered((6, 2), Some(bad), "max"), None);
        assert_eq!(steered((10, 0), Some(Edk2::new(2026, 8)), "max"), None);
        assert_eq!(steered((10, 0), Some(good), "max"), None);
        assert_eq!(steered((10, 0), Some(old), "max"), Some(false));
        assert_eq!(steered((7, 2), Some(old), "max"), None);
        assert_eq!(steered((10, 0), None, "max"), None);
        assert!(known_bad("x86_64", (10, 0), Some(bad), "max").is_none());
    }
}
