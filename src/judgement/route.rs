//! Routes and endpoints: the endpoint of the next connection, and what prevents it.

use std::{net::IpAddr, sync::atomic::Ordering::Relaxed};

use super::{
    cause::{Cause, List, OwnHook},
    situation::Situation,
    states::{EndpointHealth, RouteState, Verdict},
};
use crate::{
    balance::{CheckResult, EndpointState},
    capture::rules::Hook,
    config::CaptureMode,
    consumer::Reach,
    counts::numbered,
    model::{ConsumerId, Endpoint, Millis, Protocol, port_of},
    path::{Path, PathReason},
    table::{Route, RouteKey},
};

/// What to do about a binding of UDP that the kernel path does not take.
fn without_path(reason: PathReason) -> &'static str {
    match reason {
        PathReason::NoContainer => "declare it in a container: this host's own UDP is not served",
        PathReason::TooManyEndpoints => {
            "ask for fewer endpoints by tags: the kernel's table of one service holds 64"
        }
        PathReason::Loopback => "register the service at an address that the container can reach",
        PathReason::Family => {
            "register an endpoint of the family (IPv4 or IPv6) of the consumer's address"
        }
        PathReason::NoIdentity => {
            "show embassy the host's control groups (in a container: -v /sys/fs/cgroup:/host/cgroup:ro, --pid=host); it looks again by itself"
        }
        PathReason::NoVip => "name a VIP of this family with --proxy-ip",
        PathReason::Full => "remove bindings: embassy tries again when there is room",
        PathReason::Pending => "ask again in a second",
        PathReason::NoCapture => "start embassy with --dnat or --redirect",
        _ => {
            "run embassy doctor with the proxy's flags and --path=kernel, which says what is missing"
        }
    }
}

/// The health of an endpoint.
pub fn endpoint(state: &EndpointState, now: Millis) -> EndpointHealth {
    match state.ejected_for(now) {
        _ if state.is_drained() => EndpointHealth::Drained,
        _ if state.check() == CheckResult::Fails => EndpointHealth::Unhealthy,
        _ if state.is_aside(now) => EndpointHealth::Ejected,
        None if state.is_silent() || state.was_set_aside() => EndpointHealth::Probing,
        None => EndpointHealth::Active,
        Some(left) if left.is_zero() => EndpointHealth::Probing,
        Some(_) => EndpointHealth::Ejected,
    }
}

/// Whether a route of UDP never sends to an endpoint: it is of another family (IPv4 or IPv6) than the consumer's address.
fn is_foreign(route: &Route, endpoint: &Endpoint) -> bool {
    let is_ipv4 = |address: IpAddr| address.to_canonical().is_ipv4();
    route.key.protocol == Protocol::Udp && is_ipv4(endpoint.0.ip()) != is_ipv4(route.key.source)
}

/// The state of a route, and the numbers of its endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteHealth {
    pub state: RouteState,
    pub endpoints: usize,
    /// Endpoints that get connections.
    pub active: usize,
    /// Endpoints that are skipped after a failure or by a check.
    pub ejected: usize,
    pub probing: usize,
    pub drained: usize,
    /// Endpoints whose address is the dialled address itself.
    pub circular: usize,
    /// Endpoints of another family (IPv4 or IPv6) than the consumer's address: datagrams never go there.
    pub foreign: usize,
    /// The part of `probing` that failed recently.
    pub(super) just_failed: usize,
}

impl RouteHealth {
    /// The number of endpoints that are not known to fail.
    pub(super) fn hopeful(&self) -> usize {
        self.active + self.probing - self.just_failed
    }
}

impl Situation {
    /// The state of a route.
    pub fn route(&self, route: &Route) -> RouteHealth {
        let mut health = RouteHealth {
            state: RouteState::Ok,
            endpoints: 0,
            active: 0,
            ejected: 0,
            probing: 0,
            drained: 0,
            circular: 0,
            foreign: 0,
            just_failed: 0,
        };
        for state in self.table.endpoints_of(route) {
            health.endpoints += 1;
            *match endpoint(state, self.now) {
                EndpointHealth::Drained => &mut health.drained,
                _ if self.is_circular(route, &state.endpoint) => &mut health.circular,
                _ if is_foreign(route, &state.endpoint) => &mut health.foreign,
                EndpointHealth::Active => &mut health.active,
                EndpointHealth::Ejected | EndpointHealth::Unhealthy => &mut health.ejected,
                EndpointHealth::Probing => {
                    health.just_failed += usize::from(state.has_just_failed(self.now));
                    &mut health.probing
                }
            } += 1;
        }
        health.state = self.route_state(route, &health);
        health
    }

    /// Whether the consumer's datagrams to this port are captured from another of its addresses, such as that of the other family.
    fn is_served_otherwise(&self, route: &Route) -> bool {
        let owner = self.table.owner(route).into_iter();
        let keys = owner.flat_map(|consumer| &consumer.sources);
        let mut keys = keys.map(|source| RouteKey { source: *source, ..route.key });
        keys.any(|key| self.paths.path(&key) == Path::Kernel)
    }

    fn route_state(&self, route: &Route, health: &RouteHealth) -> RouteState {
        let is_tcp = route.key.protocol == Protocol::Tcp;
        let lost = || {
            let query = self.queries.get(&route.query);
            self.provider.is_lost()
                || query.is_some_and(|query| {
                    query.is_lost() || query.held.is_some() || query.problem.is_some()
                })
        };
        // Of what the rules capture; no rule concerns UDP.
        let hindered = || {
            if self.is_by_kernel(route) {
                return false;
            }
            self.barriers().next().is_some()
                || self.may_capture_nothing()
                || self.reach(&route.consumer) != Reach::Arrives
                || !self.shadowed(&route.consumer, route.key.port.get()).0.is_empty()
        };
        let usable = health.active + health.ejected + health.probing;
        // A route that only lacks an endpoint of its family may be served from the consumer's other address.
        if usable == 0 && (health.foreign == 0 || self.is_captured(route) != Some(false)) {
            match self.table.upstream(&route.query).is_some_and(|upstream| upstream.answered) {
                true => RouteState::NoEndpoint,
                false => RouteState::Waiting,
            }
        } else if usable > 0 && health.hopeful() == 0 {
            RouteState::Ejected
        } else if self.is_captured(route) == Some(false) {
            match !is_tcp && self.is_served_otherwise(route) {
                true => RouteState::Degraded,
                false => RouteState::NotCaptured,
            }
        } else if is_tcp && self.limits([route]).next().is_some() {
            RouteState::Refused
        } else if health.ejected + health.probing + health.circular > 0
            || lost()
            || (is_tcp && hindered())
        {
            RouteState::Degraded
        } else {
            RouteState::Ok
        }
    }

    /// The limits that refuse the next connection of any of `routes`: at most one cause for each consumer.
    pub(super) fn limits<'a>(
        &self,
        routes: impl IntoIterator<Item = &'a Route>,
    ) -> impl Iterator<Item = Cause> {
        let load = self.load;
        let memory = load.is_short_of_memory().then_some(Cause::MemoryShort {});
        let full = load.is_full().then(|| Cause::TooManyConnections {
            are: numbered(load.live, "connection is", "connections are"),
        });
        let of_consumer = routes.into_iter().filter_map(move |route| {
            let live = route.live_of_consumer.load(Relaxed);
            load.limit_of_consumer.filter(|limit| live >= *limit)?;
            let live = numbered(live, "connection", "connections");
            Some(Cause::TooManyOfConsumer { consumer: route.consumer_name.clone(), live })
        });
        memory.into_iter().chain(full).chain(of_consumer)
    }

    /// Whether an endpoint's address is the dialled address itself. With the user's own rules a connection to it would
    /// return to embassy, so it gets no connections.
    pub(super) fn is_circular(&self, route: &Route, endpoint: &Endpoint) -> bool {
        self.capture.mode == CaptureMode::None
            && endpoint.0.port() == route.key.port.get()
            && self.table.vips().iter().any(|vip| vip.0 == endpoint.0.ip())
    }

    /// The endpoint that the next connection would get. Does not change the balancing.
    pub fn next_pick(&self, route: &Route) -> Option<Endpoint> {
        let rotation = &self.table.upstream(&route.query)?.rotation;
        let all = rotation.endpoints().iter().map(|state| state.endpoint);
        let is_unused = |one: &Endpoint| self.is_circular(route, one) || is_foreign(route, one);
        let unused: Vec<_> = all.filter(is_unused).collect();
        Some(rotation.peek(route.balance, self.now, &unused)?.endpoint)
    }

    /// Why the connections of a route do not reach embassy, if they should.
    pub(super) fn not_captured(&self, route: &Route) -> Option<Cause> {
        let (consumer, port) = (&route.consumer, route.key.port.get());
        if self.is_captured(route) != Some(false) {
            return None;
        }
        if route.key.protocol == Protocol::Udp {
            let reason = self.paths.of(&route.key);
            return Some(Cause::NoPath {
                consumer: route.consumer_name.clone(),
                port: port_of(port, route.key.protocol),
                address: route.key.source,
                why: reason.line(),
                fix: without_path(reason),
                verdict: match self.is_served_otherwise(route) {
                    true => Verdict::Degraded,
                    false => Verdict::Broken,
                },
            });
        }
        if !self.captures() {
            return Some(self.passed_by(vec![port], consumer));
        }
        let standing = &self.capture.standing;
        Some(match &standing.error {
            Some(error) => Cause::RulesFail { error: error.as_str().into() },
            None if *consumer == ConsumerId::Local && self.capture.mode == CaptureMode::Dnat => {
                Cause::NeedsRedirect {}
            }
            None if !self.captures_for(consumer) => Cause::NoVip {},
            None if self.reach(consumer) == Reach::Elsewhere => self.elsewhere(),
            None if standing.in_place && self.shadowed(consumer, port).1 => return None,
            // This is a cause about the firewall.
            None if standing.in_place && self.all_are_dropped() => return None,
            None => Cause::RulesMissing {},
        })
    }

    /// That connections to the VIPs do not arrive in this network namespace.
    pub(super) fn elsewhere(&self) -> Cause {
        let fix = match self.is_apart() {
            Some(false) => {
                "correct --proxy-ip (PROXY_IP), or leave it out: then docker0's address and the gateways of the consumers' networks are the VIPs"
            }
            Some(true) | None => {
                "start embassy's container with --net=host, or with --redirect (consumers then connect to its own address); if embassy runs on the host, correct --proxy-ip or leave it out"
            }
        };
        Cause::Elsewhere { addresses: List(self.addresses().collect()), fix }
    }

    /// Reports that a registry or engine has the address and port to which this host's own consumer connects.
    pub(super) fn shadow(&self, route: &Route) -> Option<Cause> {
        let (servers, all) = match self.is_by_kernel(route) {
            true => (Vec::new(), false),
            false => self.shadowed(&route.consumer, route.key.port.get()),
        };
        let verdict = if all { Verdict::Broken } else { Verdict::Degraded };
        (!servers.is_empty()).then_some(Cause::Shadowed { servers: List(servers), verdict })
    }

    /// The cause that the user's own rules do not match a consumer's connections to these ports.
    pub(super) fn passed_by(&self, ports: Vec<u16>, consumer: &ConsumerId) -> Cause {
        let vip = self.table.vips().iter().map(|vip| vip.0).next();
        let hook = OwnHook { hook: Hook::of(consumer), vip, apart: self.is_apart() };
        let port = self.own_port;
        let transparent = ports
            .iter()
            .find_map(|port| self.capture.own_rules.transparent_lead_of(*port, hook.hook));
        match self.no_own_rule() {
            _ if let Some(lead) = transparent => {
                Cause::Transparent { rule: lead.rule.clone(), port }
            }
            true => Cause::NoOwnRule { port, hook },
            false => Cause::PassedBy { ports: List(ports), port, hook },
        }
    }
}
