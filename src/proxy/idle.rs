//! Idle connections are parked: they lose their task, and get a new one when something happens.

use std::{rc::Rc, time::Duration};

use tokio::task::{spawn_blocking, spawn_local, yield_now};

use super::{
    connection::carry_on,
    connections::Parked,
    lists::Place,
    relay::RelayRequest,
    socket::Socket,
    worker::{Ticket, Worker},
};
use crate::{memory, outcome::Outcome};

/// A connection that moves no bytes between two looks is parked.
const LOOK: Duration = Duration::from_secs(1);
/// Number of connections that are looked at before other tasks get their turn.
const TURN: usize = 256;
/// Number of connections that are asked to park before other tasks get their turn: each needs some ten system calls.
const ASKED: usize = 16;

/// After this many connections were parked, the memory of their tasks is given back: 1 MB or more.
const MANY: usize = 512;

impl Worker {
    /// Repeatedly asks the connections that have been idle for a while to park.
    pub(super) async fn park_idle(self: Rc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.frozen.over().await;
            if self.parked_since_trim.get() >= MANY {
                self.parked_since_trim.set(0);
                // It takes milliseconds, which a worker's connections should not wait. There is nothing to wait for.
                drop(spawn_blocking(memory::give_back));
            }
            self.connections.borrow_mut().begin_round();
            while !self.frozen.is() && self.look() {
                yield_now().await;
            }
        }
    }

    /// Looks at some running connections. Returns whether there are more.
    fn look(&self) -> bool {
        let mut connections = self.connections.borrow_mut();
        let mut asked = 0;
        for _ in 0..TURN {
            let Some(running) = connections.next_running() else {
                // After many connections, most may be parked or gone.
                connections.shrink();
                return false;
            };
            let moved = running.live.record.moved.both();
            let request = match running.seen.replace(moved) {
                None => RelayRequest::Watch,
                Some(before) if before == moved => RelayRequest::Park,
                Some(_) => continue,
            };
            running.live.requests.ask(request);
            asked += 1;
            if asked == ASKED {
                break;
            }
        }
        true
    }

    /// Gives parked connections a task again when something happens to them.
    pub(super) async fn resume_woken(self: Rc<Self>) {
        loop {
            self.frozen.over().await;
            match self.idle_set.woken().await {
                // The set will report them again.
                Ok(_) if self.frozen.is() => {}
                Ok(all) => all.into_iter().for_each(|place| self.resume(place)),
                Err(error) => {
                    tracing::warn!(%error, "cannot watch parked connections; retrying");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    pub(super) fn resume(self: &Rc<Self>, place: Place) {
        // If something happened to both of its sockets, the second report finds it running.
        let Some((parked, live)) = self.connections.borrow_mut().resume(place) else { return };
        let Parked { lease, consumer, endpoint, .. } = parked;
        self.idle_set.remove([&consumer, &endpoint]);
        if let Some(held) = self.frozen.suspended.borrow_mut().remove(&place) {
            live.requests.resume(held);
        }
        let ticket = Ticket::resumed(self, place, live);
        match Socket::resumed(consumer).and_then(|one| Ok((one, Socket::resumed(endpoint)?))) {
            Ok((consumer, endpoint)) => {
                let task = spawn_local(carry_on(ticket, consumer, endpoint, lease));
                self.connections.borrow_mut().set_task(place, task.abort_handle());
            }
            Err(error) => {
                let route = &ticket.record().route.key;
                tracing::warn!(%error, %route, "cannot resume a parked connection");
                drop(lease);
                ticket.end(Outcome::LocalReset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io,
        os::fd::AsRawFd,
        sync::{Arc, atomic::Ordering::Relaxed},
        time::Instant,
    };

    use rustix::{
        fs::{Mode, OFlags, open},
        process::{Resource, Rlimit, getrlimit, setrlimit},
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;
    use crate::{
        balance::EndpointState,
        model::Endpoint,
        proxy::{
            connections::State,
            testing::{captured, connection, in_own_process, run, shared, table},
        },
        table::Table,
    };

    /// A worker with one connection, and the consumer's and the endpoint's ends of it.
    struct Idle {
        worker: Rc<Worker>,
        consumer: TcpStream,
        endpoint: TcpStream,
    }

    /// A worker, and one of its connections, which counts as open.
    fn opened(endpoint: Endpoint) -> (Rc<Worker>, Ticket, crate::balance::Lease) {
        let worker = Worker::new(Arc::new(shared(1, 1)), 0, Arc::new(table())).unwrap();
        let route = worker.table.borrow().routes().next().unwrap().clone();
        let peer = ([127, 0, 0, 1], 1).into();
        let ticket = worker.start(captured(peer, peer), route, Instant::now()).unwrap();
        let state = Arc::new(EndpointState::new(endpoint));
        let lease = state.lease();
        ticket.connecting(&state);
        ticket.connected(None);
        (worker, ticket, lease)
    }

    impl Idle {
        /// A parked connection, after a byte in each direction.
        async fn new() -> Self {
            let idle = Self::running().await;
            idle.park().await;
            idle
        }

        async fn running() -> Self {
            let (consumer, to_consumer) = connection().await;
            let (endpoint, to_endpoint) = connection().await;
            let (worker, ticket, lease) = opened(Endpoint(endpoint.local_addr().unwrap()));
            spawn_local(worker.clone().resume_woken());
            let sending = worker.clone();
            spawn_local(async move { sending.buffers.send_queued().await });
            let (place, sides) = (ticket.place(), [to_consumer, to_endpoint].map(Socket::new));
            let [to_consumer, to_endpoint] = sides;
            let task = spawn_local(carry_on(ticket, to_consumer, to_endpoint, lease));
            worker.connections.borrow_mut().set_task(place, task.abort_handle());
            let mut idle = Self { worker, consumer, endpoint };
            idle.passes().await;
            idle
        }

        /// Sends a byte in each direction.
        async fn passes(&mut self) {
            let Self { consumer, endpoint, .. } = self;
            consumer.write_all(b"x").await.unwrap();
            endpoint.read_exact(&mut [0]).await.unwrap();
            endpoint.write_all(b"x").await.unwrap();
            consumer.read_exact(&mut [0]).await.unwrap();
        }

        fn is_parked(&self) -> bool {
            let all = self.worker.connections.borrow();
            all.iter().all(|(_, one)| matches!(one.state, State::Parked(_)))
        }

        /// Looks at it until it is parked.
        async fn park(&self) {
            while !self.is_parked() {
                self.look().await;
            }
            assert_eq!(self.worker.shared.live.load(Relaxed), 1);
        }

        async fn look(&self) {
            self.worker.connections.borrow_mut().begin_round();
            while self.worker.look() {}
            yield_now().await;
        }

        async fn ended(&self, outcome: Outcome) {
            self.worker.all_ended().await;
            assert_eq!(self.worker.shared.live.load(Relaxed), 0);
            let tally = &self.worker.shared.tally;
            let counts: Vec<_> =
                Outcome::ALL.iter().filter(|&&one| tally.get(one) > 0).copied().collect();
            assert_eq!((counts, tally.get(outcome)), (vec![outcome], 1));
        }
    }

    #[test]
    fn an_idle_connection_has_no_task_and_goes_on_as_if_it_had() {
        run(async {
            let mut idle = Idle::new().await;
            for _ in 0..3 {
                idle.passes().await;
                idle.park().await;
            }
            // The endpoint may be the one that sends, and either side may be the one that ends.
            idle.endpoint.write_all(b"late").await.unwrap();
            idle.endpoint.shutdown().await.unwrap();
            let mut said = String::new();
            idle.consumer.read_to_string(&mut said).await.unwrap();
            assert_eq!(said, "late");
            idle.consumer.write_all(b"later").await.unwrap();
            idle.consumer.shutdown().await.unwrap();
            let mut heard = String::new();
            idle.endpoint.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "later");
            idle.ended(Outcome::Closed).await;
        });
    }

    #[test]
    fn a_reset_of_a_parked_connection_is_passed_on() {
        run(async {
            let Idle { worker, consumer, endpoint } = Idle::new().await;
            consumer.set_zero_linger().unwrap();
            drop(consumer);
            let (consumer, _) = connection().await;
            let mut idle = Idle { worker, consumer, endpoint };
            let error = idle.endpoint.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            idle.ended(Outcome::ConsumerReset).await;
        });
    }

    /// As PostgreSQL does with TLS.
    #[test]
    fn a_reset_after_an_end_is_no_error() {
        run(async {
            let mut idle = Idle::new().await;
            idle.consumer.shutdown().await.unwrap();
            assert_eq!(idle.endpoint.read(&mut [0]).await.unwrap(), 0);
            idle.endpoint.set_zero_linger().unwrap();
            let Idle { worker, consumer, endpoint } = idle;
            drop(endpoint);
            let (endpoint, _) = connection().await;
            Idle { worker, consumer, endpoint }.ended(Outcome::ResetAfterClose).await;
            assert!(!Outcome::ResetAfterClose.is_error());
        });
    }

    #[test]
    fn a_parked_connection_is_reset_when_its_route_goes() {
        run(async {
            let mut idle = Idle::new().await;
            let (tables, follow) = tokio::sync::watch::channel(Arc::new(Table::default()));
            spawn_local(idle.worker.clone().follow(follow));
            tables.send_replace(Arc::new(Table::default()));
            idle.ended(Outcome::RouteGone).await;
            for side in [&mut idle.consumer, &mut idle.endpoint] {
                let error = side.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            }
        });
    }

    #[test]
    fn a_half_closed_connection_keeps_its_task() {
        run(async {
            let mut idle = Idle::new().await;
            idle.consumer.shutdown().await.unwrap();
            assert_eq!(idle.endpoint.read(&mut [0]).await.unwrap(), 0);
            for _ in 0..10 {
                idle.look().await;
            }
            assert!(!idle.is_parked());
            idle.endpoint.write_all(b"x").await.unwrap();
            idle.endpoint.shutdown().await.unwrap();
            assert_eq!(idle.consumer.read_to_end(&mut Vec::new()).await.unwrap(), 1);
            idle.ended(Outcome::Closed).await;
        });
    }

    #[test]
    fn a_connection_that_cannot_be_parked_keeps_its_task() {
        in_own_process(
            "proxy::idle::tests::a_connection_that_cannot_be_parked_keeps_its_task",
            || {
                run(async {
                    let mut idle = Idle::running().await;
                    // No descriptor can be opened: the limit is the first free number.
                    let limit = getrlimit(Resource::Nofile);
                    let free = File::open("/dev/null").unwrap().as_raw_fd().try_into().unwrap();
                    setrlimit(Resource::Nofile, Rlimit { current: Some(free), ..limit }).unwrap();
                    assert!(File::open("/dev/null").is_err());
                    for _ in 0..10 {
                        idle.look().await;
                        assert!(!idle.is_parked());
                    }
                    idle.passes().await;
                    setrlimit(Resource::Nofile, limit).unwrap();
                    idle.park().await;
                    idle.passes().await;
                });
            },
        );
    }

    #[test]
    fn a_connection_that_cannot_go_on_is_reset_and_accounted_for() {
        run(async {
            let (worker, ticket, lease) = opened(Endpoint(([127, 0, 0, 1], 1).into()));
            // The runtime cannot wait for a file.
            let file = || open("/proc/self/exe", OFlags::NONBLOCK, Mode::empty()).unwrap();
            let place = ticket.place();
            ticket.park((file(), file()), lease);
            worker.resume(place);
            worker.all_ended().await;
            assert_eq!(worker.shared.live.load(Relaxed), 0);
            assert_eq!(worker.shared.tally.get(Outcome::LocalReset), 1);
            assert_eq!(worker.shared.tally.sum(), 1);
            assert!(Outcome::LocalReset.is_error() && !Outcome::LocalReset.is_refusal());
        });
    }
}
