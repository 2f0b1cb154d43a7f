//! State that the workers share: counters and limits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::sync::Notify;

use super::settings::ProxySettings;
use crate::{
    counts::ConnectionCounts,
    limits::FEW,
    model::Millis,
    outcome::{Outcome, Tally},
    table::Route,
};

/// What the workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub settings: ProxySettings,
    pub tally: Tally,
    pub counts: Box<[WorkerCounts]>,
    /// Connections that are open, or being opened.
    pub live: AtomicUsize,
    /// Connections that wait until their owner is known.
    pub held: AtomicUsize,
    /// When the clock of ejections started.
    pub start: Instant,
    /// Notified when a worker, or a part of one, has ended.
    pub broken: Notify,
}

impl Shared {
    pub(super) fn new(settings: ProxySettings) -> Self {
        Self {
            counts: (0..settings.workers.max(1)).map(|_| WorkerCounts::default()).collect(),
            settings,
            tally: Tally::default(),
            live: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            start: Instant::now(),
            broken: Notify::new(),
        }
    }

    pub(super) fn now(&self) -> Millis {
        Millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Counts one more live connection of the route's consumer, if there may be one more.
    pub(super) fn count_in(&self, route: &Route) -> Result<(), Outcome> {
        let of_consumer = self.settings.max_connections_per_consumer.unwrap_or(usize::MAX);
        if self.settings.memory_short.get() && self.live.load(Relaxed) >= FEW {
            return Err(Outcome::MemoryShort);
        }
        if !one_more(&route.live_of_consumer, of_consumer) {
            return Err(Outcome::TooManyOfConsumer);
        }
        if !one_more(&self.live, self.settings.max_connections) {
            route.live_of_consumer.fetch_sub(1, Relaxed);
            return Err(Outcome::TooManyConnections);
        }
        Ok(())
    }

    pub(super) fn count_out(&self, route: &Route) {
        self.live.fetch_sub(1, Relaxed);
        route.live_of_consumer.fetch_sub(1, Relaxed);
    }
}

/// What a worker counts for itself, in cache lines of its own: the others need not wait for it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct WorkerCounts(pub ConnectionCounts);

/// Allows a connection to be held, and counts it.
#[derive(Debug)]
pub(super) struct HoldPermit(Arc<Shared>);

impl HoldPermit {
    /// Limits the descriptors that connections from unknown addresses can use.
    pub(super) const MOST: usize = 256;

    /// For a connection that waits for its container to become known. `None` if none may wait, or enough do.
    pub(super) fn for_unknown(shared: &Arc<Shared>) -> Option<Self> {
        if shared.settings.hold.is_zero() { None } else { Self::for_doubted(shared) }
    }

    /// For a connection whose owner is looked up in the kernel. `None` if enough are held.
    pub(super) fn for_doubted(shared: &Arc<Shared>) -> Option<Self> {
        let one_more = |held| (held < Self::MOST).then_some(held + 1);
        shared.held.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        Some(Self(shared.clone()))
    }
}

impl Drop for HoldPermit {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Relaxed);
    }
}

/// Counts one more, if there may be one more.
fn one_more(count: &AtomicUsize, most: usize) -> bool {
    let more = |count| (count < most).then_some(count + 1);
    count.fetch_update(Relaxed, Relaxed, more).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::Use,
        proxy::testing::{shared, table},
    };

    #[test]
    fn while_memory_is_short_there_are_a_few_connections() {
        let (shared, table) = (shared(1_000, 1_000), table());
        let route = table.routes().next().unwrap();
        shared.settings.memory_short.look(Use { used: 95, limit: 100 });
        let counted = (0..1_000).filter(|_| shared.count_in(route).is_ok()).count();
        assert_eq!((counted, shared.live.load(Relaxed)), (FEW, FEW));
        assert_eq!(shared.count_in(route), Err(Outcome::MemoryShort));
        shared.settings.memory_short.look(Use { used: 50, limit: 100 });
        assert_eq!(shared.count_in(route), Ok(()));
    }

    #[test]
    fn not_one_connection_more_than_allowed_is_counted_in() {
        for (most, of_consumer, refused) in [
            (1_000, 2_000, Outcome::TooManyConnections),
            (2_000, 1_000, Outcome::TooManyOfConsumer),
        ] {
            let (shared, table) = (shared(most, of_consumer), table());
            let route = table.routes().next().unwrap();
            let counted = std::thread::scope(|scope| {
                let count = || (0..1_000).filter(|_| shared.count_in(route).is_ok()).count();
                let threads = [(); 4].map(|()| scope.spawn(count));
                threads.map(|thread| thread.join().unwrap()).iter().sum::<usize>()
            });
            let of_consumer = route.live_of_consumer.load(Relaxed);
            assert_eq!((counted, shared.live.load(Relaxed), of_consumer), (1_000, 1_000, 1_000));
            assert_eq!(shared.count_in(route), Err(refused));
            shared.count_out(route);
            assert_eq!(shared.count_in(route), Ok(()));
        }
    }
}
