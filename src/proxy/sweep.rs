//! The effect of a new table on open connections: those of a removed route are reset. If a route's endpoints changed,
//! connections to a removed endpoint are reset if their binding says so. So are connections to an endpoint whose active
//! check fails.
//!
//! No connection outlives its route, because at any time the route of each connection that is not ending is in the worker's
//! table, or among the pending checks:
//!
//! - A connection starts with a route of the worker's table, in one step with the lookup in that table.
//! - A table is taken over in one step with noting its changes. A worker that has missed a table, or is too far behind,
//!   notes all routes that have connections.
//! - A route is removed from the pending checks only when its connections are ending, or the table has it.
//!
//! The current table decides, independent of the change, so the order and the number of checks of a route do not matter.
//! There may be thousands of connections to check and to reset, and each reset takes some system calls: so this is done in
//! parts, and other tasks get their turn in between.

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::yield_now, time::sleep_until};

use super::{
    connections::{Connection, Id},
    lists::Place,
    record::Record,
    worker::Worker,
};
use crate::{
    balance::{CheckResult, EndpointState},
    descriptor::{Check, Descriptor, EndpointDrain},
    outcome::Outcome,
    table::{Changes, RouteNumber, Table},
};

/// The pending checks, in this order.
#[derive(Debug, Default)]
struct Sweep {
    /// Connections whose routes are in the table, but whose endpoints may not be.
    connections: Vec<(Place, Id)>,
    /// Routes whose connections must be checked.
    routes: Vec<RouteNumber>,
    /// Tables whose changes must be checked, and how many changes of each were checked.
    tables: VecDeque<(Arc<Table>, usize)>,
}

/// Maximum time of a turn.
const TURN: Duration = Duration::from_micros(200);
/// Maximum number of connections that a turn ends: closing two sockets takes some 20 us, and running connections do so
/// after the turn.
const ENDS: usize = 8;
/// Number of removed routes of a table that are checked at once.
const ROUTES: usize = 64;
/// Maximum number of pending tables. Keeping more would cost more than checking all connections.
const BEHIND: usize = 4;

impl Worker {
    /// Takes over each table when it is published, and ends the connections that do not belong to it.
    pub(super) async fn follow(self: Rc<Self>, mut tables: watch::Receiver<Arc<Table>>) {
        let mut sweep = Sweep::default();
        let mut failed_checks = self.settings().failed_checks.listen();
        loop {
            if self.frozen.is() {
                self.frozen.over().await;
                // Meanwhile connections may have been added, with another process's table.
                self.note_all(&mut sweep);
            }
            // Its sender is part of our own settings.
            if failed_checks.has_changed().unwrap_or(false) {
                failed_checks.mark_unchanged();
                self.note_all(&mut sweep);
            }
            match tables.has_changed() {
                Ok(false) => {}
                Ok(true) => self.note(tables.borrow_and_update().clone(), &mut sweep),
                // The control plane has ended.
                Err(_) => return,
            }
            if self.turn(&mut sweep) {
                yield_now().await;
                continue;
            }
            let deadline = self.connections.borrow().next_deadline();
            let deadline = async {
                match deadline {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = tables.changed() => match changed {
                    Ok(()) => tables.mark_changed(),
                    Err(_) => return,
                },
                _ = failed_checks.changed() => failed_checks.mark_changed(),
                () = deadline => {}
            }
        }
    }

    /// Takes a table over, and notes its checks.
    fn note(&self, table: Arc<Table>, sweep: &mut Sweep) {
        let before = self.take_over(table.clone());
        if table.version == before.version + 1 && sweep.tables.len() < BEHIND {
            sweep.tables.push_back((table, 0));
        } else {
            self.note_all(sweep);
        }
    }

    /// Notes all routes that have connections.
    fn note_all(&self, sweep: &mut Sweep) {
        sweep.tables.clear();
        sweep.routes = self.connections.borrow().routes().collect();
    }

    /// Does some of the pending checks, and checks deadlines. Returns whether there are more.
    fn turn(&self, sweep: &mut Sweep) -> bool {
        let (now, mut ends) = (Instant::now(), 0);
        loop {
            if ends >= ENDS || now.elapsed() >= TURN {
                return true;
            }
            let past_deadline = self.connections.borrow().past_deadline(now);
            if let Some((place, id)) = past_deadline {
                ends += usize::from(self.look_at(place, id, now));
            } else if let Some((place, id)) = sweep.connections.pop() {
                ends += usize::from(self.look_at(place, id, now));
            } else if let Some(route) = sweep.routes.pop() {
                ends += usize::from(self.sweep_route(route, sweep));
            } else if let Some((table, done)) = sweep.tables.front_mut() {
                let Changes { removed, upstreams, .. } = table.changes();
                let routes = removed.iter().skip(*done).take(ROUTES);
                sweep.routes = routes.map(|route| route.number).collect();
                if !sweep.routes.is_empty() {
                    *done += sweep.routes.len();
                } else if let Some(upstream) = upstreams.get(*done - removed.len()) {
                    let all = self.connections.borrow();
                    sweep.routes = all.ending_with_endpoint(&upstream.query).collect();
                    *done += 1;
                } else {
                    sweep.tables.pop_front();
                }
            } else {
                return false;
            }
        }
    }

    /// For a removed route: ends one of its connections, and keeps the route for the others. For an existing route: notes
    /// its connections if they may have to end. Returns whether a connection was ended.
    fn sweep_route(&self, number: RouteNumber, sweep: &mut Sweep) -> bool {
        let all = self.connections.borrow();
        let Some(first) = all.of_route(number).next() else { return false };
        let Some(record) = all.get(first).and_then(Connection::record) else { return false };
        if !self.table.borrow().has(&record.route) {
            drop(all);
            self.end(first, Outcome::RouteGone);
            sweep.routes.push(number);
            return true;
        }
        if record.route.binding.descriptor.drain != EndpointDrain::Keep {
            let with_id = |place| Some((place, all.get(place)?.id));
            sweep.connections = all.of_route(number).filter_map(with_id).collect();
        }
        false
    }

    /// Ends a connection whose endpoint was removed, or sets its deadline. Returns whether it was ended.
    fn look_at(&self, place: Place, id: Id, now: Instant) -> bool {
        let mut all = self.connections.borrow_mut();
        // It may have ended meanwhile, and another connection may have its place.
        let connection = all.get(place).filter(|one| one.id == id && one.ending.is_none());
        let Some(record) = connection.and_then(Connection::record) else { return false };
        let outcome = match decide(record, &self.table.borrow()) {
            Decision::Stays => {
                all.set_deadline(place, None);
                return false;
            }
            Decision::EndpointGone { stays } => {
                if all.set_deadline(place, Some(now + stays)).is_none_or(|deadline| deadline > now)
                {
                    return false;
                }
                Outcome::EndpointGone
            }
            Decision::RouteGone => Outcome::RouteGone,
        };
        drop(all);
        self.end(place, outcome);
        true
    }
}

/// The consequence of a table for a connection.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Stays,
    /// How long it may stay after its endpoint was removed.
    EndpointGone {
        stays: Duration,
    },
    RouteGone,
}

fn decide(record: &Record, table: &Table) -> Decision {
    let route = &record.route;
    let Some(now) = table.route(&route.key).filter(|now| now.number == route.number) else {
        return Decision::RouteGone;
    };
    let Descriptor { drain, check, .. } = &route.binding.descriptor;
    let stays = match drain {
        EndpointDrain::Keep => return Decision::Stays,
        EndpointDrain::Kill => Duration::ZERO,
        EndpointDrain::After(time) => *time,
    };
    // The check of another binding does not affect this one.
    if (drain, check) == (&EndpointDrain::Kill, &Some(Check::Tcp))
        && record.connected_to().is_some_and(|state| state.check() == CheckResult::Fails)
    {
        return Decision::EndpointGone { stays };
    }
    let endpoint = record.endpoint.borrow();
    let is =
        |state: &Arc<EndpointState>| Some(state.endpoint) == endpoint.as_ref().map(|e| e.endpoint);
    // A connection without an endpoint will get an existing one.
    if endpoint.is_none() || table.endpoints_of(now).iter().any(is) {
        Decision::Stays
    } else {
        Decision::EndpointGone { stays }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::RefCell, collections::BTreeSet, fs::File, net::IpAddr,
        sync::atomic::Ordering::Relaxed,
    };

    use proptest::prelude::*;

    use super::*;
    use crate::{
        consumer::Consumer,
        model::Endpoint,
        proxy::{
            handover::Inherited,
            shared::Shared,
            testing::{captured, consumer, route, run, settings, table_after},
            worker::Ticket,
        },
        table::Route,
        takeover::message::{Connection as Handed, Stage},
    };

    const CONSUMERS: u8 = 4;

    fn source(n: u8) -> IpAddr {
        [172, 17, 1, n].into()
    }

    fn endpoint(n: u8) -> Endpoint {
        Endpoint(([10, 0, 0, n], 80).into())
    }

    /// The next table, with the consumers and endpoints whose bits are set.
    fn next(before: &Table, drain: &str, consumers: u8, endpoints: u8) -> Option<Table> {
        let descriptor = format!("redis;80;drain={drain}");
        let has = |bits: u8| move |n: &u8| bits & (1 << n) != 0;
        let one = |n| consumer(&format!("c{n}"), source(n), &descriptor);
        let consumers: Vec<Arc<Consumer>> =
            (0..CONSUMERS).filter(has(consumers)).map(one).collect();
        let endpoints: Vec<_> = (0..2).filter(has(endpoints)).map(endpoint).collect();
        table_after(before, &consumers, &endpoints)
    }

    /// A worker whose connections have no tasks: the test drives them.
    struct Driven {
        worker: Rc<Worker>,
        sweep: Sweep,
        running: RefCell<Vec<Ticket>>,
    }

    impl Driven {
        fn new(drain: &str) -> Self {
            let table = next(&Table::default(), drain, 0b1111, 0b11).unwrap();
            let shared = Arc::new(Shared::new(settings()));
            let worker = Worker::new(shared, 0, Arc::new(table)).unwrap();
            Self { worker, sweep: Sweep::default(), running: RefCell::default() }
        }

        /// Opens a connection of the consumer, as if it were accepted now, to an endpoint that exists now.
        fn open(&self, n: u8, parked: bool) {
            let table = self.worker.table.borrow().clone();
            let Some(route) = route(&table, source(n), 80) else { return };
            let peer = (source(n), 1).into();
            let endpoints = table.endpoints_of(&route);
            let state = endpoints.get(usize::from(n) % endpoints.len().max(1)).cloned();
            let ticket = self.worker.start(captured(peer, peer), route, Instant::now()).unwrap();
            let Some(state) = state else { return self.running.borrow_mut().push(ticket) };
            ticket.connecting(&state);
            ticket.connected(None);
            if parked {
                let socket = || File::open("/dev/null").unwrap().into();
                ticket.park((socket(), socket()), state.lease());
            } else {
                self.running.borrow_mut().push(ticket);
            }
        }

        /// Takes over a connection of the consumer from another process. Returns whether it was taken.
        fn adopt(&self, n: u8) -> bool {
            let table = self.worker.table.borrow().clone();
            let Some(route) = route(&table, source(n), 80) else { return false };
            let endpoints = table.endpoints_of(&route);
            let Some(state) = endpoints.get(usize::from(n) % endpoints.len().max(1)) else {
                return false;
            };
            let connection = Handed {
                stage: Stage::Open,
                source: (source(n), 1).into(),
                destination: (source(n), 80).into(),
                age: 0,
                owner: route.owner(),
                endpoint: Some(state.endpoint.0),
                local: None,
                connect: None,
                tries: 1,
                moved: [0; 2],
                counted: [0; 2],
                directions: None,
            };
            let sockets = [(); 2].map(|()| File::open("/dev/null").unwrap().into()).into();
            self.worker.adopt(Inherited { connection, bytes: Vec::new(), sockets })
        }

        /// Lets the aborted tasks end.
        fn tasks_end(&self) {
            let all = self.worker.connections.borrow();
            let is_ending = |ticket: &mut Ticket| {
                all.get(ticket.place()).is_none_or(|one| one.ending.is_some())
            };
            let ending: Vec<_> = self.running.borrow_mut().extract_if(.., is_ending).collect();
            drop(all);
            drop(ending);
        }

        fn sweeps_to_the_end(&mut self) {
            while self.worker.turn(&mut self.sweep) {}
            self.tasks_end();
        }

        fn live(&self) -> Vec<Arc<Route>> {
            let all = self.worker.connections.borrow();
            all.iter().filter_map(|(_, one)| Some(one.record()?.route.clone())).collect()
        }

        fn ended(&self, outcome: Outcome) -> u64 {
            self.worker.shared.tally.get(outcome)
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Tables, of which the worker sees only the last.
        Publish(Vec<(u8, u8)>),
        Open(u8, bool),
        Adopt(u8),
        Turn,
        TasksEnd,
    }

    fn step() -> impl Strategy<Value = Step> {
        let table = (0..1_u8 << CONSUMERS, 0..4_u8);
        prop_oneof![
            prop::collection::vec(table, 1..3).prop_map(Step::Publish),
            (0..CONSUMERS, any::<bool>()).prop_map(|(n, parked)| Step::Open(n, parked)),
            (0..CONSUMERS, any::<bool>()).prop_map(|(n, parked)| Step::Open(n, parked)),
            (0..CONSUMERS).prop_map(Step::Adopt),
            Just(Step::Turn),
            Just(Step::TasksEnd),
        ]
    }

    proptest! {
        /// In any order of tables, turns and new connections: those whose route was removed are reset, even if it was added
        /// again as another route, and so are those to a removed endpoint, and no others.
        #[test]
        fn no_connection_outlives_its_route(
            kill in any::<bool>(),
            steps in prop::collection::vec(step(), 1..60),
        ) {
            run(async {
                let drain = if kill { "kill" } else { "keep" };
                let mut driven = Driven::new(drain);
                let mut newest = driven.worker.table.borrow().clone();
                let (mut opened, mut adopted) = (0, 0);
                for step in steps {
                    match step {
                        Step::Publish(tables) => {
                            for (consumers, endpoints) in tables {
                                let after = next(&newest, drain, consumers, endpoints);
                                newest = after.map_or(newest, Arc::new);
                            }
                            driven.worker.note(newest.clone(), &mut driven.sweep);
                        }
                        Step::Open(n, parked) => {
                            driven.open(n, parked);
                            opened = driven.worker.shared.counts[0].0.started.load(Relaxed);
                        }
                        Step::Adopt(n) => adopted += u64::from(driven.adopt(n)),
                        Step::Turn => drop(driven.worker.turn(&mut driven.sweep)),
                        Step::TasksEnd => driven.tasks_end(),
                    }
                }
                driven.sweeps_to_the_end();
                let live = driven.live();
                assert!(live.iter().all(|route| newest.has(route)), "one outlived its route");
                if kill {
                    let all = driven.worker.connections.borrow();
                    let stays = |record| decide(record, &newest) == Decision::Stays;
                    assert!(all.iter().all(|(_, one)| one.record().is_none_or(stays)));
                }
                let gone = driven.ended(Outcome::RouteGone) + driven.ended(Outcome::EndpointGone);
                assert_eq!(opened + adopted, live.len() as u64 + gone);
                assert!(kill || driven.ended(Outcome::EndpointGone) == 0);
                let route = live.first().filter(|_| kill);
                let all = driven.worker.connections.borrow();
                let noted: BTreeSet<_> =
                    route.into_iter().flat_map(|route| all.ending_with_endpoint(&route.query)).collect();
                let numbers = live.iter().filter(|_| kill).map(|route| route.number);
                assert_eq!(noted, numbers.collect());
            });
        }
    }

    #[test]
    fn a_route_that_stays_keeps_its_connections_and_others_lose_theirs_a_few_at_a_time() {
        run(async {
            const EACH: usize = 100;
            let mut driven = Driven::new("keep");
            (0..EACH).for_each(|n| (0..2).for_each(|c| driven.open(c, n % 2 == 0)));
            let table = next(&driven.worker.table.borrow(), "keep", 0b0001, 0b11).unwrap();
            driven.worker.note(Arc::new(table), &mut driven.sweep);
            let mut turns = 0;
            while driven.worker.turn(&mut driven.sweep) {
                turns += 1;
                driven.tasks_end();
                assert!(driven.ended(Outcome::RouteGone) <= (turns * ENDS) as u64);
            }
            driven.tasks_end();
            assert!(turns >= EACH / ENDS, "{turns} turns");
            assert_eq!(driven.ended(Outcome::RouteGone), EACH as u64);
            assert!(driven.live().iter().all(|route| route.key.source == source(0)));
        });
    }

    #[test]
    fn an_endpoint_whose_check_fails_loses_its_connections_if_the_binding_says_so() {
        for (options, ends) in [
            ("kill;check=tcp", true),
            ("kill", false),
            ("60;check=tcp", false),
            ("keep;check=tcp", false),
        ] {
            run(async {
                let driven = Driven::new(options);
                (0..2).for_each(|n| driven.open(n, true));
                let (_tables, follow) = watch::channel(driven.worker.table.borrow().clone());
                let following = tokio::task::spawn_local(driven.worker.clone().follow(follow));
                let route = driven.live()[0].clone();
                let states = driven.worker.table.borrow().endpoints_of(&route).to_vec();
                // It listens from its first turn on.
                yield_now().await;
                // The check of the first consumer's endpoint fails, the check of the second's does not.
                states[0].checked(false);
                states[0].checked(false);
                states[1].checked(true);
                driven.worker.settings().failed_checks.report();
                for _ in 0..100 {
                    yield_now().await;
                }
                let gone = u64::from(ends);
                assert_eq!(driven.ended(Outcome::EndpointGone), gone, "{options}");
                assert_eq!(driven.live().len() as u64, 2 - gone, "{options}");
                following.abort();
            });
        }
    }

    #[test]
    fn a_connection_whose_endpoint_comes_back_in_time_stays() {
        run(async {
            let mut driven = Driven::new("60");
            driven.open(0, false);
            driven.open(1, true);
            for (endpoints, deadlines) in [(0b00, true), (0b11, false)] {
                let table = next(&driven.worker.table.borrow(), "60", 0b1111, endpoints).unwrap();
                driven.worker.note(Arc::new(table), &mut driven.sweep);
                driven.sweeps_to_the_end();
                let next = driven.worker.connections.borrow().next_deadline();
                assert_eq!(next.is_some(), deadlines);
            }
            assert_eq!(driven.live().len(), 2);
        });
    }

    #[test]
    fn a_connection_ends_when_the_time_without_its_endpoint_is_over() {
        run(async {
            let driven = Driven::new("1");
            driven.open(0, true);
            let table = next(&driven.worker.table.borrow(), "1", 0b1111, 0b00).unwrap();
            let (tables, follow) = watch::channel(driven.worker.table.borrow().clone());
            tokio::task::spawn_local(driven.worker.clone().follow(follow));
            let start = Instant::now();
            tables.send_replace(Arc::new(table));
            driven.worker.all_ended().await;
            assert!(start.elapsed() >= Duration::from_secs(1));
            assert_eq!(driven.ended(Outcome::EndpointGone), 1);
        });
    }
}
