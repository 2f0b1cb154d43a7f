//! Between a follower and the listeners: finds out which container connects from an unknown address.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, watch},
    time::sleep_until,
};

/// Asks a follower to look for unknown containers after a connection from an unknown address, and reports if there is none.
/// The follower also reports when a known container may have lost its address. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Lookup(Arc<LookupState>);

#[derive(Debug)]
struct LookupState {
    /// See [`MEMORY`].
    memory: Duration,
    asked: Notify,
    /// Counts the finished looks.
    over: watch::Sender<u64>,
    strangers: Mutex<Strangers>,
    moves: AtomicU64,
    doubts: AtomicU64,
    /// The number of doubts that were given up without an answer.
    given_up: AtomicU64,
}

/// How long it is remembered that no container has an address, unless the engine reports something new. Also the interval
/// between two looks that find nothing, so that unknown addresses do not load the engine.
const MEMORY: Duration = Duration::from_secs(1);
/// Minimum interval after a look that found all requested addresses.
const PAUSE: Duration = Duration::from_millis(50);

impl Default for LookupState {
    fn default() -> Self {
        Self {
            memory: MEMORY,
            asked: Notify::default(),
            over: watch::Sender::default(),
            strangers: Mutex::default(),
            moves: AtomicU64::default(),
            doubts: AtomicU64::default(),
            given_up: AtomicU64::default(),
        }
    }
}

impl Lookup {
    /// Like the default, with another [`MEMORY`].
    #[cfg(test)]
    pub(crate) fn that_remembers(memory: Duration) -> Self {
        Self(Arc::new(LookupState { memory, ..LookupState::default() }))
    }

    /// Requests a look for the container with this address. Requests that arrive before the look starts share it.
    pub fn ask(&self, address: IpAddr) {
        self.strangers().ask(address);
        self.0.asked.notify_one();
    }

    /// Whether a look that began after `dialled` found that no container has this address.
    pub fn is_nobodys(&self, address: &IpAddr, dialled: Instant) -> bool {
        self.strangers().is_nobodys(address, dialled)
    }

    /// Whether it was recently found that no container has this address.
    pub fn was_nobodys(&self, address: &IpAddr) -> bool {
        self.strangers().is_remembered(address, Instant::now(), self.0.memory)
    }

    /// Changes when a look is over, and when the doubts are given up.
    pub fn looks(&self) -> watch::Receiver<u64> {
        self.0.over.subscribe()
    }

    /// How often an interface of this host disappeared. Each time, a container may have left a network, whether the engine
    /// reports it or not.
    pub fn moves(&self) -> u64 {
        self.0.moves.load(Relaxed)
    }

    /// Notes that an interface disappeared.
    pub(crate) fn moved(&self) {
        self.0.moves.fetch_add(1, Relaxed);
    }

    /// How often a container appeared that may have got another one's address.
    pub fn doubts(&self) -> u64 {
        self.0.doubts.load(Relaxed)
    }

    /// Notes that a container appeared that may have got another one's address, whether the engine reported it or not.
    /// Requests a look.
    pub(crate) fn doubt(&self) {
        self.0.doubts.fetch_add(1, Relaxed);
        self.0.asked.notify_one();
    }

    /// Whether not all of the first `doubts` doubts are resolved, of which `confirmed` are, and the engine may still do it.
    pub fn is_in_doubt(&self, doubts: u64, confirmed: u64) -> bool {
        doubts > confirmed && doubts > self.0.given_up.load(Relaxed)
    }

    /// Gives the doubts up, because the engine does not answer: what was known stays in use.
    pub(crate) fn give_up_doubts(&self) {
        self.0.given_up.store(self.doubts(), Relaxed);
        self.0.over.send_modify(|over| *over = over.wrapping_add(1));
    }

    /// Waits for a request, at least until `next_look`.
    pub(super) async fn asked(&self, next_look: Instant) {
        sleep_until(next_look.into()).await;
        self.0.asked.notified().await;
    }

    /// Starts a look for all requests so far. Returns when the next one may begin, if this one does not end earlier.
    pub(crate) fn begins(&self) -> Instant {
        let now = Instant::now();
        self.strangers().begins(now);
        now + self.0.memory
    }

    /// Ends a look. Returns when the next one may begin. `is_certain`: a container that is unknown now does not exist.
    pub(crate) fn is_over(&self, is_certain: bool, is_known: impl Fn(&IpAddr) -> bool) -> Instant {
        let now = Instant::now();
        let found_all = self.strangers().is_over(now, self.0.memory, is_certain, is_known);
        self.0.over.send_modify(|over| *over = over.wrapping_add(1));
        now + if found_all { PAUSE } else { self.0.memory }
    }

    /// Called if the engine reports something new: a container may have appeared.
    pub(crate) fn forget(&self) {
        self.strangers().forget();
    }

    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        // Every change leaves the value consistent, so a poisoned lock is harmless.
        self.0.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requested addresses. Pure.
#[derive(Debug, Default)]
struct Strangers {
    /// Addresses for which no look has started.
    asked: HashSet<IpAddr>,
    /// Addresses for which the current look was started.
    sought: HashSet<IpAddr>,
    begun: Option<Instant>,
    /// Addresses that no container has, and the start of the look that found this.
    nobodys: HashMap<IpAddr, Instant>,
}

impl Strangers {
    /// Maximum number of addresses in each collection. Further ones are looked for too, but it is not reported if nothing
    /// is found.
    const MOST: usize = 4_096;

    fn ask(&mut self, address: IpAddr) {
        if self.asked.len() < Self::MOST {
            self.asked.insert(address);
        }
    }

    fn begins(&mut self, now: Instant) {
        let asked = std::mem::take(&mut self.asked);
        if self.sought.len() < Self::MOST {
            self.sought.extend(asked);
        }
        self.begun = Some(now);
    }

    /// Ends a look. Returns whether every requested address has a container.
    fn is_over(
        &mut self,
        now: Instant,
        memory: Duration,
        is_certain: bool,
        is_known: impl Fn(&IpAddr) -> bool,
    ) -> bool {
        let begun = self.begun.take().unwrap_or(now);
        self.nobodys.retain(|_, found| *found + memory > now);
        let sought = std::mem::take(&mut self.sought);
        let unknown: Vec<_> = sought.into_iter().filter(|address| !is_known(address)).collect();
        let found_all = unknown.is_empty();
        if is_certain && self.nobodys.len() < Self::MOST {
            self.nobodys.extend(unknown.into_iter().map(|address| (address, begun)));
        }
        found_all
    }

    fn forget(&mut self) {
        self.nobodys.clear();
    }

    fn is_remembered(&self, address: &IpAddr, now: Instant, memory: Duration) -> bool {
        self.nobodys.get(address).is_some_and(|found| *found + memory > now)
    }

    fn is_nobodys(&self, address: &IpAddr, dialled: Instant) -> bool {
        self.nobodys.get(address).is_some_and(|found| *found >= dialled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [172, 17, 0, last].into()
    }

    #[test]
    fn an_address_is_nobodys_for_who_dialled_before_the_look_that_did_not_find_it() {
        let mut strangers = Strangers::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        strangers.ask(address(2));
        strangers.ask(address(3));
        strangers.begins(at(10));
        // Too late for this look.
        strangers.ask(address(4));
        assert!(!strangers.is_nobodys(&address(2), at(0)), "nothing is found yet");
        assert!(!strangers.is_over(at(20), MEMORY, true, |known| *known == address(3)));
        assert!(strangers.is_nobodys(&address(2), at(0)));
        assert!(strangers.is_remembered(&address(2), at(1_009), MEMORY));
        assert!(!strangers.is_remembered(&address(2), at(1_010), MEMORY));
        assert!(!strangers.is_nobodys(&address(2), at(15)), "dialled after the look began");
        assert!(!strangers.is_nobodys(&address(3), at(0)), "it is somebody's");
        assert!(!strangers.is_nobodys(&address(4), at(0)), "it was not looked for");

        strangers.begins(at(30));
        assert!(strangers.is_over(at(40), MEMORY, true, |known| *known == address(4)));
        assert!(strangers.is_nobodys(&address(2), at(0)), "it is remembered");
        strangers.forget();
        assert!(!strangers.is_nobodys(&address(2), at(0)), "a container may have come");
        strangers.ask(address(2));
        strangers.begins(at(50));
        strangers.is_over(at(60), MEMORY, true, |_| false);
        strangers.forget();
        strangers.ask(address(2));
        strangers.begins(at(70));
        assert!(!strangers.is_over(at(80), MEMORY, false, |_| false));
        assert!(!strangers.is_nobodys(&address(2), at(0)), "it may be somebody's");
        strangers.ask(address(2));
        strangers.begins(at(90));
        strangers.is_over(at(100), MEMORY, true, |_| false);
        strangers.begins(at(2_000));
        strangers.is_over(at(2_010), MEMORY, true, |_| false);
        assert!(strangers.nobodys.is_empty(), "not for ever");
    }

    #[test]
    fn a_look_takes_over_what_the_one_before_it_did_not_finish() {
        let mut strangers = Strangers::default();
        let start = Instant::now();
        strangers.ask(address(2));
        strangers.begins(start);
        strangers.ask(address(3));
        let again = start + Duration::from_secs(1);
        strangers.begins(again);
        strangers.is_over(again, MEMORY, true, |_| false);
        assert!(
            strangers.is_nobodys(&address(2), again) && strangers.is_nobodys(&address(3), again)
        );
    }

    #[test]
    fn however_many_dial_what_is_remembered_is_bounded() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        for n in 0..20 * Strangers::MOST as u32 {
            strangers.ask(IpAddr::V4(n.into()));
            if n % 1_000 == 0 {
                strangers.begins(now);
            }
            if n % 3_000 == 0 {
                strangers.is_over(now, MEMORY, true, |_| false);
            }
            let all = [strangers.asked.len(), strangers.sought.len(), strangers.nobodys.len()];
            assert!(all.into_iter().all(|len| len < 3 * Strangers::MOST), "{all:?}");
        }
    }

    /// On a busy host there is always a newer doubt.
    #[test]
    fn a_doubt_is_over_once_it_is_cleared_up_whatever_comes_after_it() {
        let lookup = Lookup::default();
        assert!(!lookup.is_in_doubt(lookup.doubts(), 0));
        lookup.doubt();
        let doubts = lookup.doubts();
        assert!(lookup.is_in_doubt(doubts, 0));
        lookup.doubt();
        assert!(!lookup.is_in_doubt(doubts, 1) && lookup.is_in_doubt(lookup.doubts(), 1));
        lookup.give_up_doubts();
        assert!(!lookup.is_in_doubt(lookup.doubts(), 1));
    }

    #[tokio::test]
    async fn looks_that_find_nobody_are_as_far_apart_as_that_is_remembered() {
        assert_eq!(Lookup::default().0.memory, Duration::from_secs(1));
        // Longer than a busy machine may stand still.
        let memory = Duration::from_secs(3_600);
        let lookup = Lookup::that_remembers(memory);
        let mut looks = lookup.looks();
        let dialled = Instant::now();
        lookup.ask(address(2));
        let next = lookup.begins();
        assert!(next >= dialled + memory, "while it lasts no other begins");
        assert!(!lookup.was_nobodys(&address(2)));
        assert!(lookup.is_over(true, |_| false) >= next);
        assert!(looks.has_changed().unwrap());
        looks.mark_unchanged();
        assert!(lookup.is_nobodys(&address(2), dialled) && lookup.was_nobodys(&address(2)));
        assert!(!lookup.is_nobodys(&address(2), Instant::now()));
        lookup.begins();
        assert!(lookup.is_over(true, |_| true) < Instant::now() + memory);
        lookup.forget();
        assert!(!lookup.was_nobodys(&address(2)));
    }
}
