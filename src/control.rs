//! The control task: follows the queries of all bindings, and publishes a table after each change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};

use crate::{
    config::CaptureMode,
    consumer::{Binding, Consumer, Reach, Surroundings},
    counts::Histogram,
    descriptor::Balance,
    discovery::{Bounds, CannotAsk, Discoveries, Endpoints, Query, Watches},
    model::{Port, Vip},
    provider::{Listing, fixed},
    readiness::Guard,
    report::Report,
    source::{Answers, Known, ResyncRequests},
    state::{Restored, Snapshot},
    table::{Inputs, Table},
};

mod demand;
mod gateways;
mod hold;
mod limits;

use demand::{Demand, DemandChange};
use gateways::Gateways;
use hold::EmptyHold;
pub use hold::InUse;
use limits::Limited;
pub use limits::Limits;

/// The settings of the table.
#[derive(Debug, Clone)]
pub struct TableSettings {
    /// The VIPs of --proxy-ip. `None`: docker0's address, and the gateways of the consumers' bridge networks.
    pub vips: Option<Vec<Vip>>,
    /// embassy's own port, which no binding can have.
    pub own_port: Port,
    pub capture: CaptureMode,
    /// With `--redirect`: embassy's own addresses, which are captured like VIPs.
    pub own: Vec<IpAddr>,
    /// Whether connections of unknown containers may wait. Then the gateways of all bridge networks are VIPs, unless the
    /// user set the VIPs, because an unknown container may be the first one of its network.
    pub strangers: bool,
    /// The balance of bindings without lb=.
    pub balance: Balance,
    /// How long the last endpoints stay in use after a valid empty answer.
    pub empty_hold: Duration,
    /// The addresses on which embassy itself listens.
    pub listeners: Vec<SocketAddr>,
    pub limits: Limits,
    pub resync: ResyncRequests,
}

/// The parts that delay readiness.
#[derive(Debug)]
pub struct AwaitedParts {
    /// Done after the provider's first full listing.
    pub listing: Guard,
    /// Done after the first answer to every query of that listing, and the first answer of every discovery.
    pub answers: Guard,
}

/// The state of the sources, for metrics and the API.
#[derive(Debug, Clone)]
pub struct SourceStates {
    pub provider: Answers<Listing>,
    pub queries: Arc<[(Query, Answers<Endpoints>)]>,
    /// The endpoints in use, for each query where they are not the last answer.
    pub in_use: Arc<HashMap<Query, InUse>>,
    /// The listing that the table uses: the provider's last one, or the saved one. `None` before the first.
    pub listing: Option<Arc<Listing>>,
}

#[derive(Debug)]
pub struct Control {
    settings: TableSettings,
    discoveries: Discoveries,
    bounds: Bounds,
    provider: Answers<Listing>,
    watches: Watches,
    bell: Arc<Notify>,
    demand: Demand,
    /// The state of each followed query.
    known: HashMap<Query, Known<Endpoints>>,
    /// Queries that have neither an answer nor an error yet.
    unheard: HashSet<Query>,
    /// A query for each discovery that has not answered yet. It is used if no binding has one: embassy is ready only after
    /// each discovery has answered.
    probes: BTreeSet<Query>,
    hold: EmptyHold,
    limited: Limited,
    /// The provider's listing, or the saved one; and the part of it that is used.
    given: Option<Arc<Listing>>,
    listing: Option<Arc<Listing>>,
    /// The saved consumers, until the provider answers.
    kept: Option<Arc<Listing>>,
    /// The writer of the state file.
    keeper: Option<watch::Sender<Option<Snapshot>>>,
    tables: watch::Sender<Arc<Table>>,
    /// Replaced tables that other tasks may still read. They are freed here: freeing a large table takes milliseconds,
    /// during which a worker's connections would wait.
    replaced: Vec<Arc<Table>>,
    /// The time from this task's wake-up until a table was published, for each table.
    build_times: Arc<Histogram>,
    sources: watch::Sender<SourceStates>,
    /// The followed queries. There may be ten thousand, so the list is rebuilt only if they change.
    queries: Arc<[(Query, Answers<Endpoints>)]>,
    report: Report,
    waiting: (Option<Guard>, Option<Guard>),
    /// The time until which the first table waits for the first answers.
    patience: Option<Instant>,
    most_patience: Duration,
    gateways: Gateways,
}

/// How long a service without an answer may delay all others at the start.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same while another process serves, which knows it: long enough that a source that hangs has failed, and what was saved of it is
/// used.
const PATIENCE_OF_SUCCESSOR: Duration = Duration::from_secs(40);
/// When to look again whether nobody reads the replaced tables any more.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Control {
    /// `bell` must be the one that `provider` rings.
    pub fn new(
        settings: TableSettings,
        discoveries: Discoveries,
        provider: Answers<Listing>,
        bell: Arc<Notify>,
        waiting: AwaitedParts,
        report: Report,
    ) -> Self {
        let mut watches = Watches::new(discoveries.clone(), settings.resync.clone(), bell.clone());
        let probes: BTreeSet<_> = discoveries.probes().collect();
        for probe in &probes {
            watches.ask(probe);
        }
        let queries: Arc<[_]> = watches.answers().into();
        let sources = SourceStates {
            provider: provider.clone(),
            queries: queries.clone(),
            in_use: Arc::default(),
            listing: None,
        };
        Self {
            watches,
            hold: EmptyHold::new(settings.empty_hold),
            demand: Demand::default(),
            known: HashMap::new(),
            unheard: HashSet::new(),
            probes,
            limited: Limited::new(settings.limits),
            given: None,
            listing: None,
            kept: None,
            keeper: None,
            tables: watch::channel(Arc::default()).0,
            replaced: Vec::new(),
            build_times: Arc::default(),
            sources: watch::channel(sources).0,
            queries,
            waiting: (Some(waiting.listing), Some(waiting.answers)),
            gateways: Gateways::default(),
            bounds: discoveries.bounds(settings.listeners.clone()),
            settings,
            discoveries,
            provider,
            bell,
            report,
            patience: None,
            most_patience: PATIENCE,
        }
    }

    /// Uses the saved table until the sources answer, and sends each table to `keeper`.
    pub fn remember(&mut self, restored: Restored, keeper: watch::Sender<Option<Snapshot>>) {
        self.hold.kept = restored.endpoints;
        self.kept = restored.listing;
        self.keeper = Some(keeper);
    }

    /// Notes that the process from which this one takes over has captured connections. Must be called before any table is
    /// read.
    pub fn takes_over(&mut self) {
        self.tables.send_replace(Arc::new(Table::of_successor()));
        self.most_patience = PATIENCE_OF_SUCCESSOR;
    }

    /// To be notified when this task should run again.
    pub fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// The published tables. The first one is empty and has version 0.
    pub fn tables(&self) -> watch::Receiver<Arc<Table>> {
        self.tables.subscribe()
    }

    /// The time from the control task's wake-up until a table was published, for each table.
    pub fn build_times(&self) -> Arc<Histogram> {
        self.build_times.clone()
    }

    /// The state of the sources.
    pub fn sources(&self) -> watch::Receiver<SourceStates> {
        self.sources.subscribe()
    }

    /// Follows the sources. Never returns.
    pub async fn run(mut self) {
        loop {
            let wake = self.step(Instant::now());
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.bell.notified() => {}
                () = timer => {}
            }
        }
    }

    /// Publishes the current table. Returns when to run again if nothing else happens.
    ///
    /// The cost depends only on the changes: a host may have ten thousand consumers and a hundred thousand endpoints.
    fn step(&mut self, now: Instant) -> Option<Instant> {
        self.replaced.retain(|table| Arc::strong_count(table) > 1);
        let wake = self.follow(now);
        let look_again = (!self.replaced.is_empty()).then(|| now + LOOK_AGAIN);
        wake.into_iter().chain(look_again).min()
    }

    fn follow(&mut self, now: Instant) -> Option<Instant> {
        let news = self.news();
        let probed = self.end_probes();
        if probed {
            self.note_queries();
        }
        let (listing, listed_anew) = self.listing()?;
        self.listed();
        let consumers: Vec<_> = listing.consumers.iter().filter(|c| !c.has_ended()).collect();
        let mut heard = self.demand(&consumers, now);
        // Not `||`: both sides have an effect.
        let asked_others = self.follow_probes() | !heard.is_empty();
        if asked_others {
            self.note_queries();
        }
        heard.extend(news);
        let changed = listed_anew || !heard.is_empty();
        heard.extend(self.hold.restless().cloned());
        let mut wake = self.settle(&heard, now);

        // Nothing is captured before the first table. A short wait gives its routes endpoints.
        let first = self.tables.borrow().version == 0;
        let patience = *self.patience.get_or_insert(now + self.most_patience);
        if first && !self.unheard.is_empty() && now < patience {
            wake = Some(wake.map_or(patience, |wake| wake.min(patience)));
        } else {
            let published = self.publish(&listing, &consumers, now);
            wake = wake.into_iter().chain(self.gateways.look_again).min();
            self.ready();
            if changed || published {
                self.keep(&listing);
            }
        }
        if self.hold.in_use_has_changed() || listed_anew || probed || asked_others {
            self.show(listing);
        }
        wake
    }

    /// The listing to use, and whether it changed. `None` before the first.
    fn listing(&mut self) -> Option<(Arc<Listing>, bool)> {
        let is_first = self.listing.is_none();
        if self.provider.has_changed().unwrap_or(false) || is_first {
            let provider = self.provider.borrow_and_update().clone();
            self.report.source(None, &provider);
            if provider.value.is_some() {
                self.kept = None;
            }
            let kept = self.kept.clone().filter(|_| provider.error.is_some());
            let given = provider.value.or(kept)?;
            let same = |before: &Arc<Listing>| Arc::ptr_eq(before, &given);
            if !self.given.as_ref().is_some_and(same) {
                let (discoveries, own_port) = (&self.discoveries, self.settings.own_port);
                let query = |binding: &Binding| query_of(binding, discoveries, own_port).ok();
                let listing = self.limited.of(&given, query);
                self.given = Some(given);
                self.report.listing(&listing);
                self.listing = Some(listing.clone());
                return Some((listing, true));
            }
        }
        self.listing.clone().map(|listing| (listing, false))
    }

    /// Follows the queries of these consumers. Returns the queries that are new or no longer needed.
    fn demand(&mut self, consumers: &[&Arc<Consumer>], now: Instant) -> BTreeSet<Query> {
        let (discoveries, own_port) = (&self.discoveries, self.settings.own_port);
        let query = |binding: &Binding| query_of(binding, discoveries, own_port).ok();
        let DemandChange { new, gone } = self.demand.update(consumers, query);
        for query in &gone {
            self.watches.leave(query, now);
            self.unheard.remove(query);
            self.report.nobody_asks(query);
        }
        for query in &new {
            self.watches.ask(query);
            // The query may still be followed, for a consumer that restarts.
            match self.known.get(query) {
                Some(known) => self.report.source(Some(query), known),
                None => drop(self.unheard.insert(query.clone())),
            }
        }
        for query in self.watches.end_unasked(now) {
            self.known.remove(&query);
            self.hold.settle(&query, None, now);
        }
        new.into_iter().chain(gone).collect()
    }

    /// Follows the probe of each discovery that has not answered yet, as long as no binding has a query for it. Returns
    /// whether this changed.
    fn follow_probes(&mut self) -> bool {
        let mut changed = false;
        for probe in &self.probes {
            let wanted = !self.demand.queries().any(|query| query.via == probe.via);
            changed |= wanted != self.watches.follows(probe);
            if wanted {
                self.watches.ask(probe);
            } else {
                self.watches.end(probe);
                self.known.remove(probe);
            }
        }
        changed
    }

    /// Ends the probes of discoveries that have answered. A refusal of the query is an answer too: a login may only have
    /// the right to read some services. Returns whether there were any.
    fn end_probes(&mut self) -> bool {
        if self.probes.is_empty() {
            return false;
        }
        let answers = |known: &Known<Endpoints>| {
            let is_refused = known.error.is_some() && known.refused;
            known.value.is_some() || is_refused
        };
        let answering: HashSet<_> =
            self.known.iter().filter(|(_, k)| answers(k)).map(|(query, _)| &query.via).collect();
        let done: Vec<_> =
            self.probes.iter().filter(|probe| answering.contains(&probe.via)).cloned().collect();
        for probe in &done {
            self.probes.remove(probe);
            self.watches.end(probe);
            self.known.remove(probe);
            self.report.nobody_asks(probe);
        }
        !done.is_empty()
    }

    fn note_queries(&mut self) {
        self.queries = self.watches.answers().into();
    }

    /// The queries that got an answer or an error.
    fn news(&mut self) -> Vec<Query> {
        let mut heard = Vec::new();
        for (query, known) in self.watches.news() {
            let is_probe = self.probes.contains(&query);
            if is_probe || self.demand.asks(&query) {
                self.report.source(Some(&query), &known);
            }
            if known.value.is_some() || known.error.is_some() {
                self.unheard.remove(&query);
            }
            self.known.insert(query.clone(), known);
            if !is_probe {
                heard.push(query);
            }
        }
        heard
    }

    /// Chooses the endpoints to use for these queries. Returns when to run again if nothing else happens.
    fn settle(&mut self, queries: &BTreeSet<Query>, now: Instant) -> Option<Instant> {
        let mut wake: Option<Instant> = None;
        for query in queries {
            let known = self.known.get(query);
            let end = self.hold.settle(query, known, now);
            wake = wake.into_iter().chain(end).min();
            if self.demand.asks(query)
                && let Some(known) = known
            {
                self.report.endpoints(query, known, self.hold.used().get(query));
            }
        }
        wake
    }

    /// Completes the readiness of the provider once it has answered, even if its bindings still wait.
    fn listed(&mut self) {
        if self.provider.borrow().value.is_some()
            && let Some(listing) = self.waiting.0.take()
        {
            listing.done();
        }
    }

    /// Completes the readiness of the discoveries once each has answered.
    fn ready(&mut self) {
        if self.waiting.1.is_some()
            && self.unheard.is_empty()
            && self.probes.is_empty()
            && self.each_discovery_answers()
            && let Some(answers) = self.waiting.1.take()
        {
            answers.done();
        }
    }

    /// Whether each queried discovery has answered at least one query. A discovery that always refuses one query is not
    /// down.
    fn each_discovery_answers(&self) -> bool {
        let answers = |query: &&Query| self.known.get(*query).is_some_and(|k| k.value.is_some());
        let answering: HashSet<_> =
            self.demand.queries().filter(answers).map(|query| &query.via).collect();
        self.demand.queries().all(|query| answering.contains(&query.via))
    }

    /// Reports that no address is captured, or that connections of consumers with new routes cannot reach any captured
    /// address.
    fn report_addresses(&mut self, table: &Table, listing: &Listing) {
        if self.settings.capture == CaptureMode::None || table.changes().added.is_empty() {
            return;
        }
        let addresses: BTreeSet<_> =
            table.vips().iter().map(|vip| vip.0).chain(self.settings.own.iter().copied()).collect();
        let mut new = BTreeMap::new();
        for route in &table.changes().added {
            new.entry(&route.consumer).or_insert_with(|| table.owner(route));
        }
        let consumers = || new.values().copied().flatten();
        let gateways = consumers().flat_map(|consumer| &consumer.gateways);
        let here = fixed::here(addresses.iter().chain(gateways).copied());
        let around = Surroundings { here: &here, networks: &listing.networks };
        let is_elsewhere = |one: &Consumer| {
            addresses.iter().all(|address| one.reach(*address, around) == Reach::Elsewhere)
        };
        let astray = consumers().map(|one| &**one).find(|one| is_elsewhere(one));
        self.report.addresses(&addresses, astray);
    }

    /// Sends the current state to the writer of the state file.
    fn keep(&self, listing: &Arc<Listing>) {
        let Some(keeper) = &self.keeper else { return };
        let (mut endpoints, mut confirmed) =
            (self.hold.used().clone(), self.hold.confirmed().clone());
        for (query, kept) in self.hold.awaited(&self.unheard) {
            confirmed.insert(query.clone(), kept.confirmed);
            endpoints.insert(query.clone(), kept.endpoints.living());
        }
        let listing = listing.clone();
        keeper.send_replace(Some(Snapshot { listing, endpoints, confirmed }));
    }

    /// Publishes the state of the sources.
    fn show(&self, listing: Arc<Listing>) {
        let queries = self.queries.clone();
        let provider = self.provider.clone();
        let in_use = Arc::new(self.hold.in_use().clone());
        self.sources.send_replace(SourceStates {
            provider,
            queries,
            in_use,
            listing: Some(listing),
        });
    }

    /// Publishes a table from the current data, if it differs from the last one.
    fn publish(
        &mut self,
        listing: &Arc<Listing>,
        consumers: &[&Arc<Consumer>],
        now: Instant,
    ) -> bool {
        let vips = match &self.settings.vips {
            Some(vips) => vips.clone(),
            None => self.gateways.seen(listing, self.settings.strangers, now),
        };
        let inputs = Inputs {
            consumers,
            contested: &listing.contested,
            known: &listing.known,
            networks: &listing.networks,
            confirmed: listing.confirmed,
            wiring: &listing.wiring,
            endpoints: self.hold.used(),
            vips: &vips,
            gateways_are_vips: self.settings.vips.is_none(),
            balance: self.settings.balance,
            bounds: &self.bounds,
            now,
        };
        let before = self.tables.borrow().clone();
        let (discoveries, own_port) = (&self.discoveries, self.settings.own_port);
        let query = |binding: &Binding| query_of(binding, discoveries, own_port);
        let Some(table) = before.next(&inputs, query) else { return false };
        self.report.table(&table);
        self.report_addresses(&table, listing);
        self.replaced.push(self.tables.send_replace(Arc::new(table)));
        self.build_times.observe(now.elapsed());
        true
    }
}

/// The query of a binding.
fn query_of(
    binding: &Binding,
    discoveries: &Discoveries,
    own_port: Port,
) -> Result<Query, CannotAsk> {
    match binding.descriptor.port == own_port {
        true => Err(CannotAsk::OwnPort(own_port)),
        false => discoveries.query(&binding.descriptor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::Part;

    /// A control task with the discovery at this URI. The publisher lists the consumers.
    fn control(uri: String) -> (Control, crate::source::Publisher<Listing>) {
        let nobody = crate::docker::Engine::parse("unix:///nonexistent", None).unwrap();
        let from = crate::discovery::Options {
            healthy_only: true,
            docker: nobody,
            consul: Default::default(),
            etcd: Default::default(),
        };
        let discoveries = Discoveries::parse(&[uri], &from).unwrap();
        let bell = Arc::<Notify>::default();
        let (publish, listing) = crate::source::Publisher::new(bell.clone());
        let settings = TableSettings {
            vips: Some(Vec::new()),
            own_port: Port::new(9999).unwrap(),
            capture: CaptureMode::Dnat,
            own: Vec::new(),
            strangers: false,
            balance: Balance::RoundRobin,
            empty_hold: Duration::from_secs(3600),
            listeners: Vec::new(),
            limits: Limits { bindings_per_consumer: 256, services: 4096 },
            resync: ResyncRequests::new(Duration::from_secs(3600)),
        };
        let readiness = crate::readiness::Readiness::default();
        let waiting = AwaitedParts {
            listing: readiness.wait_for(Part::Listing),
            answers: readiness.wait_for(Part::Discovery),
        };
        let report = Report::new(Arc::default(), Default::default());
        (Control::new(settings, discoveries, listing, bell, waiting, report), publish)
    }

    fn asking() -> Listing {
        crate::provider::fixed::listing("lo", &["redis;80".parse().unwrap()]).unwrap()
    }

    #[tokio::test]
    async fn a_table_is_freed_by_this_task_and_not_by_its_readers() {
        let (mut control, publish) = control("file:///nonexistent".to_owned());
        let reader = control.tables().borrow().clone();
        let table = Arc::downgrade(&reader);
        publish.publish(asking());
        let now = Instant::now();
        control.step(now);
        let wake = control.step(now + PATIENCE);
        assert_eq!(control.tables.borrow().version, 1);
        assert_eq!(wake, Some(now + PATIENCE + LOOK_AGAIN));
        drop(reader);
        assert_eq!(table.strong_count(), 1, "the last reader does not free it");
        let wake = control.step(now + PATIENCE + LOOK_AGAIN);
        assert_eq!((table.strong_count(), wake), (0, None));
    }

    /// The previous run knew the service's endpoints, and this run may end before the registry answers.
    #[tokio::test]
    async fn what_was_kept_of_a_service_that_is_waited_for_is_kept_on() {
        // It accepts connections and never answers.
        let registry = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("consul://{}", registry.local_addr().unwrap());
        let (mut control, publish) = control(uri);
        let query = control.discoveries.query(&"redis;80".parse().unwrap()).unwrap();
        let endpoint = crate::model::Endpoint("10.0.0.1:1".parse().unwrap());
        let now = Instant::now();
        let kept = crate::state::Kept {
            endpoints: Arc::new(Endpoints::new([endpoint], vec![])),
            confirmed: now,
            until: now + Duration::from_secs(3600),
        };
        let (keeper, snapshots) = watch::channel(None);
        let endpoints = [(query.clone(), kept)].into();
        control.remember(Restored { listing: None, endpoints }, keeper);
        publish.publish(asking());
        control.step(now);
        assert!(snapshots.borrow().is_none(), "there is no table yet");
        control.step(now + PATIENCE);
        let snapshot = snapshots.borrow().clone().unwrap();
        assert_eq!(snapshot.endpoints.get(&query).map(|kept| kept.list.len()), Some(1));
        assert_eq!(snapshot.confirmed.get(&query), Some(&now));
        let table = control.tables.borrow();
        assert!(table.upstreams().all(|upstream| !upstream.answered), "it is not used");
    }

    /// The process before this one has them, and serves meanwhile.
    #[tokio::test]
    async fn who_takes_over_waits_longer_for_endpoints() {
        let registry = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut control, publish) =
            control(format!("consul://{}", registry.local_addr().unwrap()));
        control.takes_over();
        publish.publish(asking());
        let now = Instant::now();
        assert_eq!(control.step(now), Some(now + PATIENCE_OF_SUCCESSOR));
        control.step(now + PATIENCE);
        assert_eq!(control.tables.borrow().version, 0);
        control.step(now + PATIENCE_OF_SUCCESSOR);
        assert_eq!(control.tables.borrow().version, 1);
    }

    /// The limits apply before everything else: queries, the table, and what is saved and shown.
    #[tokio::test]
    async fn what_is_beyond_a_limit_is_asked_of_nobody_and_not_kept() {
        let (mut control, publish) = control("consul://127.0.0.1:1".to_owned());
        control.limited = Limited::new(Limits { bindings_per_consumer: 2, services: 1 });
        let (keeper, snapshots) = watch::channel(None);
        control.remember(Restored { listing: None, endpoints: HashMap::new() }, keeper);
        let services = ["a;80", "b;81", "c;82"].map(|text| text.parse().unwrap());
        publish.publish(crate::provider::fixed::listing("lo", &services).unwrap());
        let now = Instant::now();
        control.step(now);
        control.step(now + PATIENCE);
        assert_eq!(control.demand.queries().map(|q| q.service.as_str()).collect::<Vec<_>>(), ["a"]);
        let shown = control.sources.borrow().listing.clone().unwrap();
        let beyond: Vec<_> = shown
            .beyond
            .iter()
            .map(|one| (one.limit.flag(), one.consumer.bindings.len()))
            .collect();
        assert_eq!(beyond, [("--max-bindings-per-consumer", 1), ("--max-services", 1)]);
        let kept = snapshots.borrow().clone().unwrap();
        assert_eq!(kept.listing.consumers[0].bindings.len(), 1);
        let table = control.tables.borrow().clone();
        assert!(table.routes().all(|route| route.key.port.get() == 80));
        let counted = control.report.refused().routes.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(counted, 2);
    }

    #[tokio::test]
    async fn the_queries_that_are_shown_are_those_that_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services.toml");
        std::fs::write(&file, "[[service]]\nname = \"redis\"\nendpoints = [\"10.0.0.1:1\"]\n")
            .unwrap();
        let (mut control, publish) = control(format!("file://{}", file.display()));
        // The discovery answers before the provider does.
        let answers = async {
            while !control.probes.is_empty() {
                control.step(Instant::now());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), answers).await.unwrap();
        let mut after = |consumers: &[&Listing]| {
            let all = consumers.iter().flat_map(|listing| &listing.consumers).cloned();
            publish.publish(Listing { consumers: all.collect(), ..Listing::default() });
            control.step(Instant::now());
            let shown = control.sources.borrow().queries.clone();
            let asked = control.watches.answers();
            let names = |all: &[(Query, Answers<Endpoints>)]| {
                all.iter().map(|(query, _)| query.to_string()).collect::<Vec<_>>()
            };
            assert_eq!(names(&shown), names(&asked));
            shown
        };
        let of = |text: &str| fixed::listing("lo", &[text.parse().unwrap()]).unwrap();
        let (one, same, other) = (of("redis;80"), of("redis;81"), of("web;80"));
        assert_eq!(after(&[]).len(), 0);
        let shown = after(&[&one]);
        assert_eq!(shown.len(), 1);
        assert!(Arc::ptr_eq(&shown, &after(&[&one, &same])), "nobody asks for anything else");
        assert_eq!(after(&[&one, &other]).len(), 2);
        assert_eq!(after(&[&other]).len(), 1);
    }

    /// A consumer with bindings restarts while the registry loses its data.
    #[tokio::test]
    async fn what_is_held_outlives_that_nobody_asks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services.toml");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("[[service]]\nname = \"redis\"\nendpoints = [\"10.0.0.1:1\"]\n");
        let (mut control, publish) = control(format!("file://{}", file.display()));
        let asking = asking();
        let nobody = Listing { consumers: Vec::new(), ..asking.clone() };

        async fn until(control: &mut Control, holds: impl Fn(&Control) -> bool) {
            let looking = async {
                loop {
                    control.step(Instant::now());
                    if holds(control) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), looking).await.unwrap();
        }
        let used = |control: &Control| {
            let table = control.tables.borrow();
            let used: Vec<_> = table.upstreams().map(|u| u.rotation.endpoints().len()).collect();
            used
        };
        let answered = |control: &Control, n: usize| {
            let mut known = control.known.values();
            known.any(|known| known.value.as_ref().is_some_and(|value| value.list.len() == n))
        };
        publish.publish(asking.clone());
        until(&mut control, |control| used(control) == [1]).await;
        publish.publish(nobody);
        until(&mut control, |control| used(control).is_empty()).await;
        write("[[service]]\nname = \"other\"\nendpoints = [\"10.0.0.2:1\"]\n");
        until(&mut control, |control| answered(control, 0)).await;
        publish.publish(asking);
        control.step(Instant::now());
        assert_eq!(used(&control), [1]);
    }
}
