//! A device of the tests: a client of NATS with the device's login and its permissions.

use std::time::Instant;

use async_nats::{ConnectError, Event};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::*;

/// The limit for an event that must happen.
pub(super) const EVENT: Duration = Duration::from_secs(60);
/// The time in which an answer that must not arrive would arrive.
pub(super) const ABSENCE: Duration = Duration::from_millis(500);
/// The time after which the client gives an attempt to connect up, and tries again.
const ATTEMPT: Duration = Duration::from_secs(5);
/// A request that the device may send and that the broker itself answers.
pub(super) const REQUEST: &str = "$JS.API.STREAM.INFO.KV_desired-state";

pub(super) struct Device {
    pub(super) client: Client,
    events: UnboundedReceiver<Event>,
}

impl Device {
    pub(super) fn options(broker: &Broker) -> ConnectOptions {
        ConnectOptions::with_user_and_password("dev-1".into(), broker.device_password.clone())
            .custom_inbox_prefix("_INBOX.dev-1")
            .add_root_certificates(broker.certificates.ca_file.clone())
            .require_tls(true)
            .connection_timeout(ATTEMPT)
            .reconnect_delay_callback(|_| limits::POLL)
    }

    /// Connects to the port that the agent's configuration names.
    pub(super) fn try_with(broker: &Broker, options: ConnectOptions) -> Result<Self, ConnectError> {
        let config = broker.agent_config("127.0.0.1");
        let url = config.split('"').find(|word| word.starts_with("tls://")).unwrap();
        let (sender, mut events) = mpsc::unbounded_channel();
        let options = options.event_callback(move |event| {
            // If this fails, the test no longer waits for events.
            sender.send(event).ok();
            std::future::ready(())
        });
        broker.runtime.block_on(async {
            let client = options.connect(url).await?;
            assert_eq!(timeout(EVENT, events.recv()).await.unwrap(), Some(Event::Connected));
            Ok(Self { client, events })
        })
    }

    pub(super) fn connect(broker: &Broker) -> Self {
        Self::try_with(broker, Self::options(broker)).unwrap()
    }

    /// Sends a request, and returns the time until its answer.
    pub(super) fn asks(&self, broker: &Broker) -> Duration {
        let start = Instant::now();
        let answer = async { timeout(EVENT, self.client.request(REQUEST, "".into())).await };
        broker.runtime.block_on(answer).unwrap().unwrap();
        start.elapsed()
    }

    /// Returns whether a request gets neither an answer nor an error.
    pub(super) fn hears_nothing(&self, broker: &Broker) -> bool {
        let answer = async { timeout(ABSENCE, self.client.request(REQUEST, "".into())).await };
        broker.runtime.block_on(answer).is_err()
    }

    /// Waits until the client reports this event, and returns the events before it.
    pub(super) fn waits_for(&mut self, broker: &Broker, event: &Event) -> Vec<Event> {
        let mut earlier = Vec::new();
        loop {
            let next = broker.runtime.block_on(async { timeout(EVENT, self.events.recv()).await });
            match next.unwrap_or_else(|_| panic!("no {event:?} after {earlier:?}")).unwrap() {
                next if next == *event => return earlier,
                next => earlier.push(next),
            }
        }
    }

    /// Returns the events that have happened and were not waited for.
    pub(super) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }
}
