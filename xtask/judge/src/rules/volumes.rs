//! The content of volumes: the number of starts that the workload keeps in each.

use std::collections::BTreeMap;

use iot_agent::deployment_of_volume;

use super::{Case, STORAGE};
use crate::Rule;
use crate::files::Checked;

impl Case<'_> {
    pub(super) fn judge_volumes(&mut self) -> Checked<()> {
        let path_of = |volume: &str| format!("{STORAGE}/volumes/{volume}/_data/starts");
        let mut numbers = BTreeMap::new();
        for volume in self.files.list(&format!("{STORAGE}/volumes"))? {
            if deployment_of_volume(&self.recording.device_id, &volume).is_none() {
                continue;
            }
            let path = path_of(&volume);
            let Some(content) = self.files.read(&path)? else { continue };
            let number = str::from_utf8(&content).ok().and_then(|text| text.trim().parse::<u64>().ok());
            if number.is_none() {
                let what = if content.is_empty() { "is empty" } else { "is not a number" };
                let text =
                    format!("{path} {what}, although the workload syncs the file before it renames it.");
                self.lose(Rule::VolumeWhole, &path, text);
            }
            numbers.insert(volume, number);
        }
        for ((_, volume), floor) in &self.facts.starts {
            let path = path_of(volume);
            let found = match numbers.get(volume) {
                // The volume has a loss already.
                Some(None) => continue,
                Some(Some(number)) if *number >= floor.number => continue,
                Some(Some(number)) => format!("has {number} starts"),
                None => "is missing".to_owned(),
            };
            let (number, position) = (floor.number, floor.position);
            let text = format!(
                "{path} {found}, although the workload answered with {number} starts at entry {position}."
            );
            self.lose(Rule::VolumeAcknowledged, &path, text);
        }
        Ok(())
    }
}
