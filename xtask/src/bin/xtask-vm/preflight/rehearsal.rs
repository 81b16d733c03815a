//! The rehearsal: starts the domain that a smoke would use, with stopped processors, compares QEMU's machine with the
//! requested one, and destroys the domain. The guest never boots, so an empty disk may replace the image, and two
//! placeholder files replace the seed and the payload.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use xtask_core::cache::Cache;
use xtask_core::cli::{PreflightArgs, RehearsalFault};
use xtask_core::format::human_seconds;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::facts::Facts;
use xtask_core::host::tools;
use xtask_core::image::Format;
use xtask_core::machine::{RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::preflight::findings::{Finding, Severity};
use xtask_core::readback::{ExpectedMachine, diff};
use xtask_core::report::PhaseStatus;
use xtask_core::runs::RunDir;
use xtask_core::{error, limits};
use xtask_images::{self, Base};
use xtask_jobs::{Ui, child};

use super::sabotage;
use crate::guest::begin_run;
use crate::libvirt::{Hypervisor, Reach, paused};
use crate::smoke::make_writable_files;

/// The size of the placeholders for the seed and the payload.
const PLACEHOLDER_BYTES: usize = 1 << 20;
/// The size of the empty disk that replaces an image which is not in the cache.
const PLACEHOLDER_DISK_BYTES: u64 = 1 << 30;

/// The libvirt root in which the domains are rehearsed, one after the other. A process can open only one root.
struct Stage<'a> {
    cache: Cache,
    run: RunDir,
    hypervisor: Hypervisor,
    fault: Option<RehearsalFault>,
    ui: &'a Ui,
}

/// Rehearses the machine of each architecture and returns the findings. All files of the rehearsal are deleted.
pub(super) fn findings(facts: &[Facts], args: &PreflightArgs, ui: &Ui) -> Result<Vec<Finding>> {
    let mut started = Instant::now();
    let cache = Cache::open()?;
    let run = begin_run(&cache, ui)?;
    let hint = "see the causes; a smoke would fail in the same way";
    let hypervisor = Hypervisor::open(&run.libvirt_root(), &cache)
        .map_err(|error| error::host_fault(error, "open libvirt for the rehearsal", hint))?;
    let stage = Stage { cache, run, hypervisor, fault: args.sabotage, ui };
    let findings = facts.iter().map(|facts| {
        ui.check()?;
        ui.start("rehearse", None);
        let mut plan = Plan::resolve(facts, 1.0)?;
        let rehearsed = stage.rehearse(&mut plan);
        let (mut found, base) = rehearsed
            .map_err(|error| error::host_fault(error, format!("rehearse the {} machine", facts.arch), hint))
            .inspect_err(|error| ui.end(PhaseStatus::Failed, &error.to_string()))?;
        let blocked = found.iter().any(|finding| finding.severity == Severity::Blocks);
        let described = describe(&plan, &base, std::mem::replace(&mut started, Instant::now()));
        ui.end(if blocked { PhaseStatus::Failed } else { PhaseStatus::Passed }, &described.sentence);
        found.push(described);
        Ok(found)
    });
    let findings = findings.collect::<Result<Vec<_>>>();
    stage.run.discard(|| ui.check())?;
    Ok(findings?.concat())
}

/// Returns the finding that describes a rehearsed machine, and how long the rehearsal took.
fn describe(plan: &Plan, base: &str, started: Instant) -> Finding {
    let seconds = human_seconds(started.elapsed().as_secs_f64());
    let (qemu, accelerator) = (&plan.qemu_version, plan.accelerator());
    let firmware = plan.firmware.as_ref().map_or(Path::new("no firmware"), |pair| &pair.code).display();
    Finding::informs(
        "rehearsed",
        format!("the {} machine was rehearsed in {seconds}", plan.spec.architecture),
        format!("QEMU {qemu}, {accelerator}, {base}, {firmware}; started paused, read, destroyed"),
    )
}

impl Stage<'_> {
    /// Rehearses the domain of this plan. Returns the findings and a description of its disk. If KVM refuses the
    /// domain and `--accel kvm` was not given, the domain is rehearsed again under emulation, because a smoke would
    /// also use emulation then.
    fn rehearse(&self, plan: &mut Plan) -> Result<(Vec<Finding>, String)> {
        let work = self.run.work().join(plan.spec.architecture.to_string());
        make_private_dir(&work)?;
        let (base, base_told) = self.base(plan, &work)?;
        let mut findings = self.perform(plan, &base, &work)?;
        let kvm_refused = findings.iter().position(|finding| finding.id == "rehearsal-kvm");
        if let Some(at) = kvm_refused.filter(|_| plan.may_fall_back()) {
            let mut refused = findings.remove(at);
            refused.severity = Severity::Degrades;
            *plan = plan.under_tcg(&refused.sentence);
            findings = self.perform(plan, &base, &work)?;
            findings.push(refused);
        }
        Ok((findings, base_told))
    }

    /// Starts the domain paused, reads QEMU's machine, and destroys the domain.
    fn perform(&self, plan: &Plan, base: &Base, work: &Path) -> Result<Vec<Finding>> {
        let files = RunFiles::of_run(work, work.join("console.log"))?;
        make_writable_files(plan, &files, base, self.ui)?;
        for placeholder in [&files.seed, &files.payload] {
            write_private(placeholder, vec![0; PLACEHOLDER_BYTES])?;
        }
        let params = plan.domain(&files);
        let mut expected = ExpectedMachine::of(&params)?;
        let xml = match self.fault {
            None => xml::domain_xml(&params),
            Some(fault) => sabotage::plant(fault, params, &mut expected, plan.own_firmware()?, work)?,
        };
        self.ui.check()?;
        let mut machine = match self.hypervisor.start_paused(&xml, &Reach::Servers(Vec::new())) {
            Ok(machine) => machine,
            Err(error) => return Ok(vec![diff::refused(&expected, &format!("{error:#}"))]),
        };
        let findings = paused::read(&machine, &expected, work);
        machine.destroy()?;
        findings
    }

    /// Returns the disk for the domain, and a description of it. The disk is the image that a smoke would use, if it
    /// is in the cache, or else an empty disk.
    fn base(&self, plan: &Plan, work: &Path) -> Result<(Base, String)> {
        for image in std::iter::once(&plan.image).chain(&plan.fallback) {
            if let Some(base) = xtask_images::locate(&self.cache, &self.run, image, self.ui)? {
                return Ok((base, format!("the image {}", image.name)));
            }
        }
        let disk = work.join("empty.qcow2");
        let mut arguments = ["create", "-q", "-f", "qcow2"].map(Into::into).to_vec();
        arguments.extend([disk.clone().into(), PLACEHOLDER_DISK_BYTES.to_string().into()]);
        child::read(&tools::require("qemu-img")?, &arguments, limits::SERVER_START, self.ui)
            .context("make an empty disk")?;
        let described = format!("an empty disk instead of {}, which is not in the cache", plan.image.name);
        Ok((Base { disk, format: Format::Qcow2, virtual_bytes: PLACEHOLDER_DISK_BYTES }, described))
    }
}
