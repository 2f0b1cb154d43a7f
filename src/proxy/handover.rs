//! Connections go from one process to another: a worker stands still, shows what it has, and lets go of what the other one takes.
//! The other one's workers take them while they stand still themselves, and go on with them all at once.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};

use super::{
    captured::Captured,
    connection::serve,
    connections::{Held, Live, Parked, State},
    frozen::Adopted,
    lists::Place,
    owner::Pause,
    record::Record,
    relay::{Moved, RelayRequest, Requests, Suspended},
    socket::{Socket, SocketsLeftOpen},
    worker::{Ticket, Worker},
};
use crate::{
    balance::EndpointState,
    model::{Endpoint, OriginalDestination, Port, SourceAddress},
    outcome::Outcome,
    table::{Route, RouteKey},
    takeover::message::{Connection, Direction, Stage},
};

/// A connection of this process, for another one.
#[derive(Debug)]
pub(super) struct Exported {
    pub place: Place,
    pub connection: Connection,
    /// What its directions hold, up before down.
    pub bytes: Vec<u8>,
    /// Duplicates: the consumer's, and the endpoint's if it is open.
    pub sockets: Vec<OwnedFd>,
}

/// A connection of another process.
#[derive(Debug)]
pub(super) struct Inherited {
    pub connection: Connection,
    pub bytes: Vec<u8>,
    pub sockets: Vec<OwnedFd>,
}

/// Connections of a message, and bytes that they hold, from which on the message has enough.
const AT_A_TIME: usize = 64;
const BYTES_AT_A_TIME: usize = 1 << 20;
/// How long a worker waits for its connections to stand still: each does when its task has its turn.
const SUSPEND: Duration = Duration::from_secs(2);

impl Worker {
    /// Stands still. Connections that cannot are not exported.
    pub(super) async fn freeze(&self) {
        self.frozen.begin();
        let suspend = async {
            for round in 0.. {
                let mut moving = 0;
                for (place, one) in self.connections.borrow().iter() {
                    if let State::Running(running) = &one.state
                        && one.ending.is_none()
                        && !self.frozen.is_laid_out(place)
                    {
                        running.live.requests.ask(RelayRequest::Suspend);
                        moving += 1;
                    }
                }
                match (moving, round) {
                    (0, _) => return,
                    (_, 0..64) => yield_now().await,
                    _ => sleep(Duration::from_millis(1)).await,
                }
            }
        };
        if timeout(SUSPEND, suspend).await.is_err() {
            tracing::debug!(worker = self.n, "some connections cannot be suspended");
        }
        self.connections.borrow().iter().filter_map(|(_, one)| one.record()).for_each(|record| {
            self.count_bytes(record);
        });
    }

    /// Goes on with everything.
    pub(super) fn thaw(self: &Rc<Self>) {
        let Some(since) = self.frozen.end() else { return };
        // What waited to be accepted may be older than its route.
        self.pause.set(Some(Pause::ended(self.pause.get(), since)));
        let suspended: Vec<_> = self.frozen.suspended.borrow().keys().copied().collect();
        suspended.into_iter().for_each(|place| self.resume(place));
        for waiting in self.frozen.adopted.take() {
            match waiting {
                Adopted::Connecting(place, live, consumer) => {
                    let ticket = Ticket::resumed(self, place, live);
                    match Socket::resumed(consumer) {
                        Ok(consumer) => self.run(place, serve(ticket, consumer)),
                        Err(error) => {
                            tracing::debug!(%error, "cannot go on with a connection");
                            ticket.end(Outcome::LocalReset);
                        }
                    }
                }
                Adopted::Held(captured, consumer) => match Socket::resumed(consumer) {
                    Ok(consumer) => self.hold_again(consumer, captured),
                    Err(error) => tracing::debug!(%error, "cannot go on with a held connection"),
                },
            }
        }
    }

    /// Some of the connections that stand still, from a place on; and the place of the next ones.
    pub(super) fn export(&self, from: usize) -> (Vec<Exported>, Option<usize>) {
        let all = self.connections.borrow();
        let (mut exported, mut bytes) = (Vec::new(), 0);
        for place in from..all.places() {
            if exported.len() == AT_A_TIME || bytes >= BYTES_AT_A_TIME {
                return (exported, Some(place));
            }
            let place = Place::new(place);
            let Some(one) = all.get(place).filter(|one| one.ending.is_none()) else { continue };
            let Some(one) = self.show(place, &one.state) else { continue };
            bytes += one.bytes.len();
            exported.push(one);
        }
        (exported, None)
    }

    /// `None`: it does not stand still, or there are too few descriptors.
    fn show(&self, place: Place, state: &State) -> Option<Exported> {
        match state {
            State::Held(Held { captured, accepted, socket, .. }) => {
                let connection = of_captured(Stage::Held, captured, *accepted);
                let sockets = vec![socket.as_ref()?.try_clone().ok()?];
                Some(Exported { place, connection, bytes: Vec::new(), sockets })
            }
            State::Running(running) => {
                let sockets = vec![self.frozen.laid_out(place)?];
                let connection = of_record(Stage::Connecting, &running.live.record);
                Some(Exported { place, connection, bytes: Vec::new(), sockets })
            }
            State::Parked(Parked { record, consumer, endpoint, .. }) => {
                let sockets = vec![consumer.try_clone().ok()?, endpoint.try_clone().ok()?];
                let mut connection = of_record(Stage::Open, record);
                let mut bytes = Vec::new();
                if let Some(both) = self.frozen.suspended.borrow().get(&place) {
                    connection.directions = Some(both.each_ref().map(|one| {
                        bytes.extend(&one.bytes);
                        Direction {
                            bytes: one.bytes.len() as u32,
                            finished: one.finished,
                            told: one.told,
                            goodbye: one.goodbye,
                        }
                    }));
                }
                Some(Exported { place, connection, bytes, sockets })
            }
        }
    }

    /// Lets go of connections that another process has.
    pub(super) async fn let_go_of(&self, places: Vec<Place>) {
        for place in &places {
            self.frozen.suspended.borrow_mut().remove(place);
        }
        let _untouched = SocketsLeftOpen::begin();
        places.iter().for_each(|place| self.let_go(*place));
        // All others stand still meanwhile, so nothing else is dropped.
        while self.connections.borrow().iter().any(|(_, one)| one.handed_over) {
            yield_now().await;
        }
    }

    /// Takes a connection of another process, if it has the route here that it had there. It is open already: no limit refuses it.
    pub(super) fn adopt(&self, inherited: Inherited) -> bool {
        self.try_adopt(inherited).is_some()
    }

    fn try_adopt(&self, Inherited { connection, bytes, sockets }: Inherited) -> Option<()> {
        let captured = Captured {
            source: SourceAddress(connection.source),
            destination: OriginalDestination(connection.destination),
            is_direct: false,
        };
        let mut sockets = sockets.into_iter();
        let consumer = sockets.next()?;
        if connection.stage == Stage::Held {
            self.frozen.adopted.borrow_mut().push(Adopted::Held(captured, consumer));
            return Some(());
        }
        let route = self.route_of_owner(&connection)?;
        let to = match connection.stage {
            Stage::Open => Some((sockets.next()?, connection.endpoint?)),
            Stage::Held | Stage::Connecting => None,
        };
        // What it counts beyond being open was counted by the other process.
        self.shared.count_in_adopted(&route);
        route.counts.adopt();
        let record = record(&connection, captured, route.clone());
        let Some((endpoint, to)) = to else {
            let live = Rc::new(Live { record, requests: Requests::default() });
            let place = self.connections.borrow_mut().start(live.clone());
            self.frozen.adopted.borrow_mut().push(Adopted::Connecting(place, live, consumer));
            return Some(());
        };
        let state = self.endpoint(&route, Endpoint(to));
        record.endpoint.replace(Some(state.clone()));
        let lease = state.lease();
        let mut all = self.connections.borrow_mut();
        let place = all.adopt(Parked { record, lease, consumer, endpoint });
        let is_watched = || match all.get(place).map(|one| &one.state) {
            Some(State::Parked(Parked { consumer, endpoint, .. })) => {
                self.idle_set.add(place, [consumer, endpoint]).is_ok()
            }
            _ => false,
        };
        let held = match suspended(&connection, &bytes) {
            Some(held) => Some(held),
            None if is_watched() => None,
            // Without a place in the set it goes on at once, with a task.
            None => Some(Box::default()),
        };
        if let Some(held) = held {
            self.frozen.suspended.borrow_mut().insert(place, held);
        }
        Some(())
    }

    fn route_of_owner(&self, connection: &Connection) -> Option<Arc<Route>> {
        let port = Port::new(connection.destination.port())?;
        let table = self.table.borrow();
        let route = table.route(&RouteKey::tcp(connection.source.ip(), port))?;
        route.is_of(&connection.owner).then(|| route.clone())
    }

    fn endpoint(&self, route: &Route, endpoint: Endpoint) -> Arc<EndpointState> {
        let found = self.table.borrow().state(&route.query, endpoint).cloned();
        // One that the service does not have any more: its connections may stay.
        found.unwrap_or_else(|| Arc::new(EndpointState::new(endpoint)))
    }
}

fn of_captured(stage: Stage, captured: &Captured, accepted: Instant) -> Connection {
    Connection {
        stage,
        source: captured.source.0,
        destination: captured.destination.0,
        age: micros(accepted.elapsed()),
        owner: Default::default(),
        endpoint: None,
        local: None,
        connect: None,
        tries: 0,
        moved: [0; 2],
        counted: [0; 2],
        directions: None,
    }
}

fn of_record(stage: Stage, record: &Record) -> Connection {
    let both = |moved: &Moved| [moved.up.get(), moved.down.get()];
    Connection {
        owner: record.route.owner(),
        endpoint: record.endpoint.borrow().as_ref().map(|state| state.endpoint.0),
        local: record.local.get().map(SocketAddr::from),
        connect: record.connect.get().map(micros),
        tries: record.tries.get(),
        moved: both(&record.moved),
        counted: both(&record.counted),
        ..of_captured(stage, &record.captured, record.accepted)
    }
}

/// The record that the other process had.
fn record(connection: &Connection, captured: Captured, route: Arc<Route>) -> Record {
    let now = Instant::now();
    // The host may have been started later than that.
    let accepted = now.checked_sub(Duration::from_micros(connection.age)).unwrap_or(now);
    let record = Record::new(route, captured, accepted);
    record.local.set(connection.local.map(Into::into));
    record.connect.set(connection.connect.map(Duration::from_micros));
    if connection.stage == Stage::Open {
        record.tries.set(connection.tries);
        // It was open there.
        record.connect.set(record.connect.get().or(Some(Duration::ZERO)));
    }
    for (mine, theirs) in [(&record.moved, connection.moved), (&record.counted, connection.counted)]
    {
        mine.up.set(theirs[0]);
        mine.down.set(theirs[1]);
    }
    record
}

/// What its directions held. `None`: nothing, and both sides are open.
fn suspended(connection: &Connection, bytes: &[u8]) -> Option<Box<[Suspended; 2]>> {
    let [up, down] = connection.directions.filter(|both| *both != [Direction::default(); 2])?;
    let (of_up, of_down) = bytes.split_at_checked(up.bytes as usize)?;
    let suspended = |direction: Direction, bytes: &[u8]| Suspended {
        bytes: bytes.to_vec(),
        finished: direction.finished,
        told: direction.told,
        goodbye: direction.goodbye,
    };
    Some(Box::new([suspended(up, of_up), suspended(down, of_down)]))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        task::spawn_local,
    };

    use super::*;
    use crate::{
        model::ConsumerId,
        proxy::{
            settings::ProxySettings,
            shared::Shared,
            testing::{captured, connection, consumer_of, route, run, settings, table_after},
        },
        table::Table,
    };

    const SOURCE: &str = "172.17.0.2:4000";
    const STRANGER: &str = "172.17.0.9:4000";
    const DESTINATION: &str = "172.17.0.1:6379";

    /// The worker of another process: its table has these sources, and these endpoints. Without any, discovery has not answered.
    fn worker(sources: &[&str], endpoints: &[Endpoint]) -> Rc<Worker> {
        let local = |source: &&str| {
            let source: SocketAddr = source.parse().unwrap();
            consumer_of(ConsumerId::Local, "a", source.ip(), "redis;6379")
        };
        let consumers: Vec<_> = sources.iter().map(local).collect();
        let table = table_after(&Table::default(), &consumers, endpoints).unwrap();
        let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
        let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table)).unwrap();
        spawn_local(worker.clone().resume_woken());
        let sending = worker.clone();
        spawn_local(async move { sending.buffers.send_queued().await });
        worker
    }

    /// A connection as it is let in.
    async fn dialled(worker: &Rc<Worker>, source: &str) -> TcpStream {
        let (client, accepted) = connection().await;
        let captured = captured(source.parse().unwrap(), DESTINATION.parse().unwrap());
        let table = worker.table.borrow().clone();
        match route(&table, captured.source.0.ip(), 6379) {
            Some(route) => worker.let_in_to(Socket::new(accepted), captured, route),
            None => worker.hold_again(Socket::new(accepted), captured),
        }
        client
    }

    /// Moves all connections. How many were taken, and how many not.
    async fn hand_over(from: &Rc<Worker>, to: &Rc<Worker>) -> (usize, usize) {
        to.frozen.begin();
        from.freeze().await;
        let (exported, rest) = from.export(0);
        assert_eq!(rest, None);
        let (mut taken, mut left) = (Vec::new(), 0);
        for Exported { place, connection, bytes, sockets } in exported {
            match to.adopt(Inherited { connection, bytes, sockets }) {
                true => taken.push(place),
                false => left += 1,
            }
        }
        let count = taken.len();
        from.let_go_of(taken).await;
        from.thaw();
        to.thaw();
        (count, left)
    }

    async fn passes(one: &mut TcpStream, other: &mut TcpStream) {
        for _ in 0..2 {
            one.write_all(b"x").await.unwrap();
            other.read_exact(&mut [0]).await.unwrap();
            other.write_all(b"y").await.unwrap();
            one.read_exact(&mut [0]).await.unwrap();
        }
    }

    #[test]
    fn open_opening_and_held_connections_go_on_in_another_process() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(listener.local_addr().unwrap());
            let (old, new) =
                (worker(&[SOURCE], &[endpoint]), worker(&[SOURCE, STRANGER], &[endpoint]));
            let mut client = dialled(&old, SOURCE).await;
            let mut server = listener.accept().await.unwrap().0;
            passes(&mut client, &mut server).await;
            // The last bytes before the end of one direction, which nobody has read yet.
            client.write_all(b"last").await.unwrap();
            client.shutdown().await.unwrap();
            let mut held = dialled(&old, STRANGER).await;
            assert_eq!(hand_over(&old, &new).await, (2, 0));

            let mut heard = String::new();
            server.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "last");
            server.write_all(b"answer").await.unwrap();
            drop(server);
            heard.clear();
            // An end, and no reset: neither process has left an option of the socket behind.
            client.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "answer");
            let mut server = listener.accept().await.unwrap().0;
            passes(&mut held, &mut server).await;
            let live = |worker: &Rc<Worker>| worker.shared.live.load(Relaxed);
            assert_eq!((live(&old), old.shared.held()), (0, 0));
            assert_eq!(old.shared.tally.sum(), 0, "its end there was none");
            old.all_ended().await;
            drop((held, server));
            new.all_ended().await;
            assert_eq!((live(&new), new.shared.tally.get(Outcome::Closed)), (0, 2));
        });
    }

    #[test]
    fn a_connection_without_an_endpoint_yet_gets_one_from_the_process_that_takes_it() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(listener.local_addr().unwrap());
            // Nobody answers there: what is sent to it goes nowhere.
            let nowhere = Endpoint("127.0.0.1:1".parse().unwrap());
            let (old, new) = (worker(&[SOURCE], &[nowhere]), worker(&[SOURCE], &[endpoint]));
            old.frozen.begin();
            let mut client = dialled(&old, SOURCE).await;
            client.write_all(b"early").await.unwrap();
            while old.frozen.laid_out(Place::new(0)).is_none() {
                yield_now().await;
            }
            assert_eq!(hand_over(&old, &new).await, (1, 0));
            let mut server = listener.accept().await.unwrap().0;
            let mut early = [0; 5];
            server.read_exact(&mut early).await.unwrap();
            assert_eq!(&early, b"early");
            passes(&mut client, &mut server).await;
            assert_eq!(old.shared.live.load(Relaxed), 0);
        });
    }

    #[test]
    fn what_the_other_process_has_no_route_for_goes_on_here() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(listener.local_addr().unwrap());
            let (old, new) = (worker(&[SOURCE], &[endpoint]), worker(&[STRANGER], &[endpoint]));
            let mut client = dialled(&old, SOURCE).await;
            let mut server = listener.accept().await.unwrap().0;
            passes(&mut client, &mut server).await;
            for _ in 0..3 {
                assert_eq!(hand_over(&old, &new).await, (0, 1));
                passes(&mut client, &mut server).await;
            }
            assert_eq!((old.shared.live.load(Relaxed), new.shared.live.load(Relaxed)), (1, 0));
        });
    }

    #[test]
    fn counts_and_leases_are_those_of_the_process_that_has_the_connection() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(listener.local_addr().unwrap());
            let (old, new) = (worker(&[SOURCE], &[endpoint]), worker(&[SOURCE], &[endpoint]));
            let mut client = dialled(&old, SOURCE).await;
            let mut server = listener.accept().await.unwrap().0;
            passes(&mut client, &mut server).await;
            hand_over(&old, &new).await;
            passes(&mut client, &mut server).await;
            let state = |worker: &Rc<Worker>| {
                // The host's VIP has a route too.
                let source = SOURCE.parse::<SocketAddr>().unwrap().ip();
                let route = route(&worker.table.borrow(), source, 6379).unwrap();
                let bytes_up = route.counts.bytes_up.load(Relaxed);
                let state = worker.table.borrow().endpoints_of(&route)[0].clone();
                let ended = state.counts.ended.sum();
                (route.live_of_consumer.load(Relaxed), state.active(), ended, bytes_up)
            };
            assert_eq!((state(&old), state(&new)), ((0, 0, 0, 2), (1, 1, 0, 0)));
            drop((client, server));
            new.all_ended().await;
            // Bytes that the other process has counted are not counted again.
            assert_eq!(state(&new), (0, 0, 1, 2));
        });
    }
}
