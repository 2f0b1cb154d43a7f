//! More workers than this machine may have processors: the data path within the test's process, in its own network
//! namespace.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use embassy::{
    config::{ConnectionLog, ConsumerLimit},
    consumer::{Binding, Consumer},
    cow_map::CowMap,
    descriptor::Balance,
    discovery::{Endpoints, Query},
    model::{ConsumerId, ContainerId, Endpoint, Vip},
    outcome::Outcome,
    proxy::{ConnectionState, Destinations, Proxy, ProxySettings},
    table::{Inputs, Table},
};
use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

use crate::WAIT;

const WORKERS: usize = 5;
const CONNECTIONS: usize = 200;
const APP: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
const VIP: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);
const PORT: u16 = 6379;

#[test]
fn five_workers_share_the_connections_and_each_ends_its_own() -> Result<()> {
    const INSIDE: &str = "EMBASSY_TEST_IN_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        return runtime.block_on(inside());
    }
    let name = "data_path::workers::five_workers_share_the_connections_and_each_ends_its_own";
    let mut own = Command::new("unshare");
    own.arg("--net").arg(std::env::current_exe()?).args([name, "--exact", "--nocapture"]);
    let said = testbed::output(own.env(INSIDE, "1"))?;
    ensure!(said.contains("1 passed"), "{said}");
    Ok(())
}

async fn inside() -> Result<()> {
    for words in
        ["link set lo up", "addr add 172.17.0.1/32 dev lo", "addr add 172.17.0.2/32 dev lo"]
    {
        testbed::output(Command::new("ip").args(words.split(' ')))?;
    }
    let endpoint = echo()?;
    let (tables, receiver) = watch::channel(Arc::new(table(&Table::default(), Some(endpoint))?));
    let proxy = Proxy::start(settings(), &receiver)?;
    let port = proxy.addresses.first().context("a listener")?.port();
    let rule = format!(
        "add table ip t; add chain ip t o {{ type nat hook output priority -100; }}; \
         add rule ip t o ip daddr {VIP} tcp dport {PORT} redirect to :{port}"
    );
    testbed::output(Command::new("nft").arg(rule))?;

    // One after the other, because the endpoint's queue is short.
    let mut clients = Vec::new();
    for n in 0..CONNECTIONS as u32 {
        let mut client = dial()?;
        client.write_all(&n.to_be_bytes())?;
        let mut answer = [0; 4];
        client.read_exact(&mut answer)?;
        assert_eq!(answer, n.to_be_bytes());
        clients.push(client);
    }
    // A worker that is busy for a second is not waited for.
    let (figures, deadline) = (proxy.figures(), Instant::now() + WAIT);
    let mut live = figures.connections().await;
    while live.len() < CONNECTIONS && Instant::now() < deadline {
        live = figures.connections().await;
    }
    assert_eq!((live.len(), figures.live()), (CONNECTIONS, CONNECTIONS));
    let open = [ConnectionState::Running, ConnectionState::Parked];
    assert!(live.iter().all(|one| open.contains(&one.state)), "{live:?}");
    // Workers are chosen by a hash. With so many connections, no worker has none.
    let workers: BTreeSet<_> = live.iter().map(|one| one.id.0).collect();
    assert_eq!(workers.len(), WORKERS);
    let all = 4 * CONNECTIONS as u64;
    while figures.bytes() != (all, all) && Instant::now() < deadline {
        figures.refresh().await;
    }
    assert_eq!(figures.bytes(), (all, all));

    let before = tables.borrow().clone();
    tables.send_replace(Arc::new(table(&before, None)?));
    for client in &mut clients {
        let error = client.read(&mut [0]).err().context("not reset")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    // The client may see the end before it is counted.
    let deadline = Instant::now() + WAIT;
    while figures.live() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(figures.ended(Outcome::RouteGone), CONNECTIONS as u64);
    assert_eq!(figures.live(), 0);
    proxy.end().await?;
    Ok(())
}

/// Connects from the app to the VIP.
fn dial() -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((APP, 0)).into())?;
    socket.connect(&SocketAddr::from((VIP, PORT)).into())?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(WAIT))?;
    Ok(stream)
}

/// A server that sends back what it receives.
fn echo() -> Result<Endpoint> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let endpoint = Endpoint(listener.local_addr()?);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = [0; 4];
                while stream.read_exact(&mut bytes).is_ok() && stream.write_all(&bytes).is_ok() {}
            });
        }
    });
    Ok(endpoint)
}

/// A table with the app and this endpoint, or with neither.
fn table(before: &Table, endpoint: Option<Endpoint>) -> Result<Table> {
    let binding =
        Binding { origin: "BACKEND_A".into(), descriptor: format!("redis;{PORT}").parse()? };
    let query = |binding: &Binding| Query {
        via: "file".into(),
        service: binding.descriptor.service.clone(),
        tags: Default::default(),
        dc: None,
        port: None,
    };
    let mut endpoints = CowMap::default();
    endpoints.insert(query(&binding), Arc::new(Endpoints::new(endpoint, vec![])));
    let app = Arc::new(Consumer {
        id: ConsumerId::Container { id: ContainerId::new("app"), started_at: "t".into() },
        name: "app".into(),
        namespace: "app".into(),
        sources: vec![APP.into()],
        arrivals: Vec::new(),
        gateways: vec![],
        bindings: vec![binding],
        ends: vec![],
    });
    let consumers: Vec<_> = endpoint.iter().map(|_| &app).collect();
    let inputs = Inputs {
        bounds: &embassy::discovery::Bounds::default(),
        consumers: &consumers,
        contested: &Default::default(),
        known: &Default::default(),
        confirmed: 0,
        networks: &Default::default(),
        wiring: &Default::default(),
        endpoints: &endpoints,
        vips: &[Vip(VIP.into())],
        gateways_are_vips: false,
        balance: Balance::RoundRobin,
        now: Instant::now(),
    };
    before.next(&inputs, |binding| Ok(query(binding))).context("nothing differs")
}

fn settings() -> ProxySettings {
    ProxySettings {
        port: None,
        workers: WORKERS,
        destinations: Destinations::VipsAnd(vec![]),
        max_connections: 10_000,
        memory_short: Default::default(),
        max_connections_per_consumer: ConsumerLimit::NONE,
        mark: None,
        user_timeout: Duration::ZERO,
        failed_checks: Default::default(),
        splice: true,
        connect: ProxySettings::CONNECT,
        hold: Duration::ZERO,
        lookup: Default::default(),
        log: ConnectionLog::Off,
        events: Default::default(),
    }
}
