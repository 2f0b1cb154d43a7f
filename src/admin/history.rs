//! Samples of the last five minutes, so that a plot has data as soon as it is opened.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use super::api;
use crate::{counts::Distribution, outcome::Outcome, proxy::Figures};

/// Samples of the last five minutes. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct History(Arc<Mutex<VecDeque<api::Sample>>>);

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(2);
/// Five minutes.
const SAMPLES: usize = 150;

impl History {
    /// Starts the sampling.
    pub(super) fn start(figures: Figures) -> (Self, JoinHandle<()>) {
        let history = Self::default();
        let task = tokio::spawn(history.clone().run(figures));
        (history, task)
    }

    pub(super) fn read(&self) -> api::History {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        api::History {
            interval_seconds: INTERVAL.as_secs_f64(),
            samples: samples.iter().copied().collect(),
        }
    }

    async fn run(self, figures: Figures) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let (mut before, mut then) = (Reading::of(&figures), Instant::now());
        loop {
            let now = ticks.tick().await;
            let reading = Reading::of(&figures);
            let sample = reading.since(&before, now.duration_since(then), figures.live() as u64);
            let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if samples.len() == SAMPLES {
                samples.pop_front();
            }
            samples.push_back(sample);
            (before, then) = (reading, now);
        }
    }
}

struct Reading {
    started: u64,
    errors: u64,
    connect: Distribution,
}

impl Reading {
    fn of(figures: &Figures) -> Self {
        let errors = Outcome::ALL.iter().filter(|outcome| outcome.is_error());
        Self {
            started: figures.started(),
            errors: errors.map(|outcome| figures.ended(*outcome)).sum(),
            connect: figures.connect(),
        }
    }

    fn since(&self, before: &Self, time: Duration, active: u64) -> api::Sample {
        let per_second = |now: u64, then: u64| {
            (now.saturating_sub(then) as f64 / time.as_secs_f64().max(0.001) * 100.0).round()
                / 100.0
        };
        api::Sample {
            started_per_second: per_second(self.started, before.started),
            errors_per_second: per_second(self.errors, before.errors),
            active,
            connect_p99_seconds: self.connect.since(&before.connect).quantile(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_what_happened_since_the_one_before() {
        let reading = |started, errors| Reading { started, errors, connect: Default::default() };
        let sample = reading(30, 2).since(&reading(10, 1), Duration::from_secs(2), 7);
        let expected = api::Sample {
            started_per_second: 10.0,
            errors_per_second: 0.5,
            active: 7,
            connect_p99_seconds: None,
        };
        assert_eq!(sample, expected);
    }
}
