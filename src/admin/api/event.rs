//! What changes, as the API tells it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Change;
use crate::{discovery::Query, events, table::Route};

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
        /// What had been done to them.
        change: Change,
        /// The first rule that was gone.
        missing: String,
    },
    /// This listener was too slow and missed so many changes: read everything anew.
    Missed {
        /// How many.
        changes: u64,
    },
}

impl From<&events::Event> for Event {
    fn from(event: &events::Event) -> Self {
        use events::Event as E;
        let named = |query: &Query| (query.service.to_string(), query.to_string());
        match event {
            E::RouteAdded(route) => {
                let (consumer, consumer_id, address, port) = of(route);
                let (service, query) = named(&route.upstream.query);
                Self::RouteAdded { consumer, consumer_id, address, port, service, query }
            }
            E::RouteRemoved(route) => {
                let (consumer, consumer_id, address, port) = of(route);
                let (service, query) = named(&route.upstream.query);
                Self::RouteRemoved { consumer, consumer_id, address, port, service, query }
            }
            E::EndpointsChanged { query, endpoints } => {
                let (service, query) = named(query);
                let endpoints = endpoints.iter().map(ToString::to_string).collect();
                Self::EndpointsChanged { service, query, endpoints }
            }
            E::EndpointEjected { query, endpoint, error, time } => {
                let (service, query) = named(query);
                let (endpoint, error) = (endpoint.to_string(), error.clone());
                let seconds = time.as_secs_f64();
                Self::EndpointEjected { service, query, endpoint, error, seconds }
            }
            E::EndpointBack { query, endpoint } => {
                let (service, query) = named(query);
                Self::EndpointBack { service, query, endpoint: endpoint.to_string() }
            }
            E::EndpointDrained { service, endpoint, drained } => Self::EndpointDrained {
                service: service.to_string(),
                endpoint: endpoint.to_string(),
                drained: *drained,
            },
            E::SourceLost { source, error } => {
                Self::SourceLost { source: source.clone(), error: error.to_string() }
            }
            E::SourceBack { source } => Self::SourceBack { source: source.clone() },
            E::CaptureRestored { change, missing } => {
                Self::CaptureRestored { change: *change, missing: missing.clone() }
            }
            E::Missed { changes } => Self::Missed { changes: *changes },
        }
    }
}

/// Who dials, from where, and which port.
fn of(route: &Route) -> (String, String, String, u16) {
    (
        route.consumer_name.to_string(),
        route.consumer.full().to_owned(),
        route.key.source.to_string(),
        route.key.port.get(),
    )
}
