//! Changes, for subscribers: a bounded queue that never blocks the sender.

use std::{sync::Arc, time::Duration};

use tokio::sync::broadcast;

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
    EndpointsChanged { query: Query, endpoints: Vec<Endpoint> },
    /// A connect attempt to an endpoint failed: all routes skip it for this time.
    EndpointEjected { query: Query, endpoint: Endpoint, error: String, time: Duration },
    /// A connection to an ejected endpoint was opened, or its active check passed: it gets connections again.
    EndpointBack { query: Query, endpoint: Endpoint },
    /// An endpoint was drained via the API, or its drain ended.
    EndpointDrained { service: ServiceName, endpoint: Endpoint, drained: bool },
    /// A source does not answer. Its last data stays in use.
    SourceLost { source: String, error: Arc<str> },
    /// A source answers again.
    SourceBack { source: String },
    /// Another program removed or changed our rules, and embassy restored them. The first missing rule.
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

/// The sender of changes. Clones share it.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Arc<Event>>);

impl Events {
    /// Queue length; a slower subscriber misses the oldest changes.
    const QUEUE: usize = 1024;

    /// Reports a change. Never blocks.
    pub fn report(&self, event: impl FnOnce() -> Event) {
        if self.0.receiver_count() > 0 {
            // The subscriber may have gone meanwhile.
            let _ = self.0.send(Arc::new(event()));
        }
    }

    /// The changes from now on.
    pub fn listen(&self) -> broadcast::Receiver<Arc<Event>> {
        self.0.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(Self::QUEUE).0)
    }
}
