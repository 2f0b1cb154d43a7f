//! Admission: an accepted connection gets its route or is reset. It waits while its owner is unknown or uncertain.

use std::{
    collections::BTreeSet,
    future::pending,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::{spawn_local, yield_now},
    time::{sleep, sleep_until},
};

use super::{
    captured::Captured,
    connection::serve,
    listener::{self, AcceptBackoff},
    lists::Place,
    owner::{self, Doubt, Pause},
    shared::{HoldPermit, WaitReason},
    socket::Socket,
    worker::{HeldTicket, Worker},
};
use crate::{
    docker::process,
    model::{ConsumerId, RunEnd, SourceAddress},
    outcome::Outcome,
    table::Route,
};

impl Worker {
    /// Maximum number of connections accepted in a row, so that many new ones do not delay the relaying of others.
    const IN_A_ROW: usize = 4;

    pub(super) async fn accept(self: Rc<Self>, listener: Rc<TcpListener>) {
        let mut backoff = AcceptBackoff::default();
        let mut in_a_row = 0;
        // A listener without an address has no port to which clients could connect.
        let port = listener.local_addr().map_or(0, |address| address.port());
        loop {
            while let Some(end) = self.shortage.get().filter(|end| *end > Instant::now()) {
                self.pause_until(end).await;
            }
            let accepted = tokio::select! {
                biased;
                () = self.frozen.begun() => {
                    self.frozen.over().await;
                    continue;
                }
                accepted = listener.accept() => accepted,
            };
            match accepted {
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

    /// Accepts the connections in a listener's queue, which would be reset when the listener is closed.
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

    /// Starts a connection that has a route. Any other is reset at once, except one that may get a route soon.
    fn let_in(self: &Rc<Self>, socket: Socket, captured: Captured) {
        let outcome = match self.route_of(&captured) {
            Ok(route) => return self.let_in_to(socket, captured, route),
            Err(outcome) => outcome,
        };
        let (source, settings) = (captured.source.0.ip(), self.settings());
        if outcome == Outcome::UnknownConsumer
            && !settings.hold.is_zero()
            && self.table.borrow().may_become_known(&source)
            && !settings.lookup.was_nobodys(&source)
        {
            let since = Since { doubts: settings.lookup.doubts(), route: None };
            return self.hold_while(WaitReason::Unknown, captured, socket, |ticket, socket| {
                wait(ticket, socket, captured, since)
            });
        }
        self.refuse(captured.source, Some(captured.destination), None, outcome);
    }

    /// Holds a connection while a task finds out its owner. Refuses it if too many of this kind, or from its source, are
    /// held.
    fn hold_while<T: Future<Output = ()> + 'static>(
        self: &Rc<Self>,
        waiting: WaitReason,
        captured: Captured,
        socket: Socket,
        task: impl FnOnce(HeldTicket, Socket) -> T,
    ) {
        let Captured { source, destination, .. } = captured;
        match HoldPermit::of(&self.shared, waiting, source.0.ip()) {
            Some(permit) => {
                let ticket = self.hold(captured, socket.duplicate().ok(), permit);
                self.run(ticket.place(), task(ticket, socket));
            }
            None => self.refuse(source, Some(destination), None, Outcome::TooManyHeld),
        }
    }

    /// The sign that a route's owner may have lost the address without an event. The address's next owner may then have
    /// opened this connection. After an interface of this host has disappeared, this costs a look at the owner's network,
    /// otherwise nothing. `doubts`: their number when the connection was accepted. Later doubts are about addresses that
    /// changed owner later.
    fn may_have_lost(&self, route: &Route, source: IpAddr, doubts: u64) -> Option<Sign> {
        const MOST: usize = 100_000;
        if route.consumer == ConsumerId::Local {
            return None;
        }
        let lookup = &self.settings().lookup;
        let Some(owner) = owner::shown(route) else {
            // The owner's process does not show its addresses: the engine must confirm them.
            let confirmed = self.table.borrow().confirmed;
            return lookup.is_in_doubt(doubts, confirmed).then_some(Sign::Unconfirmed);
        };
        let moves = lookup.moves();
        if self.checked.borrow().get(&source).copied().unwrap_or_default() == moves {
            return None;
        }
        let read =
            || process::look(owner, process::addresses).unwrap_or_else(|| Ok(BTreeSet::new()));
        // An owner that has ended has no address.
        if owner.has_address(source, moves, Instant::now(), read) == Some(false) {
            return Some(Sign::Lost);
        }
        let mut checked = self.checked.borrow_mut();
        if checked.len() >= MOST {
            checked.clear();
        }
        checked.insert(source, moves);
        None
    }

    /// Starts a connection, unless the address's former owner may have opened it.
    pub(super) fn let_in_to(
        self: &Rc<Self>,
        socket: Socket,
        captured: Captured,
        route: Arc<Route>,
    ) {
        let now = Instant::now();
        let doubts = self.settings().lookup.doubts();
        if let Some(sign) = self.may_have_lost(&route, captured.source.0.ip(), doubts) {
            let waiting = match sign {
                Sign::Lost => WaitReason::Unknown,
                Sign::Unconfirmed => WaitReason::Known,
            };
            let since = Since { doubts, route: Some(route) };
            return self.hold_while(waiting, captured, socket, |ticket, socket| {
                wait(ticket, socket, captured, since)
            });
        }
        match owner::doubt(&route, self.pause.get(), now) {
            None => {}
            Some(_) if self.shared.is_inherited(&route) => {}
            // It may have been held until its route appeared, and is treated like connections that were held here.
            Some(Doubt::New) if !owner::has_hung_up(&socket.stream) => {}
            Some(_) => {
                return self.hold_while(WaitReason::Known, captured, socket, |ticket, socket| {
                    identify(ticket, socket, captured, route, now)
                });
            }
        }
        if let Some(ticket) = self.start(captured, route, now) {
            self.run(ticket.place(), serve(ticket, socket));
        }
    }

    /// Holds a connection that another process held. It may be older than the current route of its address.
    pub(super) fn hold_again(self: &Rc<Self>, socket: Socket, captured: Captured) {
        let since = Since { doubts: self.settings().lookup.doubts(), route: None };
        let source = captured.source.0.ip();
        let permit = HoldPermit::of_adopted(&self.shared, WaitReason::Unknown, source);
        let ticket = self.hold(captured, socket.duplicate().ok(), permit);
        self.run(ticket.place(), wait(ticket, socket, captured, since));
    }

    fn route_of(&self, captured: &Captured) -> Result<Arc<Route>, Outcome> {
        captured.route(&self.table.borrow(), &self.settings().destinations)
    }

    /// Gives a connection its task. The connection already has its place: the task may be aborted before it first runs.
    pub(super) fn run(&self, place: Place, task: impl Future<Output = ()> + 'static) {
        let task = spawn_local(task).abort_handle();
        self.connections.borrow_mut().set_task(place, task);
    }
}

/// A sign that a route's owner may have lost its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// The owner's network does not have the address any more.
    Lost,
    /// A container that may have got it has appeared, and the engine has not yet said who has which address.
    Unconfirmed,
}

/// The situation when a waiting connection was accepted.
#[derive(Debug)]
struct Since {
    /// The number of doubts about addresses.
    doubts: u64,
    /// The route of its address.
    route: Option<Arc<Route>>,
}

/// Waits until the container is known: its first connection may arrive before the engine's event about it.
async fn wait(ticket: HeldTicket, socket: Socket, captured: Captured, since: Since) {
    let (worker, accepted) = (ticket.worker().clone(), Instant::now());
    let deadline = accepted + worker.settings().hold;
    let (lookup, source) = (&worker.settings().lookup, captured.source.0.ip());
    let mut looks = lookup.looks();
    lookup.ask(source);
    loop {
        // Looked up before the first wait too: the table may have changed since this connection was accepted.
        let route = worker.route_of(&captured);
        let sign =
            route.as_ref().ok().and_then(|route| worker.may_have_lost(route, source, since.doubts));
        match route {
            Ok(_) if sign.is_some() => {}
            // The first container to get the address need not be the one that opened the connection.
            Ok(route) => {
                let doubt = owner::doubt(&route, worker.pause.get(), accepted);
                // The address had this route when the connection was accepted, and it is confirmed that it still has it.
                let is_its = since.route.as_ref().is_some_and(|one| one.number == route.number);
                let is_certain = match doubt {
                    _ if owner::shows_sockets(&route) => false,
                    // It was captured while the previous process had the same route, and may have been held there.
                    Some(_) if worker.shared.is_inherited(&route) => true,
                    Some(Doubt::Waited) => false,
                    None if is_its => true,
                    _ => !owner::has_hung_up(&socket.stream),
                };
                if is_certain {
                    return start_held(ticket, socket, captured, route, accepted).await;
                }
                return identify(ticket, socket, captured, route, accepted).await;
            }
            // Since this connection was accepted, the engine was asked, and no container has the address.
            Err(Outcome::UnknownConsumer) if !lookup.is_nobodys(&source, accepted) => {}
            Err(outcome) => return ticket.end(outcome),
        }
        let waits_on = tokio::select! {
            is_another = worker.another_table(deadline) => is_another,
            _ = looks.changed() => true,
            // The owner's network may still get the address, and no event reports that.
            () = pause(sign) => true,
        };
        if !waits_on {
            return ticket.end(Outcome::UnknownConsumer);
        }
    }
}

/// Waits until it is worth looking again for an address that the owner's network does not have.
async fn pause(sign: Option<Sign>) {
    match sign {
        Some(Sign::Lost) => sleep(RunEnd::WITHOUT_ADDRESS).await,
        Some(Sign::Unconfirmed) | None => pending().await,
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
    let worker = ticket.worker().clone();
    // The table may have changed meanwhile.
    if worker.looks.are_owners(&route, &captured).await && worker.table.borrow().has(&route) {
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

/// Tests that a route of the address's next owner does not admit a connection of the former owner.
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
        consumer::Consumer,
        docker::process,
        model::{ContainerId, Endpoint},
        provider::Lookup,
        proxy::{
            connections::{Connection, State},
            settings::ProxySettings,
            shared::Shared,
            testing::{
                captured, connection, consumer, consumer_of, run, settings, shared, table,
                table_after, table_of,
            },
        },
        table::Table,
    };

    /// A worker whose table has one container's route, which appeared at `born`. The container's first process is this one.
    fn worker(born: Instant) -> (Rc<Worker>, Arc<Route>) {
        let id = ConsumerId::Container { id: ContainerId::new("b"), started_at: "t".into() };
        let table = Arc::new(table_of(id));
        let worker = Worker::new(Arc::new(shared(100, 100)), 0, table).unwrap();
        let route = worker.table.borrow().routes().next().unwrap().clone();
        let end = process::run_of_this_process();
        let route = Arc::new(Route {
            key: route.key,
            arrival: route.arrival,
            number: route.number,
            consumer: route.consumer.clone(),
            consumer_name: route.consumer_name.clone(),
            binding: route.binding.clone(),
            balance: route.balance,
            query: route.query.clone(),
            counts: route.counts.clone(),
            live_of_consumer: route.live_of_consumer.clone(),
            born: Some(born),
            ends: vec![end],
        });
        (worker, route)
    }

    /// An accepted connection that has sent something, and has perhaps ended its direction. Its other end belongs to the
    /// container (`owners`), or is gone.
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
            // The owner had the route long before the pause in accepting, or there was no pause.
            assert!(is_let_in(ago(60), Some(ago(20)), true, false).await);
            assert!(is_let_in(ago(60), None, true, false).await);
            // The route appeared during the pause: only connections that certainly belong to its owner are served.
            for ends in [false, true] {
                assert!(!is_let_in(ago(10), Some(ago(20)), ends, false).await, "ends: {ends}");
                assert!(is_let_in(ago(10), Some(ago(20)), ends, true).await, "ends: {ends}");
            }
            // The route has only just appeared: a connection whose peer may be gone is doubted, others are served.
            assert!(is_let_in(now, None, false, false).await);
            assert!(!is_let_in(now, None, true, false).await);
            assert!(is_let_in(now, None, true, true).await);
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }

    /// The engine reported nothing. An interface that disappeared is the only sign.
    #[test]
    fn an_address_that_its_owner_has_lost_is_waited_for_and_never_served_as_the_owners() {
        run(async {
            let now = Instant::now();
            let long_ago = now.checked_sub(Duration::from_secs(60)).unwrap();
            let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
            let owner = {
                let run = process::run_of_this_process();
                run.shows_network();
                let id =
                    ConsumerId::Container { id: ContainerId::new("b"), started_at: "t".into() };
                let owner = consumer_of(id, "a", "172.17.0.2".parse().unwrap(), "redis;6379");
                Arc::new(Consumer { ends: vec![run], ..Consumer::clone(&owner) })
            };
            let table = table_after(&Table::default(), std::slice::from_ref(&owner), &[]).unwrap();
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table)).unwrap();
            let former = worker.table.borrow().routes().next().unwrap().clone();
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
            // This test's own network, which is the owner's, has the one address and not the other.
            let _own = dial("127.0.0.1:2").await;
            assert_eq!(started(), 2);
            let _lost = dial("172.17.0.2:3").await;
            let waiting = || {
                let connections = worker.connections.borrow();
                connections.iter().filter(|(_, one)| matches!(one.state, State::Held(_))).count()
            };
            assert_eq!((started(), waiting()), (2, 1));
            // A table without a change for this address does not end the wait.
            let other = consumer("other", "172.17.0.77".parse().unwrap(), "redis;6379");
            let before = worker.table.borrow().clone();
            let next = table_after(&before, &[owner, other.clone()], &[]).unwrap();
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
            // A sandbox never shows its address in its process's network.
            let (_, sandboxed) = self::worker(long_ago);
            let (_client, accepted) = connection().await;
            let captured = captured("172.17.0.5:4".parse().unwrap(), VIP.parse().unwrap());
            worker.let_in_to(Socket::new(accepted), captured, sandboxed.clone());
            assert_eq!(sandboxed.counts.started.load(Relaxed), 1);
            worker.end_all(Outcome::Shutdown, |_| true);
            worker.all_ended().await;
        });
    }

    /// No process is visible, and a container appeared after an interface disappeared. Only the engine can say who has the
    /// address.
    #[test]
    fn an_address_that_may_have_a_newer_owner_is_served_once_the_engine_has_confirmed_it() {
        run(async {
            let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
            let source: IpAddr = "172.17.0.2".parse().unwrap();
            let id =
                |name| ConsumerId::Container { id: ContainerId::new(name), started_at: "t".into() };
            let of = |name| consumer_of(id(name), name, source, "redis;6379");
            let first = table_after(&Table::default(), &[of("former")], &[]).unwrap();
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(first)).unwrap();
            let lookup = worker.settings().lookup.clone();
            let route = || worker.table.borrow().routes().next().unwrap().clone();
            let started = |route: &Route| route.counts.started.load(Relaxed);
            let dial = async || {
                let (client, accepted) = connection().await;
                let captured = captured("172.17.0.2:1".parse().unwrap(), VIP.parse().unwrap());
                worker.let_in(Socket::new(accepted), captured);
                // Tasks that wait have had their turn.
                tokio::task::yield_now().await;
                client
            };
            let waiting = || {
                let connections = worker.connections.borrow();
                connections.iter().filter(|(_, one)| matches!(one.state, State::Held(_))).count()
            };
            let _before = dial().await;
            let former = route();
            assert_eq!((started(&former), waiting()), (1, 0));
            lookup.doubt();
            let _doubted = dial().await;
            assert_eq!((started(&former), waiting()), (1, 1));
            // A table that confirms nothing ends no wait.
            let other = consumer("other", "172.17.0.77".parse().unwrap(), "redis;6379");
            let before = worker.table.borrow().clone();
            let next = table_after(&before, &[of("former"), other.clone()], &[]).unwrap();
            worker.take_over(Arc::new(next));
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            assert_eq!((started(&former), waiting()), (1, 1));
            // The engine resolves this doubt while there is a newer one, and the address belongs to another container.
            let doubts = lookup.doubts();
            lookup.doubt();
            let before = worker.table.borrow().clone();
            let mut next = table_after(&before, &[of("next"), other], &[]).unwrap();
            next.confirmed = doubts;
            worker.take_over(Arc::new(next));
            let key = former.key;
            let served = async {
                while started(worker.table.borrow().route(&key).unwrap()) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), served).await.unwrap();
            assert_eq!((started(&former), waiting()), (1, 0));
            worker.end_all(Outcome::Shutdown, |_| true);
            worker.all_ended().await;
        });
    }

    /// If no process is visible, the owner of a connection cannot be determined.
    #[test]
    fn a_half_closed_connection_of_a_known_container_is_served_once_the_doubt_is_over() {
        let served = async |is_confirmed: bool| {
            let held = ProxySettings { hold: Duration::from_secs(3_600), ..settings() };
            let source: IpAddr = "127.0.0.1".parse().unwrap();
            let id = ConsumerId::Container { id: ContainerId::new("one"), started_at: "t".into() };
            let (_client, socket, captured) = opened(true, true).await;
            let port = captured.destination.0.port();
            let one = || consumer_of(id.clone(), "one", source, &format!("redis;{port}"));
            let table = table_after(&Table::default(), &[one()], &[]).unwrap();
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table)).unwrap();
            let lookup = worker.settings().lookup.clone();
            lookup.doubt();
            worker.let_in(socket, captured);
            tokio::task::yield_now().await;
            assert_eq!(worker.shared.held(), 1);
            let before = worker.table.borrow().clone();
            let other = consumer("other", "172.17.0.77".parse().unwrap(), "redis;6379");
            if is_confirmed {
                let mut next = table_after(&before, &[one(), other], &[]).unwrap();
                next.confirmed = lookup.doubts();
                worker.take_over(Arc::new(next));
            } else {
                // The engine does not answer.
                lookup.give_up_doubts();
            }
            worker.all_ended().await;
            let table = worker.table.borrow();
            let route = table.routes().find(|one| one.key.source == source).unwrap();
            assert_eq!(route.counts.started.load(Relaxed), 1);
            assert_eq!(worker.shared.tally.get(Outcome::UnknownConsumer), 0);
        };
        run(async {
            served(true).await;
            served(false).await;
        });
    }

    /// An interface moves into a container before it gets its address: addresses that were read in between are not final.
    #[test]
    fn a_container_whose_network_gets_the_address_a_moment_later_is_served() {
        run(async {
            let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
            let (_client, socket, captured) = opened(false, true).await;
            let (source, port) = (captured.source.0.ip(), captured.destination.0.port());
            let table = table_after(&Table::default(), &[newcomer(source, port, true)], &[]);
            let table = Arc::new(table.unwrap());
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, table).unwrap();
            let route = worker.table.borrow().routes().next().unwrap().clone();
            worker.settings().lookup.moved();
            let early = route.ends[0].has_address(
                source,
                worker.settings().lookup.moves(),
                Instant::now() + Duration::from_millis(100),
                || Ok(BTreeSet::new()),
            );
            assert_eq!(early, Some(false));
            worker.let_in(socket, captured);
            worker.all_ended().await;
            assert_eq!(route.counts.started.load(Relaxed), 1);
        });
    }

    /// A container that runs in this test's network, at this address, with a binding for the dialled port.
    fn newcomer(source: IpAddr, port: u16, is_shown: bool) -> Arc<Consumer> {
        let run = process::run_of_this_process();
        if is_shown {
            run.shows_network();
        }
        let newcomer = consumer("newcomer", source, &format!("redis;{port}"));
        Arc::new(Consumer { ends: vec![run], ..Consumer::clone(&newcomer) })
    }

    /// How many held connections are served when a container gets its address: 0 or 1.
    async fn served_by_newcomer(dials_itself: bool, is_shown: bool) -> u64 {
        let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
        let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table())).unwrap();
        let (_client, socket, captured) = opened(false, dials_itself).await;
        let (source, port) = (captured.source.0.ip(), captured.destination.0.port());
        let since = Since { doubts: 0, route: None };
        worker.hold_while(WaitReason::Unknown, captured, socket, |ticket, socket| {
            wait(ticket, socket, captured, since)
        });
        tokio::task::yield_now().await;
        assert_eq!(worker.shared.held(), 1);
        let known = [newcomer(source, port, is_shown)];
        let table = table_after(&worker.table.borrow(), &known, &[]).unwrap();
        let route = table.routes().find(|route| route.key.source == source).unwrap().clone();
        worker.take_over(Arc::new(table));
        worker.all_ended().await;
        let (started, refused) =
            (route.counts.started.load(Relaxed), worker.shared.tally.get(Outcome::UnknownConsumer));
        assert_eq!(started + refused, 1, "either");
        started
    }

    #[test]
    fn the_first_to_get_an_address_is_served_what_it_dialled_itself_and_nothing_else() {
        run(async {
            assert_eq!(served_by_newcomer(true, true).await, 1);
            assert_eq!(served_by_newcomer(false, true).await, 0, "another dialled");
            // For a sandbox, and for a process that is not visible, the kernel does not show the owners of connections.
            assert_eq!(served_by_newcomer(true, false).await, 1);
            assert_eq!(served_by_newcomer(false, false).await, 1);
        });
    }

    #[test]
    fn the_engines_word_that_nobody_has_an_address_ends_the_wait_and_is_remembered() {
        run(async {
            // Both last longer than a busy machine may stand still.
            let lookup = Lookup::that_remembers(Duration::from_secs(3_600));
            let hold = Duration::from_secs(3_600);
            let held = ProxySettings { hold, lookup, ..settings() };
            let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table())).unwrap();
            let lookup = worker.settings().lookup.clone();
            let refused = || worker.shared.tally.get(Outcome::UnknownConsumer);
            let dial = |source: &str| {
                let (worker, source) =
                    (worker.clone(), SocketAddr::new(source.parse().unwrap(), 7));
                async move {
                    let (client, accepted) = connection().await;
                    worker.let_in(Socket::new(accepted), captured(source, VIP.parse().unwrap()));
                    tokio::task::yield_now().await;
                    client
                }
            };
            let _first = dial(STRANGER).await;
            lookup.begins();
            // The look has already begun: the container may have appeared since.
            let _later = dial(STRANGER).await;
            let _other = dial("172.17.0.10").await;
            assert_eq!((worker.shared.held(), refused()), (3, 0));
            lookup.is_over(true, |_| false);
            while refused() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!((worker.shared.held(), refused()), (2, 1));
            let _again = dial(STRANGER).await;
            assert_eq!((worker.shared.held(), refused()), (2, 2), "at once");
            lookup.begins();
            lookup.is_over(true, |_| false);
            while refused() < 4 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(worker.shared.held(), 0);
            lookup.forget();
            let _after_news = dial(STRANGER).await;
            assert_eq!((worker.shared.held(), refused()), (1, 4), "a container may have come");
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

    /// The maximum for one source.
    const HELD: usize = 144;

    /// A worker that holds as many connections of an unknown container as it may, and the other ends of all that were
    /// offered.
    async fn crowded() -> (Rc<Worker>, Vec<TcpStream>) {
        const MORE: usize = 44;
        let held = ProxySettings { hold: Duration::from_secs(60), ..settings() };
        let worker = Worker::new(Arc::new(Shared::new(held)), 0, Arc::new(table())).unwrap();
        let mut clients = Vec::new();
        for port in 1..=HELD + MORE {
            let (client, accepted) = connection().await;
            let source = SocketAddr::new(STRANGER.parse().unwrap(), port.try_into().unwrap());
            worker.let_in(Socket::new(accepted), captured(source, VIP.parse().unwrap()));
            clients.push(client);
        }
        let held = |(_, one): (Place, &Connection)| matches!(one.state, State::Held(_));
        assert!(worker.connections.borrow().iter().all(held));
        assert_eq!(worker.connections.borrow().iter().count(), HELD);
        assert_eq!(worker.shared.held(), HELD);
        assert_eq!(worker.shared.tally.get(Outcome::TooManyHeld), MORE as u64);
        for mut refused in clients.drain(HELD..) {
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
            assert_eq!(worker.shared.held(), 0);
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
            assert_eq!(worker.shared.held(), 0);
        });
    }
}
