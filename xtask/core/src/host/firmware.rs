//! Finds UEFI firmware: a pair of the code and the template of the variable store. QEMU's JSON descriptors
//! (docs/interop/firmware.json in QEMU's sources) name such pairs. If no descriptor names a suitable pair, known paths
//! are tried. A pair is suitable only if both files exist and have sizes that fit the flash device.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::arch::{MachineProfile, VmArchitecture};
use crate::fs::entries;

/// The directories of QEMU's descriptors. A file in a later directory replaces a file of the same name in an earlier
/// one.
const DESCRIPTOR_DIRECTORIES: &[&str] = &["usr/share/qemu/firmware", "etc/qemu/firmware"];

/// The features of firmware that boots only signed images. (`amd-sev` is not one of them: firmware with this feature
/// also boots ordinary guests.)
const UNWANTED_FEATURES: &[&str] = &["enrolled-keys", "secure-boot", "requires-smm"];

/// UEFI firmware: the code, which is shared and read-only, and the template of the variable store. The type is named
/// after aarch64, because distributions for aarch64 boot only with UEFI. x86_64 guests use the same type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AarchFirmware {
    /// The file for flash unit 0.
    pub code: PathBuf,
    /// The file that is copied for each domain. The copy is the content of flash unit 1.
    pub vars_template: PathBuf,
}

/// A firmware pair that is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} {why}", path.display())]
pub struct Rejected {
    /// The path of the descriptor, or of the file that does not fit.
    pub path: PathBuf,
    pub why: Why,
}

/// The reason why a pair is not used. In a message, this text follows the path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Why {
    /// The file's size does not fit the flash device. The first number is the size in bytes, the second one is the
    /// required size. `None` means that any multiple of 4 KiB fits.
    #[error("has {0} bytes, {wanted}", wanted = wanted_size(*.1))]
    Size(u64, Option<u64>),
    /// A descriptor names a file that does not exist.
    #[error("names {}, which is missing", .0.display())]
    Dangling(PathBuf),
    /// The file cannot be read; the reason follows.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// The firmware boots only signed images, and a user's own image is not signed.
    #[error("describes firmware that requires signed boot loaders")]
    Enrolled,
    /// The descriptor is not in QEMU's format; the reason follows.
    #[error("is not a firmware descriptor: {0}")]
    Malformed(String),
    /// The file does not exist, and no descriptor names it.
    #[error("is missing")]
    Absent,
}

fn wanted_size(bytes: Option<u64>) -> String {
    bytes.map_or("not a multiple of 4096".to_owned(), |bytes| format!("but the flash device takes {bytes}"))
}

/// Returns the first suitable pair below `root`, which is `/` except in tests.
///
/// # Errors
/// If no pair is suitable, returns all candidates, each with the reason why it is not used.
pub fn discover(arch: VmArchitecture, root: &Path) -> Result<AarchFirmware, Vec<Rejected>> {
    let profile = arch.profile();
    let mut rejected = Vec::new();
    let mut described = Vec::new();
    for (path, text) in descriptors(root) {
        match from_descriptor(&text, profile) {
            Ok(pair) => described.extend(pair.map(|pair| (Some(path), pair))),
            Err(why) => rejected.push(Rejected { path, why }),
        }
    }
    let known = profile
        .firmware_paths
        .iter()
        .map(|(code, vars)| (None, AarchFirmware { code: code.into(), vars_template: vars.into() }));
    for (descriptor, pair) in described.into_iter().chain(known) {
        match check(&pair, profile, root, descriptor.as_deref()) {
            Ok(()) => return Ok(pair),
            Err(why) if !rejected.contains(&why) => rejected.push(why),
            Err(_same_again) => {}
        }
    }
    Err(rejected)
}

/// Returns the pair with this code, if a descriptor below `root` names it.
pub fn with_code(code: &Path, arch: VmArchitecture, root: &Path) -> Option<AarchFirmware> {
    let pairs = descriptors(root).into_iter();
    pairs.filter_map(|(_, text)| from_descriptor(&text, arch.profile()).ok()?).find(|pair| pair.code == code)
}

/// Returns the path and the text of every descriptor, sorted by file name.
fn descriptors(root: &Path) -> Vec<(PathBuf, String)> {
    let mut by_name = BTreeMap::new();
    for directory in DESCRIPTOR_DIRECTORIES {
        for path in entries(&root.join(directory)) {
            if path.extension().is_some_and(|ending| ending == "json")
                && let (Some(name), Ok(text)) = (path.file_name(), std::fs::read_to_string(&path))
            {
                by_name.insert(name.to_owned(), (path, text));
            }
        }
    }
    by_name.into_values().filter(|(_, text)| !text.trim().is_empty()).collect()
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    interface_types: Vec<String>,
    mapping: Mapping,
    targets: Vec<Target>,
    features: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mapping {
    device: String,
    executable: Option<FlashFile>,
    nvram_template: Option<FlashFile>,
}

#[derive(Deserialize)]
struct FlashFile {
    filename: PathBuf,
    format: String,
}

#[derive(Deserialize)]
struct Target {
    architecture: String,
    machines: Vec<String>,
}

/// Returns the pair that a descriptor offers for the machine. Returns `None` if the descriptor is for other machines or
/// other firmware.
fn from_descriptor(text: &str, profile: &MachineProfile) -> Result<Option<AarchFirmware>, Why> {
    let descriptor: Descriptor =
        serde_json::from_str(text).map_err(|error| Why::Malformed(error.to_string()))?;
    let for_machine = descriptor.targets.iter().any(|target| {
        target.architecture == profile.machine
            && target.machines.iter().any(|machine| machine.contains(profile.machine_type))
    });
    let enrolled = descriptor.features.iter().any(|feature| UNWANTED_FEATURES.contains(&feature.as_str()));
    let uefi = descriptor.interface_types.iter().any(|kind| kind == "uefi");
    let Mapping { device, executable: Some(code), nvram_template: Some(vars) } = descriptor.mapping else {
        return Ok(None);
    };
    let raw = code.format == "raw" && vars.format == "raw";
    match uefi && for_machine && raw && device == "flash" {
        false => Ok(None),
        true if enrolled => Err(Why::Enrolled),
        true => Ok(Some(AarchFirmware { code: code.filename, vars_template: vars.filename })),
    }
}

fn check(
    pair: &AarchFirmware,
    profile: &MachineProfile,
    root: &Path,
    descriptor: Option<&Path>,
) -> Result<(), Rejected> {
    for path in [&pair.code, &pair.vars_template] {
        let here = root.join(path.strip_prefix("/").unwrap_or(path));
        let of_file = |why| Rejected { path: path.clone(), why };
        let bytes = match File::open(&here).and_then(|file| file.metadata()) {
            Ok(meta) => meta.len(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(match descriptor {
                    Some(by) => Rejected { path: by.to_owned(), why: Why::Dangling(path.clone()) },
                    None => of_file(Why::Absent),
                });
            }
            Err(error) => return Err(of_file(Why::Unreadable(error.to_string()))),
        };
        let fits = profile.flash_bytes.map_or(bytes > 0 && bytes % 4096 == 0, |size| bytes == size);
        if !fits {
            return Err(of_file(Why::Size(bytes, profile.flash_bytes)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(root: &Path, path: &str, bytes: u64) {
        let path = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
    }

    fn descriptor(root: &Path, name: &str, code: &str, vars: &str, features: &str) {
        let path = root.join("usr/share/qemu/firmware").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = format!(
            r#"{{"interface-types": ["uefi"], "mapping": {{"device": "flash",
            "executable": {{"filename": "{code}", "format": "raw"}},
            "nvram-template": {{"filename": "{vars}", "format": "raw"}}}},
            "targets": [{{"architecture": "aarch64", "machines": ["virt-*"]}}], "features": [{features}]}}"#
        );
        std::fs::write(path, text).unwrap();
    }

    const FLASH: u64 = 64 << 20;

    #[test]
    fn descriptors_come_first_and_enrolled_keys_never() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for path in ["/a/ms.fd", "/a/code.fd", "/a/vars.fd"] {
            file(root, path, FLASH);
        }
        for path in ["/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"] {
            file(root, path, FLASH);
        }
        descriptor(root, "40-enrolled.json", "/a/ms.fd", "/a/vars.fd", r#""enrolled-keys""#);
        // Debian 12 ships a descriptor like this one, whose file does not exist.
        descriptor(root, "50-absent.json", "/a/absent.fd", "/a/vars.fd", "");
        descriptor(root, "60-plain.json", "/a/code.fd", "/a/vars.fd", r#""amd-sev", "verbose-static""#);
        std::fs::write(root.join("usr/share/qemu/firmware/10-broken.json"), "{").unwrap();
        let pair: AarchFirmware = discover(VmArchitecture::Aarch64, root).unwrap();
        assert_eq!(pair.code, Path::new("/a/code.fd"));
        let with = |code: &str| with_code(Path::new(code), VmArchitecture::Aarch64, root);
        assert_eq!((with("/a/code.fd"), with("/a/other.fd")), (Some(pair), None));
    }

    #[test]
    fn an_unpadded_or_missing_file_is_told_with_its_reason() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        file(root, "/usr/share/AAVMF/AAVMF_CODE.fd", 2 << 20);
        let rejected = discover(VmArchitecture::Aarch64, root).unwrap_err();
        let described: Vec<_> = rejected.iter().map(ToString::to_string).collect();
        let size = "/usr/share/AAVMF/AAVMF_CODE.fd has 2097152 bytes, but the flash device takes 67108864";
        assert!(described.iter().any(|line| line == size), "{described:?}");
        assert!(
            described.iter().any(|line| line == "/usr/share/edk2/aarch64/QEMU_CODE.fd is missing"),
            "{described:?}"
        );
        file(root, "/usr/share/edk2/aarch64/QEMU_CODE.fd", FLASH);
        file(root, "/usr/share/edk2/aarch64/QEMU_VARS.fd", FLASH);
        assert!(discover(VmArchitecture::Aarch64, root).is_ok(), "the next known pair is used");
        assert!(discover(VmArchitecture::X86_64, root).is_err());
    }

    #[test]
    fn what_speaks_against_each_descriptor_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        descriptor(root, "40-enrolled.json", "/a/ms.fd", "/a/vars.fd", r#""enrolled-keys""#);
        descriptor(root, "50-absent.json", "/a/absent.fd", "/a/vars.fd", "");
        std::fs::write(root.join("usr/share/qemu/firmware/10-broken.json"), "{").unwrap();
        let rejected = discover(VmArchitecture::Aarch64, root).unwrap_err();
        let of = |name: &str| {
            let found = rejected.iter().find(|rejected| rejected.path.ends_with(name));
            &found.unwrap_or_else(|| panic!("{name} in {rejected:?}")).why
        };
        assert_eq!(of("40-enrolled.json"), &Why::Enrolled);
        assert_eq!(of("50-absent.json"), &Why::Dangling("/a/absent.fd".into()));
        assert!(matches!(of("10-broken.json"), Why::Malformed(_)));
        assert_eq!(of("AAVMF_CODE.fd"), &Why::Absent);
    }
}
