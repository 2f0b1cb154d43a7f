//! State that the workers share: counters and limits.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::sync::{Notify, mpsc::UnboundedSender, oneshot};

use super::settings::ProxySettings;
use crate::{
    counts::ConnectionCounts,
    limits::FEW,
    model::Millis,
    outcome::{Outcome, Tally},
    table::{Route, RouteNumber},
};

/// What the workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub settings: ProxySettings,
    pub tally: Tally,
    pub counts: Box<[WorkerCounts]>,
    /// The counts of connections that bypass the proxy.
    pub beside: WorkerCounts,
    /// A task that is also asked to update its counts.
    pub also_asked: OnceLock<UnboundedSender<oneshot::Sender<()>>>,
    /// Connections that are open, or being opened.
    pub live: AtomicUsize,
    holds_of_unknown: Mutex<Holds>,
    holds_of_known: Mutex<Holds>,
    /// The start of the clock for ejections.
    pub start: Instant,
    /// Notified when a worker, or a part of one, has ended.
    pub broken: Notify,
    /// Number of takeovers since these counts began.
    pub takeovers: AtomicU64,
    /// Routes that their owners already had in the previous process: connections that were captured before this table
    /// belong to them.
    pub inherited: RwLock<HashSet<RouteNumber>>,
    /// Whether another process has the listeners now.
    pub handed_over: AtomicBool,
}

impl Shared {
    pub(super) fn new(settings: ProxySettings) -> Self {
        Self {
            counts: (0..settings.workers.max(1)).map(|_| WorkerCounts::default()).collect(),
            beside: WorkerCounts::default(),
            settings,
            also_asked: OnceLock::new(),
            tally: Tally::default(),
            live: AtomicUsize::new(0),
            holds_of_unknown: Mutex::default(),
            holds_of_known: Mutex::default(),
            start: Instant::now(),
            broken: Notify::new(),
            takeovers: AtomicU64::new(0),
            inherited: RwLock::default(),
            handed_over: AtomicBool::new(false),
        }
    }

    /// The counts of all workers, and of connections that bypass the proxy.
    pub(super) fn all_counts(&self) -> impl Iterator<Item = &ConnectionCounts> {
        self.counts.iter().chain([&self.beside]).map(|counts| &counts.0)
    }

    pub(super) fn now(&self) -> Millis {
        Millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Counts another open connection of the route's consumer, unless a limit is reached.
    pub(super) fn count_in(&self, route: &Route) -> Result<(), Outcome> {
        if self.settings.memory_short.get() && self.live.load(Relaxed) >= FEW {
            return Err(Outcome::MemoryShort);
        }
        if !one_more(&route.live_of_consumer, self.limit_of_consumer()) {
            return Err(match self.free() {
                0 => Outcome::TooManyConnections,
                _ => Outcome::TooManyOfConsumer,
            });
        }
        if !one_more(&self.live, self.settings.max_connections) {
            route.live_of_consumer.fetch_sub(1, Relaxed);
            return Err(Outcome::TooManyConnections);
        }
        Ok(())
    }

    /// Counts an open connection that another process had. No limit refuses it, because it is already open.
    pub(super) fn count_in_adopted(&self, route: &Route) {
        route.live_of_consumer.fetch_add(1, Relaxed);
        self.live.fetch_add(1, Relaxed);
    }

    /// The current maximum number of open connections of one consumer.
    pub(super) fn limit_of_consumer(&self) -> usize {
        self.settings.max_connections_per_consumer.with(self.free(), self.settings.max_connections)
    }

    /// The number of connections that may still be opened.
    fn free(&self) -> usize {
        self.settings.max_connections.saturating_sub(self.live.load(Relaxed))
    }

    /// Connections that wait until their owner is known. The lock is held only to count one in or out.
    fn holds(&self, waiting: WaitReason) -> MutexGuard<'_, Holds> {
        let holds = match waiting {
            WaitReason::Unknown => &self.holds_of_unknown,
            WaitReason::Known => &self.holds_of_known,
        };
        // Every change leaves the value consistent, so a poisoned lock is harmless.
        holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of waiting connections.
    pub(super) fn held(&self) -> usize {
        self.holds(WaitReason::Unknown).held + self.holds(WaitReason::Known).held
    }

    /// Whether the owner of a route already had it in the previous process. Called only in case of a doubt.
    pub(super) fn is_inherited(&self, route: &Route) -> bool {
        self.inherited.read().unwrap_or_else(PoisonError::into_inner).contains(&route.number)
    }

    pub(super) fn count_out(&self, route: &Route) {
        self.live.fetch_sub(1, Relaxed);
        route.live_of_consumer.fetch_sub(1, Relaxed);
    }
}

/// The counts of one worker, in separate cache lines, so that workers do not slow each other down.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct WorkerCounts(pub ConnectionCounts);

/// Connections that wait until their owner is known, of all workers.
#[derive(Debug, Default)]
pub(super) struct Holds {
    pub(super) held: usize,
    /// The number for each source. Never 0.
    of_source: HashMap<IpAddr, usize>,
}

/// Why a connection waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WaitReason {
    /// No container is known to have its address.
    Unknown,
    /// It is not certain that the container with its address opened it.
    Known,
}

impl WaitReason {
    /// Maximum number of waiting connections, to limit their descriptors. Connections from unknown addresses have a
    /// separate limit. The others may use descriptors of connections that may still be opened.
    fn most(self, free: usize) -> usize {
        match self {
            Self::Unknown => 256,
            Self::Known => free.min(1_024),
        }
    }
}

impl Holds {
    /// Counts another connection of a source. A source may have three times as many as are still free, not counting a
    /// quarter that is kept for sources that have none. So however many it opens, there is room for others.
    fn one_more(&mut self, source: IpAddr, most: usize) -> bool {
        let count = self.of_source.get(&source).copied().unwrap_or_default();
        let free = most.saturating_sub(self.held);
        let may = free > 0 && count < (3 * free.saturating_sub(most / 4)).max(1);
        if may {
            self.add(source);
        }
        may
    }

    fn add(&mut self, source: IpAddr) {
        self.held += 1;
        *self.of_source.entry(source).or_default() += 1;
    }

    fn one_less(&mut self, source: IpAddr) {
        if let Entry::Occupied(mut count) = self.of_source.entry(source) {
            self.held -= 1;
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// The permission to hold a connection, which counts it.
#[derive(Debug)]
pub(super) struct HoldPermit {
    shared: Arc<Shared>,
    waiting: WaitReason,
    source: IpAddr,
}

impl HoldPermit {
    /// For a connection whose owner is uncertain. `None` if too many of its kind, or from its source, are held.
    pub(super) fn of(shared: &Arc<Shared>, waiting: WaitReason, source: IpAddr) -> Option<Self> {
        let most = waiting.most(shared.free());
        let may = shared.holds(waiting).one_more(source, most);
        may.then(|| Self { shared: shared.clone(), waiting, source })
    }

    /// For a connection that another process held. No limit refuses it.
    pub(super) fn of_adopted(shared: &Arc<Shared>, waiting: WaitReason, source: IpAddr) -> Self {
        shared.holds(waiting).add(source);
        Self { shared: shared.clone(), waiting, source }
    }
}

impl Drop for HoldPermit {
    fn drop(&mut self) {
        self.shared.holds(self.waiting).one_less(self.source);
    }
}

/// Counts one more, unless the limit is reached.
fn one_more(count: &AtomicUsize, most: usize) -> bool {
    let more = |count| (count < most).then_some(count + 1);
    count.fetch_update(Relaxed, Relaxed, more).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::ConsumerLimit,
        memory::Use,
        proxy::testing::{consumer, route, settings, shared, table, table_after},
        table::Table,
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
    fn no_limit_refuses_what_another_process_had() {
        let (shared, table) = (Arc::new(shared(2, 1)), table());
        let route = table.routes().next().unwrap();
        (0..5).for_each(|_| shared.count_in_adopted(route));
        assert_eq!((shared.live.load(Relaxed), shared.free()), (5, 0));
        assert_eq!(shared.count_in(route), Err(Outcome::TooManyConnections));
        (0..5).for_each(|_| shared.count_out(route));
        assert_eq!(shared.count_in(route), Ok(()));
        let source = route.key.source;
        let adopt = |_| HoldPermit::of_adopted(&shared, WaitReason::Unknown, source);
        let adopted: Vec<_> = (0..300).map(adopt).collect();
        assert_eq!(shared.held(), 300);
        assert!(HoldPermit::of(&shared, WaitReason::Unknown, source).is_none());
        drop(adopted);
        assert_eq!(shared.held(), 0);
    }

    #[test]
    fn one_consumer_leaves_room_for_others() {
        let settings = ProxySettings {
            max_connections: 1_000,
            max_connections_per_consumer: ConsumerLimit::Share,
            ..settings()
        };
        let shared = Shared::new(settings);
        let names = ["172.17.0.2", "172.17.0.3", "172.17.0.5"];
        let consumers = names.map(|name| consumer(name, name.parse().unwrap(), "redis;6379"));
        let table = table_after(&Table::default(), &consumers, &[]).unwrap();
        let route = |n: usize| route(&table, names[n].parse().unwrap(), 6379).unwrap();
        let fill = |n| (0..2_000).filter(|_| shared.count_in(&route(n)).is_ok()).count();
        let first = fill(0);
        assert!((690..720).contains(&first), "{first}");
        assert_eq!(shared.count_in(&route(0)), Err(Outcome::TooManyOfConsumer));
        assert!(shared.limit_of_consumer() <= first, "as the API says");
        let second = fill(1);
        assert!((150..200).contains(&second), "{second}");
        let third = fill(2);
        assert!((16..100).contains(&third), "{third}");
        assert!(shared.free() > 50, "for those who have fewer than 16");
        // A consumer with more than its share keeps its connections, and gets more only when there is room.
        assert_eq!(shared.count_in(&route(0)), Err(Outcome::TooManyOfConsumer));
        (0..first).for_each(|_| shared.count_out(&route(0)));
        assert!(fill(1) > 100);
        // If all connections are in use, that is the reason.
        shared.live.fetch_add(shared.free(), Relaxed);
        assert_eq!(shared.count_in(&route(0)), Err(Outcome::TooManyConnections));
    }

    #[test]
    fn of_the_connections_that_wait_each_source_has_a_share() {
        let shared = Arc::new(shared(1, 1));
        let source = |n: u32| IpAddr::V4(n.into());
        let hold = |n, times: usize| -> Vec<_> {
            let of = |waiting| HoldPermit::of(&shared, waiting, source(n));
            (0..times).filter_map(|_| of(WaitReason::Unknown)).collect()
        };
        let first = hold(1, 10_000);
        assert_eq!((first.len(), shared.held()), (144, 144));
        let second = hold(2, 10_000);
        assert!((30..64).contains(&second.len()), "{}", second.len());
        // However many there are, a source without connections gets a place.
        let others: Vec<_> = (10..60).map(|n| hold(n, 10_000)).collect();
        assert!(others.iter().all(|held| !held.is_empty()));
        assert!(shared.held() < 256);
        let known = HoldPermit::of(&shared, WaitReason::Known, source(1));
        assert!(
            known.is_some(),
            "a known container does not share the places of unknown addresses"
        );
        drop(known);
        drop((first, others));
        assert!(!hold(1, 1).is_empty());
        drop(second);
        let holds = shared.holds(WaitReason::Unknown);
        assert_eq!((holds.held, holds.of_source.len()), (0, 0), "nothing is left of who waited");
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
