//! `embassy wait`: waits until a service can be used, for health checks and start order.

use std::{
    cell::{Cell, OnceCell},
    collections::{BTreeSet, HashSet},
    io,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::{StreamExt, stream::FuturesUnordered};
use serde::Serialize;
use tokio::time::timeout;

use super::{
    Answer,
    client::{ApiTarget, Client, PATIENCE},
    table::printable,
};
use crate::{
    admin::api::{self, EndpointHealth, Subject, Verdict},
    config,
    counts::numbered,
    listening::PortHolder,
    model::{Endpoint, Protocol},
    path::Path,
    proxy::probe,
};

/// Wait until these services can be used; exit 1 on timeout
///
/// A service is ready when it has a route whose connections arrive, and an endpoint of it accepts a connection now: this command opens one
/// and ends it before the application sees it. If several bindings ask for the service in different ways (tags, datacentre, port, discovery), one of them has to be ready;
/// those for TCP are tried, if there are any. The endpoints of bindings for UDP are not tried: an endpoint that is not known to fail counts. The same applies if embassy runs
/// in another network namespace. On the kernel path, containers connect to the endpoints themselves: that an endpoint does not accept a connection
/// from here does not count. With rules of your own, one of them has to take the connections, if embassy can read them. What is not known is printed, and does not keep a service
/// from being ready.
#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    #[command(flatten)]
    asked: ApiTarget,

    /// Timeout, for example 500ms, 10s, 2m; 0: check once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = config::duration)]
    timeout: Duration,

    /// Check only routes of this consumer: name or ID prefix
    #[arg(long, value_name = "CONSUMER")]
    consumer: Option<String>,

    /// Do not connect to endpoints: one that is not known to fail counts, even if nobody has connected to it yet
    #[arg(long)]
    no_probe: bool,

    /// Services, as in the descriptor; with tags, only bindings that ask for exactly these tags
    #[arg(value_name = "SERVICE", required = true)]
    services: Vec<String>,
}

/// Poll interval.
const PAUSE: Duration = Duration::from_millis(200);
/// Minimum interval between two tries of the same endpoints.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// Timeout of one poll.
const LOOK: Duration = Duration::from_secs(1);
/// Timeout of a connection to an endpoint. The kernel sends a lost SYN again after a second.
const PROBE: Duration = Duration::from_secs(2);
/// Maximum number of endpoints of a service that are tried at a time.
const PROBED: usize = 16;

#[derive(Debug, Serialize)]
struct Waited {
    ready: bool,
    seconds: f64,
    /// Why it is not ready.
    reason: Option<String>,
    /// What could not be found out, though it is ready.
    unknown: Vec<String>,
}

/// The result of one poll.
enum Found {
    Ready {
        /// What could not be found out.
        unknown: Vec<String>,
    },
    NotReady {
        reason: String,
        /// Whether endpoints were tried: they are not tried all the time.
        probed: bool,
    },
}

impl Found {
    fn not_yet(reason: String) -> Self {
        Self::NotReady { reason, probed: false }
    }
}

impl Wait {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let is_here = OnceCell::new();
        let start = Instant::now();
        let mut last: Option<String> = None;
        let (reason, unknown) = loop {
            // A stopped embassy, or a host that drops packets, must not extend the wait.
            let left = self.timeout.saturating_sub(start.elapsed());
            let left = if self.timeout.is_zero() { PATIENCE + PROBE } else { left };
            // The service whose endpoints are tried: embassy has answered then.
            let tried = Cell::new(None);
            let (reason, probed) = match timeout(left, self.look(&client, &tried, &is_here)).await {
                Ok(Ok(Found::Ready { unknown })) => break (None, unknown),
                Ok(Ok(Found::NotReady { reason, probed })) => (reason, probed),
                // It may start later.
                Ok(Err(error)) => (format!("{error:#}"), false),
                // The end of the wait, and not the end of embassy's time.
                Err(_) if left < LOOK && last.is_some() => (last.take().unwrap_or_default(), false),
                Err(_) => match tried.take() {
                    Some(service) => {
                        let seconds = (left.as_secs_f64() * 10.0).round() / 10.0;
                        let service = printable(service);
                        (
                            format!(
                                "no endpoint of {service} accepted a connection within {seconds} s"
                            ),
                            true,
                        )
                    }
                    None => (client.silent(left).to_string(), false),
                },
            };
            let pause = if probed { PROBE_PAUSE } else { PAUSE };
            if start.elapsed() + pause > self.timeout {
                break (Some(reason), Vec::new());
            }
            last = Some(reason);
            tokio::time::sleep(pause).await;
        };
        let ready = reason.is_none();
        if self.asked.json {
            let seconds = start.elapsed().as_secs_f64();
            return Answer::json(&Waited { ready, seconds, reason, unknown }, ready);
        }
        let text = match reason {
            None => {
                let unknown: String =
                    unknown.iter().map(|what| format!("not known: {what}\n")).collect();
                format!("{}: ready\n{unknown}", printable(&self.services.join(", ")))
            }
            Some(reason) => format!("not ready: {reason}\n"),
        };
        Ok(Answer::new(text, ready))
    }

    /// Looks once. `is_here`: whether embassy runs in the network namespace of this command, once it is known. Finding that out reads all of /proc.
    async fn look<'a>(
        &'a self,
        client: &Client,
        tried: &Cell<Option<&'a str>>,
        is_here: &OnceCell<bool>,
    ) -> Result<Found> {
        let status: api::Status = client.get("/v1/status", &[]).await?;
        // Problems of the process affect all connections. Those of the capture make the routes that need it broken.
        let everybodys = status.findings.iter().find(|finding| {
            finding.verdict == Verdict::Broken && finding.about == Subject::Process
        });
        if let Some(finding) = everybodys {
            return Ok(Found::not_yet(printable(&finding.text)));
        }
        let captures = status.findings.iter().filter(|finding| finding.cause == "nothing_captured");
        let mut unknown: Vec<_> = captures.map(|finding| printable(&finding.text)).collect();
        // It has answered, so it listens somewhere.
        let is_here = || *is_here.get_or_init(|| client.listener() != PortHolder::Nobody);
        let probes = !self.no_probe && is_here();
        if !self.no_probe && !probes {
            let at = client.at();
            unknown.push(format!(
                "whether the endpoints accept connections: they were not tried, because the embassy at {at} runs in another network namespace"
            ));
        }
        for service in &self.services {
            let consumer = self.consumer.as_deref().map(|consumer| ("consumer", consumer));
            let (name, tags) = with_tags(service);
            let query: Vec<_> = [("service", name)].into_iter().chain(consumer).collect();
            let mut routes: Vec<api::Route> = client.all("/v1/routes", &query).await?;
            let tags_of = |route: &api::Route| route.query.tags.iter().cloned().collect();
            routes.retain(|route| tags.as_ref().is_none_or(|tags| *tags == tags_of(route)));
            let works = candidates(&routes);
            if works.is_empty() {
                return Ok(Found::not_yet(match routes.first() {
                    None => self.no_route(client, service).await?,
                    Some(route) => why(client, route).await?,
                }));
            }
            if !probes {
                continue;
            }
            tried.set(Some(service.as_str()));
            match any_accepts(client, &works).await? {
                Accepts::Yes => {}
                Accepts::Unknown(what) => unknown.push(what),
                Accepts::No(reason) => return Ok(Found::NotReady { reason, probed: true }),
            }
            tried.set(None);
        }
        Ok(Found::Ready { unknown })
    }

    /// Why there is no route to a service: its binding has none, or no binding asks for it.
    async fn no_route(&self, client: &Client, service: &str) -> Result<String> {
        let consumer = self.consumer.as_deref().map(|consumer| ("consumer", consumer));
        let query: Vec<_> = [("state", "problem")].into_iter().chain(consumer).collect();
        let bindings: Vec<api::Binding> = client.all("/v1/bindings", &query).await?;
        let is_it = |binding: &&api::Binding| {
            binding.service.as_deref().is_some_and(|other| is_asked(service, other))
        };
        let asks = bindings.iter().find(is_it);
        Ok(match asks {
            Some(api::Binding { consumer, origin, reasons, .. }) => {
                let reasons = reasons.join("; ");
                printable(&format!("{consumer} {origin} has no route: {reasons}"))
            }
            None => nobody_asks(client, service, self.consumer.as_deref()).await?,
        })
    }
}

/// One route that works for each distinct query: those of TCP, or if there are none, one of UDP. Routes with the same query have the same
/// endpoints. One of the proxy path comes first: its endpoints are connected to from here.
fn candidates(routes: &[api::Route]) -> Vec<&api::Route> {
    let works = || routes.iter().filter(|route| route.verdict != Verdict::Broken);
    let mut found: Vec<_> = works().filter(|route| route.protocol == Protocol::Tcp).collect();
    found.sort_by_key(|route| route.path != Path::Proxy);
    let mut seen = HashSet::new();
    found.retain(|route| seen.insert(&route.query.name));
    if found.is_empty() {
        found.extend(works().next());
    }
    found
}

/// Whether an endpoint accepts a connection now.
enum Accepts {
    Yes,
    No(String),
    /// What could not be found out.
    Unknown(String),
}

/// Whether an endpoint of one of these routes accepts a connection now.
async fn any_accepts(client: &Client, routes: &[&api::Route]) -> Result<Accepts> {
    let (mut refused, mut unknown) = (None, None);
    for route in routes {
        let name = &route.query.name;
        // A datagram that nobody asked for has no answer.
        if route.protocol == Protocol::Udp {
            unknown = Some(printable(&format!(
                "whether the endpoints of {name} answer: those of UDP are not tried"
            )));
            continue;
        }
        match accepts(client, route).await? {
            Ok(()) => return Ok(Accepts::Yes),
            // The container itself connects to them, from its own network.
            Err(reason) if route.path == Path::Kernel => {
                unknown.get_or_insert(format!(
                    "whether the endpoints accept connections from the containers' networks, as they do on the kernel path; from here: {reason}"
                ));
            }
            Err(reason) => {
                refused.get_or_insert(reason);
            }
        }
    }
    Ok(match (unknown, refused) {
        (Some(what), _) => Accepts::Unknown(what),
        (None, Some(reason)) => Accepts::No(reason),
        (None, None) => Accepts::Yes,
    })
}

/// Whether an endpoint of a TCP route accepts a connection now, or else why none does.
async fn accepts(client: &Client, route: &api::Route) -> Result<Result<(), String>> {
    let explain = explained(client, route).await?;
    let of_route = explain.services.iter().filter(|service| service.query == route.query);
    let endpoints = of_route.flat_map(|service| &service.endpoints);
    let endpoints = endpoints.filter(|endpoint| endpoint.health.state != EndpointHealth::Drained);
    let mut endpoints: Vec<_> = endpoints.collect();
    // Those that are used and well come first.
    endpoints.sort_by_key(|one| (one.health.verdict, one.figures.started == 0));
    let mut tries: FuturesUnordered<_> =
        endpoints.iter().take(PROBED).map(|endpoint| accepts_at(&endpoint.endpoint)).collect();
    let mut first = None;
    while let Some((at, result)) = tries.next().await {
        match result {
            Ok(()) => return Ok(Ok(())),
            Err(error) => first = first.or(Some(format!("{at}: {error}"))),
        }
    }
    let name = &route.query.name;
    Ok(first.map_or(Ok(()), |first| {
        let tried = numbered(endpoints.len().min(PROBED), "endpoint", "endpoints");
        Err(printable(&format!(
            "no endpoint of {name} accepts connections ({tried} tried; {first}): start an instance, or let connections from this host to it pass"
        )))
    }))
}

/// Opens a connection that the application does not see.
async fn accepts_at(endpoint: &str) -> (&str, io::Result<()>) {
    let result = match endpoint.parse() {
        Ok(address) => match timeout(PROBE, probe(Endpoint(address), None)).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other(format!("no answer within {} s", PROBE.as_secs()))),
        },
        Err(_) => Err(io::Error::other("not an address")),
    };
    (endpoint, result)
}

async fn explained(client: &Client, route: &api::Route) -> Result<api::Explain> {
    let port = route.port.to_string();
    let asked = [("consumer", route.address.as_str()), ("port", port.as_str())];
    client.get("/v1/explain", &asked).await
}

/// Why a route's connections are refused.
async fn why(client: &Client, route: &api::Route) -> Result<String> {
    let explain = explained(client, route).await?;
    let text = explain.findings.first().map_or("", |first| &first.text);
    Ok(printable(&format!("{} is {}: {text}", route.query.name, route.state)))
}

/// No container asks for the service. Names the services that containers ask for, because the name may be misspelt.
async fn nobody_asks(client: &Client, service: &str, consumer: Option<&str>) -> Result<String> {
    if let Some(consumer) = consumer
        && let Some(unknown) = client.unknown(consumer).await?
    {
        return Ok(unknown);
    }
    let of = consumer.map(|consumer| ("consumer", consumer));
    let asked: Vec<_> = [("limit", "100")].into_iter().chain(of).collect();
    let some: api::Page<api::Route> = client.get("/v1/routes", &asked).await?;
    let query = |route: &api::Route| match route.query.tags.join(",") {
        tags if tags.is_empty() => printable(&route.query.service),
        tags => printable(&format!("{}[{tags}]", route.query.service)),
    };
    let names: BTreeSet<_> = some.items.iter().map(query).collect();
    let names = names.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    let service = printable(service);
    Ok(match (consumer.map(printable), names.is_empty()) {
        (Some(consumer), true) => format!("{consumer} does not ask for {service}"),
        (Some(consumer), false) => {
            format!("{consumer} does not ask for {service}; it asks for {names}")
        }
        (None, true) => format!("no container asks for {service}"),
        (None, false) => format!("no container asks for {service}; containers ask for {names}"),
    })
}

/// Maximum number of services named if no container asks for the requested one.
const NAMED: usize = 10;

/// `service[tag,tag]`, as in descriptors. Without tags any tags match.
fn with_tags(service: &str) -> (&str, Option<BTreeSet<String>>) {
    match service.strip_suffix(']').and_then(|service| service.split_once('[')) {
        Some((name, tags)) => (name, Some(tags.split(',').map(str::to_owned).collect())),
        None => (service, None),
    }
}

/// Whether a binding for `service` matches the requested service `wanted`.
fn is_asked(wanted: &str, service: &str) -> bool {
    let (name, tags) = with_tags(wanted);
    let (other, carried) = with_tags(service);
    name == other && tags.is_none_or(|tags| tags == carried.unwrap_or_default())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli) fn route(query: &str, protocol: Protocol, path: Path) -> api::Route {
        let route = serde_json::json!({
            "consumer": "app", "consumer_id": "0123", "address": "172.17.0.2", "port": 80,
            "protocol": protocol, "origin": "BACKEND_80",
            "query": {"name": query, "discovery": "consul", "service": query, "tags": []},
            "balance": "rr", "path": path, "path_reason": "not_asked", "state": "ok",
            "verdict": "ok", "endpoints": 1, "usable": 1, "ejected": 0, "probing": 0, "drained": 0,
            "active": 0, "started": 0, "ended": {}, "errors": 0, "bytes_up": 0, "bytes_down": 0,
            "datagrams_up": 0, "datagrams_down": 0,
            "connect": {"count": 0, "sum_seconds": 0.0}, "retries": 0,
        });
        serde_json::from_value(route).unwrap()
    }

    #[test]
    fn one_route_of_each_query_is_tried_and_one_of_udp_only_if_there_is_no_other() {
        let all = |routes: &[api::Route]| {
            let of = |route: &&api::Route| {
                format!("{} {} {}", route.query.name, route.protocol, route.path)
            };
            candidates(routes).iter().map(of).collect::<Vec<_>>()
        };
        let [udp, kernel, proxy, other] = [
            route("web", Protocol::Udp, Path::Kernel),
            route("web", Protocol::Tcp, Path::Kernel),
            route("web", Protocol::Tcp, Path::Proxy),
            route("web[b]", Protocol::Tcp, Path::Kernel),
        ];
        let dead = api::Route { verdict: Verdict::Broken, ..other.clone() };
        assert_eq!(
            all(&[udp.clone(), kernel.clone(), other, proxy]),
            ["web tcp proxy", "web[b] tcp kernel"]
        );
        assert_eq!(all(&[udp.clone(), kernel]), ["web tcp kernel"]);
        assert_eq!(all(&[dead.clone(), udp.clone(), udp]), ["web udp kernel"]);
        assert!(all(&[dead]).is_empty());
    }

    #[test]
    fn a_service_may_be_waited_for_with_its_tags() {
        let tags = |list: &[&str]| Some(list.iter().map(ToString::to_string).collect());
        assert_eq!(with_tags("redis"), ("redis", None));
        assert_eq!(with_tags("redis[b,a]"), ("redis", tags(&["a", "b"])));
        assert_eq!(with_tags("[]"), ("", tags(&[""])));
        assert_eq!(with_tags("redis]"), ("redis]", None));
        assert!(is_asked("redis[b,a]", "redis[a,b]") && is_asked("redis", "redis[a]"));
        assert!(!is_asked("redis[a]", "redis") && !is_asked("redis[a]", "redis[a,b]"));
        assert!(!is_asked("redis", "redis2"));
    }
}
