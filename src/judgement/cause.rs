//! All causes: their subject, severity, text and fix.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::states::{Reason, RouteState, Subject, Verdict};
use crate::{
    capture::rules::Hook,
    discovery::{Endpoints as Answer, NotAllowed, Query},
    limits::FEW,
    model::Endpoint,
    table::Upstream,
};

/// Maximum number of endpoints of one service.
const MOST_ENDPOINTS: usize = Answer::MOST;

/// A cause as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub about: Subject,
    pub verdict: Verdict,
    /// The cause as one word for scripts.
    pub cause: &'static str,
    /// One or two sentences.
    pub text: String,
    /// What to do about it.
    pub fix: Option<String>,
}

/// Each cause: subject, verdict, fields, word, text and fix.
macro_rules! causes {
    ($($about:expr, $verdict:expr, $name:ident { $($field:ident: $type:ty),* } $word:literal, $text:literal, $fix:literal;)*) => {
        /// Why something is in its state.
        #[derive(Debug, Clone)]
        pub enum Cause { $($name { $($field: $type),* },)* }

        #[cfg(test)]
        const FIXES: &[(&str, &str)] = &[$(($word, $fix)),*];

        impl Cause {
            pub fn about(&self) -> Subject {
                match self { $(Self::$name { $($field),* } => { $(let _ = $field;)* $about })* }
            }

            pub fn verdict(&self) -> Verdict {
                match self { $(Self::$name { $($field),* } => { $(let _ = $field;)* $verdict })* }
            }

            pub fn finding(&self) -> Finding {
                let (cause, text, fix) = match self {
                    $(Self::$name { $($field),* } => {
                        $(let _ = $field;)*
                        ($word, format!($text), format!($fix))
                    })*
                };
                let (about, verdict) = (self.about(), self.verdict());
                Finding { about, verdict, cause, text, fix: (!fix.is_empty()).then_some(fix) }
            }
        }
    };
}

use Subject::{Bindings, Capture, Connections, Endpoints, Host, Process, Routes, Sources};
use Verdict::{Broken, Degraded, Ok};

causes! {
    Process, meanwhile.verdict(), ProviderAwaited { meanwhile: Meanwhile } "provider_awaited",
        "The provider has not answered yet: {meanwhile}.",
        "run embassy doctor where embassy runs: it tries the engine's socket, its rights and -docker";
    Process, meanwhile.verdict(), DiscoveryAwaited { sources: InParentheses, meanwhile: Meanwhile } "discovery_awaited",
        "Not every discovery has answered yet{sources}: {meanwhile}.",
        "start or correct the sources that are down: the findings on sources have the error of each, and what to do";

    Capture, Broken, RulesFail { error: Reason } "rules_fail",
        "The rules cannot be written ({error}): connections are not captured.",
        "run embassy doctor --dnat where embassy runs: it names the right, the program or the part of the kernel that is missing; embassy tries again by itself";
    Capture, Broken, RulesMissing {} "rules_missing",
        "The rules are not in place: connections are not captured.",
        "wait 5 s: embassy writes them again; if they stay away, its log says why (cannot write the firewall rules)";
    Capture, Broken, NoVip {} "no_vip",
        "There is no VIP: nothing is captured.",
        "set --proxy-ip to the address to which consumers connect, such as docker0's (172.17.0.1)";
    Capture, Broken, NeedsRedirect {} "needs_redirect",
        "The host's own connections are captured only with --redirect: this consumer's connections are not captured.",
        "start embassy with --redirect";
    Capture, Broken, Elsewhere { addresses: List<IpAddr>, fix: &'static str } "elsewhere",
        "Connections to {addresses} do not arrive here: no interface of embassy's network namespace has such an address.",
        "{fix}";
    Capture, Degraded, DeadVip { addresses: List<IpAddr> } "dead_vip",
        "Connections to {addresses} do not arrive here, those to other VIPs do: no interface of embassy's network namespace has such an address.",
        "correct --proxy-ip (PROXY_IP), or leave it out";
    Capture, Broken, NoOwnRule { port: u16, hook: OwnHook } "no_own_rule",
        "Neither --dnat nor --redirect is set, and no rule of this host leads to embassy's port {port}: nothing is captured.",
        "start embassy with {hook}, or add a rule: {hook:#} -j REDIRECT --to-ports {port}";
    Capture, Ok, OwnRule { rule: String } "own_rule",
        "A rule of your own leads these connections to embassy, if its other conditions fit: {rule}.",
        "";
    Capture, Broken, PassedBy { ports: List<u16>, port: u16, hook: OwnHook } "passed_by",
        "Neither --dnat nor --redirect is set, and your own rules to embassy's port {port} do not take connections to {ports}: these are not captured.",
        "start embassy with {hook}, or add a rule: {hook:#} --dport <one of {ports}> -j REDIRECT --to-ports {port}";
    Capture, Broken, Transparent { rule: String, port: u16 } "tproxy",
        "A TPROXY rule leads connections to embassy's port {port}. embassy does not understand TPROXY, so the kernel drops them: {rule}.",
        "write it as -j REDIRECT --to-ports {port} in the table nat, or remove it and start embassy with --dnat";
    Capture, Degraded, SomePassedBy { ports: List<u16>, port: u16 } "some_passed_by",
        "Your own rules to embassy's port {port} do not take all connections to {ports}: these are not captured, others are.",
        "run embassy explain <container> <port>, which shows the rule that is missing; or start embassy with --dnat (in a container of its own: --redirect)";
    Capture, Degraded, NothingCaptured { port: u16, reason: Because } "nothing_captured",
        "Neither --dnat nor --redirect is set, no connection has been captured since the start, and it cannot be known whether a rule leads to embassy's port {port}: embassy cannot read the rules{reason}.",
        "give embassy the capability NET_ADMIN (docker: --cap-add NET_ADMIN), or what the reason in parentheses says is missing: then it reads your own rules, or writes its own with --dnat (in a container of its own: --redirect); or run embassy doctor as root, which reads them";
    Capture, Degraded, Barrier { chain: String, remedy: String } "barrier",
        "A firewall may drop captured connections, which then time out: {chain}.",
        "{remedy}";
    Capture, Degraded, DropsSome { chain: String, remedy: String } "drops_some",
        "A firewall of this host drops captured connections, which then time out: {chain}. embassy counts connections that arrive and do not pass it.",
        "{remedy}";
    Capture, *verdict, DropsAll { chain: String, remedy: String, verdict: Verdict } "drops_all",
        "A firewall of this host drops all captured connections, which then time out: {chain}. embassy counts connections that arrive, and none that passes it.",
        "{remedy}";
    Capture, *verdict, Shadowed { servers: List<SocketAddr>, verdict: Verdict } "shadowed",
        "Connections of this host to {servers} are not captured, though it declares the port: embassy itself connects to a registry or an engine there.",
        "declare another port for the service, or give the registry an address or port that no consumer declares";
    Capture, Degraded, Behind { chain: String, remedy: String } "behind",
        "Another program may take connections before embassy's rules do: {chain}.",
        "{remedy}";
    Capture, Degraded, Lacking { loss: &'static str, reason: String, fix: &'static str } "firewall_lacks",
        "{loss}: the firewall cannot do it ({reason}).",
        "{fix}";
    Capture, Ok, GuardLacks { loss: &'static str, reason: String, fix: &'static str } "guard_lacks",
        "{loss}: the firewall cannot do it ({reason}).",
        "{fix}";
    Capture, Ok, Unguarded { addresses: String, address: IpAddr, consumer: Arc<str>, fix: &'static str } "unguarded",
        "The guard does not know the bridge ports of {addresses}, such as {address} of {consumer}: another container on the same bridge can use such an address.",
        "{fix}";
    Capture, Degraded, CutOff { consumer: Arc<str>, vips: List<IpAddr>, fix: &'static str } "cut_off",
        "No network of {consumer} has a gateway on this host or contains a VIP ({vips}): its connections may not reach embassy.",
        "{fix}";

    Sources, used.verdict(), SourceDown { source: String, error: Reason, used: Used, fix: String } "source_down",
        "{source} does not answer ({error}); {used}.",
        "{fix}";
    Sources, Broken, SourceAwaited { source: String } "source_awaited",
        "{source} has not answered yet.",
        "wait up to 10 s: then it has answered, or its error is known and shown here";
    Sources, Degraded, Held { source: String, left: Seconds } "held",
        "{source} reports no endpoints, or lost most of them at once; the last ones stay in use for {left} more.",
        "register its instances again, or make their checks pass, within this time; if they ended on purpose, do nothing";
    Sources, Degraded, Unwell { source: String, reason: Reason } "unwell",
        "{source}: {reason}.",
        "correct the name or the tags in the consumer's variable, or register an instance that has them and passes its checks";
    Sources, Ok, Skipped { source: String, entry: String } "entry_skipped",
        "An entry of {source} was skipped: {entry}.",
        "give the entry an IP address and a port in the registry, in a form that docs/reference.md has under Discovery, or remove it";

    Sources, Ok, MoreSkipped { source: String, count: usize } "more_entries_skipped",
        "{count} more entries of {source} were skipped.",
        "give the entries an IP address and a port in the registry, in a form that docs/reference.md has under Discovery, or remove them";
    Sources, Degraded, LeftOut { source: String, count: usize } "endpoints_left_out",
        "{count} endpoints of {source} are not used: a service may have {MOST_ENDPOINTS}.",
        "split the service, or ask for some of it by tags";

    Bindings, Broken, Invalid { binding: String, reason: Reason } "invalid",
        "{binding} was skipped: {reason}.",
        "write it as <service>[<tag>,<tag>];<port>[;<option>=<value>], or set it to nothing to switch it off, and create the container again";
    Bindings, Broken, Unidentified { consumer: Arc<str>, reason: Reason } "invalid",
        "{consumer} cannot be served: {reason}.",
        "connect the container to a bridge network (docker network connect bridge <container>): --network host and none have no address of their own";
    Bindings, Broken, Unrouted { binding: String, reason: Reason, fix: &'static str } "unrouted",
        "{binding} has no route: {reason}.",
        "{fix}";
    Bindings, Degraded, Partly { binding: String, reason: Reason, fix: &'static str } "partly_routed",
        "{binding} has a route from only some of the consumer's addresses: {reason}.",
        "{fix}";
    Bindings, Degraded, Overruled { binding: String, reason: Reason } "overruled",
        "{binding} is not used: {reason}.",
        "correct it, give it another port, or remove one of the two";
    Bindings, Degraded, TooManyBindings { consumer: Arc<str>, bindings: usize, most: usize } "too_many_bindings",
        "{bindings} bindings of {consumer} get no route: a consumer may have {most} (--max-bindings-per-consumer).",
        "remove bindings, or raise --max-bindings-per-consumer";
    Bindings, Degraded, TooManyServices { bindings: usize, most: usize } "too_many_services",
        "{bindings} bindings get no route: the consumers of this host may use {most} services (--max-services).",
        "remove bindings, or raise --max-services";
    Bindings, Broken, NotDeclared { port: u16, consumers: List<Arc<str>>, declared: List<u16>, follows: NotDeclaredMeans } "not_declared",
        "Port {port} is not declared by {consumers} (declared: {declared}); {follows}.",
        "declare it in the container: BACKEND_NAME='<service>;{port}'";
    Bindings, Broken, DeclaresNothing { address: String } "declares_nothing",
        "{address} is a container without bindings: embassy does not capture its connections.",
        "create it with a variable BACKEND_NAME='<service>;<port>'";
    Bindings, Broken, NoConsumer { wanted: String, near: Near } "no_consumer",
        "No running container with a binding has the name, ID or address {wanted:?}{near}. If the container runs, it has no variable that starts with -prefix (default BACKEND_) and no label embassy.backend.<name>: embassy does not capture its connections.",
        "run docker ps, which lists all containers, and embassy ps, which lists those with a binding; then correct the name or declare a binding";

    Routes, Ok, GoesTo { consumer: Arc<str>, port: String, service: String, endpoint: Endpoint } "goes_to",
        "The next connection of {consumer} to port {port} goes to {endpoint}, for {service}.",
        "";
    Routes, *verdict, NoPath { consumer: Arc<str>, port: String, address: IpAddr, why: &'static str, fix: &'static str, verdict: Verdict } "no_path",
        "Port {port} of {consumer} is not served from {address}: UDP takes the kernel path only. {why}",
        "{fix}";
    Routes, Broken, AllEjected { service: String, next: Endpoint } "all_ejected",
        "All endpoints of {service} failed recently. embassy tries all of them; the next is {next}.",
        "start an instance of the service; if one runs, let connections from this host to its address and port pass (try: nc -vz <address> <port>)";
    Routes, Broken, NoEndpoint { service: String, why: Because } "no_endpoint",
        "{service} has no endpoint{why}: connections are reset.",
        "register an instance under this name and with these tags, and make it pass its checks; or correct the name in the consumer's variable";
    Routes, Broken, AllRefused { service: String } "all_refused",
        "No endpoint of {service} may be used: connections are reset.",
        "register its instances with addresses that consumers reach, or allow those networks with --endpoints; the findings on its endpoints have each reason";
    Routes, Broken, AllDrained { service: String } "all_drained",
        "All endpoints of {service} are drained: connections are reset.",
        "end the drain of one (PUT /v1/endpoints/drain), or start another";
    Routes, Broken, AllCircular { service: String } "all_circular",
        "No endpoint of {service} can be used, because each has the address that the consumer dialled (circular): connections are reset.",
        "register the service with an address that is not the VIP";
    Routes, Broken, NotAnswered { service: String, error: Because, meanwhile: HeldFor, fix: String } "waiting",
        "{service} has not answered yet{error}: {meanwhile}.",
        "{fix}";
    Routes, state.verdict(), ManyRoutes { state: RouteState, are: String, some: String } "routes",
        "{are} {state}: {some}.",
        "run embassy explain <container> <port>, which says why and what to do";

    Endpoints, Degraded, Ejected { endpoint: Endpoint, left: Seconds, failures: String, error: Because, ejections: String } "ejected",
        "{endpoint} is skipped for {left} more, after {failures} in a row{error}; it was ejected {ejections} so far.",
        "start the instance at {endpoint}, or let connections from this host to it pass (try: nc -vz); embassy tries it again by itself";
    Endpoints, Degraded, CannotReach { endpoint: Endpoint, error: Because } "cannot_reach",
        "This host cannot open a connection to {endpoint}{error}; it is used only if there is no other.",
        "give this host a route to it and an address of its kind (IPv4 or IPv6), or deregister it";
    Endpoints, Degraded, Probing { endpoint: Endpoint, error: Because } "probing",
        "{endpoint} failed{error}; the next connection tries it.",
        "start the instance at {endpoint}, or let connections from this host to it pass (try: nc -vz); embassy tries it again by itself";
    Endpoints, Degraded, Unhealthy { endpoint: Endpoint } "unhealthy",
        "{endpoint}: its active check fails.",
        "start the instance at {endpoint}, or let connections from this host to it pass (try: nc -vz); embassy tries it again by itself";
    Endpoints, Ok, Drained { endpoint: Endpoint } "drained",
        "{endpoint} is drained: it gets no new connections.",
        "end the drain with PUT /v1/endpoints/drain";
    Endpoints, Degraded, Circular { endpoint: Endpoint } "circular",
        "{endpoint} is the dialled address itself, and your own rules would lead back to embassy: it gets no connections (circular).",
        "register the service with an address that is not the VIP";
    Endpoints, Degraded, Refused { endpoint: Endpoint, service: String, reason: NotAllowed, fix: &'static str } "refused",
        "{endpoint} of {service} is not used: {reason}.",
        "{fix}";
    Endpoints, Degraded, ManyEndpoints { are: String, some: String } "endpoints",
        "{are} ejected, probing or unhealthy: {some}.",
        "run embassy ps --endpoints, which shows the last error of each";

    Connections, Broken, MemoryShort {} "memory_short",
        "New connections are refused (memory_short): the memory limit of the control group is nearly reached.",
        "raise the limit: --memory of docker, MemoryMax= of systemd";
    Connections, Broken, TooManyConnections { are: String } "too_many_connections",
        "New connections are refused (too_many_connections): {are} open, which is the limit (--max-connections).",
        "raise --max-connections, or the descriptor limit (LimitNOFILE= of systemd, --ulimit nofile= of docker)";
    Connections, Broken, TooManyOfConsumer { consumer: Arc<str>, live: String } "too_many_of_consumer",
        "New connections are refused (too_many_of_consumer): {consumer} has {live} open, which is its limit now (--max-connections-per-consumer).",
        "find out why the consumer does not close its connections (embassy ps --sort active), or raise --max-connections-per-consumer";

    Host, Degraded, ConntrackFills { used: u64, limit: u64 } "conntrack",
        "{used} of {limit} connection tracking entries are in use.",
        "raise net.netfilter.nf_conntrack_max, or set IPTABLES_TRACK_MAX_CONNECTIONS for embassy";
    Host, Broken, ConntrackFull { used: u64, limit: u64 } "conntrack",
        "{used} of {limit} connection tracking entries are in use: the kernel drops new connections.",
        "raise net.netfilter.nf_conntrack_max, or set IPTABLES_TRACK_MAX_CONNECTIONS for embassy";
    Host, Degraded, Descriptors { used: u64, limit: u64 } "descriptors",
        "{used} of {limit} descriptors are open.",
        "raise the limit: LimitNOFILE= of systemd, --ulimit nofile= of docker";
    Host, Broken, Memory { used_mib: u64, limit_mib: u64 } "memory",
        "{used_mib} of {limit_mib} MiB of memory are in use: beyond {FEW} connections, new ones are refused.",
        "raise the limit: --memory of docker, MemoryMax= of systemd";

    *subject, *verdict, More { subject: Subject, verdict: Verdict, count: usize } "more",
        "And {count} more.",
        "run embassy ps, or ask the API for the whole list: /v1/routes, /v1/endpoints, /v1/bindings and /v1/sources";
}

impl Cause {
    /// The fix of each cause, as written in the table above. For tests.
    #[cfg(test)]
    pub(super) const FIXES: &[(&str, &str)] = FIXES;

    /// The endpoints that must not be used, and why.
    pub(super) fn refused(query: &Query, upstream: &Upstream) -> impl Iterator<Item = Self> {
        upstream.refused.iter().map(|(endpoint, reason)| Self::Refused {
            endpoint: *endpoint,
            service: query.to_string(),
            reason: *reason,
            fix: reason.fix(),
        })
    }
}

/// Which data of a source is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Used {
    /// Its last answer, and the time since it was confirmed.
    Answer(Duration),
    /// Data saved by an earlier run, and the time since it was confirmed, if known.
    Kept(Option<Duration>),
    Nothing,
}

impl Used {
    /// The severity if the source does not answer.
    pub(super) fn verdict(self) -> Verdict {
        match self {
            Self::Answer(_) | Self::Kept(_) => Degraded,
            Self::Nothing => Broken,
        }
    }
}

impl fmt::Display for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(age) => {
                write!(f, "its last answer, confirmed {} ago, stays in use", Seconds(*age))
            }
            Self::Kept(Some(age)) => {
                write!(
                    f,
                    "data saved by an earlier run, confirmed {} ago, is in use",
                    Seconds(*age)
                )
            }
            Self::Kept(None) => f.write_str("data saved by an earlier run is in use"),
            Self::Nothing => f.write_str("embassy has no data from it"),
        }
    }
}

/// What embassy does until all sources have answered.
#[derive(Debug, Clone, Copy)]
pub enum Meanwhile {
    Serves,
    DoesNot,
}

impl Meanwhile {
    fn verdict(self) -> Verdict {
        match self {
            Self::Serves => Degraded,
            Self::DoesNot => Broken,
        }
    }
}

impl fmt::Display for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serves => "embassy serves what it knows so far",
            Self::DoesNot => "there are no routes yet, and nothing is captured",
        })
    }
}

/// The hook at which the user's own rules must match a connection. Displayed as the flag with which embassy writes such a
/// rule, and with `{:#}` as an iptables command.
#[derive(Debug, Clone, Copy)]
pub struct OwnHook {
    pub hook: Hook,
    /// An address that the rule may match.
    pub vip: Option<IpAddr>,
    /// Whether embassy runs in a container of its own, without the consumers' gateways, if that is known.
    pub apart: Option<bool>,
}

impl fmt::Display for OwnHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (flag, chain) = match self.hook {
            Hook::Output => ("--redirect", "OUTPUT"),
            Hook::Prerouting | Hook::Input => {
                let flag = match self.apart {
                    Some(true) => {
                        "--redirect (it runs in a container of its own: consumers then connect to its own address)"
                    }
                    Some(false) => "--dnat",
                    None => "--dnat (in a container of its own: --redirect)",
                };
                (flag, "PREROUTING")
            }
        };
        match f.alternate() {
            true => {
                let program = if self.vip.is_some_and(|vip| vip.is_ipv6()) {
                    "ip6tables"
                } else {
                    "iptables"
                };
                let vip = self.vip.map_or_else(|| "<VIP>".to_owned(), |vip| vip.to_string());
                write!(f, "{program} -t nat -I {chain} -p tcp")?;
                match (self.hook, self.apart) {
                    // Consumers connect to an address of embassy's own.
                    (Hook::Prerouting | Hook::Input, Some(true)) => Result::Ok(()),
                    _ => write!(f, " -d {vip}"),
                }
            }
            false => f.write_str(flag),
        }
    }
}

/// What happens to connections to a port that is not declared. `None`: the user's own rules capture.
#[derive(Debug, Clone, Copy)]
pub struct NotDeclaredMeans(pub Option<bool>);

impl fmt::Display for NotDeclaredMeans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Some(true) => "every port of a VIP is captured, and embassy resets connections without a route",
            Some(false) => {
                "not captured: a program that listens there on the host answers, or else the kernel refuses"
            }
            None => {
                "your own rules decide whether it is captured; embassy resets captured connections without a route"
            }
        })
    }
}

/// A time in whole seconds, rounded up.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_zero() {
            true => f.write_str("less than 1 s"),
            false => write!(f, "{} s", self.0.as_secs_f64().ceil()),
        }
    }
}

/// The error that led to this, if there is one, in parentheses.
#[derive(Debug, Clone)]
pub struct Because(pub Option<Reason>);

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(std::result::Result::Ok(()), |error| write!(f, " ({error})"))
    }
}

/// Similar names, if there are any.
#[derive(Debug, Clone)]
pub struct Near(pub Vec<Arc<str>>);

impl fmt::Display for Near {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => std::result::Result::Ok(()),
            names => write!(f, "; near: {}", names.join(", ")),
        }
    }
}

/// What happens to connections until discovery has answered, with this `--hold`.
#[derive(Debug, Clone, Copy)]
pub struct HeldFor(pub Duration);

impl fmt::Display for HeldFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_zero() {
            true => f.write_str("connections are reset"),
            false => write!(
                f,
                "connections wait for its answer for up to {} s (--hold), and are reset then",
                self.0.as_secs_f64()
            ),
        }
    }
}

/// The names, if there are any, in parentheses.
#[derive(Debug, Clone)]
pub struct InParentheses(pub Vec<String>);

impl fmt::Display for InParentheses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => std::result::Result::Ok(()),
            names => write!(f, " ({})", names.join(", ")),
        }
    }
}

#[derive(Debug, Clone)]
pub struct List<T>(pub Vec<T>);

impl<T: fmt::Display> fmt::Display for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(if all.is_empty() { "none" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}
