//! Which path a route's connections take, and why. Pure.
//!
//! On the *proxy path* a NAT rule captures a connection, and the proxy carries its bytes. On the *kernel path* the VIP becomes an
//! endpoint inside the consumer's `connect()`, and embassy sees none of its bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    consumer::Consumer,
    cow_map::CowMap,
    descriptor::{Descriptor, EndpointDrain, PathChoice},
    model::{Endpoint, Protocol},
    table::RouteKey,
    word::worded,
};

worded! {
    /// The path of connections.
    pub enum Path {
        /// through embassy
        Proxy = "proxy",
        /// from the consumer to the endpoint; the kernel chooses the endpoint
        Kernel = "kernel",
        /// nowhere: a binding of UDP that the kernel path does not take; there is no other
        None = "none",
    }

    /// Why a route's connections take their path. The first that applies, in this order, from `not_asked` on.
    pub enum PathReason {
        /// The kernel path was asked for, and nothing is in its way.
        Possible = "possible",
        /// path=auto, and every endpoint is proved and can be reached from the consumer's own network.
        Proved = "proved",
        /// The proxy path was asked for, or is the default.
        NotAsked = "not_asked",
        /// The kernel path is not available on this host: embassy's log says why.
        Unavailable = "unavailable",
        /// The consumer is this host, not a container.
        NoContainer = "no_container",
        /// The binding has proxy=: only the proxy can send a PROXY protocol header.
        Header = "header",
        /// The binding has user-timeout=: only the proxy's connections have this timeout.
        UserTimeout = "user_timeout",
        /// The binding has drain=kill or a drain time, and embassy cannot reset connections in the consumer's network.
        Drain = "drain",
        /// --max-connections-per-consumer is a number: only the proxy refuses further connections.
        Limit = "limit",
        /// The service has no endpoint: the proxy refuses connections, or holds them.
        NoEndpoint = "no_endpoint",
        /// The service has more endpoints than the kernel's table of one service holds (64).
        TooManyEndpoints = "too_many_endpoints",
        /// An endpoint has a loopback address, which would be the consumer's own.
        Loopback = "loopback",
        /// An endpoint is not of the family (IPv4 or IPv6) of the consumer's address.
        Family = "family",
        /// path=auto, and an endpoint is in another of the engine's networks than the consumer.
        Isolated = "isolated",
        /// path=auto, and it is not known whether an endpoint can be reached from the consumer's own network: embassy cannot connect from there.
        Untried = "untried",
        /// path=auto, and a connect from the consumer's own network to an endpoint failed.
        NotReached = "not_reached",
        /// path=auto, and connects from the consumer's own network to all endpoints are being tried.
        Trying = "trying",
        /// The control group of the consumer's container was not found.
        NoIdentity = "no_identity",
        /// No VIP is of the family (IPv4 or IPv6) of the consumer's address.
        NoVip = "no_vip",
        /// The kernel's tables are full.
        Full = "full",
        /// path=auto, and the last connect to an endpoint failed, its check fails, or none was made yet.
        Unproved = "unproved",
        /// The kernel path has not looked at the binding yet. Only of UDP.
        Pending = "pending",
        /// embassy runs without --dnat and --redirect, so there is no kernel path. Only of UDP.
        NoCapture = "no_capture",
    }
}

impl PathReason {
    /// The path that it leads to, of TCP.
    pub fn path(self) -> Path {
        match self {
            Self::Possible | Self::Proved => Path::Kernel,
            _ => Path::Proxy,
        }
    }

    /// Whether the route stands in the kernel's tables. Those of a service in doubt do, and their connections are left to the
    /// proxy: so one word decides for all of them.
    pub fn has_entries(self) -> bool {
        matches!(self, Self::Possible | Self::Proved | Self::Unproved)
    }

    /// The reason as one line.
    pub fn line(self) -> &'static str {
        crate::word::Word::meaning(self)
    }
}

/// How many routes take a path, for each reason.
pub type PathCounts = BTreeMap<Path, BTreeMap<PathReason, u64>>;

/// Which path each route takes, and why. Copies share what did not change.
#[derive(Debug, Clone)]
pub struct Paths {
    default: PathChoice,
    /// Those of routes that were not asked to take another path than the proxy's are left out.
    reasons: CowMap<RouteKey, PathReason>,
    /// That of a route of UDP that is left out.
    unknown_udp: PathReason,
}

impl Paths {
    /// Before any route is known.
    pub fn new(default: PathChoice) -> Self {
        Self { default, reasons: CowMap::default(), unknown_udp: PathReason::Pending }
    }

    /// Where embassy captures nothing, there is no kernel path either.
    pub fn without_capture() -> Self {
        Self { unknown_udp: PathReason::NoCapture, ..Self::new(PathChoice::Proxy) }
    }

    pub fn of(&self, key: &RouteKey) -> PathReason {
        self.reasons.get(key).copied().unwrap_or(match key.protocol {
            Protocol::Tcp => PathReason::NotAsked,
            Protocol::Udp => self.unknown_udp,
        })
    }

    /// The path that a route's connections or datagrams take.
    pub fn path(&self, key: &RouteKey) -> Path {
        match (self.of(key).path(), key.protocol) {
            (Path::Proxy, Protocol::Udp) => Path::None,
            (path, _) => path,
        }
    }

    /// How many of these routes take each path, for each reason.
    pub fn counts<'a>(&self, routes: impl Iterator<Item = &'a RouteKey>) -> PathCounts {
        let mut counts = PathCounts::new();
        for key in routes {
            let of_path = counts.entry(self.path(key)).or_default();
            *of_path.entry(self.of(key)).or_default() += 1;
        }
        counts
    }

    /// Whether any route was asked to take another path than the proxy's.
    pub fn are_of_interest(&self) -> bool {
        self.default != PathChoice::Proxy || !self.reasons.is_empty()
    }

    /// Returns whether it was another before.
    pub(crate) fn set(&mut self, key: RouteKey, reason: PathReason) -> bool {
        let before = match reason {
            PathReason::NotAsked => self.reasons.remove(&key),
            _ if self.reasons.get(&key) == Some(&reason) => Some(reason),
            _ => self.reasons.insert(key, reason),
        };
        before.unwrap_or(PathReason::NotAsked) != reason
    }

    /// Returns whether there was one.
    pub(crate) fn forget(&mut self, key: &RouteKey) -> bool {
        self.reasons.remove(key).is_some()
    }
}

/// Endpoints of a service in the kernel's table: as many as `ENDPOINTS_OF_A_SERVICE` in connect.c.
pub const MOST_ENDPOINTS: usize = 64;

/// What the decision depends on, besides the binding.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// `--path`, for bindings that name none.
    pub default: PathChoice,
    /// Whether the kernel path works on this host.
    pub is_available: bool,
    /// Whether the consumer is a container.
    pub is_container: bool,
    /// Whether embassy can reset connections in the consumer's network.
    pub can_reset: bool,
    /// Whether `--max-connections-per-consumer` is a number.
    pub is_limited: bool,
    /// Whether the route's source address is of IPv4.
    pub is_ipv4: bool,
    pub endpoints: &'a [Endpoint],
}

/// Whether a binding asks for another path than the proxy's. One of UDP always does.
pub fn asks(descriptor: &Descriptor, default: PathChoice) -> bool {
    descriptor.protocol == Protocol::Udp || descriptor.path.unwrap_or(default) != PathChoice::Proxy
}

/// The path as far as it does not depend on the host at the moment: what is left is `NoIdentity`, `NoVip` and `Full`, and for `auto`
/// what [`caution`] says.
pub fn decide(descriptor: &Descriptor, facts: Facts<'_>) -> PathReason {
    if descriptor.protocol == Protocol::Udp {
        return decide_udp(facts);
    }
    let first = [
        (descriptor.path.unwrap_or(facts.default) == PathChoice::Proxy, PathReason::NotAsked),
        (!facts.is_available, PathReason::Unavailable),
        (!facts.is_container, PathReason::NoContainer),
        (descriptor.proxy.is_some(), PathReason::Header),
        (descriptor.user_timeout.is_some(), PathReason::UserTimeout),
        (descriptor.drain != EndpointDrain::Keep && !facts.can_reset, PathReason::Drain),
        (facts.is_limited, PathReason::Limit),
        (facts.endpoints.is_empty(), PathReason::NoEndpoint),
        (facts.endpoints.len() > MOST_ENDPOINTS, PathReason::TooManyEndpoints),
        (facts.endpoints.iter().any(is_own), PathReason::Loopback),
        (facts.endpoints.iter().any(|one| is_ipv4(one) != facts.is_ipv4), PathReason::Family),
    ];
    first.iter().find(|(applies, _)| *applies).map_or(PathReason::Possible, |(_, reason)| *reason)
}

/// What `auto` asks of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Whether the last connect to it opened, by either path, and no check of it fails.
    pub is_proved: bool,
    pub reach: EndpointReach,
}

/// Whether an endpoint can be reached from a consumer's own network, as far as embassy knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointReach {
    /// A connect from there opened; or embassy cannot try it, and the networks leave no doubt.
    Reached,
    /// Another network of the engine has it: Docker drops what goes from one to another.
    Isolated,
    /// embassy cannot try it.
    Untried,
    Trying,
    /// A connect from there failed.
    Failed,
}

/// What `auto` adds to [`decide`]: the kernel path only if nothing is lost but the retry of a connection that is being opened while an
/// endpoint dies.
pub fn caution(candidates: &[Candidate]) -> PathReason {
    let any = |reach| candidates.iter().any(|one| one.reach == reach);
    let first = [
        (any(EndpointReach::Isolated), PathReason::Isolated),
        (any(EndpointReach::Untried), PathReason::Untried),
        (any(EndpointReach::Failed), PathReason::NotReached),
        (any(EndpointReach::Trying), PathReason::Trying),
        (candidates.iter().any(|one| !one.is_proved), PathReason::Unproved),
    ];
    first.iter().find(|(applies, _)| *applies).map_or(PathReason::Proved, |(_, reason)| *reason)
}

/// Where an endpoint is, seen from a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nearness {
    /// Both are in one network, and what is in it is not kept apart.
    Near,
    /// In a network of the engine in which the consumer is not.
    Isolated,
    /// Routes, firewalls and other hosts decide.
    Beyond,
}

/// By the engine's networks alone. `apart`: those whose containers do not reach each other.
pub fn nearness(
    endpoint: Endpoint,
    consumer: &Consumer,
    networks: &BTreeSet<IpNet>,
    apart: &BTreeSet<IpNet>,
) -> Nearness {
    let ip = endpoint.0.ip().to_canonical();
    let is_own =
        |network: &IpNet| consumer.sources.iter().any(|own: &IpAddr| network.contains(own));
    let around: Vec<_> = networks.iter().filter(|network| network.contains(&ip)).collect();
    match around.iter().find(|network| is_own(network)) {
        // A gateway is the host itself: its firewall decides.
        Some(own) if apart.contains(*own) || consumer.gateways.contains(&ip) => Nearness::Beyond,
        Some(_) => Nearness::Near,
        None if around.is_empty() => Nearness::Beyond,
        None => Nearness::Isolated,
    }
}

/// The same of UDP. Without an endpoint the kernel refuses; of endpoints of both families it uses those of the consumer's.
fn decide_udp(facts: Facts<'_>) -> PathReason {
    let all = facts.endpoints;
    let is_foreign = |one: &Endpoint| is_ipv4(one) != facts.is_ipv4;
    let first = [
        (!facts.is_available, PathReason::Unavailable),
        (!facts.is_container, PathReason::NoContainer),
        (all.len() > MOST_ENDPOINTS, PathReason::TooManyEndpoints),
        (all.iter().any(is_own), PathReason::Loopback),
        (!all.is_empty() && all.iter().all(is_foreign), PathReason::Family),
    ];
    first.iter().find(|(applies, _)| *applies).map_or(PathReason::Possible, |(_, reason)| *reason)
}

/// Whether it would be the consumer itself.
fn is_own(endpoint: &Endpoint) -> bool {
    let ip = endpoint.0.ip().to_canonical();
    ip.is_loopback() || ip.is_unspecified()
}

fn is_ipv4(endpoint: &Endpoint) -> bool {
    endpoint.0.ip().to_canonical().is_ipv4()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoints(list: &[&str]) -> Vec<Endpoint> {
        list.iter().map(|one| Endpoint(one.parse().unwrap())).collect()
    }

    fn facts(endpoints: &[Endpoint]) -> Facts<'_> {
        Facts {
            default: PathChoice::Kernel,
            is_available: true,
            is_container: true,
            can_reset: false,
            is_limited: false,
            is_ipv4: true,
            endpoints,
        }
    }

    fn of(descriptor: &str, facts: Facts<'_>) -> PathReason {
        decide(&descriptor.parse().unwrap(), facts)
    }

    #[test]
    fn each_line_of_the_rule_decides_alone() {
        let good = endpoints(&["10.0.0.1:80", "10.0.0.2:80"]);
        let good = facts(&good);
        assert_eq!(of("web;80", good), PathReason::Possible);
        assert_eq!(of("web;80;lb=leastconn;check=tcp;drain=keep", good), PathReason::Possible);
        for (descriptor, reason) in [
            ("web;80;path=proxy", PathReason::NotAsked),
            ("web;80;proxy=v2", PathReason::Header),
            ("web;80;user-timeout=30", PathReason::UserTimeout),
            ("web;80;drain=kill", PathReason::Drain),
            ("web;80;drain=5", PathReason::Drain),
        ] {
            assert_eq!(of(descriptor, good), reason, "{descriptor}");
        }
        let able = Facts { can_reset: true, ..good };
        assert_eq!(of("web;80;drain=kill", able), PathReason::Possible);
        assert_eq!(of("web;80;drain=5;proxy=v1", able), PathReason::Header);
        let unasked = Facts { default: PathChoice::Proxy, ..good };
        assert_eq!(of("web;80", unasked), PathReason::NotAsked);
        assert_eq!(of("web;80;path=kernel", unasked), PathReason::Possible);
        assert_eq!(of("web;80;path=auto", unasked), PathReason::Possible);
        for (facts, reason) in [
            (Facts { is_available: false, ..good }, PathReason::Unavailable),
            (Facts { is_container: false, ..good }, PathReason::NoContainer),
            (Facts { is_limited: true, ..good }, PathReason::Limit),
            (Facts { is_ipv4: false, ..good }, PathReason::Family),
            (Facts { endpoints: &[], ..good }, PathReason::NoEndpoint),
            (
                Facts { endpoints: &endpoints(&["10.0.0.1:80"; 65]), ..good },
                PathReason::TooManyEndpoints,
            ),
            (
                Facts { endpoints: &endpoints(&["10.0.0.1:80", "127.9.9.9:80"]), ..good },
                PathReason::Loopback,
            ),
            (Facts { endpoints: &endpoints(&["[::1]:80"]), ..good }, PathReason::Loopback),
            (
                Facts { endpoints: &endpoints(&["[::ffff:127.0.0.1]:80"]), ..good },
                PathReason::Loopback,
            ),
            (
                Facts { endpoints: &endpoints(&["10.0.0.1:80", "[fd00::1]:80"]), ..good },
                PathReason::Family,
            ),
        ] {
            assert_eq!(of("web;80", facts), reason);
        }
        assert_eq!(
            of("web;80", Facts { endpoints: &endpoints(&["10.0.0.1:80"; 64]), ..good }),
            PathReason::Possible
        );
    }

    const GOOD: Candidate = Candidate { is_proved: true, reach: EndpointReach::Reached };

    #[test]
    fn each_line_of_auto_decides_alone_and_one_endpoint_is_enough() {
        assert_eq!(caution(&[GOOD, GOOD]), PathReason::Proved);
        for (reach, reason) in [
            (EndpointReach::Isolated, PathReason::Isolated),
            (EndpointReach::Untried, PathReason::Untried),
            (EndpointReach::Failed, PathReason::NotReached),
            (EndpointReach::Trying, PathReason::Trying),
        ] {
            let bad = Candidate { reach, ..GOOD };
            assert_eq!(caution(&[GOOD, bad, GOOD]), reason);
            // What can be proved by a connection is said last.
            assert_eq!(caution(&[Candidate { is_proved: false, ..bad }]), reason);
        }
        let unproved = Candidate { is_proved: false, ..GOOD };
        assert_eq!(caution(&[GOOD, unproved]), PathReason::Unproved);
    }

    #[test]
    fn an_endpoint_is_near_in_a_shared_network_alone() {
        let consumer = |sources: &[&str]| Consumer {
            id: crate::model::ConsumerId::Local,
            name: "app".into(),
            namespace: "app".into(),
            sources: sources.iter().map(|one| one.parse().unwrap()).collect(),
            arrivals: Vec::new(),
            gateways: vec!["172.17.0.1".parse().unwrap()],
            bindings: Vec::new(),
            ends: Vec::new(),
        };
        let nets = |all: &[&str]| all.iter().map(|one| one.parse().unwrap()).collect();
        let networks: BTreeSet<IpNet> =
            nets(&["172.17.0.0/16", "172.18.0.0/16", "172.19.0.0/16", "fd00::/64"]);
        let apart = nets(&["172.19.0.0/16"]);
        let app = consumer(&["172.17.0.2", "172.19.0.2", "fd00::2"]);
        for (endpoint, expected) in [
            ("172.17.0.9:80", Nearness::Near),
            ("[::ffff:172.17.0.9]:80", Nearness::Near),
            ("[fd00::9]:80", Nearness::Near),
            ("172.18.0.9:80", Nearness::Isolated),
            ("172.19.0.9:80", Nearness::Beyond),
            ("172.17.0.1:80", Nearness::Beyond),
            ("10.0.0.1:80", Nearness::Beyond),
        ] {
            let endpoint = Endpoint(endpoint.parse().unwrap());
            assert_eq!(nearness(endpoint, &app, &networks, &apart), expected, "{endpoint}");
        }
        let none = nearness(endpoints(&["172.17.0.9:80"])[0], &app, &BTreeSet::new(), &apart);
        assert_eq!(none, Nearness::Beyond, "the engine's networks are not known");
    }

    #[test]
    fn routes_are_counted_by_reason() {
        let mut paths = Paths::new(PathChoice::Auto);
        let key = |n| RouteKey::tcp([10, 0, 0, n].into(), crate::model::Port::new(80).unwrap());
        for (n, reason) in
            [(1, PathReason::Proved), (2, PathReason::Unproved), (3, PathReason::Proved)]
        {
            assert!(paths.set(key(n), reason));
        }
        let udp = |n| RouteKey { protocol: Protocol::Udp, ..key(n) };
        paths.set(udp(1), PathReason::Possible);
        paths.set(udp(2), PathReason::Family);
        // One that the table does not have yet, or any more.
        paths.set(key(9), PathReason::Header);
        let keys = [key(1), key(2), key(3), key(4), udp(1), udp(2), udp(3)];
        let expected = [
            (Path::Kernel, [(PathReason::Proved, 2), (PathReason::Possible, 1)].into()),
            (Path::Proxy, [(PathReason::NotAsked, 1), (PathReason::Unproved, 1)].into()),
            (Path::None, [(PathReason::Family, 1), (PathReason::Pending, 1)].into()),
        ];
        assert_eq!(paths.counts(keys.iter()), expected.into());
    }

    #[test]
    fn udp_takes_the_kernel_path_or_none_whatever_the_default_is() {
        let good = endpoints(&["10.0.0.1:53", "10.0.0.2:53"]);
        let good = Facts { default: PathChoice::Proxy, ..facts(&good) };
        assert_eq!(of("dns;53/udp", good), PathReason::Possible);
        assert_eq!(of("dns;53", good), PathReason::NotAsked);
        // What only connections have a limit or a refusal for.
        assert_eq!(of("dns;53/udp", Facts { is_limited: true, ..good }), PathReason::Possible);
        assert_eq!(of("dns;53/udp", Facts { endpoints: &[], ..good }), PathReason::Possible);
        let mixed = endpoints(&["10.0.0.1:53", "[fd00::1]:53"]);
        for is_ipv4 in [true, false] {
            let facts = Facts { is_ipv4, endpoints: &mixed, ..good };
            assert_eq!(of("dns;53/udp", facts), PathReason::Possible);
        }
        for (facts, reason) in [
            (Facts { is_available: false, ..good }, PathReason::Unavailable),
            (Facts { is_container: false, ..good }, PathReason::NoContainer),
            (Facts { is_ipv4: false, ..good }, PathReason::Family),
            (
                Facts { endpoints: &endpoints(&["10.0.0.1:53"; 65]), ..good },
                PathReason::TooManyEndpoints,
            ),
            (
                Facts { endpoints: &endpoints(&["10.0.0.1:53", "127.0.0.1:53"]), ..good },
                PathReason::Loopback,
            ),
        ] {
            assert_eq!(of("dns;53/udp", facts), reason);
        }
        let (source, port) = ([10, 0, 0, 9].into(), crate::model::Port::new(53).unwrap());
        let tcp = RouteKey::tcp(source, port);
        let udp = RouteKey { protocol: Protocol::Udp, ..tcp };
        let mut paths = Paths::new(PathChoice::Proxy);
        assert_eq!((paths.of(&udp), paths.path(&udp)), (PathReason::Pending, Path::None));
        assert_eq!((paths.of(&tcp), paths.path(&tcp)), (PathReason::NotAsked, Path::Proxy));
        assert!(paths.set(udp, PathReason::Possible));
        assert_eq!((paths.path(&udp), paths.path(&tcp)), (Path::Kernel, Path::Proxy));
        assert!(paths.set(udp, PathReason::Full));
        assert_eq!(paths.path(&udp), Path::None);
        let paths = Paths::without_capture();
        assert_eq!((paths.of(&udp), paths.of(&tcp)), (PathReason::NoCapture, PathReason::NotAsked));
    }

    proptest! {
        #[test]
        fn auto_takes_the_kernel_path_only_if_every_endpoint_is_proved_and_reached(
            list in prop::collection::vec((any::<bool>(), 0..5_usize), 1..9),
        ) {
            const ALL: [EndpointReach; 5] =
                [EndpointReach::Reached, EndpointReach::Isolated, EndpointReach::Untried, EndpointReach::Trying, EndpointReach::Failed];
            let candidates: Vec<_> = list
                .iter()
                .map(|(is_proved, n)| Candidate { is_proved: *is_proved, reach: ALL[*n] })
                .collect();
            let reason = caution(&candidates);
            prop_assert_eq!(reason == PathReason::Proved, candidates.iter().all(|one| *one == GOOD));
            prop_assert_eq!(reason.path() == Path::Kernel, reason == PathReason::Proved);
            let are_reached = candidates.iter().all(|one| one.reach == EndpointReach::Reached);
            prop_assert_eq!(reason.has_entries(), are_reached, "else no word may let them pass");
        }

        /// Whatever else is so: what nobody asked for does not happen, and a loopback endpoint is never dialled by a consumer.
        #[test]
        fn nobody_gets_the_kernel_path_unasked_nor_its_own_loopback(
            default in prop::sample::select(PathChoice::ALL),
            path in prop::sample::select(vec!["", ";path=proxy", ";path=kernel", ";path=auto"]),
            option in prop::sample::select(vec!["", ";proxy=v1", ";drain=kill", ";drain=9", ";user-timeout=9", ";lb=leastconn"]),
            (is_available, is_container, can_reset, is_limited, is_ipv4) in any::<(bool, bool, bool, bool, bool)>(),
            list in prop::collection::vec(prop::sample::select(vec!["10.0.0.1:80", "127.0.0.1:80", "[::1]:80", "[fd00::1]:80"]), 0..70),
        ) {
            let list = endpoints(&list);
            let facts = Facts { default, is_available, is_container, can_reset, is_limited, is_ipv4, endpoints: &list };
            let reason = of(&format!("web;80{path}{option}"), facts);
            if reason.path() == Path::Kernel {
                let is_asked = matches!(path, ";path=kernel" | ";path=auto");
                prop_assert!(is_asked || path.is_empty() && default != PathChoice::Proxy);
                prop_assert!(is_available && is_container && !is_limited);
                prop_assert!(!list.is_empty() && list.len() <= MOST_ENDPOINTS);
                prop_assert!(list.iter().all(|one| !one.0.ip().is_loopback() && one.0.is_ipv4() == is_ipv4));
                let drains = matches!(option, ";drain=kill" | ";drain=9");
                prop_assert!(matches!(option, "" | ";lb=leastconn") || drains && can_reset);
            } else {
                prop_assert_ne!(reason, PathReason::Possible);
            }
        }
    }
}
