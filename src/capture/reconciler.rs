//! Makes the kernel's rules match the table, and keeps them so.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use super::{
    CaptureCounts, CaptureError, Change, Firewall,
    arrivals::Arrivals,
    backend::Backend,
    input::{self, Barrier, Detail, Listings},
    place::First,
    rules::{PRIORITY, Places, RuleChanges, RuleSettings, Rules},
};
use crate::{
    events::{Event, Events},
    readiness::Guard,
    table::{Changes, Table},
};

/// Follows the tables, and changes of the firewall by other programs.
pub(super) struct Reconciler {
    backend: Backend,
    settings: RuleSettings,
    counts: Arc<CaptureCounts>,
    events: Events,
    /// The table of the current rules, and their places.
    applied: Option<(Arc<Table>, Places)>,
    /// Why the rules are being restored: the change by other programs, and what was missing.
    damage: Option<(Change, String)>,
    /// Servers for which it was logged that a consumer cannot have their port.
    shadowed: BTreeSet<SocketAddr>,
    /// Whether the last attempt failed: a failure is logged once, not at every attempt.
    failing: bool,
    ready: Option<Guard>,
    /// The priority of our chains, with nft. It only decreases: there is no need to increase it again.
    priority: i32,
    surroundings: Surroundings,
}

/// The rules of other programs that matter to us.
#[derive(Default)]
struct Surroundings {
    /// When others' rules were read last, and whether they may have changed since.
    read: Option<Instant>,
    may_have_changed: bool,
    /// They are being read: a program may take seconds for it, which the rules of a new container must not wait.
    reading: JoinSet<Listings>,
    /// Why `--notrack` is refused, as last logged.
    tracked_for: Option<String>,
    /// The obstacles for captured connections, as last logged.
    barriers: Vec<Barrier>,
    /// The chains that stay before our rules, as last logged.
    behind: Option<Barrier>,
    arrivals: Arrivals,
}

/// Poll interval for changes by other programs: rules must be restored within 5 s. With nf_tables this is one short call.
const CHECK: Duration = Duration::from_secs(1);
/// Minimum interval for reading other programs' rules, which starts programs.
const READ: Duration = Duration::from_secs(5);

impl Reconciler {
    pub(super) fn new(
        backend: Backend,
        settings: RuleSettings,
        counts: Arc<CaptureCounts>,
        ready: Guard,
        events: Events,
    ) -> Self {
        Self {
            backend,
            settings,
            counts,
            events,
            applied: None,
            damage: None,
            shadowed: BTreeSet::new(),
            failing: false,
            ready: Some(ready),
            priority: PRIORITY,
            surroundings: Surroundings { may_have_changed: true, ..Surroundings::default() },
        }
    }

    /// Runs until it is stopped, or there are no more tables. The rules stay. Returns the backend, which can remove them.
    pub(super) async fn run(
        mut self,
        mut tables: watch::Receiver<Arc<Table>>,
        mut stopped: oneshot::Receiver<()>,
    ) -> Backend {
        let mut check = interval(CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (is_check, listings) = tokio::select! {
                _ = &mut stopped => break,
                changed = tables.changed() => match changed {
                    Ok(()) => (false, None),
                    Err(_) => break,
                },
                _ = check.tick() => (true, None),
                Some(read) = self.surroundings.reading.join_next() => (false, read.ok()),
            };
            let table = tables.borrow_and_update().clone();
            if table.version == 0 {
                continue;
            }
            let mut done = Ok(());
            // A check may be the first to see a new table.
            if self.applied.as_ref().is_none_or(|(applied, _)| applied.version != table.version) {
                done = self.follow(&table).await;
            }
            if is_check && done.is_ok() {
                done = self.check(&table).await;
            }
            self.note(done);
            if is_check {
                self.look_around();
            }
            if let Some(listings) = listings {
                self.learn(&listings, &table).await;
            }
        }
        self.counts.stand(|standing| standing.in_place = false);
        self.backend
    }

    /// Logs and counts a failure, and its end.
    fn note(&mut self, done: Result<(), CaptureError>) {
        match done {
            Ok(()) if self.failing => {
                self.failing = false;
                info!("the firewall rules can be written again");
            }
            Ok(()) => {}
            Err(error) => {
                self.applied = None;
                self.counts.stand(|standing| {
                    standing.in_place = false;
                    standing.error = Some(error.to_string());
                });
                self.counts.failed.fetch_add(1, Relaxed);
                if !std::mem::replace(&mut self.failing, true) {
                    error!(%error, "cannot write the firewall rules; retrying");
                }
            }
        }
    }

    /// Updates the rules to `table`, by its changes if they are known.
    async fn follow(&mut self, table: &Arc<Table>) -> Result<(), CaptureError> {
        let Some((before, places)) = self.applied.take().filter(|_| self.backend.stands()) else {
            return self.load(table).await;
        };
        let changes = match table.version.saturating_sub(before.version) {
            0 => RuleChanges::default(),
            1 => RuleChanges::of(table.changes(), &self.settings),
            _ => RuleChanges::of(&Changes::between(&before, table), &self.settings),
        };
        let now = self.places(table);
        let changes = changes.with_places(&places, &now);
        if !changes.is_empty() {
            let start = Instant::now();
            // They are written whole, which would put back unsaid what others took away.
            if self.backend.firewall() == Firewall::Iptables && self.backend.others_changed()? {
                self.surroundings.may_have_changed = true;
                let rules = || whole(&before, &self.settings, &places, self.priority);
                if let Some((change, missing)) = self.backend.check(rules).await? {
                    self.damaged(change, missing);
                }
            }
            let rules = || whole(table, &self.settings, &now, self.priority);
            let torn = match self.backend.apply(&changes, rules).await {
                Ok(torn) => torn,
                // Usually caused by another program's change. The current rules are unknown now.
                Err(error) => {
                    debug!(%error, "cannot change the firewall rules; rewriting all of them");
                    if !self.backend.is_owned() && error.is_of_what_is_gone() {
                        self.damaged(Change::Incomplete, "what was to be changed".to_owned());
                    }
                    return self.load(table).await;
                }
            };
            self.written(table, now, torn, start);
            return Ok(());
        }
        self.applied = Some((table.clone(), now));
        Ok(())
    }

    /// Writes all rules.
    async fn load(&mut self, table: &Arc<Table>) -> Result<(), CaptureError> {
        self.applied = None;
        if self.settings.notrack && self.surroundings.read.is_none() {
            self.judge_notrack(&Listings::read(Detail::Chains).await);
        }
        if let Some(first) = self.first_of_others()?
            && let Some(place) = first.place_before(self.priority)
        {
            self.priority = place;
        }
        let places = self.places(table);
        let start = Instant::now();
        let rules = whole(table, &self.settings, &places, self.priority);
        let torn = self.backend.load(&rules).await?;
        self.written(table, places, torn, start);
        Ok(())
    }

    fn places(&self, table: &Table) -> Places {
        let mut places = Places::of(table, &self.settings);
        if self.surroundings.tracked_for.is_some() {
            places.untracked.clear();
        }
        places
    }

    /// Called after rules were written. `torn`: other programs changed them meanwhile.
    fn written(
        &mut self,
        table: &Arc<Table>,
        places: Places,
        torn: Option<Change>,
        start: Instant,
    ) {
        let (firewall, took) = (self.backend.firewall(), start.elapsed());
        self.counts.write_times.observe(took);
        let took_ms = took.as_secs_f64() * 1e3;
        debug!(%firewall, routes = table.routes().len(), vips = places.vips.len(), took_ms, "firewall rules written");
        if let Some((change, missing)) = self.damage.take() {
            self.restored(change, missing);
        }
        for server in places.shadowed(table) {
            if self.shadowed.insert(server) {
                warn!(%server, "binding not captured: its address is that of a registry or engine embassy connects to");
            }
        }
        self.counts.stand(|standing| {
            standing.firewall = Some(firewall);
            standing.in_place = torn.is_none();
            standing.error = None;
        });
        self.applied = Some((table.clone(), places));
        if let Some(change) = torn {
            // The next check writes them again.
            warn!(%firewall, change = change.as_str(), "another program changed our rules while we wrote them; writing them again");
            self.damage = Some((change, "some, as they were written".to_owned()));
            self.applied = None;
        }
        if let Some(ready) = self.ready.take() {
            let RuleSettings { redirect, scope, .. } = self.settings;
            info!(%firewall, owned = self.backend.is_owned(), redirect, scope = %scope, "capturing");
            ready.done();
        }
    }

    /// Others changed our rules. They are about to be written again.
    fn damaged(&mut self, change: Change, missing: String) {
        let firewall = self.backend.firewall();
        self.counts.stand(|standing| standing.in_place = false);
        warn!(%firewall, change = change.as_str(), missing, "another program changed our rules; putting them back");
        self.damage = Some((change, missing));
    }

    fn restored(&self, change: Change, missing: String) {
        if let Some(count) = self.counts.restored.get(change as usize) {
            count.fetch_add(1, Relaxed);
        }
        self.counts.stand(|standing| standing.restored = Some((Instant::now(), missing.clone())));
        self.events.report(|| Event::CaptureRestored { change, missing });
    }

    /// Restores the rules if other programs changed them.
    async fn check(&mut self, table: &Arc<Table>) -> Result<(), CaptureError> {
        let standing = self.applied.as_ref().filter(|_| self.backend.stands());
        let Some((_, places)) = standing else { return self.load(table).await };
        if !self.backend.others_changed()? {
            return Ok(());
        }
        self.surroundings.may_have_changed = true;
        let firewall = self.backend.firewall();
        let places = places.clone();
        let (settings, priority) = (&self.settings, self.priority);
        let rules = || whole(table, settings, &places, priority);
        if let Some((change, missing)) = self.backend.check(rules).await? {
            self.damaged(change, missing);
            return self.load(table).await;
        }
        if firewall == Firewall::Nft
            && let Some(first) = self.first_of_others()?
            && let Some(place) = first.place_before(self.priority)
        {
            let (change, missing) = (Change::Displaced, format!("the place before {first}"));
            warn!(%firewall, change = change.as_str(), missing, "another program's rules come before ours; moving ours before them");
            self.priority = place;
            self.backend.move_to(&whole(table, &self.settings, &places, self.priority))?;
            self.restored(change, missing);
        }
        Ok(())
    }

    fn first_of_others(&mut self) -> Result<Option<First>, CaptureError> {
        Ok(First::among(&self.backend.base_chains()?, self.settings.redirect))
    }

    /// Looks for obstacles in the rules of other programs. Programs are started only if others changed something, or something is
    /// in the way.
    fn look_around(&mut self) {
        let Surroundings { read, reading, .. } = &self.surroundings;
        if !reading.is_empty() || read.is_some_and(|read| read.elapsed() < READ) {
            return;
        }
        self.surroundings.read = Some(Instant::now());
        let arrivals = self.backend.arrivals().unwrap_or_else(|error| {
            debug!(%error, "cannot count the captured connections that arrive");
            None
        });
        let dropped = self.surroundings.arrivals.are_dropped(arrivals);
        let may_have_changed = std::mem::take(&mut self.surroundings.may_have_changed)
            || self.settings.notrack && input::has_legacy_iptables();
        if !may_have_changed && !dropped && self.surroundings.barriers.is_empty() {
            return;
        }
        self.surroundings.reading.spawn(Listings::read(Detail::Chains));
    }

    /// Others' rules were read.
    async fn learn(&mut self, listings: &Listings, table: &Arc<Table>) {
        if let Some(error) = listings.error() {
            debug!(%error, "cannot read all rules that captured connections pass");
        }
        let mut found = listings.barriers(self.settings.port);
        let unknown = Barrier::unknown(self.settings.port);
        let Surroundings { barriers, behind, arrivals, .. } = &mut self.surroundings;
        let is_rule =
            |barrier: &&Barrier| **barrier != unknown && Some(*barrier) != behind.as_ref();
        if barriers.iter().filter(is_rule).any(|barrier| !found.contains(barrier)) {
            arrivals.forgive();
        }
        if arrivals.dropped() && found.is_empty() {
            found.push(unknown);
        }
        self.tell_barriers(found);
        let before = self.surroundings.tracked_for.clone();
        self.judge_notrack(listings);
        if self.surroundings.tracked_for != before && self.applied.is_some() {
            let done = self.follow(table).await;
            self.note(done);
        }
    }

    /// Logs the obstacles for captured connections when they change.
    fn tell_barriers(&mut self, mut found: Vec<Barrier>) {
        found.extend(self.behind());
        let Surroundings { barriers, behind, .. } = &self.surroundings;
        let new =
            |barrier: &&Barrier| !barriers.contains(barrier) && Some(*barrier) != behind.as_ref();
        for Barrier { chain, remedy } in found.iter().filter(new) {
            warn!(chain, remedy, "captured connections may be dropped on this host");
        }
        for Barrier { chain, .. } in barriers.iter().filter(|barrier| !found.contains(barrier)) {
            info!(chain, "chain no longer drops captured connections");
        }
        self.counts.barriers.store(found.len() as u64, Relaxed);
        self.counts.stand(|standing| standing.barriers.clone_from(&found));
        self.surroundings.barriers = found;
    }

    /// The rules of other programs before ours that we cannot move before; a change is logged.
    fn behind(&mut self) -> Option<Barrier> {
        let firewall = self.backend.firewall();
        let first = self.first_of_others().unwrap_or_else(|error| {
            debug!(%error, "cannot check whether other programs' rules come before ours");
            None
        });
        let behind = first.filter(|first| first.stays_before(firewall, self.priority));
        let behind = behind.map(|first| Barrier {
            chain: format!("{first}, comes before our rules"),
            remedy: match firewall {
                Firewall::Iptables => "give it a priority above -100, or use --firewall=nft",
                Firewall::Nft => "give it a priority above -199",
            }
            .to_owned(),
        });
        if let Some(Barrier { chain, remedy }) =
            behind.as_ref().filter(|_| behind != self.surroundings.behind)
        {
            warn!(chain, remedy, "another program may take connections before our rules do");
        }
        self.surroundings.behind.clone_from(&behind);
        behind
    }

    /// Whether our own connections may bypass connection tracking; a change is logged.
    fn judge_notrack(&mut self, listings: &Listings) {
        if !self.settings.notrack {
            return;
        }
        let obstacle = match self.backend.firewall() {
            Firewall::Iptables => Some(
                "iptables cannot tell by their socket which packets are ours; use --firewall=nft"
                    .to_owned(),
            ),
            Firewall::Nft => {
                listings.closed().or_else(|| listings.error().map(ToString::to_string))
            }
        };
        if obstacle != self.surroundings.tracked_for {
            match &obstacle {
                Some(reason) => {
                    warn!(reason, "--notrack is refused: connections to endpoints are tracked")
                }
                None => info!("--notrack is in effect again"),
            }
            self.surroundings.tracked_for = obstacle;
        }
    }
}

/// All rules of a table, with these places.
fn whole(table: &Table, settings: &RuleSettings, places: &Places, priority: i32) -> Rules {
    let mut rules = Rules::of(table, settings);
    rules.places = places.clone();
    rules.shape.priority = priority;
    rules
}

#[cfg(test)]
mod tests;
