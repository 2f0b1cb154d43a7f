//! The kernel path: inside `connect()` of a process in a consumer's control group, the VIP becomes an endpoint. embassy carries no byte
//! of such a connection. It writes what the programs in the kernel choose from (`bpf/connect.c`), and reads what they counted.
//!
//! A third reader of the table, beside the capture and the proxy. It runs on a thread of its own: its calls wait for the kernel. Nothing
//! is loaded before a route asks for it.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::info;

use crate::{
    config::ConnectionLog, descriptor::PathChoice, events::Events, path::Paths, privileges,
    proxy::Figures, table::Table, word::worded,
};

mod again;
mod cgroup;
mod diag;
mod ends;
mod follow;
mod inside;
mod layout;
mod places;
mod programs;
mod proofs;
mod tables;
mod turns;

use follow::Core;

/// How often what the kernel met is looked at. The kernel takes a failed endpoint out of its choice by itself; this is how soon others hear of
/// it, and how long its record of ended connections must hold.
const LOOK: Duration = Duration::from_millis(100);

worded! {
    /// What happened to flows of UDP, in the order of `enum udp_note` in bpf/udp.c.
    pub enum UdpNote {
        /// a call failed: the service had no endpoint to use
        NoEndpoint = "no_endpoint",
        /// a call failed: there was no memory for the socket's flows, or other threads changed them at the same time
        NoPlace = "no_place",
        /// a socket talks to more than 8 services within a minute: the flow that was idle for longest ended
        Evicted = "evicted",
        /// one endpoint serves two ports or VIPs of one socket: its answers bear the one that was sent to last
        Shared = "shared",
    }
}

/// How often each happened.
#[derive(Debug, Default)]
pub struct UdpCounts([AtomicU64; UdpNote::ALL.len()]);

impl UdpCounts {
    pub fn get(&self, note: UdpNote) -> u64 {
        self.0.get(note as usize).map_or(0, |count| count.load(Relaxed))
    }

    fn set(&self, counts: &[u64; UdpNote::ALL.len()]) {
        self.0.iter().zip(counts).for_each(|(count, now)| count.store(*now, Relaxed));
    }
}

/// The settings of the kernel path.
#[derive(Debug)]
pub struct Settings {
    /// `--path`: for bindings that name no path.
    pub default: PathChoice,
    /// Whether `--max-connections-per-consumer` is a number.
    pub is_limited: bool,
    /// `--max-services`
    pub max_services: usize,
    /// Which connections are logged when they end.
    pub log: ConnectionLog,
    /// The mark of our own connections to endpoints.
    pub mark: Option<u32>,
    pub events: Events,
    /// Where what happened to flows of UDP is counted.
    pub udp: Arc<UdpCounts>,
    /// The clock of ejections, and the sums that the counts are added to.
    pub figures: Figures,
}

/// The running kernel path.
#[derive(Debug)]
pub struct KernelPath {
    stop: oneshot::Sender<()>,
    /// `None` once it has ended.
    ended: Option<oneshot::Receiver<()>>,
    paths: watch::Receiver<Paths>,
}

impl KernelPath {
    /// Starts the thread that follows tables.
    pub fn start(settings: Settings, tables: watch::Receiver<Arc<Table>>) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (over, ended) = oneshot::channel();
        let (sender, paths) = watch::channel(Paths::new(settings.default));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let run = move || {
            privileges::take_up_bpf();
            runtime.block_on(run(settings, tables, sender, stopped));
            // Dropped with a panic too: then it has ended as well.
            drop(over);
        };
        std::thread::Builder::new().name("kernel-path".to_owned()).spawn(run)?;
        Ok(Self { stop, ended: Some(ended), paths })
    }

    /// Which path each route takes.
    pub fn paths(&self) -> watch::Receiver<Paths> {
        self.paths.clone()
    }

    /// Waits until it has ended, which it never should. Cancel-safe.
    pub async fn failed(&mut self) {
        if let Some(ended) = &mut self.ended {
            let _ = ended.await;
            self.ended = None;
        }
    }

    /// Detaches the programs: new connections go through the proxy from now on. Open ones go on; they are the kernel's.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        if let Some(ended) = self.ended {
            let _ = ended.await;
        }
    }
}

/// Loads, attaches and tries the programs, and lets them go again. Blocks for some tenths of a second. The error says what is missing.
pub fn try_out() -> Result<(), String> {
    let few = programs::Sizes { routes: 8, services: 8, endpoints: 8 };
    let hierarchy = cgroup::Hierarchy::find().ok_or(programs::Unavailable::NoHierarchy);
    let tried = hierarchy.and_then(|hierarchy| {
        let mut tables = tables::Tables::load(few, &hierarchy)?;
        tables.load_udp(&hierarchy)
    });
    tried.map_err(|error| error.to_string())
}

async fn run(
    settings: Settings,
    mut tables: watch::Receiver<Arc<Table>>,
    paths: watch::Sender<Paths>,
    mut stop: oneshot::Receiver<()>,
) {
    let (ask, mut asks) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
    settings.figures.also_asks(ask);
    let (answers, mut answered) = mpsc::unbounded_channel();
    let mut core = Core::new(settings, paths, answers);
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = &mut stop => break,
            changed = tables.changed() => {
                if changed.is_err() {
                    break;
                }
                let table = tables.borrow_and_update().clone();
                core.take(table);
                core.look();
            }
            _ = looks.tick(), if core.is_loaded() => core.look(),
            Some(answer) = answered.recv() => core.answered(answer),
            Some(answer) = asks.recv() => {
                // Who asks may know this table already.
                if tables.has_changed().unwrap_or(false) {
                    let table = tables.borrow_and_update().clone();
                    core.take(table);
                    core.look();
                }
                core.count();
                let _ = answer.send(());
            }
        }
    }
    if core.is_loaded() {
        core.look();
        core.count();
        drop(core);
        info!("the kernel path has ended: new connections go through the proxy");
    }
}
