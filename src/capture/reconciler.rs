//! Keeps the kernel's rules equal to the table.

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
    CaptureCounts, CaptureError, Change, Drops, Firewall, TurnedAway,
    arrivals::Arrivals,
    backend::Backend,
    input::{self, Barrier, CapturedTraffic, FirewallListings},
    interface,
    nft::Offender,
    place::First,
    program::{READ, rest, time_of_programs},
    rules::{ExtraAddresses, Optional, PRIORITY, RuleChanges, RulePart, RuleSettings, Rules},
};
use crate::{
    events::{Event, Events},
    readiness::Guard,
    table::{Changes, Table},
    wiring::Wiring,
};

/// Follows the table and the changes that other programs make to the firewall.
pub(super) struct Reconciler {
    backend: Backend,
    settings: RuleSettings,
    /// The optional parts that were left out because the kernel refused the rules with them, without saying so before.
    refused: Optional,
    /// When rules without some parts were last tried.
    reduced: Option<Instant>,
    counts: Arc<CaptureCounts>,
    events: Events,
    /// The table and the places of the current rules.
    applied: Option<(Arc<Table>, ExtraAddresses)>,
    /// Why the rules are being restored: the change by other programs, and what was missing.
    damage: Option<(Change, String)>,
    /// Servers for which it was logged that a consumer cannot have their port.
    shadowed: BTreeSet<SocketAddr>,
    /// Whether the last attempt failed: a failure is logged once, not at every attempt.
    failing: bool,
    ready: Option<Guard>,
    /// The priority of our chains, with nft. It only decreases: there is no need to increase it again.
    priority: i32,
    surroundings: OtherRules,
    guarding: Guarding,
}

/// What the guard did, as last read and logged.
#[derive(Default)]
struct Guarding {
    /// When the counters were last read.
    looked: Option<Instant>,
    /// The offenders that were logged, as long as the kernel remembers them. The kernel limits their number.
    told: BTreeSet<Offender>,
    /// Whether addresses were unbound at the last look, and whether that was logged.
    unbound: bool,
    told_unbound: bool,
}

/// The rules of other programs that matter to us.
#[derive(Default)]
struct OtherRules {
    /// When others' rules may be read again, and whether they may have changed since they were.
    rest: Option<Instant>,
    may_have_changed: bool,
    /// They are being read: a program may take seconds for it, which the rules of a new container must not wait.
    reading: JoinSet<(FirewallListings, Duration)>,
    /// By what was read last: the chains that seem to drop captured connections, and the rule that does if none of them seems to.
    readable: Vec<Barrier>,
    /// Whether there is such a chain for each family of addresses in which connections are captured.
    bar_all: bool,
    suspects: Vec<Barrier>,
    /// Why `--notrack` is refused, as last logged.
    tracked_for: Option<String>,
    /// The obstacles for captured connections, as last logged, and whether it was known that they are in the way.
    barriers: Vec<Barrier>,
    drops: Drops,
    /// The chains that stay before our rules, as last logged.
    behind: Option<Barrier>,
    arrivals: Arrivals,
}

/// Poll interval for changes by other programs: rules must be restored within 5 s. With nf_tables this is one short call.
const CHECK: Duration = Duration::from_secs(1);
/// Minimum interval between two attempts to find out which part of the rules is refused.
const REDUCE: Duration = Duration::from_secs(15);
/// Minimum interval between two attempts to find out whether a part is accepted again. Only after another program changed
/// something.
const COME_BACK: Duration = Duration::from_secs(60);

impl Reconciler {
    pub(super) fn new(
        backend: Backend,
        settings: RuleSettings,
        counts: Arc<CaptureCounts>,
        ready: Option<Guard>,
        events: Events,
    ) -> Self {
        let mut new = Self {
            backend,
            settings,
            refused: Optional::default(),
            reduced: None,
            counts,
            events,
            applied: None,
            damage: None,
            shadowed: BTreeSet::new(),
            failing: false,
            ready,
            priority: PRIORITY,
            surroundings: OtherRules { may_have_changed: true, ..OtherRules::default() },
            guarding: Guarding::default(),
        };
        let lacks = new.backend.lacks().to_vec();
        let parts = lacks.iter().map(|(part, _)| *part);
        new.settings.lacks = parts.fold(new.settings.lacks, Optional::with);
        new.tell_lacks(lacks);
        new
    }

    /// Logs the optional parts of the rules that are missing, except those that were missing before: a takeover that fails starts this again.
    fn tell_lacks(&self, lacks: Vec<(RulePart, String)>) {
        let mut new = Vec::new();
        self.counts.stand(|standing| {
            let is_new = |(part, reason): &(RulePart, String)| standing.lack(*part, reason);
            new = lacks.into_iter().filter(is_new).collect();
        });
        for (part, reason) in &new {
            warn!(
                loss = part.loss(),
                reason,
                "the firewall does not support an optional part of the rules; capturing without it"
            );
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
            // The check may come before the notification of a new table.
            if self.applied.as_ref().is_none_or(|(applied, _)| applied.version != table.version) {
                done = self.follow(&table).await;
            }
            if is_check && done.is_ok() {
                done = self.check(&table).await;
            }
            self.note(done);
            if is_check {
                self.look_around();
                self.look_at_guard(&table);
            }
            if let Some((listings, took)) = listings {
                self.learn(listings, took, &table).await;
            }
        }
        self.backend
    }

    /// Logs and counts a failure, and logs its end.
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
            // All rules are written at once, which would silently restore what other programs removed.
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
        if self.settings.leaves_untracked() && self.surroundings.rest.is_none() {
            self.judge_notrack(&FirewallListings::read().await);
        }
        if let Some(first) = self.first_of_others()?
            && let Some(place) = first.place_before(self.priority)
        {
            self.priority = place;
        }
        let places = self.places(table);
        let start = Instant::now();
        let rules = whole(table, &self.settings, &places, self.priority);
        let (places, torn) = match self.backend.load(&rules).await {
            Ok(torn) => (places, torn),
            Err(error) => self.load_reduced(table, &rules, error).await?,
        };
        self.written(table, places, torn, start);
        Ok(())
    }

    /// Writes all rules. If an optional part is the reason why they are refused, writes them without it.
    async fn load_reduced(
        &mut self,
        table: &Table,
        rules: &Rules,
        error: CaptureError,
    ) -> Result<(ExtraAddresses, Option<Change>), CaptureError> {
        if self.reduced.is_some_and(|last| last.elapsed() < REDUCE) {
            return Err(error);
        }
        self.reduced = Some(Instant::now());
        // A part is the reason only if the rules fail again with it and work without it. Otherwise the cause was something
        // else.
        let error = match self.backend.load(rules).await {
            Ok(torn) => return Ok((rules.places.clone(), torn)),
            Err(error) => error,
        };
        let may_be_refused = |part| rules.shape.has(part) && self.backend.may_refuse(part);
        let choices: Vec<_> = Optional::choices()
            .into_iter()
            .filter(|choice| choice.parts().all(may_be_refused))
            .collect();
        for refused in choices {
            let mut settings = self.settings.clone();
            settings.lacks = refused.parts().fold(settings.lacks, Optional::with);
            let before = std::mem::replace(&mut self.settings, settings);
            let places = self.places(table);
            let rules = whole(table, &self.settings, &places, self.priority);
            if let Ok(torn) = self.backend.load(&rules).await {
                let new = refused.parts().filter(|part| !self.refused.has(*part));
                self.tell_lacks(new.map(|part| (part, error.to_string())).collect());
                self.refused = refused.parts().fold(self.refused, Optional::with);
                return Ok((places, torn));
            }
            self.settings = before;
        }
        Err(error)
    }

    /// Writes all rules including the parts that were refused, in case they are accepted now.
    async fn load_refused(&mut self, table: &Arc<Table>) -> Result<(), CaptureError> {
        let before = self.settings.lacks;
        self.settings.lacks = before.without(self.refused);
        if let Err(error) = self.load(table).await {
            self.settings.lacks = before;
            return Err(error);
        }
        let back = self.refused.without(self.settings.lacks);
        self.refused = self.refused.without(back);
        for part in back.parts() {
            info!(loss = part.loss(), "the firewall can do an optional part of the rules again");
        }
        self.counts.stand(|standing| standing.lacks.retain(|(part, _)| !back.has(*part)));
        Ok(())
    }

    fn places(&self, table: &Table) -> ExtraAddresses {
        let mut places = ExtraAddresses::of(table, &self.settings);
        if self.surroundings.tracked_for.is_some() {
            places.untracked.clear();
        }
        places
    }

    /// Called after rules were written. `torn`: what other programs changed meanwhile.
    fn written(
        &mut self,
        table: &Arc<Table>,
        places: ExtraAddresses,
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
        let shadowed: BTreeSet<_> = places.shadowed(table).collect();
        for server in shadowed.iter().copied() {
            if self.shadowed.insert(server) {
                warn!(%server, "binding not captured: its address is that of a registry or engine embassy connects to");
            }
        }
        let guards = self.settings.guards();
        self.counts.stand(|standing| {
            standing.firewall = Some(firewall);
            standing.in_place = torn.is_none();
            standing.guards = guards;
            standing.shadowed = shadowed;
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
            info!(%firewall, owned = self.backend.is_owned(), redirect, scope = %scope, "embassy captures connections");
            ready.done();
        }
    }

    /// Called if other programs changed our rules, before they are written again.
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
        let tried = self.reduced.is_some_and(|last| last.elapsed() >= COME_BACK);
        if tried && self.refused != Optional::default() {
            return self.load_refused(table).await;
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

    /// Looks for obstacles in the rules of other programs. Starts programs only if other programs changed something, or if
    /// connections are lost for an unknown reason.
    fn look_around(&mut self) {
        // Two short calls.
        let (arrivals, were_dropped) = (self.arrivals(), self.surroundings.arrivals.dropped());
        let dropped = self.surroundings.arrivals.are_dropped(arrivals);
        // The kernel does not report changes of the older iptables' rules.
        let unseen = input::has_legacy_iptables()
            && (self.settings.notrack || dropped || !self.surroundings.barriers.is_empty());
        let changed = self.surroundings.may_have_changed || unseen || dropped && !were_dropped;
        self.surroundings.may_have_changed = changed;
        let OtherRules { rest, reading, .. } = &self.surroundings;
        if changed && reading.is_empty() && rest.is_none_or(|rest| Instant::now() >= rest) {
            self.surroundings.may_have_changed = false;
            self.surroundings.reading.spawn(async {
                let (start, before) = (Instant::now(), time_of_programs());
                let listings = FirewallListings::read().await;
                // A program that timed out was killed, and its processor time is not known yet.
                let took = match listings.error() {
                    Some(_) => start.elapsed(),
                    None => time_of_programs().saturating_sub(before),
                };
                (listings, took)
            });
        }
        self.tell_barriers(self.surroundings.behind.clone());
    }

    /// Reads what the guard and the rule for our own port turned away. Asks for the senders only if the guard dropped more
    /// frames since.
    fn look_at_guard(&mut self, table: &Table) {
        if self.guarding.looked.is_some_and(|last| last.elapsed() < READ) {
            return;
        }
        self.guarding.looked = Some(Instant::now());
        let turned_away = self.backend.turned_away().unwrap_or_else(|error| {
            debug!(%error, "cannot count what the rules turn away");
            [None, None]
        });
        let mut more = [false; 2];
        let counts = &self.counts.turned_away;
        for ((what, now), more) in TurnedAway::ALL.iter().zip(turned_away).zip(&mut more) {
            *more = now.is_some_and(|now| counts.read(*what, now));
        }
        let [_, dropped] = more;
        if dropped {
            match self.backend.offenders() {
                Ok(offenders) => self.tell_offenders(offenders, table.wiring()),
                Err(error) => debug!(%error, "cannot read whose frames the guard dropped"),
            }
        }
        let guards = self.settings.guards();
        let unbound = &table.wiring().unbound;
        self.counts.unbound.store(if guards { unbound.len() as u64 } else { 0 }, Relaxed);
        self.counts
            .bound
            .store(if guards { table.wiring().owners.len() as u64 } else { 0 }, Relaxed);
        // A container's port is unknown for a moment after its start.
        let is_unbound = guards && !unbound.is_empty();
        let lasts = std::mem::replace(&mut self.guarding.unbound, is_unbound) && is_unbound;
        if lasts
            && !self.guarding.told_unbound
            && let Some((address, consumer)) = table.wiring().first_unbound()
        {
            self.guarding.told_unbound = true;
            let addresses = unbound.len();
            warn!(
                addresses, %address, consumer = &**consumer,
                "addresses of containers are not bound to a bridge port: the guard does not know their ports"
            );
        }
    }

    /// Logs once each port that used an address of another container, and each that sent a frame that no container sends.
    fn tell_offenders(&mut self, offenders: Vec<Offender>, wiring: &Wiring) {
        let offenders: BTreeSet<_> = offenders.into_iter().collect();
        let new: Vec<_> = offenders.difference(&self.guarding.told).collect();
        // A port that uses the addresses of many neighbours is logged as one line.
        let is_same = |a: &&Offender, b: &&Offender| {
            (a.port, a.address.is_some()) == (b.port, b.address.is_some())
        };
        for of_port in new.chunk_by(is_same) {
            let (Some(offender), addresses) = (of_port.first(), of_port.len()) else { continue };
            let port = interface::named(offender.port);
            let container = wiring.container_at(offender.port).map(|name| &**name);
            match offender.address {
                Some(address) => {
                    let owner = wiring.owners.get(&address).map(|owner| &*owner.name);
                    warn!(
                        port, container, addresses, %address, owner,
                        "a bridge port used an address of another container; its packets to VIPs are dropped"
                    );
                }
                None => warn!(
                    port,
                    container,
                    "a bridge port sent frames that the guard drops (stacked VLAN tags, or a forged Ethernet address, ARP or neighbour advertisement)"
                ),
            }
        }
        self.guarding.told = offenders;
    }

    /// How many captured connections came to this host's input, and how many passed it.
    fn arrivals(&mut self) -> Option<(u64, u64)> {
        self.backend.arrivals().unwrap_or_else(|error| {
            debug!(%error, "cannot count the captured connections that arrive");
            None
        })
    }

    /// Called after other programs' rules were read. `took`: the processor time for it.
    async fn learn(&mut self, listings: FirewallListings, took: Duration, table: &Arc<Table>) {
        self.surroundings.rest = Some(Instant::now() + rest(took));
        if let Some(error) = listings.error() {
            debug!(%error, "cannot read all rules that captured connections pass");
        }
        let vips = ExtraAddresses::of(table, &self.settings).vips;
        let captured = CapturedTraffic::at(self.settings.port, &vips);
        let readable = listings.barriers(&captured);
        let suspects = listings.suspects(&captured);
        let before = std::mem::replace(&mut self.surroundings.readable, readable);
        self.surroundings.bar_all = listings.bar_all(&captured, &vips);
        let suspected = std::mem::replace(&mut self.surroundings.suspects, suspects);
        let OtherRules { readable, suspects, .. } = &self.surroundings;
        // One that is gone may have been the reason. One that has come says nothing of what was lost before.
        let is_gone = before.iter().any(|barrier| !readable.contains(barrier))
            || suspected.iter().any(|barrier| !suspects.contains(barrier));
        let has_changed = before != *readable;
        let counts = self.arrivals();
        if is_gone {
            self.surroundings.arrivals.forgive(counts);
        }
        if has_changed {
            self.surroundings.arrivals.doubt(counts);
        }
        let before = self.surroundings.tracked_for.clone();
        self.judge_notrack(&listings);
        let behind = self.behind();
        self.tell_barriers(behind);
        if self.surroundings.tracked_for != before && self.applied.is_some() {
            let done = self.follow(table).await;
            self.note(done);
        }
    }

    /// The obstacles to captured connections, from readable rules and from the counters.
    fn obstacles(&self) -> Vec<Barrier> {
        let OtherRules { readable, suspects, arrivals, rest, .. } = &self.surroundings;
        match readable.as_slice() {
            // Before others' rules were read, nothing can be said of them.
            [] if arrivals.dropped() && rest.is_some() => {
                vec![Barrier::suspected(suspects, self.settings.port)]
            }
            [] if arrivals.dropped() => Vec::new(),
            // Whatever the rules look like, connections pass them.
            _ if arrivals.pass() => Vec::new(),
            readable => readable.to_vec(),
        }
    }

    /// Whether connections are dropped, by the counters.
    fn drops(&self) -> Drops {
        let OtherRules { readable, bar_all, arrivals, .. } = &self.surroundings;
        let all_are = *bar_all && !readable.is_empty() && arrivals.none_passes();
        match (arrivals.dropped(), all_are) {
            (false, _) => Drops::NotCounted,
            (true, false) => Drops::Some,
            (true, true) => Drops::All,
        }
    }

    /// Logs the obstacles to captured connections when they change, and when the counters prove that they drop.
    fn tell_barriers(&mut self, behind: Option<Barrier>) {
        let (found, drops) = (self.obstacles(), self.drops());
        let before = std::mem::replace(&mut self.surroundings.drops, drops);
        let barriers = &self.surroundings.barriers;
        let is_proved = before == Drops::NotCounted && drops != Drops::NotCounted;
        for barrier @ Barrier { chain, remedy } in &found {
            if drops == Drops::NotCounted && !barriers.contains(barrier) {
                warn!(chain, remedy, "captured connections may be dropped on this host");
            } else if is_proved || drops != Drops::NotCounted && !barriers.contains(barrier) {
                warn!(chain, remedy, "captured connections are dropped on this host");
            }
        }
        for Barrier { chain, .. } in barriers.iter().filter(|barrier| !found.contains(barrier)) {
            info!(chain, "chain no longer drops captured connections");
        }
        self.counts.barriers.store((found.len() + usize::from(behind.is_some())) as u64, Relaxed);
        self.counts.stand(|standing| {
            standing.barriers.clone_from(&found);
            standing.drops = drops;
            standing.behind = behind;
        });
        self.surroundings.barriers = found;
    }

    /// The chain of other programs that translates before ours and stays before it. Logs changes.
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
        let before = std::mem::replace(&mut self.surroundings.behind, behind.clone());
        if let Some(Barrier { chain, .. }) = before.filter(|_| behind.is_none()) {
            info!(chain, "no other program's rules come before ours any more");
        }
        behind
    }

    /// Decides whether our own connections may bypass connection tracking. Logs changes.
    fn judge_notrack(&mut self, listings: &FirewallListings) {
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
fn whole(table: &Table, settings: &RuleSettings, places: &ExtraAddresses, priority: i32) -> Rules {
    let mut rules = Rules::of(table, settings);
    rules.places = places.clone();
    rules.shape.priority = priority;
    rules
}

#[cfg(test)]
mod tests;
