//! What all relays of a worker share.

use std::cell::RefCell;

use tokio::sync::Notify;

use super::{
    batch::{Batch, Ring},
    pipe::Pipes,
    turns::Turns,
};

#[derive(Debug)]
pub(in crate::proxy) struct RelayBuffers {
    pub(super) batch: RefCell<Batch>,
    /// Notified when a message is queued.
    pub(super) queued: Notify,
    pub(super) pipes: RefCell<Pipes>,
    pub(super) turns: Turns,
}

impl RelayBuffers {
    /// `pipes`: maximum number of pipes for splicing bulk; with 0, everything is copied. Must be called in the thread that will use it.
    pub(in crate::proxy) fn new(pipes: usize) -> Self {
        let ring = Ring::new().inspect_err(
            |error| tracing::debug!(%error, "io_uring is not available; using one write per message"),
        );
        Self::with(pipes, ring.ok())
    }

    pub(super) fn with(pipes: usize, ring: Option<Ring>) -> Self {
        Self {
            batch: RefCell::new(Batch::new(ring)),
            queued: Notify::new(),
            pipes: RefCell::new(Pipes::new(pipes)),
            turns: Turns::default(),
        }
    }

    /// Sends what the relays queue, each time after all ready tasks have had their turn. Never returns.
    pub(in crate::proxy) async fn send_queued(&self) {
        loop {
            // A notified task runs after the tasks that are ready now.
            self.queued.notified().await;
            self.send_now();
        }
    }

    pub(super) fn send_now(&self) {
        let mut batch = self.batch.borrow_mut();
        if !batch.is_empty() {
            batch.send();
        }
    }

    /// Notes traffic other than bulk, which bulk must not delay.
    pub(in crate::proxy) fn others_are_busy(&self) {
        self.turns.shorten();
    }
}
