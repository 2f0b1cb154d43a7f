//! Counts the bindings of each query: a query is followed as long as a binding needs it.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use crate::{
    consumer::{Binding, Consumer},
    discovery::Query,
    identity::follow,
};

/// The queries that are needed now.
#[derive(Debug, Default)]
pub(super) struct Demand {
    consumers: Vec<Arc<Consumer>>,
    /// The number of bindings of each query.
    asked: HashMap<Query, usize>,
}

/// Queries that are needed now, and those that are no longer needed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DemandChange {
    pub new: Vec<Query>,
    pub gone: Vec<Query>,
}

impl Demand {
    pub(super) fn asks(&self, query: &Query) -> bool {
        self.asked.contains_key(query)
    }

    pub(super) fn queries(&self) -> impl ExactSizeIterator<Item = &Query> {
        self.asked.keys()
    }

    /// Sets the current consumers. `query` returns the query of a binding, if it has one. Equal bindings must have equal
    /// queries.
    pub(super) fn update(
        &mut self,
        consumers: &[&Arc<Consumer>],
        query: impl Fn(&Binding) -> Option<Query>,
    ) -> DemandChange {
        let (gone, new) = follow(&mut self.consumers, consumers);
        if gone.is_empty() && new.is_empty() {
            return DemandChange::default();
        }
        let queries = |consumers: &[Arc<Consumer>]| {
            let bindings = consumers.iter().flat_map(|consumer| &consumer.bindings);
            bindings.filter_map(&query).collect::<Vec<_>>()
        };
        let mut change = DemandChange::default();
        for query in queries(&new) {
            match self.asked.entry(query) {
                Entry::Occupied(mut count) => *count.get_mut() += 1,
                Entry::Vacant(vacant) => {
                    change.new.push(vacant.key().clone());
                    vacant.insert(1);
                }
            }
        }
        // New ones first, so that a query that moves from one binding to another is always needed.
        for query in queries(&gone) {
            if let Entry::Occupied(mut count) = self.asked.entry(query) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    change.gone.push(count.remove_entry().0);
                }
            }
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ConsumerId, ServiceName};

    fn consumer(services: &[&str]) -> Arc<Consumer> {
        let binding = |service: &&str| Binding {
            origin: "B".into(),
            descriptor: format!("{service};80").parse().unwrap(),
        };
        Arc::new(Consumer {
            id: ConsumerId::Local,
            name: "a".into(),
            namespace: "a".into(),
            sources: vec![],
            arrivals: Vec::new(),
            gateways: vec![],
            bindings: services.iter().map(binding).collect(),
            ends: vec![],
        })
    }

    fn query(service: &str) -> Query {
        Query {
            via: "consul".into(),
            service: ServiceName::new(service).unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        }
    }

    #[test]
    fn a_query_is_asked_for_as_long_as_any_binding_names_it() {
        let mut demand = Demand::default();
        let mut update = |consumers: &[&Arc<Consumer>]| {
            let change = demand.update(consumers, |binding| {
                let service = binding.descriptor.service.as_str();
                (service != "nowhere").then(|| query(service))
            });
            let names = |queries: Vec<Query>| {
                let mut names: Vec<_> = queries.iter().map(|q| q.service.to_string()).collect();
                names.sort();
                names
            };
            (names(change.new), names(change.gone))
        };
        let texts =
            |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (one, two) = (consumer(&["web", "db", "nowhere"]), consumer(&["web"]));
        assert_eq!(update(&[&one]), (texts(&["db", "web"]), vec![]));
        assert_eq!(update(&[&two, &one]), (vec![], vec![]));
        assert_eq!(update(&[&two]), (vec![], texts(&["db"])));
        // A restart: another consumer with the same binding.
        assert_eq!(update(&[&consumer(&["web"])]), (vec![], vec![]));
        assert_eq!(update(&[]), (vec![], texts(&["web"])));
    }
}
