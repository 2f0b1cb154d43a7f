//! Tests of who is let in: nobody on what the address's next owner asked for.

use std::{io::Write, net::Shutdown};

use tokio::io::AsyncReadExt;

use super::*;
use crate::{
    model::{ConsumerId, ContainerId, Process, RunEnd},
    proxy::{connection::tests::table_of, shared::tests::shared},
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

/// A connection that has sent something, and perhaps ended its direction, as it is accepted. Its other end is the
/// container's, or nobody's.
async fn connection(ends: bool, owners: bool) -> (std::net::TcpStream, Socket, Meaning) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = listener.local_addr().unwrap();
    let mut client = std::net::TcpStream::connect(dialled).unwrap();
    client.write_all(b"x").unwrap();
    if ends {
        client.shutdown(Shutdown::Write).unwrap();
    }
    let (stream, peer) = listener.accept().await.unwrap();
    let elsewhere = "127.0.0.9:9".parse().unwrap();
    let meant = if owners { dialled } else { elsewhere };
    (client, Socket::new(stream), Meaning { peer, meant, direct: false })
}

async fn is_let_in(born: Instant, paused_at: Option<Instant>, ends: bool, owners: bool) -> bool {
    let (worker, route) = worker(born);
    worker.pause.set(paused_at.map(|start| Pause::ended(None, start)));
    let (client, socket, meaning) = connection(ends, owners).await;
    worker.admit_to(socket, meaning, route.clone());
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
    worker.abort(|_, _, _| Some(Outcome::Shutdown));
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

#[tokio::test]
async fn an_owner_that_has_ended_is_served_no_more() {
    let test = async {
        let (worker, route) = worker(Instant::now());
        route.ends[0].mark_ended();
        let (_client, socket, meaning) = connection(true, true).await;
        worker.admit_to(socket, meaning, route);
        let refused = async {
            while worker.shared.tally.get(Outcome::UnknownConsumer) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), refused).await.unwrap();
    };
    tokio::task::LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_part_of_a_worker_that_ends_is_noticed() {
    let (tables, receiver) = watch::channel(Arc::new(Table::default()));
    let settings = shared(1, 1).settings;
    let mut proxy = super::super::Proxy::start(settings, &receiver).unwrap();
    drop(receiver);
    let failed = tokio::time::timeout(Duration::from_millis(50), proxy.failed()).await;
    assert!(failed.is_err(), "nothing has ended");
    // The task that follows the tables ends, and every other goes on.
    drop(tables);
    tokio::time::timeout(Duration::from_secs(60), proxy.failed()).await.unwrap();
    let deadline = Duration::from_secs(60);
    tokio::time::timeout(deadline, proxy.ended()).await.unwrap();
}
