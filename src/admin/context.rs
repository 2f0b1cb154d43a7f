//! The data that the calls read.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};

use super::{access::Access, history::History};
use crate::{
    capture::{self, OwnRules},
    config::{CaptureMode, CaptureScope, FORGOT_STATIC, Instance},
    control::SourceStates,
    discovery::Endpoints,
    events::Events,
    judgement::{CaptureReading, Load, Situation, SourceReading, SourceState, Used},
    path::Paths,
    provider::{Listing, fixed},
    proxy::Figures,
    readiness::{Part, Readiness},
    report::PROVIDER,
    source::{Known, ResyncRequests},
    table::Table,
};

/// The data sources of the API.
#[derive(Debug, Clone)]
pub struct Feeds {
    pub readiness: Readiness,
    pub metrics: Arc<Registry>,
    pub tables: watch::Receiver<Arc<Table>>,
    /// The path of each route.
    pub paths: watch::Receiver<Paths>,
    pub sources: watch::Receiver<SourceStates>,
    pub figures: Figures,
    /// `None` if the user's own rules capture.
    pub capture: Option<Arc<capture::CaptureCounts>>,
    /// The user's own rules, as far as they are known.
    pub own_rules: watch::Receiver<OwnRules>,
    pub events: Events,
    /// Requests a resync of every source.
    pub resync: ResyncRequests,
    pub constants: Arc<Constants>,
}

/// Values that do not change while embassy runs.
#[derive(Debug)]
pub struct Constants {
    pub started: Instant,
    /// The listen addresses for captured connections.
    pub listeners: Vec<SocketAddr>,
    pub mode: CaptureMode,
    pub scope: CaptureScope,
    /// `--hold`
    pub hold: Duration,
    pub instance: Instance,
    /// With `--redirect`: embassy's own addresses, which are captured like VIPs.
    pub own: Vec<IpAddr>,
    /// The servers of each discovery that are given by address.
    pub servers: Vec<(Arc<str>, SocketAddr)>,
}

/// The state of a handler.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) feeds: Feeds,
    pub(super) history: History,
    pub(super) access: Arc<Access>,
    /// Slots for clients of the event stream.
    pub(super) listeners: Arc<Semaphore>,
    /// One scrape is written at a time: parallel ones would only compete for the CPU.
    pub(super) scrapes: Arc<Semaphore>,
    /// Slots for clients that read a scrape, which is in memory until then.
    pub(super) readers: Arc<Semaphore>,
}

impl Feeds {
    /// All facts from which states are decided, as of now.
    pub(super) fn situation(&self) -> Situation {
        self.read(true)
    }

    /// What readiness is judged by. It is asked for often, and there may be ten thousand queries: they are read only while embassy
    /// waits for answers.
    pub(super) fn readiness(&self) -> Situation {
        self.read(self.readiness.awaits(Part::Discovery))
    }

    fn read(&self, with_queries: bool) -> Situation {
        let sources = self.sources.borrow().clone();
        let now = Instant::now();
        let listing = sources.listing.clone().unwrap_or_default();
        let wanted = if with_queries { &sources.queries[..] } else { &[] };
        let queries = wanted.iter().map(|(query, answers)| {
            let known = answers.borrow();
            let in_use = sources.in_use.get(query);
            let skipped = skipped_entries(&known);
            let reading = SourceReading::of(query.to_string(), &known, in_use, skipped, now);
            let problem = known.value.iter().find_map(|value| value.problem.as_deref());
            let problem = problem.filter(|_| !query.is_probe());
            let answer = known.value.as_deref();
            let fix = match self.led_back(&query.via) {
                Some(fix) if known.error.is_some() => fix,
                _ => reading.fix.clone(),
            };
            let reading = SourceReading {
                fix,
                problem: problem.map(Into::into),
                more_skipped: answer.map_or(0, |answer| answer.rejected.more()),
                left_out: answer.map_or(0, |answer| answer.left_out),
                ..reading
            };
            (query.clone(), reading)
        });
        let figures = &self.figures;
        let table = self.tables.borrow().clone();
        Situation {
            provider: {
                let reading = provider(&sources, now);
                match self.constants.instance.forgot_static && reading.error.is_some() {
                    true => SourceReading { fix: FORGOT_STATIC.to_owned(), ..reading },
                    false => reading,
                }
            },
            queries: queries.collect(),
            capture: CaptureReading {
                mode: self.constants.mode,
                scope: self.constants.scope,
                standing: self.capture.as_ref().map(|counts| counts.standing()).unwrap_or_default(),
                own: self.constants.own.clone(),
                own_rules: self.own_rules.borrow().clone(),
                captured: figures.captured(),
            },
            pending: self.readiness.waiting(),
            load: Load {
                live: figures.live(),
                limit: figures.limit(),
                limit_of_consumer: figures.limit_of_consumer(),
                memory_short: figures.memory_short(),
            },
            hold: self.constants.hold,
            own_port: self.constants.listeners.first().map_or(0, SocketAddr::port),
            now: figures.now(),
            here: here(&table, &listing, &self.constants.own),
            table,
            paths: self.paths.borrow().clone(),
            listing,
            astray: Default::default(),
        }
    }
}

impl Feeds {
    /// The fix if one of the user's rules redirects embassy's own connections to a server of this discovery back to
    /// embassy.
    fn led_back(&self, via: &str) -> Option<String> {
        let rules = self.own_rules.borrow();
        let servers = self.constants.servers.iter().filter(|(of, _)| **of == *via);
        servers.into_iter().find_map(|(_, server)| {
            let rule = &rules.lead_of_own(*server)?.rule;
            Some(format!(
                "exclude embassy's user from the rule that leads embassy's own connections to {server} back to it (-m owner ! --uid-owner <user>): {rule}"
            ))
        })
    }
}

/// The VIPs, embassy's own addresses and the gateways that this network namespace has.
fn here(table: &Table, listing: &Listing, own: &[IpAddr]) -> BTreeSet<IpAddr> {
    let gateways = listing.consumers.iter().flat_map(|consumer| &consumer.gateways);
    let vips = table.vips().iter().map(|vip| vip.0);
    fixed::here(vips.chain(own.iter().chain(gateways).copied()))
}

fn provider(sources: &SourceStates, now: Instant) -> SourceReading {
    let known = sources.provider.borrow();
    let problems = known.value.iter().flat_map(|listing| &listing.problems);
    let skipped = problems.map(|p| format!("{} {}: {}", p.consumer, p.origin, p.reason));
    let skipped = skipped.collect();
    let mut reading = SourceReading::of(PROVIDER.to_owned(), &known, None, skipped, now);
    // The table was built from saved data.
    if reading.state == SourceState::Down && known.value.is_none() && sources.listing.is_some() {
        reading.used = Used::Kept(None);
    }
    reading
}

fn skipped_entries(known: &Known<Endpoints>) -> Vec<String> {
    let rejected = known.value.iter().flat_map(|endpoints| endpoints.rejected.iter());
    rejected.map(|entry| format!("{}: {}", entry.what, entry.reason)).collect()
}
