//! One worker: a thread with a runtime, listeners and connections of its own. Workers share nothing but counters.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc, watch},
    task::{AbortHandle, JoinSet, yield_now},
    time::timeout_at,
};

use super::{
    Destinations, Phase, Settings,
    connection::{Connected, Meaning, Record, Socket, serve},
    connection_log::{self, Entry},
    listener::{AcceptBackoff, adopt},
    observed::{self, Ask},
    origin::{self, Doubt, Pause},
    parking::{Parked, Parking},
    relay::{Leave, Moved, PIPES, RelayBuffers},
    shared::{Held, Shared},
};
use crate::{
    balance::Millis,
    counts::Counts,
    descriptor::EndpointDrain,
    events::Event,
    model::Endpoint,
    outcome::Outcome,
    table::{Route, Table, Upstream},
};

#[cfg(test)]
mod admission;
mod idle;
mod visit;

/// A connection of a worker.
type Id = u64;

#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Which of the workers it is.
    n: usize,
    table: RefCell<Arc<Table>>,
    pub(super) buffers: RelayBuffers,
    pub(super) mark: Option<u32>,
    /// Those that have a task.
    live: RefCell<HashMap<Id, Live>>,
    /// Those that have none because nothing happens to them.
    parking: Parking,
    /// Connections that were parked since memory was given back.
    parked_since_trim: Cell<usize>,
    next_id: Cell<Id>,
    /// Connections that are held back.
    waiting: Cell<usize>,
    /// Rung when the last connection has ended.
    idle: Notify,
    /// Rung when a table has been taken over.
    taken_over: Notify,
    /// Nobody is accepted before this moment: what there is belongs to those who were accepted already.
    shortage: Cell<Option<Instant>>,
    /// The last time in which nobody was accepted.
    pause: Cell<Option<Pause>>,
    /// Set when nobody may come in any more.
    draining: Cell<bool>,
}

/// What can be done to a connection from outside its task.
#[derive(Debug)]
struct Live {
    record: Rc<Record>,
    task: AbortHandle,
    endpoint: Option<Endpoint>,
    /// Bytes that it had moved when it was looked at last.
    seen: Option<u64>,
    /// Its endpoint went away, and it has until then.
    doomed: Option<Instant>,
    /// Why the task was aborted.
    verdict: Option<Outcome>,
}

/// Runs a worker until it is told to end and its connections are gone.
pub(super) async fn run(
    shared: Arc<Shared>,
    n: usize,
    listeners: Vec<std::net::TcpListener>,
    mut tables: watch::Receiver<Arc<Table>>,
    mut phase: watch::Receiver<Phase>,
    asks: mpsc::UnboundedReceiver<Ask>,
) -> io::Result<()> {
    let worker = Worker::new(shared, n, tables.borrow_and_update().clone())?;
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn_local(worker.clone().accept(adopt(listener)?));
    }
    let mut others = JoinSet::new();
    others.spawn_local(worker.clone().follow(tables));
    others.spawn_local(observed::answer(worker.clone(), asks));
    others.spawn_local(worker.clone().park_idle());
    others.spawn_local(worker.clone().resume_woken());
    others.spawn_local(worker.clone().send_queued());

    tokio::select! {
        // The sender lives as long as the proxy: where it is gone, so is everything, and this ends too.
        _ = phase.wait_for(|phase| *phase != Phase::Serving) => {}
        // None of them ever ends, unless it panics.
        _ = accepting.join_next() => worker.break_off(),
        _ = others.join_next() => worker.break_off(),
    }
    worker.draining.set(true);
    // Those that are held back end now.
    worker.taken_over.notify_waiters();
    drop(accepting);
    tokio::select! {
        () = worker.all_ended() => {}
        _ = phase.wait_for(|phase| *phase == Phase::Ended) => {
            worker.abort(|_, _, _| Some(Outcome::Shutdown));
            worker.all_ended().await;
        }
    }
    Ok(())
}

impl Worker {
    /// Inside its runtime.
    fn new(shared: Arc<Shared>, n: usize, table: Arc<Table>) -> io::Result<Rc<Self>> {
        let Settings { splice, workers, mark, .. } = shared.settings;
        let pipes = if splice { (PIPES / workers.max(1)).max(1) } else { 0 };
        Ok(Rc::new(Self {
            shared,
            n,
            table: RefCell::new(table),
            buffers: RelayBuffers::new(pipes),
            mark,
            live: RefCell::default(),
            parking: Parking::new()?,
            parked_since_trim: Cell::default(),
            next_id: Cell::default(),
            waiting: Cell::default(),
            idle: Notify::new(),
            taken_over: Notify::new(),
            shortage: Cell::default(),
            pause: Cell::default(),
            draining: Cell::new(false),
        }))
    }

    /// So many are accepted before those that are relayed get their turn: a flood of new ones must not delay them.
    const IN_A_ROW: usize = 4;

    async fn accept(self: Rc<Self>, listener: TcpListener) {
        let mut backoff = AcceptBackoff::default();
        let mut in_a_row = 0;
        // A listener without an address has no port that anything could be meant for.
        let port = listener.local_addr().map_or(0, |address| address.port());
        loop {
            while let Some(end) = self.shortage.get().filter(|end| *end > Instant::now()) {
                self.pause_until(end).await;
            }
            match listener.accept().await {
                Ok((stream, peer)) => {
                    backoff.reset();
                    self.admit(stream, peer, port);
                    in_a_row += 1;
                    if in_a_row == Self::IN_A_ROW {
                        in_a_row = 0;
                        yield_now().await;
                    }
                }
                Err(error) => {
                    if let Some(pause) = backoff.after(&error) {
                        self.pause_until(Instant::now() + pause).await;
                    }
                }
            }
        }
    }

    async fn pause_until(&self, end: Instant) {
        let start = Instant::now();
        tokio::time::sleep_until(end.into()).await;
        self.pause.set(Some(Pause::ended(self.pause.get(), start)));
    }

    /// Starts a connection that means a route; any other is reset at once, but for one that may soon mean one.
    fn admit(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, port: u16) {
        let socket = Socket::new(stream);
        let meaning = match Meaning::of(&socket.stream, peer, port) {
            Ok(meaning) => meaning,
            Err(outcome) => return self.refuse(peer, None, None, outcome),
        };
        let route = meaning.route(&self.table.borrow(), &self.shared.settings.destinations);
        match route {
            Ok(route) => self.admit_to(socket, meaning, route),
            Err(Outcome::UnknownConsumer) if self.table.borrow().may_become_known(&peer.ip()) => {
                match Held::new(&self.shared) {
                    Some(held) => {
                        tokio::task::spawn_local(self.clone().hold_back(socket, meaning, held));
                    }
                    None => self.refuse(peer, Some(meaning.meant), None, Outcome::UnknownConsumer),
                }
            }
            Err(outcome) => self.refuse(peer, Some(meaning.meant), None, outcome),
        }
    }

    /// Starts a connection, unless it may be one that the address's former owner opened.
    fn admit_to(self: &Rc<Self>, socket: Socket, meaning: Meaning, route: Arc<Route>) {
        let now = Instant::now();
        match origin::doubt(&route, self.pause.get(), now) {
            None => self.start(socket, meaning, route, now),
            // It may have waited until a moment ago to become known, and is served like those that do so here.
            Some(Doubt::New) if !origin::has_hung_up(&socket.stream) => {
                self.start(socket, meaning, route, now);
            }
            Some(_) => match Held::one_more(&self.shared) {
                Some(held) => {
                    tokio::task::spawn_local(self.clone().identify(socket, meaning, route, held));
                }
                None => {
                    self.refuse(meaning.peer, Some(meaning.meant), None, Outcome::UnknownConsumer)
                }
            },
        }
    }

    /// Starts a connection if it is certain that the route's owner opened it.
    async fn identify(
        self: Rc<Self>,
        socket: Socket,
        meaning: Meaning,
        route: Arc<Route>,
        _held: Held,
    ) {
        let _waiting = Waiting::new(&self);
        let accepted = Instant::now();
        let outcome = match origin::is_owners(&route, &meaning).await {
            _ if self.draining.get() => Outcome::Shutdown,
            true if self.table.borrow().has(&route) => {
                return self.start(socket, meaning, route, accepted);
            }
            _ => Outcome::UnknownConsumer,
        };
        self.refuse(meaning.peer, Some(meaning.meant), None, outcome);
    }

    /// Counts a connection that is reset by dropping its socket.
    fn refuse(
        &self,
        source: SocketAddr,
        destination: Option<SocketAddr>,
        route: Option<&Route>,
        outcome: Outcome,
    ) {
        self.shared.tally.count(outcome);
        connection_log::refused(self.shared.settings.log, outcome, source, destination, route);
        tracing::debug!(%source, ?destination, outcome = outcome.as_str(), "refused");
    }

    /// Waits for the container to become known: its first connection may be quicker than the engine's news of it.
    async fn hold_back(self: Rc<Self>, socket: Socket, meaning: Meaning, held: Held) {
        let _waiting = Waiting::new(&self);
        let accepted = Instant::now();
        let deadline = accepted + self.hold();
        self.shared.settings.lookup.ask();
        loop {
            // Looked up before the first wait too: the table may have come since this connection was accepted.
            let route = meaning.route(&self.table.borrow(), &self.shared.settings.destinations);
            match route {
                _ if self.draining.get() => {
                    let outcome = Outcome::Shutdown;
                    return self.refuse(meaning.peer, Some(meaning.meant), None, outcome);
                }
                // It has sent all it has to say; or who dialled is gone, and its address another's by now.
                Ok(route)
                    if origin::doubt(&route, self.pause.get(), accepted) == Some(Doubt::Waited)
                        || origin::has_hung_up(&socket.stream) =>
                {
                    return self.identify(socket, meaning, route, held).await;
                }
                Ok(route) => return self.start(socket, meaning, route, accepted),
                Err(Outcome::UnknownConsumer) if self.another_table(deadline).await => {}
                Err(outcome) => {
                    return self.refuse(meaning.peer, Some(meaning.meant), None, outcome);
                }
            }
        }
    }

    fn start(
        self: &Rc<Self>,
        socket: Socket,
        meaning: Meaning,
        route: Arc<Route>,
        accepted: Instant,
    ) {
        self.buffers.others_are_busy();
        route.counts.start();
        if let Err(outcome) = self.shared.count_in(&route) {
            route.counts.ended.count(outcome);
            route.counts.last_error.set(self.now(), outcome.as_str());
            return self.refuse(meaning.peer, Some(meaning.meant), Some(&route), outcome);
        }
        if let Some(counts) = self.counts() {
            counts.start();
        }
        let record = Rc::new(Record {
            route,
            meaning,
            accepted,
            connected: OnceCell::new(),
            tries: Cell::default(),
            moved: Moved::default(),
            counted: Moved::default(),
            leave: Leave::default(),
        });
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        // Made here and not in the task: it may be aborted before it runs for the first time.
        let ticket =
            Ticket { worker: self.clone(), id, record: record.clone(), outcome: Outcome::Shutdown };
        let task = tokio::task::spawn_local(serve(ticket, socket));
        // The task has not run yet: this is the thread that will run it.
        let live = Live {
            record,
            task: task.abort_handle(),
            endpoint: None,
            seen: None,
            doomed: None,
            verdict: None,
        };
        self.live.borrow_mut().insert(id, live);
    }

    pub(super) async fn send_queued(self: Rc<Self>) {
        self.buffers.send_queued().await;
    }

    /// Takes over each table as it is published, and ends the connections that do not belong to it.
    async fn follow(self: Rc<Self>, mut tables: watch::Receiver<Arc<Table>>) {
        loop {
            let next_doom = {
                let all = self.live.borrow();
                let running = all.values().filter(|l| l.verdict.is_none()).filter_map(|l| l.doomed);
                running.min().into_iter().chain(self.parking.next_doom()).min()
            };
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
            self.taken_over.notify_waiters();
            let now = Instant::now();
            self.abort(|route, doomed, endpoint| match endpoint {
                _ if !table.has(route) => Some(Outcome::RouteGone),
                Some(endpoint) => judge(route, doomed, &table, endpoint, now),
                None => None,
            });
        }
    }

    /// Ends every connection that `judge` has a first verdict on.
    fn abort(
        &self,
        judge: impl Fn(&Route, &mut Option<Instant>, Option<Endpoint>) -> Option<Outcome>,
    ) {
        for live in self.live.borrow_mut().values_mut().filter(|live| live.verdict.is_none()) {
            if let Some(verdict) = judge(&live.record.route, &mut live.doomed, live.endpoint) {
                live.verdict = Some(verdict);
                // It resets both sockets when its future is dropped, in this thread's next round.
                live.task.abort();
            }
        }
        let parked = self.parking.take_if(|parked| {
            let endpoint = Some(parked.lease.state().endpoint);
            judge(&parked.record.route, &mut parked.doomed, endpoint)
        });
        for (Parked { record, .. }, verdict) in parked {
            self.account(&Rc::new(record), verdict);
        }
    }

    /// Has the whole proxy end, as this worker cannot go on. Until then it does no more than it can: a share of all new
    /// connections is this worker's, and nobody would answer those.
    fn break_off(&self) {
        tracing::error!(worker = self.n, "a part of the data path has ended");
        self.shared.broken.notify_one();
    }

    async fn all_ended(&self) {
        while self.has_connections() {
            self.idle.notified().await;
        }
    }

    fn has_connections(&self) -> bool {
        !self.live.borrow().is_empty() || !self.parking.is_empty() || self.waiting.get() > 0
    }

    /// Counts and logs a connection that has ended, and is in none of the lists any more.
    fn account(&self, record: &Rc<Record>, outcome: Outcome) {
        let route = &record.route;
        self.count_bytes(record);
        route.counts.ended.count(outcome);
        match record.connected.get() {
            Some(connected) => connected.endpoint.counts.ended.count(outcome),
            // That none could be reached has been said, with the reason.
            None if outcome == Outcome::NoEndpoint => {
                route.counts.last_error.set(self.now(), outcome.as_str());
            }
            None => {}
        }
        self.shared.count_out(route);
        self.shared.tally.count(outcome);
        connection_log::record(self.shared.settings.log, outcome, || Entry::new(record, outcome));
        if !self.has_connections() {
            self.idle.notify_one();
        }
    }

    /// The endpoints that a route has now.
    pub(super) fn upstream(&self, route: &Route) -> Arc<Upstream> {
        let table = self.table.borrow();
        let now = table.has(route).then(|| table.route(&route.key)).flatten();
        now.map_or(&route.upstream, |now| &now.upstream).clone()
    }

    /// Waits for the next table, until `deadline`. Whether there is one.
    pub(super) async fn another_table(&self, deadline: Instant) -> bool {
        timeout_at(deadline.into(), self.taken_over.notified()).await.is_ok()
    }

    /// Waits a moment for what other connections give back when they end. Nobody is accepted meanwhile.
    pub(super) async fn wait_out_shortage(&self) {
        const MOMENT: Duration = Duration::from_millis(50);
        let end = Instant::now() + MOMENT;
        // A little longer than those who wait for it.
        self.shortage.set(Some(end + MOMENT));
        tokio::time::sleep_until(end.into()).await;
    }

    pub(super) fn destinations(&self) -> &Destinations {
        &self.shared.settings.destinations
    }

    /// How long a connection may wait for what is not known yet.
    pub(super) fn hold(&self) -> Duration {
        self.shared.settings.hold
    }

    pub(super) fn now(&self) -> Millis {
        self.shared.now()
    }

    /// What this worker counts for itself.
    fn counts(&self) -> Option<&Counts> {
        self.shared.counts.get(self.n)
    }

    /// Adds what a connection moved since the last time.
    fn count_bytes(&self, record: &Record) {
        let since = |moved: &Cell<u64>, counted: &Cell<u64>| {
            // What is queued counts as moved until it turns out that it cannot be: no count goes down for that, it waits.
            let now = moved.get().max(counted.get());
            now - counted.replace(now)
        };
        let up = since(&record.moved.up, &record.counted.up);
        let down = since(&record.moved.down, &record.counted.down);
        record.route.counts.bytes(up, down);
        if let Some(connected) = record.connected.get() {
            connected.endpoint.counts.bytes(up, down);
        }
        if let Some(counts) = self.counts() {
            counts.bytes(up, down);
        }
    }

    pub(super) fn number(&self) -> usize {
        self.n
    }

    pub(super) fn report(&self, event: impl FnOnce() -> Event) {
        self.shared.settings.events.report(event);
    }
}

/// Counts a connection that is held back: the worker does not end before it has been told what becomes of it.
struct Waiting(Rc<Worker>);

impl Waiting {
    fn new(worker: &Rc<Worker>) -> Self {
        worker.waiting.set(worker.waiting.get() + 1);
        Self(worker.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
        if !self.0.has_connections() {
            self.0.idle.notify_one();
        }
    }
}

/// What becomes of a connection whose endpoint may have gone away.
fn judge(
    route: &Route,
    doomed: &mut Option<Instant>,
    table: &Table,
    endpoint: Endpoint,
    now: Instant,
) -> Option<Outcome> {
    let drain = route.binding.descriptor.drain;
    if drain == EndpointDrain::Keep {
        return None;
    }
    let present = table.route(&route.key).is_some_and(|route| {
        route.upstream.rotation.endpoints().iter().any(|state| state.endpoint == endpoint)
    });
    if present {
        *doomed = None;
        return None;
    }
    let time = match drain {
        EndpointDrain::After(time) => time,
        EndpointDrain::Keep | EndpointDrain::Kill => Duration::ZERO,
    };
    let doom = *doomed.get_or_insert(now + time);
    (now >= doom).then_some(Outcome::EndpointGone)
}

/// A connection's place among those of its worker that have a task. Dropping it accounts for the connection, whatever way
/// it ends, an abort included; only parking takes it out before.
pub(super) struct Ticket {
    pub(super) worker: Rc<Worker>,
    pub(super) record: Rc<Record>,
    id: Id,
    outcome: Outcome,
}

impl Ticket {
    /// Remembers where the connection is about to go.
    pub(super) fn connecting(&self, endpoint: Endpoint) {
        if let Some(live) = self.worker.live.borrow_mut().get_mut(&self.id) {
            live.endpoint = Some(endpoint);
        }
    }

    /// Remembers where it went, and counts that.
    pub(super) fn connected(&self, connected: Connected) {
        self.record.route.counts.connect.observe(connected.after);
        if let Some(counts) = self.worker.counts() {
            counts.connect.observe(connected.after);
        }
        // A connection is opened once.
        let _ = self.record.connected.set(connected);
    }

    pub(super) fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let live = self.worker.live.borrow_mut().remove(&self.id);
        // It is not there where it was parked.
        if let Some(live) = live {
            self.worker.account(&self.record, live.verdict.unwrap_or(self.outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::proxy::{connection::tests::table, shared::tests::shared};

    #[tokio::test]
    async fn what_was_counted_is_not_taken_back_when_it_could_not_be_sent() {
        let worker = Worker::new(Arc::new(shared(1, 1)), 0, Arc::new(table())).unwrap();
        let route = worker.table.borrow().routes().next().unwrap().clone();
        let peer: SocketAddr = ([127, 0, 0, 1], 1).into();
        let record = Record {
            route: route.clone(),
            meaning: Meaning { peer, meant: peer, direct: false },
            accepted: Instant::now(),
            connected: OnceCell::new(),
            tries: Cell::default(),
            moved: Moved::default(),
            counted: Moved::default(),
            leave: Leave::default(),
        };
        let mut counts = Vec::new();
        for moved in [10, 4, 9, 12] {
            record.moved.up.set(moved);
            worker.count_bytes(&record);
            counts.push(route.counts.bytes_up.load(Relaxed));
        }
        assert_eq!(counts, [10, 10, 10, 12]);
    }

    #[tokio::test]
    async fn a_connection_that_is_aborted_before_it_ran_is_reset_and_accounted_for() {
        let test = async {
            let worker = Worker::new(Arc::new(shared(1, 1)), 0, Arc::new(table())).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, peer) = listener.accept().await.unwrap();
            let route = worker.table.borrow().routes().next().unwrap().clone();

            let meaning = Meaning { peer, meant: peer, direct: false };
            worker.start(Socket::new(stream), meaning, route, Instant::now());
            worker.abort(|_, _, _| Some(Outcome::RouteGone));
            worker.all_ended().await;
            assert_eq!(worker.shared.live.load(Relaxed), 0);
            assert_eq!(worker.shared.tally.get(Outcome::RouteGone), 1);
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        };
        let (tasks, deadline) = (tokio::task::LocalSet::new(), Duration::from_secs(60));
        let end = tokio::time::timeout(deadline, tasks.run_until(test)).await;
        end.expect("it is accounted for");
    }
}
