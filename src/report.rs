//! Logs and counts problems once, when they appear. Reading a source again does not repeat them.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tracing::{info, warn};

use crate::{
    consumer::Consumer,
    discovery::{Endpoints, NotAllowed, Query, Rejections},
    events::{Event, Events},
    model::{Endpoint, Vip},
    provider::{Beyond, Limit, Listing, Problem},
    source::Known,
    table::{Table, Upstream},
};

/// Skipped items since the start, for the metrics.
#[derive(Debug, Default)]
pub struct Refused {
    /// Descriptors that do not parse, and consumers that cannot be identified.
    pub bindings: AtomicU64,
    /// Bindings that have no route.
    pub routes: AtomicU64,
    /// Discovery entries that do not parse.
    pub endpoints: AtomicU64,
}

/// The provider's name among the sources.
pub(crate) const PROVIDER: &str = "provider";

/// The problems that were logged and still exist.
#[derive(Debug)]
pub struct Report {
    refused: Arc<Refused>,
    pub(crate) events: Events,
    problems: BTreeSet<Problem>,
    unrouted: BTreeSet<String>,
    /// Skipped entries of an answer: their keys and reasons.
    rejected: HashMap<Query, Rejections>,
    /// Services with more endpoints than the limit.
    crowded: BTreeSet<Query>,
    /// Each exceeded limit with the consumer that exceeds it. A limit for all consumers appears only once.
    beyond: BTreeSet<(Limit, Arc<str>)>,
    /// The number of bindings that are beyond a limit.
    beyond_count: usize,
    /// Endpoints that must not be used, for each query.
    barred: HashMap<Query, Vec<(Endpoint, NotAllowed)>>,
    /// The endpoints in use, and whether they are held because the last answer has none, or few of them.
    used: HashMap<Query, (Arc<Endpoints>, bool)>,
    /// The problem of the last answer to each query.
    unwell: HashMap<Query, Arc<str>>,
    /// Sources that do not answer. `None`: the provider.
    lost: BTreeSet<Option<Query>>,
    /// Whether no address was captured at the last check.
    has_no_address: bool,
    /// Whether it was logged that connections of a consumer cannot arrive.
    is_elsewhere: bool,
}

impl Report {
    pub fn new(refused: Arc<Refused>, events: Events) -> Self {
        Self {
            refused,
            events,
            problems: BTreeSet::new(),
            unrouted: BTreeSet::new(),
            rejected: HashMap::new(),
            crowded: BTreeSet::new(),
            beyond: BTreeSet::new(),
            beyond_count: 0,
            barred: HashMap::new(),
            used: HashMap::new(),
            unwell: HashMap::new(),
            lost: BTreeSet::new(),
            has_no_address: false,
            is_elsewhere: false,
        }
    }

    #[cfg(test)]
    pub(crate) fn refused(&self) -> &Refused {
        &self.refused
    }

    /// Reports a source that does not answer, or answers again. `None`: the provider.
    pub(crate) fn source<T>(&mut self, of: Option<&Query>, known: &Known<T>) {
        let name = || of.map_or_else(|| PROVIDER.to_owned(), Query::to_string);
        if let Some(error) = &known.error {
            if self.lost.insert(of.cloned()) {
                self.events.report(|| Event::SourceLost { source: name(), error: error.clone() });
            }
        } else if known.value.is_some() && self.lost.remove(&of.cloned()) {
            self.events.report(|| Event::SourceBack { source: name() });
        }
    }

    /// Forgets a query that is no longer followed. Otherwise memory use would grow without bound.
    pub(crate) fn nobody_asks(&mut self, query: &Query) {
        self.lost.remove(&Some(query.clone()));
        self.rejected.remove(query);
        self.crowded.remove(query);
        self.barred.remove(query);
        self.used.remove(query);
        self.unwell.remove(query);
    }

    pub(crate) fn listing(&mut self, listing: &Listing) {
        let now: BTreeSet<_> = listing.problems.iter().cloned().collect();
        for problem in now.difference(&self.problems) {
            self.refused.bindings.fetch_add(1, Relaxed);
            warn!(consumer = %problem.consumer, origin = %problem.origin, reason = problem.reason, "binding skipped");
        }
        self.problems = now;
        self.beyond(&listing.beyond);
    }

    /// Logs what is not used because of a limit: once per consumer, and once for a limit that all consumers share.
    fn beyond(&mut self, beyond: &[Beyond]) {
        let mut now = BTreeSet::new();
        for Beyond { limit, most, consumer } in beyond {
            let bindings = consumer.bindings.len();
            let of = match limit {
                Limit::Bindings => consumer.name.clone(),
                Limit::Services => "".into(),
            };
            let of = (*limit, of);
            let is_known = self.beyond.contains(&of);
            if !now.insert(of) || is_known {
                continue;
            }
            match limit {
                Limit::Bindings => {
                    warn!(consumer = %consumer.name, id = %consumer.id, bindings, most, "consumer declares more bindings than --max-bindings-per-consumer; the rest get no route");
                }
                Limit::Services => {
                    warn!(
                        most,
                        "consumers ask for more services than --max-services; bindings of the rest get no route"
                    );
                }
            }
        }
        let count: usize = beyond.iter().map(|one| one.consumer.bindings.len()).sum();
        let new = count.saturating_sub(self.beyond_count);
        self.refused.routes.fetch_add(new as u64, Relaxed);
        (self.beyond, self.beyond_count) = (now, count);
    }

    /// `used`: the endpoints in use. After an empty answer these are the previous ones, for a while.
    pub(crate) fn endpoints(
        &mut self,
        query: &Query,
        known: &Known<Endpoints>,
        used: Option<&Arc<Endpoints>>,
    ) {
        let (Some(value), Some(now)) = (&known.value, used) else { return };
        let held = value.list.len() < now.list.len();
        let before = self.used.get(query);
        if before.is_none_or(|(before, was_held)| before.list != now.list || *was_held != held) {
            let endpoints = some(&now.list);
            self.events.report(|| Event::EndpointsChanged {
                query: query.clone().into(),
                endpoints: now.list.clone(),
            });
            if held && !value.list.is_empty() {
                warn!(service = %query, endpoints, answered = value.list.len(), "service lost most of its endpoints at once; they stay in use for --empty-hold");
            } else if held {
                warn!(service = %query, endpoints, "service has no endpoints; the last ones stay in use for --empty-hold");
            } else if now.list.is_empty() {
                warn!(service = %query, "service has no endpoints; connections are reset");
            } else {
                info!(service = %query, endpoints, "service endpoints changed");
            }
            self.used.insert(query.clone(), (now.clone(), held));
        }
        match &value.problem {
            Some(reason) if self.unwell.get(query) != Some(reason) => {
                warn!(service = %query, reason = %reason, "service has a problem in its registry");
                self.unwell.insert(query.clone(), reason.clone());
            }
            None if self.unwell.remove(query).is_some() => {
                info!(service = %query, "service has no problem in its registry any more");
            }
            _ => {}
        }
        self.rejected(query, &value.rejected);
        let left_out = value.left_out;
        if left_out == 0 {
            self.crowded.remove(query);
        } else if self.crowded.insert(query.clone()) {
            self.refused.endpoints.fetch_add(left_out as u64, Relaxed);
            let most = Endpoints::MOST;
            warn!(service = %query, most, left_out, "service has more endpoints than are used; the rest get no connections");
        }
    }

    fn rejected(&mut self, query: &Query, rejected: &Rejections) {
        let before = self.rejected.get(query);
        for entry in rejected.iter() {
            if before.is_none_or(|before| before.iter().all(|other| other != entry)) {
                let (entry, reason) = (&entry.what, &entry.reason);
                self.refused.endpoints.fetch_add(1, Relaxed);
                warn!(service = %query, entry, reason, "discovery entry skipped");
            }
        }
        let (more, were) = (rejected.more(), before.map_or(0, Rejections::more));
        self.refused.endpoints.fetch_add(more.saturating_sub(were) as u64, Relaxed);
        if more > 0 && were == 0 {
            warn!(service = %query, more, "further discovery entries skipped without a line each");
        }
        if rejected.count() == 0 {
            self.rejected.remove(query);
        } else {
            self.rejected.insert(query.clone(), rejected.clone());
        }
    }

    pub(crate) fn unrouted(&mut self, table: &Table) {
        let mut now = BTreeSet::new();
        for unrouted in table.unrouted() {
            let text = format!("{} {}: {}", unrouted.consumer, unrouted.origin, unrouted.reason);
            if !self.unrouted.contains(&text) {
                self.refused.routes.fetch_add(1, Relaxed);
                warn!(consumer = %unrouted.consumer_name, id = %unrouted.consumer, origin = %unrouted.origin, reason = %unrouted.reason, "binding has no route");
            }
            now.insert(text);
        }
        self.unrouted = now;
    }

    /// Logs the routes that were added and removed.
    pub(crate) fn table(&mut self, next: &Table) {
        self.unrouted(next);
        if next.version == 1 {
            info!(routes = next.routes().len(), vips = list(next.vips()), "initial routing table");
        }
        for route in &next.changes().added {
            info!(consumer = %route.consumer_name, id = %route.consumer, route = %route.key, service = %route.written_query(), "new route");
            self.events.report(|| Event::RouteAdded(route.clone()));
        }
        for route in &next.changes().removed {
            info!(consumer = %route.consumer_name, id = %route.consumer, route = %route.key, service = %route.written_query(), "route gone");
            self.events.report(|| Event::RouteRemoved(route.clone()));
        }
        next.changes().upstreams.iter().for_each(|upstream| self.barred(upstream));
    }

    /// `addresses` are the captured addresses. Connections of `astray` arrive at none of them.
    pub(crate) fn addresses(&mut self, addresses: &BTreeSet<IpAddr>, astray: Option<&Consumer>) {
        let had_none = std::mem::replace(&mut self.has_no_address, addresses.is_empty());
        if addresses.is_empty() {
            if !had_none {
                warn!("no VIP: nothing is captured; set one with --proxy-ip");
            }
        } else if let Some(consumer) = astray
            && !std::mem::replace(&mut self.is_elsewhere, true)
        {
            let vips: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
            warn!(consumer = %consumer.name, vips = vips.join(" "), "connections do not arrive here: no interface of this network namespace has the VIP; start embassy's container with --net=host, or correct --proxy-ip");
        }
    }
}

impl Report {
    /// Logs endpoints that must not be used, once each.
    fn barred(&mut self, upstream: &Upstream) {
        // Nearly always the case.
        if upstream.refused.is_empty() && self.barred.is_empty() {
            return;
        }
        let before = self.barred.get(&*upstream.query);
        if before.map_or(&[][..], Vec::as_slice) == upstream.refused {
            return;
        }
        // Sorted like the answer.
        let is_new = |one: &&(Endpoint, NotAllowed)| {
            before.is_none_or(|all| all.binary_search_by_key(&one.0, |(other, _)| *other).is_err())
        };
        for (endpoint, reason) in upstream.refused.iter().filter(is_new).take(NAMED) {
            warn!(service = %upstream.query, %endpoint, %reason, "endpoint refused");
        }
        let new = upstream.refused.iter().filter(is_new).count();
        self.refused.endpoints.fetch_add(new as u64, Relaxed);
        if upstream.refused.is_empty() {
            self.barred.remove(&*upstream.query);
        } else {
            self.barred.insert(Query::clone(&upstream.query), upstream.refused.clone());
        }
    }
}

/// Maximum number of endpoints of a service in one log line.
const NAMED: usize = 20;

/// The first endpoints of a list, and the number of the rest.
fn some(endpoints: &[Endpoint]) -> String {
    let mut named: Vec<_> = endpoints.iter().take(NAMED).map(ToString::to_string).collect();
    if let Some(more) = endpoints.len().checked_sub(NAMED).filter(|more| *more > 0) {
        named.push(format!("and {more} more"));
    }
    named.join(" ")
}

fn list(vips: &BTreeSet<Vip>) -> String {
    vips.iter().map(Vip::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ServiceName, Tags};

    #[test]
    fn sources_that_nobody_asks_any_more_are_forgotten() {
        let mut report = Report::new(Default::default(), Events::default());
        let lost = Known::<Endpoints> { error: Some("down".into()), ..Known::default() };
        let query = |n: usize| Query {
            via: "consul".into(),
            service: ServiceName::new(&format!("web-{n}")).unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        };
        report.source(None, &lost);
        for n in 0..100 {
            report.source(Some(&query(n)), &lost);
            if n > 0 {
                report.nobody_asks(&query(n - 1));
            }
        }
        assert_eq!(report.lost, BTreeSet::from([None, Some(query(99))]));
        // The same query. Another consumer wrote its tags in another order.
        let of = |tags: [&str; 2]| Query { tags: Tags::new(tags), ..query(0) };
        report.source(Some(&of(["b", "a"])), &lost);
        report.nobody_asks(&of(["a", "b"]));
        assert_eq!(report.lost.len(), 2);
    }
}
