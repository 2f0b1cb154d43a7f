//! The two things that every new connection does with the table, and what a change of the table costs.
//!
//!     cargo bench --bench table

use std::{
    collections::BTreeSet,
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use divan::Bencher;
use embassy::{
    balance::{EndpointState, Rotation},
    consumer::{Binding, Consumer},
    cow_map::CowMap,
    descriptor::Balance,
    discovery::{CannotAsk, Endpoints, Query},
    model::{ConsumerId, ContainerId, Endpoint, Millis, Port},
    table::{Inputs, RouteKey, Table},
};

fn main() {
    divan::main();
}

/// Bindings of each consumer, where lookups are measured: many routes of few consumers.
const BINDINGS: usize = 50;

fn address(n: usize) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + u32::try_from(n).expect("a few thousand consumers")).into()
}

fn endpoint(service: usize, n: usize) -> Endpoint {
    let port = u16::try_from(1 + n).expect("few endpoints");
    Endpoint(SocketAddr::new(address(service), port))
}

fn query(binding: &Binding) -> Result<Query, CannotAsk> {
    Ok(Query {
        via: "consul".into(),
        service: binding.descriptor.service.clone(),
        tags: Default::default(),
        dc: None,
        port: None,
    })
}

/// Services of a host that has many routes: its containers ask for the same ones.
const SHARED: usize = 1_000;

/// What a table is made of.
struct World {
    consumers: Vec<Arc<Consumer>>,
    endpoints: CowMap<Query, Arc<Endpoints>>,
}

impl World {
    /// Each route has a service of its own.
    fn new(routes: usize, endpoints: usize) -> Self {
        Self::with_services(routes, routes, endpoints)
    }

    fn with_services(routes: usize, services: usize, endpoints: usize) -> Self {
        let bindings = BINDINGS.min(routes);
        Self::of_consumers(routes.div_ceil(bindings), bindings, services, endpoints)
    }

    /// A large host: 100,000 routes of 10,000 consumers, 100,000 endpoints of 10,000 services.
    fn large_host() -> Self {
        Self::of_consumers(10_000, 10, 10_000, 10)
    }

    fn of_consumers(consumers: usize, bindings: usize, services: usize, endpoints: usize) -> Self {
        let consumer = |c: usize| Consumer {
            id: ConsumerId::Container {
                id: ContainerId::new(&format!("{c:064x}")),
                started_at: "t0".into(),
            },
            name: format!("consumer-{c}").into(),
            namespace: format!("namespace-{c}").into(),
            sources: vec![address(c)],
            arrivals: Vec::new(),
            gateways: vec![],
            bindings: (0..bindings)
                .map(|b| Binding {
                    origin: format!("BACKEND_{b}").into(),
                    descriptor: format!("service-{};{}", (c * bindings + b) % services, 1_000 + b)
                        .parse()
                        .expect("it is right"),
                })
                .collect(),
            ends: vec![],
        };
        let consumers: Vec<_> = (0..consumers).map(consumer).map(Arc::new).collect();
        let bindings = consumers.iter().flat_map(|c| &c.bindings);
        let queries = bindings.take(services).filter_map(|b| query(b).ok());
        let answer = |service| Endpoints::new((0..endpoints).map(|n| endpoint(service, n)), vec![]);
        let endpoints =
            queries.enumerate().map(|(s, query)| (query, Arc::new(answer(s)))).collect();
        Self { consumers, endpoints }
    }

    fn table_after(&self, before: &Table) -> Table {
        let consumers: Vec<_> = self.consumers.iter().collect();
        let inputs = Inputs {
            consumers: &consumers,
            known: &Arc::default(),
            contested: &BTreeSet::new(),
            confirmed: 0,
            networks: &BTreeSet::new(),
            wiring: &Default::default(),
            endpoints: &self.endpoints,
            vips: &[],
            gateways_are_vips: false,
            balance: Balance::RoundRobin,
            bounds: &Default::default(),
            now: std::time::Instant::now(),
        };
        before.next(&inputs, query).expect("it differs")
    }

    /// One endpoint of one service goes away.
    fn change(&mut self) {
        let first = query(&self.consumers[0].bindings[0]).expect("it has a query");
        let endpoints = self.endpoints.get_mut(&first).expect("it was answered");
        let left = endpoints.list.iter().copied().skip(1);
        *endpoints = Arc::new(Endpoints::new(left, vec![]));
    }

    /// Keys of routes, in an order without pattern.
    fn keys(&self) -> Vec<RouteKey> {
        let of = |c: &Arc<Consumer>| {
            let source = c.sources[0];
            c.bindings
                .iter()
                .map(move |b| RouteKey::tcp(source, b.descriptor.port))
                .collect::<Vec<_>>()
        };
        let mut keys: Vec<_> = self.consumers.iter().flat_map(of).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut keys);
        keys
    }
}

/// Calls in a row that are measured together. So many that with 100,000 routes each one is met as often as another, with
/// caches and TLB as they are in the long run; one call alone would mostly measure how cold they are after the building.
const CALLS: u32 = 10_000;

#[divan::bench(args = [10, 1_000, 100_000], sample_size = CALLS)]
fn lookup(bencher: Bencher<'_, '_>, routes: usize) {
    let world = World::new(routes, 2);
    let table = world.table_after(&Table::default());
    let keys = world.keys();
    let mut next = keys.iter().cycle();
    bencher.bench_local(|| table.route(black_box(next.next()?)).cloned());
}

/// Each route has a service of its own: nothing is in a cache because of another route.
#[divan::bench(args = [10, 1_000, 100_000], sample_size = CALLS)]
fn lookup_and_pick(bencher: Bencher<'_, '_>, routes: usize) {
    looked_up_and_picked(bencher, &World::new(routes, 2));
}

/// The routes of 2,000 containers that ask for the same 1,000 services, of 10 endpoints each.
#[divan::bench(args = [100_000], sample_size = CALLS)]
fn lookup_and_pick_of_shared_services(bencher: Bencher<'_, '_>, routes: usize) {
    looked_up_and_picked(bencher, &World::with_services(routes, SHARED, 10));
}

fn looked_up_and_picked(bencher: Bencher<'_, '_>, world: &World) {
    let table = world.table_after(&Table::default());
    let keys = world.keys();
    let mut next = keys.iter().cycle();
    bencher.bench_local(|| {
        let route = table.route(black_box(next.next()?))?.clone();
        let upstream = table.upstream(&route.query)?;
        Some(upstream.rotation.pick(route.balance, Millis(1), &[])?.lease())
    });
}

#[divan::bench(args = [10, 1_000, 100_000], sample_size = CALLS)]
fn lookup_of_a_stranger(bencher: Bencher<'_, '_>, routes: usize) {
    let table = World::new(routes, 2).table_after(&Table::default());
    let key = RouteKey::tcp(Ipv4Addr::LOCALHOST.into(), Port::new(80).expect("not 0"));
    bencher.bench_local(|| table.route(black_box(&key)).is_some());
}

#[divan::bench(args = [2, 100, 10_000], consts = [false, true])]
fn pick<const LEAST: bool>(bencher: Bencher<'_, '_>, endpoints: usize) {
    let balance = if LEAST { Balance::LeastConnections } else { Balance::RoundRobin };
    let states = (0..endpoints).map(|n| Arc::new(EndpointState::new(endpoint(0, n))));
    let rotation = Rotation::new(states);
    bencher.bench_local(|| rotation.pick(black_box(balance), Millis(1), &[]).map(|s| s.lease()));
}

/// One endpoint of 10,000 goes away.
#[divan::bench]
fn a_large_service_changes(bencher: Bencher<'_, '_>) {
    let states: Vec<_> =
        (0..10_000).map(|n| Arc::new(EndpointState::new(endpoint(0, n)))).collect();
    let rotation = Rotation::new(states.iter().cloned());
    bencher.bench_local(|| rotation.succeed(states.iter().skip(1).cloned()));
}

/// The first table of a large host.
#[divan::bench(sample_count = 10)]
fn a_large_host_starts(bencher: Bencher<'_, '_>) {
    let world = World::large_host();
    bencher.bench_local(|| world.table_after(&Table::default()));
}

/// One endpoint of a large host goes away.
#[divan::bench(sample_count = 100)]
fn an_endpoint_of_a_large_host_changes(bencher: Bencher<'_, '_>) {
    let mut world = World::large_host();
    let before = world.table_after(&Table::default());
    world.change();
    bencher.bench_local(|| world.table_after(&before));
}

/// A consumer comes to a large host.
#[divan::bench(sample_count = 100)]
fn a_consumer_comes_to_a_large_host(bencher: Bencher<'_, '_>) {
    let mut world = World::large_host();
    let last = world.consumers.pop().expect("there are thousands");
    let before = world.table_after(&Table::default());
    // In the middle, as the provider sorts them by ID.
    world.consumers.insert(5_000, last);
    bencher.bench_local(|| world.table_after(&before));
}
