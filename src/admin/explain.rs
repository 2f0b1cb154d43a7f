//! From symptom to cause: why a consumer's connections on a port go where they go.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Shown, api, list::is_consumer, view};
use crate::{
    config::{CaptureMode, CaptureScope},
    control::Sources,
    counts::numbered,
    model::{Consumer, ConsumerId, Endpoint, Millis},
    provider::Listing,
    table::{Route, Table},
};

mod way;

/// Explains a port of a consumer, which is named by its name, its ID or an address of its.
pub(super) fn explain(shown: &Shown, wanted: &str, port: u16) -> api::Explain {
    let table = shown.tables.borrow().clone();
    let sources = shown.sources.borrow().clone();
    let provider = sources.provider.borrow().clone();
    let listing = sources.listing.clone().unwrap_or_default();
    let now = shown.figures.now();

    let consumers = consumers(&listing, wanted);
    let mut routes: Vec<_> = table
        .routes()
        .filter(|route| route.key.port.get() == port)
        .filter(|route| consumers.iter().any(|consumer| consumer.id == route.consumer))
        .map(|route| &**route)
        .collect();
    routes.sort_by_key(|route| route.key);
    let bindings = view::bindings(&table, &listing).into_iter().filter(|binding| {
        let of_these = consumers.iter().any(|consumer| consumer.id.full() == binding.consumer_id);
        let invalid = binding.state == "invalid"
            && consumers.iter().any(|consumer| *consumer.name == *binding.consumer);
        (of_these && binding.port == Some(port)) || invalid
    });
    let lost = view::Lost::of(&sources);
    let mut explain = api::Explain {
        consumer: wanted.to_owned(),
        port,
        verdict: "broken".to_owned(),
        findings: Vec::new(),
        consumers: consumers.iter().map(|consumer| view::consumer(consumer, &table)).collect(),
        bindings: bindings.collect(),
        routes: routes.iter().map(|route| view::route(route, &lost, now)).collect(),
        captured: captured(shown, &table, &consumers, !routes.is_empty()),
        dial: Vec::new(),
        services: Vec::new(),
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
    if routes.is_empty() {
        without_route(&mut explain, &listing, wanted, port);
        return explain;
    }
    if explain.captured == Some(false) {
        let from_here = routes.iter().any(|route| route.consumer == ConsumerId::Local);
        explain.findings.push(not_captured(shown, &table, from_here));
    }
    let way = way::of(shown, &table, &listing, &consumers, &routes);
    explain.dial = way.vips.iter().map(|vip| SocketAddr::new(*vip, port).to_string()).collect();
    let (hindered, refused) = (!way.findings.is_empty(), way.refused);
    explain.findings.extend(way.findings);
    let results: Vec<_> = one_of_each(&routes)
        .into_iter()
        .map(|route| {
            let mut service = service(&sources, route, &lost, now);
            leave_out(&mut explain.findings, &mut service, &way::circular(shown, &table, route));
            what_is_wrong(&mut explain.findings, &service);
            let result = result(&service, route);
            explain.services.push(service);
            result
        })
        .collect();
    explain.verdict = match verdict(&explain) {
        _ if refused => "broken",
        "ok" if hindered => "degraded",
        verdict => verdict,
    }
    .to_owned();
    // The cause first: where nothing is wrong, that is where it goes.
    let at = if explain.verdict == "ok" { 0 } else { explain.findings.len() };
    explain.findings.splice(at..at, results);
    explain
}

/// How a port with routes is, by the states that every list has for them.
fn verdict(explain: &api::Explain) -> &'static str {
    let any = |wanted: &[&str]| {
        explain.services.iter().any(|service| wanted.contains(&service.state.as_str()))
    };
    let nowhere = explain.services.iter().any(|service| service.next.is_none());
    if explain.captured == Some(false) || nowhere || any(&["no_endpoint", "waiting"]) {
        "broken"
    } else if any(&["degraded", "ejected"]) {
        "degraded"
    } else {
        "ok"
    }
}

/// A route for each service and way of balancing.
fn one_of_each<'a>(routes: &[&'a Route]) -> Vec<&'a Route> {
    let mut chosen: Vec<&Route> = Vec::new();
    for route in routes {
        let same = |other: &&Route| {
            (&other.upstream.query, other.balance) == (&route.upstream.query, route.balance)
        };
        if !chosen.iter().any(same) {
            chosen.push(route);
        }
    }
    chosen
}

fn service(
    sources: &Sources,
    route: &Route,
    lost: &view::Lost,
    now: Millis,
) -> api::ExplainService {
    let query = &route.upstream.query;
    let known = sources.queries.iter().find(|(asked, _)| asked == query);
    let rotation = &route.upstream.rotation;
    let key = (query.via.clone(), query.dc.clone(), query.service.clone());
    api::ExplainService {
        query: view::query(query),
        balance: view::balance(route.balance).to_owned(),
        state: view::RouteHealth::of(route, lost, now).state().to_owned(),
        source: known.map(|(query, answers)| view::discovery(query, &answers.borrow())),
        endpoints: rotation.endpoints().iter().map(|e| view::endpoint(&key, e, now)).collect(),
        next: rotation.peek(route.balance, now).map(|state| state.endpoint.to_string()),
    }
}

fn consumers<'a>(listing: &'a Listing, wanted: &str) -> Vec<&'a Consumer> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let alive = listing.consumers.iter().map(Arc::as_ref).filter(|c: &&Consumer| !c.has_ended());
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

/// Why connections that would have a route are not captured.
fn not_captured(shown: &Shown, table: &Table, from_here: bool) -> String {
    match shown.capture.as_ref().and_then(|capture| capture.standing().error) {
        Some(error) => format!("The rules cannot be written ({error}): connections are not captured."),
        None if from_here && shown.facts.mode == CaptureMode::Dnat => {
            "What this host sends itself is captured with --redirect only: this consumer's connections are not.".into()
        }
        None if table.vips().is_empty() => {
            "There is no VIP: nothing is captured; name one with --proxy-ip.".into()
        }
        None => "The rules are not in place: connections are not captured.".into(),
    }
}

/// Leaves out of the choice what is dialled itself.
fn leave_out(say: &mut Vec<String>, service: &mut api::ExplainService, circular: &[Endpoint]) {
    let circular: Vec<_> = circular.iter().map(ToString::to_string).collect();
    for endpoint in &circular {
        say.push(format!(
            "{endpoint} is the very address that is dialled, and rules of your own would lead back to embassy: it gets no connections (circular)."
        ));
    }
    if service.next.as_ref().is_some_and(|next| circular.contains(next)) {
        let mut others =
            service.endpoints.iter().filter(|other| !circular.contains(&other.endpoint));
        let active = others.clone().find(|other| other.health.state == "active");
        let next = active.or_else(|| others.find(|other| other.health.state != "drained"));
        service.next = next.map(|next| next.endpoint.clone());
    }
}

/// What is to be said of a service's source and endpoints.
fn what_is_wrong(say: &mut Vec<String>, service: &api::ExplainService) {
    let name = &service.query.name;
    if let Some(source) = &service.source {
        if let Some(error) = &source.error {
            let age = source.age_seconds.map_or("never".into(), |age| format!("{age:.0} s ago"));
            say.push(format!(
                "{name} does not answer ({error}); its last answer, confirmed {age}, stays in use."
            ));
        }
        for entry in &source.skipped {
            say.push(format!("{name} has an entry that was skipped: {entry}."));
        }
    }
    for endpoint in &service.endpoints {
        let error = endpoint.figures.last_error.as_ref();
        let error = error.map_or(String::new(), |error| format!(" ({})", error.text));
        let endpoint_name = &endpoint.endpoint;
        match endpoint.health.state.as_str() {
            "ejected" => say.push(format!(
                "{endpoint_name} is skipped for {:.0} s more, after {} in a row{error}; it was ejected {} so far.",
                endpoint.health.ejected_for_seconds.unwrap_or_default().ceil(),
                numbered(endpoint.health.failures, "failure", "failures"),
                numbered(endpoint.health.ejections, "time", "times"),
            )),
            "probing" => {
                say.push(format!("{endpoint_name} failed{error}; the next connection tries it."))
            }
            "unhealthy" => say.push(format!("{endpoint_name}: its active check fails.")),
            "drained" => {
                say.push(format!("{endpoint_name} is drained: it gets no new connections."))
            }
            _ => {}
        }
    }
}

/// What becomes of the next connection.
fn result(service: &api::ExplainService, route: &Route) -> String {
    let name = &service.query.name;
    let (consumer, port) = (&route.consumer_name, route.key.port);
    match (&service.next, service.state.as_str()) {
        (Some(next), "ejected") => {
            format!("All endpoints of {name} failed lately, so all are tried: the next is {next}.")
        }
        (Some(next), _) => {
            format!("The next connection of {consumer} to port {port} goes to {next}, for {name}.")
        }
        (None, "waiting") => format!("{name} has not answered yet: connections are reset."),
        (None, _) if service.endpoints.iter().any(|e| e.health.state != "drained") => {
            format!("No endpoint of {name} can be used: connections are reset.")
        }
        (None, _) if !service.endpoints.is_empty() => {
            format!("Every endpoint of {name} is drained: connections are reset.")
        }
        (None, _) => format!(
            "{name} has no endpoint: connections are reset. Is it registered under this name, with these tags, and healthy?"
        ),
    }
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
                "No running container that declares anything has the name, the ID or the address {wanted:?}. If it runs, it has neither a variable with the prefix of a binding (-prefix, BACKEND_ unless it is given) nor a label embassy.backend.<name>: it is not captured, and the kernel answers."
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
