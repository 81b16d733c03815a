//! `cargo xtask bench cpu`: a bare boot to cloud-init's end with the CPU flags of this project, against plain `-cpu max`, in turn.

use anyhow::Result;
use xtask::cli::{BenchArgs, Voice};
use xtask::paths::Cache;
use xtask::report::PhaseStatus;
use xtask::workspace::Workspace;

use super::Comparison;
use super::boot::{Bare, prepare};
use crate::interrupt::Interrupt;
use crate::screen::Screen;

pub(super) fn run(
    workspace: &Workspace,
    args: &BenchArgs,
    voice: Voice,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut screen = Screen::new(voice);
    let cache = Cache::from_env()?;
    let (plan, image, user) = prepare(workspace, args, &cache, interrupt, &mut screen)?;
    let own = plan.cpu().describe();
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        for (cpu, seconds) in [("max", &mut theirs), (own.as_str(), &mut ours)] {
            screen.start("bare", None);
            let bare = Bare { cache: &cache, plan: &plan, image: &image, cpu };
            seconds.push(bare.boot(interrupt, &mut screen)?);
            screen.end(PhaseStatus::Passed, &format!("round {round}: -cpu {cpu}"));
        }
    }
    user.clean()?;
    Comparison::new("cpu", "-cpu max", &theirs, &ours).print(args.json)
}
