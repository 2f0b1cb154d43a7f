//! Changes, for subscribers: a bounded queue that never blocks the sender.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    discovery::Query,
    model::{Endpoint, ServiceName},
    table::Route,
    word::worded,
};

/// A change.
#[derive(Debug, Clone)]
pub enum Event {
    /// A new route.
    RouteAdded(Arc<Route>),
    /// A removed route.
    RouteRemoved(Arc<Route>),
    /// The endpoints of a service changed to these.
    EndpointsChanged { query: Arc<Query>, endpoints: Vec<Endpoint> },
    /// A connect attempt to an endpoint failed: all routes skip it for this time.
    EndpointEjected { query: Arc<Query>, endpoint: Endpoint, error: String, time: Duration },
    /// A connection to an ejected endpoint was opened, or its active check passed: it gets connections again.
    EndpointBack { query: Arc<Query>, endpoint: Endpoint },
    /// An endpoint was drained via the API, or its drain ended.
    EndpointDrained { service: ServiceName, endpoint: Endpoint, drained: bool },
    /// A source does not answer. Its last data stays in use.
    SourceLost { source: String, error: Arc<str> },
    /// A source answers again.
    SourceBack { source: String },
    /// Another program removed or changed our rules, and embassy restored them. `missing`: the first missing rule.
    CaptureRestored { change: Change, missing: String },
    /// The subscriber was too slow and missed this number of changes.
    Missed { changes: u64 },
}

worded! {
    /// What other programs changed in our rules, compared with the listing right after we wrote them.
    pub enum Change {
        /// all our rules are gone: a flush, or a reload of the whole firewall
        Vanished = "vanished",
        /// some rules are missing
        Incomplete = "incomplete",
        /// another program's rule comes before ours
        Displaced = "displaced",
        /// no rule is missing, but a rule was added to ours
        Added = "added",
    }
}

impl Event {
    /// Approximate size in memory, in bytes. A list may have ten thousand endpoints.
    fn size(&self) -> usize {
        let more = match self {
            Self::EndpointsChanged { endpoints, .. } => size_of_val(endpoints.as_slice()),
            Self::EndpointEjected { error: text, .. }
            | Self::CaptureRestored { missing: text, .. } => text.len(),
            _ => 0,
        };
        size_of::<Self>() + more
    }
}

/// The sender of changes. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Events(watch::Sender<Queue>);

/// The last changes, shared by all subscribers.
#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Number of removed earlier changes.
    gone: u64,
}

impl Queue {
    /// Maximum number of changes. A slower subscriber misses the oldest ones.
    const LENGTH: usize = 1024;
    /// Maximum size in bytes: fifty of the longest lists of endpoints.
    const BYTES: usize = 16 << 20;

    fn push(&mut self, event: Event) {
        self.bytes += event.size();
        self.events.push_back(Arc::new(event));
        // The newest change stays, whatever its size.
        while self.events.len() > Self::LENGTH || self.bytes > Self::BYTES && self.events.len() > 1
        {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.size();
            self.gone += 1;
        }
    }

    /// The number of the next change.
    fn end(&self) -> u64 {
        self.gone + self.events.len() as u64
    }

    /// The change with this number, or `Missed`. `None` if it has not happened yet.
    fn get(&self, number: u64) -> Option<Arc<Event>> {
        match number.checked_sub(self.gone) {
            None => Some(Arc::new(Event::Missed { changes: self.gone - number })),
            Some(place) => self.events.get(usize::try_from(place).ok()?).cloned(),
        }
    }
}

impl Events {
    /// Reports a change. Never waits for a subscriber.
    pub fn report(&self, event: impl FnOnce() -> Event) {
        if self.0.receiver_count() > 0 {
            self.0.send_modify(|queue| queue.push(event()));
        } else if !self.0.borrow().events.is_empty() {
            // Removes what the last subscriber no longer needs.
            self.0.send_replace(Queue::default());
        }
    }

    /// Subscribes to the changes from now on.
    pub fn listen(&self) -> Subscriber {
        let queue = self.0.subscribe();
        let next = queue.borrow().end();
        Subscriber { queue, next }
    }
}

/// A subscriber.
#[derive(Debug)]
pub struct Subscriber {
    queue: watch::Receiver<Queue>,
    next: u64,
}

impl Subscriber {
    /// The next change. `None` if there will be no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        let queue = self.queue.wait_for(|queue| queue.end() > self.next).await.ok()?;
        let event = queue.get(self.next)?;
        self.next = self.next.max(queue.gone) + u64::from(self.next >= queue.gone);
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_subscriber_costs_a_bounded_amount_of_memory() {
        let events = Events::default();
        let list = vec![Endpoint(([10, 0, 0, 1], 80).into()); 10_000];
        let short = || Event::EndpointDrained {
            service: ServiceName::new("web").unwrap(),
            endpoint: list[0],
            drained: true,
        };
        let long = || Event::EndpointsChanged {
            query: Arc::new(Query {
                via: "consul".into(),
                service: ServiceName::new("web").unwrap(),
                tags: Default::default(),
                dc: None,
                port: None,
            }),
            endpoints: list.clone(),
        };
        let mut listener = events.listen();
        for _ in 0..500 {
            events.report(long);
        }
        let kept = events.0.borrow().events.len();
        assert!(events.0.borrow().bytes <= Queue::BYTES);
        assert!((20..100).contains(&kept), "{kept}");
        let Some(Event::Missed { changes }) = listener.next().await.as_deref().cloned() else {
            panic!("it is told that it was too slow")
        };
        assert_eq!(changes, 500 - kept as u64);
        for _ in 0..kept {
            let event = listener.next().await.unwrap();
            assert!(matches!(&*event, Event::EndpointsChanged { .. }), "{event:?}");
        }
        events.report(short);
        let event = listener.next().await.unwrap();
        assert!(matches!(&*event, Event::EndpointDrained { .. }), "{event:?}");
        drop(listener);
        events.report(long);
        assert!(events.0.borrow().events.is_empty(), "nobody wants it");
        let mut listener = events.listen();
        drop(events);
        assert!(listener.next().await.is_none());
    }
}
