//! The phase *image*: gets the requested image, or else the fallback image, which the verdict then names.

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};

use anyhow::{Context, Result};
use xtask_core::digest::Algorithm;
use xtask_core::error::{self, Failure, Kind};
use xtask_core::fs::write_private;
use xtask_core::image::{Image, Source, shown};
use xtask_core::limits;
use xtask_core::plan::Plan;
use xtask_core::report::{FirmwareReport, ImageReport, Phase};

use super::recorder::Recorder;
use super::run::Run;
use xtask_images::fetch::RetryPolicy;
use xtask_images::{self, ReadyImage, Store};
use xtask_jobs::Background;

/// The disk that will be booted, and the report's entries about the image and the machine's firmware.
pub(super) struct TestedImage {
    pub(super) ready: ReadyImage,
    pub(super) report: ImageReport,
    /// `None` if a libvirt daemon selects the firmware.
    pub(super) firmware: Option<FirmwareReport>,
}

/// An image that is fetched or built in the background of other phases. Dropping this value cancels the work.
pub(super) struct ComingImage<'scope> {
    job: Arc<Background>,
    thread: Option<ScopedJoinHandle<'scope, Result<(Plan, TestedImage, String)>>>,
}

impl<'scope> ComingImage<'scope> {
    /// Starts to get the image of `plan`.
    pub(super) fn start<'env>(scope: &'scope Scope<'scope, 'env>, run: &'env Run<'_>, plan: &Plan) -> Self {
        let job = Arc::default();
        let (cache, dir, ui) = (&run.cache, &run.dir, run.ui.behind(&job));
        let (mut plan, options) = (plan.clone(), &run.options.machine.image);
        let thread = scope.spawn(move || {
            let store = Store { cache, ui: &ui, offline: options.offline, run: Some(dir) };
            let (tested, detail) = tested_image(&store, &mut plan, options.image.as_deref())?;
            Ok((plan, tested, detail))
        });
        Self { job, thread: Some(thread) }
    }

    /// Runs the phase *image*: waits for the image, and sets the plan to the image that is tested.
    pub(super) fn phase(mut self, recorder: &mut Recorder<'_>, plan: &mut Plan) -> Result<ReadyImage> {
        let thread = self.thread.take().context("the image comes once; this is a bug of cargo xtask")?;
        let tested = recorder.phase(Phase::Image, None, || {
            self.job.show();
            let (tested_plan, tested, detail) = thread.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            *plan = tested_plan;
            Ok((tested, detail))
        })?;
        recorder.plan(plan);
        recorder.report.guest.image = Some(tested.report);
        recorder.report.guest.firmware = tested.firmware;
        Ok(tested.ready)
    }
}

impl Drop for ComingImage<'_> {
    fn drop(&mut self) {
        self.job.cancel();
    }
}

fn tested_image(
    store: &Store<'_>,
    plan: &mut Plan,
    requested: Option<&str>,
) -> Result<(TestedImage, String)> {
    let wanted = plan.image.name.clone();
    let (ready, fallback_reason) = ensure_or_fall_back(store, plan)?;
    let report = ImageReport {
        name: plan.image.name.clone(),
        requested: requested.map(shown),
        wanted,
        source: ready.source.clone(),
        digest: ready.digest.clone(),
        verified: plan.image.is_verified(),
        built: plan.image.is_built(),
        fallback_reason,
    };
    let firmware = plan.firmware.as_ref().map(|pair| -> Result<_> {
        Ok(FirmwareReport {
            code: pair.code.clone(),
            vars_template: pair.vars_template.clone(),
            code_sha256: Some(store.remembered_digest(&pair.code, Algorithm::Sha256)?.hex().to_owned()),
        })
    });
    let firmware = firmware.transpose()?;
    let is_known = plan.image.is_verified() || plan.image.is_built();
    let unverified = if is_known { "" } else { ", UNVERIFIED" };
    let detail = format!(
        "{} {}, {}, {}{unverified}",
        plan.image.name,
        plan.image.arch,
        ready.how,
        ready.digest.short()
    );
    Ok((TestedImage { ready, report, firmware }, detail))
}

/// Gets the image. If it cannot be downloaded, because its host cannot be reached or because of `--offline`, gets the
/// fallback image of the plan and also returns the reason. If the plan has no fallback image, returns an error.
pub(crate) fn ensure_or_fall_back(
    store: &Store<'_>,
    plan: &mut Plan,
) -> Result<(ReadyImage, Option<String>)> {
    let fallback_mark = store.directory(&format!("{}.{FALLBACK_MARK}", plan.image.name));
    let retry_policy = match plan.fallback {
        None => RetryPolicy::Full,
        Some(_) if is_fresh(&fallback_mark) => RetryPolicy::Once,
        Some(_) => RetryPolicy::ProbeFirst,
    };
    let error = match xtask_images::ensure(store, &plan.image, retry_policy) {
        Ok(ready) => {
            xtask_core::fs::remove_file(&fallback_mark)?;
            return Ok((ready, None));
        }
        Err(error) => error,
    };
    let reason = match (unreachable(&error), &plan.fallback) {
        (Some(unreachable), Some(_)) => {
            write_private(&fallback_mark, unreachable.to_string())?;
            cannot_be_reached(&plan.image, unreachable)
        }
        (None, Some(_)) if store.offline && Kind::Host.is(&error) => "--offline".to_owned(),
        _ => return Err(host_fault(error, plan)),
    };
    let Some(fallback) = plan.fallback.clone() else { return Err(error) };
    store.ui.note(&format!(
        "{} is not tested: {reason}; using the fallback image {}, which is built from packages. Pass --strict-image to fail instead",
        plan.image.name, fallback.name
    ));
    *plan = plan.with_image(fallback);
    let ready = xtask_images::ensure(store, &plan.image, RetryPolicy::Full)
        .map_err(|error| host_fault(error, plan))?;
    Ok((ready, Some(reason)))
}

/// The file name extension of the fallback mark. The mark's modification time is the last time at which the image's
/// host could not be reached.
const FALLBACK_MARK: &str = "fallback";

/// Returns whether the image's host could not be reached a short while ago. If so, a run tries only once to reach it.
fn is_fresh(fallback_mark: &Path) -> bool {
    let written = fallback_mark.metadata().and_then(|meta| meta.modified());
    written.is_ok_and(|written| written.elapsed().is_ok_and(|age| age < limits::FALLBACK_MEMORY))
}

/// Returns `HOST cannot be reached: CAUSE`. The verdict's line needs only the part before the colon.
fn cannot_be_reached(image: &Image, unreachable: &Failure) -> String {
    let host = match &image.source {
        Source::Download(download) => shown(&download.url).split('/').nth(2).unwrap_or_default().to_owned(),
        _ => image.name.clone(),
    };
    let message = unreachable.to_string();
    let cause = message.split_once(": ").map_or(message.as_str(), |(_, cause)| cause);
    format!("{host} cannot be reached: {cause}")
}

fn unreachable(error: &anyhow::Error) -> Option<&Failure> {
    error::failure(error).filter(|failure| failure.kind == Kind::Unreachable)
}

/// Attributes an error to the host, unless the user interrupted the run. Without an image to test the agent on,
/// nothing is known about the agent.
fn host_fault(error: anyhow::Error, plan: &Plan) -> anyhow::Error {
    if Kind::Interrupted.is(&error) {
        return error;
    }
    let what = format!("get the image {} for {}", plan.image.name, plan.image.arch);
    if let Some(unreachable) = unreachable(&error) {
        let hint = format!(
            "{}; leave out --image and --strict-image to use the fallback image; or use --image debian-12, \
             which needs only a package mirror",
            unreachable.hint().unwrap_or_default()
        );
        return error.context(Failure::host(what, hint));
    }
    let hint = "see the causes: an unreachable mirror, a full disk or a missing permission; the agent is not involved";
    error::host_fault(error, what, hint)
}
