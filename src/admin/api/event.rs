//! Changes, as the API reports them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Change;
use crate::{discovery::Query, events, model::Protocol, table::Route};

/// A change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A new route.
    RouteAdded {
        /// The consumer's name.
        consumer: String,
        /// The container's full ID, or `local`.
        consumer_id: String,
        /// The consumer's source address.
        address: String,
        /// The declared port.
        port: u16,
        protocol: Protocol,
        /// The service's name.
        service: String,
        /// The discovery query: a name of `/v1/sources`.
        query: String,
    },
    /// A removed route.
    RouteRemoved {
        /// The consumer's name.
        consumer: String,
        /// The container's full ID, or `local`.
        consumer_id: String,
        /// The consumer's source address.
        address: String,
        /// The declared port.
        port: u16,
        protocol: Protocol,
        /// The service's name.
        service: String,
        /// The discovery query.
        query: String,
    },
    /// The endpoints of a service changed.
    EndpointsChanged {
        /// The service's name.
        service: String,
        /// The discovery query: a name of `/v1/sources`.
        query: String,
        /// The new endpoints.
        endpoints: Vec<String>,
    },
    /// A connect attempt to an endpoint failed: all routes skip it for a while.
    EndpointEjected {
        /// The service's name.
        service: String,
        /// The discovery query of the route whose attempt failed.
        query: String,
        /// The endpoint.
        endpoint: String,
        /// The error.
        error: String,
        /// Time until it is tried again, in seconds.
        seconds: f64,
    },
    /// A connection to an ejected endpoint was opened, or its active check passed: it gets connections again.
    EndpointBack {
        /// The service's name.
        service: String,
        /// The discovery query of the route that opened the connection.
        query: String,
        /// The endpoint.
        endpoint: String,
    },
    /// An endpoint was drained via the API, or its drain ended.
    EndpointDrained {
        /// The service's name.
        service: String,
        /// The endpoint.
        endpoint: String,
        /// Whether it is drained now.
        drained: bool,
    },
    /// A source does not answer. Its last data stays in use.
    SourceLost {
        /// Its name in `/v1/sources`.
        source: String,
        /// The error.
        error: String,
    },
    /// A source answers again.
    SourceBack {
        /// Its name in `/v1/sources`.
        source: String,
    },
    /// Another program removed or changed embassy's rules, and embassy restored them.
    CaptureRestored {
        /// The kind of change.
        change: Change,
        /// The first missing rule.
        missing: String,
    },
    /// This client was too slow and missed changes: read the full state again.
    Missed {
        /// Number of missed changes.
        changes: u64,
    },
}

impl From<&events::Event> for Event {
    fn from(event: &events::Event) -> Self {
        use events::Event as E;
        let named = |query: &Query| (query.service.to_string(), query.to_string());
        match event {
            E::RouteAdded(route) => {
                let (consumer, consumer_id, address, (port, protocol)) = of(route);
                let (service, query) = named(&route.written_query());
                Self::RouteAdded { consumer, consumer_id, address, port, protocol, service, query }
            }
            E::RouteRemoved(route) => {
                let (consumer, consumer_id, address, (port, protocol)) = of(route);
                let (service, query) = named(&route.written_query());
                Self::RouteRemoved {
                    consumer,
                    consumer_id,
                    address,
                    port,
                    protocol,
                    service,
                    query,
                }
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

/// The consumer, its ID, its source address, and the declared port with its protocol.
fn of(route: &Route) -> (String, String, String, (u16, Protocol)) {
    (
        route.consumer_name.to_string(),
        route.consumer.full().to_owned(),
        route.key.source.to_string(),
        (route.key.port.get(), route.key.protocol),
    )
}
