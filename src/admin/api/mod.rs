//! The types of the API under `/v1/`: what the server writes and a client reads.
//!
//! Times are in seconds, as numbers with a fraction; ages count back from the moment of the answer, so that no clocks have
//! to agree. Counts are since the start of what they count: a route's since it came, an endpoint's since discovery first
//! named it, everybody's since embassy started. Fields may be added; a client passes over those that it does not know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::word::worded;
pub use crate::{
    config::{CaptureMode, CaptureScope},
    descriptor::Balance,
    events::Change,
    judgement::{BindingState, EndpointHealth, RouteState, SourceState, Subject, Verdict},
    outcome::Outcome,
    proxy::ConnectionState,
    readiness::Part,
};
pub use event::Event;

mod event;
mod wire;

worded! {
    /// What active checks (`check=tcp`) say of an endpoint.
    pub enum Check {
        /// the last one passed
        Passes = "passes",
        /// the last ones failed
        Fails = "fails",
    }

}

/// Something that is so, or is wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    pub about: Subject,
    pub verdict: Verdict,
    /// The kind of it, for machines: one word, such as `source_down`.
    pub cause: String,
    /// One or two sentences.
    pub text: String,
    /// What to do about it; null where nothing is wrong.
    pub fix: Option<String>,
}

/// How each part is: the worst of its findings.
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

/// Everything at a glance: `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// embassy's version.
    pub version: String,
    /// The process ID, as embassy itself sees it.
    pub pid: u32,
    /// Since the start.
    pub uptime_seconds: f64,
    /// Whether everything was read once and traffic is captured: what `/readyz` says.
    pub ready: bool,
    /// The worst of `findings`.
    pub verdict: Verdict,
    pub verdicts: Verdicts,
    /// What is wrong, and what is worth knowing: the worst first, and of each kind the first 20.
    pub findings: Vec<Finding>,
    /// What is not ready yet.
    pub waiting_for: Vec<Waiting>,
    /// Whether the changing calls are allowed on this connection: it came by the unix socket, or bore the token.
    pub may_change: bool,
    /// Where captured connections arrive, as `address:port`.
    pub listeners: Vec<String>,
    /// The addresses on which traffic is captured.
    pub vips: Vec<String>,
    /// Counts the tables of routes that were published.
    pub table_version: u64,
    /// Containers that ask for something, and this host where it does.
    pub consumers: usize,
    /// Entries of the table: one for each address of a consumer and each port that it declared.
    pub routes: usize,
    /// Routes that have no endpoint to go to.
    pub routes_without_endpoint: usize,
    /// Routes whose next connection has somewhere to go, while something is wrong.
    pub routes_degraded: usize,
    /// Routes whose next connection is refused, fails or is not captured; those without endpoint are among them.
    pub routes_broken: usize,
    /// Endpoints of all services that a route goes to.
    pub endpoints: usize,
    /// Those that are skipped after a failure.
    pub endpoints_ejected: usize,
    /// Those that get no new connections because somebody asked for it.
    pub endpoints_drained: usize,
    /// Bindings that have no route, and what could not be read at all: see `/v1/bindings?state=problem`.
    pub problems: usize,
    /// What is asked: the provider, and each query of a discovery.
    pub sources: usize,
    /// Those that do not answer.
    pub sources_down: usize,
    /// Those that have not answered yet.
    pub sources_waiting: usize,
    pub connections: Connections,
    pub capture: Capture,
    pub host: Host,
}

/// A part that is not ready.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    pub part: Part,
    /// Since embassy began to wait; null where the rules were lost later.
    pub seconds: Option<f64>,
    /// The sources that have not answered, by their names in `/v1/sources`; the first 20 of them.
    pub sources: Vec<String>,
}

/// All connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Connections {
    /// Open, or being opened.
    pub active: usize,
    /// How many there may be at a time; one more is reset.
    pub limit: usize,
    /// How many one consumer may have at a time; null where there is no limit.
    pub limit_of_consumer: Option<usize>,
    /// Waiting for their container to become known.
    pub held: usize,
    /// Whether new ones are refused now because memory is nearly used up.
    pub memory_short: bool,
    /// Accepted for a route since the start.
    pub started: u64,
    /// How those that ended did, by outcome; outcomes that never came are left out.
    pub ended: BTreeMap<Outcome, u64>,
    /// Those of them that were refused, or broken by an endpoint.
    pub errors: u64,
    /// From consumers to endpoints.
    pub bytes_up: u64,
    /// From endpoints to consumers.
    pub bytes_down: u64,
    /// From accepting a connection until its endpoint's was open.
    pub connect: Latency,
}

/// How long something took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// How many were measured.
    pub count: u64,
    /// All of them together.
    pub sum_seconds: f64,
    /// Half of them took at the most this long. Estimated from a histogram; null where nothing was measured.
    pub p50_seconds: Option<f64>,
    /// 99 of 100 took at the most this long; what took more than 5 s is 5 s here.
    pub p99_seconds: Option<f64>,
}

/// The rules in the firewall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Capture {
    pub mode: CaptureMode,
    pub scope: CaptureScope,
    /// `nft` or `iptables`; null where nothing was written yet.
    pub firewall: Option<String>,
    /// Whether the rules stand as they should.
    pub in_place: bool,
    /// How often they were put back, by what had been done to them.
    pub restored: BTreeMap<Change, u64>,
    /// What was missing the last time.
    pub last_restored: Option<Problem>,
    /// Attempts to write them that failed.
    pub failures: u64,
    /// Why they cannot be written now.
    pub error: Option<String>,
    /// Chains of others that may drop what is captured, each with the rule that lets it pass.
    pub barriers: Vec<String>,
}

/// What went wrong, and when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// One line for people.
    pub text: String,
    /// Since it happened.
    pub age_seconds: f64,
}

/// What this host gives to the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Entries of the kernel's connection tracking; null where they cannot be read.
    pub conntrack_entries: Option<u64>,
    /// How many there may be.
    pub conntrack_limit: Option<u64>,
    /// Descriptors that are open.
    pub descriptors: Option<u64>,
    /// How many may be open.
    pub descriptors_limit: Option<u64>,
    /// Memory in use.
    pub resident_bytes: Option<u64>,
    /// Memory that the control group uses, of the one that is nearest to its limit, without what the kernel can take back;
    /// null where there is no limit.
    pub memory_used_bytes: Option<u64>,
    /// How much it may use.
    pub memory_limit_bytes: Option<u64>,
    /// Processor time, of all threads.
    pub cpu_seconds: Option<f64>,
    /// When the process started, in seconds since 1970, by this host's clock.
    pub started_seconds: Option<f64>,
}

/// One part of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// How many entries fit the filter.
    pub total: usize,
    /// How many of them come before this page.
    pub offset: usize,
    /// How many a page has at the most.
    pub limit: usize,
    /// The entries, in an order that stays the same from page to page.
    pub items: Vec<T>,
}

/// Where a consumer's connections on one port go: `GET /v1/routes`. Sorted by consumer, port and address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Route {
    /// The consumer's name.
    pub consumer: String,
    /// The container's full ID, or `local`.
    pub consumer_id: String,
    /// The address that the consumer dials from.
    pub address: String,
    /// The port that it dials.
    pub port: u16,
    /// The variable or label that declared it.
    pub origin: String,
    pub query: Query,
    pub balance: Balance,
    pub state: RouteState,
    /// What the state means.
    pub verdict: Verdict,
    /// Endpoints of its service.
    pub endpoints: usize,
    /// Those of them that take their turn.
    pub usable: usize,
    /// Those of them that are ejected, or fail their check.
    pub ejected: usize,
    /// Those of them that the next connection probes.
    pub probing: usize,
    /// Those of them that are drained.
    pub drained: usize,
    #[serde(flatten)]
    pub figures: Figures,
}

/// What is asked of a discovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Query {
    /// The whole query on one line, and the name of its source in `/v1/sources`: `consul web[prod] in dc2`.
    pub name: String,
    /// The discovery, by the scheme of its URI.
    pub discovery: String,
    /// The service's name there.
    pub service: String,
    /// The tags that an endpoint must carry.
    pub tags: Vec<String>,
    /// The datacentre that the descriptor names.
    pub datacentre: Option<String>,
}

/// What was counted of connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Figures {
    /// Open now, or being opened.
    pub active: u64,
    /// That began: for a route every accepted one, for an endpoint every opened one.
    pub started: u64,
    /// How they ended, by outcome; outcomes that never came are left out.
    pub ended: BTreeMap<Outcome, u64>,
    /// Those of them that were refused, or broken by an endpoint.
    pub errors: u64,
    /// From consumers to endpoints.
    pub bytes_up: u64,
    /// From endpoints to consumers.
    pub bytes_down: u64,
    /// For a route, from accepting a connection until its endpoint's was open; for an endpoint, the opening alone.
    pub connect: Latency,
    /// Further tries after an endpoint failed; for an endpoint always 0.
    pub retries: u64,
    /// What went wrong last.
    pub last_error: Option<Problem>,
}

/// Where one instance of a service listens: `GET /v1/endpoints`. Sorted by discovery, service and address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// The discovery that named it.
    pub discovery: String,
    /// The service, whatever tags were asked for.
    pub service: String,
    /// The datacentre that was asked.
    pub datacentre: Option<String>,
    /// As `address:port`.
    pub endpoint: String,
    #[serde(flatten)]
    pub health: Health,
    #[serde(flatten)]
    pub figures: Figures,
}

/// Whether an endpoint takes new connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub state: EndpointHealth,
    /// What the state means.
    pub verdict: Verdict,
    /// Null where nobody asked for active checks.
    pub check: Option<Check>,
    /// How much longer it is skipped.
    pub ejected_for_seconds: Option<f64>,
    /// Failures in a row.
    pub failures: u32,
    /// Tries to connect that failed.
    pub failed_tries: u64,
    /// How often it was ejected.
    pub ejections: u64,
}

/// What a consumer declared, and what became of it: `GET /v1/bindings`. Sorted by consumer and origin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Binding {
    /// The consumer's name.
    pub consumer: String,
    /// The container's full ID, or `local`; empty where the provider could not tell.
    pub consumer_id: String,
    /// The variable or label; empty where none is to blame.
    pub origin: String,
    /// The filter `state=problem` stands for all but `routed`.
    pub state: BindingState,
    /// What the state means.
    pub verdict: Verdict,
    /// Why it has no route, or not all of them. Empty only where it has them all.
    pub reasons: Vec<String>,
    /// The port; null where it could not be read.
    pub port: Option<u16>,
    /// The service, as it was declared; null where it could not be read.
    pub service: Option<String>,
    /// What is asked for; null where it could not be read, or names a discovery that there is none of.
    pub query: Option<Query>,
    /// The addresses that it has routes for.
    pub addresses: Vec<String>,
}

/// Somebody who is asked: `GET /v1/sources`. The provider first, then queries by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// `provider`, or the query on one line: the same name as in logs and metrics.
    pub name: String,
    /// `provider`, or the discovery by the scheme of its URI.
    pub kind: String,
    pub state: SourceState,
    /// What the state means, and what is used of it.
    pub verdict: Verdict,
    /// Since it last confirmed what is used of it.
    pub age_seconds: Option<f64>,
    /// How much longer the last endpoints stay in use, where it says that there are none.
    pub held_for_seconds: Option<f64>,
    /// Since what is used was confirmed in an earlier run, where it has not answered in this one.
    pub kept_seconds: Option<f64>,
    /// Since its answer last became another.
    pub changed_seconds: Option<f64>,
    /// Full answers since the start, those that brought nothing new included.
    pub answers: u64,
    /// Those of them that were other than the one before, the first included.
    pub changes: u64,
    /// Sessions that failed since the start.
    pub failures: u64,
    /// Why it does not answer.
    pub error: Option<String>,
    /// Consumers, or endpoints, in its last answer.
    pub items: usize,
    /// Entries of its answer that could not be understood, each with its reason.
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
    /// What is asked of discovery, on one line; null while the connection is held.
    pub query: Option<String>,
    /// The consumer's `address:port`.
    pub source: String,
    /// The original destination, `address:port`.
    pub destination: String,
    /// Where it goes or is about to, `address:port`; null before the first try.
    pub endpoint: Option<String>,
    pub state: ConnectionState,
    /// Since it was accepted.
    pub age_seconds: f64,
    /// From accepting it until its endpoint's was open.
    pub connect_seconds: Option<f64>,
    /// Endpoints that were tried.
    pub tries: u8,
    /// From the consumer to the endpoint.
    pub bytes_up: u64,
    /// From the endpoint to the consumer.
    pub bytes_down: u64,
}

/// From symptom to cause: `GET /v1/explain?consumer=<name, ID or address>&port=<port>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explain {
    /// What was asked for.
    pub consumer: String,
    pub port: u16,
    /// The worst of `findings`.
    pub verdict: Verdict,
    /// What is so and what follows, the worst first; where nothing is wrong, where the next connection goes. Never empty.
    pub findings: Vec<Finding>,
    /// The consumers that were meant; more than one where several share the address.
    pub consumers: Vec<ExplainConsumer>,
    /// What they declared for this port, and what became of it.
    pub bindings: Vec<Binding>,
    /// The routes, one for each address of the consumer.
    pub routes: Vec<Route>,
    /// Whether a connection to a VIP on this port is led to embassy; null where the user's own rules decide.
    pub captured: Option<bool>,
    /// What the consumers dial, as `VIP:port`: the VIPs that their networks have a way to, those of their own networks first.
    pub dial: Vec<String>,
    /// What the routes lead to: one entry unless several consumers share what was asked for.
    pub services: Vec<ExplainService>,
}

/// A service that routes lead to, and where the next connection would go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainService {
    /// As in the routes.
    pub query: Query,
    /// As of the routes.
    pub balance: Balance,
    /// The state of the routes to it.
    pub state: RouteState,
    /// What the state means.
    pub verdict: Verdict,
    /// Who names its endpoints; null where it was not asked yet.
    pub source: Option<Source>,
    /// The endpoints in the order of their turns.
    pub endpoints: Vec<Endpoint>,
    /// Where the next connection would go, if it came now; nothing is picked by asking.
    pub next: Option<String>,
}

/// A consumer, as far as it helps to recognise it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainConsumer {
    pub name: String,
    /// The container's full ID, or `local`.
    pub id: String,
    /// Every address that it may dial from.
    pub addresses: Vec<String>,
    /// The ports that it declared and has a route for.
    pub ports: Vec<u16>,
}

/// The last minutes, for a plot: `GET /v1/history`. The oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct History {
    /// Between two samples.
    pub interval_seconds: f64,
    pub samples: Vec<Sample>,
}

/// What happened in one interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// Connections that were accepted for a route, each second.
    pub started_per_second: f64,
    /// Connections that were refused or ended by a failure, each second.
    pub errors_per_second: f64,
    /// Open at its end.
    pub active: u64,
    /// 99 of 100 connects took at the most this long; null where there was none.
    pub connect_p99_seconds: Option<f64>,
}

/// Whether embassy does its job yet: `GET /readyz`, 200 or 503.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    pub ready: bool,
    /// The parts that are not.
    pub waiting_for: Vec<Part>,
    /// The sources among them that have not answered, the first 20.
    pub sources: Vec<String>,
}

/// Which endpoint gets no new connections: `PUT /v1/endpoints/drain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The service's name. Every discovery's service of that name is meant.
    pub service: String,
    /// As `address:port`.
    pub endpoint: String,
    /// false: it takes its turn again.
    pub drained: bool,
}

/// How much is logged: `PUT /v1/log-level`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// A number from 0 to 10 as `-v` has it, or directives as `RUST_LOG` has them.
    pub level: String,
}

/// What an accepted change did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// One sentence.
    pub done: String,
}

/// Every answer that is no success.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Error {
    /// One sentence: what was wrong, its value, and what was expected.
    pub error: String,
}
