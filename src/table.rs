//! Builds the table of routes from bindings and endpoints. Pure. A table is built from the previous one, from which it
//! takes over counts and balancing positions. It never changes after it is published.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::{Arc, atomic::AtomicUsize},
    time::Instant,
};

use ipnet::IpNet;

use crate::{
    balance::{EndpointState, Rotation},
    consumer::{Binding, Consumer},
    counts::ConnectionCounts,
    cow_map::CowMap,
    descriptor::Balance,
    discovery::{Bounds, CannotAsk, Endpoints, NotAllowed, Query},
    model::{ConsumerId, Endpoint, Port, Protocol, RunEnd, ServiceName, Vip, port_of},
    wiring::{Arrival, Wiring},
};

mod build;
mod changes;
#[cfg(test)]
mod equivalence;
mod inherit;

pub use changes::Changes;

/// The facts of a captured connection: its source address, its original port and its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    pub source: IpAddr,
    pub port: Port,
    pub protocol: Protocol,
}

impl RouteKey {
    pub fn tcp(source: IpAddr, port: Port) -> Self {
        Self { source, port, protocol: Protocol::Tcp }
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.source, port_of(self.port, self.protocol))
    }
}

/// Identifies one owner's route as long as the owner asks for the same. Changed endpoints do not change it. Never reused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteNumber(u64);

/// The route of a consumer's connections on one port.
///
/// The fields that every new connection reads come first, next to the reference count, which it also changes.
#[derive(Debug)]
#[repr(C)]
pub struct Route {
    /// The key of its [upstream](Table::upstream). All routes with an equal query share this value.
    pub query: Arc<Query>,
    pub balance: Balance,
    /// When this owner got the route: an older connection may come from the address's former owner. `None` for routes of
    /// the first table, if no connection was captured before it.
    pub born: Option<Instant>,
    /// The counts of its connections, as long as the route continues.
    pub counts: Arc<ConnectionCounts>,
    /// The number of the consumer's open connections, over all its routes.
    pub live_of_consumer: Arc<AtomicUsize>,
    pub key: RouteKey,
    /// The interfaces on which connections from this source are accepted.
    pub arrival: Arrival,
    pub number: RouteNumber,
    /// The owner. A route belongs to one run of a container, never to an address.
    pub consumer: ConsumerId,
    pub consumer_name: Arc<str>,
    pub binding: Binding,
    /// The ends of the owner's run and of the run that owns its network.
    pub ends: Vec<RunEnd>,
}

impl Route {
    /// The query as the consumer wrote it.
    pub fn written_query(&self) -> Query {
        Query { tags: self.binding.descriptor.tags.clone(), ..Query::clone(&self.query) }
    }

    /// Whether `other` is the same route, perhaps with a changed consumer name.
    fn continues(&self, other: &Route) -> bool {
        self.number == other.number
    }
}

/// The answer to a query, with the state of its endpoints. All routes with an equal query share it.
///
/// A route refers to its query and does not contain the answer. So a changed answer changes one entry of a table, however
/// many routes refer to it.
#[derive(Debug)]
#[repr(C)]
pub struct Upstream {
    // First, for the same reason as in a route.
    pub rotation: Rotation,
    pub query: Arc<Query>,
    /// Whether discovery has answered. Before that, an empty list of endpoints means nothing.
    pub answered: bool,
    /// Endpoints of the answer that must not be used, and why. Sorted.
    pub refused: Vec<(Endpoint, NotAllowed)>,
}

/// Discovery, datacentre and service. An endpoint of a service has one state, whatever tags are asked for.
pub type ServiceKey = (Arc<str>, Option<Arc<str>>, ServiceName);

/// A binding that has no route, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unrouted {
    pub consumer: ConsumerId,
    pub consumer_name: Arc<str>,
    pub origin: Arc<str>,
    /// Needed because several bindings may have the same origin: those of `-services`.
    pub port: Port,
    pub protocol: Protocol,
    pub reason: UnroutedReason,
}

/// Why a binding has no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnroutedReason {
    #[error(transparent)]
    Discovery(#[from] CannotAsk),
    #[error("{key}: {winner} in the same network namespace already declares it")]
    Taken { key: RouteKey, winner: Arc<str> },
    #[error(
        "{key}: another container has the same address; nobody is served until it is clear whose it is"
    )]
    Contested { key: RouteKey },
}

impl UnroutedReason {
    /// What to do about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Discovery(error) => error.fix(),
            Self::Taken { .. } => "declare another port in one of the two",
            Self::Contested { .. } => {
                "remove one of the two containers; if one has ended already, docker ps -a shows when Docker has noticed it"
            }
        }
    }
}

/// The inputs from which the next table is built, besides the previous table.
///
/// The cost depends on what differs from the previous inputs: shared values are known to be equal.
#[derive(Debug)]
pub struct Inputs<'a> {
    pub consumers: &'a [&'a Arc<Consumer>],
    /// The addresses of all containers, including those without bindings.
    pub known: &'a Arc<BTreeSet<IpAddr>>,
    /// Addresses without an owner, because more than one container claims them.
    pub contested: &'a BTreeSet<IpAddr>,
    /// The networks in which an unknown container may have its address.
    pub networks: &'a BTreeSet<IpNet>,
    /// The number of doubts about the owner of an address that are resolved.
    pub confirmed: u64,
    /// How networks and addresses are connected to this host.
    pub wiring: &'a Arc<Wiring>,
    /// The endpoints of every query that was answered.
    pub endpoints: &'a CowMap<Query, Arc<Endpoints>>,
    /// The VIPs that do not depend on consumers: those the user named, else docker0's address.
    pub vips: &'a [Vip],
    /// Whether the gateways of the consumers' networks are VIPs too.
    pub gateways_are_vips: bool,
    /// The balance of bindings that set none.
    pub balance: Balance,
    /// The networks in which endpoints may be. Never changes.
    pub bounds: &'a Bounds,
    /// The time at which the table is built.
    pub now: Instant,
}

/// All data that the data path and the capture need.
#[derive(Debug, Default)]
pub struct Table {
    /// Counts published tables from 1; 0 is the empty table before the first.
    pub version: u64,
    /// The number of doubts about the owner of an address that are resolved
    /// ([`Lookup::is_in_doubt`](crate::docker::follow::Lookup::is_in_doubt)).
    pub confirmed: u64,
    routes: CowMap<RouteKey, Arc<Route>>,
    /// The addresses of all known containers.
    known: Arc<BTreeSet<IpAddr>>,
    networks: BTreeSet<IpNet>,
    wiring: Arc<Wiring>,
    vips: BTreeSet<Vip>,
    unrouted: Arc<BTreeMap<UnroutedKey, Unrouted>>,
    upstreams: CowMap<Arc<Query>, UpstreamInUse>,
    states: CowMap<(ServiceKey, Endpoint), EndpointInUse>,
    live: CowMap<ConsumerId, Arc<AtomicUsize>>,
    changes: Changes,
    /// Whether connections were captured before the first table.
    takes_over: bool,
    /// The number of route numbers in use so far.
    numbers: u64,
    built_from: BuiltFrom,
}

/// The inputs of a table, to be compared with those of the next one.
#[derive(Debug, Clone, Default)]
struct BuiltFrom {
    consumers: Arc<[Arc<Consumer>]>,
    /// The consumers that claim an address, in the order in which they win its ports.
    claims: CowMap<IpAddr, Vec<Arc<Consumer>>>,
    known: Arc<BTreeSet<IpAddr>>,
    contested: BTreeSet<IpAddr>,
    endpoints: CowMap<Query, Arc<Endpoints>>,
    vips: Vec<Vip>,
    gateways_are_vips: bool,
    balance: Balance,
}

/// An upstream, and the number of routes that refer to it. Never 0.
#[derive(Debug, Clone)]
struct UpstreamInUse {
    upstream: Arc<Upstream>,
    routes: usize,
}

/// An endpoint's state, and the number of upstreams that have it. Never 0.
#[derive(Debug, Clone)]
struct EndpointInUse {
    state: Arc<EndpointState>,
    upstreams: usize,
}

/// The consumer, the variable or label, its port, and the missing route, if it is about one.
type UnroutedKey = (ConsumerId, Arc<str>, (u16, Protocol), Option<RouteKey>);

impl Table {
    /// The empty table of a process that takes over from another one: connections were captured before its next table.
    pub fn of_successor() -> Self {
        Self { takes_over: true, ..Self::default() }
    }

    pub fn route(&self, key: &RouteKey) -> Option<&Arc<Route>> {
        self.routes.get(key)
    }

    pub fn routes(&self) -> impl ExactSizeIterator<Item = &Arc<Route>> {
        self.routes.values()
    }

    /// Whether the user set the VIPs. Otherwise only VIPs that exist on this host are in the table.
    pub fn has_named_vips(&self) -> bool {
        !self.built_from.gateways_are_vips
    }

    pub fn vips(&self) -> &BTreeSet<Vip> {
        &self.vips
    }

    /// The addresses of all known containers, including those without bindings.
    pub fn known(&self) -> &BTreeSet<IpAddr> {
        &self.known
    }

    /// The networks in which an unknown container may have its address.
    pub fn networks(&self) -> &BTreeSet<IpNet> {
        &self.networks
    }

    /// How networks and addresses are connected to this host.
    pub fn wiring(&self) -> &Arc<Wiring> {
        &self.wiring
    }

    /// Whether this may be the address of an unknown container.
    pub fn may_become_known(&self, source: &IpAddr) -> bool {
        !self.known.contains(source) && self.networks.iter().any(|network| network.contains(source))
    }

    /// The differences from the table whose version is one less.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Bindings without a route, by consumer.
    pub fn unrouted(&self) -> impl ExactSizeIterator<Item = &Unrouted> {
        self.unrouted.values()
    }

    /// The consumer that owns a route. Always `Some` for the routes of this table.
    pub fn owner(&self, route: &Route) -> Option<&Arc<Consumer>> {
        let claims = self.built_from.claims.get(&route.key.source)?;
        claims.iter().find(|consumer| consumer.id == route.consumer)
    }

    /// The answer to a query. Always `Some` for the queries of this table's routes.
    pub fn upstream(&self, query: &Query) -> Option<&Arc<Upstream>> {
        self.upstreams.get(query).map(|in_use| &in_use.upstream)
    }

    /// The endpoints of a route in this table.
    pub fn endpoints_of(&self, route: &Route) -> &[Arc<EndpointState>] {
        self.upstream(&route.query).map_or(&[], |upstream| upstream.rotation.endpoints())
    }

    pub fn upstreams(&self) -> impl ExactSizeIterator<Item = &Arc<Upstream>> {
        self.upstreams.values().map(|in_use| &in_use.upstream)
    }

    /// Every endpoint of every service that a route goes to.
    pub fn endpoints(&self) -> impl ExactSizeIterator<Item = (&ServiceKey, &Arc<EndpointState>)> {
        self.states.iter().map(|((service, _), shared)| (service, &shared.state))
    }

    /// Whether a connection opened by `route` is still valid. Changed endpoints do not matter. A changed owner or service
    /// does.
    pub fn has(&self, route: &Route) -> bool {
        self.routes.get(&route.key).is_some_and(|now| now.continues(route))
    }

    /// The next table. `query` returns the query of a binding; it must return equal queries for equal bindings. `None` if
    /// nothing differs.
    pub fn next(
        &self,
        inputs: &Inputs<'_>,
        query: impl Fn(&Binding) -> Result<Query, CannotAsk>,
    ) -> Option<Table> {
        build::next(self, inputs, query)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::model::{ContainerId, Millis};

    fn consumer(name: &str, address: &str, bindings: &[&str]) -> Consumer {
        let binding = |text: &&str| Binding {
            origin: format!("BACKEND_{text}").into(),
            descriptor: text.parse().unwrap(),
        };
        Consumer {
            id: ConsumerId::Container {
                id: ContainerId::new(&format!("id-of-{name}")),
                started_at: "t0".into(),
            },
            name: name.into(),
            namespace: name.into(),
            sources: vec![address.parse().unwrap()],
            arrivals: Vec::new(),
            gateways: vec!["172.17.0.1".parse().unwrap()],
            bindings: bindings.iter().map(binding).collect(),
            ends: vec![],
        }
    }

    fn key(source: &str, port: u16) -> RouteKey {
        RouteKey::tcp(source.parse().unwrap(), Port::new(port).unwrap())
    }

    fn query(service: &str) -> Query {
        Query {
            via: "consul".into(),
            service: ServiceName::new(service).unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        }
    }

    fn answers(services: &[(&str, &[&str])]) -> CowMap<Query, Arc<Endpoints>> {
        let endpoints = |list: &[&str]| {
            Endpoints::new(list.iter().map(|e| Endpoint(e.parse().unwrap())), vec![])
        };
        services.iter().map(|(name, list)| (query(name), Arc::new(endpoints(list)))).collect()
    }

    fn next(
        prev: &Table,
        consumers: &[Consumer],
        endpoints: &CowMap<Query, Arc<Endpoints>>,
    ) -> Option<Table> {
        next_contested(prev, consumers, endpoints, &[])
    }

    fn next_contested(
        prev: &Table,
        consumers: &[Consumer],
        endpoints: &CowMap<Query, Arc<Endpoints>>,
        contested: &[&str],
    ) -> Option<Table> {
        let contested = contested.iter().map(|address| address.parse().unwrap()).collect();
        let consumers: Vec<_> = consumers.iter().cloned().map(Arc::new).collect();
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &consumers.iter().collect::<Vec<_>>(),
            contested: &contested,
            known: &Arc::default(),
            confirmed: 0,
            networks: &BTreeSet::new(),
            wiring: &Default::default(),
            endpoints,
            vips: &[],
            gateways_are_vips: true,
            balance: Balance::RoundRobin,
            now: Instant::now(),
        };
        prev.next(&inputs, |binding| {
            let via = &binding.descriptor.via;
            match via {
                None => Ok(Query {
                    tags: binding.descriptor.tags.clone(),
                    ..query(binding.descriptor.service.as_str())
                }),
                Some(via) => {
                    Err(CannotAsk::Unknown { via: via.clone(), configured: "consul".into() })
                }
            }
        })
    }

    fn service<'a>(table: &'a Table, source: &str, port: u16) -> Option<&'a str> {
        table.route(&key(source, port)).map(|route| route.query.service.as_str())
    }

    #[test]
    fn ports_overlap_freely_between_consumers() {
        let consumers = [
            consumer("a", "172.17.0.2", &["redis;6379", "web;80"]),
            consumer("b", "172.17.0.3", &["valkey;6379"]),
        ];
        let table =
            next(&Table::default(), &consumers, &answers(&[("redis", &["10.0.0.1:1"])])).unwrap();
        assert_eq!(service(&table, "172.17.0.2", 6379), Some("redis"));
        assert_eq!(service(&table, "172.17.0.3", 6379), Some("valkey"));
        assert_eq!(service(&table, "172.17.0.2", 80), Some("web"));
        assert_eq!(service(&table, "172.17.0.3", 80), None);
        assert_eq!(
            table.vips().iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["172.17.0.1"]
        );
    }

    #[test]
    fn an_equal_table_is_not_published() {
        let consumers = [consumer("a", "172.17.0.2", &["redis;6379"])];
        let endpoints = answers(&[("redis", &["10.0.0.1:1"])]);
        let table = next(&Table::default(), &consumers, &endpoints).unwrap();
        assert_eq!(table.version, 1);
        assert!(next(&table, &consumers, &endpoints).is_none());
        assert_eq!(next(&Table::default(), &[], &CowMap::default()).map(|t| t.version), Some(1));
    }

    #[test]
    fn a_recycled_address_is_another_route() {
        let endpoints = answers(&[("redis", &["10.0.0.1:1"])]);
        let before =
            next(&Table::default(), &[consumer("a", "172.17.0.2", &["redis;6379"])], &endpoints)
                .unwrap();
        let route = before.route(&key("172.17.0.2", 6379)).unwrap().clone();

        let other_service =
            next(&before, &[consumer("b", "172.17.0.2", &["web;6379"])], &endpoints).unwrap();
        assert_eq!(service(&other_service, "172.17.0.2", 6379), Some("web"));
        assert!(!other_service.has(&route));

        let same_service =
            next(&before, &[consumer("b", "172.17.0.2", &["redis;6379"])], &endpoints).unwrap();
        assert!(!same_service.has(&route), "the connections of a belong to a, whatever b asks for");
    }

    #[test]
    fn a_route_is_as_old_as_its_owner_unless_it_was_there_from_the_start() {
        let a = consumer("a", "172.17.0.2", &["redis;6379"]);
        let b = consumer("b", "172.17.0.2", &["redis;6379"]);
        let born = |table: &Table| table.route(&key("172.17.0.2", 6379)).unwrap().born;
        let first = next(&Table::default(), std::slice::from_ref(&a), &answers(&[])).unwrap();
        assert_eq!(born(&first), None);
        let second = next(&first, std::slice::from_ref(&b), &answers(&[])).unwrap();
        assert!(born(&second).is_some());
        // Changed endpoints do not change its age.
        let endpoints = answers(&[("redis", &["10.0.0.1:1"])]);
        let third = next(&second, &[b], &endpoints).unwrap();
        assert_eq!(born(&third), born(&second));
        assert!(next(&third, &[a], &endpoints).is_some_and(|table| born(&table) > born(&third)));
    }

    #[test]
    fn a_first_table_is_young_where_connections_were_captured_before() {
        let a = consumer("a", "172.17.0.2", &["redis;6379"]);
        let first = next(&Table::of_successor(), std::slice::from_ref(&a), &answers(&[])).unwrap();
        assert!(first.route(&key("172.17.0.2", 6379)).unwrap().born.is_some());
    }

    #[test]
    fn counts_states_and_turns_are_inherited_by_the_same_routes_and_no_others() {
        let endpoints = answers(&[("redis", &["10.0.0.1:1", "10.0.0.2:1"])]);
        let consumers = [
            consumer("a", "172.17.0.2", &["redis;6379", "redis;80", "redis;6379/udp"]),
            consumer("b", "172.17.0.3", &["redis;6379"]),
        ];
        let before = next(&Table::default(), &consumers, &endpoints).unwrap();
        let route = |table: &Table, source, port| table.route(&key(source, port)).unwrap().clone();
        for one in before.routes() {
            one.counts.start();
        }
        let udp = RouteKey { protocol: Protocol::Udp, ..key("172.17.0.2", 6379) };
        before.route(&udp).unwrap().counts.datagrams(3, 4);
        let query = route(&before, "172.17.0.2", 6379).query.clone();
        let upstream = before.upstream(&query).unwrap();
        let picked = upstream.rotation.pick(Balance::RoundRobin, Millis(5), &[]).unwrap();
        picked.failed(Millis(5), Millis(5)).unwrap();
        picked.counts.start();
        picked.counts.connect.observe(std::time::Duration::ZERO);
        let turn = upstream.rotation.turn();

        // The second container has a new run, and a binding has changed.
        let mut later = consumers;
        later[1].id =
            ConsumerId::Container { id: ContainerId::new("id-of-b"), started_at: "t1".into() };
        later[0].bindings[1].descriptor = "redis;80;lb=leastconn".parse().unwrap();
        let after = next(&Table::of_successor(), &later, &endpoints).unwrap();
        before
            .figures(Millis(10), Instant::now())
            .for_each(|figures| after.inherit(&figures, Millis(1)));
        let started = |source, port| {
            let route = route(&after, source, port);
            route.counts.started.load(std::sync::atomic::Ordering::Relaxed)
        };
        assert_eq!(started("172.17.0.2", 6379), 1);
        assert_eq!((started("172.17.0.2", 80), started("172.17.0.3", 6379)), (0, 0));
        let of_udp = after.route(&udp).unwrap().counts.totals();
        assert_eq!((of_udp.started, of_udp.datagrams), (1, [3, 4]));
        assert_eq!(route(&after, "172.17.0.2", 6379).counts.totals().datagrams, [0, 0]);
        let upstream = after.upstream(&query).unwrap();
        assert_eq!(upstream.rotation.turn(), turn);
        let state = after.state(&upstream.query, picked.endpoint).unwrap();
        assert_eq!((state.opened(), state.failures(), state.ejections()), (1, 1, 1));
        assert_eq!(state.ejected_for(Millis(1)), picked.ejected_for(Millis(10)));
    }

    #[test]
    fn a_restarted_container_is_another_consumer() {
        let endpoints = answers(&[]);
        let first = consumer("a", "172.17.0.2", &["redis;6379"]);
        let before = next(&Table::default(), std::slice::from_ref(&first), &endpoints).unwrap();
        let ConsumerId::Container { id, .. } = first.id.clone() else { unreachable!() };
        let again = Consumer { id: ConsumerId::Container { id, started_at: "t1".into() }, ..first };
        let after = next(&before, &[again], &endpoints).unwrap();
        assert!(!after.has(before.route(&key("172.17.0.2", 6379)).unwrap()));
    }

    #[test]
    fn two_owners_of_one_address_are_both_not_served() {
        let consumers = [
            consumer("a", "172.17.0.2", &["redis;6379", "web;80"]),
            consumer("b", "172.17.0.2", &["mysql;6379"]),
            consumer("c", "172.17.0.2", &["etcd;6379"]),
        ];
        let table = next(&Table::default(), &consumers, &answers(&[])).unwrap();
        assert_eq!(service(&table, "172.17.0.2", 6379), None);
        // No other consumer declares this port, but another container may connect to it.
        assert_eq!(service(&table, "172.17.0.2", 80), None);
        assert_eq!(table.unrouted().len(), 4);
        assert!(table.unrouted().all(|u| matches!(u.reason, UnroutedReason::Contested { .. })));
    }

    #[test]
    fn a_contested_address_has_no_route_at_all() {
        let consumers = [
            consumer("a", "172.17.0.2", &["redis;6379"]),
            consumer("b", "172.17.0.3", &["web;80"]),
        ];
        let table =
            next_contested(&Table::default(), &consumers, &answers(&[]), &["172.17.0.2"]).unwrap();
        assert_eq!(service(&table, "172.17.0.2", 6379), None);
        assert_eq!(service(&table, "172.17.0.3", 80), Some("web"));
        let known: Vec<_> = table.known().iter().map(ToString::to_string).collect();
        assert_eq!(known, ["172.17.0.3"], "a connection from the other one may wait");
        assert!(matches!(
            table.unrouted().next().unwrap().reason,
            UnroutedReason::Contested { .. }
        ));
    }

    #[test]
    fn in_a_shared_namespace_the_first_name_wins_a_port() {
        let sidecar = Consumer {
            namespace: "a".into(),
            ..consumer("b", "172.17.0.2", &["mysql;6379", "web;80"])
        };
        let consumers = [sidecar, consumer("a", "172.17.0.2", &["redis;6379"])];
        let table = next(&Table::default(), &consumers, &answers(&[])).unwrap();
        assert_eq!(service(&table, "172.17.0.2", 6379), Some("redis"));
        assert_eq!(service(&table, "172.17.0.2", 80), Some("web"));
        let all: Vec<_> = table.unrouted().collect();
        let [unrouted] = all[..] else { panic!("{all:?}") };
        assert_eq!(
            unrouted.reason.to_string(),
            "172.17.0.2 port 6379: a in the same network namespace already declares it"
        );
    }

    #[test]
    fn a_binding_of_an_unknown_discovery_is_reported_and_the_others_work() {
        let consumers = [consumer("a", "172.17.0.2", &["redis;6379;via=zookeeper", "web;80"])];
        let table = next(&Table::default(), &consumers, &answers(&[])).unwrap();
        assert_eq!(table.routes().len(), 1);
        assert_eq!(
            table.unrouted().next().unwrap().reason.to_string(),
            "via=\"zookeeper\": expected one of the configured discoveries: consul"
        );
    }

    #[test]
    fn an_endpoint_keeps_its_counts_across_tables_and_shares_them_between_routes() {
        let consumers = [
            consumer("a", "172.17.0.2", &["redis;6379", "redis[eu];6380"]),
            consumer("b", "172.17.0.3", &["redis;1234"]),
        ];
        let mut endpoints = answers(&[("redis", &["10.0.0.1:1", "10.0.0.2:1"])]);
        let tagged = Query { tags: crate::model::Tags::new(["eu"]), ..query("redis") };
        endpoints.insert(
            tagged,
            Arc::new(Endpoints::new([Endpoint("10.0.0.1:1".parse().unwrap())], vec![])),
        );
        let before = next(&Table::default(), &consumers, &endpoints).unwrap();
        let rotation = |table: &Table, source, port| {
            let route = table.route(&key(source, port)).unwrap();
            table.upstream(&route.query).unwrap().clone()
        };
        let lease = rotation(&before, "172.17.0.2", 6380).rotation.endpoints()[0].lease();
        let active = |table: &Table, source, port| {
            let upstream = rotation(table, source, port);
            upstream
                .rotation
                .endpoints()
                .iter()
                .map(|s| (s.endpoint.to_string(), s.active()))
                .collect::<HashMap<_, _>>()
        };
        assert_eq!(active(&before, "172.17.0.3", 1234)["10.0.0.1:1"], 1);

        endpoints.insert(
            query("redis"),
            answers(&[("redis", &["10.0.0.1:1", "10.0.0.3:1"])])
                .get(&query("redis"))
                .unwrap()
                .clone(),
        );
        let after = next(&before, &consumers, &endpoints).unwrap();
        assert_eq!(active(&after, "172.17.0.3", 1234)["10.0.0.1:1"], 1);
        assert!(
            after.has(before.route(&key("172.17.0.3", 1234)).unwrap()),
            "other endpoints, but the same route"
        );
        drop(lease);
        assert_eq!(active(&after, "172.17.0.3", 1234)["10.0.0.1:1"], 0);
        let pick = |table: &Table| {
            let upstream = rotation(table, "172.17.0.3", 1234);
            upstream.rotation.pick(Balance::RoundRobin, Millis(0), &[]).map(|state| state.endpoint)
        };
        assert_eq!(pick(&after), Some(Endpoint("10.0.0.1:1".parse().unwrap())));
    }

    #[test]
    fn for_the_local_consumer_the_vips_are_sources_too() {
        let local =
            Consumer { id: ConsumerId::Local, ..consumer("local", "127.0.0.1", &["redis;6379"]) };
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &[&Arc::new(local)],
            contested: &BTreeSet::new(),
            known: &Arc::default(),
            confirmed: 0,
            networks: &BTreeSet::new(),
            wiring: &Default::default(),
            endpoints: &CowMap::default(),
            vips: &[Vip("172.17.0.1".parse().unwrap()), Vip("127.0.0.1".parse().unwrap())],
            gateways_are_vips: false,
            balance: Balance::RoundRobin,
            now: Instant::now(),
        };
        let table = Table::default().next(&inputs, |_| Ok(query("redis"))).unwrap();
        assert_eq!(service(&table, "172.17.0.1", 6379), Some("redis"));
        assert_eq!(service(&table, "127.0.0.1", 6379), Some("redis"));
        assert_eq!(table.unrouted().len(), 0);
    }
}
