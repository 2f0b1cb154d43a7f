//! The life of a worker's thread.

use std::{
    io,
    net::TcpListener,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{listener::adopt, observed::Ask, shared::Shared, worker::Worker};
use crate::{outcome::Outcome, table::Table};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Accepting and relaying.
    Serving,
    /// The same, until the connections that are open at its start have ended.
    Leaving,
    /// Only relaying. Queued connections are accepted before.
    Draining,
    /// Remaining connections are reset.
    Ended,
}

/// Runs a worker, given by its number and whether it is frozen at first, until it is told to end and its connections are
/// gone. Drops `older` when the connections have ended that were open at the order to leave.
pub(super) async fn run(
    (shared, n, begins_frozen): (Arc<Shared>, usize, bool),
    listeners: Vec<TcpListener>,
    mut tables: watch::Receiver<Arc<Table>>,
    mut phase: watch::Receiver<Phase>,
    asks: mpsc::UnboundedReceiver<Ask>,
    older: mpsc::Sender<()>,
) -> io::Result<()> {
    let worker = Worker::new(shared, n, tables.borrow_and_update().clone())?;
    if begins_frozen {
        worker.frozen.begin();
    }
    let listeners = listeners.into_iter().map(|listener| adopt(listener).map(Rc::new));
    let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
    worker.listeners.replace(listeners.iter().map(Rc::downgrade).collect());
    let mut accepting = JoinSet::new();
    for listener in &listeners {
        accepting.spawn_local(worker.clone().accept(listener.clone()));
    }
    let mut others = JoinSet::new();
    others.spawn_local(worker.clone().follow(tables));
    others.spawn_local(worker.clone().answer(asks));
    others.spawn_local(worker.clone().park_idle());
    others.spawn_local(worker.clone().resume_woken());
    others.spawn_local(send_queued(worker.clone()));

    tokio::select! {
        () = serve(&worker, &mut phase, older) => {}
        // None of them ever ends, unless it panics.
        _ = accepting.join_next() => break_off(&worker),
        _ = others.join_next() => break_off(&worker),
    }
    drop(accepting);
    // Queued connections are left to the process that has the listeners now.
    if !worker.shared.handed_over.load(Relaxed) {
        listeners.iter().for_each(|listener| worker.accept_queued(listener));
    }
    drop(listeners);
    tokio::select! {
        () = worker.all_ended() => {}
        _ = phase.wait_for(|phase| *phase == Phase::Ended) => {
            worker.end_all(Outcome::Shutdown, |_| true);
            worker.all_ended().await;
        }
    }
    Ok(())
}

/// Waits for the order to stop accepting.
async fn serve(worker: &Rc<Worker>, phase: &mut watch::Receiver<Phase>, older: mpsc::Sender<()>) {
    // The sender lives as long as the proxy: if it is gone, the proxy has ended, and this ends too.
    let entered = phase.wait_for(|phase| *phase >= Phase::Leaving).await.map(|phase| *phase);
    if entered.is_ok_and(|phase| phase == Phase::Leaving) {
        tokio::select! {
            () = worker.present_ones_ended() => drop(older),
            // They have had their time, unless another process has it now.
            _ = phase.wait_for(|phase| *phase >= Phase::Draining) => {
                if !worker.shared.handed_over.load(Relaxed) {
                    worker.end_present_ones();
                }
                return;
            }
        }
    }
    let _ = phase.wait_for(|phase| *phase >= Phase::Draining).await;
}

async fn send_queued(worker: Rc<Worker>) {
    worker.buffers.send_queued().await;
}

/// Ends the whole proxy, because this worker cannot continue: it would still get a share of all new connections, and not
/// answer them.
fn break_off(worker: &Worker) {
    tracing::error!(worker = worker.n, "a part of the data path has ended");
    worker.shared.broken.notify_one();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::proxy::{Proxy, listener, settings::ProxySettings, testing::settings};

    #[tokio::test]
    async fn a_part_of_a_worker_that_ends_is_noticed() {
        let (tables, receiver) = watch::channel(Arc::new(Table::default()));
        let mut proxy = Proxy::start(settings(), &receiver).unwrap();
        drop(receiver);
        let failed = timeout(Duration::from_millis(50), proxy.failed()).await;
        assert!(failed.is_err(), "nothing has ended");
        // The task that follows the tables ends, and all others continue.
        drop(tables);
        timeout(Duration::from_secs(60), proxy.failed()).await.unwrap();
        timeout(Duration::from_secs(60), proxy.ended()).await.unwrap();
    }

    #[tokio::test]
    async fn a_process_with_more_or_fewer_workers_continues_with_the_listeners_of_another() {
        for (before, workers) in [(1, 3), (3, 1)] {
            let (_tables, receiver) = watch::channel(Arc::new(Table::default()));
            let sets = listener::open(0, before, Duration::ZERO).unwrap();
            let sets = sets.into_iter().map(|set| set.into_iter().map(Into::into).collect());
            let settings = ProxySettings { workers, ..settings() };
            let mut proxy = Proxy::continuing(settings, &receiver, sets.collect()).unwrap();
            proxy.go_on().await;
            let failed = timeout(Duration::from_millis(50), proxy.failed()).await;
            assert!(failed.is_err(), "{workers} workers, and listeners of {before}");
            // Each of them accepts.
            let sets = proxy.ask_all(crate::proxy::observed::Ask::Listeners).await.unwrap();
            let of_workers: Vec<_> = sets.into_iter().map(|set| set.unwrap().len()).collect();
            assert!(
                of_workers.len() == workers && of_workers.iter().all(|n| *n > 0),
                "{of_workers:?}"
            );
            // As with a table that has their routes. Here the worker that accepts them refuses them.
            let port = proxy.addresses[0].port();
            for _ in 0..20 {
                // The reset may be quicker than the answer.
                let _ = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
            }
            let refused = async {
                while proxy.shared.tally.sum() < 20 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(Duration::from_secs(60), refused).await.unwrap();
            proxy.drain();
            timeout(Duration::from_secs(60), proxy.ended()).await.unwrap();
        }
    }
}
