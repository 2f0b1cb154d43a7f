//! Everything that can be said, and the words for it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::{BindingState, Reason, RouteState, Subject, Used, Verdict};
use crate::{
    capture::input::Barrier, counts::numbered, limits::FEW, memory::Use, model::Endpoint,
    readiness::Part,
};

/// Why something is as it is.
#[derive(Debug, Clone)]
pub enum Cause {
    // The process.
    Draining,
    /// A part is not ready; `serving`: there is a table all the same.
    Awaited {
        part: Part,
        sources: Vec<String>,
        serving: bool,
    },

    // The capture.
    RulesFail {
        error: Reason,
    },
    RulesMissing,
    NoVip,
    NeedsRedirect,
    Barrier(Barrier),
    CutOff {
        consumer: Arc<str>,
        vips: Vec<IpAddr>,
    },

    // Sources.
    SourceDown {
        source: String,
        error: Reason,
        used: Used,
    },
    SourceAwaited {
        source: String,
    },
    Held {
        source: String,
        left: Duration,
    },
    /// An entry, and why it was skipped.
    Skipped {
        source: String,
        entry: String,
    },

    // Bindings, and ports that have none.
    Binding {
        state: BindingState,
        consumer: Arc<str>,
        origin: Arc<str>,
        reason: Reason,
    },
    NotDeclared {
        consumers: Vec<Arc<str>>,
        port: u16,
        declared: Vec<u16>,
        captured: Option<bool>,
    },
    DeclaresNothing {
        address: String,
    },
    NoConsumer {
        wanted: String,
    },

    // Routes.
    GoesTo {
        consumer: Arc<str>,
        port: u16,
        service: String,
        endpoint: Endpoint,
    },
    AllEjected {
        service: String,
        next: Option<Endpoint>,
    },
    NoEndpoint {
        service: String,
    },
    AllDrained {
        service: String,
    },
    AllCircular {
        service: String,
    },
    NotAnswered {
        service: String,
    },
    /// So many routes are in this state, some of them by name.
    Routes {
        state: RouteState,
        count: usize,
        some: Vec<String>,
    },

    // Endpoints.
    Ejected {
        endpoint: Endpoint,
        left: Duration,
        failures: u32,
        ejections: u64,
        error: Option<Reason>,
    },
    Probing {
        endpoint: Endpoint,
        error: Option<Reason>,
    },
    Unhealthy {
        endpoint: Endpoint,
    },
    Drained {
        endpoint: Endpoint,
    },
    Circular {
        endpoint: Endpoint,
    },
    /// So many endpoints are skipped, some of them by name.
    Endpoints {
        count: usize,
        some: Vec<String>,
    },

    // Limits and the host.
    MemoryShort,
    TooManyConnections {
        live: usize,
    },
    TooManyOfConsumer {
        consumer: Arc<str>,
        live: usize,
    },
    Conntrack {
        use_of: Use,
        verdict: Verdict,
    },
    Descriptors {
        use_of: Use,
    },
    Memory {
        use_of: Use,
    },

    /// So many more of the same kind.
    More {
        subject: Subject,
        verdict: Verdict,
        count: usize,
    },
}

/// A cause in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub about: Subject,
    pub verdict: Verdict,
    /// The kind of the cause, for machines.
    pub cause: &'static str,
    /// One or two sentences.
    pub text: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Cause {
    pub fn verdict(&self) -> Verdict {
        use Verdict::{Broken, Degraded, Ok};
        match self {
            Self::Draining
            | Self::Awaited { serving: false, .. }
            | Self::RulesFail { .. }
            | Self::RulesMissing
            | Self::NoVip
            | Self::NeedsRedirect
            | Self::SourceDown { used: Used::Nothing, .. }
            | Self::SourceAwaited { .. }
            | Self::NotDeclared { .. }
            | Self::DeclaresNothing { .. }
            | Self::NoConsumer { .. }
            | Self::AllEjected { .. }
            | Self::NoEndpoint { .. }
            | Self::AllDrained { .. }
            | Self::AllCircular { .. }
            | Self::NotAnswered { .. }
            | Self::MemoryShort
            | Self::TooManyConnections { .. }
            | Self::TooManyOfConsumer { .. }
            | Self::Memory { .. } => Broken,
            Self::Awaited { .. }
            | Self::Barrier(_)
            | Self::CutOff { .. }
            | Self::SourceDown { .. }
            | Self::Held { .. }
            | Self::Ejected { .. }
            | Self::Probing { .. }
            | Self::Unhealthy { .. }
            | Self::Circular { .. }
            | Self::Endpoints { .. }
            | Self::Descriptors { .. } => Degraded,
            Self::Skipped { .. } | Self::GoesTo { .. } | Self::Drained { .. } => Ok,
            Self::Binding { state, .. } => state.verdict(),
            Self::Routes { state, .. } => state.verdict(),
            Self::Conntrack { verdict, .. } | Self::More { verdict, .. } => *verdict,
        }
    }

    pub fn finding(&self) -> Finding {
        use Subject::{Bindings, Capture, Connections, Endpoints, Host, Process, Routes, Sources};
        let (about, cause, text, fix): (_, _, String, Option<String>) = match self {
            Self::Draining => (
                Process,
                "draining",
                "embassy is shutting down.".into(),
                Some("start it again".into()),
            ),
            Self::Awaited { part, sources, serving } => {
                let whom = sources.join(", ");
                let whom = if whom.is_empty() { whom } else { format!(" ({whom})") };
                let meanwhile = match serving {
                    true => "what is known is served meanwhile",
                    false => "there are no routes yet, and nothing is captured",
                };
                let what = match part {
                    Part::Listing => "The provider has not answered yet",
                    Part::Discovery => "Not every discovery has answered yet",
                    Part::Capture => "The rules are not written yet",
                    Part::Draining => "embassy is shutting down",
                };
                let fix = match part {
                    Part::Listing => "check the engine and -docker",
                    Part::Discovery => "check the registry and -discovery",
                    Part::Capture | Part::Draining => "see the log",
                };
                (Process, "not_ready", format!("{what}{whom}: {meanwhile}."), Some(fix.into()))
            }
            Self::RulesFail { error } => (
                Capture,
                "rules_fail",
                format!("The rules cannot be written ({error}): connections are not captured."),
                Some("embassy doctor says what the firewall needs; embassy tries again".into()),
            ),
            Self::RulesMissing => (
                Capture,
                "rules_missing",
                "The rules are not in place: connections are not captured.".into(),
                Some("wait some seconds; if it stays so, see the log".into()),
            ),
            Self::NoVip => (
                Capture,
                "no_vip",
                "There is no VIP: nothing is captured.".into(),
                Some("name one with --proxy-ip".into()),
            ),
            Self::NeedsRedirect => (
                Capture,
                "needs_redirect",
                "What this host sends itself is captured with --redirect only: connections of this consumer are not captured.".into(),
                Some("start embassy with --redirect".into()),
            ),
            Self::Barrier(Barrier { chain, remedy }) => (
                Capture,
                "barrier",
                format!("What is captured may be dropped, and then hangs: {chain}."),
                Some(remedy.clone()),
            ),
            Self::CutOff { consumer, vips } => (
                Capture,
                "cut_off",
                format!(
                    "No network of {consumer} has a gateway on this host, or one of the VIPs in it ({}): its connections may not arrive here.",
                    list(vips)
                ),
                Some("give it a bridge network as well".into()),
            ),
            Self::SourceDown { source, error, used } => {
                let used = match used {
                    Used::Answer(age) => {
                        format!("its last answer, confirmed {} ago, stays in use", seconds(*age))
                    }
                    Used::Kept(Some(age)) => format!(
                        "what an earlier run knew, confirmed {} ago, is in use",
                        seconds(*age)
                    ),
                    Used::Kept(None) => "what an earlier run knew is in use".to_owned(),
                    Used::Nothing => "nothing is known of it".to_owned(),
                };
                (
                    Sources,
                    "source_down",
                    format!("{source} does not answer ({error}); {used}."),
                    Some("check that it runs and can be reached from here".into()),
                )
            }
            Self::SourceAwaited { source } => (
                Sources,
                "source_awaited",
                format!("{source} has not answered yet."),
                Some("check that it runs and can be reached from here".into()),
            ),
            Self::Held { source, left } => (
                Sources,
                "held",
                format!(
                    "{source} says that there are no endpoints; the last ones stay in use for {} more.",
                    seconds(*left)
                ),
                Some("check that its instances are registered and pass their checks".into()),
            ),
            Self::Skipped { source, entry } => (
                Sources,
                "entry_skipped",
                format!("{source} has an entry that was skipped: {entry}."),
                Some("correct the entry in the registry".into()),
            ),
            Self::Binding { state, consumer, origin, reason } => {
                let (what, fix) = match state {
                    BindingState::Invalid => ("was skipped", "correct the variable or label"),
                    BindingState::Partly => ("has not all of its routes", "correct what it says"),
                    _ => ("has no route", "correct what it says"),
                };
                let space = if origin.is_empty() { "" } else { " " };
                (
                    Bindings,
                    "binding",
                    format!("{consumer}{space}{origin} {what}: {reason}."),
                    Some(fix.into()),
                )
            }
            Self::NotDeclared { consumers, port, declared, captured } => {
                let declared =
                    if declared.is_empty() { "none".to_owned() } else { list(declared) };
                let follows = match captured {
                    Some(true) => {
                        "every port of a VIP is captured, and embassy resets what has no route"
                    }
                    Some(false) => {
                        "not captured: what listens there on the host answers, else the kernel refuses"
                    }
                    None => {
                        "your own rules decide whether it is captured; embassy resets what has no route"
                    }
                };
                (
                    Bindings,
                    "not_declared",
                    format!(
                        "Port {port} is not declared by {} (declared: {declared}); {follows}.",
                        list(consumers)
                    ),
                    Some(format!("declare it in the container: BACKEND_NAME='<service>;{port}'")),
                )
            }
            Self::DeclaresNothing { address } => (
                Bindings,
                "declares_nothing",
                format!("{address} is a container that declares nothing: it is not captured, and the kernel answers."),
                Some("give it a variable BACKEND_NAME='<service>;<port>'".into()),
            ),
            Self::NoConsumer { wanted } => (
                Bindings,
                "no_consumer",
                format!(
                    "No running container that declares anything has the name, the ID or the address {wanted:?}. If it runs, it has neither a variable with the prefix of a binding (-prefix, BACKEND_ unless it is given) nor a label embassy.backend.<name>: it is not captured, and the kernel answers."
                ),
                Some("docker ps shows the names; embassy ps those that are known".into()),
            ),
            Self::GoesTo { consumer, port, service, endpoint } => (
                Routes,
                "goes_to",
                format!(
                    "The next connection of {consumer} to port {port} goes to {endpoint}, for {service}."
                ),
                None,
            ),
            Self::AllEjected { service, next } => {
                let next = next.map_or(String::new(), |next| format!(": the next is {next}"));
                (
                    Routes,
                    "all_ejected",
                    format!(
                        "Every endpoint of {service} failed lately. All of them are tried{next}."
                    ),
                    Some("start an instance of the service, and see that this host reaches it".into()),
                )
            }
            Self::NoEndpoint { service } => (
                Routes,
                "no_endpoint",
                format!("{service} has no endpoint: connections are reset."),
                Some("see that it is registered under this name, with these tags, and healthy".into()),
            ),
            Self::AllDrained { service } => (
                Routes,
                "all_drained",
                format!("Every endpoint of {service} is drained: connections are reset."),
                Some("end the drain of one (PUT /v1/endpoints/drain), or start another".into()),
            ),
            Self::AllCircular { service } => (
                Routes,
                "all_circular",
                format!(
                    "No endpoint of {service} can be used, each is the very address that is dialled (circular): connections are reset."
                ),
                Some("register the service at another address than the VIP".into()),
            ),
            Self::NotAnswered { service } => (
                Routes,
                "waiting",
                format!("{service} has not answered yet: connections are reset."),
                Some("check the registry and -discovery".into()),
            ),
            Self::Routes { state, count, some } => {
                let are = numbered(*count, "route is", "routes are");
                (
                    Routes,
                    "routes",
                    format!("{are} {state}: {}.", some_of(some, *count)),
                    Some("embassy explain <container> <port> says why".into()),
                )
            }
            Self::Ejected { endpoint, left, failures, ejections, error } => (
                Endpoints,
                "ejected",
                format!(
                    "{endpoint} is skipped for {} more, after {} in a row{}; it was ejected {} so far.",
                    seconds(*left),
                    numbered(*failures, "failure", "failures"),
                    because(error),
                    numbered(*ejections, "time", "times"),
                ),
                Some("see that it listens and can be reached from this host".into()),
            ),
            Self::Probing { endpoint, error } => (
                Endpoints,
                "probing",
                format!("{endpoint} failed{}; the next connection tries it.", because(error)),
                Some("see that it listens and can be reached from this host".into()),
            ),
            Self::Unhealthy { endpoint } => (
                Endpoints,
                "unhealthy",
                format!("{endpoint}: its active check fails."),
                Some("see that it listens and can be reached from this host".into()),
            ),
            Self::Drained { endpoint } => (
                Endpoints,
                "drained",
                format!("{endpoint} is drained: it gets no new connections."),
                Some("PUT /v1/endpoints/drain with \"drained\": false ends it".into()),
            ),
            Self::Circular { endpoint } => (
                Endpoints,
                "circular",
                format!(
                    "{endpoint} is the very address that is dialled, and rules of your own would lead back to embassy: it gets no connections (circular)."
                ),
                Some("register the service at another address than the VIP".into()),
            ),
            Self::Endpoints { count, some } => {
                let are = numbered(*count, "endpoint is", "endpoints are");
                (
                    Endpoints,
                    "endpoints",
                    format!("{are} not trusted after a failure: {}.", some_of(some, *count)),
                    Some("embassy ps --endpoints shows the last error of each".into()),
                )
            }
            Self::MemoryShort => (
                Connections,
                "memory_short",
                "New connections are refused (memory_short): the memory that the control group allows is nearly used up.".into(),
                Some("raise the limit: --memory of docker, MemoryMax= of systemd".into()),
            ),
            Self::TooManyConnections { live } => (
                Connections,
                "too_many_connections",
                format!(
                    "New connections are refused (too_many_connections): {} open, and no more may be (--max-connections).",
                    numbered(*live, "connection is", "connections are")
                ),
                Some("raise --max-connections, or the limit of descriptors".into()),
            ),
            Self::TooManyOfConsumer { consumer, live } => (
                Connections,
                "too_many_of_consumer",
                format!(
                    "New connections are refused (too_many_of_consumer): {consumer} has {} open, and no more may be (--max-connections-per-consumer).",
                    numbered(*live, "connection", "connections")
                ),
                Some("see whether the consumer closes its connections, or raise the limit".into()),
            ),
            Self::Conntrack { use_of: Use { used, limit }, verdict } => {
                let then = match verdict {
                    Verdict::Broken => ": new connections are dropped",
                    _ => "",
                };
                (
                    Host,
                    "conntrack",
                    format!("{used} of {limit} entries of connection tracking are in use{then}."),
                    Some("raise net.netfilter.nf_conntrack_max, or set IPTABLES_TRACK_MAX_CONNECTIONS for embassy".into()),
                )
            }
            Self::Descriptors { use_of: Use { used, limit } } => (
                Host,
                "descriptors",
                format!("{used} of {limit} descriptors are open."),
                Some("raise the limit: LimitNOFILE= of systemd, --ulimit nofile= of docker".into()),
            ),
            Self::Memory { use_of: Use { used, limit } } => (
                Host,
                "memory",
                format!(
                    "{} of {} MiB of memory are in use: beyond {FEW} connections, new ones are refused.",
                    used >> 20,
                    limit >> 20
                ),
                Some("raise the limit: --memory of docker, MemoryMax= of systemd".into()),
            ),
            Self::More { subject, count, .. } => {
                (*subject, "more", format!("And {count} more."), Some("see the lists of the API".into()))
            }
        };
        let verdict = self.verdict();
        Finding { about, verdict, cause, text, fix }
    }
}

fn list<T: ToString>(all: &[T]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Those that are named, and that there are more.
fn some_of(some: &[String], count: usize) -> String {
    match count.saturating_sub(some.len()) {
        0 => some.join(", "),
        more => format!("{} and {more} more", some.join(", ")),
    }
}

fn because(error: &Option<Reason>) -> String {
    error.as_ref().map_or(String::new(), |error| format!(" ({error})"))
}

/// Whole seconds, rounded up: none is left where it is over.
fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64().ceil())
}
