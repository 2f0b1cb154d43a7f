//! Makes the kernel's rules match the table: consumers' connections to a VIP are redirected to our listener. Only this
//! module changes the firewall, and it changes only objects with our name.

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

/// The firewall that has the rules.
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

/// Removes the rules of an earlier run, for both backends, and those of the original program. A backend that is not
/// installed has none. Every other error is logged, and the rest is removed nevertheless.
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

/// Like [`cleanup`], but returns for each backend whether it had any rules.
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

/// Rules as the standard input of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Script {
    /// The program and its arguments.
    pub command: String,
    pub text: String,
}

/// The rules that a start would write on a host without rules of embassy. Only reads. For nft they are shown as a script,
/// although embassy does not start the program.
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

/// What the capture did and found. For metrics.
#[derive(Debug, Default)]
pub struct CaptureCounts {
    /// How often the rules were restored, in the order of [`Change::ALL`].
    restored: [AtomicU64; Change::ALL.len()],
    /// Failed attempts to write or check the rules.
    pub failed: AtomicU64,
    /// The current number of other programs' chains that may stop captured connections.
    pub barriers: AtomicU64,
    /// The number of what the rules turned away, in the order of [`TurnedAway::ALL`].
    pub turned_away: TurnedAwayCounts,
    /// The current numbers of addresses that are bound to bridge ports, and of addresses on bridges that are not.
    pub bound: AtomicU64,
    pub unbound: AtomicU64,
    /// How long each write of the rules, or of changes to them, took.
    pub write_times: Histogram,
    standing: watch::Sender<Standing>,
}

/// A reason for which the rules turn something away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnedAway {
    /// Connections to our own port that no rule captured.
    Direct,
    /// Frames whose sender used an address of another container.
    Spoofed,
}

impl TurnedAway {
    pub const ALL: [Self; 2] = [Self::Direct, Self::Spoofed];
}

/// What the rules have turned away since embassy's start. The kernel's counters start from zero when rules are written.
#[derive(Debug, Default)]
pub struct TurnedAwayCounts {
    /// The sum, and the kernel's counter as last read.
    counts: [(AtomicU64, AtomicU64); TurnedAway::ALL.len()],
}

impl TurnedAwayCounts {
    /// Adds what the kernel's counter, now at `now`, shows. Returns whether it increased.
    fn read(&self, what: TurnedAway, now: u64) -> bool {
        let Some((sum, last)) = self.counts.get(what as usize) else { return false };
        let before = last.swap(now, Relaxed);
        // A smaller value means that the counter started from zero.
        let more = now.checked_sub(before).unwrap_or(now);
        sum.fetch_add(more, Relaxed);
        more > 0
    }

    pub fn get(&self, what: TurnedAway) -> u64 {
        self.counts.get(what as usize).map_or(0, |(sum, _)| sum.load(Relaxed))
    }
}

/// The state of the rules.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The firewall that has them. `None` before they were first written.
    pub firewall: Option<Firewall>,
    /// Whether the rules are as they should be.
    pub in_place: bool,
    /// Whether addresses are bound to bridge ports.
    pub guards: bool,
    /// Why the rules cannot be written.
    pub error: Option<String>,
    /// When the rules were last restored, and what was missing.
    pub restored: Option<(Instant, String)>,
    /// The optional parts of the rules that the firewall does not support, and why.
    pub lacks: Vec<(rules::RulePart, String)>,
    /// Chains of this host's input that may drop captured connections.
    pub barriers: Vec<input::Barrier>,
    /// Whether connections really are dropped, by the counters.
    pub drops: Drops,
    /// Addresses of registries and engines that are not captured, although a consumer on this host declared their port.
    pub shadowed: BTreeSet<SocketAddr>,
    /// A chain that may translate connections before our rules do.
    pub behind: Option<input::Barrier>,
}

impl Standing {
    /// Notes that the firewall does not support an optional part. Returns whether that is new.
    fn lack(&mut self, part: rules::RulePart, reason: &str) -> bool {
        let known = self.lacks.iter_mut().find(|(one, _)| *one == part);
        let is_new = known.is_none();
        match known {
            Some((_, before)) => reason.clone_into(before),
            None => self.lacks.push((part, reason.to_owned())),
        }
        is_new
    }
}

/// Whether captured connections are dropped on this host's input, by the counters before and after other programs' rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Drops {
    /// No connection was lost, or none has arrived.
    #[default]
    NotCounted,
    /// Some connections were lost.
    Some,
    /// Since other programs' rules last changed, some connections were lost and none has passed; and readable rules drop
    /// all connections of each address family.
    All,
}

impl CaptureCounts {
    /// The current state of the rules.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    fn stand(&self, change: impl FnOnce(&mut Standing)) {
        self.standing.send_modify(change);
    }

    /// Notified when the state of the rules changes.
    pub fn changes(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Writes the counts for the next process.
    pub fn totals(&self, figures: &mut ProcessFigures) {
        figures.restored = self.restored.iter().map(|count| count.load(Relaxed)).collect();
        let counts = self.turned_away.counts.iter();
        figures.turned_away =
            counts.map(|(sum, last)| (sum.load(Relaxed), last.load(Relaxed))).collect();
        figures.write_failures = self.failed.load(Relaxed);
    }

    /// Adds the counts of the previous process.
    pub fn inherit(&self, figures: &ProcessFigures) {
        for (mine, theirs) in self.restored.iter().zip(&figures.restored) {
            mine.fetch_add(*theirs, Relaxed);
        }
        // The kernel's counters may continue.
        for (mine, (sum, last)) in self.turned_away.counts.iter().zip(&figures.turned_away) {
            mine.0.fetch_add(*sum, Relaxed);
            mine.1.store(*last, Relaxed);
        }
        self.failed.fetch_add(figures.write_failures, Relaxed);
    }

    /// How often the rules were restored after this kind of change.
    pub fn restored(&self, change: Change) -> u64 {
        self.restored.get(change as usize).map_or(0, |count| count.load(Relaxed))
    }
}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Backend>,
    /// The result of the task, once its end was noticed.
    ended: Option<Result<Backend, JoinError>>,
    lock: Lock,
    follows: Follows,
}

/// What determines the rules.
#[derive(Debug, Clone)]
struct Follows {
    settings: RuleSettings,
    tables: watch::Receiver<Arc<Table>>,
    counts: Arc<CaptureCounts>,
    events: Events,
}

/// A capture whose rules are in place but do not follow the table, so that another process can continue with them.
#[derive(Debug)]
pub struct Suspended {
    backend: Backend,
    lock: Lock,
    follows: Follows,
}

impl Capture {
    /// Starts the task that keeps the kernel's rules equal to the table. Nothing is captured before the first table.
    /// `ready` is dropped once the first rules are written.
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

    /// Stops the task and leaves the rules in place. An error if the task has failed.
    pub async fn suspend(self) -> Result<Suspended, JoinError> {
        let _ = self.stop.send(());
        let backend = match self.ended {
            Some(end) => end,
            None => self.task.await,
        };
        Ok(Suspended { backend: backend?, lock: self.lock, follows: self.follows })
    }

    /// Waits until the task that keeps the rules ends, which is a failure. Returns its reason.
    pub async fn failed(&mut self) -> String {
        if self.ended.is_none() {
            // The rules stay until they are removed: live connections need them.
            self.ended = Some((&mut self.task).await);
        }
        match &self.ended {
            Some(Err(error)) => error.to_string(),
            Some(Ok(_)) | None => "it ended".to_owned(),
        }
    }

    /// Removes the rules. Then another embassy may capture here. The returned value must be kept until the last captured
    /// connection has ended.
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
                // No process knows any more what the task wrote.
                cleanup().await;
                Remains::default()
            }
        };
        drop(self.lock);
        remains
    }
}

impl Suspended {
    /// The sockets that the next process needs to keep the rules: the one that owns them, and the lock's.
    pub fn sockets(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        (self.backend.owner(), self.lock.socket())
    }

    /// Lets the rules follow the table again.
    pub fn resume(self) -> Capture {
        Capture::follow(self.lock, self.backend, self.follows, None)
    }
}

/// The position of our translating rules at `hook`, in `firewall`. Only reads.
pub async fn place_of(firewall: Firewall, hook: Hook) -> Result<place::RulesPlace, CaptureError> {
    let chains = nft::base_chains();
    match firewall {
        Firewall::Nft => Ok(place::in_nft(&chains?, hook)),
        // Without nf_tables there are no nf_tables chains.
        Firewall::Iptables => iptables::place(&chains.unwrap_or_default(), hook).await,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Mutex, time::Duration};

    use super::*;
    use crate::readiness::{Part, Readiness};

    /// A capture, and a record of what its firewall was given.
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
        // Rules were written, so the counter started from zero: two more.
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
