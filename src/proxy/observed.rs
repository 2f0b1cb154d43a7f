//! A worker's answers about its open connections. They are sent as messages, so that the worker shares no lock with the
//! reader.

use std::{io, net::SocketAddr, os::fd::OwnedFd, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    task::yield_now,
};

use super::{
    connections::{Connection, Held, Parked, Running, State},
    handover::{Exported, Inherited},
    lists::Place,
    worker::Worker,
};
use crate::{
    model::{Endpoint, OriginalDestination, SourceAddress},
    table::Route,
    word::worded,
};

/// A question to a worker.
#[derive(Debug)]
pub(super) enum Ask {
    /// Whether it has its turns.
    Turn(oneshot::Sender<()>),
    /// To count the bytes of live connections up to now.
    Bytes(oneshot::Sender<()>),
    /// For its live connections.
    Connections(oneshot::Sender<Vec<LiveConnection>>),
    /// For duplicates of its listeners.
    Listeners(oneshot::Sender<io::Result<Vec<OwnedFd>>>),
    /// To stand still.
    Freeze(oneshot::Sender<()>),
    /// To go on.
    Thaw(oneshot::Sender<()>),
    /// For some of the connections of a worker that stands still, from this place on, and where the next ones begin.
    Export(usize, oneshot::Sender<(Vec<Exported>, Option<usize>)>),
    /// To let go of connections that another process has.
    LetGo(Vec<Place>, oneshot::Sender<()>),
    /// To take connections of another process, while standing still. Which of them it took.
    Adopt(Vec<Inherited>, oneshot::Sender<Vec<bool>>),
}

/// A connection that was accepted and has not ended.
#[derive(Debug, Clone)]
pub struct LiveConnection {
    /// The worker's number, and the number of its connection: unique since the start.
    pub id: (usize, u64),
    pub state: ConnectionState,
    /// `None` while the connection is held.
    pub route: Option<Arc<Route>>,
    pub source: SourceAddress,
    pub destination: OriginalDestination,
    /// The endpoint that it uses or tries.
    pub endpoint: Option<Endpoint>,
    /// Our own address of the connection to the endpoint. `None` before it is open.
    pub local: Option<SocketAddr>,
    /// The time since it was accepted.
    pub age: Duration,
    /// The time from accepting it until its endpoint connection was open. `None` before.
    pub connect: Option<Duration>,
    pub tries: u8,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

worded! {
    /// What has become of a live connection.
    pub enum ConnectionState {
        /// it waits until its consumer is known
        Held = "held",
        /// an endpoint is being tried
        Connecting = "connecting",
        /// both sides are open, and a task relays between them
        Running = "running",
        /// both sides are open, and nothing was sent for a while
        Parked = "parked",
    }
}

impl LiveConnection {
    fn of(worker: usize, connection: &Connection) -> Self {
        let (id, record) = ((worker, connection.id), connection.record());
        let (captured, accepted) = match &connection.state {
            State::Held(Held { captured, accepted, .. }) => (captured, accepted),
            State::Running(Running { live, .. }) => (&live.record.captured, &live.record.accepted),
            State::Parked(Parked { record, .. }) => (&record.captured, &record.accepted),
        };
        let connect = record.and_then(|record| record.connect.get());
        let endpoint = record.and_then(|record| record.endpoint.borrow().clone());
        Self {
            id,
            state: match connection.state {
                State::Held(_) => ConnectionState::Held,
                State::Running(_) if connect.is_none() => ConnectionState::Connecting,
                State::Running(_) => ConnectionState::Running,
                State::Parked(_) => ConnectionState::Parked,
            },
            route: record.map(|record| record.route.clone()),
            source: captured.source,
            destination: captured.destination,
            endpoint: endpoint.map(|state| state.endpoint),
            local: record.and_then(|record| record.local.get()).map(Into::into),
            age: accepted.elapsed(),
            connect,
            tries: record.map_or(0, |record| record.tries.get()),
            bytes_up: record.map_or(0, |record| record.moved.up.get()),
            bytes_down: record.map_or(0, |record| record.moved.down.get()),
        }
    }
}

impl Worker {
    /// Answers requests. Never returns.
    pub(super) async fn answer(self: Rc<Self>, mut asks: mpsc::UnboundedReceiver<Ask>) {
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Turn(answer) => {
                    let _ = answer.send(());
                }
                // The requester may have given up.
                Ask::Bytes(answer) if answer.is_closed() => {}
                Ask::Connections(answer) if answer.is_closed() => {}
                Ask::Bytes(answer) => {
                    self.visit(|one| one.record().into_iter().for_each(|r| self.count_bytes(r)))
                        .await;
                    let _ = answer.send(());
                }
                Ask::Connections(answer) => {
                    let mut live = Vec::new();
                    self.visit(|one| live.push(LiveConnection::of(self.n, one))).await;
                    let _ = answer.send(live);
                }
                Ask::Listeners(answer) => {
                    let _ = answer.send(self.duplicate_listeners());
                }
                // The requester waits for these answers, and if one fails, the process ends.
                Ask::Freeze(answer) => {
                    self.freeze().await;
                    let _ = answer.send(());
                }
                Ask::Thaw(answer) => {
                    self.thaw();
                    let _ = answer.send(());
                }
                Ask::Export(from, answer) => {
                    let _ = answer.send(self.export(from));
                }
                Ask::LetGo(places, answer) => {
                    self.let_go_of(places).await;
                    let _ = answer.send(());
                }
                Ask::Adopt(connections, answer) => {
                    let taken = connections.into_iter().map(|one| self.adopt(one)).collect();
                    let _ = answer.send(taken);
                }
            }
        }
    }

    /// Looks once at every connection that exists from the start to the end of this call: each keeps its place. Works in
    /// parts, so that relaying does not wait for thousands of connections.
    async fn visit(&self, mut look: impl FnMut(&Connection)) {
        const TURN: usize = 256;
        let mut place = 0;
        loop {
            {
                let all = self.connections.borrow();
                let end = all.places().min(place + TURN);
                (place..end).filter_map(|one| all.get(Place::new(one))).for_each(&mut look);
                if end == all.places() {
                    return;
                }
                place = end;
            }
            yield_now().await;
        }
    }
}
