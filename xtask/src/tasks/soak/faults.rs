//! Smokes with a planted fault, which each must find, and smokes with a disturbance, in which each must verify the
//! agent.

use anyhow::{Context, Error, Result};
use clap::ValueEnum as _;
use xtask_core::cli::{Detection, Disturbance, FoundBy, Sabotage, SoakArgs};
use xtask_core::format::name_of;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::report::Report;

use super::{Kind, smoke, start, tidy};

/// Returns the kinds of rounds for the planted faults that a smoke of `args` can find.
pub(super) fn sabotages(args: &SoakArgs) -> impl Iterator<Item = Kind<'_>> {
    let possible = |detection: &Detection| match detection.by {
        FoundBy::WarmAndCold => true,
        FoundBy::Warm => !args.cold,
        FoundBy::Cold => args.cold,
    };
    let catalogue = Catalogue::built_in();
    Sabotage::value_variants().iter().filter_map(move |fault| {
        let detection = fault.detection().filter(possible)?;
        // An image may exist only for the other architecture.
        if let [_, image, ..] = detection.machine {
            catalogue.find(image, args.arch).ok()?;
        }
        let round: Box<dyn Fn(u32) -> Result<String>> =
            Box::new(move |_| tidy(is_found(args, &name_of(fault), &detection)));
        Some((format!("sabotage {}", name_of(fault)), args.sabotages, round))
    })
}

/// Returns the kinds of rounds for the disturbances.
pub(super) fn disturbances(args: &SoakArgs) -> impl Iterator<Item = Kind<'_>> {
    Disturbance::value_variants().iter().map(move |disturbance| {
        let name = name_of(disturbance);
        let kind = format!("disturbance {name}");
        let round: Box<dyn Fn(u32) -> Result<String>> =
            Box::new(move |_| tidy(smoke(args, &["--disturb", &name])));
        (kind, args.disturbances, round)
    })
}

/// Runs a smoke with a planted fault. Returns an error unless it finds the fault in the right phase and names it.
fn is_found(args: &SoakArgs, name: &str, detection: &Detection) -> Result<String> {
    let directory = std::env::temp_dir().join(format!("iot-xtask-soak-{}", std::process::id()));
    let report = directory.to_str().context("the path of the report is not UTF-8")?;
    let own = ["--sabotage", name, "--report", report];
    let more = if args.cold { &[] } else { detection.arguments };
    let status =
        start(args, &[&own[..], detection.machine, more].concat())?.wait().context("wait for a smoke")?;
    let read = || -> Result<Report> {
        let text = fs_err::read(directory.join("report.json"))?;
        serde_json::from_slice(&text).context("parse the smoke's report")
    };
    let report = read().with_context(|| format!("the smoke ended with {status}"));
    if directory.exists() {
        fs_err::remove_dir_all(&directory)?;
    }
    let report = report?;
    detection.check(&report).map_err(Error::msg)?;
    let failure = report.failure.context("the report has no failure")?;
    Ok(format!("found in the phase {}: {}", failure.phase.title(), failure.error))
}
