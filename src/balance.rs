//! Picks endpoints. Pure: the time is an argument.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    counts::ConnectionCounts,
    descriptor::Balance,
    model::{Endpoint, Millis},
    takeover::message,
};

/// The state of one endpoint of one service. All routes to it share it, from table to table.
///
/// The fields that a pick reads come first, next to the reference count, which it also changes. With many endpoints the
/// speed of a pick depends on how much memory it reads.
#[derive(Debug)]
#[repr(C)]
pub struct EndpointState {
    /// Connections through the proxy that are being opened or are open.
    active: AtomicU32,
    /// Connections that bypass the proxy (kernel path), as last counted.
    beside: AtomicU32,
    /// Failures since the last success.
    failures: AtomicU32,
    /// Drained via the API: gets no new connections.
    drained: AtomicBool,
    /// It was the only endpoint when a connect attempt timed out, and has accepted no connection since.
    silent: AtomicBool,
    /// A connection to it opened that is no consumer's.
    reached: AtomicBool,
    /// The result of active checks: a number of [`CheckResult`].
    checked: AtomicU8,
    /// When a pick by least connections first saw it; 0 before.
    seen: AtomicU64,
    pub endpoint: Endpoint,
    /// The time until which it is not picked. Valid only while `failures` is not 0.
    ejected_until: AtomicU64,
    /// The time until which one connection probes it.
    probed_until: AtomicU64,
    /// The time until which it is picked only if no other endpoint can be. 0: since the last success, no attempt failed
    /// because of this host.
    aside_until: AtomicU64,
    /// Active checks that failed since the last success.
    failed_checks: AtomicU32,
    /// Ejections since the start.
    ejections: AtomicU64,
    /// Failed attempts since the start.
    failed: AtomicU64,
    /// The counters of its connections.
    pub counts: ConnectionCounts,
}

/// The result of an endpoint's active checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CheckResult {
    /// No binding has a check, or there is no result yet.
    Not,
    Passes,
    Fails,
}

impl EndpointState {
    /// Ejection times in ms. The first one, doubled with each further failure up to the longest one.
    const SHORTEST_EJECTION: u64 = 1_000;
    const LONGEST_EJECTION: u64 = 60_000;
    /// Time in ms for which one connection probes an ejected endpoint before another one may. Longer than a connect attempt
    /// takes while another endpoint is left.
    const PROBE: u64 = 2_000;
    /// Number of active checks that must fail in a row until the endpoint counts as failing.
    const FALL: u32 = 2;
    /// Slow start with least connections, in ms: during this time the share of a new endpoint grows from a tenth to the
    /// full share. Otherwise a cold endpoint would get all new connections.
    pub const SLOW_START: u64 = 10_000;

    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            active: AtomicU32::new(0),
            beside: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            drained: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            reached: AtomicBool::new(false),
            checked: AtomicU8::new(CheckResult::Not as u8),
            seen: AtomicU64::new(0),
            endpoint,
            ejected_until: AtomicU64::new(0),
            probed_until: AtomicU64::new(0),
            aside_until: AtomicU64::new(0),
            failed_checks: AtomicU32::new(0),
            ejections: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            counts: ConnectionCounts::default(),
        }
    }

    /// Connections that are being opened or are open.
    pub fn active(&self) -> u32 {
        self.active_here().saturating_add(self.beside.load(Relaxed))
    }

    /// Connections through the proxy that are being opened or are open.
    pub fn active_here(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// Updates the number of connections that bypass the proxy: one of its parts, counted separately, was `before` and is
    /// `now`.
    pub fn has_beside(&self, before: u32, now: u32) {
        // All picks read this cache line, so it is not written if nothing changes.
        if before != now {
            self.beside.fetch_add(now.wrapping_sub(before), Relaxed);
        }
    }

    /// Counts failed attempts that do not change the state.
    pub fn failed_again(&self, times: u64) {
        self.failed.fetch_add(times, Relaxed);
    }

    /// A connection that is not a consumer's was opened: the endpoint's failures are forgotten. Returns whether there were
    /// any.
    pub fn proved(&self) -> bool {
        let back = self.failures.swap(0, Relaxed) != 0;
        let spoke = self.silent.swap(false, Relaxed);
        self.aside_until.store(0, Relaxed);
        self.reached.store(true, Relaxed);
        back || spoke
    }

    /// Ejections since the start.
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Relaxed)
    }

    /// Failed connect attempts since the start.
    pub fn failed_tries(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Failures in a row. Attempts that began before an ejection ended count as one failure.
    pub fn failures(&self) -> u32 {
        self.failures.load(Relaxed)
    }

    /// Starts a drain (no new connections, open ones stay) or ends it.
    pub fn drain(&self, drained: bool) {
        self.drained.store(drained, Relaxed);
    }

    pub fn is_drained(&self) -> bool {
        self.drained.load(Relaxed)
    }

    /// How much longer it is skipped. `None` if it has no failures.
    pub fn ejected_for(&self, now: Millis) -> Option<Duration> {
        let until = self.ejected_until.load(Relaxed);
        let left = Duration::from_millis(until.saturating_sub(now.0));
        (self.failures() != 0).then_some(left)
    }

    /// Whether its last attempt failed, and its ejection ended less than the longest ejection time ago or has not ended:
    /// the next attempt would probably fail too.
    pub fn has_just_failed(&self, now: Millis) -> bool {
        let until = self.ejected_until.load(Relaxed);
        self.failures() != 0 && now.0 < until.saturating_add(Self::LONGEST_EJECTION)
    }

    /// A connection was opened, in the time `took`: the endpoint's failures are forgotten. Returns whether there were any.
    pub fn succeeded(&self, took: Duration) -> bool {
        self.counts.start();
        self.counts.connect.observe(took);
        // Most endpoints never fail: the value is only read then, so that the cache line is not written.
        let back = self.failures.load(Relaxed) != 0 || self.is_silent();
        if self.was_set_aside() {
            self.aside_until.store(0, Relaxed);
        }
        if back {
            self.failures.store(0, Relaxed);
            self.silent.store(false, Relaxed);
        }
        back
    }

    /// A connect attempt timed out, and there is no other endpoint. Skipping it would gain nothing, and it may be shared by
    /// a route that has other endpoints. Returns whether the previous attempt did not end so.
    pub fn timed_out_alone(&self) -> bool {
        self.failed.fetch_add(1, Relaxed);
        !self.silent.swap(true, Relaxed)
    }

    /// Whether the last attempt timed out, and the endpoint is used nevertheless.
    pub fn is_silent(&self) -> bool {
        self.silent.load(Relaxed)
    }

    /// A connect attempt failed because of this host, which says nothing about the endpoint. Before `until` it is picked
    /// only if no other endpoint can be. Returns whether the previous attempt did not fail so.
    pub fn set_aside(&self, until: Millis) -> bool {
        self.aside_until.swap(until.0.max(1), Relaxed) == 0
    }

    /// Whether the last attempt failed because of this host.
    pub fn was_set_aside(&self) -> bool {
        self.aside_until.load(Relaxed) != 0
    }

    /// Whether it is now picked only if no other endpoint can be, because an attempt failed because of this host.
    pub fn is_aside(&self, now: Millis) -> bool {
        now.0 < self.aside_until.load(Relaxed)
    }

    /// The number of TCP connections opened to it since the start. Flows of UDP prove nothing, and have no connect time.
    pub fn opened(&self) -> u64 {
        self.counts.connect.read().count()
    }

    /// A connect attempt that started at `start` failed: all routes skip the endpoint for a while. Returns for how long, if
    /// this failure ejected it.
    ///
    /// Many attempts may fail at the same time for one reason. This counts once: attempts that started before the
    /// ejection's end show nothing new.
    pub fn failed(&self, start: Millis, now: Millis) -> Option<Duration> {
        self.failed.fetch_add(1, Relaxed);
        let until = self.ejected_until.load(Relaxed);
        let earlier = self.failures.load(Relaxed);
        if earlier != 0 && start.0 < until {
            return None;
        }
        let ejection = (Self::SHORTEST_EJECTION << earlier.min(16)).min(Self::LONGEST_EJECTION);
        let ejected =
            self.ejected_until.compare_exchange(until, now.0 + ejection, Relaxed, Relaxed);
        ejected.ok()?;
        self.failures.fetch_add(1, Relaxed);
        self.ejections.fetch_add(1, Relaxed);
        Some(Duration::from_millis(ejection))
    }

    /// Records the result of an active check. Returns whether this changes the endpoint's state.
    pub fn checked(&self, passed: bool) -> bool {
        let now = if passed {
            self.failed_checks.store(0, Relaxed);
            self.failures.store(0, Relaxed);
            self.silent.store(false, Relaxed);
            self.aside_until.store(0, Relaxed);
            self.reached.store(true, Relaxed);
            CheckResult::Passes
        } else if self.failed_checks.fetch_add(1, Relaxed) + 1 >= Self::FALL {
            CheckResult::Fails
        } else {
            return false;
        };
        self.checked.swap(now as u8, Relaxed) != now as u8
    }

    /// Active checks have ended.
    pub fn not_checked(&self) {
        self.failed_checks.store(0, Relaxed);
        self.checked.store(CheckResult::Not as u8, Relaxed);
    }

    /// The result of active checks.
    pub fn check(&self) -> CheckResult {
        match self.checked.load(Relaxed) {
            passes if passes == CheckResult::Passes as u8 => CheckResult::Passes,
            fails if fails == CheckResult::Fails as u8 => CheckResult::Fails,
            _ => CheckResult::Not,
        }
    }

    /// Whether a connection with these `excluded` endpoints may use it at all. This includes an ejected endpoint: if all
    /// are ejected, all are tried.
    fn is_choice(&self, excluded: &[Endpoint]) -> bool {
        !excluded.contains(&self.endpoint) && !self.is_drained()
    }

    /// Whether, as far as is known, it has no failures and no failed check, and this host can reach it.
    pub fn is_trusted(&self) -> bool {
        self.failures.load(Relaxed) == 0
            && self.check() != CheckResult::Fails
            && !self.was_set_aside()
    }

    /// Whether the last that is known of it is a connection that opened: a consumer's, or embassy's own.
    pub fn is_proved(&self) -> bool {
        let opened = || self.reached.load(Relaxed) || self.opened() > 0;
        self.is_trusted() && !self.is_silent() && opened()
    }

    /// Whether it is skipped as long as there is another endpoint.
    pub fn is_ejected(&self, now: Millis) -> bool {
        if self.check() == CheckResult::Fails || self.is_aside(now) {
            return true;
        }
        self.failures.load(Relaxed) != 0
            && (now.0 < self.ejected_until.load(Relaxed) || now.0 < self.probed_until.load(Relaxed))
    }

    /// Whether a connection may use it now. After an ejection, only one caller gets `true`: its connection is the probe,
    /// and the others wait for its result.
    fn admit(&self, now: Millis) -> bool {
        if self.check() == CheckResult::Fails || self.is_aside(now) {
            return false;
        }
        if self.failures.load(Relaxed) == 0 {
            return true;
        }
        let probed = self.probed_until.load(Relaxed);
        now.0 >= self.ejected_until.load(Relaxed)
            && now.0 >= probed
            && self
                .probed_until
                .compare_exchange(probed, now.0 + Self::PROBE, Relaxed, Relaxed)
                .is_ok()
    }

    /// Its load with one more connection, in thousandths of a connection. During its slow start each connection counts
    /// more.
    fn load(&self, now: Millis) -> u64 {
        self.load_if_seen_at(self.seen_at(now), now)
    }

    /// The first pick that sees the endpoint, or the kernel path, stores the time; 0 means not seen. Later ones only read it.
    fn seen_at(&self, now: Millis) -> u64 {
        match self.seen.load(Relaxed) {
            0 => {
                let now = now.0.max(1);
                self.seen.compare_exchange(0, now, Relaxed, Relaxed).err().unwrap_or(now)
            }
            seen => seen,
        }
    }

    /// For how many milliseconds it has been seen. If it was not, it is from now on.
    pub fn seen_for(&self, now: Millis) -> u64 {
        now.0.saturating_sub(self.seen_at(now))
    }

    /// Like `load`, but without recording that it was seen.
    fn load_at_a_glance(&self, now: Millis) -> u64 {
        self.load_if_seen_at(self.seen.load(Relaxed), now)
    }

    /// `load` for an endpoint that was first seen at `seen`. 0 means now.
    fn load_if_seen_at(&self, seen: u64, now: Millis) -> u64 {
        let age = if seen == 0 { 0 } else { now.0.saturating_sub(seen) };
        let share = age.saturating_mul(1_000) / Self::SLOW_START;
        (u64::from(self.active()) + 1) * 1_000_000 / share.clamp(100, 1_000)
    }

    /// Its state for the process that takes over. Times are relative, because that process has another clock.
    pub fn known(&self, now: Millis) -> message::EndpointState {
        let rest = |until: &AtomicU64| until.load(Relaxed).saturating_sub(now.0);
        let seen = self.seen.load(Relaxed);
        message::EndpointState {
            failures: self.failures(),
            silent: self.is_silent(),
            drained: self.is_drained(),
            failed_checks: self.failed_checks.load(Relaxed),
            check_fails: self.check() == CheckResult::Fails,
            check_passes: self.check() == CheckResult::Passes,
            seen_for: (seen != 0).then(|| now.0.saturating_sub(seen)),
            ejected_for: rest(&self.ejected_until),
            probed_for: rest(&self.probed_until),
            aside_for: self.was_set_aside().then(|| rest(&self.aside_until)),
            ejections: self.ejections(),
            failed: self.failed_tries(),
        }
    }

    /// Takes over the state from the previous process.
    pub fn inherit(&self, known: &message::EndpointState, now: Millis) {
        // None of these times is longer. A wrong time must not exclude an endpoint for years.
        let until = |rest: u64| now.0 + rest.min(Self::LONGEST_EJECTION);
        self.failures.store(known.failures, Relaxed);
        self.silent.store(known.silent, Relaxed);
        self.drained.store(known.drained, Relaxed);
        self.failed_checks.store(known.failed_checks, Relaxed);
        let checked = match (known.check_fails, known.check_passes) {
            (true, _) => CheckResult::Fails,
            (false, true) => CheckResult::Passes,
            (false, false) => CheckResult::Not,
        };
        self.checked.store(checked as u8, Relaxed);
        if let Some(age) = known.seen_for {
            // This clock may have started after the endpoint's slow start, which is over then.
            let seen = now.0.saturating_sub(age).max(1);
            self.seen.store(seen, Relaxed);
        }
        self.ejected_until.store(until(known.ejected_for), Relaxed);
        self.probed_until.store(until(known.probed_for), Relaxed);
        self.aside_until.store(known.aside_for.map_or(0, until), Relaxed);
        self.ejections.fetch_add(known.ejections, Relaxed);
        self.failed.fetch_add(known.failed, Relaxed);
    }

    /// Counts a connection until the returned lease is dropped.
    pub fn lease(self: &Arc<Self>) -> Lease {
        self.active.fetch_add(1, Relaxed);
        Lease(self.clone())
    }
}

/// The connection counts as open until this is dropped.
#[derive(Debug)]
pub struct Lease(Arc<EndpointState>);

impl Lease {
    pub fn state(&self) -> &Arc<EndpointState> {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// The endpoints of a service in balancing order.
///
/// The position is shared with the previous and the next rotation. A new rotation starts with the endpoint that was next,
/// so a change of endpoints does not change the order, and concurrent picks may use either rotation.
#[derive(Debug)]
pub struct Rotation {
    position: Arc<AtomicU64>,
    /// The position at which `order` starts.
    base: u64,
    order: Box<[Arc<EndpointState>]>,
}

impl Rotation {
    pub fn new(order: impl IntoIterator<Item = Arc<EndpointState>>) -> Self {
        Self { position: Arc::default(), base: 0, order: order.into_iter().collect() }
    }

    /// The next rotation, with `endpoints`: those that stay keep their turns, new ones come last.
    pub fn succeed(&self, endpoints: impl IntoIterator<Item = Arc<EndpointState>>) -> Self {
        let base = self.position.load(Relaxed);
        let turn = self.index(base);
        let (later, sooner) = self.order.split_at(turn);
        let mut coming: BTreeMap<_, _> =
            endpoints.into_iter().map(|state| (state.endpoint, state)).collect();
        let staying = sooner.iter().chain(later).filter_map(|state| coming.remove(&state.endpoint));
        let mut order: Vec<_> = staying.collect();
        order.extend(coming.into_values());
        Self { position: self.position.clone(), base, order: order.into() }
    }

    pub fn endpoints(&self) -> &[Arc<EndpointState>] {
        &self.order
    }

    /// The endpoint that is next, even if it is ejected or drained.
    pub fn turn(&self) -> Option<Endpoint> {
        self.order.get(self.index(self.position.load(Relaxed))).map(|state| state.endpoint)
    }

    /// Makes this endpoint the next one, if the rotation has it.
    pub fn give_turn(&self, to: Endpoint) {
        if let Some(turn) = self.order.iter().position(|state| state.endpoint == to) {
            self.position.store(self.base.wrapping_add(turn as u64), Relaxed);
        }
    }

    /// The endpoint that the next connection would get now. Never one of `excluded`. Does not change the rotation.
    pub fn peek(
        &self,
        balance: Balance,
        now: Millis,
        excluded: &[Endpoint],
    ) -> Option<&Arc<EndpointState>> {
        let (later, sooner) = self.order.split_at(self.index(self.position.load(Relaxed)));
        let in_turn = || sooner.iter().chain(later).filter(|state| state.is_choice(excluded));
        match balance {
            Balance::RoundRobin => {
                in_turn().find(|state| !state.is_ejected(now)).or_else(|| in_turn().next())
            }
            Balance::LeastConnections => {
                let load = |state: &&Arc<EndpointState>| state.load_at_a_glance(now);
                let healthy = in_turn().filter(|state| !state.is_ejected(now));
                healthy.min_by_key(load).or_else(|| in_turn().min_by_key(load))
            }
        }
    }

    /// Whether a connection that is being opened to `to`, with these `excluded` endpoints, has another endpoint to try. An
    /// ejected one counts: it may be up again.
    pub fn has_alternative(&self, to: &EndpointState, now: Millis, excluded: &[Endpoint]) -> bool {
        self.others(to, now, excluded).next().is_some()
    }

    /// Whether the rotation has this endpoint, and it is not drained.
    pub fn offers(&self, one: &EndpointState) -> bool {
        self.order.iter().any(|state| state.endpoint == one.endpoint && !state.is_drained())
    }

    /// The other endpoints for a connection with these `excluded` ones, except those that this host cannot reach.
    fn others<'a>(
        &'a self,
        of: &'a EndpointState,
        now: Millis,
        excluded: &'a [Endpoint],
    ) -> impl Iterator<Item = &'a Arc<EndpointState>> {
        let is_other = move |state: &&Arc<EndpointState>| {
            // The cheap conditions come first: there may be many endpoints, and `excluded` is a list.
            state.endpoint != of.endpoint && !state.is_aside(now) && state.is_choice(excluded)
        };
        self.order.iter().filter(is_other)
    }

    /// Whether an endpoint of this rotation is in `excluded`.
    pub fn has_any_of(&self, excluded: &[Endpoint]) -> bool {
        self.order.iter().any(|state| excluded.contains(&state.endpoint))
    }

    /// The endpoint for the next connection, or for its next attempt. Never one of `excluded`, never a drained one, and an
    /// ejected one only if there is no other. `None` if no endpoint is left.
    pub fn pick(
        &self,
        balance: Balance,
        now: Millis,
        excluded: &[Endpoint],
    ) -> Option<&Arc<EndpointState>> {
        let fresh = |state: &&Arc<EndpointState>| state.is_choice(excluded);
        match balance {
            Balance::RoundRobin => {
                // If an endpoint cannot be used, its turn passes on by another draw, so that the others keep equal shares.
                let mut last_resort = None;
                for _ in 0..self.order.len() {
                    let Some(state) = self.draw().filter(fresh) else { continue };
                    if state.admit(now) {
                        return Some(state);
                    }
                    last_resort.get_or_insert(state);
                }
                // One draw more than there are endpoints: if all are ejected, each still gets its turn. Concurrent draws
                // may have taken all turns of the endpoint that is left.
                let next = self.draw().filter(fresh).or(last_resort);
                next.or_else(|| self.order.iter().find(fresh))
            }
            Balance::LeastConnections => {
                // Endpoints with equal counts are used in turn.
                let (later, sooner) =
                    self.order.split_at(self.index(self.position.fetch_add(1, Relaxed)));
                let fewest = |usable: &dyn Fn(&EndpointState) -> bool| {
                    let all =
                        sooner.iter().chain(later).filter(|state| usable(state)).filter(fresh);
                    all.min_by_key(|state| state.load(now))
                };
                let healthy = fewest(&|state| !state.is_ejected(now));
                healthy
                    .filter(|state| state.admit(now))
                    .or_else(|| fewest(&EndpointState::is_trusted))
                    .or_else(|| fewest(&|_| true))
            }
        }
    }

    fn draw(&self) -> Option<&Arc<EndpointState>> {
        self.order.get(self.index(self.position.fetch_add(1, Relaxed)))
    }

    fn index(&self, position: u64) -> usize {
        match self.order.len() {
            0 => 0,
            // The remainder of a division by a usize fits into a usize.
            len => (position.wrapping_sub(self.base) % len as u64) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        net::{Ipv4Addr, SocketAddr},
    };

    use proptest::prelude::*;

    use super::*;

    const NOW: Millis = Millis(10_000);

    #[test]
    fn parts_that_are_counted_apart_add_up() {
        let state = EndpointState::new(Endpoint(([10, 0, 0, 1], 80).into()));
        state.has_beside(0, 3);
        state.has_beside(0, 2);
        assert_eq!(state.active(), 5);
        state.has_beside(3, 1);
        state.has_beside(2, 2);
        assert_eq!(state.active(), 3);
        state.has_beside(1, 0);
        assert_eq!((state.active(), state.active_here()), (2, 0));
    }

    #[test]
    fn an_endpoint_is_proved_by_its_last_connection() {
        let state = EndpointState::new(Endpoint(([10, 0, 0, 1], 80).into()));
        assert!(!state.is_proved(), "there was none");
        state.counts.start();
        assert!(!state.is_proved(), "a flow of UDP");
        state.succeeded(Duration::ZERO);
        assert!(state.is_proved());
        state.failed(NOW, NOW);
        assert!(!state.is_proved());
        assert!(state.proved() && state.is_proved());
        state.timed_out_alone();
        assert!(!state.is_proved());
        state.succeeded(Duration::ZERO);
        state.checked(false);
        state.checked(false);
        assert!(!state.is_proved(), "its check fails");
        state.checked(true);
        assert!(state.is_proved());
        state.set_aside(NOW);
        assert!(!state.is_proved());
        let others = [EndpointState::new(state.endpoint), EndpointState::new(state.endpoint)];
        others[0].proved();
        others[1].checked(true);
        assert!(others.iter().all(EndpointState::is_proved));
    }

    /// By whichever path it is picked.
    #[test]
    fn a_slow_start_begins_once() {
        let state = EndpointState::new(Endpoint(([10, 0, 0, 1], 80).into()));
        assert_eq!(state.seen_for(Millis(5_000)), 0);
        assert_eq!(state.seen_for(Millis(8_000)), 3_000);
        assert_eq!(state.load(Millis(8_000)), 1_000_000 / 300);
    }

    /// The other process has another clock, but the same state.
    #[test]
    fn what_is_known_of_an_endpoint_is_taken_over() {
        let endpoint = Endpoint(([10, 0, 0, 1], 80).into());
        let (before, after) = (EndpointState::new(endpoint), EndpointState::new(endpoint));
        before.load(NOW);
        assert!(before.failed(NOW, NOW).is_some());
        before.drain(true);
        before.set_aside(Millis(10_250));
        let later = Millis(10_100);
        let known = before.known(later);
        let here = Millis(50);
        after.inherit(&known, here);
        assert_eq!(after.ejected_for(here), before.ejected_for(later));
        assert_eq!((after.ejections(), after.failed_tries(), after.failures()), (1, 1, 1));
        assert!(after.is_drained() && after.is_aside(Millis(199)) && !after.is_aside(Millis(200)));
        assert!(!after.is_ejected(Millis(950)) && after.is_ejected(Millis(949)));
        // A state without failures is taken over too.
        let fresh = EndpointState::new(endpoint);
        fresh.inherit(&EndpointState::new(endpoint).known(NOW), here);
        assert!(fresh.is_trusted() && !fresh.is_drained() && !fresh.was_set_aside());
        fresh
            .inherit(&message::EndpointState { ejected_for: u64::MAX, failures: 1, ..known }, here);
        let longest = Duration::from_millis(EndpointState::LONGEST_EJECTION);
        assert_eq!(fresh.ejected_for(here), Some(longest));
    }

    #[test]
    fn the_turn_is_taken_over() {
        let states = |last: u8| {
            let endpoint = |n| Endpoint(([10, 0, 0, n], 80).into());
            (1..=last).map(move |n| Arc::new(EndpointState::new(endpoint(n))))
        };
        let before = Rotation::new(states(3));
        for _ in 0..4 {
            before.pick(Balance::RoundRobin, NOW, &[]).unwrap();
        }
        let turn = before.turn().unwrap();
        let after = Rotation::new(states(2));
        after.give_turn(turn);
        assert_eq!(after.turn(), Some(turn));
        let picked = after.pick(Balance::RoundRobin, NOW, &[]).map(|state| state.endpoint);
        assert_eq!(picked, Some(turn));
        after.give_turn(Endpoint(([10, 0, 0, 9], 80).into()));
        assert_ne!(after.turn(), Some(turn), "one that is not there gets none");
        assert_eq!(Rotation::new(states(0)).turn(), None);
    }

    fn state(n: u16) -> Arc<EndpointState> {
        Arc::new(EndpointState::new(endpoint(n)))
    }

    fn endpoint(n: u16) -> Endpoint {
        Endpoint(SocketAddr::from((Ipv4Addr::LOCALHOST, n)))
    }

    fn rotation(ports: impl IntoIterator<Item = u16>) -> Rotation {
        Rotation::new(ports.into_iter().map(state))
    }

    fn pick(rotation: &Rotation, balance: Balance) -> u16 {
        rotation.pick(balance, NOW, &[]).expect("there are endpoints").endpoint.0.port()
    }

    #[test]
    fn nothing_to_pick_is_none() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            assert!(rotation([]).pick(balance, NOW, &[]).is_none());
            assert!(rotation([1]).pick(balance, NOW, &[endpoint(1)]).is_none());
        }
    }

    #[test]
    fn round_robin_is_exactly_even_under_concurrent_picks() {
        let rotation = rotation(1..=7);
        let counts = std::thread::scope(|scope| {
            let picks = || {
                (0..700).fold(BTreeMap::new(), |mut counts, _| {
                    *counts.entry(pick(&rotation, Balance::RoundRobin)).or_insert(0) += 1;
                    counts
                })
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(picks)).collect();
            let mut sum = BTreeMap::new();
            for (port, count) in threads.into_iter().flat_map(|t| t.join().unwrap()) {
                *sum.entry(port).or_insert(0) += count;
            }
            sum
        });
        assert!(counts.values().all(|&count| count == 400), "{counts:?}");
    }

    #[test]
    fn an_ejected_endpoint_is_skipped_and_the_others_stay_even() {
        let rotation = rotation(1..=3);
        rotation.endpoints()[1].failed(NOW, NOW);
        let mut counts = BTreeMap::new();
        for _ in 0..100 {
            *counts.entry(pick(&rotation, Balance::RoundRobin)).or_insert(0) += 1;
        }
        assert_eq!(counts, BTreeMap::from([(1, 50), (3, 50)]));
    }

    #[test]
    fn where_all_are_ejected_all_are_tried() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            let rotation = rotation(1..=3);
            for state in rotation.endpoints() {
                state.failed(NOW, NOW);
            }
            let mut tried = Vec::new();
            while let Some(state) = rotation.pick(balance, NOW, &tried) {
                tried.push(state.endpoint);
            }
            assert_eq!(tried.iter().collect::<BTreeSet<_>>().len(), 3);
        }
    }

    #[test]
    fn an_ejection_doubles_up_to_a_minute_and_one_success_ends_it() {
        let state = state(1);
        let mut now = NOW;
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            state.failed(now, now);
            let end = Millis(now.0 + seconds * 1_000);
            assert!(state.is_ejected(Millis(end.0 - 1)), "{seconds} s");
            assert!(!state.is_ejected(end), "{seconds} s");
            now = end;
        }
        state.failed(now, now);
        state.succeeded(Duration::from_millis(1));
        assert!(!state.is_ejected(now));
    }

    #[test]
    fn an_only_endpoint_that_is_slow_is_not_skipped_by_those_that_have_others() {
        let rotation = rotation(1..=2);
        let [one, two] = rotation.endpoints() else { unreachable!() };
        let only = Rotation::new([one.clone()]);
        let is_only =
            |of: &Rotation, excluded: &[Endpoint]| !of.has_alternative(one, NOW, excluded);
        assert!(is_only(&only, &[]) && !is_only(&rotation, &[]));
        assert!(is_only(&rotation, &[two.endpoint]));
        two.drain(true);
        assert!(is_only(&rotation, &[]));
        two.drain(false);
        assert!(two.set_aside(Millis(NOW.0 + 1)));
        assert!(is_only(&rotation, &[]), "this host cannot reach the other");
        assert!(two.succeeded(Duration::ZERO).eq(&false) && !is_only(&rotation, &[]));
        assert!(one.timed_out_alone());
        assert!(!one.timed_out_alone(), "once is enough");
        assert!(one.is_silent() && !one.is_ejected(NOW));
        assert_eq!((one.failed_tries(), one.failures(), one.ejections()), (2, 0, 0));
        let ports: Vec<_> = (0..10).map(|_| pick(&rotation, Balance::RoundRobin)).collect();
        assert_eq!(ports.iter().filter(|&&port| port == 1).count(), 5, "{ports:?}");
        assert!(one.succeeded(Duration::from_millis(1)), "it is back");
        assert!(!one.is_silent() && !one.succeeded(Duration::from_millis(1)));
    }

    #[test]
    fn an_endpoint_that_this_host_cannot_reach_is_used_only_where_none_else_is() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            let rotation = rotation(1..=2);
            let [one, two] = rotation.endpoints() else { unreachable!() };
            let until = Millis(NOW.0 + 60_000);
            assert!(one.set_aside(until));
            assert!(!one.set_aside(until), "it is told once");
            assert!((0..6).all(|_| pick(&rotation, balance) == 2), "{balance:?}");
            two.failed(NOW, NOW);
            assert!(rotation.pick(balance, NOW, &[two.endpoint]).is_some(), "the last resort");
            assert_eq!((one.failures(), one.ejections(), one.failed_tries()), (0, 0, 0));
            two.succeeded(Duration::ZERO);
            let later = (0..6).map(|_| rotation.pick(balance, until, &[]).unwrap().lease());
            assert!(
                later
                    .collect::<Vec<_>>()
                    .iter()
                    .any(|lease| lease.state().endpoint == one.endpoint)
            );
            assert!(one.was_set_aside() && !one.succeeded(Duration::ZERO) && !one.was_set_aside());
        }
    }

    #[test]
    fn many_connections_that_meet_one_failure_count_once() {
        let state = state(1);
        for n in 0..100 {
            state.failed(NOW, Millis(NOW.0 + n));
        }
        assert!(state.is_ejected(Millis(NOW.0 + 999)));
        assert!(!state.is_ejected(Millis(NOW.0 + 1_000)));
        // One of the attempts lasted until the ejection was over.
        state.failed(NOW, Millis(NOW.0 + 2_000));
        assert!(!state.is_ejected(Millis(NOW.0 + 2_000)));
        // The probe fails: this is the second failure.
        assert!(state.admit(Millis(NOW.0 + 2_000)));
        state.failed(Millis(NOW.0 + 2_000), Millis(NOW.0 + 3_000));
        assert!(state.is_ejected(Millis(NOW.0 + 4_999)));
        assert!(!state.is_ejected(Millis(NOW.0 + 5_000)));
    }

    #[test]
    fn one_connection_alone_probes_an_endpoint_whose_ejection_ended() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            let rotation = rotation(1..=2);
            rotation.endpoints()[0].failed(Millis(0), Millis(0));
            let after = Millis(1_000);
            let ports: Vec<_> = (0..6)
                .map(|_| rotation.pick(balance, after, &[]).unwrap().endpoint.0.port())
                .collect();
            assert_eq!(
                ports.iter().filter(|&&port| port == 1).count(),
                1,
                "{balance:?}: {ports:?}"
            );
        }
    }

    proptest! {
        /// The next connection gets the endpoint that a peek shows.
        #[test]
        fn a_peek_sees_what_a_pick_takes(
            endpoints in prop::collection::vec((0..4u32, 0..6u8, 0..20_000u64), 0..6),
            (balance, turns, probing) in (any::<bool>(), 0..9usize, any::<bool>()),
            excluded in prop::collection::vec(1..7u16, 0..3),
        ) {
            let balance = if balance { Balance::RoundRobin } else { Balance::LeastConnections };
            let rotation = rotation(1..=endpoints.len() as u16);
            let excluded: Vec<_> = excluded.into_iter().map(endpoint).collect();
            let mut leases = Vec::new();
            for _ in 0..turns {
                leases.extend(rotation.pick(balance, Millis(1), &[]).map(EndpointState::lease));
            }
            for (state, (busy, kind, since)) in rotation.endpoints().iter().zip(&endpoints) {
                leases.extend((0..*busy).map(|_| state.lease()));
                state.seen.store(*since, Relaxed);
                match kind {
                    1 => drop(state.failed(Millis(*since), Millis(*since))),
                    2 => state.drain(true),
                    3 => drop((state.checked(false), state.checked(false))),
                    4 => drop(state.set_aside(Millis(*since))),
                    _ => {}
                }
            }
            if probing {
                leases.extend(rotation.pick(balance, NOW, &excluded).map(EndpointState::lease));
            }
            let seen = rotation.peek(balance, NOW, &excluded).map(|state| state.endpoint);
            let taken = rotation.pick(balance, NOW, &excluded).map(|state| state.endpoint);
            prop_assert_eq!(seen, taken);
        }
    }

    proptest! {
        /// An attempt is short as long as any endpoint is left that was not tried, even an ejected one: it may be up.
        #[test]
        fn every_endpoint_that_is_left_is_an_alternative(
            kinds in prop::collection::vec(0..5u8, 1..6), tried in prop::collection::vec(1..7u16, 0..4)
        ) {
            let rotation = rotation(1..=kinds.len() as u16);
            let tried: Vec<_> = tried.into_iter().map(endpoint).collect();
            let all: Vec<_> = rotation.endpoints().iter().zip(&kinds).collect();
            for (state, kind) in &all {
                match kind {
                    1 => drop(state.failed(NOW, NOW)),
                    2 => state.drain(true),
                    3 => drop((state.checked(false), state.checked(false))),
                    4 => drop(state.set_aside(Millis(NOW.0 + 1))),
                    _ => {}
                }
            }
            for (to, _) in &all {
                let is_left = |(state, kind): &(&Arc<EndpointState>, &u8)| {
                    state.endpoint != to.endpoint
                        && !tried.contains(&state.endpoint)
                        && matches!(kind, 0 | 1 | 3)
                };
                let left = all.iter().any(is_left);
                prop_assert_eq!(rotation.has_alternative(to, NOW, &tried), left);
            }
        }
    }

    #[test]
    fn leastconn_goes_where_the_fewest_connections_are() {
        let rotation = rotation(1..=3);
        let held = [rotation.endpoints()[0].lease(), rotation.endpoints()[2].lease()];
        assert_eq!(pick(&rotation, Balance::LeastConnections), 2);
        drop(held);
        let mut leases = Vec::new();
        for _ in 0..30 {
            leases.push(rotation.pick(Balance::LeastConnections, NOW, &[]).unwrap().lease());
        }
        assert!(rotation.endpoints().iter().all(|state| state.active() == 10));
        drop(leases);
        assert!(rotation.endpoints().iter().all(|state| state.active() == 0));
    }

    #[test]
    fn an_endpoint_whose_checks_fail_is_used_only_where_all_do() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            let rotation = rotation(1..=3);
            let [one, two, three] = rotation.endpoints() else { unreachable!() };
            assert!(!two.checked(false), "once may be a packet lost");
            assert!(two.checked(false));
            assert!(!two.checked(false));
            assert_eq!((one.check(), two.check()), (CheckResult::Not, CheckResult::Fails));
            // Only a passing check or the end of the checks ends this state.
            two.succeeded(Duration::from_millis(1));
            let picked = |now| {
                let picks = (0..6).map(|_| rotation.pick(balance, now, &[]).unwrap());
                picks.map(|state| state.endpoint.0.port()).collect::<BTreeSet<_>>()
            };
            assert_eq!(picked(Millis(u64::MAX / 4)), BTreeSet::from([1, 3]), "{balance:?}");
            for other in [one, three] {
                other.checked(false);
                other.checked(false);
            }
            assert_eq!(picked(NOW).len(), 3, "{balance:?}");
            one.failed(NOW, NOW);
            assert!(one.checked(true));
            assert_eq!(picked(NOW), BTreeSet::from([1]), "{balance:?}");
            two.not_checked();
            assert_eq!(picked(NOW), BTreeSet::from([1, 2]), "{balance:?}");
        }
    }

    #[test]
    fn a_drained_endpoint_is_never_picked_and_comes_back() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections] {
            let rotation = rotation(1..=2);
            rotation.endpoints()[0].drain(true);
            let ports: BTreeSet<_> = (0..6).map(|_| pick(&rotation, balance)).collect();
            assert_eq!(ports, BTreeSet::from([2]));
            // A drained endpoint is not even used as the last resort.
            rotation.endpoints()[1].drain(true);
            assert!(rotation.pick(balance, NOW, &[]).is_none());
            assert!(rotation.peek(balance, NOW, &[]).is_none());
            rotation.endpoints().iter().for_each(|state| state.drain(false));
            let ports: BTreeSet<_> = (0..6).map(|_| pick(&rotation, balance)).collect();
            assert_eq!(ports, BTreeSet::from([1, 2]));
        }
    }

    #[test]
    fn an_ejection_is_told_once_and_counted() {
        let state = state(1);
        assert_eq!(state.failed(NOW, NOW), Some(Duration::from_secs(1)));
        assert_eq!(state.failed(NOW, NOW), None);
        assert_eq!((state.ejections(), state.failed_tries(), state.failures()), (1, 2, 1));
        let half = Millis(NOW.0 + 500);
        assert_eq!(state.ejected_for(half), Some(Duration::from_millis(500)));
        assert!(state.succeeded(Duration::from_millis(1)));
        assert!(!state.succeeded(Duration::from_millis(1)));
        assert_eq!(state.ejected_for(half), None);
    }

    #[test]
    fn a_new_endpoint_does_not_get_all_that_come() {
        let old = rotation([1]);
        let pick = |rotation: &Rotation, now| {
            rotation.pick(Balance::LeastConnections, Millis(now), &[]).unwrap().lease()
        };
        let _held: Vec<_> = (0..10).map(|n| pick(&old, 1_500 + n)).collect();
        let new = old.succeed([old.endpoints()[0].clone(), state(2)]);
        let leases: Vec<_> = (0..10).map(|n| pick(&new, 60_000 + n)).collect();
        let count = leases.iter().filter(|lease| lease.state().endpoint == endpoint(2)).count();
        assert_eq!(count, 1, "a tenth of what the other has");
    }

    #[test]
    fn endpoints_that_are_new_together_share_evenly() {
        let rotation = rotation(1..=3);
        let leases: Vec<_> = (0..30)
            .map(|n| rotation.pick(Balance::LeastConnections, Millis(n), &[]).unwrap().lease())
            .collect();
        assert!(rotation.endpoints().iter().all(|state| state.active() == 10), "{leases:?}");
    }

    proptest! {
        /// A peek shows what the next connection gets, and changes nothing.
        #[test]
        fn what_is_seen_is_what_is_picked(
            len in 1u16..6, failed in prop::collection::vec(0u16..6, 0..6), picks in 0usize..20
        ) {
            for balance in [Balance::RoundRobin, Balance::LeastConnections] {
                let rotation = rotation(0..len);
                for state in rotation.endpoints().iter().filter(|s| failed.contains(&s.endpoint.0.port())) {
                    state.failed(NOW, NOW);
                }
                for _ in 0..picks {
                    let seen = [(); 2].map(|()| rotation.peek(balance, NOW, &[]).map(|s| s.endpoint));
                    let picked = rotation.pick(balance, NOW, &[]).map(|s| s.endpoint);
                    prop_assert_eq!(seen, [picked; 2]);
                }
            }
        }

        /// However busy the others are and however fast connections come, a new endpoint gets no more than its growing
        /// share, and as many as the others at the end of its slow start.
        #[test]
        fn a_new_endpoint_is_taken_up_slowly(
            busy in prop::collection::vec(0usize..50, 1..5), pauses in prop::collection::vec(0u64..200, 1..300)
        ) {
            let old = rotation(1..=busy.len() as u16);
            prop_assert!(old.pick(Balance::LeastConnections, Millis(1), &[]).is_some());
            let mut leases: Vec<_> = (old.endpoints().iter().zip(&busy))
                .flat_map(|(state, &count)| (0..count).map(|_| state.lease()))
                .collect();
            let new = state(1_000);
            let all = old.succeed(old.endpoints().iter().cloned().chain([new.clone()]));
            let start = Millis(100_000);
            let mut now = start;
            for pause in pauses {
                let picked = all.pick(Balance::LeastConnections, now, &[]).unwrap();
                leases.push(picked.lease());
                if picked.endpoint == new.endpoint {
                    let share = ((now.0 - start.0) * 1_000 / EndpointState::SLOW_START).clamp(100, 1_000);
                    let least = old.endpoints().iter().map(|state| state.active() + 1).min().unwrap();
                    // In thousandths. One is added for what the divisions round off.
                    prop_assert!(u64::from(new.active()) * 1_000 <= (u64::from(least) * share) + 1_000);
                }
                now.0 += pause;
            }
            now.0 = start.0 + EndpointState::SLOW_START;
            for _ in 0..5_000 {
                leases.push(all.pick(Balance::LeastConnections, now, &[]).unwrap().lease());
            }
            let (least, most) = (all.endpoints().iter().map(|s| s.active()).min(), all.endpoints().iter().map(|s| s.active()).max());
            prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1));
        }

        /// However endpoints come and go, those that stay are picked equally often, within one round.
        #[test]
        fn round_robin_stays_even_across_endpoint_changes(
            changes in prop::collection::vec((prop::collection::btree_set(10u16..20, 0..6), 0usize..20), 1..12)
        ) {
            let stay = [1, 2, 3];
            let states: BTreeMap<u16, _> = (1..20).map(|n| (n, state(n))).collect();
            let of = |ports: &BTreeSet<u16>| {
                stay.iter().chain(ports).map(|n| states[n].clone()).collect::<Vec<_>>()
            };
            let mut rotation = Rotation::new(of(&BTreeSet::new()));
            let mut counts = BTreeMap::new();
            for (others, picks) in changes {
                rotation = rotation.succeed(of(&others));
                prop_assert_eq!(rotation.endpoints().len(), stay.len() + others.len());
                for _ in 0..picks {
                    *counts.entry(pick(&rotation, Balance::RoundRobin)).or_insert(0i32) += 1;
                }
            }
            let of_stayers = stay.map(|n| counts.get(&n).copied().unwrap_or(0));
            let (least, most) = (of_stayers.iter().min(), of_stayers.iter().max());
            prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{of_stayers:?}");
        }

        #[test]
        fn a_pick_is_never_one_that_was_tried(
            len in 0u16..6, tried in prop::collection::vec(0u16..6, 0..6), failed in prop::collection::vec(0u16..6, 0..6)
        ) {
            let tried: Vec<_> = tried.into_iter().map(endpoint).collect();
            for balance in [Balance::RoundRobin, Balance::LeastConnections] {
                let rotation = rotation(0..len);
                for state in rotation.endpoints().iter().filter(|s| failed.contains(&s.endpoint.0.port())) {
                    state.failed(NOW, NOW);
                }
                let left = rotation.endpoints().iter().any(|s| !tried.contains(&s.endpoint));
                let picked = rotation.pick(balance, NOW, &tried);
                prop_assert_eq!(picked.is_some(), left);
                prop_assert!(picked.is_none_or(|state| !tried.contains(&state.endpoint)));
            }
        }
    }
}
