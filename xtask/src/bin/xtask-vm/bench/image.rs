//! `cargo xtask bench image`: the tree of an image as this project builds it, against plain mmdebstrap with the same packages;
//! and that both are the same, but for what `customize.sh` and `initramfs.sh` mean to change.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xtask_core::cache::Cache;
use xtask_core::cli::BenchArgs;
use xtask_core::digest::Algorithm;
use xtask_core::error::Failure;
use xtask_core::image::Source;
use xtask_core::image::catalogue::Catalogue;

use super::{Comparison, Scratch};
use xtask_images::{Speed, Store, bootstrap};
use xtask_jobs::{Step, Ui};

/// What the two trees may differ in, since an image is given what mmdebstrap gives nobody: paths, and with a `/`, `-` or `_`
/// at the end, beginnings of paths.
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

pub(super) fn run(args: &BenchArgs, ui: &Ui) -> Result<()> {
    let cache = Cache::from_env()?;
    let image = Catalogue::built_in().find(&args.image, args.arch)?;
    let Source::Packages(recipe) = &image.source else {
        return Err(Failure::usage(format!("--image {}: it is not built from packages", args.image)).into());
    };
    let scratch = Scratch::new(&cache, ui)?;
    let store = Store { cache: &cache, ui, offline: false, run: None };
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        let mut trees = Vec::new();
        for (speed, title, seconds) in
            [(Speed::Plain, "mmdebstrap", &mut theirs), (Speed::Full, "ours", &mut ours)]
        {
            let what = format!("{} {}", image.name, image.arch);
            let step = Step { kind: "bench-image", what: &format!("{title} {what}"), title };
            seconds.push(ui.step(&cache, step, || {
                let started = Instant::now();
                bootstrap(&store, &scratch.path, &image, recipe, speed)?;
                Ok((started.elapsed().as_secs_f64(), format!("round {round}: {what}")))
            })?);
            trees.push(read_tree(&scratch.path.join("root.tar"))?);
            scratch.clear()?;
        }
        let differences = differences(&trees[0], &trees[1]);
        if !differences.is_empty() {
            return Err(Failure::guest(
                format!("the tree differs from one made by plain mmdebstrap in {}", differences.join(", ")),
                "either a build hook leaves files behind, or the difference is intended and belongs in this \
                 bench's list",
            )
            .into());
        }
        store
            .ui
            .note(&format!("{} files are identical, except for the intended differences", trees[1].len()));
    }
    Comparison::new("image", "plain mmdebstrap", &theirs, &ours).print(args.json)
}

/// A path's kind, mode, owner, group, and what it holds or points to.
type Tree = BTreeMap<String, String>;

fn read_tree(path: &Path) -> Result<Tree> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut archive = tar::Archive::new(file);
    let mut tree = Tree::new();
    let mut buffer = vec![0; 1 << 16];
    for entry in archive.entries().with_context(|| format!("read {}", path.display()))? {
        let mut entry = entry.with_context(|| format!("read {}", path.display()))?;
        let name = entry.path().context("read a path")?.display().to_string();
        let header = entry.header();
        let mut what = format!(
            "{:?} {:o} {} {}",
            header.entry_type(),
            header.mode().context("read a mode")?,
            header.uid().context("read an owner")?,
            header.gid().context("read a group")?
        );
        if let Some(target) = entry.link_name().context("read a link")? {
            what.push_str(&format!(" {}", target.display()));
        } else {
            let mut hash = Algorithm::Sha256.hasher();
            loop {
                let count = entry.read(&mut buffer).with_context(|| format!("read {name}"))?;
                if count == 0 {
                    break;
                }
                hash.update(&buffer[..count]);
            }
            what.push_str(&format!(" {}", hash.finish().hex()));
        }
        tree.insert(plain(&name), what);
    }
    ensure!(tree.len() > 1000, "{} holds only {} files, which is not a system", path.display(), tree.len());
    Ok(tree)
}

/// As the list above writes paths: an archive begins them with `./` and ends directories with a `/`.
fn plain(name: &str) -> String {
    name.trim_start_matches("./").trim_end_matches('/').to_owned()
}

/// The paths that differ and are not meant to.
fn differences(plain: &Tree, ours: &Tree) -> Vec<String> {
    let mut names: Vec<&String> = plain.keys().chain(ours.keys()).collect();
    names.sort();
    names.dedup();
    let differ = |name: &&&String| plain.get(**name) != ours.get(**name);
    let meant = |name: &&&String| {
        MEANT.iter().any(|meant| {
            name.as_str() == meant.trim_end_matches('/')
                || meant.ends_with(['/', '-', '_']) && name.starts_with(meant)
        })
    };
    names.iter().filter(differ).filter(|name| !meant(name)).map(|name| (*name).clone()).collect()
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
