//! Containers that this agent did not make, such as those of another agent or of an earlier name of the device. The
//! agent leaves them alone and reports them, since they may hold ports that a deployment needs.

use super::state::State;
use crate::plan::DEVICE_LABEL;
use crate::podman::ListedContainer;

/// The number of names in an event.
const NAMES: usize = 5;

impl State {
    /// Removes the containers of others from a listing. Records an event if they are not the known ones.
    pub(super) fn set_foreign_aside(&mut self, device_id: &str, listed: &mut Vec<ListedContainer>) {
        let is_own = |container: &mut ListedContainer| {
            container.labels.get(DEVICE_LABEL).map(String::as_str) == Some(device_id)
        };
        let mut foreign: Vec<_> = listed
            .extract_if(.., |container| !is_own(container))
            .map(|container| describe(&container))
            .collect();
        foreign.sort();
        if foreign != self.foreign && !foreign.is_empty() {
            let more = foreign.len().saturating_sub(NAMES);
            let names = foreign.iter().take(NAMES).cloned().collect::<Vec<_>>().join(", ");
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            let count = foreign.len();
            let plural = if count == 1 { "" } else { "s" };
            self.events.push(&format!("leaving {count} container{plural} of others alone: {names}{rest}"));
        }
        self.foreign = foreign;
    }
}

fn describe(container: &ListedContainer) -> String {
    let name = container.names.first().unwrap_or(&container.id);
    match container.labels.get(DEVICE_LABEL) {
        Some(device) => format!("{name} (device {device})"),
        None => name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, device: Option<&str>) -> ListedContainer {
        let label = |device: &str| (DEVICE_LABEL.to_owned(), device.to_owned());
        let labels = device.map(label).into_iter().collect();
        ListedContainer { names: vec![name.to_owned()], labels, ..ListedContainer::default() }
    }

    #[test]
    fn containers_of_others_are_reported_when_they_change() {
        let mut state = State::default();
        let all = || vec![listed("mine", Some("pi-7")), listed("web", None), listed("old", Some("pi-6"))];
        for _ in 0..2 {
            let mut listed = all();
            state.set_foreign_aside("pi-7", &mut listed);
            assert_eq!(listed.len(), 1);
            let events = state.events.list();
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].what, "leaving 2 containers of others alone: old (device pi-6), web");
            assert_eq!(state.device_state().foreign_containers, 2);
        }
        state.set_foreign_aside("pi-7", &mut vec![]);
        assert_eq!((state.events.list().len(), state.device_state().foreign_containers), (1, 0));
        let mut many: Vec<_> = (0..7).map(|number| listed(&format!("c{number}"), None)).collect();
        state.set_foreign_aside("pi-7", &mut many);
        assert!(state.events.list()[1].what.ends_with("c3, c4 and 2 more"), "{:?}", state.events.list());
    }
}
