//! The data path: captured connections are accepted, and relayed to an endpoint of their route. It reads the table, and
//! waits only for its sockets and timers.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering::Relaxed, mpsc},
    thread::JoinHandle,
};

use tokio::{
    runtime::LocalOptions,
    sync::{mpsc::UnboundedSender, watch},
};

use crate::{model::Port, table::Table};

mod admission;
mod announce;
mod captured;
mod connect;
mod connection;
mod connection_log;
mod connections;
mod failed_checks;
mod figures;
mod frozen;
mod handover;
mod idle;
mod idle_set;
mod listener;
mod lists;
mod observed;
mod owner;
mod record;
mod relay;
mod run;
mod settings;
mod shared;
mod socket;
#[cfg(test)]
mod standstill;
mod sweep;
mod takeover;
#[cfg(test)]
pub(crate) mod testing;
mod worker;

pub use captured::Destinations;
pub(crate) use connection_log::wanted;
pub use failed_checks::FailedChecks;
pub use figures::Figures;
use observed::Ask;
pub use observed::{ConnectionState, LiveConnection};
use run::Phase;
pub use settings::ProxySettings;
use shared::Shared;
pub(crate) use socket::{Lack, connect_unseen, probe, unseen_socket};
pub use takeover::{HandedOver, TakeoverError};

/// The running data path.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// The request channel of each worker.
    asks: Vec<UnboundedSender<Ask>>,
    /// Closed when all workers have ended, because each has dropped its sender.
    workers: tokio::sync::mpsc::Receiver<()>,
    /// Closed when all workers have dropped their senders (see [`Proxy::leave`]).
    older: tokio::sync::mpsc::Receiver<()>,
    /// The addresses of its listeners.
    pub addresses: Vec<SocketAddr>,
}

impl Proxy {
    /// Opens the listeners and starts the workers, which accept connections at once.
    pub fn start(
        settings: ProxySettings,
        tables: &watch::Receiver<Arc<Table>>,
    ) -> io::Result<Self> {
        let sets = listener::open(
            settings.port.map_or(0, Port::get),
            settings.workers.max(1),
            settings.user_timeout,
        )?;
        Self::with(settings, tables, sets, false)
    }

    /// Starts the workers with the listeners of another process. They are frozen until [`Proxy::go_on`].
    pub fn continuing(
        settings: ProxySettings,
        tables: &watch::Receiver<Arc<Table>>,
        sets: Vec<Vec<OwnedFd>>,
    ) -> io::Result<Self> {
        let sets = listener::inherited(sets, settings.workers.max(1), settings.user_timeout)?;
        let proxy = Self::with(settings, tables, sets, true)?;
        // Until this process commits the takeover.
        proxy.shared.handed_over.store(true, Relaxed);
        Ok(proxy)
    }

    fn with(
        settings: ProxySettings,
        tables: &watch::Receiver<Arc<Table>>,
        sets: Vec<Vec<std::net::TcpListener>>,
        begins_frozen: bool,
    ) -> io::Result<Self> {
        let addresses = match sets.iter().find(|set| !set.is_empty()) {
            Some(set) => {
                set.iter().map(|listener| listener.local_addr()).collect::<io::Result<_>>()?
            }
            None => Vec::new(),
        };
        let (phase, phases) = watch::channel(Phase::Serving);
        let shared = Arc::new(Shared::new(settings));
        let (alive, workers) = tokio::sync::mpsc::channel(1);
        let (open, older) = tokio::sync::mpsc::channel(1);
        let (threads, asks) = Default::default();
        let mut proxy = Self { shared, phase, threads, asks, workers, older, addresses };
        for (n, listeners) in sets.into_iter().enumerate() {
            let (shared, tables, phases) = (proxy.shared.clone(), tables.clone(), phases.clone());
            let (started, start) = mpsc::sync_channel(1);
            let (alive, open) = (alive.clone(), open.clone());
            let (ask, asks) = tokio::sync::mpsc::unbounded_channel();
            proxy.asks.push(ask);
            let work = move || {
                let _alive = WorkerAlive { shared: shared.clone(), _workers: alive };
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let built = runtime.enable_io().enable_time().build_local(LocalOptions::default());
                let (runtime, result) = match built {
                    Ok(runtime) => (Some(runtime), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                // The receiver waits for this.
                let _ = started.send(result);
                runtime.map_or(Ok(()), |rt| {
                    let lives = (shared, n, begins_frozen);
                    rt.block_on(run::run(lives, listeners, tables, phases, asks, open))
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

    /// A reader of the counts, which outlives the proxy.
    pub fn figures(&self) -> Figures {
        Figures::new(self.shared.clone(), self.asks.clone().into())
    }

    /// Waits until the connections have ended that were open at the first call. New ones are served. Cancel-safe.
    pub async fn leave(&mut self) {
        self.enter(Phase::Leaving);
        // Nothing is ever sent.
        let _ = self.older.recv().await;
    }

    /// Stops accepting, after what waits to be accepted. Live connections go on, except those that [`Proxy::leave`] has waited for.
    pub fn drain(&self) {
        self.enter(Phase::Draining);
    }

    fn enter(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let is_later = *phase < next;
            *phase = next.max(*phase);
            is_later
        });
    }

    /// Waits until all workers have ended: after [`Proxy::drain`], when the last connection has ended.
    pub async fn ended(&mut self) {
        // Nothing is ever sent.
        let _ = self.workers.recv().await;
    }

    /// Waits until a worker, or a part of one, ends unexpectedly.
    pub async fn failed(&self) {
        self.shared.broken.notified().await;
    }

    /// Resets all remaining connections, and waits for the workers to end.
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
struct WorkerAlive {
    shared: Arc<Shared>,
    _workers: tokio::sync::mpsc::Sender<()>,
}

impl Drop for WorkerAlive {
    /// Sent whenever the thread ends. At an orderly end there is no receiver.
    fn drop(&mut self) {
        self.shared.broken.notify_one();
    }
}
