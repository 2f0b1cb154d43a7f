//! Whether embassy does its job yet: each part holds a guard until it does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::info;

/// The part that is never ready again: embassy is about to end.
pub const DRAINING: &str = "draining";

/// What is still being waited for. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, Instant>>>);

/// Held by a part until it is ready.
#[derive(Debug)]
pub struct Guard {
    readiness: Readiness,
    part: &'static str,
}

impl Readiness {
    /// From now on embassy is not ready until the guard is done.
    pub fn wait_for(&self, part: &'static str) -> Guard {
        self.with(|parts| parts.insert(part, Instant::now()));
        Guard { readiness: self.clone(), part }
    }

    /// The parts that are not ready. None: embassy is.
    pub fn pending(&self) -> Vec<&'static str> {
        self.with(|parts| parts.keys().copied().collect())
    }

    /// The same, and for how long each was waited for.
    pub fn waiting(&self) -> Vec<(&'static str, Duration)> {
        self.with(|parts| parts.iter().map(|(part, since)| (*part, since.elapsed())).collect())
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<&'static str, Instant>) -> T) -> T {
        // Each act is one call on the map: a panic elsewhere leaves it whole.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Guard {
    /// The part is ready. A guard that is merely dropped never is: its part has failed.
    pub fn done(self) {
        let since = self.readiness.with(|parts| parts.remove(self.part));
        let pending = self.readiness.pending();
        let took_ms =
            since.map(|since| since.elapsed().as_secs_f64() * 1e3).unwrap_or_default().round();
        if pending.is_empty() {
            info!(part = self.part, took_ms, "ready");
        } else {
            info!(part = self.part, took_ms, waiting_for = pending.join(", "), "part ready");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_guard_is_gone() {
        let readiness = Readiness::default();
        let (listing, capture) = (readiness.wait_for("listing"), readiness.wait_for("capture"));
        assert_eq!(readiness.pending(), ["capture", "listing"]);
        listing.done();
        assert_eq!(readiness.pending(), ["capture"]);
        capture.done();
        assert!(readiness.pending().is_empty());
    }
}
