//! The keeper of our rules: what the table asks for is written, compared with what the kernel has, and put back.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    sync::{oneshot, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use super::{
    Change, Counts, Firewall, ProgramError,
    input::{self, Barrier},
    place::First,
    rules::{PRIORITY, Rules, Settings},
};
use crate::{
    config::FirewallChoice,
    events::{Event, Events},
    readiness::Guard,
    table::Table,
};

/// Makes the kernel's rules like the table, and keeps them so.
pub(super) struct Keeper {
    choice: FirewallChoice,
    /// Chosen when the first rules are written: by the first table the engine is up, and shows what it uses.
    chosen: Option<Firewall>,
    settings: Settings,
    counts: Arc<Counts>,
    events: Events,
    /// What was written last, and how the kernel listed it right after.
    applied: Option<(Rules, Option<String>)>,
    /// Others were at our rules while we wrote them: what was listed then is not what they should be.
    torn: Option<Change>,
    /// Servers of which it was said that a consumer cannot have their port.
    shadowed: BTreeSet<SocketAddr>,
    /// Whether the last attempt failed: a failure is told once, not every two seconds.
    failing: bool,
    ready: Option<Guard>,
    /// Why `--notrack` is refused, as it was told last.
    tracked_for: Option<String>,
    /// What is in the way of captured connections, as it was told last.
    barriers: Vec<Barrier>,
    /// When that was looked for last.
    looked: Option<Instant>,
    /// What comes before our rules and cannot be got behind them, as it was told last.
    behind: Option<Barrier>,
    /// Of our chains, with nft. It only goes down: there is no need to follow others up again.
    priority: i32,
}

/// How often the kernel's rules are compared with ours: within 5 s they must be back.
const CHECK: Duration = Duration::from_secs(2);
/// How often the rules of others are looked at: those that stop captured connections are seldom written.
const LOOK: Duration = Duration::from_secs(5);

impl Keeper {
    pub(super) fn new(
        choice: FirewallChoice,
        settings: Settings,
        counts: Arc<Counts>,
        ready: Guard,
        events: Events,
    ) -> Self {
        Self {
            choice,
            chosen: None,
            settings,
            counts,
            events,
            applied: None,
            torn: None,
            shadowed: BTreeSet::new(),
            failing: false,
            ready: Some(ready),
            tracked_for: None,
            barriers: Vec::new(),
            looked: None,
            behind: None,
            priority: PRIORITY,
        }
    }

    /// Runs until it is stopped, or there will be no more tables. The rules stay.
    pub(super) async fn run(
        mut self,
        mut tables: watch::Receiver<Arc<Table>>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let mut check = interval(CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_check = tokio::select! {
                _ = &mut stopped => {
                    // They are about to be taken away.
                    self.counts.stand(|standing| standing.in_place = false);
                    return;
                }
                changed = tables.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                _ = check.tick() => true,
            };
            let table = tables.borrow_and_update().clone();
            if table.version == 0 {
                continue;
            }
            let mut wanted = Rules::of(&table, &self.settings);
            if !self.may_untrack().await {
                wanted.untracked.clear();
            }
            match self.keep(wanted, is_check).await {
                Ok(()) if self.failing => {
                    self.failing = false;
                    info!("the rules can be written again");
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
                        error!(%error, "cannot write the rules; trying again");
                    }
                }
            }
            if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                self.looked = Some(Instant::now());
                self.look().await;
            }
        }
    }

    /// Whether our own connections may pass connection tracking by; told when it becomes otherwise.
    async fn may_untrack(&mut self) -> bool {
        if !self.settings.notrack {
            return false;
        }
        let obstacle = if self.chosen == Some(Firewall::Iptables) {
            Some(
                "iptables cannot tell by their socket which packets are ours; use --firewall=nft"
                    .to_owned(),
            )
        } else {
            input::closed().await.unwrap_or_else(|error| Some(error.to_string()))
        };
        if obstacle != self.tracked_for {
            match &obstacle {
                Some(reason) => {
                    warn!(reason, "--notrack is refused: connections to endpoints are tracked")
                }
                None => info!("--notrack is in effect again"),
            }
            self.tracked_for.clone_from(&obstacle);
        }
        obstacle.is_none()
    }

    /// Tells of what is in the way of captured connections, when that becomes another.
    async fn look(&mut self) {
        let mut found = match input::barriers(self.settings.port).await {
            Ok(found) => found,
            Err(error) => {
                debug!(%error, "cannot see whether captured connections may come in");
                return;
            }
        };
        found.extend(self.look_before().await);
        let new = |barrier: &&Barrier| {
            !self.barriers.contains(barrier) && Some(*barrier) != self.behind.as_ref()
        };
        for barrier in found.iter().filter(new) {
            warn!(
                chain = barrier.chain,
                remedy = barrier.remedy,
                "captured connections may be dropped on this host"
            );
        }
        for barrier in self.barriers.iter().filter(|barrier| !found.contains(barrier)) {
            info!(chain = barrier.chain, "is not in the way of captured connections any more");
        }
        self.counts.barriers.store(found.len() as u64, Relaxed);
        self.counts.stand(|standing| standing.barriers.clone_from(&found));
        self.barriers = found;
    }

    /// What others have put before our rules where we cannot go before them; told when that becomes another.
    async fn look_before(&mut self) -> Option<Barrier> {
        let firewall = self.chosen?;
        // Where there is no nft, there are no chains of its.
        let first = First::of_others(self.settings.redirect).await.unwrap_or_else(|error| {
            debug!(%error, "cannot see whether others' rules come before ours");
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
        if let Some(Barrier { chain, remedy }) = behind.as_ref().filter(|_| behind != self.behind) {
            warn!(chain, remedy, "another program may take connections before our rules do");
        }
        self.behind.clone_from(&behind);
        behind
    }

    /// Makes the kernel's rules `wanted`, unless they are.
    async fn keep(&mut self, mut wanted: Rules, is_check: bool) -> Result<(), ProgramError> {
        let firewall = match self.chosen {
            Some(firewall) => firewall,
            None => Firewall::choose(self.choice).await?,
        };
        let mut changed =
            self.torn.take().map(|change| (change, "some, as they were written".to_owned()));
        if firewall == Firewall::Nft
            && (is_check || self.applied.is_none())
            && let Some(other) = First::of_others(self.settings.redirect).await?
            && let Some(place) = other.place_before(self.priority)
        {
            self.priority = place;
            if self.applied.is_some() {
                let missing = format!("the place before {other}");
                warn!(%firewall, change = Change::Displaced.as_str(), missing, "another program's rules come before ours; going before them");
                changed = Some((Change::Displaced, missing));
            }
        }
        wanted.priority = self.priority;
        if let Some((applied, listed)) = &self.applied
            && *applied == wanted
        {
            let now = firewall.installed().await?;
            if now == *listed {
                return Ok(());
            }
            // A listing is kept only where there was one.
            let (change, missing) =
                Change::of(listed.as_deref().unwrap_or_default(), now.as_deref());
            self.counts.stand(|standing| standing.in_place = false);
            changed = Some((change, missing.clone()));
            warn!(%firewall, change = change.as_str(), missing, "our rules were changed from outside; putting them back");
        }
        let start = Instant::now();
        let written = firewall.apply(&wanted).await?;
        let took_ms = start.elapsed().as_secs_f64() * 1e3;
        let listed = firewall.installed().await?;
        let whole = listed.as_deref().is_some_and(|listed| firewall.count(listed) == written);
        if let Some((change, missing)) = changed {
            self.counts.restored[change as usize].fetch_add(1, Relaxed);
            self.counts.stand(|standing| {
                standing.restored = Some((Instant::now(), missing.clone()));
            });
            self.events.report(|| Event::CaptureRestored { change, missing });
        }
        debug!(%firewall, declared = wanted.declared.len(), vips = wanted.vips.len(), took_ms, "rules written");
        if self.chosen.replace(firewall).is_none() {
            info!(%firewall, redirect = wanted.redirect, scope = %wanted.scope, "capturing");
        }
        for server in wanted.shadowed() {
            if self.shadowed.insert(server) {
                warn!(%server, "a binding of this host has the address of a server that embassy itself asks: it is not captured");
            }
        }
        self.counts.stand(|standing| {
            standing.firewall = Some(firewall);
            standing.in_place = whole;
            standing.error = None;
        });
        // What was listed is what they are compared with from now on: gone again already, the next check writes them anew.
        let torn = if listed.is_some() { Change::Incomplete } else { Change::Vanished };
        self.torn = (!whole).then_some(torn);
        if !whole {
            warn!(%firewall, change = torn.as_str(), "our rules were changed from outside as they were written; writing them again");
        }
        self.applied = whole.then_some((wanted, listed));
        if let Some(ready) = self.ready.take() {
            ready.done();
        }
        Ok(())
    }
}
