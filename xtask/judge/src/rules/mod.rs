//! The rules, one file for each subject. A rule reads files of the disk, and adds a loss for each that contradicts the
//! facts.

mod installation;
mod state;
mod storage;
mod volumes;

use anyhow::Result;

use crate::facts::Facts;
use crate::files::{Checked, Fault, Files};
use crate::recording::Recording;
use crate::{Judgement, Known, Loss, Rule};

pub(crate) use storage::STORAGE;

/// The agent's state directory.
pub(crate) const STATE_DIRECTORY: &str = "/var/lib/iot-agent";

/// One state of the disk, and what is known about it.
pub(crate) struct Case<'a> {
    pub(crate) recording: &'a Recording,
    pub(crate) known: &'a Known,
    pub(crate) facts: &'a Facts,
    pub(crate) files: &'a dyn Files,
    pub(crate) judgement: Judgement,
}

impl Case<'_> {
    /// Applies all rules.
    pub(crate) fn judge(mut self) -> Result<Judgement> {
        let rules: [fn(&mut Self) -> Checked<()>; 6] = [
            Self::judge_state,
            Self::judge_volumes,
            Self::judge_executable,
            Self::judge_installed_files,
            Self::judge_storage,
            Self::look_for_corrupt_files,
        ];
        for rule in rules {
            match rule(&mut self) {
                Ok(()) => {}
                Err(Fault::Host(error)) => return Err(error),
                Err(Fault::Disk { path, text }) => {
                    let text = format!("{path} cannot be read from the file system: {text}.");
                    self.lose(Rule::FileSystem, &path, text);
                }
            }
        }
        self.judgement.is_odd |= !self.judgement.losses.is_empty();
        Ok(self.judgement)
    }

    fn lose(&mut self, rule: Rule, path: &str, text: String) {
        self.judgement.losses.push(Loss { rule, path: path.to_owned(), text });
    }

    /// Returns whether the first installation has succeeded.
    fn is_installed(&self) -> bool {
        self.facts.installed.is_some()
    }

    /// Marks the state as odd if the agent has set a file aside.
    fn look_for_corrupt_files(&mut self) -> Checked<()> {
        let names = self.files.list(STATE_DIRECTORY)?;
        self.judgement.is_odd |= names.iter().any(|name| name.ends_with(".corrupt"));
        Ok(())
    }
}
