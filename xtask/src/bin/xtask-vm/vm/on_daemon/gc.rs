//! `vm gc --connect`: collects the domains and volumes of dead runs on a libvirt daemon, and deletes unused images.

use anyhow::{Context, Result};
use serde_json::json;
use xtask_core::cli::GcArgs;
use xtask_core::error::host_fault;
use xtask_core::message;
use xtask_core::output::{print, print_json};
use xtask_core::runs::instance;
use xtask_jobs::Ui;

use crate::libvirt::daemon::Daemon;

pub(super) fn gc(args: &GcArgs, ui: &Ui) -> Result<()> {
    let (place, dry_run) = (args.place(), args.dry_run);
    place.check()?;
    let uri = place.connect.as_ref().context("vm gc without --connect is a command of xtask")?;
    let daemon = Daemon::open_in_time(uri, ui)?;
    let all = if dry_run { daemon.would_collect() } else { daemon.collect() };
    let blamed = |error| host_fault(error, format!("collect on {uri}"), "see the causes, and run it again");
    let all = all.map_err(blamed)?;
    all.iter().filter(|one| !one.is_done()).for_each(|left| message!("{left}"));
    let domains: Vec<_> =
        all.iter().filter_map(|one| Some((&one.domain, *one.volumes.as_ref().ok()?))).collect();
    let mut images = Vec::new();
    if args.images {
        let pool = place.pool();
        images = daemon.unused_images(pool, &all).map_err(blamed)?;
        for image in images.iter().filter(|_| !dry_run) {
            ui.check()?;
            daemon.delete_volume(pool, image).map_err(blamed)?;
        }
    }
    if args.json {
        let domains: Vec<_> =
            domains.iter().map(|(name, volumes)| json!({ "domain": name, "volumes": volumes })).collect();
        let outcome = json!({
            "schema": instance::SCHEMA,
            "collected": !dry_run,
            "connect": uri.to_string(),
            "domains": domains,
            "images": images,
        });
        return print_json(&outcome);
    }
    let what = if dry_run { "would collect" } else { "collected" };
    for (name, volumes) in &domains {
        print(format_args!("{what} {name}: {volumes} volume(s)"))?;
    }
    for image in &images {
        print(format_args!("{} {image}", if dry_run { "would delete" } else { "deleted" }))?;
    }
    if domains.is_empty() && images.is_empty() {
        message!("no dead run has left a domain on {uri}");
    }
    Ok(())
}
