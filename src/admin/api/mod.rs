//! The types of the API under `/v1/`: what the server writes and a client reads.
//!
//! Times are in seconds, as numbers with a fraction; ages count back from the moment of the answer, so that no clocks have
//! to agree. Counts start with their subject: a route's when the route appeared, an endpoint's when discovery first
//! returned it, totals when embassy started. Fields may be added; a client must ignore fields that it does not know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::word::worded;
pub use crate::{
    config::{CaptureMode, CaptureScope},
    descriptor::Balance,
    events::Change,
    judgement::{BindingState, EndpointHealth, RouteState, SourceState, Subject, Verdict},
    model::Protocol,
    outcome::Outcome,
    path::{Path, PathReason},
    proxy::ConnectionState,
    readiness::Part,
};
pub use event::Event;

mod event;
mod wire;

worded! {
    /// The result of active checks (`check=tcp`) of an endpoint.
    pub enum Check {
        /// the last one passed
        Passes = "passes",
        /// the last ones failed
        Fails = "fails",
    }

}

/// A fact or a problem, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    pub about: Subject,
    pub verdict: Verdict,
    /// The cause as one word for scripts, such as `source_down`.
    pub cause: String,
    /// One or two sentences.
    pub text: String,
    /// What to do about it; null if there is no problem.
    pub fix: Option<String>,
}

/// The state of each part: the worst of its findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verdicts {
    pub process: Verdict,
    pub capture: Verdict,
    pub sources: Verdict,
    pub bindings: Verdict,
    pub routes: Verdict,
    pub endpoints: Verdict,
    pub connections: Verdict,
    pub host: Verdict,
}

/// The state of embassy: `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// embassy's version.
    pub version: String,
    /// The process ID in embassy's own PID namespace.
    pub pid: u32,
    /// The host's name.
    pub host_name: String,
    /// The Docker engine whose containers are the consumers; null with `-provider=static`.
    pub engine: Option<String>,
    /// The URIs of the discoveries.
    pub discoveries: Vec<String>,
    /// Time since the start.
    pub uptime_seconds: f64,
    /// Whether every source was read once and traffic is captured, as in `/readyz`.
    pub ready: bool,
    /// The worst of `findings`.
    pub verdict: Verdict,
    pub verdicts: Verdicts,
    /// Problems and notable facts: the worst first, at most 20 of each kind.
    pub findings: Vec<Finding>,
    /// The parts that are not ready.
    pub waiting_for: Vec<Waiting>,
    /// Whether changes are allowed on this connection: it uses the Unix socket, or sent the token.
    pub may_change: bool,
    /// The listen addresses for captured connections, as `address:port`.
    pub listeners: Vec<String>,
    /// The addresses whose traffic is captured: the VIPs, and with `--redirect` embassy's own addresses.
    pub vips: Vec<String>,
    /// Number of published routing tables.
    pub table_version: u64,
    /// Containers with a binding, and this host if it has one.
    pub consumers: usize,
    /// Routes in the table: one for each consumer address and declared port.
    pub routes: usize,
    /// Routes by their path, and by its reason.
    pub paths: BTreeMap<Path, BTreeMap<PathReason, u64>>,
    /// Routes without a usable endpoint.
    pub routes_without_endpoint: usize,
    /// Routes that work, with a problem.
    pub routes_degraded: usize,
    /// Routes that do not work: the next connection would be refused, fail or not be captured. Includes routes without endpoint.
    pub routes_broken: usize,
    /// Endpoints of all services that have a route.
    pub endpoints: usize,
    /// Endpoints that are skipped after a failure.
    pub endpoints_ejected: usize,
    /// Endpoints that were drained via the API.
    pub endpoints_drained: usize,
    /// Bindings without a route, with only some of their routes, or that do not parse: see `/v1/bindings?state=problem`.
    pub problems: usize,
    /// Number of sources: the provider and each discovery query.
    pub sources: usize,
    /// Sources that do not answer.
    pub sources_down: usize,
    /// Sources that have not answered yet.
    pub sources_waiting: usize,
    pub connections: Connections,
    pub capture: Capture,
    pub host: Host,
}

/// A part that is not ready.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    pub part: Part,
    /// Time since embassy started to wait for it; null if the rules were lost later.
    pub seconds: Option<f64>,
    /// The first 20 sources that have not answered, by their names in `/v1/sources`.
    pub sources: Vec<String>,
}

/// Figures of all connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Connections {
    /// Open, or being opened.
    pub active: usize,
    /// Maximum number of open connections; further ones are reset.
    pub limit: usize,
    /// Maximum number of open connections of one consumer; null if there is no limit. By default it changes with the number
    /// of connections that are free.
    pub limit_of_consumer: Option<usize>,
    /// Connections that wait until their container is known.
    pub held: usize,
    /// Whether new connections are refused because memory is nearly used up.
    pub memory_short: bool,
    /// Accepted for a route since the start.
    pub started: u64,
    /// Number of ended connections by outcome; outcomes that never occurred are omitted.
    pub ended: BTreeMap<Outcome, u64>,
    /// Ended connections with an outcome that is an error.
    pub errors: u64,
    /// Bytes from consumers to endpoints.
    pub bytes_up: u64,
    /// Bytes from endpoints to consumers.
    pub bytes_down: u64,
    /// Time from accepting a connection until its endpoint connection was open.
    pub connect: Latency,
}

/// Durations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// Number of measured durations.
    pub count: u64,
    /// Sum of all durations.
    pub sum_seconds: f64,
    /// Median. Estimated from a histogram; null if nothing was measured.
    pub p50_seconds: Option<f64>,
    /// 99th percentile. Durations above 5 s count as 5 s.
    pub p99_seconds: Option<f64>,
}

/// The rules in the firewall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Capture {
    pub mode: CaptureMode,
    pub scope: CaptureScope,
    /// `nft` or `iptables`; null if no rules were written yet.
    pub firewall: Option<String>,
    /// Whether the rules are complete.
    pub in_place: bool,
    /// Number of times the rules were restored, by the kind of change.
    pub restored: BTreeMap<Change, u64>,
    /// The rule that was missing the last time.
    pub last_restored: Option<Problem>,
    /// Failed attempts to write the rules.
    pub failures: u64,
    /// Why the rules cannot be written now.
    pub error: Option<String>,
    /// Chains of other programs that may drop captured connections, each with the rule that allows them.
    pub barriers: Vec<String>,
}

/// An error, and when it occurred.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// One line of text.
    pub text: String,
    /// Time since then.
    pub age_seconds: f64,
}

/// The host's resources, as far as the process uses them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Connection tracking entries of the host; null if they cannot be read.
    pub conntrack_entries: Option<u64>,
    /// Maximum number of connection tracking entries.
    pub conntrack_limit: Option<u64>,
    /// Open descriptors.
    pub descriptors: Option<u64>,
    /// Maximum number of open descriptors.
    pub descriptors_limit: Option<u64>,
    /// Resident memory of the process.
    pub resident_bytes: Option<u64>,
    /// Memory use of the control group that is nearest to its limit, without reclaimable memory;
    /// null if there is no limit.
    pub memory_used_bytes: Option<u64>,
    /// Memory limit of this control group.
    pub memory_limit_bytes: Option<u64>,
    /// CPU time of all threads.
    pub cpu_seconds: Option<f64>,
    /// Start time of the process, in seconds since 1970 by this host's clock.
    pub started_seconds: Option<f64>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// Number of entries that match the filter.
    pub total: usize,
    /// Number of these entries before this page.
    pub offset: usize,
    /// Maximum number of entries in a page.
    pub limit: usize,
    /// The entries. Their order is the same on all pages.
    pub items: Vec<T>,
}

/// A route of a consumer: `GET /v1/routes`. Sorted by consumer, port and address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Route {
    /// The consumer's name.
    pub consumer: String,
    /// The container's full ID, or `local`.
    pub consumer_id: String,
    /// The consumer's source address.
    pub address: String,
    /// The declared port.
    pub port: u16,
    pub protocol: Protocol,
    /// The variable or label that declared it.
    pub origin: String,
    pub query: Query,
    pub balance: Balance,
    /// The path that its connections take.
    pub path: Path,
    /// Why they take this path.
    pub path_reason: PathReason,
    pub state: RouteState,
    /// The meaning of the state.
    pub verdict: Verdict,
    /// Number of endpoints of its service.
    pub endpoints: usize,
    /// Endpoints that get connections.
    pub usable: usize,
    /// Endpoints that are ejected, or whose check fails.
    pub ejected: usize,
    /// Endpoints that the next connection tries again.
    pub probing: usize,
    /// Endpoints that are drained.
    pub drained: usize,
    #[serde(flatten)]
    pub figures: Figures,
}

/// A discovery query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Query {
    /// The whole query on one line, and the name of its source in `/v1/sources`: `consul web[prod] in dc2`.
    pub name: String,
    /// The discovery: the scheme of its URI.
    pub discovery: String,
    /// The service's name in this discovery.
    pub service: String,
    /// The tags that an endpoint must have.
    pub tags: Vec<String>,
    /// The datacentre in the descriptor.
    pub datacentre: Option<String>,
}

/// Connection figures of a route or an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Figures {
    /// Connections that are open or being opened.
    pub active: u64,
    /// Connections started: for a route the accepted ones, for an endpoint the opened ones.
    pub started: u64,
    /// Number of ended connections by outcome; outcomes that never occurred are omitted.
    pub ended: BTreeMap<Outcome, u64>,
    /// Ended connections with an outcome that is an error.
    pub errors: u64,
    /// Bytes from consumers to endpoints.
    pub bytes_up: u64,
    /// Bytes from endpoints to consumers.
    pub bytes_down: u64,
    /// UDP: datagrams from consumers to endpoints. Sends on a connected socket are not seen.
    pub datagrams_up: u64,
    /// UDP: datagrams from endpoints to consumers. Those whose receiver does not ask for the sender's address are not seen.
    pub datagrams_down: u64,
    /// For a route: time from accepting a connection until its endpoint connection was open. For an endpoint: connect time.
    pub connect: Latency,
    /// Further attempts after an endpoint failed; for an endpoint always 0.
    pub retries: u64,
    /// The last error.
    pub last_error: Option<Problem>,
}

/// One instance of a service: `GET /v1/endpoints`. Sorted by discovery, service and address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// The discovery that returned it.
    pub discovery: String,
    /// The service, without tags.
    pub service: String,
    /// The datacentre of the query.
    pub datacentre: Option<String>,
    /// As `address:port`.
    pub endpoint: String,
    #[serde(flatten)]
    pub health: Health,
    #[serde(flatten)]
    pub figures: Figures,
}

/// Whether an endpoint gets new connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub state: EndpointHealth,
    /// The meaning of the state.
    pub verdict: Verdict,
    /// The result of active checks; null if no binding has a check.
    pub check: Option<Check>,
    /// Remaining time for which it is skipped.
    pub ejected_for_seconds: Option<f64>,
    /// Failures in a row.
    pub failures: u32,
    /// Failed connect attempts.
    pub failed_tries: u64,
    /// Number of ejections.
    pub ejections: u64,
}

/// A declared binding and its state: `GET /v1/bindings`. Sorted by consumer and origin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Binding {
    /// The consumer's name.
    pub consumer: String,
    /// The container's full ID, or `local`; empty if the provider does not know it.
    pub consumer_id: String,
    /// The variable or label; empty if the problem is not in one.
    pub origin: String,
    /// The filter `state=problem` matches every state except `routed`.
    pub state: BindingState,
    /// The meaning of the state.
    pub verdict: Verdict,
    /// Why it has no route, or only some of them. Empty only if it has all of them.
    pub reasons: Vec<String>,
    /// The port; null if the descriptor does not parse.
    pub port: Option<u16>,
    /// The protocol; null if the descriptor does not parse.
    pub protocol: Option<Protocol>,
    /// The declared service; null if the descriptor does not parse.
    pub service: Option<String>,
    /// The discovery query; null if the descriptor does not parse, or names a discovery that is not configured.
    pub query: Option<Query>,
    /// The consumer addresses for which it has routes.
    pub addresses: Vec<String>,
}

/// A source: `GET /v1/sources`. The provider first, then queries by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// `provider`, or the query on one line, as in the log and the metrics.
    pub name: String,
    /// `provider`, or the discovery: the scheme of its URI.
    pub kind: String,
    pub state: SourceState,
    /// The meaning of the state, and which data of the source is in use.
    pub verdict: Verdict,
    /// Time since it last confirmed the data in use.
    pub age_seconds: Option<f64>,
    /// If it reports no endpoints, or few of many: remaining time for which the last ones stay in use.
    pub held_for_seconds: Option<f64>,
    /// If it has not answered in this run: time since an earlier run confirmed the data in use.
    pub kept_seconds: Option<f64>,
    /// Time since its answer last changed.
    pub changed_seconds: Option<f64>,
    /// Full answers since the start, including those without a change.
    pub answers: u64,
    /// Full answers that differ from the previous one, including the first.
    pub changes: u64,
    /// Failed sessions since the start.
    pub failures: u64,
    /// The error, if it does not answer.
    pub error: Option<String>,
    /// Number of consumers or endpoints in its last answer.
    pub items: usize,
    /// Entries of its answer that do not parse, each with the reason.
    pub skipped: Vec<String>,
}

/// A live connection: `GET /v1/connections`. Sorted by age, the oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Connection {
    /// Unique since the start of this process.
    pub id: String,
    /// The consumer's name; null while the connection is held, because its consumer is not known yet.
    pub consumer: Option<String>,
    /// The container's full ID, or `local`; null while the connection is held.
    pub consumer_id: Option<String>,
    /// The service's name; null while the connection is held.
    pub service: Option<String>,
    /// The discovery query on one line; null while the connection is held.
    pub query: Option<String>,
    /// The consumer's `address:port`.
    pub source: String,
    /// The original destination, `address:port`.
    pub destination: String,
    /// The endpoint that it uses or tries, `address:port`; null before the first attempt.
    pub endpoint: Option<String>,
    /// embassy's own `address:port` of the connection to the endpoint, as the endpoint's log shows it unless the address is
    /// translated on the way; null until the connection is open.
    pub local: Option<String>,
    pub state: ConnectionState,
    /// Time since it was accepted.
    pub age_seconds: f64,
    /// Time from accepting it until its endpoint connection was open.
    pub connect_seconds: Option<f64>,
    /// Number of endpoints tried.
    pub tries: u8,
    /// Bytes from the consumer to the endpoint.
    pub bytes_up: u64,
    /// Bytes from the endpoint to the consumer.
    pub bytes_down: u64,
}

/// Where connections go, and why: `GET /v1/explain?consumer=<name, ID or address>&port=<port>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explain {
    /// The consumer and port of the request.
    pub consumer: String,
    pub port: u16,
    /// The worst of `findings`.
    pub verdict: Verdict,
    /// The findings, the worst first. Without a problem: where the next connection goes. Never empty.
    pub findings: Vec<Finding>,
    /// The matching consumers; more than one if several share the address.
    pub consumers: Vec<ExplainConsumer>,
    /// Their bindings for this port, with their states.
    pub bindings: Vec<Binding>,
    /// The routes: one for each address of the consumer.
    pub routes: Vec<Route>,
    /// Whether connections to this port of a VIP are captured; null if the user's own rules decide. False if none of those takes them.
    pub captured: Option<bool>,
    /// The addresses to connect to, as `address:port`: the VIPs, and with `--redirect` embassy's own addresses, as far as the
    /// consumers reach them; those in their own networks first.
    pub dial: Vec<String>,
    /// The services of the routes: one entry, except if several consumers match.
    pub services: Vec<ExplainService>,
}

/// A service that has routes, and the endpoint of the next connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainService {
    /// The discovery query, as in the routes.
    pub query: Query,
    /// The balancing algorithm, as in the routes.
    pub balance: Balance,
    /// The state of the routes to it.
    pub state: RouteState,
    /// The meaning of the state.
    pub verdict: Verdict,
    /// The source of its endpoints; null if it was not queried yet.
    pub source: Option<Source>,
    /// The endpoints in balancing order, at most 1000.
    pub endpoints: Vec<Endpoint>,
    /// The endpoint that the next connection would get. This call does not change the balancing.
    pub next: Option<String>,
}

/// The identity of a consumer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainConsumer {
    pub name: String,
    /// The container's full ID, or `local`.
    pub id: String,
    /// All its source addresses.
    pub addresses: Vec<String>,
    /// For each of them, the interface by which its connections must arrive, and with the guard the bridge port.
    #[serde(default)]
    pub arrivals: Vec<String>,
    /// The declared ports that have a route.
    pub ports: Vec<u16>,
}

/// Samples of the last five minutes: `GET /v1/history`. The oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct History {
    /// Time between two samples.
    pub interval_seconds: f64,
    pub samples: Vec<Sample>,
}

/// The figures of one interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// Connections accepted for a route, per second.
    pub started_per_second: f64,
    /// Connections with an outcome that is an error, per second.
    pub errors_per_second: f64,
    /// Connections open at the end of the interval.
    pub active: u64,
    /// 99th percentile of the connect time; null if there was no connect.
    pub connect_p99_seconds: Option<f64>,
}

/// Whether embassy is ready: `GET /readyz`, 200 or 503.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    pub ready: bool,
    /// The parts that are not ready.
    pub waiting_for: Vec<Part>,
    /// The first 20 sources that have not answered.
    pub sources: Vec<String>,
}

/// Drains an endpoint or ends its drain: `PUT /v1/endpoints/drain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The service's name. It applies to the services of this name in all discoveries.
    pub service: String,
    /// As `address:port`.
    pub endpoint: String,
    /// true: no new connections; false: it gets connections again.
    pub drained: bool,
}

/// The log level: `PUT /v1/log-level`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// A number from 0 to 10 as for `-v`, or directives in the syntax of `RUST_LOG`.
    pub level: String,
}

/// The result of a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// One sentence.
    pub done: String,
}

/// The body of every error response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Error {
    /// One sentence: what was wrong, the value, and what was expected.
    pub error: String,
}
