//! What a person should hear of, said once when it appears and counted: the same complaint is not repeated at every
//! re-read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tracing::{info, warn};

use crate::{
    discovery::{Endpoints, Query},
    events::{Event, Events},
    provider::{Listing, Problem},
    source::Known,
    table::Table,
};

/// Things that were refused since the start, for the metrics.
#[derive(Debug, Default)]
pub struct Refused {
    /// Descriptors, and consumers that cannot be told apart.
    pub bindings: AtomicU64,
    /// Bindings that have no route.
    pub routes: AtomicU64,
    /// Entries of a discovery that could not be understood.
    pub endpoints: AtomicU64,
}

/// The provider's name among the sources.
pub(crate) const PROVIDER: &str = "provider";

/// What has been said and still holds.
#[derive(Debug)]
pub struct Report {
    refused: Arc<Refused>,
    pub(crate) events: Events,
    problems: BTreeSet<Problem>,
    unrouted: BTreeSet<String>,
    rejected: BTreeSet<(Query, String)>,
    /// The endpoints in use, and whether discovery has none any more.
    used: BTreeMap<Query, (Arc<Endpoints>, bool)>,
    /// Sources that do not answer.
    lost: BTreeSet<String>,
}

impl Report {
    pub fn new(refused: Arc<Refused>, events: Events) -> Self {
        Self {
            refused,
            events,
            problems: BTreeSet::new(),
            unrouted: BTreeSet::new(),
            rejected: BTreeSet::new(),
            used: BTreeMap::new(),
            lost: BTreeSet::new(),
        }
    }

    /// A source that answers again.
    pub(crate) fn source<T>(&mut self, name: &str, known: &Known<T>) {
        if let Some(error) = &known.error {
            if self.lost.insert(name.to_owned()) {
                self.events.report(|| Event::SourceLost {
                    source: name.to_owned(),
                    error: error.to_string(),
                });
            }
        } else if known.value.is_some() && self.lost.remove(name) {
            info!(source = name, "back");
            self.events.report(|| Event::SourceBack { source: name.to_owned() });
        }
    }

    /// Forgets the sources that nobody asks any more: of those there is no end.
    pub(crate) fn asked(&mut self, known: &BTreeMap<Query, Known<Endpoints>>) {
        if self.lost.len() > 1 {
            let asked: BTreeSet<_> = known.keys().map(ToString::to_string).collect();
            self.lost.retain(|name| name == PROVIDER || asked.contains(name));
        }
    }

    pub(crate) fn listing(&mut self, listing: &Listing) {
        let now: BTreeSet<_> = listing.problems.iter().cloned().collect();
        for problem in now.difference(&self.problems) {
            self.refused.bindings.fetch_add(1, Relaxed);
            warn!(consumer = %problem.consumer, origin = %problem.origin, reason = problem.reason, "skipped");
        }
        self.problems = now;
    }

    /// `settled` are the endpoints in use: where discovery has none any more, the last ones for a while.
    pub(crate) fn endpoints(
        &mut self,
        known: &BTreeMap<Query, Known<Endpoints>>,
        settled: &HashMap<Query, Arc<Endpoints>>,
    ) {
        let mut rejected = BTreeSet::new();
        let mut used = BTreeMap::new();
        for (query, known) in known {
            let (Some(value), Some(now)) = (&known.value, settled.get(query)) else { continue };
            let held = value.list.is_empty() && !now.list.is_empty();
            let before = self.used.get(query);
            if before.is_none_or(|(before, was_held)| before.list != now.list || *was_held != held)
            {
                let list: Vec<_> = now.list.iter().map(ToString::to_string).collect();
                let endpoints = list.join(" ");
                self.events.report(|| Event::EndpointsChanged {
                    service: query.service.to_string(),
                    query: query.to_string(),
                    endpoints: list.clone(),
                });
                if held {
                    warn!(service = %query, endpoints, "no endpoints any more; the last ones stay in use for --empty-hold");
                } else if list.is_empty() {
                    warn!(service = %query, "no endpoints; connections are reset");
                } else {
                    info!(service = %query, endpoints, "endpoints");
                }
            }
            for entry in &value.rejected {
                let text = format!("{}: {}", entry.what, entry.reason);
                if !self.rejected.contains(&(query.clone(), text.clone())) {
                    self.refused.endpoints.fetch_add(1, Relaxed);
                    warn!(service = %query, entry = entry.what, reason = entry.reason, "entry skipped");
                }
                rejected.insert((query.clone(), text));
            }
            used.insert(query.clone(), (now.clone(), held));
        }
        self.rejected = rejected;
        self.used = used;
    }

    pub(crate) fn unrouted(&mut self, table: &Table) {
        let mut now = BTreeSet::new();
        for unrouted in table.unrouted() {
            let text = format!("{} {}: {}", unrouted.consumer, unrouted.origin, unrouted.reason);
            if !self.unrouted.contains(&text) {
                self.refused.routes.fetch_add(1, Relaxed);
                warn!(consumer = %unrouted.consumer_name, id = %unrouted.consumer, origin = %unrouted.origin, reason = %unrouted.reason, "no route");
            }
            now.insert(text);
        }
        self.unrouted = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ServiceName;

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
        report.source(PROVIDER, &lost);
        for n in 0..100 {
            let asked = [(query(n), lost.clone())].into();
            report.source(&query(n).to_string(), &lost);
            report.asked(&asked);
        }
        let left: Vec<_> = report.lost.iter().map(String::as_str).collect();
        assert_eq!(left, ["consul web-99", PROVIDER]);
    }
}
