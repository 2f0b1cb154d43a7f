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

/// A reader of the figures. It outlives the proxy. Clones share it.
#[derive(Debug, Clone)]
pub struct Figures {
    shared: Arc<Shared>,
    /// The request channel of each worker.
    asks: Arc<[UnboundedSender<Ask>]>,
}

impl Figures {
    /// How long to wait for a worker: a worker that is busy for longer must not delay the reader.
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

    /// Connections that wait until their container is known.
    pub fn held(&self) -> usize {
        self.shared.held()
    }

    /// Maximum number of open connections.
    pub fn limit(&self) -> usize {
        self.shared.settings.max_connections
    }

    /// The current maximum number of open connections of one consumer. `None`: no limit.
    pub fn limit_of_consumer(&self) -> Option<usize> {
        Some(self.shared.limit_of_consumer()).filter(|limit| *limit < usize::MAX)
    }

    /// Whether connections are refused because memory is nearly used up.
    pub fn memory_short(&self) -> bool {
        self.shared.settings.memory_short.get()
    }

    /// Takeovers between processes since these counts began.
    pub fn takeovers(&self) -> u64 {
        self.shared.takeovers.load(Relaxed)
    }

    /// Connections with this outcome, since the start.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.shared.tally.get(outcome)
    }

    /// Captured connections that have arrived since the start, with or without a route. Never decreases. A refused one may
    /// count twice.
    pub fn captured(&self) -> u64 {
        use Outcome::{DirectDial, NoOriginalDestination};
        let arrived = |outcome: &&Outcome| {
            outcome.is_refusal() && !matches!(outcome, DirectDial | NoOriginalDestination)
        };
        let refused = Outcome::ALL.iter().filter(arrived).map(|outcome| self.ended(*outcome));
        self.started() + refused.sum::<u64>()
    }

    /// Connections accepted for a route, since the start.
    pub fn started(&self) -> u64 {
        self.shared.all_counts().map(|counts| counts.started.load(Relaxed)).sum()
    }

    /// Bytes from consumers to endpoints, and back, since the start. For open connections as of the last
    /// [`Figures::refresh`].
    pub fn bytes(&self) -> (u64, u64) {
        let of = |counts: &ConnectionCounts| {
            (counts.bytes_up.load(Relaxed), counts.bytes_down.load(Relaxed))
        };
        self.shared.all_counts().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// The time from accepting a connection until its endpoint connection was open.
    pub fn connect(&self) -> Distribution {
        let mut sum = Distribution::default();
        self.shared.all_counts().for_each(|counts| sum.add(&counts.connect.read()));
        sum
    }

    /// The data path's clock, which dates ejections and errors.
    pub fn now(&self) -> Millis {
        self.shared.now()
    }

    /// Updates the counts of the bytes of open connections, and of connections that bypass the proxy.
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

    /// Registers a task that counts connections that bypass the proxy. It is asked at each [`Figures::refresh`]. Later
    /// calls change nothing.
    pub(crate) fn also_asks(&self, who: UnboundedSender<oneshot::Sender<()>>) {
        let _ = self.shared.also_asked.set(who);
    }

    /// The counts of connections that bypass the proxy. They are included in all sums.
    pub(crate) fn beside(&self) -> &ConnectionCounts {
        &self.shared.beside.0
    }

    /// Counts ended connections that bypassed the proxy.
    pub(crate) fn ended_beside(&self, outcome: Outcome, times: u64) {
        self.shared.tally.add(outcome, times);
    }

    /// All open connections, not sorted.
    pub async fn connections(&self) -> Vec<LiveConnection> {
        self.ask(Ask::Connections).await.into_iter().flatten().collect()
    }

    /// The answers of all workers that answer in time.
    async fn ask<T>(&self, ask: impl Fn(oneshot::Sender<T>) -> Ask) -> Vec<T> {
        let asked = self.asks.iter().filter_map(|worker| {
            let (answer, answered) = oneshot::channel();
            worker.send(ask(answer)).ok().map(|()| answered)
        });
        let mut answers = Vec::new();
        // All workers are asked before the first answer is awaited.
        for answered in asked.collect::<Vec<_>>() {
            if let Ok(Ok(answer)) = timeout(Self::PATIENCE, answered).await {
                answers.push(answer);
            }
        }
        answers
    }
}
