//! The connections of a worker. Each has one place in one slab from its accept to its end, and a state. No I/O.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use slab::Slab;
use tokio::task::AbortHandle;

use super::{
    captured::Captured,
    lists::{List, Lists, Place},
    record::Record,
    relay::Requests,
    shared::HoldPermit,
};
use crate::{
    balance::Lease, descriptor::EndpointDrain, discovery::Query, outcome::Outcome,
    table::RouteNumber,
};

/// A connection's number, which no other connection of its worker has or had.
pub(super) type Id = u64;

#[derive(Debug)]
pub(super) struct Connection {
    pub id: Id,
    pub state: State,
    /// Its endpoint went away, and it is reset at this moment.
    deadline: Option<Instant>,
    /// What serves it; a parked one has none.
    task: Option<AbortHandle>,
    /// Why its task was aborted.
    pub ending: Option<Outcome>,
    /// Another process has it: its end here is no end.
    pub handed_over: bool,
}

#[derive(Debug)]
pub(super) enum State {
    /// It waits until its owner is known.
    Held(Held),
    /// It is being connected or relayed.
    Running(Running),
    /// It idles, without a task.
    Parked(Parked),
}

#[derive(Debug)]
pub(super) struct Held {
    pub captured: Captured,
    pub accepted: Instant,
    /// The same socket as its task has, for a process that takes over; `None` if that could not be had.
    pub socket: Option<OwnedFd>,
    _permit: HoldPermit,
}

#[derive(Debug)]
pub(super) struct Running {
    pub live: Rc<Live>,
    /// Bytes that it had moved when it was looked at last.
    pub seen: Option<u64>,
    /// The last round in which it was looked at.
    round: u32,
}

/// What a running connection's task and its place share.
#[derive(Debug)]
pub(super) struct Live {
    pub record: Record,
    pub requests: Requests,
}

/// A connection without a task. Nothing of it waits to be passed on, and neither side has finished, unless it stands still for a
/// takeover. Dropping it resets both sides.
#[derive(Debug)]
pub(super) struct Parked {
    pub record: Record,
    pub lease: Lease,
    pub consumer: OwnedFd,
    pub endpoint: OwnedFd,
}

// What an idle connection costs besides its sockets. Nothing of it lies elsewhere, so that what running ones give back is
// in one piece. The neighbours in two lists are 32 bytes more.
const _: () = assert!(size_of::<Connection>() <= 240);

impl Held {
    pub(super) fn new(captured: Captured, socket: Option<OwnedFd>, permit: HoldPermit) -> Self {
        Self { captured, accepted: Instant::now(), socket, _permit: permit }
    }
}

impl Connection {
    fn new(id: Id, state: State) -> Self {
        Self { id, state, deadline: None, task: None, ending: None, handed_over: false }
    }

    /// What it did; `None` while it has no route.
    pub(super) fn record(&self) -> Option<&Record> {
        match &self.state {
            State::Held(_) => None,
            State::Running(running) => Some(&running.live.record),
            State::Parked(parked) => Some(&parked.record),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Connections {
    all: Slab<Connection>,
    next_id: Id,
    /// Those of each route that are not ending.
    of_route: HashMap<RouteNumber, Option<List>>,
    route_lists: Lists,
    /// The routes of those that end with their endpoint, by what they ask for.
    ending_with_endpoint: HashMap<Arc<Query>, BTreeSet<RouteNumber>>,
    /// Those that run and are not ending: first those that this round has not looked at.
    running: Option<List>,
    running_list: Lists,
    round: u32,
    deadlines: BTreeSet<(Instant, Place)>,
    /// Connections with a lower number were open when [`Connections::mark`] was called, and so many of them still are.
    mark: Id,
    marked: usize,
}

impl Connections {
    /// Marks all that are open now.
    pub(super) fn mark(&mut self) {
        (self.mark, self.marked) = (self.next_id, self.all.len());
    }

    /// Whether a connection was open when [`Connections::mark`] was called.
    pub(super) fn is_marked(&self, connection: &Connection) -> bool {
        connection.id < self.mark
    }

    /// The number of marked connections that are still open.
    pub(super) fn marked(&self) -> usize {
        self.marked
    }

    /// A place for a connection that waits until its owner is known.
    pub(super) fn hold(&mut self, held: Held) -> Place {
        self.insert(State::Held(held))
    }

    /// A place for a connection that starts to run.
    pub(super) fn start(&mut self, live: Rc<Live>) -> Place {
        let running = self.running(live, None);
        let place = self.insert(State::Running(running));
        self.enter_lists(place);
        place
    }

    /// A held connection starts to run.
    pub(super) fn start_held(&mut self, place: Place, live: Rc<Live>) {
        let running = self.running(live, None);
        if let Some(connection) = self.all.get_mut(place.get()) {
            connection.state = State::Running(running);
            self.enter_lists(place);
        }
    }

    /// A running connection goes on without a task.
    pub(super) fn park(
        &mut self,
        place: Place,
        lease: Lease,
        consumer: OwnedFd,
        endpoint: OwnedFd,
    ) {
        let Some(connection) = self.all.get_mut(place.get()) else { return };
        if let State::Running(running) = &connection.state {
            let record = running.live.record.clone();
            connection.state = State::Parked(Parked { record, lease, consumer, endpoint });
            connection.task = None;
            self.running_list.remove(&mut self.running, place);
        }
    }

    /// A place for a parked connection of another process.
    pub(super) fn adopt(&mut self, parked: Parked) -> Place {
        let place = self.insert(State::Parked(parked));
        self.enter_route(place);
        place
    }

    /// A parked connection goes on with a task, which is given by [`Connections::set_task`]. `None` if none is parked
    /// there.
    pub(super) fn resume(&mut self, place: Place) -> Option<(Parked, Rc<Live>)> {
        let State::Parked(parked) = &self.all.get(place.get())?.state else { return None };
        let (record, seen) = (parked.record.clone(), parked.record.moved.both());
        let live = Rc::new(Live { record, requests: Requests::default() });
        let running = State::Running(self.running(live.clone(), Some(seen)));
        let before = std::mem::replace(&mut self.all.get_mut(place.get())?.state, running);
        self.running_list.push_back(&mut self.running, place);
        match before {
            State::Parked(parked) => Some((parked, live)),
            State::Held(_) | State::Running(_) => None,
        }
    }

    pub(super) fn set_task(&mut self, place: Place, task: AbortHandle) {
        if let Some(connection) = self.all.get_mut(place.get()) {
            connection.task = Some(task);
        }
    }

    /// Ends a connection, unless it is ending already. A parked one is taken out; the task of any other is aborted, and
    /// [removes](Connections::remove) it when that takes effect.
    pub(super) fn end(&mut self, place: Place, outcome: Outcome) -> Option<Connection> {
        let connection = self.all.get(place.get()).filter(|one| one.ending.is_none())?;
        if matches!(connection.state, State::Parked(_)) {
            return self.remove(place);
        }
        self.leave_lists(place);
        let connection = self.all.get_mut(place.get())?;
        connection.ending = Some(outcome);
        if let Some(task) = &connection.task {
            // It resets both sockets when its future is dropped, in this thread's next round.
            task.abort();
        }
        None
    }

    /// Lets go of a connection that another process has. A parked one is taken out; the task of any other is aborted, and
    /// [removes](Connections::remove) it when that takes effect.
    pub(super) fn let_go(&mut self, place: Place) -> Option<Connection> {
        self.all.get_mut(place.get())?.handed_over = true;
        // That it is handed over says how it ends.
        self.end(place, Outcome::Shutdown)
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, place: Place) -> Option<Connection> {
        if self.all.get(place.get())?.ending.is_none() {
            self.leave_lists(place);
        }
        let connection = self.all.try_remove(place.get())?;
        if connection.id < self.mark {
            self.marked -= 1;
        }
        Some(connection)
    }

    pub(super) fn get(&self, place: Place) -> Option<&Connection> {
        self.all.get(place.get())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// All places, of which many may be empty.
    pub(super) fn places(&self) -> usize {
        self.all.capacity()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Place, &Connection)> {
        self.all.iter().map(|(place, connection)| (Place::new(place), connection))
    }

    /// The routes that have connections which are not ending.
    pub(super) fn routes(&self) -> impl ExactSizeIterator<Item = RouteNumber> {
        self.of_route.keys().copied()
    }

    /// The routes to a query's endpoints whose connections end with their endpoint.
    pub(super) fn ending_with_endpoint(&self, query: &Query) -> impl Iterator<Item = RouteNumber> {
        self.ending_with_endpoint.get(query).into_iter().flatten().copied()
    }

    /// A route's connections that are not ending.
    pub(super) fn of_route(&self, route: RouteNumber) -> impl Iterator<Item = Place> {
        self.route_lists.iter(self.of_route.get(&route).copied().flatten())
    }

    /// Has a connection end at a moment, or not any more. A moment that is set already stands: the one that counts.
    pub(super) fn set_deadline(
        &mut self,
        place: Place,
        deadline: Option<Instant>,
    ) -> Option<Instant> {
        let connection = self.all.get_mut(place.get())?;
        match (connection.deadline, deadline) {
            (None, Some(deadline)) => {
                self.deadlines.insert((deadline, place));
                connection.deadline = Some(deadline);
            }
            (Some(before), None) => {
                self.deadlines.remove(&(before, place));
                connection.deadline = None;
            }
            (None, None) | (Some(_), Some(_)) => {}
        }
        connection.deadline
    }

    /// The first deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// A connection whose deadline is over.
    pub(super) fn past_deadline(&self, now: Instant) -> Option<(Place, Id)> {
        let (_, place) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now)?;
        Some((*place, self.get(*place)?.id))
    }

    /// Has [`Connections::next_running`] begin with all that run now.
    pub(super) fn begin_round(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    /// The next running connection that this round has not looked at.
    pub(super) fn next_running(&mut self) -> Option<&mut Running> {
        let place = self.running?.first;
        match &self.all.get(place.get())?.state {
            State::Running(running) if running.round != self.round => {}
            _ => return None,
        }
        self.running_list.remove(&mut self.running, place);
        self.running_list.push_back(&mut self.running, place);
        match &mut self.all.get_mut(place.get())?.state {
            State::Running(running) => {
                running.round = self.round;
                Some(running)
            }
            State::Held(_) | State::Parked(_) => None,
        }
    }

    /// Frees memory if most places are empty.
    pub(super) fn shrink(&mut self) {
        if self.all.capacity() / 4 > self.all.len() {
            self.all.shrink_to_fit();
        }
        if self.of_route.capacity() / 4 > self.of_route.len() {
            self.of_route.shrink_to_fit();
        }
        if self.ending_with_endpoint.capacity() / 4 > self.ending_with_endpoint.len() {
            self.ending_with_endpoint.shrink_to_fit();
        }
    }

    fn running(&self, live: Rc<Live>, seen: Option<u64>) -> Running {
        Running { live, seen, round: self.round }
    }

    fn insert(&mut self, state: State) -> Place {
        let id = self.next_id;
        self.next_id += 1;
        Place::new(self.all.insert(Connection::new(id, state)))
    }

    /// A connection has got its route, and runs.
    fn enter_lists(&mut self, place: Place) {
        self.enter_route(place);
        self.running_list.push_back(&mut self.running, place);
    }

    /// A connection has its route.
    fn enter_route(&mut self, place: Place) {
        let Some(record) = self.all.get(place.get()).and_then(Connection::record) else { return };
        let route = &record.route;
        let list = self.of_route.entry(route.number).or_default();
        if list.is_none() && route.binding.descriptor.drain != EndpointDrain::Keep {
            self.ending_with_endpoint.entry(route.query.clone()).or_default().insert(route.number);
        }
        self.route_lists.push_back(list, place);
    }

    fn leave_lists(&mut self, place: Place) {
        self.set_deadline(place, None);
        let Some(connection) = self.all.get(place.get()) else { return };
        if matches!(connection.state, State::Running(_)) {
            self.running_list.remove(&mut self.running, place);
        }
        if let Some(record) = connection.record()
            && let Entry::Occupied(mut list) = self.of_route.entry(record.route.number)
        {
            self.route_lists.remove(list.get_mut(), place);
            if list.get().is_none() {
                list.remove();
                if let Entry::Occupied(mut routes) =
                    self.ending_with_endpoint.entry(record.route.query.clone())
                {
                    routes.get_mut().remove(&record.route.number);
                    if routes.get().is_empty() {
                        routes.remove();
                    }
                }
            }
        }
    }
}
