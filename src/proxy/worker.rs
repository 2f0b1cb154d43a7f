//! One worker: a thread with a runtime, listeners and connections of its own. Workers share nothing but counters.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::AbortHandle,
};

use super::{
    Phase, Settings,
    connection::{Record, recognise, reset_on_close, serve},
    connection_log::{self, Entry},
    listener::{AcceptBackoff, adopt},
    outcome::{Outcome, Tally},
    relay::{Moved, RelayBuffers},
};
use crate::{
    balance::{EndpointState, Millis},
    descriptor::EndpointDrain,
    model::Endpoint,
    table::Table,
};

/// What the workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub settings: Settings,
    pub tally: Tally,
    /// Connections that are open, or being opened.
    pub live: AtomicUsize,
    /// When the clock of ejections started.
    pub start: Instant,
}

/// A connection of a worker.
pub(super) type Id = u64;

#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    table: RefCell<Arc<Table>>,
    pub(super) buffers: RelayBuffers,
    pub(super) mark: Option<u32>,
    live: RefCell<HashMap<Id, Live>>,
    next_id: Cell<Id>,
    /// Rung when the last live connection has ended.
    idle: Notify,
}

/// What can be done to a connection from outside its task.
#[derive(Debug)]
struct Live {
    record: Rc<Record>,
    task: AbortHandle,
    endpoint: Option<Endpoint>,
    /// Its endpoint went away, and it has until then.
    doomed: Option<Instant>,
    /// Why the task was aborted.
    verdict: Option<Outcome>,
}

/// Runs a worker until it is told to end and its connections are gone.
pub(super) async fn run(
    shared: Arc<Shared>,
    listeners: Vec<std::net::TcpListener>,
    mut tables: watch::Receiver<Arc<Table>>,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<()> {
    let worker = Rc::new(Worker {
        table: RefCell::new(tables.borrow_and_update().clone()),
        buffers: RelayBuffers::new(shared.settings.splice),
        mark: shared.settings.mark,
        shared,
        live: RefCell::default(),
        next_id: Cell::default(),
        idle: Notify::new(),
    });
    let mut accepting = Vec::new();
    for listener in listeners {
        let listener = adopt(listener)?;
        accepting.push(tokio::task::spawn_local(worker.clone().accept(listener)));
    }
    let follow = tokio::task::spawn_local(worker.clone().follow(tables));

    // The sender lives as long as the proxy: where it is gone, so is everything, and this ends too.
    let _ = phase.wait_for(|phase| *phase != Phase::Serving).await;
    accepting.iter().for_each(|task| task.abort());
    tokio::select! {
        () = worker.all_ended() => {}
        _ = phase.wait_for(|phase| *phase == Phase::Ended) => {
            worker.abort(|_, _| Some(Outcome::Shutdown));
            worker.all_ended().await;
        }
    }
    follow.abort();
    Ok(())
}

impl Worker {
    async fn accept(self: Rc<Self>, listener: TcpListener) {
        let mut backoff = AcceptBackoff::default();
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    backoff.reset();
                    self.admit(stream, peer);
                }
                Err(error) => {
                    if let Some(pause) = backoff.after(&error) {
                        tracing::warn!(%error, ?pause, "cannot accept; connections wait in the kernel's queue");
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Starts a connection that means a route; any other is reset at once.
    fn admit(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        let recognised =
            recognise(&self.table.borrow(), &self.shared.settings.destinations, &stream, peer);
        let recognised = match recognised {
            Ok(_) if self.shared.live.load(Relaxed) >= self.shared.settings.max_connections => {
                Err(Outcome::TooManyConnections)
            }
            recognised => recognised,
        };
        let (route, meant) = match recognised {
            Ok(recognised) => recognised,
            Err(outcome) => {
                reset_on_close(&stream);
                self.shared.tally.count(outcome);
                tracing::debug!(%peer, outcome = outcome.as_str(), "refused");
                return;
            }
        };
        let record = Rc::new(Record {
            route,
            peer,
            meant,
            accepted: Instant::now(),
            connected: Cell::default(),
            tries: Cell::default(),
            moved: Moved::default(),
        });
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.shared.live.fetch_add(1, Relaxed);
        let task = tokio::task::spawn_local(serve(self.clone(), id, stream, record.clone()));
        // The task has not run yet: this is the thread that will run it.
        let live =
            Live { record, task: task.abort_handle(), endpoint: None, doomed: None, verdict: None };
        self.live.borrow_mut().insert(id, live);
    }

    /// Takes over each table as it is published, and ends the connections that do not belong to it.
    async fn follow(self: Rc<Self>, mut tables: watch::Receiver<Arc<Table>>) {
        loop {
            let next_doom = self.live.borrow().values().filter_map(|live| live.doomed).min();
            let doom = async {
                match next_doom {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = tables.changed() => if changed.is_err() { return },
                () = doom => {}
            }
            let table = tables.borrow_and_update().clone();
            self.table.replace(table.clone());
            let now = Instant::now();
            self.abort(|live, endpoint| match endpoint {
                _ if !table.has(&live.record.route) => Some(Outcome::RouteGone),
                Some(endpoint) => live.judge(&table, endpoint, now),
                None => None,
            });
        }
    }

    /// Aborts every connection that `judge` has a verdict on.
    fn abort(&self, judge: impl Fn(&mut Live, Option<Endpoint>) -> Option<Outcome>) {
        for live in self.live.borrow_mut().values_mut() {
            let endpoint = live.endpoint;
            if let Some(verdict) = judge(live, endpoint) {
                live.verdict = Some(verdict);
                // It resets both sockets when its future is dropped, in this thread's next round.
                live.task.abort();
            }
        }
    }

    async fn all_ended(&self) {
        while !self.live.borrow().is_empty() {
            self.idle.notified().await;
        }
    }

    /// Remembers where a connection is about to go.
    pub(super) fn connecting(&self, id: Id, state: &EndpointState) {
        if let Some(live) = self.live.borrow_mut().get_mut(&id) {
            live.endpoint = Some(state.endpoint);
        }
    }

    pub(super) fn now(&self) -> Millis {
        Millis(u64::try_from(self.shared.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Accounts for a connection whatever way it ends, an abort included.
    pub(super) fn ticket(self: &Rc<Self>, id: Id, record: Rc<Record>) -> Ticket {
        Ticket { worker: self.clone(), id, record, outcome: Outcome::Shutdown }
    }
}

impl Live {
    /// What becomes of a connection whose endpoint may have gone away.
    fn judge(&mut self, table: &Table, endpoint: Endpoint, now: Instant) -> Option<Outcome> {
        let route = &self.record.route;
        let drain = route.binding.descriptor.drain;
        if drain == EndpointDrain::Keep {
            return None;
        }
        let present = table.route(&route.key).is_some_and(|route| {
            route.upstream.rotation.endpoints().iter().any(|state| state.endpoint == endpoint)
        });
        if present {
            self.doomed = None;
            return None;
        }
        let time = match drain {
            EndpointDrain::After(time) => time,
            EndpointDrain::Keep | EndpointDrain::Kill => Duration::ZERO,
        };
        let doom = *self.doomed.get_or_insert(now + time);
        (now >= doom).then_some(Outcome::EndpointGone)
    }
}

/// Dropped when its connection ends.
pub(super) struct Ticket {
    worker: Rc<Worker>,
    id: Id,
    record: Rc<Record>,
    outcome: Outcome,
}

impl Ticket {
    pub(super) fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let worker = &self.worker;
        let (live, last) = {
            let mut all = worker.live.borrow_mut();
            (all.remove(&self.id), all.is_empty())
        };
        let outcome = live.and_then(|live| live.verdict).unwrap_or(self.outcome);
        worker.shared.live.fetch_sub(1, Relaxed);
        worker.shared.tally.count(outcome);
        connection_log::record(worker.shared.settings.log, outcome, || {
            Entry::new(&self.record, outcome)
        });
        if last {
            worker.idle.notify_one();
        }
    }
}
