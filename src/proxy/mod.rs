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

use crate::{config::ConnectionLog, model::Port, provider::Lookup, table::Table};

mod announce;
mod connection;
mod connection_log;
mod listener;
pub mod outcome;
mod relay;
mod shared;
mod worker;

pub use connection::Destinations;
pub(crate) use connection::{dial, is_for_want_of_ours};
use outcome::Outcome;
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
        let mut proxy = Self { shared, phase, threads: Vec::new(), workers, addresses };
        for (n, listeners) in sets.into_iter().enumerate() {
            let (shared, tables, phases) = (proxy.shared.clone(), tables.clone(), phases.clone());
            let (started, start) = mpsc::sync_channel(1);
            let alive = alive.clone();
            let work = move || {
                let _alive = alive;
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let built = runtime.enable_io().enable_time().build_local(LocalOptions::default());
                let (runtime, result) = match built {
                    Ok(runtime) => (Some(runtime), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                // The receiver waits for this.
                let _ = started.send(result);
                runtime.map_or(Ok(()), |rt| {
                    rt.block_on(worker::run(shared, listeners, tables, phases))
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
        Figures(self.shared.clone())
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

/// Figures of the data path, for the metrics.
#[derive(Debug, Clone)]
pub struct Figures(Arc<Shared>);

impl Figures {
    pub fn live(&self) -> usize {
        self.0.live.load(Relaxed)
    }

    /// Connections that ended so, since the start.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.0.tally.get(outcome)
    }
}
