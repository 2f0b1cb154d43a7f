//! What changes, for whoever listens: a bounded queue that nobody who reports waits for.

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
    /// A consumer's connections on a port go somewhere now.
    RouteAdded(Arc<Route>),
    /// And now they do not any more.
    RouteRemoved(Arc<Route>),
    /// A service has these endpoints in use from now on.
    EndpointsChanged { query: Query, endpoints: Vec<Endpoint> },
    /// No connection could be opened to an endpoint: every route skips it for this time.
    EndpointEjected { query: Query, endpoint: Endpoint, error: String, time: Duration },
    /// A connection to an ejected endpoint was opened, or its active check passed: it gets connections again.
    EndpointBack { query: Query, endpoint: Endpoint },
    /// No new connections go to an endpoint, or again: somebody asked for it.
    EndpointDrained { service: ServiceName, endpoint: Endpoint, drained: bool },
    /// A source does not answer. What was known of it stays in use.
    SourceLost { source: String, error: Arc<str> },
    /// A source answers again.
    SourceBack { source: String },
    /// Another program removed or changed our rules, and embassy restored them. The first missing rule.
    CaptureRestored { change: Change, missing: String },
    /// The listener was too slow and missed so many changes.
    Missed { changes: u64 },
}

worded! {
    /// What others did to our rules, by what was listed right after they were written.
    pub enum Change {
        /// nothing of ours is left: a flush, or a reload of the whole firewall
        Vanished = "vanished",
        /// some are missing
        Incomplete = "incomplete",
        /// another's rule stands where ours has to: it comes first now
        Displaced = "displaced",
        /// nothing is missing, but something stands among ours
        Added = "added",
    }
}

/// Where changes are reported. Clones are the same.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Arc<Event>>);

impl Events {
    /// Changes that a slow listener may be behind; then it misses the oldest.
    const QUEUE: usize = 1024;

    /// Reports a change. Nobody is waited for.
    pub fn report(&self, event: impl FnOnce() -> Event) {
        if self.0.receiver_count() > 0 {
            // Whoever listened may have left meanwhile.
            let _ = self.0.send(Arc::new(event()));
        }
    }

    /// What changes from now on.
    pub fn listen(&self) -> broadcast::Receiver<Arc<Event>> {
        self.0.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(Self::QUEUE).0)
    }
}
