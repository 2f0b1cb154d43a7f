//! How the workers hear that the active check of an endpoint has failed.

use tokio::sync::watch;

/// Wakes all workers: which endpoint it is, they see for themselves.
#[derive(Debug, Clone, Default)]
pub struct FailedChecks(watch::Sender<()>);

impl FailedChecks {
    pub fn report(&self) {
        self.0.send_replace(());
    }

    pub(crate) fn listen(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }
}
