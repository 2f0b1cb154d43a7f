//! Measures how long a worker with thousands of connections is blocked: the longest time that a ready task has to wait.
//!
//!     cargo test --release --lib standstill -- --ignored --nocapture
//!
//! On a machine with other work, put `chrt -f 10` before it, because wall time is measured.

use std::{
    cell::Cell,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    runtime::LocalOptions,
    sync::watch,
    task::{spawn_local, yield_now},
};

use super::{
    connections::State,
    shared::Shared,
    socket::Socket,
    testing::{captured, consumer, route, settings, table_after},
    worker::Worker,
};
use crate::{consumer::Consumer, model::Endpoint, outcome::Outcome, table::Table};

const LIVE: usize = 9_000;
const CONSUMERS: usize = 90;
const PORT: u16 = 80;
/// The variable with the address to which the process with the other ends connects.
const PEERS: &str = "EMBASSY_STANDSTILL_PEERS";

#[test]
#[ignore = "a measurement"]
fn standstill() {
    if let Ok(address) = std::env::var(PEERS) {
        return peers(address.parse().unwrap());
    }
    for (drain, parked) in [("keep", false), ("keep", true), ("kill", false), ("kill", true)] {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(measure(drain, parked));
    }
}

/// The other ends of all connections, in another process, because the descriptors of one process are not enough.
fn peers(proxy: SocketAddr) {
    let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    println!("port {}", listener.local_addr().unwrap().port());
    std::io::stdout().flush().unwrap();
    let accepting = std::thread::spawn(move || -> Vec<_> {
        (0..LIVE).map(|_| listener.accept().unwrap().0).collect()
    });
    let dialled: Vec<_> = (0..LIVE).map(|_| std::net::TcpStream::connect(proxy).unwrap()).collect();
    let accepted = accepting.join().unwrap();
    // Until the measuring process ends, or needs no more.
    let _ = std::io::stdin().read_line(&mut String::new());
    drop((dialled, accepted));
    std::process::exit(0);
}

struct Measured {
    worker: Rc<Worker>,
    tables: watch::Sender<Arc<Table>>,
    consumers: Vec<Arc<Consumer>>,
    endpoints: Vec<Endpoint>,
    longest: Rc<Cell<Duration>>,
    what: String,
}

async fn measure(drain: &str, parked: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (peers, port) = start_peers(listener.local_addr().unwrap());
    let what = format!("drain={drain}, {}", if parked { "parked" } else { "running" });
    let measured = Measured::new(drain, port, what);
    measured.open(listener).await;
    if parked {
        spawn_local(measured.worker.clone().park_idle());
        let all_parked = || {
            let all = measured.worker.connections.borrow();
            all.iter().all(|(_, one)| matches!(one.state, State::Parked(_)))
        };
        measured.during("all are parked", all_parked).await;
    }
    measured.changes().await;
    drop(peers);
}

impl Measured {
    fn new(drain: &str, port: u16, what: String) -> Self {
        let descriptor = format!("web;{PORT};drain={drain}");
        let one = |n| consumer(&format!("c{n}"), source(n), &descriptor);
        let consumers: Vec<_> = (0..CONSUMERS).map(one).collect();
        let endpoints: Vec<_> = [1, 2].map(|n| Endpoint(([127, 0, 0, n], port).into())).into();
        let table = Arc::new(table_after(&Table::default(), &consumers, &endpoints).unwrap());
        let worker = Worker::new(Arc::new(Shared::new(settings())), 0, table.clone()).unwrap();
        let (tables, follow) = watch::channel(table);
        spawn_local(worker.clone().follow(follow));
        spawn_local(worker.clone().resume_woken());
        let longest = Rc::<Cell<Duration>>::default();
        let measured = longest.clone();
        spawn_local(async move {
            loop {
                let start = Instant::now();
                yield_now().await;
                measured.set(measured.get().max(start.elapsed()));
            }
        });
        Self { worker, tables, consumers, endpoints, longest, what }
    }

    async fn open(&self, listener: TcpListener) {
        let table = self.worker.table.borrow().clone();
        for n in 0..LIVE {
            let (stream, _) = listener.accept().await.unwrap();
            let from = source(n % CONSUMERS);
            let (from_port, route) = (10_000 + n as u16 % 50_000, route(&table, from, PORT));
            let captured = captured((from, from_port).into(), ([172, 17, 0, 1], PORT).into());
            self.worker.let_in_to(Socket::new(stream), captured, route.unwrap());
            // No more at a time than the endpoints' queue takes.
            if n % 64 == 63 || n + 1 == LIVE {
                let connected = || self.worker.shared.counts[0].0.connect.read().count();
                while connected() <= n as u64 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
        assert_eq!(self.worker.shared.live.load(Relaxed), LIVE);
    }

    async fn changes(mut self) {
        let live = |worker: &Worker| worker.shared.live.load(Relaxed);
        let other = |n| consumer(&format!("other{n}"), [172, 18, 0, n].into(), "other;80");
        self.consumers.push(other(1));
        self.publish("a route comes", LIVE).await;
        self.endpoints.push(Endpoint(([127, 0, 0, 3], 1).into()));
        self.publish("an endpoint comes to every route", LIVE).await;
        self.endpoints.pop();
        self.publish("an endpoint without connections goes", LIVE).await;
        self.consumers.push(other(2));
        self.send();
        self.consumers.push(other(3));
        self.publish("two tables come at once", LIVE).await;
        self.consumers.remove(0);
        self.publish("a route goes", LIVE - LIVE / CONSUMERS).await;
        let before = live(&self.worker);
        self.endpoints.pop();
        let kills = self.what.contains("kill");
        let to_it = self.to(self.endpoints.len());
        let left = if kills { before - to_it } else { before };
        self.publish("an endpoint with connections goes", left).await;
        self.consumers.clear();
        self.publish("all routes go", 0).await;
        assert_eq!(self.worker.shared.tally.get(Outcome::EndpointGone), (before - left) as u64);
    }

    /// The number of connections to the endpoint with this number.
    fn to(&self, n: usize) -> usize {
        let is = |address: SocketAddr| address.ip() == IpAddr::from([127, 0, 0, n as u8 + 1]);
        let all = self.worker.connections.borrow();
        let records = all.iter().filter_map(|(_, one)| one.record());
        records.filter_map(|record| record.connected_to()).filter(|e| is(e.endpoint.0)).count()
    }

    fn send(&self) {
        let next = table_after(&self.tables.borrow(), &self.consumers, &self.endpoints);
        self.tables.send_replace(Arc::new(next.unwrap()));
    }

    /// Publishes a table, and measures until this many connections are left.
    async fn publish(&self, what: &str, left: usize) {
        self.send();
        self.during(what, || self.worker.shared.live.load(Relaxed) == left).await;
        assert_eq!(self.worker.shared.live.load(Relaxed), left, "{what}");
    }

    async fn during(&self, what: &str, done: impl Fn() -> bool) {
        // The preparation does not count.
        yield_now().await;
        yield_now().await;
        self.longest.set(Duration::ZERO);
        let start = Instant::now();
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let took = start.elapsed();
        // Work may continue without being visible.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let micros = |time: Duration| time.as_micros();
        println!(
            "{:<24} {what:<40} longest standstill {:>6} us, done after {:>7} us",
            self.what,
            micros(self.longest.get()),
            micros(took),
        );
    }
}

fn source(n: usize) -> IpAddr {
    [172, 17, 1, n as u8].into()
}

fn start_peers(proxy: SocketAddr) -> (Child, u16) {
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args(["proxy::standstill::standstill", "--exact", "--ignored", "--nocapture"]);
    own.env(PEERS, proxy.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = own.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port = lines.find_map(|line| line.unwrap().rsplit_once("port ")?.1.parse().ok());
    (child, port.unwrap())
}
