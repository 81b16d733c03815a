//! Tests of `torture --faults` on real machines: a sound agent heals from each fault, and each planted fault of an agent
//! that does not heal is found and repeated.

use clap::ValueEnum as _;
use xtask_core::cli::AgentFault;
use xtask_core::format::name_of;
use xtask_core::report::{EpisodeReport, FaultsReport};

use super::{report, torture};
use crate::draw::drawn;
use crate::scratch::{XTASK_VM, assert_code, command, message};

/// One fault of each group.
const OF_EACH_GROUP: [&str; 7] = [
    "power-cut",
    "blackhole",
    "broker-restarted",
    "clock-year-back",
    "disk-full-state",
    "oom-container",
    "kill-agent",
];

/// Returns the schedule with which the episodes show a planted fault, and words of the error.
fn shown(fault: AgentFault) -> (&'static str, &'static [&'static str]) {
    match fault {
        AgentFault::WaitsHalfOpen => ("blackhole@0.5+20", &["a heartbeat of the agent"]),
        AgentFault::ReconnectsWithoutPause => ("login-revoked@0.5+10", &["has connected to the broker"]),
        AgentFault::TrustsClock => ("clock-ten-years-ahead@0.5+5", &["a heartbeat of the agent"]),
        AgentFault::StopsWithoutBus => {
            ("broker-refuses@0.5+6", &["was started or made again", "started again"])
        }
        AgentFault::ForgetsOnFullDisk => ("disk-full-state@0.5+5", &["ephemeral"]),
        AgentFault::DeafAfterRestart => ("broker-restarted@0.5+2", &["ephemeral"]),
    }
}

fn result(output: &std::process::Output) -> FaultsReport {
    report(output).1.faults.expect("a result of torture --faults")
}

pub(super) mod gate {
    use super::*;

    #[test]
    fn a_sound_agent_heals_from_a_fault_of_each_group() {
        let faults = drawn("faults", OF_EACH_GROUP.to_vec(), |fault| (*fault).to_owned());
        let count = faults.len().to_string();
        // In the suite, other machines run at the same time.
        let output = torture(&["--faults", &faults.join(","), "--episodes", &count, "--timeout-scale", "2"]);
        assert_code(&output, 0);
        let episodes = result(&output).episodes;
        assert!(
            episodes.len() == faults.len() && episodes.iter().all(EpisodeReport::is_sound),
            "{episodes:#?}"
        );
    }
}

pub(super) mod soaked {
    use super::*;

    #[test]
    fn each_agent_that_does_not_heal_is_found_and_repeated() {
        for fault in AgentFault::value_variants() {
            let (schedule, words) = shown(*fault);
            let name = name_of(fault);
            let output = torture(&["--schedule", schedule, "--sabotage", &name]);
            assert_code(&output, 1);
            let message = message(&output);
            assert!(words.iter().any(|words| message.contains(words)), "{name}: {message}");
            let repetition = result(&output).episodes[0].command.clone().expect("a command");
            let repeated =
                command(XTASK_VM, &repetition.split(' ').skip(2).collect::<Vec<_>>()).output().unwrap();
            assert_code(&repeated, 1);
        }
    }
}
