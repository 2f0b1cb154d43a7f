//! Converts the table, the sources and the counts to the types of `api`.

use std::{
    net::IpAddr,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::api;
use crate::{
    balance::{CheckResult, EndpointState},
    capture::interface_name,
    consumer::Consumer,
    counts::{ConnectionCounts, Distribution},
    discovery::{self, Endpoints},
    judgement::{self, BindingFate, Cause, Finding, Situation, SourceReading, Used},
    model::Millis,
    provider::Listing,
    proxy::LiveConnection,
    report::PROVIDER,
    source::Known,
    table::{Route, ServiceKey},
    wiring::Arrival,
};

pub(super) fn seconds(time: Duration) -> f64 {
    // Whole microseconds: further digits have no meaning.
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

pub(super) fn finding(cause: &Cause) -> api::Finding {
    let Finding { about, verdict, cause, text, fix } = cause.finding();
    api::Finding { about, verdict, cause: cause.to_owned(), text, fix }
}

pub(super) fn route(route: &Route, situation: &Situation) -> api::Route {
    let health = situation.route(route);
    api::Route {
        consumer: route.consumer_name.to_string(),
        consumer_id: route.consumer.full().to_owned(),
        address: route.key.source.to_string(),
        port: route.key.port.get(),
        protocol: route.key.protocol,
        origin: route.binding.origin.to_string(),
        query: query(&route.written_query()),
        balance: route.balance,
        path: situation.paths.path(&route.key),
        path_reason: situation.paths.of(&route.key),
        state: health.state,
        verdict: health.state.verdict(),
        endpoints: health.endpoints,
        usable: health.active,
        ejected: health.ejected,
        probing: health.probing,
        drained: health.drained,
        figures: figures(&route.counts, route.counts.active(), situation.now),
    }
}

fn figures(counts: &ConnectionCounts, active: u64, now: Millis) -> api::Figures {
    api::Figures {
        active,
        started: counts.started.load(Relaxed),
        ended: counts.ended.iter().collect(),
        errors: counts.ended.errors(),
        bytes_up: counts.bytes_up.load(Relaxed),
        bytes_down: counts.bytes_down.load(Relaxed),
        datagrams_up: counts.datagrams_up.load(Relaxed),
        datagrams_down: counts.datagrams_down.load(Relaxed),
        connect: latency(&counts.connect.read()),
        retries: counts.retries.load(Relaxed),
        last_error: counts.last_error.get().map(|(at, text)| api::Problem {
            text: text.into_owned(),
            age_seconds: seconds(Duration::from_millis(now.0.saturating_sub(at.0))),
        }),
    }
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
    let health = judgement::endpoint(state, now);
    api::Endpoint {
        discovery: discovery.to_string(),
        service: service.to_string(),
        datacentre: datacentre.as_deref().map(str::to_owned),
        endpoint: state.endpoint.to_string(),
        health: api::Health {
            state: health,
            verdict: health.verdict(),
            ejected_for_seconds: state.ejected_for(now).filter(|left| !left.is_zero()).map(seconds),
            check: match state.check() {
                CheckResult::Not => None,
                CheckResult::Passes => Some(api::Check::Passes),
                CheckResult::Fails => Some(api::Check::Fails),
            },
            failures: state.failures(),
            failed_tries: state.failed_tries(),
            ejections: state.ejections(),
        },
        figures: figures(&state.counts, state.active().into(), now),
    }
}

pub(super) fn connection(live: &LiveConnection) -> api::Connection {
    let of_route = |text: fn(&Route) -> String| live.route.as_deref().map(text);
    api::Connection {
        id: format!("{}-{}", live.id.0, live.id.1),
        consumer: of_route(|route| route.consumer_name.to_string()),
        consumer_id: of_route(|route| route.consumer.full().to_owned()),
        service: of_route(|route| route.query.service.to_string()),
        query: of_route(|route| route.written_query().to_string()),
        source: live.source.to_string(),
        destination: live.destination.to_string(),
        endpoint: live.endpoint.map(|endpoint| endpoint.to_string()),
        local: live.local.map(|address| address.to_string()),
        state: live.state,
        age_seconds: seconds(live.age),
        connect_seconds: live.connect.map(seconds),
        tries: live.tries,
        bytes_up: live.bytes_up,
        bytes_down: live.bytes_down,
    }
}

pub(super) fn provider(known: &Known<Listing>, reading: &SourceReading) -> api::Source {
    let items = known.value.as_ref().map_or(0, |listing| listing.consumers.len());
    source(PROVIDER, known, reading, items)
}

pub(super) fn discovery(
    query: &discovery::Query,
    known: &Known<Endpoints>,
    reading: &SourceReading,
) -> api::Source {
    let items = known.value.as_ref().map_or(0, |endpoints| endpoints.list.len());
    source(&query.via, known, reading, items)
}

fn source<T>(kind: &str, known: &Known<T>, reading: &SourceReading, items: usize) -> api::Source {
    api::Source {
        name: reading.name.clone(),
        kind: kind.to_owned(),
        state: reading.state,
        verdict: reading.verdict(),
        age_seconds: known.confirmed.map(age),
        held_for_seconds: reading.held.map(seconds),
        kept_seconds: match reading.used {
            Used::Kept(age) => age.map(seconds),
            Used::Answer(_) | Used::Nothing => None,
        },
        changed_seconds: known.changed.map(age),
        answers: known.answers,
        changes: known.changes,
        failures: known.failures,
        error: reading.error.as_ref().map(ToString::to_string),
        items,
        skipped: {
            let more =
                (reading.more_skipped > 0).then(|| format!("and {} more", reading.more_skipped));
            reading.skipped.iter().cloned().chain(more).collect()
        },
    }
}

pub(super) fn binding(fate: &BindingFate<'_>) -> api::Binding {
    let state = fate.state();
    let (consumer_id, service, routes) = match fate {
        BindingFate::Declared { consumer, binding, routes, .. } => {
            let descriptor = &binding.descriptor;
            let service = format!("{}{}", descriptor.service, descriptor.tags);
            (consumer.id.full(), Some(service), &routes[..])
        }
        BindingFate::Invalid(_) => ("", None, &[][..]),
    };
    api::Binding {
        consumer: fate.consumer().to_string(),
        consumer_id: consumer_id.to_owned(),
        origin: fate.origin().to_string(),
        state,
        verdict: state.verdict(),
        reasons: fate.reasons().iter().map(ToString::to_string).collect(),
        port: fate.port(),
        protocol: fate.protocol(),
        service,
        query: routes.first().map(|route| query(&route.written_query())),
        addresses: routes.iter().map(|route| route.key.source.to_string()).collect(),
    }
}

/// The interface on which connections from an address must arrive, as text.
fn arrival(consumer: &Consumer, source: &IpAddr, situation: &Situation) -> String {
    let by = match consumer.arrival(source) {
        Arrival::By(interface) => format!("{source} by {interface}"),
        Arrival::Outside => format!("{source} by none of the engine's bridges"),
        Arrival::Anywhere => format!("{source} by any interface"),
    };
    let wiring = situation.table.wiring();
    if !situation.capture.standing.guards {
        return by;
    }
    match wiring.owners.get(source) {
        Some(owner) => {
            let ports: Vec<_> = owner.ports.iter().map(|port| interface_name(*port)).collect();
            format!("{by}, port {}", ports.join(" or "))
        }
        None => format!("{by}, any port (not guarded)"),
    }
}

/// A consumer, with the ports that have a route.
pub(super) fn consumer(consumer: &Consumer, situation: &Situation) -> api::ExplainConsumer {
    let table = &situation.table;
    let routes = table.routes().filter(|route| route.consumer == consumer.id);
    let mut ports: Vec<_> = routes.map(|route| route.key.port.get()).collect();
    ports.sort_unstable();
    ports.dedup();
    api::ExplainConsumer {
        name: consumer.name.to_string(),
        id: consumer.id.full().to_owned(),
        addresses: consumer.sources.iter().map(ToString::to_string).collect(),
        arrivals: consumer
            .sources
            .iter()
            .map(|source| arrival(consumer, source, situation))
            .collect(),
        ports,
    }
}
