//! Figures of the data path, for metrics and API.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    sync::{mpsc::UnboundedSender, oneshot},
    time::timeout,
};

use super::{
    observed::{Ask, LiveConnection},
    shared::Shared,
};
use crate::{
    counts::{ConnectionCounts, Distribution},
    model::Millis,
    outcome::Outcome,
};

/// A reader of the figures; it outlives the proxy. Clones share it.
#[derive(Debug, Clone)]
pub struct Figures {
    shared: Arc<Shared>,
    /// Where each worker is asked what it has.
    asks: Arc<[UnboundedSender<Ask>]>,
}

impl Figures {
    /// How long to wait for a worker: one that is busy for longer must not hold up who asks.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(shared: Arc<Shared>, asks: Arc<[UnboundedSender<Ask>]>) -> Self {
        Self { shared, asks }
    }

    /// Waits until every worker has had a turn. One that stands still lets this wait; one that has ended does not.
    pub async fn turns(&self) {
        let turns = self.asks.iter().map(|worker| {
            let (answer, answered) = oneshot::channel();
            let _ = worker.send(Ask::Turn(answer));
            answered
        });
        futures_util::future::join_all(turns).await;
    }

    /// Connections that are open, or being opened.
    pub fn live(&self) -> usize {
        self.shared.live.load(Relaxed)
    }

    /// Connections that wait for their container to become known.
    pub fn held(&self) -> usize {
        self.shared.held()
    }

    /// Connections that may be open at a time.
    pub fn limit(&self) -> usize {
        self.shared.settings.max_connections
    }

    /// Connections of one consumer that may be open now. `None`: no limit.
    pub fn limit_of_consumer(&self) -> Option<usize> {
        Some(self.shared.limit_of_consumer()).filter(|limit| *limit < usize::MAX)
    }

    /// Whether connections are refused because memory is nearly used up.
    pub fn memory_short(&self) -> bool {
        self.shared.settings.memory_short.get()
    }

    /// Takeovers from one process to the next since these counts began.
    pub fn takeovers(&self) -> u64 {
        self.shared.takeovers.load(Relaxed)
    }

    /// Connections that ended so, since the start.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.shared.tally.get(outcome)
    }

    /// Captured connections that have arrived since the start, with a route or without; no connection that ends changes it. A
    /// refused one may count twice.
    pub fn captured(&self) -> u64 {
        use Outcome::{DirectDial, NoOriginalDestination};
        let arrived = |outcome: &&Outcome| {
            outcome.is_refusal() && !matches!(outcome, DirectDial | NoOriginalDestination)
        };
        let refused = Outcome::ALL.iter().filter(arrived).map(|outcome| self.ended(*outcome));
        self.started() + refused.sum::<u64>()
    }

    /// Connections that were accepted for a route, since the start.
    pub fn started(&self) -> u64 {
        self.shared.all_counts().map(|counts| counts.started.load(Relaxed)).sum()
    }

    /// Bytes from consumers to endpoints, and back, since the start; of live connections, as of the last
    /// [`Figures::refresh`].
    pub fn bytes(&self) -> (u64, u64) {
        let of = |counts: &ConnectionCounts| {
            (counts.bytes_up.load(Relaxed), counts.bytes_down.load(Relaxed))
        };
        self.shared.all_counts().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// How long it took from accepting a connection until its endpoint's was open.
    pub fn connect(&self) -> Distribution {
        let mut sum = Distribution::default();
        self.shared.all_counts().for_each(|counts| sum.add(&counts.connect.read()));
        sum
    }

    /// The data path's clock, by which ejections and errors are dated.
    pub fn now(&self) -> Millis {
        self.shared.now()
    }

    /// Has the bytes of live connections counted up to now, and what does not go through the proxy.
    pub async fn refresh(&self) {
        let also = self.shared.also_asked.get().and_then(|also| {
            let (answer, answered) = oneshot::channel();
            also.send(answer).ok().map(|()| answered)
        });
        self.ask(Ask::Bytes).await;
        if let Some(answered) = also {
            let _ = timeout(Self::PATIENCE, answered).await;
        }
    }

    /// Who counts connections that do not go through the proxy is asked to do so at each [`Figures::refresh`]. The first one stays.
    pub(crate) fn also_asks(&self, who: UnboundedSender<oneshot::Sender<()>>) {
        let _ = self.shared.also_asked.set(who);
    }

    /// The counts of connections that do not go through the proxy; part of all sums.
    pub(crate) fn beside(&self) -> &ConnectionCounts {
        &self.shared.beside.0
    }

    /// So many connections ended that did not go through the proxy.
    pub(crate) fn ended_beside(&self, outcome: Outcome, times: u64) {
        self.shared.tally.add(outcome, times);
    }

    /// All live connections, in no particular order.
    pub async fn connections(&self) -> Vec<LiveConnection> {
        self.ask(Ask::Connections).await.into_iter().flatten().collect()
    }

    /// The answers of all workers that answer.
    async fn ask<T>(&self, ask: impl Fn(oneshot::Sender<T>) -> Ask) -> Vec<T> {
        let asked = self.asks.iter().filter_map(|worker| {
            let (answer, answered) = oneshot::channel();
            worker.send(ask(answer)).ok().map(|()| answered)
        });
        let mut answers = Vec::new();
        // All are asked before the first is waited for.
        for answered in asked.collect::<Vec<_>>() {
            if let Ok(Ok(answer)) = timeout(Self::PATIENCE, answered).await {
                answers.push(answer);
            }
        }
        answers
    }
}
