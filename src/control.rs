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
    provider::{Listing, fixed},
    readiness::Guard,
    report::{PROVIDER, Report},
    source::{Answers, Known, ResyncRequests},
    state::{Restored, Snapshot},
    table::{Inputs, Route, Table},
};

mod hold;

use hold::EmptyHold;

/// What the table depends on besides the sources.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The VIPs that the user named. `None`: docker0's address, and the gateways of the consumers' bridge networks.
    pub vips: Option<Vec<Vip>>,
    /// Whether a container that is not known yet may wait for that: then the gateways of all bridge networks are VIPs, where
    /// the user named none, as it may be the first of its network.
    pub strangers: bool,
    /// For bindings that name no balance.
    pub balance: Balance,
    /// How long the last endpoints outlive a valid empty answer.
    pub empty_hold: Duration,
    pub resync: ResyncRequests,
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
    /// The VIPs that come with interfaces, as they were seen last.
    gateways: Vec<Vip>,
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
            watches: Watches::new(discoveries.clone(), settings.resync.clone(), bell.clone()),
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
            gateways: Vec::new(),
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
        // Of those that nobody asks for just now too: a consumer that restarts finds what was held for it.
        let followed = self.watches.followed();
        let (endpoints, wake) = self.hold.settle(&followed, now);
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
                let (mut endpoints, mut confirmed) = (endpoints, self.hold.confirmed(&followed));
                for (query, kept) in self.hold.awaited(&followed) {
                    confirmed.insert(query.clone(), kept.confirmed);
                    endpoints.insert(query, kept.endpoints.living());
                }
                let listing = listing.clone();
                keeper.send_replace(Some(Snapshot { listing, endpoints, confirmed }));
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

    /// The addresses of docker0, and of all bridges where strangers count; the last ones that were seen, where they cannot
    /// be asked now.
    fn gateways(&mut self, listing: &Listing) -> Vec<Vip> {
        let wanted = |name: &str| {
            name == "docker0" || (self.settings.strangers && listing.bridges.contains(name))
        };
        match fixed::addresses_of(wanted) {
            Ok(addresses) => self.gateways = addresses.into_iter().map(Vip).collect(),
            Err(error) => warn!(%error, "the VIPs stay as they were"),
        }
        self.gateways.clone()
    }

    fn publish(
        &mut self,
        listing: &Listing,
        consumers: &[&Arc<Consumer>],
        endpoints: &HashMap<Query, Arc<Endpoints>>,
    ) {
        let vips = self.settings.vips.clone().unwrap_or_else(|| self.gateways(listing));
        let inputs = Inputs {
            consumers,
            contested: &listing.contested,
            known: &listing.known,
            networks: &listing.networks,
            endpoints,
            vips: &vips,
            gateways_are_vips: self.settings.vips.is_none(),
            balance: self.settings.balance,
            now: Instant::now(),
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

    /// Whoever asks restarts while the registry loses its data.
    #[tokio::test]
    async fn what_is_held_outlives_that_nobody_asks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services.toml");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("[[service]]\nname = \"redis\"\nendpoints = [\"10.0.0.1:1\"]\n");
        let nobody = crate::docker::Engine::parse("unix:///nonexistent", None).unwrap();
        let from = crate::discovery::Settings {
            healthy_only: true,
            docker: nobody,
            consul: Default::default(),
            etcd: Default::default(),
        };
        let discoveries =
            Discoveries::parse(&[format!("file://{}", file.display())], &from).unwrap();
        let bell = Arc::<Notify>::default();
        let (publish, listing) = crate::source::Publisher::new(bell.clone());
        let settings = Settings {
            vips: Some(Vec::new()),
            strangers: false,
            balance: Balance::RoundRobin,
            empty_hold: Duration::from_secs(3600),
            resync: ResyncRequests::new(Duration::from_secs(3600)),
        };
        let readiness = crate::readiness::Readiness::default();
        let waiting =
            Waiting { listing: readiness.wait_for("a"), answers: readiness.wait_for("b") };
        let report = Report::new(Arc::default(), Default::default());
        let mut control =
            Control::new(settings, discoveries, listing, bell.clone(), waiting, report);
        let asking = fixed::listing("lo", &["redis;80".parse().unwrap()]).unwrap();
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
            let mut known = control.watches.followed().into_values();
            known.any(|known| known.value.is_some_and(|value| value.list.len() == n))
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
