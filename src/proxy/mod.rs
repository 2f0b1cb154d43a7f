//! The data path: what was captured comes in, and is relayed to an endpoint of its route. It reads the table and waits
//! for nothing but its sockets and its timers.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use tokio::{runtime::LocalOptions, sync::watch};

use crate::{
    balance::Millis, config::ConnectionLog, counts::Distribution, events::Events, memory,
    model::Port, provider::Lookup, table::Table,
};

mod announce;
mod connection;
mod connection_log;
mod listener;
mod observed;
mod origin;
mod parking;
mod relay;
mod shared;
mod worker;

use crate::outcome::Outcome;
pub use connection::Destinations;
pub(crate) use connection::{dial, is_for_want_of_ours};
use observed::Ask;
pub use observed::LiveConnection;
use shared::Shared;

/// How the data path behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The one TCP port. `None`: the kernel chooses.
    pub port: Option<Port>,
    /// Threads.
    pub workers: usize,
    pub destinations: Destinations,
    /// Connections at a time; one more is reset.
    pub max_connections: usize,
    /// Whether memory is nearly used up: then there are only a few ([`FEW`](crate::limits::FEW)), and one more is reset.
    pub memory_short: Arc<memory::Short>,
    /// Connections at a time of one consumer; `None`: as many as there may be.
    pub max_connections_per_consumer: Option<usize>,
    /// The mark of our own connections to endpoints, where rules must tell them apart (man 7 socket, SO_MARK).
    pub mark: Option<u32>,
    /// Whether bulk moves by splice.
    pub splice: bool,
    /// How long a connection of a container that is not known yet may wait; 0: not at all.
    pub hold: Duration,
    /// Whom to ask about such a container.
    pub lookup: Lookup,
    /// Which connections are logged as they end.
    pub log: ConnectionLog,
    /// Where ejections are reported.
    pub events: Events,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Accepting and relaying.
    Serving,
    /// Relaying only.
    Draining,
    /// What is left is reset.
    Ended,
}

/// The running data path.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// Where each worker is asked what it has.
    asks: Vec<tokio::sync::mpsc::UnboundedSender<Ask>>,
    /// Closed when every worker has let go of its sender: when all have ended.
    workers: tokio::sync::mpsc::Receiver<()>,
    /// The addresses of its listeners.
    pub addresses: Vec<SocketAddr>,
}

impl Proxy {
    /// Opens the listeners and starts the workers. From now on connections are accepted.
    pub fn start(settings: Settings, tables: &watch::Receiver<Arc<Table>>) -> io::Result<Self> {
        let sets = listener::open(settings.port.map_or(0, Port::get), settings.workers.max(1))?;
        let addresses = match sets.first() {
            Some(set) => {
                set.iter().map(|listener| listener.local_addr()).collect::<io::Result<_>>()?
            }
            None => Vec::new(),
        };
        let (phase, phases) = watch::channel(Phase::Serving);
        let shared = Arc::new(Shared::new(settings));
        let (alive, workers) = tokio::sync::mpsc::channel(1);
        let mut proxy =
            Self { shared, phase, threads: Vec::new(), asks: Vec::new(), workers, addresses };
        for (n, listeners) in sets.into_iter().enumerate() {
            let (shared, tables, phases) = (proxy.shared.clone(), tables.clone(), phases.clone());
            let (started, start) = mpsc::sync_channel(1);
            let alive = alive.clone();
            let (ask, asks) = tokio::sync::mpsc::unbounded_channel();
            proxy.asks.push(ask);
            let work = move || {
                let _alive = Alive { shared: shared.clone(), _workers: alive };
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let built = runtime.enable_io().enable_time().build_local(LocalOptions::default());
                let (runtime, result) = match built {
                    Ok(runtime) => (Some(runtime), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                // The receiver waits for this.
                let _ = started.send(result);
                runtime.map_or(Ok(()), |rt| {
                    rt.block_on(worker::run(shared, n, listeners, tables, phases, asks))
                })
            };
            proxy
                .threads
                .push(std::thread::Builder::new().name(format!("worker-{n}")).spawn(work)?);
            start.recv().map_err(io::Error::other)??;
        }
        Ok(proxy)
    }

    /// Connections that are open, or being opened.
    pub fn live(&self) -> usize {
        self.shared.live.load(Relaxed)
    }

    /// A reader of the counts of how connections ended; it outlives the proxy.
    pub fn figures(&self) -> Figures {
        Figures { shared: self.shared.clone(), asks: self.asks.clone().into() }
    }

    /// Stops accepting. Live connections go on.
    pub fn drain(&self) {
        self.phase.send_if_modified(|phase| {
            let serving = *phase == Phase::Serving;
            if serving {
                *phase = Phase::Draining;
            }
            serving
        });
    }

    /// Waits until every worker has ended: after [`Proxy::drain`], when its last connection did.
    pub async fn ended(&mut self) {
        // Nothing is ever sent.
        let _ = self.workers.recv().await;
    }

    /// Waits until a worker, or a part of one, has ended that should go on.
    pub async fn failed(&self) {
        self.shared.broken.notified().await;
    }

    /// Resets what is left, and waits for the workers to end.
    pub async fn end(mut self) -> io::Result<()> {
        self.phase.send_replace(Phase::Ended);
        self.ended().await;
        for thread in self.threads {
            thread.join().map_err(|_| io::Error::other("a worker panicked"))??;
        }
        Ok(())
    }
}

/// Held by a worker's thread.
struct Alive {
    shared: Arc<Shared>,
    _workers: tokio::sync::mpsc::Sender<()>,
}

impl Drop for Alive {
    /// However the thread ends. At an orderly end nobody listens.
    fn drop(&mut self) {
        self.shared.broken.notify_one();
    }
}

/// Figures of the data path, for metrics and API. Clones are the same.
#[derive(Debug, Clone)]
pub struct Figures {
    shared: Arc<Shared>,
    asks: Arc<[tokio::sync::mpsc::UnboundedSender<Ask>]>,
}

impl Figures {
    pub fn live(&self) -> usize {
        self.shared.live.load(Relaxed)
    }

    /// Connections that wait for their container to become known.
    pub fn held(&self) -> usize {
        self.shared.held.load(Relaxed)
    }

    /// Connections that may be open at a time.
    pub fn limit(&self) -> usize {
        self.shared.settings.max_connections
    }

    /// Connections of one consumer that may be open at a time.
    pub fn limit_of_consumer(&self) -> Option<usize> {
        self.shared.settings.max_connections_per_consumer
    }

    /// Whether connections are refused because memory is nearly used up.
    pub fn memory_short(&self) -> bool {
        self.shared.settings.memory_short.get()
    }

    /// Connections that ended so, since the start.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.shared.tally.get(outcome)
    }

    /// Connections that were accepted for a route, since the start.
    pub fn started(&self) -> u64 {
        self.shared.counts.iter().map(|counts| counts.started.load(Relaxed)).sum()
    }

    /// Bytes from consumers to endpoints, and back, since the start; of live connections, as of the last
    /// [`Figures::refresh`].
    pub fn bytes(&self) -> (u64, u64) {
        let of = |counts: &crate::counts::Counts| {
            (counts.bytes_up.load(Relaxed), counts.bytes_down.load(Relaxed))
        };
        self.shared.counts.iter().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// How long it took from accepting a connection until its endpoint's was open.
    pub fn connect(&self) -> Distribution {
        let mut sum = Distribution::default();
        self.shared.counts.iter().for_each(|counts| sum.add(&counts.connect.read()));
        sum
    }

    /// The data path's clock, by which ejections and errors are dated.
    pub fn now(&self) -> Millis {
        self.shared.now()
    }
}
