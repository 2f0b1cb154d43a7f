//! The schedule for a source to re-read everything, independent of events.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::debug;

/// Requests a re-read of every source. Clones share it.
#[derive(Debug, Clone)]
pub struct ResyncRequests {
    /// `-resync`
    every: Duration,
    /// Counts the requests, so that a busy source misses none.
    requests: watch::Sender<u64>,
}

impl ResyncRequests {
    pub fn new(every: Duration) -> Self {
        Self { every, requests: watch::Sender::new(0) }
    }

    /// Requests a re-read of every source now. Also ends a pause after a failure.
    pub fn request(&self) {
        self.requests.send_modify(|requests| *requests += 1);
    }

    /// The schedule of one source.
    pub fn subscribe(&self) -> Resync {
        let Self { every, requests } = self;
        let mut resync =
            Resync { every: *every, requests: requests.subscribe(), at: Instant::now() };
        resync.restart();
        resync
    }
}

/// The re-reads of one source: every `-resync`, and when requested.
#[derive(Debug)]
pub struct Resync {
    every: Duration,
    requests: watch::Receiver<u64>,
    at: Instant,
}

impl Resync {
    /// Waits until a re-read is due. Cancel-safe.
    pub async fn due(&mut self) {
        let Self { requests, at, .. } = self;
        tokio::select! {
            () = sleep_until(*at) => {}
            // Without a sender there are no more requests.
            Ok(()) = requests.changed() => {}
        }
        debug!("source re-reads everything");
        self.restart();
    }

    /// Called when everything is read. The next time is after `-resync`, varied by 10 %, so that sources and hosts that
    /// started together do not stay synchronous.
    pub(super) fn restart(&mut self) {
        self.requests.mark_unchanged();
        self.at = Instant::now() + self.every.mul_f64(0.9 + 0.2 * fastrand::f64());
    }

    /// Waits until a re-read is requested.
    pub(super) async fn requested(&mut self) {
        if self.requests.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// `-resync`
    pub(super) fn every(&self) -> Duration {
        self.every
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_due_at_about_its_time_and_at_each_request() {
        let requests = ResyncRequests::new(Duration::from_secs(100));
        let mut resync = requests.subscribe();
        for _ in 0..10 {
            let start = Instant::now();
            resync.due().await;
            let passed = start.elapsed().as_secs_f64();
            assert!((89.9..=110.1).contains(&passed), "{passed}");
        }
        let start = Instant::now();
        // Requested twice while nothing waits: one re-read is enough for both.
        requests.request();
        requests.request();
        resync.due().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        let again = tokio::time::timeout(Duration::from_secs(80), resync.due()).await;
        assert!(again.is_err(), "the time starts again with each re-read");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_dropped_loses_nothing() {
        let requests = ResyncRequests::new(Duration::from_secs(100));
        let mut resync = requests.subscribe();
        for _ in 0..20 {
            let early = tokio::time::timeout(Duration::from_secs(4), resync.due()).await;
            assert!(early.is_err());
        }
        let soon = tokio::time::timeout(Duration::from_secs(31), resync.due()).await;
        assert!(soon.is_ok(), "the waits before were not counted");
    }
}
