//! A worker: a thread with its own runtime, listeners and connections. Workers share only counters. This file has what all
//! tasks of a worker use, and how a connection gets its place, changes its state and ends.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    sync::Notify,
    time::{sleep_until, timeout_at},
};

use super::{
    captured::Captured,
    connection_log,
    connections::{Connection, Connections, Held, Live, Parked, State},
    frozen::Frozen,
    idle_set::IdleSet,
    lists::Place,
    owner::{Looks, Pause},
    record::Record,
    relay::{PIPES, RelayBuffers, Requests},
    settings::ProxySettings,
    shared::{HoldPermit, Shared},
    socket::Socket,
};
use crate::{
    balance::{EndpointState, Lease},
    counts::ConnectionCounts,
    model::{Millis, OriginalDestination, SourceAddress},
    outcome::Outcome,
    table::{Route, Table, Upstream},
};

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    /// The worker's number.
    pub(super) n: usize,
    pub(super) table: RefCell<Arc<Table>>,
    pub(super) buffers: RelayBuffers,
    pub(super) connections: RefCell<Connections>,
    /// Reports when something happens to a parked connection.
    pub(super) idle_set: IdleSet,
    /// Number of connections parked since memory was given back.
    pub(super) parked_since_trim: Cell<usize>,
    /// Notified when a connection has ended that may have been the last one, or the last of the marked ones.
    ended: Notify,
    /// Notified when a new table is in use.
    taken_over: Notify,
    /// No connection is accepted before this time: the free descriptors are for connections that were already accepted.
    pub(super) shortage: Cell<Option<Instant>>,
    /// The last pause in accepting.
    pub(super) pause: Cell<Option<Pause>>,
    /// Addresses that their owners still had, each with the number of interfaces that had disappeared at that check.
    /// Limited by the number of sources.
    pub(super) checked: RefCell<HashMap<IpAddr, u64>>,
    /// Asks the kernel for the owners of connections.
    pub(super) looks: Rc<Looks>,
    /// Whether it is frozen for a takeover.
    pub(super) frozen: Frozen,
    /// The listeners from which it accepts.
    pub(super) listeners: RefCell<Vec<Weak<TcpListener>>>,
}

impl Worker {
    /// Must be called inside the worker's runtime.
    pub(super) fn new(shared: Arc<Shared>, n: usize, table: Arc<Table>) -> io::Result<Rc<Self>> {
        let ProxySettings { splice, workers, .. } = shared.settings;
        let pipes = if splice { (PIPES / workers.max(1)).max(1) } else { 0 };
        Ok(Rc::new(Self {
            shared,
            n,
            table: RefCell::new(table),
            buffers: RelayBuffers::new(pipes),
            connections: RefCell::default(),
            idle_set: IdleSet::new()?,
            parked_since_trim: Cell::default(),
            ended: Notify::new(),
            taken_over: Notify::new(),
            shortage: Cell::default(),
            pause: Cell::default(),
            checked: RefCell::default(),
            looks: Rc::default(),
            frozen: Frozen::default(),
            listeners: RefCell::default(),
        }))
    }

    pub(super) fn settings(&self) -> &ProxySettings {
        &self.shared.settings
    }

    pub(super) fn now(&self) -> Millis {
        self.shared.now()
    }

    /// Sets the table for new connections, and for further attempts of connections that are being opened. Returns the
    /// previous table.
    pub(super) fn take_over(&self, table: Arc<Table>) -> Arc<Table> {
        let before = self.table.replace(table);
        self.taken_over.notify_waiters();
        before
    }

    /// Waits for the next table, until `deadline`. Returns whether there is one.
    pub(super) async fn another_table(&self, deadline: Instant) -> bool {
        timeout_at(deadline.into(), self.taken_over.notified()).await.is_ok()
    }

    /// The current endpoints of a route. `None` if no route has this query any more, not even this one: then the connection
    /// is about to be reset.
    pub(super) fn upstream(&self, route: &Route) -> Option<Arc<Upstream>> {
        self.table.borrow().upstream(&route.query).cloned()
    }

    /// Waits a moment for resources that ending connections release. No connection is accepted meanwhile.
    pub(super) async fn wait_out_shortage(&self) {
        const MOMENT: Duration = Duration::from_millis(50);
        let end = Instant::now() + MOMENT;
        // Slightly longer than the wait, so that waiting connections come first.
        self.shortage.set(Some(end + MOMENT));
        sleep_until(end.into()).await;
    }

    /// Creates a place for a connection that waits until its owner is known.
    pub(super) fn hold(
        self: &Rc<Self>,
        captured: Captured,
        socket: Option<OwnedFd>,
        permit: HoldPermit,
    ) -> HeldTicket {
        let place = self.connections.borrow_mut().hold(Held::new(captured, socket, permit));
        HeldTicket(Claim::new(self, place))
    }

    /// Creates a place for a connection of a route, unless a limit is reached.
    pub(super) fn start(
        self: &Rc<Self>,
        captured: Captured,
        route: Arc<Route>,
        accepted: Instant,
    ) -> Option<Ticket> {
        let live = self.admit(captured, route, accepted)?;
        let place = self.connections.borrow_mut().start(live.clone());
        Some(Ticket { claim: Claim::new(self, place), live })
    }

    /// Counts a connection of a route, or refuses it.
    fn admit(&self, captured: Captured, route: Arc<Route>, accepted: Instant) -> Option<Rc<Live>> {
        self.buffers.others_are_busy();
        route.counts.start();
        if let Err(outcome) = self.shared.count_in(&route) {
            route.counts.ended.count(outcome);
            route.counts.last_error.set(self.now(), outcome.as_str());
            let Captured { source, destination, .. } = captured;
            self.refuse(source, Some(destination), Some(&route), outcome);
            return None;
        }
        if let Some(counts) = self.counts() {
            counts.start();
        }
        let record = Record::new(route, captured, accepted);
        Some(Rc::new(Live { record, requests: Requests::default() }))
    }

    /// Counts a connection that is reset by dropping its socket.
    pub(super) fn refuse(
        &self,
        source: SourceAddress,
        destination: Option<OriginalDestination>,
        route: Option<&Route>,
        outcome: Outcome,
    ) {
        self.shared.tally.count(outcome);
        connection_log::refused(self.settings().log, outcome, source, destination, route);
        tracing::debug!(%source, ?destination, outcome = outcome.as_str(), "connection refused by embassy");
    }

    /// Ends a connection, unless it is already ending.
    pub(super) fn end(&self, place: Place, outcome: Outcome) {
        // A parked connection has no task, and is gone at once.
        let parked = self.connections.borrow_mut().end(place, outcome);
        if let Some(connection) = parked {
            if let State::Parked(Parked { consumer, endpoint, .. }) = &connection.state {
                self.idle_set.remove([consumer, endpoint]);
            }
            self.account(&connection, outcome);
        }
    }

    /// Ends all connections that `which` selects.
    pub(super) fn end_all(&self, outcome: Outcome, which: impl Fn(&Connection) -> bool) {
        let all = self.connections.borrow();
        let places = all.iter().filter(|(_, one)| which(one)).map(|(place, _)| place);
        let places: Vec<_> = places.collect();
        drop(all);
        places.into_iter().for_each(|place| self.end(place, outcome));
    }

    pub(super) async fn all_ended(&self) {
        while !self.connections.borrow().is_empty() {
            self.ended.notified().await;
        }
    }

    /// Waits until all connections that are open now have ended.
    pub(super) async fn present_ones_ended(&self) {
        self.connections.borrow_mut().mark();
        while self.connections.borrow().marked() > 0 {
            self.ended.notified().await;
        }
    }

    /// Resets the connections that [`Worker::present_ones_ended`] waits for.
    pub(super) fn end_present_ones(&self) {
        let all = self.connections.borrow();
        let places = all.iter().filter(|(_, one)| all.is_marked(one)).map(|(place, _)| place);
        let places: Vec<_> = places.collect();
        drop(all);
        places.into_iter().for_each(|place| self.end(place, Outcome::Shutdown));
    }

    /// Releases a connection that another process has taken over.
    pub(super) fn let_go(&self, place: Place) {
        let parked = self.connections.borrow_mut().let_go(place);
        if let Some(connection) = parked {
            if let State::Parked(Parked { consumer, endpoint, .. }) = &connection.state {
                self.idle_set.remove([consumer, endpoint]);
            }
            self.account(&connection, Outcome::Shutdown);
        }
    }

    /// Counts and logs a connection that has ended and has no place any more.
    fn account(&self, connection: &Connection, outcome: Outcome) {
        if connection.handed_over {
            if let Some(record) = connection.record() {
                self.shared.count_out(&record.route);
            }
            return self.ring();
        }
        let outcome = connection.ending.unwrap_or(outcome);
        match &connection.state {
            State::Held(Held { captured: Captured { source, destination, .. }, .. }) => {
                self.refuse(*source, Some(*destination), None, outcome);
            }
            State::Running(running) => self.account_for(&running.live.record, outcome),
            State::Parked(parked) => self.account_for(&parked.record, outcome),
        }
        self.ring();
    }

    fn account_for(&self, record: &Record, outcome: Outcome) {
        let route = &record.route;
        self.count_bytes(record);
        route.counts.ended.count(outcome);
        match record.connected_to() {
            Some(endpoint) => endpoint.counts.ended.count(outcome),
            // If no endpoint could be reached, the error was already set, with its reason.
            None if outcome == Outcome::NoEndpoint => {
                route.counts.last_error.set(self.now(), outcome.as_str());
            }
            None => {}
        }
        self.shared.count_out(route);
        self.shared.tally.count(outcome);
        connection_log::ended(self.settings().log, outcome, record);
    }

    fn ring(&self) {
        // Without marked connections, which includes an empty worker.
        if self.connections.borrow().marked() == 0 {
            self.ended.notify_one();
        }
    }

    /// The counts of this worker.
    fn counts(&self) -> Option<&ConnectionCounts> {
        self.shared.counts.get(self.n).map(|counts| &counts.0)
    }

    /// Duplicates of its listeners, for another process.
    pub(super) fn duplicate_listeners(&self) -> io::Result<Vec<OwnedFd>> {
        let listeners = self.listeners.borrow();
        let all = listeners.iter().filter_map(Weak::upgrade);
        all.map(|listener| listener.as_fd().try_clone_to_owned()).collect()
    }

    /// Counts the bytes that a connection moved since the last call.
    pub(super) fn count_bytes(&self, record: &Record) {
        let (up, down) = record.moved_since();
        if (up, down) == (0, 0) {
            return;
        }
        record.route.counts.bytes(up, down);
        if let Some(endpoint) = record.connected_to() {
            endpoint.counts.bytes(up, down);
        }
        if let Some(counts) = self.counts() {
            counts.bytes(up, down);
        }
    }
}

/// A task's claim on its connection's place. Dropping it removes the connection and accounts for it, however it ends,
/// including an abort. Only a parked connection keeps its place.
#[derive(Debug)]
struct Claim {
    worker: Rc<Worker>,
    place: Place,
    /// Whether this task still has the place.
    is_ours: bool,
    outcome: Outcome,
}

impl Claim {
    fn new(worker: &Rc<Worker>, place: Place) -> Self {
        Self { worker: worker.clone(), place, is_ours: true, outcome: Outcome::Shutdown }
    }

    fn remove(&mut self) -> Option<Connection> {
        let is_ours = std::mem::take(&mut self.is_ours);
        is_ours.then(|| self.worker.connections.borrow_mut().remove(self.place)).flatten()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(connection) = self.remove() {
            self.worker.account(&connection, self.outcome);
        }
    }
}

/// A held connection, from its task's view. Dropping it accounts for the connection.
#[derive(Debug)]
pub(super) struct HeldTicket(Claim);

impl HeldTicket {
    pub(super) fn worker(&self) -> &Rc<Worker> {
        &self.0.worker
    }

    pub(super) fn place(&self) -> Place {
        self.0.place
    }

    /// Turns the connection into one of a route, unless a limit is reached.
    pub(super) fn start(
        mut self,
        captured: Captured,
        route: Arc<Route>,
        accepted: Instant,
    ) -> Option<Ticket> {
        let worker = self.0.worker.clone();
        match worker.admit(captured, route, accepted) {
            Some(live) => {
                worker.connections.borrow_mut().start_held(self.0.place, live.clone());
                Some(Ticket { claim: self.0, live })
            }
            // It was accounted for as a connection of the route.
            None => {
                self.0.remove();
                worker.ring();
                None
            }
        }
    }

    pub(super) fn end(mut self, outcome: Outcome) {
        self.0.outcome = outcome;
    }
}

/// A running connection, from its task's view. Dropping it accounts for the connection.
#[derive(Debug)]
pub(super) struct Ticket {
    claim: Claim,
    live: Rc<Live>,
}

impl Ticket {
    /// For a parked connection that runs again.
    pub(super) fn resumed(worker: &Rc<Worker>, place: Place, live: Rc<Live>) -> Self {
        Self { claim: Claim::new(worker, place), live }
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.claim.worker
    }

    pub(super) fn record(&self) -> &Record {
        &self.live.record
    }

    pub(super) fn requests(&self) -> &Requests {
        &self.live.requests
    }

    pub(super) fn place(&self) -> Place {
        self.claim.place
    }

    /// Records the endpoint of an attempt, and counts the attempt.
    pub(super) fn connecting(&self, endpoint: &Arc<EndpointState>) {
        let record = self.record();
        record.endpoint.replace(Some(endpoint.clone()));
        if record.tries.get() > 0 {
            record.route.counts.retry();
        }
        record.tries.set(record.tries.get().saturating_add(1));
    }

    /// Counts that the endpoint accepted the connection. `local`: our own address of it.
    pub(super) fn connected(&self, local: Option<SocketAddr>) {
        let record = self.record();
        record.local.set(local.map(Into::into));
        let after = record.accepted.elapsed();
        record.connect.set(Some(after));
        record.route.counts.connect.observe(after);
        if let Some(counts) = self.worker().counts() {
            counts.connect.observe(after);
        }
    }

    pub(super) fn end(mut self, outcome: Outcome) {
        self.claim.outcome = outcome;
    }

    /// Prepares the connection to continue without a task: its sockets are removed from the runtime and watched. Returns
    /// them if this works.
    pub(super) fn watch(
        &self,
        consumer: &Socket,
        endpoint: &Socket,
    ) -> io::Result<(OwnedFd, OwnedFd)> {
        let sockets = (consumer.duplicate()?, endpoint.duplicate()?);
        self.worker().idle_set.add(self.place(), [&sockets.0, &sockets.1])?;
        Ok(sockets)
    }

    /// Leaves the connection without a task until something happens to it.
    pub(super) fn park(mut self, (consumer, endpoint): (OwnedFd, OwnedFd), lease: Lease) {
        self.claim.is_ours = false;
        let worker = self.worker();
        if let Some(held) = self.requests().take_suspended() {
            worker.frozen.suspended.borrow_mut().insert(self.place(), held);
        }
        worker.parked_since_trim.update(|count| count + 1);
        worker.connections.borrow_mut().park(self.place(), lease, consumer, endpoint);
    }
}
