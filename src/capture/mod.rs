//! The kernel made to match the table: what consumers send to a VIP is led to our listener. Only this module touches the
//! firewall, and only what bears our name there.

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use crate::{config::FirewallChoice, readiness::Guard, table::Table};

pub mod conntrack;
mod iptables;
mod nft;
mod program;
pub mod rules;

pub use program::ProgramError;
use rules::{Rules, Settings};

/// Who writes the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firewall {
    Nft,
    Iptables,
}

impl fmt::Display for Firewall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        })
    }
}

impl Firewall {
    /// The one that was chosen; for `auto`, the one that Docker uses here, else the first that works. An error where it
    /// does not work.
    pub async fn choose(choice: FirewallChoice) -> Result<Self, ProgramError> {
        match choice {
            FirewallChoice::Nft => return nft::installed().await.map(|_| Self::Nft),
            FirewallChoice::Iptables => return iptables::installed().await.map(|_| Self::Iptables),
            FirewallChoice::Auto => {}
        }
        // Engine 29's own nftables backend names its tables so (docs.docker.com/engine/network/firewall-nftables).
        let tables = nft::tables().await;
        if tables.as_ref().is_ok_and(|tables| tables.contains("docker-bridges")) {
            return Ok(Self::Nft);
        }
        if iptables::docker_is_here().await.unwrap_or(false) {
            return Ok(Self::Iptables);
        }
        match tables {
            Ok(_) => Ok(Self::Nft),
            Err(_) => iptables::installed().await.map(|_| Self::Iptables),
        }
    }

    async fn apply(self, rules: &Rules) -> Result<(), ProgramError> {
        match self {
            Self::Nft => nft::apply(rules).await,
            Self::Iptables => iptables::apply(rules).await,
        }
    }

    async fn installed(self) -> Result<Option<String>, ProgramError> {
        match self {
            Self::Nft => nft::installed().await,
            Self::Iptables => iptables::installed().await,
        }
    }
}

/// Takes away what an earlier run left, whichever backend it used, and what the original program left. A backend that is
/// not installed has left nothing; every other error is reported, and the rest still done.
pub async fn cleanup() {
    for (firewall, removed) in remove().await {
        match removed {
            Ok(true) => info!(%firewall, "removed our rules"),
            Ok(false) => {}
            Err(error) => warn!(%firewall, %error, "cannot remove our rules"),
        }
    }
}

/// The same, for who wants to know: whether there was anything of either backend.
pub async fn remove() -> [(Firewall, Result<bool, ProgramError>); 2] {
    let none_if_missing = |removed: Result<bool, ProgramError>| match removed {
        Err(error) if error.is_missing() => {
            debug!(%error, "nothing to remove");
            Ok(false)
        }
        removed => removed,
    };
    [
        (Firewall::Nft, none_if_missing(nft::remove().await)),
        (Firewall::Iptables, none_if_missing(iptables::remove().await)),
    ]
}

/// What a program would be given on its standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Script {
    /// The program and its arguments.
    pub command: String,
    pub text: String,
}

/// What would be written by a start now, where nothing of ours stands. It only reads.
pub async fn plan(
    choice: FirewallChoice,
    rules: &Rules,
) -> Result<(Firewall, Vec<Script>), ProgramError> {
    let firewall = Firewall::choose(choice).await?;
    let scripts = match firewall {
        Firewall::Nft => vec![nft::plan(rules)],
        Firewall::Iptables => iptables::plan(rules).await?,
    };
    Ok((firewall, scripts))
}

/// What the capture did, for the metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Rules that had vanished or changed and were put back.
    pub restored: AtomicU64,
    /// Attempts that failed.
    pub failed: AtomicU64,
}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// How often the kernel's rules are compared with ours: within 5 s they must be back.
const CHECK: Duration = Duration::from_secs(2);

impl Capture {
    /// Starts keeping the kernel's rules like the table. Nothing is captured before the first table.
    /// `ready` is dropped once the first rules stand.
    pub fn start(
        choice: FirewallChoice,
        settings: Settings,
        tables: watch::Receiver<Arc<Table>>,
        counts: Arc<Counts>,
        ready: Guard,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper {
            choice,
            chosen: None,
            settings,
            counts,
            applied: None,
            shadowed: BTreeSet::new(),
            failing: false,
            ready: Some(ready),
        };
        let task = tokio::spawn(keeper.run(tables, stopped));
        Self { stop, task }
    }

    /// Takes the rules away.
    pub async fn stop(self) {
        // The task ends by itself only when it panicked; the rules still have to go.
        let _ = self.stop.send(());
        if let Err(error) = self.task.await {
            error!(%error, "the capture failed");
        }
        cleanup().await;
    }
}

struct Keeper {
    choice: FirewallChoice,
    /// Chosen when the first rules are written: by the first table the engine is up, and shows what it uses.
    chosen: Option<Firewall>,
    settings: Settings,
    counts: Arc<Counts>,
    /// What was written last, and how the kernel listed it right after.
    applied: Option<(Rules, Option<String>)>,
    /// Servers of which it was said that a consumer cannot have their port.
    shadowed: BTreeSet<SocketAddr>,
    /// Whether the last attempt failed: a failure is told once, not every two seconds.
    failing: bool,
    ready: Option<Guard>,
}

impl Keeper {
    async fn run(
        mut self,
        mut tables: watch::Receiver<Arc<Table>>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let mut check = interval(CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = &mut stopped => return,
                changed = tables.changed() => if changed.is_err() { return },
                _ = check.tick() => {}
            }
            let table = tables.borrow_and_update().clone();
            if table.version == 0 {
                continue;
            }
            let wanted = Rules::of(&table, &self.settings);
            match self.keep(wanted).await {
                Ok(()) if self.failing => {
                    self.failing = false;
                    info!("the rules can be written again");
                }
                Ok(()) => {}
                Err(error) => {
                    self.applied = None;
                    self.counts.failed.fetch_add(1, Relaxed);
                    if !std::mem::replace(&mut self.failing, true) {
                        error!(%error, "cannot write the rules; trying again");
                    }
                }
            }
        }
    }

    /// Makes the kernel's rules `wanted`, unless they are.
    async fn keep(&mut self, wanted: Rules) -> Result<(), ProgramError> {
        let firewall = match self.chosen {
            Some(firewall) => firewall,
            None => Firewall::choose(self.choice).await?,
        };
        if let Some((applied, listed)) = &self.applied
            && *applied == wanted
        {
            let now = firewall.installed().await?;
            if now == *listed {
                return Ok(());
            }
            self.counts.restored.fetch_add(1, Relaxed);
            warn!(%firewall, missing = missing(listed.as_deref(), now.as_deref()), "our rules were changed from outside; putting them back");
        }
        let start = Instant::now();
        firewall.apply(&wanted).await?;
        let took_ms = start.elapsed().as_secs_f64() * 1e3;
        let listed = firewall.installed().await?;
        debug!(%firewall, declared = wanted.declared.len(), vips = wanted.vips.len(), took_ms, "rules written");
        if self.chosen.replace(firewall).is_none() {
            info!(%firewall, redirect = wanted.redirect, scope = ?wanted.scope, "capturing");
        }
        for server in wanted.shadowed() {
            if self.shadowed.insert(server) {
                warn!(%server, "a binding of this host has the address of a server that embassy itself asks: it is not captured");
            }
        }
        // Gone again already: the next check writes them anew.
        self.applied = listed.is_some().then_some((wanted, listed));
        if let Some(ready) = self.ready.take() {
            ready.done();
        }
        Ok(())
    }
}

/// The first thing that was there and is not any more.
fn missing<'a>(before: Option<&'a str>, now: Option<&str>) -> &'a str {
    match (before, now) {
        (Some(_), None) => "all of them",
        (Some(before), Some(now)) => {
            let lost = before.lines().find(|line| !now.lines().any(|other| other == *line));
            lost.map_or("nothing; something was added", str::trim)
        }
        (None, _) => "nothing",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(Some("a\n\tb\n"), Some("a\n")), "b");
        assert_eq!(missing(Some("a\n"), None), "all of them");
        assert_eq!(missing(Some("a\n"), Some("a\nx\n")), "nothing; something was added");
    }
}
