//! Makes the kernel's rules match the table: consumers' connections to a VIP are redirected to our listener. Only this module
//! changes the firewall, and only objects with our name.

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use serde::Serialize;
use tokio::{
    sync::{oneshot, watch},
    task::{JoinError, JoinHandle},
};
use tracing::{debug, error, info, warn};

use crate::{
    config::FirewallChoice, counts::Histogram, events::Events, readiness::Guard, table::Table,
    takeover::message::ProcessFigures,
};

mod arrivals;
mod backend;
mod change;
pub mod conntrack;
mod error;
#[cfg(test)]
mod fake;
pub mod input;
mod interface;
pub(crate) mod iptables;
mod layout;
pub mod leads;
mod lock;
pub(crate) mod netlink;
mod nft;
pub mod own_rules;
pub mod place;
mod program;
mod reconciler;
pub mod rules;
mod text;

pub use backend::{Backend, Remains};
pub use change::Change;
pub use error::CaptureError;
pub use interface::named as interface_name;
pub use lock::Lock;
pub use own_rules::OwnRules;
use reconciler::Reconciler;
use rules::{Hook, RuleSettings, Rules};

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

/// Removes the rules of an earlier run, of any backend, and of the original program. A backend that is
/// not installed has left nothing; every other error is reported, and the rest still done.
pub async fn cleanup() {
    for (firewall, removed) in remove_leftovers().await {
        report(firewall, removed);
    }
}

fn report(firewall: Firewall, removed: Result<bool, CaptureError>) {
    match removed {
        Ok(true) => info!(%firewall, "removed our rules"),
        Ok(false) => {}
        Err(error) => warn!(%firewall, %error, "cannot remove our rules"),
    }
}

/// The same, for who wants to know: whether there was anything of either backend.
pub async fn remove_leftovers() -> [(Firewall, Result<bool, CaptureError>); 2] {
    let none_if_missing = |removed: Result<bool, CaptureError>| match removed {
        Err(error) if error.is_missing() => {
            debug!(%error, "no embassy rules to remove");
            Ok(false)
        }
        removed => removed,
    };
    [
        (Firewall::Nft, none_if_missing(nft::remove_leftovers().await)),
        (Firewall::Iptables, none_if_missing(iptables::remove().await)),
    ]
}

/// Rules as a program takes them on its standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Script {
    /// The program and its arguments.
    pub command: String,
    pub text: String,
}

/// The rules that a start would write on a host without rules of embassy. Only reads. With nft these are shown as a script,
/// although embassy starts no program.
pub async fn plan(
    choice: FirewallChoice,
    settings: &RuleSettings,
    table: &Table,
) -> Result<(Firewall, Vec<Script>), CaptureError> {
    let backend = Backend::open(choice, settings).await?;
    let rules = Rules::of(table, settings);
    let scripts = match backend.firewall() {
        Firewall::Nft => {
            let text = text::of(&rules, backend.is_owned());
            vec![Script { command: "nft -f -".to_owned(), text }]
        }
        Firewall::Iptables => iptables::plan(&rules),
    };
    Ok((backend.firewall(), scripts))
}

/// What the capture did and found, for the metrics.
#[derive(Debug, Default)]
pub struct CaptureCounts {
    /// How often the rules were restored, by [`Change::ALL`].
    restored: [AtomicU64; Change::ALL.len()],
    /// Attempts that failed.
    pub failed: AtomicU64,
    /// Chains of others that may stop what is captured, now.
    pub barriers: AtomicU64,
    /// What the rules turned away, by [`TurnedAway::ALL`].
    pub turned_away: TurnedAwayCounts,
    /// The addresses that are bound to ports of bridges, and those on bridges that are not, now.
    pub bound: AtomicU64,
    pub unbound: AtomicU64,
    /// How long each write of the rules, or of changes to them, took.
    pub write_times: Histogram,
    standing: watch::Sender<Standing>,
}

/// What the rules turn away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnedAway {
    /// Connections to our own port that nothing captured.
    Direct,
    /// Frames whose sender used an address of another container.
    Spoofed,
}

impl TurnedAway {
    pub const ALL: [Self; 2] = [Self::Direct, Self::Spoofed];
}

/// How much the rules turned away since the start. The kernel's counts begin again when rules are written.
#[derive(Debug, Default)]
pub struct TurnedAwayCounts {
    /// The sum, and the kernel's count as it was read last.
    counts: [(AtomicU64, AtomicU64); TurnedAway::ALL.len()],
}

impl TurnedAwayCounts {
    /// The kernel's count is this now. Whether there is more.
    fn read(&self, what: TurnedAway, now: u64) -> bool {
        let Some((sum, last)) = self.counts.get(what as usize) else { return false };
        let before = last.swap(now, Relaxed);
        // A smaller count has begun again.
        let more = now.checked_sub(before).unwrap_or(now);
        sum.fetch_add(more, Relaxed);
        more > 0
    }

    pub fn get(&self, what: TurnedAway) -> u64 {
        self.counts.get(what as usize).map_or(0, |(sum, _)| sum.load(Relaxed))
    }
}

/// How the rules stand.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// Who wrote them. `None` before the first.
    pub firewall: Option<Firewall>,
    /// Whether they are as they should be.
    pub in_place: bool,
    /// Whether addresses are bound to ports of bridges.
    pub guards: bool,
    /// Why they cannot be written.
    pub error: Option<String>,
    /// When the rules were last restored, and what was missing.
    pub restored: Option<(Instant, String)>,
    /// The optional parts of the rules that the firewall cannot do, and why.
    pub lacks: Vec<(rules::Part, String)>,
    /// Chains on this host's input that may drop captured connections.
    pub barriers: Vec<input::Barrier>,
    /// Whether they do, by count.
    pub drops: Drops,
    /// Addresses of registries and engines that are excepted from the capture, though this host's own consumer declared their port.
    pub shadowed: BTreeSet<SocketAddr>,
    /// A chain that may take connections before our rules do.
    pub behind: Option<input::Barrier>,
}

impl Standing {
    /// The firewall cannot do an optional part of the rules. Whether that is new.
    fn lack(&mut self, part: rules::Part, reason: &str) -> bool {
        let known = self.lacks.iter_mut().find(|(one, _)| *one == part);
        let is_new = known.is_none();
        match known {
            Some((_, before)) => reason.clone_into(before),
            None => self.lacks.push((part, reason.to_owned())),
        }
        is_new
    }
}

/// Whether captured connections are dropped on this host's input, by the counts before and after others' rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Drops {
    /// None was lost, or none has come.
    #[default]
    NotCounted,
    /// Some were lost.
    Some,
    /// Some were lost and none has passed since others' rules were last found changed, and rules that can be read say that all of
    /// each family of addresses are dropped.
    All,
}

impl CaptureCounts {
    /// How the rules stand now.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    fn stand(&self, change: impl FnOnce(&mut Standing)) {
        self.standing.send_modify(change);
    }

    /// Changes when the rules stand in another way.
    pub fn changes(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// What was counted, for the process after this one.
    pub fn totals(&self, figures: &mut ProcessFigures) {
        figures.restored = self.restored.iter().map(|count| count.load(Relaxed)).collect();
        let counts = self.turned_away.counts.iter();
        figures.turned_away =
            counts.map(|(sum, last)| (sum.load(Relaxed), last.load(Relaxed))).collect();
        figures.write_failures = self.failed.load(Relaxed);
    }

    /// Adds what the process before this one counted.
    pub fn inherit(&self, figures: &ProcessFigures) {
        for (mine, theirs) in self.restored.iter().zip(&figures.restored) {
            mine.fetch_add(*theirs, Relaxed);
        }
        // The kernel's counts may go on.
        for (mine, (sum, last)) in self.turned_away.counts.iter().zip(&figures.turned_away) {
            mine.0.fetch_add(*sum, Relaxed);
            mine.1.store(*last, Relaxed);
        }
        self.failed.fetch_add(figures.write_failures, Relaxed);
    }

    /// How often the rules were restored after this change.
    pub fn restored(&self, change: Change) -> u64 {
        self.restored.get(change as usize).map_or(0, |count| count.load(Relaxed))
    }
}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Backend>,
    /// What came of the task, where its end was noticed.
    ended: Option<Result<Backend, JoinError>>,
    lock: Lock,
    follows: Follows,
}

/// What the rules follow.
#[derive(Debug, Clone)]
struct Follows {
    settings: RuleSettings,
    tables: watch::Receiver<Arc<Table>>,
    counts: Arc<CaptureCounts>,
    events: Events,
}

/// A capture whose rules stand and follow nothing, so that another process can go on with them.
#[derive(Debug)]
pub struct Suspended {
    backend: Backend,
    lock: Lock,
    follows: Follows,
}

impl Capture {
    /// Starts the task that keeps the kernel's rules equal to the table. Nothing is captured before the first table.
    /// `ready` is dropped once the first rules stand.
    pub fn start(
        lock: Lock,
        backend: Backend,
        settings: RuleSettings,
        tables: watch::Receiver<Arc<Table>>,
        counts: Arc<CaptureCounts>,
        ready: Guard,
        events: Events,
    ) -> Self {
        let follows = Follows { settings, tables, counts, events };
        Self::follow(lock, backend, follows, Some(ready))
    }

    fn follow(lock: Lock, backend: Backend, follows: Follows, ready: Option<Guard>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let Follows { settings, tables, counts, events } = follows.clone();
        let reconciler = Reconciler::new(backend, settings, counts, ready, events);
        let task = tokio::spawn(reconciler.run(tables, stopped));
        Self { stop, task, ended: None, lock, follows }
    }

    /// Leaves the rules as they are. An error if what kept them has failed.
    pub async fn suspend(self) -> Result<Suspended, JoinError> {
        let _ = self.stop.send(());
        let backend = match self.ended {
            Some(end) => end,
            None => self.task.await,
        };
        Ok(Suspended { backend: backend?, lock: self.lock, follows: self.follows })
    }

    /// Waits for the end of what keeps the rules, which should go on.
    pub async fn failed(&mut self) -> String {
        if self.ended.is_none() {
            // Its rules stay until they are removed: live connections need them.
            self.ended = Some((&mut self.task).await);
        }
        match &self.ended {
            Some(Err(error)) => error.to_string(),
            Some(Ok(_)) | None => "it ended".to_owned(),
        }
    }

    /// Removes the rules. Then another embassy may capture here. What is given back is to be kept until the last
    /// captured connection has ended.
    pub async fn stop(self) -> Remains {
        let _ = self.stop.send(());
        let end = match self.ended {
            Some(end) => end,
            None => self.task.await,
        };
        self.follows.counts.stand(|standing| standing.in_place = false);
        let remains = match end {
            Ok(backend) => {
                let firewall = backend.firewall();
                let removed = backend.remove().await;
                let (removed, remains) = match removed {
                    Ok((found, remains)) => (Ok(found), remains),
                    Err(error) => (Err(error), Remains::default()),
                };
                report(firewall, removed);
                remains
            }
            Err(error) => {
                error!(%error, "the capture failed");
                // Nobody is left who knows what it wrote.
                cleanup().await;
                Remains::default()
            }
        };
        drop(self.lock);
        remains
    }
}

impl Suspended {
    /// What the process after this one needs so that the rules stay: the socket that owns them, and the lock's.
    pub fn sockets(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        (self.backend.owner(), self.lock.socket())
    }

    /// Has the rules follow the tables again.
    pub fn resume(self) -> Capture {
        Capture::follow(self.lock, self.backend, self.follows, None)
    }
}

/// The place of our rules that translate at `hook`, in `firewall`. Only reads.
pub async fn place_of(firewall: Firewall, hook: Hook) -> Result<place::Place, CaptureError> {
    let chains = nft::base_chains();
    match firewall {
        Firewall::Nft => Ok(place::in_nft(&chains?, hook)),
        // Where there is no nf_tables, there are no chains of its.
        Firewall::Iptables => iptables::place(&chains.unwrap_or_default(), hook).await,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Mutex, time::Duration};

    use super::*;
    use crate::readiness::{Part, Readiness};

    /// A capture, and what its firewall was given.
    fn capture(tables: watch::Receiver<Arc<Table>>) -> (Capture, Arc<Mutex<fake::State>>) {
        let ready = Readiness::default().wait_for(Part::Capture);
        let fake = fake::Fake::default();
        let state = fake.state.clone();
        let capture = Capture::start(
            Lock::of_nobody(),
            Backend::Fake(fake),
            fake::settings(),
            tables,
            Arc::default(),
            ready,
            Events::default(),
        );
        (capture, state)
    }

    #[test]
    fn a_count_of_the_kernels_that_begins_again_is_added() {
        let counts = TurnedAwayCounts::default();
        let read = |now| counts.read(TurnedAway::Spoofed, now);
        assert!(!read(0) && read(3) && !read(3) && read(5));
        // Rules were written: two more since.
        assert!(read(2) && !read(0) && read(1));
        assert_eq!((counts.get(TurnedAway::Spoofed), counts.get(TurnedAway::Direct)), (8, 0));
    }

    #[tokio::test]
    async fn the_end_of_what_keeps_the_rules_is_noticed() {
        let (tables, receiver) = watch::channel(Arc::default());
        let (mut capture, state) = capture(receiver);
        let soon = tokio::time::timeout(Duration::from_millis(50), capture.failed()).await;
        assert!(soon.is_err(), "nothing has ended");
        drop(tables);
        for _ in 0..2 {
            let end = tokio::time::timeout(Duration::from_secs(60), capture.failed()).await;
            assert_eq!(end.unwrap(), "it ended");
        }
        assert!(!state.lock().unwrap().removed);
        capture.stop().await;
        assert!(state.lock().unwrap().removed);
    }

    #[tokio::test]
    async fn rules_are_removed_by_what_kept_them_though_it_ended_unnoticed() {
        let (tables, receiver) = watch::channel(Arc::default());
        let (capture, state) = capture(receiver);
        drop(tables);
        while !capture.task.is_finished() {
            tokio::task::yield_now().await;
        }
        capture.stop().await;
        assert!(state.lock().unwrap().removed);
    }
}
