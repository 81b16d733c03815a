//! Tests of `torture` on real machines: the agent loses nothing, and each planted fault of durability is found.
//! `cargo xtask ci` runs the module [`gate`], and `cargo xtask soak --all` the rest.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use clap::ValueEnum as _;
use rustix::process::{Pid, Signal};
use xtask_core::cache::Cache;
use xtask_core::cli::DurabilityFault;
use xtask_core::format::name_of;
use xtask_core::processes::processes_naming;
use xtask_core::report::{Report, TortureReport};

use crate::scratch::{XTASK_VM, assert_code, command, message, random, signal};

mod faults;

const TORTURE: [&str; 5] = ["torture", "--arch", "aarch64", "--image", "debian-12"];

/// The number of states within which each planted fault must be found.
const STATES: &str = "300";

fn torture(arguments: &[&str]) -> Output {
    let output = command(XTASK_VM, &[&TORTURE, arguments].concat()).output().unwrap();
    println!("{}", message(&output));
    output
}

/// Returns the directory of the run and its report.
fn report(output: &Output) -> (PathBuf, Report) {
    let message = message(output);
    let page = message.lines().find_map(|line| line.strip_prefix("report: ")).expect("a report");
    let directory = Path::new(page).parent().unwrap().to_owned();
    let report = Report::read(&directory).unwrap();
    assert_eq!(processes_naming(&directory.join("w")), Vec::<Pid>::new());
    assert!(!directory.join("w").exists(), "{} is left", directory.display());
    (directory, report)
}

fn result(report: Report) -> TortureReport {
    report.torture.expect("a result of torture")
}

/// Words of a loss that shows the planted fault.
fn words(fault: DurabilityFault) -> &'static [&'static str] {
    match fault {
        DurabilityFault::StateWithoutSync
        | DurabilityFault::DirectoryWithoutSync
        | DurabilityFault::RenamedBeforeWritten
        | DurabilityFault::TruncatedInPlace => &["/var/lib/iot-agent/state"],
        DurabilityFault::InstallerInPlace => &["/usr/local/", "/etc/systemd/system/"],
        DurabilityFault::UnsyncedVolume => &["/_data/starts"],
        DurabilityFault::PullWithoutSync => &["/storage/overlay"],
    }
}

/// Runs `torture` with a planted fault. A state must show the fault, and the printed command must repeat this state.
fn is_found(fault: DurabilityFault, repeats: bool) {
    let output = torture(&[
        "--crash-states",
        STATES,
        "--boots",
        "0",
        "--boots-of-losses",
        "0",
        "--plant",
        &name_of(&fault),
    ]);
    assert_code(&output, 1);
    let (directory, found) = report(&output);
    let result = result(found);
    let is_expected = |text: &String| words(fault).iter().any(|words| text.contains(words));
    let shown = result.failures.iter().find(|failure| failure.losses.iter().any(is_expected));
    let shown = shown.unwrap_or_else(|| panic!("{fault:?}: {:#?}", result.failures));
    println!("{fault:?}: {} of {STATES} states, {shown:#?}", result.failed);
    assert!(!shown.missing.is_empty() || fault == DurabilityFault::PullWithoutSync, "{shown:#?}");
    if repeats {
        let words: Vec<_> = shown.command.split(' ').skip(2).collect();
        let repeated = command(XTASK_VM, &words).output().unwrap();
        println!("{}", message(&repeated));
        assert_code(&repeated, 1);
        let (_, again) = report(&repeated);
        let again = self::result(again);
        assert!(again.failures[0].losses.iter().any(is_expected), "{again:#?}");
        assert_eq!(again.boots.len(), 1, "{again:#?}");
    }
    std::fs::remove_dir_all(directory).unwrap();
}

mod gate {
    use super::*;

    #[test]
    fn a_sound_agent_loses_nothing() {
        let output = torture(&["--crash-states", "500", "--boots", "0"]);
        assert_code(&output, 0);
        let result = result(report(&output).1);
        assert_eq!((result.states, result.failed), (500, 0));
        assert!(
            result.checked >= 5 && result.acknowledgements > 20 && result.log_flushes > 100,
            "{result:#?}"
        );
    }

    #[test]
    fn a_planted_fault_is_found() {
        let faults = DurabilityFault::value_variants();
        let third = std::env::var("IOT_XTASK_THIRD").map_or(0, |text| text.parse::<usize>().unwrap());
        is_found(faults[third * 3 % faults.len()], false);
    }
}

mod soaked {
    use super::*;

    #[test]
    fn each_planted_fault_is_found_and_repeated() {
        for fault in DurabilityFault::value_variants() {
            is_found(*fault, true);
        }
    }

    #[test]
    fn twenty_thousand_states_of_a_sound_agent_lose_nothing() {
        let output = torture(&["--crash-states", "20000", "--boots", "10"]);
        assert_code(&output, 0);
        let result = result(report(&output).1);
        assert_eq!((result.failed, result.boots.len()), (0, 10));
        assert!(result.boots.iter().all(|boot| boot.converged));
    }

    /// Kills a run at random moments. The next run collects what is left.
    #[test]
    fn killed_runs_leave_nothing_that_the_next_one_does_not_collect() {
        let kills: u32 = std::env::var("IOT_KILLS").map_or(20, |text| text.parse().unwrap());
        for round in 0..kills {
            let mut run =
                command(XTASK_VM, &[&TORTURE[..], &["--crash-states", "2000", "--boots", "2"]].concat());
            let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let moment = Duration::from_millis(random(&format!("round {round}")) % 200_000);
            std::thread::sleep(moment);
            signal(&run, Signal::KILL);
            run.wait().unwrap();
        }
        let output = torture(&["--crash-states", "10", "--boots", "0"]);
        assert_code(&output, 0);
        let runs = Cache::from_env().unwrap().runs();
        assert_eq!(processes_naming(&runs), Vec::<Pid>::new());
        let left: Vec<_> =
            xtask_core::fs::directories(&runs).into_iter().filter(|run| run.join("w").exists()).collect();
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

#[test]
fn a_wrong_state_is_a_usage_error_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state-1.json");
    std::fs::write(&state, "{}").unwrap();
    let output =
        command(XTASK_VM, &[&TORTURE[..], &["--state", state.to_str().unwrap()]].concat()).output().unwrap();
    assert_code(&output, 2);
    assert!(message(&output).contains("bundle.json"), "{}", message(&output));
}
