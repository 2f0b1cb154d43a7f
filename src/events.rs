//! What changes, for whoever listens: a bounded queue that nobody who reports waits for.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::ToSchema;

/// A change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A consumer's connections on a port go somewhere now.
    RouteAdded {
        /// The consumer's name.
        consumer: String,
        /// The container's full ID, or `local`.
        consumer_id: String,
        /// The address that it dials from.
        address: String,
        /// The port that it dials.
        port: u16,
        /// The service's name.
        service: String,
        /// What is asked of discovery: a name of `/v1/sources`.
        query: String,
    },
    /// And now they do not any more.
    RouteRemoved {
        /// The consumer's name.
        consumer: String,
        /// The container's full ID, or `local`.
        consumer_id: String,
        /// The address that it dialled from.
        address: String,
        /// The port that it dialled.
        port: u16,
        /// The service's name.
        service: String,
        /// What was asked of discovery.
        query: String,
    },
    /// A service has other endpoints.
    EndpointsChanged {
        /// The service's name.
        service: String,
        /// What is asked of discovery: a name of `/v1/sources`.
        query: String,
        /// The endpoints in use from now on.
        endpoints: Vec<String>,
    },
    /// No connection could be opened to an endpoint: every route skips it for a while.
    EndpointEjected {
        /// The service's name.
        service: String,
        /// What is asked of discovery, by the route that met the failure.
        query: String,
        /// The endpoint.
        endpoint: String,
        /// What went wrong.
        error: String,
        /// For how long, in seconds.
        seconds: f64,
    },
    /// A connection to an ejected endpoint was opened, or its active check passed: it takes its turn again.
    EndpointBack {
        /// The service's name.
        service: String,
        /// What is asked of discovery, by who opened it.
        query: String,
        /// The endpoint.
        endpoint: String,
    },
    /// No new connections go to an endpoint, or again: somebody asked for it.
    EndpointDrained {
        /// The service's name.
        service: String,
        /// The endpoint.
        endpoint: String,
        /// Whether it is drained from now on.
        drained: bool,
    },
    /// A source does not answer. What was known of it stays in use.
    SourceLost {
        /// Its name in `/v1/sources`.
        source: String,
        /// What went wrong.
        error: String,
    },
    /// A source answers again.
    SourceBack {
        /// Its name in `/v1/sources`.
        source: String,
    },
    /// Somebody removed or changed our rules, and they were put back.
    CaptureRestored {
        /// `vanished`, `incomplete`, `displaced` or `added`.
        change: String,
        /// The first rule that was gone.
        missing: String,
    },
    /// This listener was too slow and missed so many changes: read everything anew.
    Missed {
        /// How many.
        changes: u64,
    },
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
