//! The limits for what consumers may ask for. Pure: takes a listing, returns the part that is used and what is beyond the
//! limits.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use crate::{
    consumer::{Binding, Consumer},
    discovery::Query,
    identity::follow,
    model::ConsumerId,
    provider::{Beyond, Limit, Listing},
};

/// The limits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of bindings of one consumer. The first ones by port are used; with the static provider, the first
    /// ones in the given order.
    pub bindings_per_consumer: usize,
    /// Maximum number of different services of this host, each with its tags and datacentre. Those that were asked for
    /// first are used.
    pub services: usize,
}

/// Applies the limits to one listing after another. A binding that is used stays in use, whatever comes later.
#[derive(Debug)]
pub(super) struct Limited {
    limits: Limits,
    /// The consumers of the last listing, as given.
    consumers: Vec<Arc<Consumer>>,
    /// The number of used bindings for each query.
    asked: HashMap<Query, usize>,
    /// The consumers of which only a part is used.
    cut: BTreeMap<ConsumerId, LimitedConsumer>,
}

/// A consumer of which only a part is used.
#[derive(Debug)]
struct LimitedConsumer {
    whole: Arc<Consumer>,
    used: Arc<Consumer>,
    beyond: Vec<Beyond>,
}

impl Limited {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, consumers: Vec::new(), asked: HashMap::new(), cut: BTreeMap::new() }
    }

    /// The part of a listing that is used. The same value if all of it is used. `query` returns the query of a binding, if
    /// it has one.
    ///
    /// The cost depends on the consumers that were added or removed, and on those that are only partly used.
    pub(super) fn of(
        &mut self,
        listing: &Arc<Listing>,
        query: impl Fn(&Binding) -> Option<Query>,
    ) -> Arc<Listing> {
        let now: Vec<_> = listing.consumers.iter().collect();
        let (gone, new) = follow(&mut self.consumers, &now);
        if !gone.is_empty() || !new.is_empty() {
            self.change(gone, new, query);
        }
        if self.cut.is_empty() {
            return listing.clone();
        }
        let used = |consumer: &Arc<Consumer>| match self.cut.get(&consumer.id) {
            Some(cut) => cut.used.clone(),
            None => consumer.clone(),
        };
        Arc::new(Listing {
            consumers: listing.consumers.iter().map(used).collect(),
            beyond: self.cut.values().flat_map(|cut| &cut.beyond).cloned().collect(),
            ..Listing::clone(listing)
        })
    }

    fn change(
        &mut self,
        gone: Vec<Arc<Consumer>>,
        new: Vec<Arc<Consumer>>,
        query: impl Fn(&Binding) -> Option<Query>,
    ) {
        let had: HashMap<_, _> =
            gone.into_iter().map(|one| (one.id.clone(), self.release(&one, &query))).collect();
        // A changed consumer of the same run keeps what it had, before others get anything.
        let (going_on, mut others): (Vec<_>, Vec<_>) =
            new.into_iter().partition(|one| had.contains_key(&one.id));
        let going_on: Vec<_> = going_on
            .into_iter()
            .map(|consumer| {
                let had = had.get(&consumer.id);
                let kept = consumer.bindings.iter().take(self.limits.bindings_per_consumer);
                let kept = kept.filter_map(&query);
                let kept: Vec<_> =
                    kept.filter(|one| had.is_some_and(|had| had.contains(one))).collect();
                kept.iter().for_each(|one| self.add(one.clone()));
                (consumer, kept)
            })
            .collect();
        for (consumer, kept) in going_on {
            kept.iter().for_each(|one| self.take(one));
            self.admit(consumer, &kept.into_iter().collect(), &query);
        }
        // Then the consumers that wait for services, then the new ones. In both groups, those that started earlier come
        // first.
        let waits =
            |cut: &&LimitedConsumer| cut.beyond.iter().any(|one| one.limit == Limit::Services);
        let mut waiting: Vec<_> =
            self.cut.values().filter(waits).map(|cut| cut.whole.clone()).collect();
        waiting.sort_by(|a, b| key(a).cmp(&key(b)));
        for consumer in waiting {
            let before = self.cut.get(&consumer.id).map(|cut| cut.used.clone());
            let had = self.release(&consumer, &query);
            self.admit(consumer.clone(), &had, &query);
            // An unchanged consumer stays the same value, so that nothing is rebuilt from it.
            if let (Some(cut), Some(before)) = (self.cut.get_mut(&consumer.id), before)
                && cut.used.bindings == before.bindings
            {
                cut.used = before;
            }
        }
        others.sort_by(|a, b| key(a).cmp(&key(b)));
        for consumer in others {
            self.admit(consumer, &HashSet::new(), &query);
        }
    }

    fn add(&mut self, query: Query) {
        *self.asked.entry(query).or_default() += 1;
    }

    fn take(&mut self, query: &Query) {
        if let Some(count) = self.asked.get_mut(query) {
            *count -= 1;
            if *count == 0 {
                self.asked.remove(query);
            }
        }
    }

    /// Releases what a consumer uses. Returns the queries that it used.
    fn release(
        &mut self,
        consumer: &Arc<Consumer>,
        query: impl Fn(&Binding) -> Option<Query>,
    ) -> HashSet<Query> {
        let cut = self.cut.remove(&consumer.id);
        let used = cut.as_ref().map_or(consumer, |cut| &cut.used);
        let used: Vec<_> = used.bindings.iter().filter_map(query).collect();
        used.iter().for_each(|one| self.take(one));
        used.into_iter().collect()
    }

    /// Uses as much of a consumer as the limits allow. The queries that it `had` come first.
    fn admit(
        &mut self,
        whole: Arc<Consumer>,
        had: &HashSet<Query>,
        query: impl Fn(&Binding) -> Option<Query>,
    ) {
        let Limits { bindings_per_consumer, services } = self.limits;
        let (first, rest) = match whole.bindings.split_at_checked(bindings_per_consumer) {
            Some(both) => both,
            None => (&whole.bindings[..], &[][..]),
        };
        let first: Vec<_> = first.iter().map(|binding| (binding, query(binding))).collect();
        let is_its =
            |query: &Option<Query>| query.as_ref().is_some_and(|query| had.contains(query));
        let reserved: HashSet<_> = first
            .iter()
            .filter(|(_, query)| is_its(query))
            .filter_map(|(_, q)| q.clone())
            .collect();
        reserved.iter().for_each(|one| self.add(one.clone()));
        let (mut used, mut beyond) = (Vec::new(), Vec::new());
        for (binding, query) in first {
            match query {
                Some(query) if self.asked.contains_key(&query) || self.asked.len() < services => {
                    self.add(query);
                    used.push(binding);
                }
                Some(_) => beyond.push(binding),
                // Such a binding has no route and needs no watch.
                None => used.push(binding),
            }
        }
        reserved.iter().for_each(|one| self.take(one));
        if used.len() == whole.bindings.len() {
            return;
        }
        let with = |bindings: &[&Binding]| {
            let bindings = bindings.iter().map(|&binding| binding.clone()).collect();
            Arc::new(Consumer { bindings, ..Consumer::clone(&whole) })
        };
        let rest: Vec<_> = rest.iter().collect();
        let all =
            [(Limit::Bindings, bindings_per_consumer, &rest), (Limit::Services, services, &beyond)];
        let beyond = all.into_iter().filter(|(.., bindings)| !bindings.is_empty());
        let beyond = beyond
            .map(|(limit, most, bindings)| Beyond { limit, most, consumer: with(bindings) })
            .collect();
        let cut = LimitedConsumer { used: with(&used), beyond, whole: whole.clone() };
        self.cut.insert(whole.id.clone(), cut);
    }
}

/// Orders consumers by the start of their run.
fn key(consumer: &Consumer) -> (&str, &ConsumerId) {
    match &consumer.id {
        ConsumerId::Container { started_at, .. } => (started_at, &consumer.id),
        ConsumerId::Local => ("", &consumer.id),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{ContainerId, ServiceName};

    fn consumer(name: &str, services: &[String]) -> Arc<Consumer> {
        let binding = |(n, service): (usize, &String)| Binding {
            origin: format!("B{n}").into(),
            descriptor: format!("{service};{}", n + 1).parse().unwrap(),
        };
        let id = ConsumerId::Container { id: ContainerId::new(name), started_at: name.into() };
        Arc::new(Consumer {
            id,
            name: name.into(),
            namespace: name.into(),
            sources: vec![],
            arrivals: vec![],
            gateways: vec![],
            bindings: services.iter().enumerate().map(binding).collect(),
            ends: vec![],
        })
    }

    fn query(binding: &Binding) -> Option<Query> {
        let service = binding.descriptor.service.as_str();
        (service != "nowhere").then(|| Query {
            via: "consul".into(),
            service: ServiceName::new(service).unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        })
    }

    fn limited(bindings_per_consumer: usize, services: usize) -> Limited {
        Limited::new(Limits { bindings_per_consumer, services })
    }

    fn listing(consumers: &[&Arc<Consumer>]) -> Arc<Listing> {
        let consumers = consumers.iter().map(|&one| one.clone()).collect();
        Arc::new(Listing { consumers, ..Listing::default() })
    }

    fn of(limited: &mut Limited, consumers: &[&Arc<Consumer>]) -> Vec<String> {
        let listing = limited.of(&listing(consumers), query);
        let all = |consumer: &Arc<Consumer>| {
            let services = consumer.bindings.iter().map(|one| one.descriptor.service.to_string());
            format!("{}: {}", consumer.name, services.collect::<Vec<_>>().join(" "))
        };
        let beyond =
            listing.beyond.iter().map(|one| format!("{} {}", one.limit, all(&one.consumer)));
        listing.consumers.iter().map(all).chain(beyond).collect()
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn what_is_within_the_limits_is_the_very_same_listing() {
        let mut limited = limited(2, 2);
        let listing =
            listing(&[&consumer("a", &texts(&["x", "y"])), &consumer("b", &texts(&["x"]))]);
        assert!(Arc::ptr_eq(&limited.of(&listing, query), &listing));
    }

    #[test]
    fn of_one_consumer_the_first_bindings_are_used_and_of_the_others_all() {
        let mut limited = limited(2, 100);
        let greedy = consumer("a", &(0..1000).map(|n| format!("s{n}")).collect::<Vec<_>>());
        let other = consumer("b", &texts(&["x", "y"]));
        let listing = limited.of(&listing(&[&greedy, &other]), query);
        assert_eq!(listing.consumers[0].bindings[..], greedy.bindings[..2]);
        assert!(Arc::ptr_eq(&listing.consumers[1], &other));
        let [Beyond { limit: Limit::Bindings, most: 2, consumer }] = &listing.beyond[..] else {
            panic!("{:?}", listing.beyond)
        };
        assert_eq!(consumer.bindings[..], greedy.bindings[2..]);
        // Changes of other consumers neither take anything from it nor give it more.
        let again = limited.of(&self::listing(&[&greedy]), query);
        assert!(Arc::ptr_eq(&again.consumers[0], &listing.consumers[0]));
    }

    #[test]
    fn a_service_that_is_used_is_not_given_up_for_another_and_room_is_given_to_who_waits() {
        let mut limited = limited(256, 2);
        let first = consumer("2", &texts(&["x", "nowhere"]));
        assert_eq!(of(&mut limited, &[&first]), ["2: x nowhere"]);
        // A consumer that was listed later and started earlier gets what is left.
        let greedy = consumer("1", &texts(&["y", "z", "x"]));
        let after = ["1: y x", "2: x nowhere", "services 1: z"];
        assert_eq!(of(&mut limited, &[&greedy, &first]), after);
        let third = consumer("3", &texts(&["v", "y"]));
        let after = ["1: y x", "2: x nowhere", "3: y", "services 1: z", "services 3: v"];
        assert_eq!(of(&mut limited, &[&greedy, &first, &third]), after);
        // The same run with another name.
        let moved = Arc::new(Consumer { name: "moved".into(), ..Consumer::clone(&greedy) });
        let after = ["moved: y x", "2: x nowhere", "3: y", "services moved: z", "services 3: v"];
        assert_eq!(of(&mut limited, &[&moved, &first, &third]), after);
        // No other consumer asks for x and y any more: the one that waits longest comes first.
        assert_eq!(of(&mut limited, &[&third]), ["3: v y"]);
        assert!(limited.cut.is_empty());
    }

    proptest! {
        /// However consumers come and go, the limits hold, no binding is lost, used bindings stay in use, and free room is
        /// used.
        #[test]
        fn the_limits_hold(steps in prop::collection::vec(
            prop::collection::btree_map(0..6usize, prop::collection::vec(0..8usize, 0..5), 0..6), 1..8))
        {
            let mut limited = limited(3, 4);
            let mut known: HashMap<(usize, Vec<usize>), Arc<Consumer>> = HashMap::new();
            let mut before: Option<Arc<Listing>> = None;
            for step in steps {
                let all: Vec<_> = step.iter().map(|(name, services)| {
                    let texts: Vec<_> = services.iter().map(|n| format!("s{n}")).collect();
                    let make = || consumer(&format!("{name}-{services:?}"), &texts);
                    known.entry((*name, services.clone())).or_insert_with(make).clone()
                }).collect();
                let given = listing(&all.iter().collect::<Vec<_>>());
                let now = limited.of(&given, query);
                let used: HashSet<_> =
                    now.consumers.iter().flat_map(|one| &one.bindings).filter_map(query).collect();
                prop_assert!(used.len() <= 4);
                prop_assert_eq!(used.len(), limited.asked.len());
                for (whole, part) in given.consumers.iter().zip(&now.consumers) {
                    prop_assert!(part.bindings.len() <= 3);
                    let of = |one: &&Beyond| one.consumer.id == whole.id;
                    let beyond = now.beyond.iter().filter(of).map(|one| one.consumer.bindings.len());
                    let whole_again = part.bindings.len() + beyond.sum::<usize>();
                    prop_assert_eq!(whole_again, whole.bindings.len());
                }
                if used.len() < 4 {
                    let waits = now.beyond.iter().any(|one| one.limit == Limit::Services);
                    prop_assert!(!waits, "there is room for {:?}", now.beyond);
                }
                for (one, was) in before.iter().flat_map(|before| {
                    before.consumers.iter().filter_map(|was| {
                        now.consumers.iter().find(|one| one.id == was.id).map(|one| (one, was))
                    })
                }) {
                    for binding in &was.bindings {
                        prop_assert!(one.bindings.contains(binding), "{binding:?} was used");
                    }
                }
                before = Some(now);
            }
        }
    }
}
