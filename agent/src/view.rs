//! What the rest of the agent sees of the reconciler: the lines of the status, and what happened last.

use std::collections::VecDeque;

use crate::host::uptime_seconds;
use crate::protocol::status::{DeploymentStatus, Event, MOST_EVENTS, shortened};

/// A moment of the device's deployments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// As in the status.
    pub desired_revision: u64,
    /// As in the status.
    pub deployments: Vec<DeploymentStatus>,
    /// As in the status.
    pub events: Vec<Event>,
}

/// The last events, and how many there were.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<Event>,
    count: u64,
}

impl Events {
    /// Something happened. Said again and again, it is in the ring once, as it was said last.
    pub fn push(&mut self, what: &str) {
        self.count += 1;
        let repeats = self.ring.back().is_some_and(|last| last.what == shortened(what));
        if !repeats {
            tracing::info!("{what}");
        }
        let what = shortened(what);
        self.ring.retain(|event| event.what != what);
        if self.ring.len() == MOST_EVENTS {
            self.ring.pop_front();
        }
        // A procfs that cannot be read is told by the status itself.
        let uptime_seconds = uptime_seconds().unwrap_or(0);
        self.ring.push_back(Event { uptime_seconds, number: self.count, what });
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Event> {
        self.ring.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_counts() {
        let mut events = Events::default();
        for number in 0..100 {
            events.push(&format!("event {number}"));
        }
        let list = events.list();
        assert_eq!((list.len(), list[0].what.as_str(), list[31].number), (MOST_EVENTS, "event 68", 100));
        events.push("event 70");
        let list = events.list();
        assert_eq!(list.len(), MOST_EVENTS);
        assert_eq!((list[31].what.as_str(), list[31].number), ("event 70", 101));
        assert_eq!(list.iter().filter(|event| event.what == "event 70").count(), 1);
    }
}
