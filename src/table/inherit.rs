//! What a takeover carries over from a table: counts, the failures of endpoints, and balancing positions. Pure.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::{Route, ServiceKey, Table, build::service_of};
use crate::{
    balance::EndpointState,
    discovery::Query,
    model::{ConsumerId, Endpoint, Millis, Port, Protocol, ServiceName, Tags},
    takeover::message::{ConnectionOwner, EndpointFigures, Figures, RouteFigures, Service, Turn},
};

/// Maximum number of routes, endpoints or turns in a message.
const AT_A_TIME: usize = 500;

impl Route {
    /// The route's owner, in a form for another process.
    pub fn owner(&self) -> ConnectionOwner {
        let container = match &self.consumer {
            ConsumerId::Container { id, started_at } => {
                Some((id.as_str().to_owned(), started_at.to_string()))
            }
            ConsumerId::Local => None,
        };
        ConnectionOwner { container, binding: self.binding.descriptor.to_string() }
    }

    /// Whether this owner, as another process names it, owns the route.
    pub fn is_of(&self, owner: &ConnectionOwner) -> bool {
        let is_consumer = match (&self.consumer, &owner.container) {
            (ConsumerId::Container { id, started_at }, Some((its_id, its_start))) => {
                id.as_str() == its_id && **started_at == **its_start
            }
            (ConsumerId::Local, None) => true,
            _ => false,
        };
        is_consumer && self.binding.descriptor.to_string() == owner.binding
    }
}

impl Table {
    /// The endpoint's state, if the service has the endpoint.
    pub fn state(&self, query: &Query, endpoint: Endpoint) -> Option<&Arc<EndpointState>> {
        self.states.get(&(service_of(query), endpoint)).map(|shared| &shared.state)
    }

    /// The route of a source address and port, if it is that of this owner. The owner's binding says of which protocol.
    pub fn route_of(&self, key: SocketAddr, owner: &ConnectionOwner) -> Option<&Arc<Route>> {
        let (source, port) = (key.ip(), Port::new(key.port())?);
        Protocol::ALL.iter().find_map(|&protocol| {
            let route = self.route(&super::RouteKey { source, port, protocol })?;
            route.is_of(owner).then_some(route)
        })
    }

    /// The figures for [`Table::inherit`], in parts. `now` and `at` are the same moment by two clocks.
    pub fn figures(&self, now: Millis, at: Instant) -> impl Iterator<Item = Figures> {
        let routes: Vec<_> = self
            .routes()
            .map(|route| RouteFigures {
                key: SocketAddr::new(route.key.source, route.key.port.get()),
                owner: route.owner(),
                counts: route.counts.totals(),
                age: route.born.map(|born| at.saturating_duration_since(born).as_millis() as u64),
            })
            .collect();
        let endpoints: Vec<_> = self
            .endpoints()
            .map(|(service, state)| EndpointFigures {
                service: named(service),
                endpoint: state.endpoint.0,
                counts: state.counts.totals(),
                state: state.known(now),
            })
            .collect();
        let turns: Vec<_> = self
            .upstreams()
            .filter_map(|upstream| {
                let query = &upstream.query;
                Some(Turn {
                    service: named(&service_of(query)),
                    tags: query.tags.iter().map(str::to_owned).collect(),
                    port: query.port.map(Port::get),
                    endpoint: upstream.rotation.turn()?.0,
                })
            })
            .collect();
        let parts = |length: usize| length.div_ceil(AT_A_TIME);
        let count = parts(routes.len()).max(parts(endpoints.len())).max(parts(turns.len()));
        (0..count).map(move |n| Figures {
            process: None,
            routes: part(&routes, n),
            endpoints: part(&endpoints, n),
            turns: part(&turns, n),
        })
    }

    /// Takes over the counts and state of another process, for the routes and endpoints that exist here.
    pub fn inherit(&self, figures: &Figures, now: Millis) {
        for RouteFigures { key, owner, counts, .. } in &figures.routes {
            if let Some(route) = self.route_of(*key, owner) {
                route.counts.inherit(counts);
            }
        }
        for EndpointFigures { service, endpoint, counts, state } in &figures.endpoints {
            let key = service_named(service).map(|service| (service, Endpoint(*endpoint)));
            if let Some(found) = key.and_then(|key| self.states.get(&key)) {
                found.state.counts.add(counts);
                found.state.inherit(state, now);
            }
        }
        for turn in &figures.turns {
            if let Some(upstream) = query_of(turn).and_then(|query| self.upstream(&query)) {
                upstream.rotation.give_turn(Endpoint(turn.endpoint));
            }
        }
    }
}

fn named((via, dc, service): &ServiceKey) -> Service {
    Service {
        via: via.to_string(),
        dc: dc.as_ref().map(ToString::to_string),
        service: service.to_string(),
    }
}

/// The service of a name that another process gave.
fn service_named(Service { via, dc, service }: &Service) -> Option<ServiceKey> {
    let dc = dc.as_deref().map(Into::into);
    Some((via.as_str().into(), dc, ServiceName::new(service)?))
}

/// The query whose turn it is.
fn query_of(turn: &Turn) -> Option<Query> {
    let (via, dc, service) = service_named(&turn.service)?;
    let tags = Tags::new(turn.tags.iter().map(String::as_str));
    let port = turn.port.map(|port| Port::new(port).ok_or(())).transpose().ok()?;
    Some(Query { via, service, tags, dc, port })
}

fn part<T: Clone>(all: &[T], n: usize) -> Vec<T> {
    all.iter().skip(n * AT_A_TIME).take(AT_A_TIME).cloned().collect()
}
