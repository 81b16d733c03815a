//! Containers of no known deployment, such as those of another agent or of an earlier device id, or those of this agent
//! after it has lost its state and the bucket does not name them either. The agent leaves them alone, since they may
//! still be needed, and reports them, since they may hold ports that a deployment needs.

use crate::device_state::Events;
use crate::plan::{DEPLOYMENT_LABEL, DEVICE_LABEL};
use crate::podman::ListedContainer;

/// The number of names in an event.
const NAMES: usize = 5;

#[derive(Debug, Default)]
pub(super) struct Foreign {
    containers: Vec<ListedContainer>,
}

impl Foreign {
    /// Takes the containers of others out of the listing. Records an event if they are not the known ones.
    pub(super) fn take(
        &mut self,
        listed: &mut Vec<ListedContainer>,
        device_id: &str,
        is_known: impl Fn(&str) -> bool,
        events: &mut Events,
    ) {
        let is_foreign = |container: &mut ListedContainer| {
            let label = |name| container.labels.get(name).map_or("", String::as_str);
            label(DEVICE_LABEL) != device_id || !is_known(label(DEPLOYMENT_LABEL))
        };
        let known = self.described();
        self.containers = listed.extract_if(.., is_foreign).collect();
        let described = self.described();
        if described != known && !described.is_empty() {
            let (count, more) = (described.len(), described.len().saturating_sub(NAMES));
            let names = described.iter().take(NAMES).cloned().collect::<Vec<_>>().join(", ");
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            let plural = if count == 1 { "" } else { "s" };
            events.push(&format!("leaving {count} container{plural} of others alone: {names}{rest}"));
        }
    }

    pub(super) fn count(&self) -> usize {
        self.containers.len()
    }

    /// Returns the remedy if such a container holds a port of the device.
    pub(super) fn holder(&self, port: u16) -> Option<String> {
        let container = self
            .containers
            .iter()
            .find(|container| container.state == "running" && container.holds_port(port))?;
        let (name, whose) = (name_of(container), describe(container));
        Some(format!("{whose}, which this agent did not make, holds it: podman rm --force {name}"))
    }

    /// Returns a text for each container, in order.
    fn described(&self) -> Vec<String> {
        let mut described: Vec<_> = self.containers.iter().map(describe).collect();
        described.sort();
        described
    }
}

fn name_of(container: &ListedContainer) -> &str {
    container.names.first().unwrap_or(&container.id)
}

fn describe(container: &ListedContainer) -> String {
    let name = name_of(container);
    match container.labels.get(DEVICE_LABEL) {
        Some(device) => format!("{name} (device {device})"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::podman::ListedPort;

    fn listed(name: &str, device: Option<&str>) -> ListedContainer {
        let label = |device: &str| (DEVICE_LABEL.to_owned(), device.to_owned());
        ListedContainer {
            names: vec![name.to_owned()],
            state: "running".into(),
            labels: device.map(label).into_iter().collect(),
            ports: vec![ListedPort { host_port: 8080, range: 2 }],
            ..ListedContainer::default()
        }
    }

    #[test]
    fn containers_of_others_are_reported_when_they_change() {
        let (mut foreign, mut events) = (Foreign::default(), Events::default());
        for _ in 0..2 {
            let mut all =
                vec![listed("mine", Some("pi-7")), listed("web", None), listed("old", Some("pi-6"))];
            foreign.take(&mut all, "pi-7", |_| true, &mut events);
            assert_eq!(all, [listed("mine", Some("pi-7"))]);
            let events = events.list();
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].what, "leaving 2 containers of others alone: old (device pi-6), web");
            assert_eq!(foreign.count(), 2);
        }
        foreign.take(&mut Vec::new(), "pi-7", |_| true, &mut events);
        assert_eq!((events.list().len(), foreign.count()), (1, 0));
        foreign.take(&mut vec![listed("mine", Some("pi-7"))], "pi-7", |_| false, &mut events);
        assert!(events.list()[1].what.ends_with("mine (device pi-7)"), "{:?}", events.list());
        let mut many: Vec<_> = (0..7).map(|number| listed(&format!("c{number}"), None)).collect();
        foreign.take(&mut many, "pi-7", |_| true, &mut events);
        assert!(events.list()[2].what.ends_with("c3, c4 and 2 more"), "{:?}", events.list());
    }

    #[test]
    fn the_container_that_holds_a_port_is_named_with_the_remedy() {
        let (mut foreign, mut events) = (Foreign::default(), Events::default());
        foreign.take(&mut vec![listed("iot-old.web", Some("old"))], "pi-7", |_| true, &mut events);
        let remedy = foreign.holder(8081).unwrap();
        assert!(remedy.starts_with("iot-old.web (device old), "), "{remedy}");
        assert!(remedy.ends_with("podman rm --force iot-old.web"), "{remedy}");
        assert_eq!(foreign.holder(8082), None);
    }
}
