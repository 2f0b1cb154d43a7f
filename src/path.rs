//! Which path a route's connections take, and why. Pure.
//!
//! On the *proxy path* a NAT rule captures a connection, and the proxy carries its bytes. On the *kernel path* the VIP becomes an
//! endpoint inside the consumer's `connect()`, and embassy sees none of its bytes.

use crate::{
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
        /// The binding has drain=kill or a drain time: embassy can reset only the proxy's connections.
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
        /// The control group of the consumer's container was not found.
        NoIdentity = "no_identity",
        /// No VIP is of the family (IPv4 or IPv6) of the consumer's address.
        NoVip = "no_vip",
        /// The kernel's tables are full.
        Full = "full",
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
            Self::Possible => Path::Kernel,
            _ => Path::Proxy,
        }
    }

    /// The reason as one line.
    pub fn line(self) -> &'static str {
        crate::word::Word::meaning(self)
    }
}

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

/// The path as far as it does not depend on the host at the moment: what is left is `NoIdentity`, `NoVip` and `Full`.
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
        (descriptor.drain != EndpointDrain::Keep, PathReason::Drain),
        (facts.is_limited, PathReason::Limit),
        (facts.endpoints.is_empty(), PathReason::NoEndpoint),
        (facts.endpoints.len() > MOST_ENDPOINTS, PathReason::TooManyEndpoints),
        (facts.endpoints.iter().any(is_own), PathReason::Loopback),
        (facts.endpoints.iter().any(|one| is_ipv4(one) != facts.is_ipv4), PathReason::Family),
    ];
    first.iter().find(|(applies, _)| *applies).map_or(PathReason::Possible, |(_, reason)| *reason)
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
        let unasked = Facts { default: PathChoice::Proxy, ..good };
        assert_eq!(of("web;80", unasked), PathReason::NotAsked);
        assert_eq!(of("web;80;path=kernel", unasked), PathReason::Possible);
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
        /// Whatever else is so: what nobody asked for does not happen, and a loopback endpoint is never dialled by a consumer.
        #[test]
        fn nobody_gets_the_kernel_path_unasked_nor_its_own_loopback(
            default in prop::sample::select(PathChoice::ALL),
            path in prop::sample::select(vec!["", ";path=proxy", ";path=kernel"]),
            option in prop::sample::select(vec!["", ";proxy=v1", ";drain=kill", ";drain=9", ";user-timeout=9", ";lb=leastconn"]),
            (is_available, is_container, is_limited, is_ipv4) in any::<(bool, bool, bool, bool)>(),
            list in prop::collection::vec(prop::sample::select(vec!["10.0.0.1:80", "127.0.0.1:80", "[::1]:80", "[fd00::1]:80"]), 0..70),
        ) {
            let list = endpoints(&list);
            let facts = Facts { default, is_available, is_container, is_limited, is_ipv4, endpoints: &list };
            let reason = of(&format!("web;80{path}{option}"), facts);
            if reason.path() == Path::Kernel {
                prop_assert!(path == ";path=kernel" || path.is_empty() && default == PathChoice::Kernel);
                prop_assert!(is_available && is_container && !is_limited);
                prop_assert!(!list.is_empty() && list.len() <= MOST_ENDPOINTS);
                prop_assert!(list.iter().all(|one| !one.0.ip().is_loopback() && one.0.is_ipv4() == is_ipv4));
                prop_assert!(matches!(option, "" | ";lb=leastconn"));
            } else {
                prop_assert_ne!(reason, PathReason::Possible);
            }
        }
    }
}
