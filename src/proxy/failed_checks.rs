//! Notifies the workers that the active check of an endpoint has failed.

use tokio::sync::watch;

/// Wakes all workers. They find out themselves which endpoint it is.
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
