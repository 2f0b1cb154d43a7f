//! Readiness: each part holds a guard until it is ready.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tracing::info;

use crate::word::worded;

worded! {
    /// What embassy waits for before it is ready.
    pub enum Part {
        /// the firewall rules
        Capture = "capture",
        /// a first answer of each discovery
        Discovery = "discovery",
        /// the provider's first full answer
        Listing = "listing",
    }
}

/// The parts that are not ready. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<watch::Sender<BTreeMap<Part, Instant>>>);

/// Held by a part until it is ready.
#[derive(Debug)]
pub struct Guard {
    readiness: Readiness,
    part: Part,
}

impl Readiness {
    /// embassy is not ready until this guard is done.
    pub fn wait_for(&self, part: Part) -> Guard {
        self.0.send_modify(|parts| {
            parts.insert(part, Instant::now());
        });
        Guard { readiness: self.clone(), part }
    }

    /// The parts that are not ready. If there are none, all parts are ready.
    pub fn pending(&self) -> Vec<Part> {
        self.0.borrow().keys().copied().collect()
    }

    /// The same, with the time since embassy waits for each part.
    pub fn waiting(&self) -> Vec<(Part, Duration)> {
        self.0.borrow().iter().map(|(part, since)| (*part, since.elapsed())).collect()
    }

    /// Whether embassy waits for a part.
    pub fn awaits(&self, part: Part) -> bool {
        self.0.borrow().contains_key(&part)
    }

    /// Changes when a part becomes ready or not ready.
    pub fn changes(&self) -> watch::Receiver<BTreeMap<Part, Instant>> {
        self.0.subscribe()
    }
}

impl Guard {
    /// The part is ready. If a guard is only dropped, its part has failed and never becomes ready. Whether embassy is ready
    /// depends on more than its parts, and is decided elsewhere (`judgement`).
    pub fn done(self) {
        let mut since = None;
        self.readiness.0.send_modify(|parts| since = parts.remove(&self.part));
        let pending = self.readiness.pending();
        let took_ms =
            since.map(|since| since.elapsed().as_secs_f64() * 1e3).unwrap_or_default().round();
        let waiting_for: Vec<_> = pending.iter().map(|part| part.as_str()).collect();
        let waiting_for = (!waiting_for.is_empty()).then(|| waiting_for.join(", "));
        info!(part = %self.part, took_ms, waiting_for, "part of the start is done");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_guard_is_gone() {
        let readiness = Readiness::default();
        let (listing, capture) =
            (readiness.wait_for(Part::Listing), readiness.wait_for(Part::Capture));
        assert_eq!(readiness.pending(), [Part::Capture, Part::Listing]);
        listing.done();
        assert_eq!(readiness.pending(), [Part::Capture]);
        capture.done();
        assert!(readiness.pending().is_empty());
    }
}
