//! What a worker tells of its live connections, when it is asked: by message, so that it shares no lock with who asks.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Figures, connection::Record, worker::Worker};
use crate::{model::Endpoint, table::Route};

/// A question to a worker.
#[derive(Debug)]
pub(super) enum Ask {
    /// To count the bytes of live connections up to now.
    Bytes(oneshot::Sender<()>),
    /// For its live connections.
    Connections(oneshot::Sender<Vec<LiveConnection>>),
}

/// A connection that is open, or being opened.
#[derive(Debug, Clone)]
pub struct LiveConnection {
    /// Which worker's it is, and which of its connections: unique since the start.
    pub id: (usize, u64),
    pub route: Arc<Route>,
    /// The consumer's address and port.
    pub source: SocketAddr,
    /// The original destination.
    pub destination: SocketAddr,
    /// Where it goes, or is about to.
    pub endpoint: Option<Endpoint>,
    /// Since it was accepted.
    pub age: Duration,
    /// From accepting it until its endpoint's was open; `None` before that.
    pub connect: Option<Duration>,
    pub tries: u8,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

impl Figures {
    /// How long to wait for a worker: one that is busy for longer must not hold up who asks.
    const PATIENCE: Duration = Duration::from_secs(1);

    /// Has the bytes of live connections counted up to now.
    pub async fn refresh(&self) {
        self.ask(Ask::Bytes).await;
    }

    /// All live connections, in no particular order.
    pub async fn connections(&self) -> Vec<LiveConnection> {
        self.ask(Ask::Connections).await.into_iter().flatten().collect()
    }

    /// The answers of all workers that answer.
    async fn ask<T>(&self, ask: impl Fn(oneshot::Sender<T>) -> Ask) -> Vec<T> {
        let asked: Vec<_> = self
            .asks
            .iter()
            .filter_map(|worker| {
                let (answer, answered) = oneshot::channel();
                worker.send(ask(answer)).ok().map(|()| answered)
            })
            .collect();
        let mut answers = Vec::new();
        for answered in asked {
            if let Ok(Ok(answer)) = timeout(Self::PATIENCE, answered).await {
                answers.push(answer);
            }
        }
        answers
    }
}

/// Answers what a worker is asked, for ever.
pub(super) async fn answer(worker: Rc<Worker>, mut asks: mpsc::UnboundedReceiver<Ask>) {
    while let Some(ask) = asks.recv().await {
        match ask {
            // Whoever asked has given up, or may by the time of the answer.
            Ask::Bytes(answer) if answer.is_closed() => {}
            Ask::Connections(answer) if answer.is_closed() => {}
            Ask::Bytes(answer) => {
                worker.count_all_bytes().await;
                let _ = answer.send(());
            }
            Ask::Connections(answer) => {
                let mut live = Vec::new();
                let write_down = |id, record: &Record, endpoint| {
                    let connected = record.connected.get();
                    live.push(LiveConnection {
                        id: (worker.number(), id),
                        route: record.route.clone(),
                        source: record.meaning.peer,
                        destination: record.meaning.meant,
                        endpoint,
                        age: record.accepted.elapsed(),
                        connect: connected.map(|connected| connected.after),
                        tries: record.tries.get(),
                        bytes_up: record.moved.up.get(),
                        bytes_down: record.moved.down.get(),
                    });
                };
                worker.visit(write_down).await;
                let _ = answer.send(live);
            }
        }
    }
}
