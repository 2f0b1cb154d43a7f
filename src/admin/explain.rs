//! From symptom to cause: why a consumer's connections on a port go where they go.

use std::net::IpAddr;

use super::{
    Shown, api,
    list::is_consumer,
    view::{self, endpoint_state},
};
use crate::{
    config::{CaptureMode, CaptureScope},
    model::{Consumer, ConsumerId},
    provider::Listing,
    table::{Route, Table},
};

/// Explains a port of a consumer, which is named by its name, its ID or an address of its.
pub(super) fn explain(shown: &Shown, wanted: &str, port: u16) -> api::Explain {
    let table = shown.tables.borrow().clone();
    let sources = shown.sources.borrow().clone();
    let provider = sources.provider.borrow().clone();
    let listing = provider.value.clone().unwrap_or_default();
    let now = shown.figures.now();

    let consumers = consumers(&listing, wanted);
    let mut routes: Vec<_> = table
        .routes()
        .filter(|route| route.key.port.get() == port)
        .filter(|route| consumers.iter().any(|consumer| consumer.id == route.consumer))
        .collect();
    routes.sort_by_key(|route| route.key);
    let bindings = view::bindings(&table, &listing).into_iter().filter(|binding| {
        let of_these = consumers.iter().any(|consumer| consumer.id.full() == binding.consumer_id);
        let invalid = binding.state == "invalid"
            && consumers.iter().any(|consumer| *consumer.name == *binding.consumer);
        (of_these && binding.port == Some(port)) || invalid
    });
    let route = routes.first().copied();
    let source = route.and_then(|route| {
        let known = sources.queries.iter().find(|(query, _)| *query == route.upstream.query);
        known.map(|(query, answers)| view::discovery(query, &answers.borrow()))
    });
    let endpoints = route.map_or(&[][..], |route| route.upstream.rotation.endpoints());
    let next = route.and_then(|route| route.upstream.rotation.peek(route.balance, now));

    let mut explain = api::Explain {
        consumer: wanted.to_owned(),
        port,
        verdict: String::new(),
        findings: Vec::new(),
        consumers: consumers.iter().map(|consumer| view::consumer(consumer, &table)).collect(),
        bindings: bindings.collect(),
        routes: routes.iter().map(|route| view::route(route, now)).collect(),
        captured: captured(shown, &table, &consumers, route.is_some()),
        source,
        endpoints: endpoints
            .iter()
            .map(|state| {
                // The route that names them is there.
                let query = &routes[0].upstream.query;
                let service = (query.via.clone(), query.dc.clone(), query.service.clone());
                view::endpoint(&service, state, now)
            })
            .collect(),
        next: next.map(|state| state.endpoint.to_string()),
    };
    if let Some(error) = &provider.error {
        explain.findings.push(format!(
            "The provider does not answer ({error}): what is known of containers may be old."
        ));
    }
    if table.version == 0 {
        explain.findings.push(
            "Not everything was read yet: there is no table of routes, and nothing is captured."
                .into(),
        );
    }
    match route {
        Some(route) => {
            of_route(&mut explain, shown, route, next.map(|state| endpoint_state(state, now)))
        }
        None => without_route(&mut explain, &listing, wanted, port),
    }
    explain.verdict = match (route.is_some() && explain.next.is_some(), explain.findings.len()) {
        (false, _) => "broken",
        (true, 1) => "ok",
        (true, _) => "degraded",
    }
    .to_owned();
    if explain.captured == Some(false) && route.is_some() {
        explain.verdict = "broken".to_owned();
    }
    explain
}

fn consumers<'a>(listing: &'a Listing, wanted: &str) -> Vec<&'a Consumer> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let alive = listing.consumers.iter().filter(|consumer| !consumer.has_ended());
    let mut consumers: Vec<_> = alive
        .filter(|consumer| {
            is_consumer(wanted, &consumer.name, consumer.id.full())
                || address.is_some_and(|address| consumer.sources.contains(&address))
        })
        .collect();
    consumers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    consumers
}

/// Whether a connection to a VIP would be led to embassy.
fn captured(shown: &Shown, table: &Table, consumers: &[&Consumer], declared: bool) -> Option<bool> {
    let capture = shown.capture.as_ref()?;
    let standing = capture.standing();
    let sent_from_here = consumers.iter().all(|consumer| consumer.id == ConsumerId::Local);
    let reaches_a_hook = !sent_from_here || shown.facts.mode == CaptureMode::Redirect;
    let scope = declared || (shown.facts.scope == CaptureScope::All && !sent_from_here);
    Some(standing.in_place && scope && reaches_a_hook && !table.vips().is_empty())
}

/// What is to be said of a port that has a route: the result last.
fn of_route(explain: &mut api::Explain, shown: &Shown, route: &Route, next: Option<&str>) {
    let service = route.upstream.query.to_string();
    let say = &mut explain.findings;
    if explain.captured == Some(false) {
        let error = shown.capture.as_ref().and_then(|capture| capture.standing().error);
        say.push(match error {
            Some(error) => format!("The rules cannot be written ({error}): connections are not captured."),
            None if route.consumer == ConsumerId::Local && shown.facts.mode == CaptureMode::Dnat => {
                "What this host sends itself is captured with --redirect only: this consumer's connections are not.".into()
            }
            None => "The rules are not in place: connections are not captured.".into(),
        });
    }
    if let Some(source) = &explain.source {
        if let Some(error) = &source.error {
            let age = source.age_seconds.map_or("never".into(), |age| format!("{age:.0} s ago"));
            say.push(format!(
                "{service} does not answer ({error}); its last answer, confirmed {age}, stays in use."
            ));
        }
        for entry in &source.skipped {
            say.push(format!("{service} has an entry that was skipped: {entry}."));
        }
    }
    for endpoint in &explain.endpoints {
        let error = endpoint.figures.last_error.as_ref();
        let error = error.map_or(String::new(), |error| format!(" ({})", error.text));
        match endpoint.health.state.as_str() {
            "ejected" => say.push(format!(
                "{} is skipped for {:.0} s more, after {} failures in a row{error}.",
                endpoint.endpoint,
                endpoint.health.ejected_for_seconds.unwrap_or_default().ceil(),
                endpoint.health.failures,
            )),
            "probing" => say.push(format!(
                "{} failed{error}; the next connection tries it.",
                endpoint.endpoint
            )),
            "unhealthy" => say.push(format!("{}: its active check fails.", endpoint.endpoint)),
            "drained" => {
                say.push(format!("{} is drained: it gets no new connections.", endpoint.endpoint))
            }
            _ => {}
        }
    }
    let (consumer, port) = (&route.consumer_name, route.key.port);
    say.push(match (&explain.next, next) {
        (Some(next), Some("ejected")) => format!(
            "All endpoints of {service} failed lately, so all are tried: the next is {next}."
        ),
        (Some(next), _) => {
            format!("The next connection of {consumer} to port {port} goes to {next}, for {service}.")
        }
        (None, _) if !route.upstream.answered => {
            format!("{service} has not answered yet: connections are reset.")
        }
        (None, _) if !explain.endpoints.is_empty() => {
            format!("Every endpoint of {service} is drained: connections are reset.")
        }
        (None, _) => format!(
            "{service} has no endpoint: connections are reset. Is it registered under this name, with these tags, and healthy?"
        ),
    });
}

/// Why a port has no route.
fn without_route(explain: &mut api::Explain, listing: &Listing, wanted: &str, port: u16) {
    let say = &mut explain.findings;
    if explain.consumers.is_empty() {
        let address: Option<IpAddr> = wanted.parse().ok();
        say.push(match address {
            Some(address) if listing.known.contains(&address) => {
                format!("{wanted} is a container that declares nothing: it is not captured, and the kernel answers.")
            }
            _ => format!(
                "No running container that declares anything has the name, the ID or the address {wanted:?}."
            ),
        });
        let problems = listing.problems.iter().filter(|problem| *problem.consumer == *wanted);
        say.extend(problems.map(|p| format!("{} was skipped: {}.", p.origin, p.reason)));
        return;
    }
    for binding in &explain.bindings {
        let verb = if binding.state == "invalid" { "was skipped" } else { "has no route" };
        say.extend(binding.reasons.iter().map(|why| format!("{} {verb}: {why}.", binding.origin)));
    }
    if !explain.bindings.iter().any(|binding| binding.port == Some(port)) {
        let ports = explain.consumers.iter().flat_map(|c| &c.ports).map(ToString::to_string);
        let ports = ports.collect::<Vec<_>>().join(", ");
        let declared = if ports.is_empty() { "none".to_owned() } else { ports };
        let follows = match explain.captured {
            Some(true) => "every port of a VIP is captured, and embassy resets what means no route",
            Some(false) => {
                "not captured: what listens there on the host answers, else the kernel refuses"
            }
            None => {
                "your own rules decide whether it is captured; embassy resets what means no route"
            }
        };
        say.insert(
            0,
            format!(
                "Port {port} is not declared by {} (declared: {declared}); {follows}.",
                explain.consumers.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", "),
            ),
        );
    }
}
