//! Admission: an accepted connection gets its route or is reset. It waits while its owner is not known or not certain.

use std::{
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::{spawn_local, yield_now},
    time::sleep_until,
};

use super::{
    captured::Captured,
    connection::serve,
    listener::{self, AcceptBackoff},
    lists::Place,
    owner::{self, Doubt, Pause},
    shared::HoldPermit,
    socket::Socket,
    worker::{HeldTicket, Worker},
};
use crate::{model::SourceAddress, outcome::Outcome, table::Route};

impl Worker {
    /// Maximum number of connections accepted in a row, so that many new ones do not delay the relaying of others.
    const IN_A_ROW: usize = 4;

    pub(super) async fn accept(self: Rc<Self>, listener: Rc<TcpListener>) {
        let mut backoff = AcceptBackoff::default();
        let mut in_a_row = 0;
        // A listener without an address has no port to connect to.
        let port = listener.local_addr().map_or(0, |address| address.port());
        loop {
            while let Some(end) = self.shortage.get().filter(|end| *end > Instant::now()) {
                self.pause_until(end).await;
            }
            match listener.accept().await {
                Ok((stream, peer)) => {
                    backoff.reset();
                    self.recognise(stream, peer, port);
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

    /// Accepts what waits in a listener's queue, which closing the listener would reset.
    pub(super) fn accept_queued(self: &Rc<Self>, listener: &TcpListener) {
        let port = listener.local_addr().map_or(0, |address| address.port());
        for (stream, peer) in listener::queued(listener) {
            self.recognise(stream, peer, port);
        }
    }

    async fn pause_until(&self, end: Instant) {
        let start = Instant::now();
        sleep_until(end.into()).await;
        self.pause.set(Some(Pause::ended(self.pause.get(), start)));
    }

    fn recognise(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, port: u16) {
        let socket = Socket::new(stream);
        match Captured::of(&socket.stream, peer, port) {
            Ok(captured) => self.let_in(socket, captured),
            Err(outcome) => self.refuse(SourceAddress(peer), None, None, outcome),
        }
    }

    /// Starts a connection that has a route; any other is reset at once, except one that may soon have one.
    fn let_in(self: &Rc<Self>, socket: Socket, captured: Captured) {
        let outcome = match self.route_of(&captured) {
            Ok(route) => return self.let_in_to(socket, captured, route),
            Err(outcome) => outcome,
        };
        let source = captured.source;
        if outcome == Outcome::UnknownConsumer
            && self.table.borrow().may_become_known(&source.0.ip())
            && let Some(permit) = HoldPermit::for_unknown(&self.shared)
        {
            let ticket = self.hold(captured, permit);
            return self.run(ticket.place(), wait(ticket, socket, captured, None));
        }
        self.refuse(source, Some(captured.destination), None, outcome);
    }

    /// Whether a route's owner has lost the address, and no event told of that: the next one to have it may have opened this.
    /// That costs a look at the owner's network after an interface of this host has gone, and nothing otherwise.
    fn has_lost(&self, route: &Route, source: IpAddr) -> bool {
        const MOST: usize = 100_000;
        let moves = self.settings().lookup.moves();
        if self.checked.borrow().get(&source).copied().unwrap_or_default() == moves {
            return false;
        }
        let has_lost = owner::has_lost(route, source);
        if !has_lost {
            let mut checked = self.checked.borrow_mut();
            if checked.len() >= MOST {
                checked.clear();
            }
            checked.insert(source, moves);
        }
        has_lost
    }

    /// Starts a connection, unless it may be one that the address's former owner opened.
    pub(super) fn let_in_to(
        self: &Rc<Self>,
        socket: Socket,
        captured: Captured,
        route: Arc<Route>,
    ) {
        let now = Instant::now();
        if self.has_lost(&route, captured.source.0.ip()) {
            let Some(permit) = HoldPermit::for_doubted(&self.shared) else {
                let Captured { source, destination, .. } = captured;
                return self.refuse(source, Some(destination), None, Outcome::UnknownConsumer);
            };
            let ticket = self.hold(captured, permit);
            return self.run(ticket.place(), wait(ticket, socket, captured, Some(route)));
        }
        match owner::doubt(&route, self.pause.get(), now) {
            None => {}
            // It may have waited until a moment ago to become known, and is served like those that do so here.
            Some(Doubt::New) if !owner::has_hung_up(&socket.stream) => {}
            Some(_) => {
                let Some(permit) = HoldPermit::for_doubted(&self.shared) else {
                    let Captured { source, destination, .. } = captured;
                    let outcome = Outcome::UnknownConsumer;
                    return self.refuse(source, Some(destination), None, outcome);
                };
                let ticket = self.hold(captured, permit);
                return self.run(ticket.place(), identify(ticket, socket, captured, route, now));
            }
        }
        if let Some(ticket) = self.start(captured, route, now) {
            self.run(ticket.place(), serve(ticket, socket));
        }
    }

    fn route_of(&self, captured: &Captured) -> Result<Arc<Route>, Outcome> {
        captured.route(&self.table.borrow(), &self.settings().destinations)
    }

    /// Gives a connection its task. It has its place already: the task may be aborted before it runs for the first time.
    fn run(&self, place: Place, task: impl Future<Output = ()> + 'static) {
        let task = spawn_local(task).abort_handle();
        self.connections.borrow_mut().set_task(place, task);
    }
}

/// Waits until the container is known: its first connection may arrive before the engine's event. `former`: the route of the
/// one who had the address before.
async fn wait(ticket: HeldTicket, socket: Socket, captured: Captured, former: Option<Arc<Route>>) {
    let (worker, accepted) = (ticket.worker().clone(), Instant::now());
    let deadline = accepted + worker.settings().hold;
    worker.settings().lookup.ask();
    loop {
        // Looked up before the first wait too: the table may have come since this connection was accepted.
        let route = worker.route_of(&captured);
        let is_former = |route: &Arc<Route>| {
            former.as_ref().is_some_and(|former| former.number == route.number)
        };
        match route {
            Ok(route) if is_former(&route) => {
                if !worker.another_table(deadline).await {
                    return ticket.end(Outcome::UnknownConsumer);
                }
            }
            // It has sent all it has to say; or who opened it is gone, and its address another's by now.
            Ok(route)
                if owner::doubt(&route, worker.pause.get(), accepted) == Some(Doubt::Waited)
                    || owner::has_hung_up(&socket.stream) =>
            {
                return identify(ticket, socket, captured, route, accepted).await;
            }
            Ok(route) => return start_held(ticket, socket, captured, route, accepted).await,
            Err(Outcome::UnknownConsumer) if worker.another_table(deadline).await => {}
            Err(outcome) => return ticket.end(outcome),
        }
    }
}

/// Starts a connection if it is certain that the route's owner opened it.
async fn identify(
    ticket: HeldTicket,
    socket: Socket,
    captured: Captured,
    route: Arc<Route>,
    accepted: Instant,
) {
    // The table may be another by then.
    if owner::is_owners(&route, &captured).await && ticket.worker().table.borrow().has(&route) {
        return start_held(ticket, socket, captured, route, accepted).await;
    }
    ticket.end(Outcome::UnknownConsumer);
}

async fn start_held(
    ticket: HeldTicket,
    socket: Socket,
    captured: Captured,
    route: Arc<Route>,
    accepted: Instant,
) {
    if let Some(ticket) = ticket.start(captured, route, accepted) {
        serve(ticket, socket).await;
    }
}

/// A connection is not admitted by a route of the address's next owner.
#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        net::Shutdown,
        sync::atomic::Ordering::Relaxed,
        time::Duration,
    };

    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::{
        model::{ConsumerId, ContainerId, Endpoint, Process, RunEnd},
        proxy::{
            connections::{Connection, State},
            settings::ProxySettings,
            shared::Shared,
            testing::{
                captured, connection, consumer, consumer_of, run, settings, shared, table,
                table_after, table_of,
            },
        },
    };

    /// A worker whose table has one container's route, which came at `born`. The container's first process is this one.
    fn worker(born: Instant) -> (Rc<Worker>, Arc<Route>) {
        let id = ConsumerId::Container { id: ContainerId::new("b"), started_at: "t".into() };
        let table = Arc::new(table_of(id));
        let worker = Worker::new(Arc::new(shared(100, 100)), 0, table).unwrap();
        let route = worker.table.borrow().routes().next().unwrap().clone();
        let end = RunEnd::default();
        end.is_that_of(Process { pid: i32::try_from(std::process::id()).unwrap(), started: 1 });
        let route = Arc::new(Route {
            key: route.key,
            arrival: route.arrival,
            number: route.number,
            consumer: route.consumer.clone(),
            consumer_name: route.consumer_name.clone(),
            binding: route.binding.clone(),
            balance: route.balance,
            upstream: route.upstream.clone(),
            counts: route.counts.clone(),
            live_of_consumer: route.live_of_consumer.clone(),
            born: Some(born),
            ends: vec![end],
        });
        (worker, route)
    }

    /// A connection that has sent something, and perhaps ended its direction, as it is accepted. Its other end belongs to
    /// the container, or is gone.
    async fn opened(ends: bool, owners: bool) -> (std::net::TcpStream, Socket, Captured) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = listener.local_addr().unwrap();
        let mut client = std::net::TcpStream::connect(dialled).unwrap();
        client.write_all(b"x").unwrap();
        if ends {
            client.shutdown(Shutdown::Write).unwrap();
        }
        let (stream, peer) = listener.accept().await.unwrap();
        let elsewhere = "127.0.0.9:9".parse().unwrap();
        let destination = if owners { dialled } else { elsewhere };
        (client, Socket::new(stream), captured(peer, destination))
    }

    async fn is_let_in(
        born: Instant,
        paused_at: Option<Instant>,
        ends: bool,
        owners: bool,
    ) -> bool {
        let (worker, route) = worker(born);
        worker.pause.set(paused_at.map(|start| Pause::ended(None, start)));
        let (client, socket, captured) = opened(ends, owners).await;
        worker.let_in_to(socket, captured, route.clone());
        let deadline = Instant::now() + Duration::from_secs(60);
        let let_in = loop {
            assert!(Instant::now() < deadline, "neither let in nor refused");
            if worker.shared.tally.get(Outcome::UnknownConsumer) == 1 {
                break false;
            }
            if route.counts.started.load(std::sync::atomic::Ordering::Relaxed) == 1 {
                break true;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        if !let_in {
            client.set_nonblocking(true).unwrap();
            let mut client = TcpStream::from_std(client).unwrap();
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        worker.end_all(Outcome::Shutdown, |_| true);
        worker.all_ended().await;
        let_in
    }

    #[tokio::test]
    async fn what_waited_to_be_accepted_is_served_by_its_own_route_only() {
        let test = async {
            let now = Instant::now();
            let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).unwrap();
            // The route was this owner's long before the queue stood still, or there was no queue.
            assert!(is_let_in(ago(60), Some(ago(20)), true, false).await);
            assert!(is_let_in(ago(60), None, true, false).await);
            // It came while the queue stood still: only who is certainly its owner.
            for ends in [false, true] {
                assert!(!is_let_in(ago(10), Some(ago(20)), ends, false).await, "ends: {ends}");
                assert!(is_let_in(ago(10), Some(ago(20)), ends, true).await, "ends: {ends}");
            }
            // It has only just come: who may be gone already is doubted, who is not is served.
            assert!(is_let_in(now, None, false, false).await);
            assert!(!is_let_in(now, None, true, false).await);
            assert!(is_let_in(now, None, true, true).await);
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }

    /// The engine told of nothing; an interface that has gone is the only sign.
    #[test]
    fn an_address_that_its_owner_has_lost_is_waited_for_and_never_served_as_the_owners() {
        run(async {
            let now = Instant::now();
            let long_ago = now.checked_sub(Duration::from_secs(60)).unwrap();
            let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
            let (_, former) = worker(long_ago);
            former.ends[0].shows_network();
            // The table has the same route.
            let id = former.consumer.clone();
            let table = Arc::new(table_of(id));
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, table).unwrap();
            let lookup = worker.settings().lookup.clone();
            let started = || former.counts.started.load(Relaxed);
            let dial = |source: &str| {
                let (worker, former) = (worker.clone(), former.clone());
                let source = source.parse().unwrap();
                async move {
                    let (client, accepted) = connection().await;
                    let captured = captured(source, VIP.parse().unwrap());
                    worker.let_in_to(Socket::new(accepted), captured, former);
                    client
                }
            };
            let _first = dial("172.17.0.2:1").await;
            assert_eq!(started(), 1, "no interface has gone");
            lookup.moved();
            // This test's own network, as the owner's, has the one address and not the other.
            let _own = dial("127.0.0.1:2").await;
            assert_eq!(started(), 2);
            let _lost = dial("172.17.0.2:3").await;
            let waiting = || {
                let connections = worker.connections.borrow();
                connections.iter().filter(|(_, one)| matches!(one.state, State::Held(_))).count()
            };
            assert_eq!((started(), waiting()), (2, 1));
            // A table in which nothing changed for it is none to be served by.
            let other = consumer("other", "172.17.0.77".parse().unwrap(), "redis;6379");
            let before = worker.table.borrow().clone();
            let same = consumer_of(
                former.consumer.clone(),
                "a",
                "172.17.0.2".parse().unwrap(),
                "redis;6379",
            );
            let next = table_after(&before, &[same, other.clone()], &[]).unwrap();
            worker.take_over(Arc::new(next));
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            assert_eq!((started(), waiting()), (2, 1));
            let next = consumer("next", "172.17.0.2".parse().unwrap(), "redis;6379");
            let before = worker.table.borrow().clone();
            let table = table_after(&before, &[next, other], &[]).unwrap();
            let key = former.key;
            worker.take_over(Arc::new(table));
            let served = async {
                while worker.table.borrow().route(&key).unwrap().counts.started.load(Relaxed) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), served).await.unwrap();
            assert_eq!((started(), waiting()), (2, 0), "by its own route");
            // A sandbox never showed the address in its network.
            let (_, sandboxed) = self::worker(long_ago);
            let (_client, accepted) = connection().await;
            let captured = captured("172.17.0.5:4".parse().unwrap(), VIP.parse().unwrap());
            worker.let_in_to(Socket::new(accepted), captured, sandboxed.clone());
            assert_eq!(sandboxed.counts.started.load(Relaxed), 1);
            worker.end_all(Outcome::Shutdown, |_| true);
            worker.all_ended().await;
        });
    }

    #[tokio::test]
    async fn an_owner_that_has_ended_is_served_no_more() {
        let test = async {
            let (worker, route) = worker(Instant::now());
            route.ends[0].mark_ended();
            let (_client, socket, captured) = opened(true, true).await;
            worker.let_in_to(socket, captured, route);
            let refused = async {
                while worker.shared.tally.get(Outcome::UnknownConsumer) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), refused).await.unwrap();
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }

    #[test]
    fn a_connection_that_is_aborted_before_it_ran_is_reset_and_accounted_for() {
        run(async {
            let worker = Worker::new(Arc::new(shared(1, 1)), 0, Arc::new(table())).unwrap();
            let (mut client, stream) = connection().await;
            let route = worker.table.borrow().routes().next().unwrap().clone();
            let peer = client.local_addr().unwrap();
            worker.let_in_to(Socket::new(stream), captured(peer, peer), route);
            worker.end_all(Outcome::RouteGone, |_| true);
            worker.all_ended().await;
            assert_eq!(worker.shared.live.load(Relaxed), 0);
            assert_eq!(worker.shared.tally.get(Outcome::RouteGone), 1);
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        });
    }

    /// A worker that holds as many connections of an unknown container's as it may, and the ends of those that it was offered.
    async fn crowded() -> (Rc<Worker>, Vec<TcpStream>) {
        const MORE: usize = 44;
        let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
        let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table())).unwrap();
        let mut clients = Vec::new();
        for port in 1..=HoldPermit::MOST + MORE {
            let (client, accepted) = connection().await;
            let source = SocketAddr::new(STRANGER.parse().unwrap(), port.try_into().unwrap());
            worker.let_in(Socket::new(accepted), captured(source, VIP.parse().unwrap()));
            clients.push(client);
        }
        let held = |(_, one): (Place, &Connection)| matches!(one.state, State::Held(_));
        assert!(worker.connections.borrow().iter().all(held));
        assert_eq!(worker.connections.borrow().iter().count(), HoldPermit::MOST);
        assert_eq!(worker.shared.held.load(Relaxed), HoldPermit::MOST);
        assert_eq!(worker.shared.tally.get(Outcome::UnknownConsumer), MORE as u64);
        for mut refused in clients.drain(HoldPermit::MOST..) {
            let error = refused.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        (worker, clients)
    }

    const STRANGER: &str = "172.17.0.9";
    const VIP: &str = "172.17.0.1:6379";

    #[test]
    fn of_too_many_that_wait_the_first_are_served_once_they_are_known() {
        run(async {
            let (worker, clients) = crowded().await;
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(listener.local_addr().unwrap());
            let known = [consumer("stranger", STRANGER.parse().unwrap(), "redis;6379")];
            let table = table_after(&worker.table.borrow(), &known, &[endpoint]).unwrap();
            worker.take_over(Arc::new(table));
            let mut taken = Vec::new();
            for _ in &clients {
                taken.push(listener.accept().await.unwrap());
            }
            assert_eq!(worker.shared.held.load(Relaxed), 0);
            assert_eq!(worker.shared.live.load(Relaxed), clients.len());
            assert_eq!(worker.connections.borrow().iter().count(), clients.len());
            drop(clients);
            drop(taken);
            worker.all_ended().await;
            assert_eq!(worker.shared.live.load(Relaxed), 0);
        });
    }

    #[test]
    fn those_that_wait_end_with_the_worker() {
        run(async {
            let (worker, clients) = crowded().await;
            worker.end_all(Outcome::Shutdown, |one| matches!(one.state, State::Held(_)));
            worker.all_ended().await;
            assert_eq!(worker.shared.tally.get(Outcome::Shutdown), clients.len() as u64);
            assert_eq!(worker.shared.held.load(Relaxed), 0);
        });
    }
}
