//! Explains where a consumer's connections to a port go, and why.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    api,
    context::Feeds,
    list::{Wanted, is_consumer},
    view,
};
use crate::{
    consumer::Consumer,
    judgement::{Cause, Situation, SourceReading, Verdict},
    model::Protocol,
    table::Route,
};

/// Explains a port of a consumer, given by name, ID or address.
pub(super) fn explain(feeds: &Feeds, wanted: &str, port: u16) -> api::Explain {
    let situation = feeds.situation();
    let consumers = consumers(&situation, wanted);
    let is_one = |consumer: &Consumer| consumers.iter().any(|one| one.id == consumer.id);
    let mut routes: Vec<_> = situation
        .table
        .routes()
        .map(Arc::as_ref)
        .filter(|route| route.key.port.get() == port)
        .filter(|route| consumers.iter().any(|consumer| consumer.id == route.consumer))
        .collect();
    routes.sort_by_key(|route| route.key);
    let causes = situation.of_port(wanted, port, &consumers, &routes);
    let bindings = situation.bindings(is_one);
    // Invalid descriptors are known only by their consumer's name. They may be for this port if they contain no port.
    let of_port = bindings.iter().filter(|binding| {
        let consumer = binding.consumer();
        let is_its = **consumer == *wanted || consumers.iter().any(|one| one.name == *consumer);
        is_its && binding.port().is_none_or(|of| of == port)
    });
    let mut dial: Vec<SocketAddr> = Vec::new();
    // Without a route there is no address to connect to.
    for consumer in consumers.iter().filter(|_| !routes.is_empty()) {
        for vip in situation.dials_at(consumer, port) {
            let vip = SocketAddr::new(vip, port);
            if !dial.contains(&vip) {
                dial.push(vip);
            }
        }
    }
    // Rules capture TCP. If there is only UDP, its path decides.
    let tcp: Vec<_> = routes.iter().filter(|route| route.key.protocol == Protocol::Tcp).collect();
    let captured: Vec<_> = match (tcp.is_empty(), routes.is_empty()) {
        (_, true) => consumers.iter().map(|one| situation.captured(&one.id, port, false)).collect(),
        (true, _) => routes.iter().map(|route| situation.is_captured(route)).collect(),
        (false, _) => tcp.iter().map(|route| situation.is_captured(route)).collect(),
    };
    api::Explain {
        consumer: wanted.to_owned(),
        port,
        verdict: Verdict::worst(causes.iter().map(Cause::verdict)),
        findings: causes.iter().map(view::finding).collect(),
        consumers: consumers.iter().map(|one| view::consumer(one, &situation)).collect(),
        bindings: of_port.map(view::binding).collect(),
        routes: routes.iter().map(|route| view::route(route, &situation)).collect(),
        // No consumer matches: the answer is the same as for a container with other bindings.
        captured: captured
            .into_iter()
            .max()
            .unwrap_or_else(|| situation.captures().then_some(false)),
        dial: dial.iter().map(ToString::to_string).collect(),
        services: Situation::one_of_each_service(&routes)
            .into_iter()
            .map(|route| service(feeds, &situation, route))
            .collect(),
    }
}

fn service(feeds: &Feeds, situation: &Situation, route: &Route) -> api::ExplainService {
    let query = &*route.query;
    let sources = feeds.sources.borrow();
    let known = sources.queries.iter().find(|(asked, _)| asked == query);
    let reading = situation.queries.get(query);
    let asked = route.written_query();
    let source = known.zip(reading).map(|((query, answers), reading)| {
        let named = SourceReading { name: asked.to_string(), ..reading.clone() };
        view::discovery(query, &answers.borrow(), &named)
    });
    let key = (query.via.clone(), query.dc.clone(), query.service.clone());
    let endpoints = situation.table.endpoints_of(route).iter();
    let state = situation.route(route).state;
    api::ExplainService {
        query: view::query(&asked),
        balance: route.balance,
        state,
        verdict: state.verdict(),
        source,
        endpoints: {
            let some = endpoints.take(Wanted::MOST);
            some.map(|e| view::endpoint(&key, e, situation.now)).collect()
        },
        next: situation.next_pick(route).map(|next| next.to_string()),
    }
}

fn consumers<'a>(situation: &'a Situation, wanted: &str) -> Vec<&'a Consumer> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let all = situation.listing.consumers.iter().map(Arc::as_ref);
    let alive = all.filter(|consumer: &&Consumer| !consumer.has_ended());
    let mut consumers: Vec<_> = alive
        .filter(|consumer| {
            is_consumer(wanted, &consumer.name, consumer.id.full())
                || address.is_some_and(|address| consumer.sources.contains(&address))
        })
        .collect();
    consumers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    consumers
}
