//! What is, in the words of the API: the table, the sources and the counts become the types of `api`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::api;
use crate::{
    balance::{Checked, EndpointState},
    control::Sources,
    counts::{ConnectionCounts, Distribution},
    descriptor::Balance,
    discovery::{self, Endpoints},
    model::{Consumer, ConsumerId, Millis},
    outcome::Tally,
    provider::Listing,
    proxy::{ConnectionState, LiveConnection},
    source::Known,
    table::{Route, ServiceKey, Table},
};

pub(super) fn seconds(time: Duration) -> f64 {
    // Whole microseconds: more digits would only look exact.
    (time.as_secs_f64() * 1e6).round() / 1e6
}

fn age(since: Instant) -> f64 {
    seconds(since.elapsed())
}

pub(super) fn query(query: &discovery::Query) -> api::Query {
    api::Query {
        name: query.to_string(),
        discovery: query.via.to_string(),
        service: query.service.to_string(),
        tags: query.tags.iter().map(str::to_owned).collect(),
        datacentre: query.dc.as_deref().map(str::to_owned),
    }
}

pub(super) fn route(route: &Route, lost: &Lost, now: Millis) -> api::Route {
    let health = RouteHealth::of(route, lost, now);
    api::Route {
        consumer: route.consumer_name.to_string(),
        consumer_id: route.consumer.full().to_owned(),
        address: route.key.source.to_string(),
        port: route.key.port.get(),
        origin: route.binding.origin.to_string(),
        query: query(&route.upstream.query),
        balance: balance(route.balance).to_owned(),
        state: health.state().to_owned(),
        endpoints: health.endpoints,
        ejected: health.ejected,
        probing: health.probing,
        drained: health.drained,
        figures: figures(&route.counts, route.counts.active(), now),
    }
}

pub(super) fn balance(balance: Balance) -> &'static str {
    match balance {
        Balance::RoundRobin => "rr",
        Balance::LeastConnections => "leastconn",
    }
}

/// The queries that nobody answers now: what was known of them stays in use.
pub(super) struct Lost(HashSet<discovery::Query>);

impl Lost {
    pub(super) fn of(sources: &Sources) -> Self {
        let lost = sources.queries.iter().filter(|(_, known)| known.borrow().error.is_some());
        Self(lost.map(|(query, _)| query.clone()).collect())
    }
}

/// How a route is: one word for it in every list, in `explain` and on the dashboard.
pub(super) struct RouteHealth {
    answered: bool,
    endpoints: usize,
    /// Skipped, after failures or by a check.
    ejected: usize,
    /// Not skipped any more, but not trusted yet either.
    probing: usize,
    drained: usize,
    /// Whether its source does not answer.
    lost: bool,
}

impl RouteHealth {
    pub(super) fn of(route: &Route, lost: &Lost, now: Millis) -> Self {
        let mut health = Self {
            answered: route.upstream.answered,
            endpoints: 0,
            ejected: 0,
            probing: 0,
            drained: 0,
            lost: lost.0.contains(&route.upstream.query),
        };
        for state in route.upstream.rotation.endpoints() {
            health.endpoints += 1;
            match endpoint_state(state, now) {
                "drained" => health.drained += 1,
                "ejected" | "unhealthy" => health.ejected += 1,
                "probing" => health.probing += 1,
                _ => {}
            }
        }
        health
    }

    pub(super) fn state(&self) -> &'static str {
        let usable = self.endpoints - self.drained;
        if usable == 0 {
            if self.answered { "no_endpoint" } else { "waiting" }
        } else if self.ejected == usable {
            "ejected"
        } else if self.ejected > 0 || self.probing > 0 || self.lost || !self.answered {
            "degraded"
        } else {
            "ok"
        }
    }
}

fn figures(counts: &ConnectionCounts, active: u64, now: Millis) -> api::Figures {
    api::Figures {
        active,
        started: counts.started.load(Relaxed),
        ended: ended(&counts.ended),
        bytes_up: counts.bytes_up.load(Relaxed),
        bytes_down: counts.bytes_down.load(Relaxed),
        connect: latency(&counts.connect.read()),
        retries: counts.retries.load(Relaxed),
        last_error: counts.last_error.get().map(|(at, text)| api::Problem {
            text: text.into_owned(),
            age_seconds: seconds(Duration::from_millis(now.0.saturating_sub(at.0))),
        }),
    }
}

fn ended(tally: &Tally) -> BTreeMap<String, u64> {
    tally.iter().map(|(outcome, count)| (outcome.as_str().to_owned(), count)).collect()
}

pub(super) fn latency(read: &Distribution) -> api::Latency {
    let micros = |seconds: f64| (seconds * 1e6).round() / 1e6;
    api::Latency {
        count: read.count(),
        sum_seconds: read.sum_seconds(),
        p50_seconds: read.quantile(0.5).map(micros),
        p99_seconds: read.quantile(0.99).map(micros),
    }
}

pub(super) fn endpoint(
    (discovery, datacentre, service): &ServiceKey,
    state: &EndpointState,
    now: Millis,
) -> api::Endpoint {
    api::Endpoint {
        discovery: discovery.to_string(),
        service: service.to_string(),
        datacentre: datacentre.as_deref().map(str::to_owned),
        endpoint: state.endpoint.to_string(),
        health: api::Health {
            state: endpoint_state(state, now).to_owned(),
            ejected_for_seconds: state.ejected_for(now).filter(|left| !left.is_zero()).map(seconds),
            check: match state.check() {
                Checked::Not => None,
                Checked::Passes => Some("passes".to_owned()),
                Checked::Fails => Some("fails".to_owned()),
            },
            failures: state.failures(),
            failed_tries: state.failed_tries(),
            ejections: state.ejections(),
        },
        figures: figures(&state.counts, state.active().into(), now),
    }
}

pub(super) fn endpoint_state(state: &EndpointState, now: Millis) -> &'static str {
    match state.ejected_for(now) {
        _ if state.is_drained() => "drained",
        _ if state.check() == Checked::Fails => "unhealthy",
        None => "active",
        Some(left) if left.is_zero() => "probing",
        Some(_) => "ejected",
    }
}

pub(super) fn connection(live: &LiveConnection) -> api::Connection {
    let of_route = |text: fn(&Route) -> String| live.route.as_deref().map(text);
    api::Connection {
        id: format!("{}-{}", live.id.0, live.id.1),
        consumer: of_route(|route| route.consumer_name.to_string()),
        consumer_id: of_route(|route| route.consumer.full().to_owned()),
        service: of_route(|route| route.upstream.query.service.to_string()),
        query: of_route(|route| route.upstream.query.to_string()),
        source: live.source.to_string(),
        destination: live.destination.to_string(),
        endpoint: live.endpoint.map(|endpoint| endpoint.to_string()),
        state: connection_state(live),
        age_seconds: seconds(live.age),
        connect_seconds: live.connect.map(seconds),
        tries: live.tries,
        bytes_up: live.bytes_up,
        bytes_down: live.bytes_down,
    }
}

pub(super) fn connection_state(live: &LiveConnection) -> api::ConnectionState {
    match live.state {
        ConnectionState::Held => api::ConnectionState::Held,
        ConnectionState::Connecting => api::ConnectionState::Connecting,
        ConnectionState::Running => api::ConnectionState::Running,
        ConnectionState::Parked => api::ConnectionState::Parked,
    }
}

pub(super) fn provider(known: &Known<Listing>) -> api::Source {
    let items = known.value.as_ref().map_or(0, |listing| listing.consumers.len());
    let problem = |p: &crate::provider::Problem| {
        let reason = &p.reason;
        format!("{} {}: {reason}", p.consumer, p.origin)
    };
    let skipped = known.value.iter().flat_map(|listing| &listing.problems).map(problem);
    source("provider".to_owned(), "provider", known, items, skipped.collect())
}

pub(super) fn discovery(query: &discovery::Query, known: &Known<Endpoints>) -> api::Source {
    let items = known.value.as_ref().map_or(0, |endpoints| endpoints.list.len());
    let rejected = known.value.iter().flat_map(|endpoints| &endpoints.rejected);
    let skipped = rejected.map(|entry| format!("{}: {}", entry.what, entry.reason));
    source(query.to_string(), &query.via, known, items, skipped.collect())
}

pub(super) fn source_state<T>(known: &Known<T>) -> &'static str {
    match (&known.error, &known.value) {
        (Some(_), _) => "down",
        (None, Some(_)) => "up",
        (None, None) => "waiting",
    }
}

fn source<T>(
    name: String,
    kind: &str,
    known: &Known<T>,
    items: usize,
    skipped: Vec<String>,
) -> api::Source {
    api::Source {
        name,
        kind: kind.to_owned(),
        state: source_state(known).to_owned(),
        age_seconds: known.confirmed.map(age),
        changed_seconds: known.changed.map(age),
        answers: known.answers,
        changes: known.changes,
        failures: known.failures,
        error: known.error.as_deref().map(str::to_owned),
        items,
        skipped,
    }
}

/// What every consumer declared, sorted by consumer and origin.
pub(super) fn bindings(table: &Table, listing: &Listing) -> Vec<api::Binding> {
    let mut routes: HashMap<(&ConsumerId, &str, u16), Vec<&Route>> = HashMap::new();
    for route in table.routes() {
        let key = (&route.consumer, &*route.binding.origin, route.key.port.get());
        routes.entry(key).or_default().push(route);
    }
    let mut reasons: HashMap<(&ConsumerId, &str), Vec<String>> = HashMap::new();
    for unrouted in table.unrouted() {
        let of_binding = reasons.entry((&unrouted.consumer, &unrouted.origin)).or_default();
        of_binding.push(unrouted.reason.to_string());
    }
    let mut all = Vec::new();
    for consumer in listing.consumers.iter().filter(|consumer| !consumer.has_ended()) {
        for binding in &consumer.bindings {
            let port = binding.descriptor.port.get();
            let mut routes =
                routes.get(&(&consumer.id, &*binding.origin, port)).cloned().unwrap_or_default();
            routes.sort_by_key(|route| route.key);
            let reasons =
                reasons.get(&(&consumer.id, &*binding.origin)).cloned().unwrap_or_default();
            let state = match (routes.is_empty(), reasons.is_empty()) {
                (false, true) => "routed",
                (false, false) => "partly",
                (true, _) => "unrouted",
            };
            all.push(api::Binding {
                consumer: consumer.name.to_string(),
                consumer_id: consumer.id.full().to_owned(),
                origin: binding.origin.to_string(),
                state: state.to_owned(),
                reasons,
                port: Some(port),
                query: routes.first().map(|route| query(&route.upstream.query)),
                addresses: routes.iter().map(|route| route.key.source.to_string()).collect(),
            });
        }
    }
    all.extend(listing.problems.iter().map(|problem| api::Binding {
        consumer: problem.consumer.to_string(),
        consumer_id: String::new(),
        origin: problem.origin.to_string(),
        state: "invalid".to_owned(),
        reasons: vec![problem.reason.clone()],
        port: None,
        query: None,
        addresses: Vec::new(),
    }));
    all.sort_by(|a, b| (&a.consumer, &a.origin, a.port).cmp(&(&b.consumer, &b.origin, b.port)));
    all
}

/// Bindings without a route, and what could not be read.
pub(super) fn problems(table: &Table, listing: &Listing) -> usize {
    let unrouted: HashSet<_> = table.unrouted().map(|u| (&u.consumer, &u.origin)).collect();
    unrouted.len() + listing.problems.len()
}

/// A consumer, with the ports that it has routes for.
pub(super) fn consumer(consumer: &Consumer, table: &Table) -> api::ExplainConsumer {
    let routes = table.routes().filter(|route| route.consumer == consumer.id);
    let mut ports: Vec<_> = routes.map(|route| route.key.port.get()).collect();
    ports.sort_unstable();
    ports.dedup();
    api::ExplainConsumer {
        name: consumer.name.to_string(),
        id: consumer.id.full().to_owned(),
        addresses: consumer.sources.iter().map(ToString::to_string).collect(),
        ports,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_as_its_endpoints_and_its_source_are() {
        let of = |[endpoints, ejected, probing, drained]: [usize; 4], answered, lost| {
            RouteHealth { answered, endpoints, ejected, probing, drained, lost }.state()
        };
        for (counts, state) in [
            ([3, 0, 0, 0], "ok"),
            ([3, 0, 0, 2], "ok"),
            ([3, 1, 0, 0], "degraded"),
            ([3, 0, 1, 0], "degraded"),
            ([1, 0, 1, 0], "degraded"),
            ([3, 3, 0, 0], "ejected"),
            ([3, 2, 0, 1], "ejected"),
            ([3, 0, 0, 3], "no_endpoint"),
            ([0, 0, 0, 0], "no_endpoint"),
        ] {
            assert_eq!(of(counts, true, false), state, "{counts:?}");
        }
        // Kept by the last run, or confirmed before the source was lost: they are used.
        assert_eq!(of([3, 0, 0, 0], false, false), "degraded");
        assert_eq!(of([3, 0, 0, 0], true, true), "degraded");
        assert_eq!(of([0, 0, 0, 0], false, true), "waiting");
    }
}
