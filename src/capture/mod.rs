//! The kernel made to match the table: what consumers send to a VIP is led to our listener. Only this module touches the
//! firewall, and only what bears our name there.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use serde::Serialize;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tracing::{debug, error, info, warn};

use crate::{config::FirewallChoice, events::Events, readiness::Guard, table::Table};

mod change;
pub mod conntrack;
pub mod input;
pub(crate) mod iptables;
mod keeper;
mod lock;
mod nft;
pub mod place;
mod program;
pub mod rules;

pub use change::Change;
use keeper::Keeper;
pub use lock::Lock;
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

    /// Writes the rules, and says how many a listing of them has, by [`Self::count`].
    async fn apply(self, rules: &Rules) -> Result<usize, ProgramError> {
        match self {
            Self::Nft => nft::apply(rules).await,
            Self::Iptables => iptables::apply(rules).await,
        }
    }

    /// How many rules a listing has: those that others took away since they were written are not among them.
    fn count(self, listed: &str) -> usize {
        match self {
            Self::Nft => nft::count(listed),
            Self::Iptables => listed.lines().count(),
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

/// What the capture did and found, for the metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// How often rules had vanished or changed and were put back, by [`Change::ALL`].
    restored: [AtomicU64; Change::ALL.len()],
    /// Attempts that failed.
    pub failed: AtomicU64,
    /// Chains of others that may stop what is captured, now.
    pub barriers: AtomicU64,
    standing: Mutex<Standing>,
}

/// How the rules stand.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// Who wrote them. `None` before the first.
    pub firewall: Option<Firewall>,
    /// Whether they are as they should be.
    pub in_place: bool,
    /// Why they cannot be written.
    pub error: Option<String>,
    /// When they were put back last, and what was missing.
    pub restored: Option<(Instant, String)>,
    /// What is in the way of captured connections.
    pub barriers: Vec<input::Barrier>,
}

impl Counts {
    /// How the rules stand now.
    pub fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stand(&self, change: impl FnOnce(&mut Standing)) {
        // Each change is a few assignments: a panic elsewhere leaves it whole.
        change(&mut self.standing.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// How often rules that had changed so were put back.
    pub fn restored(&self, change: Change) -> u64 {
        self.restored[change as usize].load(Relaxed)
    }
}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    lock: Lock,
}

impl Capture {
    /// Starts keeping the kernel's rules like the table. Nothing is captured before the first table.
    /// `ready` is dropped once the first rules stand.
    pub fn start(
        lock: Lock,
        choice: FirewallChoice,
        settings: Settings,
        tables: watch::Receiver<Arc<Table>>,
        counts: Arc<Counts>,
        ready: Guard,
        events: Events,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper::new(choice, settings, counts, ready, events);
        let task = tokio::spawn(keeper.run(tables, stopped));
        Self { stop, task, lock }
    }

    /// Waits for the end of what keeps the rules, which should go on.
    pub async fn failed(&mut self) -> String {
        let end = (&mut self.task).await;
        end.map_or_else(|error| error.to_string(), |()| "it ended".to_owned())
    }

    /// Takes the rules away. From then on another embassy may capture here.
    pub async fn stop(self) {
        // The task ends by itself only when it panicked; the rules still have to go.
        let _ = self.stop.send(());
        if !self.task.is_finished()
            && let Err(error) = self.task.await
        {
            error!(%error, "the capture failed");
        }
        cleanup().await;
        drop(self.lock);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        config::CaptureScope,
        readiness::{Part, Readiness},
    };

    #[tokio::test]
    async fn the_end_of_what_keeps_the_rules_is_noticed() {
        let settings = Settings {
            redirect: false,
            scope: CaptureScope::Declared,
            port: 9999,
            own: Vec::new(),
            servers: Vec::new(),
            hold: false,
            notrack: false,
        };
        let (tables, receiver) = watch::channel(Arc::default());
        let ready = Readiness::default().wait_for(Part::Capture);
        let mut capture = Capture::start(
            Lock::of_nobody(),
            FirewallChoice::Nft,
            settings,
            receiver,
            Arc::default(),
            ready,
            Events::default(),
        );
        let soon = tokio::time::timeout(Duration::from_millis(50), capture.failed()).await;
        assert!(soon.is_err(), "nothing has ended");
        drop(tables);
        let end = tokio::time::timeout(Duration::from_secs(60), capture.failed()).await;
        assert_eq!(end.unwrap(), "it ended");
    }
}
