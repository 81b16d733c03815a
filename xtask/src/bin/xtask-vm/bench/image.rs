//! `cargo xtask bench image`: measures how long this project takes to build the tree of an image, and how long plain
//! mmdebstrap takes with the same packages. Apart from the intended changes of `customize.sh` and `initramfs.sh`, both
//! trees must be the same.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use xtask_core::digest::Algorithm;
use xtask_core::error::Failure;
use xtask_core::image::Source;
use xtask_core::image::catalogue::Catalogue;
use xtask_images::{Speed, Store, bootstrap};

use super::{Bench, timed};

/// The paths in which the two trees may differ, because plain mmdebstrap does not configure a bootable image. An entry
/// that ends with `/`, `-` or `_` is the beginning of such paths.
const MEANT: &[&str] = &[
    ".manifest/",
    "boot/initrd.img-",
    "etc/.resolv.conf.systemd-resolved.bak",
    "etc/apt/sources.list",
    "etc/apt/sources.list.d/0000sources.list",
    "etc/cloud/cloud.cfg.d/90_image.cfg",
    "etc/default/locale",
    "etc/fstab",
    "etc/hostname",
    "etc/hosts",
    "etc/initramfs-tools/conf.d/modules",
    "etc/initramfs-tools/modules",
    "etc/shadow",
    "etc/shadow-",
    "etc/ssh/ssh_host_",
    "etc/systemd/system/dbus-org.freedesktop.network1.service",
    "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
    "etc/systemd/system/network-online.target.wants",
    "etc/systemd/system/network-online.target.wants/systemd-networkd-wait-online.service",
    "etc/systemd/system/sockets.target.wants/systemd-networkd.socket",
    "etc/systemd/system/sysinit.target.wants/systemd-network-generator.service",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/status-old",
];

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let name = &bench.args.image;
    let image = Catalogue::built_in().find(name, bench.args.arch)?;
    let Source::Packages(recipe) = &image.source else {
        return Err(Failure::usage(format!("--image {name}: it is not built from packages")).into());
    };
    let store = Store { cache: &bench.cache, ui: bench.ui, offline: false, run: None };
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    let what = format!("{} {}", image.name, image.arch);
    for round in 1..=bench.args.rounds {
        let measure = |speed, title: &str| -> Result<(f64, Tree)> {
            let seconds = bench.step(&format!("{title} {what}"), title, || {
                let ((), seconds) = timed(|| bootstrap(&store, &bench.scratch, &image, recipe, speed))?;
                Ok((seconds, format!("round {round}: {what}")))
            })?;
            let tree = read_tree(&bench.scratch.join("root.tar"))?;
            bench.clear()?;
            Ok((seconds, tree))
        };
        let (seconds, plain) = measure(Speed::Plain, "mmdebstrap")?;
        theirs.push(seconds);
        let (seconds, own) = measure(Speed::Full, "ours")?;
        ours.push(seconds);
        let differences = differences(&plain, &own).join(", ");
        let error = format!("the tree differs from one made by plain mmdebstrap in {differences}");
        let hint = "either a build hook leaves files behind, or the difference is intended and belongs in \
                    this bench's list";
        ensure!(differences.is_empty(), Failure::guest(error, hint));
        bench.ui.note(&format!("{} files are identical, except for the intended differences", own.len()));
    }
    bench.compare("plain mmdebstrap", &theirs, &ours)
}

/// The files of a tree by their paths. The value has the kind, mode, owner and group, and the digest of the content or
/// the target of the link.
type Tree = BTreeMap<String, String>;

fn read_tree(path: &Path) -> Result<Tree> {
    let mut archive = tar::Archive::new(fs_err::File::open(path)?);
    let entries = archive.entries().with_context(|| format!("read {}", path.display()))?;
    let described = entries.map(|entry| describe(entry?)).collect::<io::Result<Tree>>();
    let tree = described.with_context(|| format!("read the entries of {}", path.display()))?;
    ensure!(tree.len() > 1000, "{} has only {} files; a system has over 1000", path.display(), tree.len());
    Ok(tree)
}

fn describe<R: Read>(mut entry: tar::Entry<'_, R>) -> io::Result<(String, String)> {
    let name = plain(&entry.path()?.display().to_string());
    let content = match entry.link_name()? {
        Some(target) => target.display().to_string(),
        None => {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            Algorithm::Sha256.of(&content).hex().to_owned()
        }
    };
    let header = entry.header();
    let (kind, mode, user, group) = (header.entry_type(), header.mode()?, header.uid()?, header.gid()?);
    Ok((name, format!("{kind:?} {mode:o} {user} {group} {content}")))
}

/// Returns a path as [`MEANT`] writes it. An archive begins paths with `./` and ends directories with `/`.
fn plain(name: &str) -> String {
    name.trim_start_matches("./").trim_end_matches('/').to_owned()
}

/// Returns the paths that differ and are not in [`MEANT`].
fn differences(plain: &Tree, ours: &Tree) -> Vec<String> {
    let names: BTreeSet<&String> = plain.keys().chain(ours.keys()).collect();
    let covers = |meant: &&str, name: &str| {
        name == meant.trim_end_matches('/') || meant.ends_with(['/', '-', '_']) && name.starts_with(meant)
    };
    let differ = names.into_iter().filter(|name| plain.get(*name) != ours.get(*name));
    differ.filter(|name| !MEANT.iter().any(|meant| covers(meant, name))).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_compared_as_the_list_writes_them() {
        let directory = plain("./etc/systemd/system/network-online.target.wants/");
        assert!(MEANT.contains(&directory.as_str()), "{directory}");
        assert_eq!(plain("./etc/fstab"), "etc/fstab");
    }

    #[test]
    fn a_tool_that_was_left_behind_is_a_difference() {
        let tree = |rows: &[(&str, &str)]| -> Tree {
            rows.iter().map(|(name, what)| ((*name).to_owned(), (*what).to_owned())).collect()
        };
        let plain = tree(&[("usr/bin/dash", "guest"), ("etc/fstab", "a")]);
        assert_eq!(
            differences(&plain, &tree(&[("usr/bin/dash", "guest"), ("etc/fstab", "b")])),
            Vec::<String>::new()
        );
        assert_eq!(
            differences(
                &plain,
                &tree(&[("usr/bin/dash", "guest"), ("etc/fstab", "a"), ("etc/hosts.allow", "x")])
            ),
            ["etc/hosts.allow"]
        );
        let left = tree(&[("usr/bin/dash", "host"), ("etc/fstab", "a"), ("usr/bin/dash.guest", "guest")]);
        assert_eq!(differences(&plain, &left), ["usr/bin/dash", "usr/bin/dash.guest"]);
    }
}
