//! Readiness: each part holds a guard until it is ready.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::info;

use crate::word::worded;

worded! {
    /// What embassy waits for before it is ready.
    pub enum Part {
        /// the firewall rules
        Capture = "capture",
        /// a first answer of each discovery
        Discovery = "discovery",
        /// embassy is shutting down, and will not be ready again
        Draining = "draining",
        /// the provider's first full answer
        Listing = "listing",
    }
}

/// The parts that are not ready. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<Part, Instant>>>);

/// Held by a part until it is ready.
#[derive(Debug)]
pub struct Guard {
    readiness: Readiness,
    part: Part,
}

impl Readiness {
    /// embassy is not ready until this guard is done.
    pub fn wait_for(&self, part: Part) -> Guard {
        self.with(|parts| parts.insert(part, Instant::now()));
        Guard { readiness: self.clone(), part }
    }

    /// The parts that are not ready. None: embassy is.
    pub fn pending(&self) -> Vec<Part> {
        self.with(|parts| parts.keys().copied().collect())
    }

    /// The same, with the time since embassy waits for each.
    pub fn waiting(&self) -> Vec<(Part, Duration)> {
        self.with(|parts| parts.iter().map(|(part, since)| (*part, since.elapsed())).collect())
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<Part, Instant>) -> T) -> T {
        // Each act is one call on the map: a panic elsewhere leaves it whole.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Guard {
    /// The part is ready. A guard that is merely dropped never is: its part has failed.
    pub fn done(self) {
        let since = self.readiness.with(|parts| parts.remove(&self.part));
        let pending = self.readiness.pending();
        let took_ms =
            since.map(|since| since.elapsed().as_secs_f64() * 1e3).unwrap_or_default().round();
        if pending.is_empty() {
            info!(part = %self.part, took_ms, "embassy is ready");
        } else {
            let waiting_for: Vec<_> = pending.iter().map(|part| part.as_str()).collect();
            info!(part = %self.part, took_ms, waiting_for = waiting_for.join(", "), "component ready");
        }
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
