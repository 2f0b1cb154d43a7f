//! The one task that knows everything: it asks for what the bindings name, and publishes a table for every change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::{
    descriptor::Balance,
    discovery::{Discoveries, Endpoints, Query, Watches},
    events::Event,
    model::{Consumer, Vip},
    provider::{
        Listing,
        fixed::{self, InterfaceError},
    },
    readiness::Guard,
    report::{PROVIDER, Report},
    source::{Answers, Known},
    state::{Restored, Snapshot},
    table::{Inputs, Route, Table},
};

/// What the table depends on besides the sources.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The VIPs that the user named. `None`: docker0's address, and the gateways of the consumers' bridge networks.
    pub vips: Option<Vec<Vip>>,
    /// For bindings that name no balance.
    pub balance: Balance,
    /// How long the last endpoints outlive a valid empty answer.
    pub empty_hold: Duration,
    pub resync: Duration,
}

/// What is being waited for before embassy is ready.
#[derive(Debug)]
pub struct Waiting {
    /// The provider's first full listing.
    pub listing: Guard,
    /// The first answer to every query of that listing.
    pub answers: Guard,
}

/// Where to find what the sources know, for the metrics.
#[derive(Debug, Clone)]
pub struct Sources {
    pub provider: Answers<Listing>,
    pub queries: Vec<(Query, Answers<Endpoints>)>,
    /// The listing that the table is made of: the provider's last, or one that an earlier run knew. `None` before any.
    pub listing: Option<Arc<Listing>>,
}

#[derive(Debug)]
pub struct Control {
    settings: Settings,
    discoveries: Discoveries,
    provider: Answers<Listing>,
    watches: Watches,
    bell: Arc<Notify>,
    hold: EmptyHold,
    /// What an earlier run knew of the consumers, until the provider answers.
    kept: Option<Arc<Listing>>,
    /// Who keeps the table for a later run.
    keeper: Option<watch::Sender<Option<Snapshot>>>,
    tables: watch::Sender<Arc<Table>>,
    sources: watch::Sender<Sources>,
    report: Report,
    waiting: (Option<Guard>, Option<Guard>),
    /// Until when the first table waits for the first answers.
    patience: Option<Instant>,
    /// docker0's addresses, as they were seen last.
    docker0: Vec<Vip>,
}

/// How long one service whose discovery says nothing may delay all others at the start.
const PATIENCE: Duration = Duration::from_secs(2);

impl Control {
    /// `bell` is the one that `provider` rings.
    pub fn new(
        settings: Settings,
        discoveries: Discoveries,
        provider: Answers<Listing>,
        bell: Arc<Notify>,
        waiting: Waiting,
        report: Report,
    ) -> Self {
        Self {
            watches: Watches::new(discoveries.clone(), settings.resync, bell.clone()),
            hold: EmptyHold::new(settings.empty_hold),
            kept: None,
            keeper: None,
            tables: watch::channel(Arc::default()).0,
            sources: watch::channel(Sources {
                provider: provider.clone(),
                queries: Vec::new(),
                listing: None,
            })
            .0,
            waiting: (Some(waiting.listing), Some(waiting.answers)),
            settings,
            discoveries,
            provider,
            bell,
            report,
            patience: None,
            docker0: Vec::new(),
        }
    }

    /// Takes over what an earlier run knew, and gives `keeper` what a later one should.
    pub fn remember(&mut self, restored: Restored, keeper: watch::Sender<Option<Snapshot>>) {
        self.hold.kept = restored.endpoints;
        self.kept = restored.listing;
        self.keeper = Some(keeper);
    }

    /// Rung by what should make this task look again.
    pub fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// The tables, as they are published. The first is empty, with version 0.
    pub fn tables(&self) -> watch::Receiver<Arc<Table>> {
        self.tables.subscribe()
    }

    /// Where to find what the sources know.
    pub fn sources(&self) -> watch::Receiver<Sources> {
        self.sources.subscribe()
    }

    /// Follows the sources for ever.
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

    /// Publishes what follows from what is known now. When to look again, if nothing else happens.
    fn step(&mut self, now: Instant) -> Option<Instant> {
        let provider = self.provider.borrow_and_update().clone();
        self.report.source(PROVIDER, &provider);
        let listed = provider.value.is_some();
        if listed {
            self.kept = None;
        }
        let kept = self.kept.clone().filter(|_| provider.error.is_some());
        let listing = provider.value.clone().or(kept)?;
        let consumers: Vec<_> = listing.consumers.iter().filter(|c| !c.has_ended()).collect();
        let bindings = consumers.iter().flat_map(|consumer| &consumer.bindings);
        let queries: BTreeSet<_> =
            bindings.filter_map(|b| self.discoveries.query(&b.descriptor).ok()).collect();
        self.watches.demand(&queries, now);
        let known = self.watches.known();
        self.report.asked(&known);
        for (query, known) in &known {
            self.report.source(&query.to_string(), known);
        }
        let (endpoints, wake) = self.hold.settle(&known, now);
        self.report.listing(&listing);
        self.report.endpoints(&known, &endpoints);
        // Before the first table nothing is captured: a moment's patience, and its routes have endpoints.
        let first = self.tables.borrow().version == 0;
        let unasked = known.values().any(|known| known.value.is_none() && known.error.is_none());
        let patience = *self.patience.get_or_insert(now + PATIENCE);
        let wake = if first && unasked && now < patience {
            Some(wake.map_or(patience, |wake| wake.min(patience)))
        } else {
            self.publish(&listing, &consumers, &endpoints);
            if listed && let Some(listing) = self.waiting.0.take() {
                listing.done();
            }
            if let Some(keeper) = &self.keeper {
                keeper.send_replace(Some(Snapshot { listing: listing.clone(), endpoints }));
            }
            if !unasked
                && each_discovery_answers(&known)
                && let Some(answers) = self.waiting.1.take()
            {
                answers.done();
            }
            wake
        };
        let (provider, queries) = (self.provider.clone(), self.watches.answers());
        self.sources.send_replace(Sources { provider, queries, listing: Some(listing.clone()) });
        wake
    }

    /// docker0's addresses; the last ones that were seen, where they cannot be asked now.
    fn docker0(&mut self) -> Vec<Vip> {
        match fixed::addresses("docker0") {
            Ok(addresses) => self.docker0 = addresses.into_iter().map(Vip).collect(),
            Err(InterfaceError::Missing { .. }) => self.docker0 = Vec::new(),
            Err(error @ InterfaceError::List(_)) => warn!(%error, "the VIPs stay as they were"),
        }
        self.docker0.clone()
    }

    fn publish(
        &mut self,
        listing: &Listing,
        consumers: &[&Consumer],
        endpoints: &HashMap<Query, Arc<Endpoints>>,
    ) {
        let vips = self.settings.vips.clone().unwrap_or_else(|| self.docker0());
        let inputs = Inputs {
            consumers,
            contested: &listing.contested,
            known: &listing.known,
            networks: &listing.networks,
            endpoints,
            vips: &vips,
            gateways_are_vips: self.settings.vips.is_none(),
            balance: self.settings.balance,
        };
        let before = self.tables.borrow().clone();
        let Some(table) =
            before.next(&inputs, |binding| self.discoveries.query(&binding.descriptor))
        else {
            return;
        };
        self.report.table(&before, &table);
        self.tables.send_replace(Arc::new(table));
    }
}

/// Whether each discovery that is asked has answered something: one query that it refuses for ever is no discovery that is
/// down.
fn each_discovery_answers(known: &BTreeMap<Query, Known<Endpoints>>) -> bool {
    let answering: BTreeSet<_> = known
        .iter()
        .filter(|(_, known)| known.value.is_some())
        .map(|(query, _)| &query.via)
        .collect();
    known.keys().all(|query| answering.contains(&query.via))
}

/// Keeps the last endpoints of a service for a while after discovery says, validly, that there are none: a registry that
/// lost its data and is being filled again says so too.
#[derive(Debug)]
struct EmptyHold {
    hold: Duration,
    held: HashMap<Query, Arc<Endpoints>>,
    /// What an earlier run knew, of those that have not answered since.
    kept: HashMap<Query, Arc<Endpoints>>,
    empty_since: HashMap<Query, Instant>,
}

impl EmptyHold {
    fn new(hold: Duration) -> Self {
        Self { hold, held: HashMap::new(), kept: HashMap::new(), empty_since: HashMap::new() }
    }

    /// The endpoints to use now, and when that ends without any other change.
    fn settle<'a>(
        &mut self,
        known: impl IntoIterator<Item = (&'a Query, &'a Known<Endpoints>)>,
        now: Instant,
    ) -> (HashMap<Query, Arc<Endpoints>>, Option<Instant>) {
        let mut settled = HashMap::new();
        let mut wake: Option<Instant> = None;
        for (query, known) in known {
            let Some(value) = &known.value else {
                settled.extend(self.kept.get(query).map(|kept| (query.clone(), kept.clone())));
                continue;
            };
            let kept = self.kept.remove(query);
            // Since when, not since the last change: what is rejected may go on changing in a list of nothing.
            let end = value.list.is_empty().then(|| {
                let since = known.changed.unwrap_or(now);
                *self.empty_since.entry(query.clone()).or_insert(since) + self.hold
            });
            if end.is_none() {
                self.empty_since.remove(query);
            }
            let held = self.held.get(query).or(kept.as_ref()).filter(|held| !held.list.is_empty());
            let endpoints = match held.zip(end.filter(|end| now < *end)) {
                Some((held, end)) => {
                    wake = Some(wake.map_or(end, |wake| wake.min(end)));
                    held
                }
                None => value,
            };
            settled.insert(query.clone(), endpoints.clone());
        }
        self.empty_since.retain(|query, _| settled.contains_key(query));
        self.held.clone_from(&settled);
        (settled, wake)
    }
}

impl Report {
    /// Says in the log what `next` has that `before` had not, and the other way round.
    fn table(&mut self, before: &Table, next: &Table) {
        self.unrouted(next);
        if before.version == 0 {
            info!(routes = next.routes().len(), vips = list(next.vips()), "the first table");
        }
        for route in missing(next, before) {
            info!(consumer = %route.consumer_name, id = %route.consumer, route = %route.key, service = %route.upstream.query, "new route");
            self.events.report(|| Event::RouteAdded {
                consumer: route.consumer_name.to_string(),
                consumer_id: route.consumer.full().to_owned(),
                address: route.key.source.to_string(),
                port: route.key.port.get(),
                service: route.upstream.query.service.to_string(),
                query: route.upstream.query.to_string(),
            });
        }
        for route in missing(before, next) {
            info!(consumer = %route.consumer_name, id = %route.consumer, route = %route.key, service = %route.upstream.query, "route gone");
            self.events.report(|| Event::RouteRemoved {
                consumer: route.consumer_name.to_string(),
                consumer_id: route.consumer.full().to_owned(),
                address: route.key.source.to_string(),
                port: route.key.port.get(),
                service: route.upstream.query.service.to_string(),
                query: route.upstream.query.to_string(),
            });
        }
        if next.vips().is_empty() && next.routes().len() > 0 {
            warn!("no VIP: nothing is captured; name one with --proxy-ip");
        }
    }
}

/// The routes of one table that the other has not, in order.
fn missing<'a>(of: &'a Table, from: &Table) -> Vec<&'a Arc<Route>> {
    let mut routes: Vec<_> = of.routes().filter(|route| !from.has(route)).collect();
    routes.sort_by_key(|route| route.key);
    routes
}

fn list(vips: &BTreeSet<Vip>) -> String {
    vips.iter().map(Vip::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, ServiceName};

    fn query() -> Query {
        Query {
            via: "consul".into(),
            service: ServiceName::new("redis").unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        }
    }

    fn known(endpoints: &[&str], changed: Instant) -> Known<Endpoints> {
        let list = endpoints.iter().map(|e| Endpoint(e.parse().unwrap()));
        let value = Some(Arc::new(Endpoints::new(list, vec![])));
        Known { value, changed: Some(changed), ..Known::default() }
    }

    #[test]
    fn a_valid_empty_answer_takes_effect_after_the_hold_and_a_new_one_at_once() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut hold = EmptyHold::new(Duration::from_secs(30));
        let mut settle = |known: &Known<Endpoints>, now| {
            let (settled, wake) = hold.settle([(&query(), known)], now);
            (settled.get(&query()).map(|endpoints| endpoints.list.len()), wake)
        };
        assert_eq!(settle(&Known::default(), start), (None, None));
        assert_eq!(settle(&known(&["10.0.0.1:1", "10.0.0.2:1"], start), start), (Some(2), None));
        let empty = known(&[], second(10));
        assert_eq!(settle(&empty, second(10)), (Some(2), Some(second(40))));
        assert_eq!(settle(&empty, second(39)), (Some(2), Some(second(40))));
        // Another answer that is as empty does not start the time anew.
        assert_eq!(settle(&known(&[], second(39)), second(39)), (Some(2), Some(second(40))));
        assert_eq!(settle(&empty, second(40)), (Some(0), None));
        assert_eq!(settle(&known(&["10.0.0.3:1"], second(50)), second(50)), (Some(1), None));
        assert_eq!(settle(&known(&["10.0.0.3:1"], second(50)), second(50)), (Some(1), None));
    }

    #[test]
    fn what_an_earlier_run_knew_is_used_until_the_answer_and_held_where_that_is_empty() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let kept = known(&["10.0.0.1:1", "10.0.0.2:1"], start).value.unwrap();
        let mut hold = EmptyHold::new(Duration::from_secs(30));
        hold.kept.insert(query(), kept);
        let mut settle = |known: &Known<Endpoints>, now| {
            let (settled, wake) = hold.settle([(&query(), known)], now);
            (settled.get(&query()).map(|endpoints| endpoints.list.len()), wake)
        };
        assert_eq!(settle(&Known::default(), start), (Some(2), None));
        assert_eq!(settle(&Known::default(), second(1000)), (Some(2), None));
        let empty = known(&[], second(1000));
        assert_eq!(settle(&empty, second(1000)), (Some(2), Some(second(1030))));
        assert_eq!(settle(&empty, second(1030)), (Some(0), None));
        assert_eq!(settle(&Known::default(), second(1031)), (None, None), "it is used no more");
    }

    #[test]
    fn without_a_hold_empty_is_empty() {
        let start = Instant::now();
        let mut hold = EmptyHold::new(Duration::ZERO);
        hold.settle([(&query(), &known(&["10.0.0.1:1"], start))], start);
        let (settled, wake) = hold.settle([(&query(), &known(&[], start))], start);
        assert_eq!((settled[&query()].list.len(), wake), (0, None));
    }
}
