//! Helpers for the data path's unit tests.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::{TcpListener, TcpStream};

use super::{
    captured::{Captured, Destinations},
    settings::ProxySettings,
    shared::Shared,
};
use crate::{
    config::{ConnectionLog, ConsumerLimit},
    consumer::{Binding, Consumer},
    cow_map::CowMap,
    descriptor::Balance,
    discovery::{Endpoints, Query},
    model::{ConsumerId, ContainerId, Endpoint, OriginalDestination, Port, SourceAddress, Vip},
    table::{Inputs, Route, RouteKey, Table},
};

/// A container with this source address and descriptor.
pub(super) fn consumer(name: &str, source: IpAddr, descriptor: &str) -> Arc<Consumer> {
    let id = ConsumerId::Container { id: ContainerId::new(name), started_at: "t".into() };
    consumer_of(id, name, source, descriptor)
}

pub(super) fn consumer_of(
    id: ConsumerId,
    name: &str,
    source: IpAddr,
    descriptor: &str,
) -> Arc<Consumer> {
    Arc::new(Consumer {
        id,
        name: name.into(),
        namespace: name.into(),
        sources: vec![source],
        arrivals: Vec::new(),
        gateways: vec![],
        bindings: vec![Binding { origin: "B".into(), descriptor: descriptor.parse().unwrap() }],
        ends: vec![],
    })
}

/// The next table with these consumers. All of their services have these endpoints. `None` if nothing differs.
pub(super) fn table_after(
    before: &Table,
    consumers: &[Arc<Consumer>],
    endpoints: &[Endpoint],
) -> Option<Table> {
    let query = |binding: &Binding| Query {
        via: "consul".into(),
        service: binding.descriptor.service.clone(),
        tags: Default::default(),
        dc: None,
        port: None,
    };
    let answer = Arc::new(Endpoints::new(endpoints.iter().copied(), vec![]));
    let bindings = consumers.iter().flat_map(|consumer| &consumer.bindings);
    let mut answers = CowMap::default();
    bindings.for_each(|one| drop(answers.insert(query(one), answer.clone())));
    let inputs = Inputs {
        bounds: &crate::discovery::Bounds::default(),
        consumers: &consumers.iter().collect::<Vec<_>>(),
        contested: &Default::default(),
        known: &Arc::new(["172.17.0.4".parse().unwrap()].into()),
        confirmed: 0,
        networks: &["172.17.0.0/16".parse().unwrap()].into(),
        wiring: &Default::default(),
        endpoints: &answers,
        vips: &[Vip("172.17.0.1".parse().unwrap())],
        gateways_are_vips: false,
        balance: Balance::RoundRobin,
        now: Instant::now(),
    };
    before.next(&inputs, |binding| Ok(query(binding)))
}

/// One consumer with one route.
pub(crate) fn table() -> Table {
    table_of(ConsumerId::Local)
}

pub(super) fn table_of(id: ConsumerId) -> Table {
    let source = "172.17.0.2".parse().unwrap();
    table_after(&Table::default(), &[consumer_of(id, "a", source, "redis;6379")], &[]).unwrap()
}

/// The route of a source address and port.
pub(super) fn route(table: &Table, source: IpAddr, port: u16) -> Option<Arc<Route>> {
    table.route(&RouteKey::tcp(source, Port::new(port)?)).cloned()
}

/// A captured connection from `source` to `destination`.
pub(super) fn captured(source: SocketAddr, destination: SocketAddr) -> Captured {
    let (source, destination) = (SourceAddress(source), OriginalDestination(destination));
    Captured { source, destination, is_direct: false }
}

pub(super) fn settings() -> ProxySettings {
    ProxySettings {
        port: None,
        workers: 1,
        destinations: Destinations::Any,
        max_connections: 100_000,
        memory_short: Default::default(),
        max_connections_per_consumer: ConsumerLimit::NONE,
        mark: None,
        user_timeout: Duration::ZERO,
        failed_checks: Default::default(),
        splice: false,
        connect: ProxySettings::CONNECT,
        hold: Duration::ZERO,
        lookup: Default::default(),
        log: ConnectionLog::Off,
        events: Default::default(),
    }
}

/// The shared state of one worker, with these connection limits.
pub(super) fn shared(most: usize, of_consumer: usize) -> Shared {
    Shared::new(ProxySettings {
        max_connections: most,
        max_connections_per_consumer: ConsumerLimit::Most(of_consumer),
        ..settings()
    })
}

/// The two ends of a connection: the connecting one, and the accepting one.
pub(super) async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialled, listener.accept().await.unwrap().0)
}

/// Runs a test like a worker's thread.
pub(super) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let test = async { tokio::time::timeout(Duration::from_secs(60), test).await };
    let end = tokio::task::LocalSet::new().block_on(&runtime, test);
    end.expect("it does not hang");
}

/// Runs a test in a separate process, because it changes state of the whole process. `name` is the test's name.
pub(super) fn in_own_process(name: &str, test: impl FnOnce()) {
    alone(name, &[], test);
}

/// Runs a test in a separate process and network, which has only the loopback interface.
pub(crate) fn in_own_network(name: &str, test: impl FnOnce()) {
    let up = "ip link set lo up; exec \"$0\" \"$@\"";
    alone(name, &["unshare", "--net", "--", "sh", "-euc", up], test);
}

fn alone(name: &str, before: &[&str], test: impl FnOnce()) {
    const ALONE: &str = "EMBASSY_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let program = std::env::current_exe().unwrap();
    let mut words = before.iter().map(std::ffi::OsStr::new).chain([program.as_os_str()]);
    let mut own = std::process::Command::new(words.next().unwrap());
    own.args(words).args([name, "--exact", "--nocapture"]).env(ALONE, "1");
    let output = own.output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
