//! A distribution's disk, built from its packages: mmdebstrap makes the tree, the rest makes a disk of it without
//! loop devices. As root directly, as an ordinary user in a user namespace.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use xtask::host::tools;
use xtask::image::{Image, Recipe};
use xtask::limits;
use xtask::paths::write_private;
use xtask::run_dir::remove_tree;

use crate::child::{self, Job};
use crate::interrupt::Interrupt;
use crate::screen::Screen;

/// Runs in the new tree, before it is packed.
const CUSTOMIZE: &str = include_str!("customize.sh");
/// Makes the disk out of the packed tree.
const ASSEMBLE: &str = include_str!("assemble.sh");

/// The texts that decide what an image contains: part of its key.
pub(super) const SCRIPTS: &[&str] = &[CUSTOMIZE, ASSEMBLE];

/// Leaves `disk.qcow2` in `directory`; returns where it came from.
pub(super) fn build(
    directory: &Path,
    image: &Image,
    recipe: &Recipe,
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<String> {
    screen.note(&format!(
        "building the image {} for {} from {} packages and what they need: minutes, once",
        image.name,
        image.arch,
        recipe.packages.len()
    ));
    let sources = debian_sources(recipe.suite, interrupt)?;
    bootstrap(directory, image, recipe, &sources, interrupt, screen)?;
    assemble(directory, image, recipe, interrupt, screen)?;
    let convert = ["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"];
    let paths = convert.map(|word| match word {
        "disk.raw" | "disk.qcow2" => directory.join(word).into(),
        word => OsString::from(word),
    });
    run("qemu-img", paths.into(), directory, "convert.log", interrupt, screen)?;
    for left in ["root.tar", "disk.raw"] {
        let path = directory.join(left);
        std::fs::remove_file(&path).with_context(|| format!("delete {}", path.display()))?;
    }
    let mirror = sources.first().map_or("mmdebstrap's default mirror", |_| "this host's package mirror");
    Ok(format!("packages of {} from {mirror}", recipe.suite))
}

fn bootstrap(
    directory: &Path,
    image: &Image,
    recipe: &Recipe,
    sources: &[String],
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let packages = [recipe.packages, &[recipe.kernel]].concat().join(",");
    let mut arguments: Vec<OsString> = [
        "--verbose".to_owned(),
        format!("--mode={}", if root { "root" } else { "unshare" }),
        format!("--architectures={}", image.arch.profile().debian_arch),
        "--variant=minbase".to_owned(),
        "--components=main".to_owned(),
        "--format=tar".to_owned(),
        format!("--keyring={}", xtask::host::facts::DEBIAN_KEYRING),
        format!("--include={packages}"),
        format!("--customize-hook={CUSTOMIZE}"),
    ]
    .map(OsString::from)
    .into();
    arguments.extend([recipe.suite.into(), directory.join("root.tar").into()]);
    arguments.extend(sources.iter().map(OsString::from));
    let mut program = tools::require("mmdebstrap")?;
    // The kernel's installation would make an initramfs that the last step makes again.
    let mut environment = proxies(interrupt)?;
    environment.push(("INITRD", OsString::from("No")));
    if root {
        // An ordinary user's tree belongs to ids that may not enter a private directory: there it stays in /tmp.
        environment.push(("TMPDIR", directory.into()));
    }
    if root {
        // mmdebstrap 1.3 mounts the host's /proc and /sys into the tree, and killed leaves them there. In a mount namespace
        // of its own they go with its last process.
        arguments.splice(0..0, [OsString::from("--mount"), program.into()]);
        program = tools::require("unshare")?;
    }
    let job = Job { program: &program, arguments, log: directory.join("mmdebstrap.log"), environment };
    child::run(&job, interrupt, |line| screen.alive(line))
}

fn assemble(
    directory: &Path,
    image: &Image,
    recipe: &Recipe,
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<()> {
    let script = directory.join("assemble.sh");
    write_private(&script, ASSEMBLE)?;
    let disk = directory.join("disk.raw");
    let file = File::create(&disk).with_context(|| format!("make {}", disk.display()))?;
    file.set_len(recipe.disk_mib << 20).with_context(|| format!("size {}", disk.display()))?;
    let profile = image.arch.profile();
    let mut arguments: Vec<OsString> = vec![script.into(), directory.into()];
    arguments.extend([profile.efi_boot_file, profile.systemd_boot_file, profile.console].map(OsString::from));
    arguments.push(recipe.disk_mib.to_string().into());
    if rustix::process::geteuid().is_root() {
        return run("sh", arguments, directory, "assemble.log", interrupt, screen);
    }
    // Root's files become this user's own, the others' subordinate ids: what mke2fs reads is what the guest gets.
    let mut mapped: Vec<OsString> = ["--map-root-user", "--map-auto", "sh"].map(Into::into).into();
    mapped.extend(arguments);
    run("unshare", mapped, directory, "assemble.log", interrupt, screen)
}

fn run(
    program: &str,
    arguments: Vec<OsString>,
    directory: &Path,
    log: &str,
    interrupt: &Interrupt,
    screen: &mut Screen,
) -> Result<()> {
    let path: PathBuf = tools::require(program)?;
    // mkfs.vfat and sfdisk are called by name in the script, and an ordinary user's PATH does not hold them.
    let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let environment = vec![("PATH", OsString::from(search))];
    let job = Job { program: &path, arguments, log: directory.join(log), environment };
    child::run(&job, interrupt, |line| screen.alive(line))
}

/// Debian's mirror as this host itself uses it, for another suite or architecture too. None where the host has none
/// (Ubuntu, Fedora): mmdebstrap then has a default of its own.
fn debian_sources(suite: &str, interrupt: &Interrupt) -> Result<Vec<String>> {
    let Some(apt) = tools::find("apt-get") else { return Ok(Vec::new()) };
    let format = "$(REPO_URI)|$(RELEASE)|$(ORIGIN)|$(CREATED_BY)";
    let arguments = ["indextargets", "--format", format].map(OsString::from);
    let said = child::read(&apt, &arguments, limits::SERVER_START, interrupt)
        .context("ask apt for its package mirrors")?;
    Ok(sources_for(&said, suite))
}

fn sources_for(index_targets: &str, suite: &str) -> Vec<String> {
    let rows: Vec<Vec<&str>> = index_targets.lines().map(|line| line.split('|').collect()).collect();
    let mirror = |security: bool| {
        let fits = |row: &&Vec<&str>| match row.as_slice() {
            [_, release, origin, "Packages"] => {
                // Before the first `apt-get update` apt knows no origin; a third party's suite may have the same name.
                let debians = match *origin {
                    "" => release.split('-').next() == Some(suite),
                    origin => origin == "Debian",
                };
                debians && release.ends_with("-security") == security
            }
            _ => false,
        };
        let of_suite = rows.iter().filter(fits).find(|row| row[1].split('-').next() == Some(suite));
        of_suite.or_else(|| rows.iter().find(fits)).map(|row| row[0])
    };
    let mut sources = Vec::new();
    if let Some(uri) = mirror(false) {
        sources.push(format!("deb {uri} {suite} main"));
        sources.push(format!("deb {uri} {suite}-updates main"));
    }
    if let Some(uri) = mirror(true) {
        sources.push(format!("deb {uri} {suite}-security main"));
    }
    sources
}

/// This host's own way to the mirror; mmdebstrap's apt reads no configuration of the host's. By the environment, since a
/// proxy's address may hold a password and a command line is everybody's to read.
fn proxies(interrupt: &Interrupt) -> Result<Vec<(&'static str, OsString)>> {
    let Some(apt_config) = tools::find("apt-config") else { return Ok(Vec::new()) };
    let arguments = ["dump", "--no-empty", "Acquire"].map(OsString::from);
    let said = child::read(&apt_config, &arguments, limits::SERVER_START, interrupt)
        .context("ask apt for its proxies")?;
    Ok(proxies_in(&said))
}

fn proxies_in(dump: &str) -> Vec<(&'static str, OsString)> {
    let of = |option: &str| {
        let line = dump.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix(' '));
        line.map(|value| OsString::from(value.trim_end_matches(';').trim_matches('"')))
    };
    let known = [("Acquire::http::Proxy", "http_proxy"), ("Acquire::https::Proxy", "https_proxy")];
    known.into_iter().filter_map(|(option, variable)| Some((variable, of(option)?))).collect()
}

/// Deletes what a build left. An ordinary user's tree has files of subordinate ids, which only their namespace may
/// delete.
pub(super) fn discard(directory: &Path, interrupt: &Interrupt) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    if let Some(mount) = mount_below(&mounts, directory) {
        bail!("delete {}: {mount} is mounted in it; umount that first, then run again", directory.display());
    }
    let tree = directory.join("tree");
    if !rustix::process::geteuid().is_root() && tree.exists() {
        let words = ["--map-root-user", "--map-auto", "rm", "-rf", "--"].map(OsString::from);
        let arguments: Vec<_> = words.into_iter().chain([tree.into()]).collect();
        child::read(&tools::require("unshare")?, &arguments, limits::SERVER_START, interrupt)?;
    }
    // Killed processes take a moment to be gone, and what still runs in the tree writes to it until then.
    let deadline = Instant::now() + limits::CHILD_STOP;
    loop {
        match remove_tree(directory) {
            Err(_busy) if Instant::now() < deadline => std::thread::sleep(limits::POLL),
            done => return done,
        }
    }
}

/// The first mount point below `directory` (proc(5), mountinfo: the fifth field). To delete through one would be to
/// delete what is mounted.
fn mount_below<'a>(mountinfo: &'a str, directory: &Path) -> Option<&'a str> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    points.into_iter().find(|point| Path::new(point).starts_with(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_mirror_serves_every_suite_and_architecture() {
        let bookworm = "http://m/debian/|bookworm|Debian|Packages\nhttp://m/debian/|bookworm-updates|Debian|Packages\n\
                        http://s/debian/|bookworm-security|Debian|Packages\nhttp://x/|nodistro||Packages\n";
        assert_eq!(
            sources_for(bookworm, "bookworm"),
            [
                "deb http://m/debian/ bookworm main",
                "deb http://m/debian/ bookworm-updates main",
                "deb http://s/debian/ bookworm-security main"
            ]
        );
        let trixie = bookworm.replace("bookworm", "trixie");
        assert_eq!(sources_for(&trixie, "bookworm")[0], "deb http://m/debian/ bookworm main");
        let unread = "http://m/debian/|bookworm||Packages\n";
        assert_eq!(sources_for(unread, "bookworm").len(), 2, "before the first apt-get update");
        let third = format!("http://a/azure-cli/|bookworm|azure-cli bookworm|Packages\n{bookworm}");
        assert_eq!(sources_for(&third, "bookworm")[0], "deb http://m/debian/ bookworm main");
        let ubuntu = "http://u/ubuntu/|noble|Ubuntu|Packages\n";
        assert_eq!(sources_for(ubuntu, "bookworm"), Vec::<String>::new());
    }

    #[test]
    fn nothing_is_deleted_through_a_mount() {
        let mounts =
            "22 1 0:21 / /proc rw - proc proc rw\n90 1 0:21 / /c/x.building/t/proc rw - proc proc rw\n";
        assert_eq!(mount_below(mounts, Path::new("/c/x.building")), Some("/c/x.building/t/proc"));
        assert_eq!(mount_below(mounts, Path::new("/c/y.building")), None);
    }

    #[test]
    fn proxies_come_from_apts_own_words() {
        let dump =
            "Acquire::http::Proxy \"http://u:p@proxy:3128\";\nAcquire::http::Proxy::mirror \"DIRECT\";\n";
        assert_eq!(proxies_in(dump), [("http_proxy", OsString::from("http://u:p@proxy:3128"))]);
        assert!(proxies_in("Acquire \"\";\n").is_empty());
    }
}
