//! Connections that idle lose their task, and get another when something happens to them.

use std::{os::fd::OwnedFd, rc::Rc, time::Duration};

use super::{Live, Ticket, Worker};
use crate::{
    balance::Lease,
    outcome::Outcome,
    proxy::{
        connection::{Socket, carry_on},
        parking::Parked,
    },
};

/// A connection that moves nothing between two looks is parked.
const LOOK: Duration = Duration::from_secs(1);

/// After so many connections were parked, the memory of their tasks is given back: 1 MB and more.
const MANY: usize = 512;

impl Worker {
    /// Asks the connections that have been idle for a while to be parked, again and again.
    pub(super) async fn park_idle(self: Rc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            if self.parked_since_trim.get() >= MANY {
                self.parked_since_trim.set(0);
                // It takes milliseconds, which a worker's connections should not wait. There is nothing to wait for.
                drop(tokio::task::spawn_blocking(give_memory_back));
            }
            self.look();
        }
    }

    fn look(&self) {
        let mut all = self.live.borrow_mut();
        for live in all.values_mut() {
            let moved = live.record.moved.both();
            if live.seen.replace(moved) == Some(moved) {
                live.record.leave.ask();
            }
        }
        // Most may be parked after a rush.
        if all.capacity() / 4 > all.len() {
            all.shrink_to_fit();
        }
    }

    /// Gives the parked connections to which something happened a task again, as they wake.
    pub(super) async fn resume_woken(self: Rc<Self>) {
        loop {
            match self.parking.woken().await {
                Ok(all) => all.into_iter().for_each(|parked| self.resume(parked)),
                Err(error) => {
                    tracing::warn!(%error, "cannot look after idle connections");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    fn resume(self: &Rc<Self>, parked: Parked) {
        let Parked { id, record, lease, doomed, consumer, endpoint } = parked;
        let (consumer, endpoint) = match (Socket::resumed(consumer), Socket::resumed(endpoint)) {
            (Ok(consumer), Ok(endpoint)) => (consumer, endpoint),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, route = %record.route.key, "cannot go on with an idle connection");
                return self.account(&Rc::new(record), Outcome::LocalError);
            }
        };
        let (seen, record) = (record.moved.both(), Rc::new(record));
        let target = Some(lease.state().endpoint);
        let ticket =
            Ticket { worker: self.clone(), id, record: record.clone(), outcome: Outcome::Shutdown };
        let task = tokio::task::spawn_local(carry_on(ticket, consumer, endpoint, lease));
        let task = task.abort_handle();
        let live = Live { record, task, endpoint: target, seen: Some(seen), doomed, verdict: None };
        self.live.borrow_mut().insert(id, live);
    }
}

/// What was freed, to the kernel: by itself the allocator keeps all that lies below anything still in use.
fn give_memory_back() {
    // SAFETY: it takes no pointers, and any thread may call it at any time (man 3 malloc_trim: MT-Safe).
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

impl Ticket {
    /// Leaves the connection without a task until something happens to it.
    pub(in crate::proxy) fn park(self, (consumer, endpoint): (OwnedFd, OwnedFd), lease: Lease) {
        let (worker, id, record) = (self.worker.clone(), self.id, self.record.clone());
        let live = worker.live.borrow_mut().remove(&id);
        drop(self);
        let Some(doomed) = live.map(|live| live.doomed) else { return };
        // Moved, so that nothing of a parked connection lies scattered among what the running ones give back.
        let record = Rc::unwrap_or_clone(record);
        let parked = Parked { id, record, lease, doomed, consumer, endpoint };
        match worker.parking.park(parked) {
            None => worker.parked_since_trim.update(|count| count + 1),
            Some(refused) => worker.resume(refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, atomic::Ordering::Relaxed},
        task::{Context, Waker},
        time::Instant,
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        task::yield_now,
    };

    use super::*;
    use crate::{
        balance::EndpointState,
        model::Endpoint,
        proxy::{
            connection::{Meaning, Record, tests::table},
            relay::{Leave, Moved},
            shared::tests::shared,
        },
        table::Table,
    };

    /// A worker with one connection: what consumer and endpoint hold of it.
    struct Idle {
        worker: Rc<Worker>,
        consumer: TcpStream,
        endpoint: TcpStream,
    }

    impl Idle {
        /// Parked, after a byte each way.
        async fn new() -> Self {
            let shared = Arc::new(shared(1, 1));
            let worker = Worker::new(shared, 0, Arc::new(table())).unwrap();
            tokio::task::spawn_local(worker.clone().resume_woken());
            tokio::task::spawn_local(worker.clone().send_queued());
            let (consumer, to_consumer) = connection().await;
            let (endpoint, to_endpoint) = connection().await;
            let state = Arc::new(EndpointState::new(Endpoint(endpoint.local_addr().unwrap())));
            let route = worker.table.borrow().routes().next().unwrap().clone();
            worker.shared.count_in(&route).unwrap();
            let peer = consumer.local_addr().unwrap();
            let record = Record {
                route,
                meaning: Meaning { peer, meant: peer, direct: false },
                accepted: Instant::now(),
                connected: Default::default(),
                tries: Default::default(),
                moved: Moved::default(),
                counted: Moved::default(),
                leave: Leave::default(),
            };
            worker.resume(Parked {
                id: 7,
                record,
                lease: state.lease(),
                doomed: None,
                consumer: to_consumer.into_std().unwrap().into(),
                endpoint: to_endpoint.into_std().unwrap().into(),
            });
            let mut idle = Self { worker, consumer, endpoint };
            idle.passes().await;
            idle.park().await;
            idle
        }

        /// A byte each way.
        async fn passes(&mut self) {
            let Self { consumer, endpoint, .. } = self;
            consumer.write_all(b"x").await.unwrap();
            endpoint.read_exact(&mut [0]).await.unwrap();
            endpoint.write_all(b"x").await.unwrap();
            consumer.read_exact(&mut [0]).await.unwrap();
        }

        async fn park(&self) {
            while self.worker.parking.is_empty() {
                self.worker.look();
                yield_now().await;
            }
            assert!(self.worker.live.borrow().is_empty());
            assert_eq!(self.worker.shared.live.load(Relaxed), 1);
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

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (dialled, listener.accept().await.unwrap().0)
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let test = async { tokio::time::timeout(Duration::from_secs(60), test).await };
        let end = tokio::task::LocalSet::new().block_on(&runtime, test);
        end.expect("it does not hang");
    }

    #[test]
    fn an_idle_connection_has_no_task_and_goes_on_as_if_it_had() {
        run(async {
            let mut idle = Idle::new().await;
            for _ in 0..3 {
                idle.passes().await;
                idle.park().await;
            }
            // The endpoint may be the one that speaks, and either may be the one that ends.
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
    fn a_connection_is_shown_once_whether_it_is_parked_or_not() {
        run(async {
            let mut idle = Idle::new().await;
            for parked in [true, false] {
                if !parked {
                    idle.passes().await;
                }
                let mut seen = Vec::new();
                idle.worker
                    .visit(|id, record, _| seen.push((id, parked, record.moved.both())))
                    .await;
                assert_eq!(seen, [(7, parked, if parked { 2 } else { 4 })]);
            }
            // Woken while others are looked at, after the running ones were.
            idle.park().await;
            let mut seen = 0;
            let mut visit = Box::pin(idle.worker.visit(|_, _, _| seen += 1));
            let mut context = Context::from_waker(Waker::noop());
            assert!(visit.as_mut().poll(&mut context).is_pending());
            idle.consumer.write_all(b"x").await.unwrap();
            while !idle.worker.parking.is_empty() {
                yield_now().await;
            }
            visit.await;
            assert_eq!(seen, 1);
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

    #[test]
    fn a_parked_connection_is_reset_when_its_route_goes() {
        run(async {
            let mut idle = Idle::new().await;
            let (tables, follow) = tokio::sync::watch::channel(Arc::new(Table::default()));
            tokio::task::spawn_local(idle.worker.clone().follow(follow));
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
                idle.worker.look();
                yield_now().await;
            }
            assert!(idle.worker.parking.is_empty());
            idle.endpoint.write_all(b"x").await.unwrap();
            idle.endpoint.shutdown().await.unwrap();
            assert_eq!(idle.consumer.read_to_end(&mut Vec::new()).await.unwrap(), 1);
            idle.ended(Outcome::Closed).await;
        });
    }
}
