//! Decides which endpoints to use if their source reports none or does not answer.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    cow_map::CowMap,
    discovery::{Endpoints, Query},
    model::Endpoint,
    source::Known,
    state::Kept,
};

/// Why the endpoints in use are not their source's last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InUse {
    /// The source reports none, or few of many. The last endpoints stay in use until this time.
    Held { until: Instant },
    /// The source has not answered since the start. Saved endpoints are in use. They were confirmed at this time.
    Kept { confirmed: Instant },
}

/// Keeps the last endpoints of a service for a while after a valid answer with none, or with few of many. A registry that
/// lost its data, or most of its members, gives such an answer until it is filled again.
#[derive(Debug)]
pub(super) struct EmptyHold {
    hold: Duration,
    /// The endpoints in use.
    used: CowMap<Query, Arc<Endpoints>>,
    /// Saved endpoints of queries that have not answered in this run.
    pub(super) kept: HashMap<Query, Kept>,
    /// The time since which a query's answer has no endpoints, or few of many.
    short_since: HashMap<Query, Instant>,
    /// Queries whose endpoints may change without an answer: after some time, or when a container ends.
    restless: HashSet<Query>,
    /// For queries whose source does not answer: when their endpoints were last known to be correct.
    confirmed: CowMap<Query, Instant>,
    /// Queries whose endpoints in use are not the last answer, and whether this changed since it was last asked.
    in_use: HashMap<Query, InUse>,
    in_use_is_new: bool,
}

impl EmptyHold {
    pub(super) fn new(hold: Duration) -> Self {
        Self {
            hold,
            used: CowMap::default(),
            kept: HashMap::new(),
            short_since: HashMap::new(),
            restless: HashSet::new(),
            confirmed: CowMap::default(),
            in_use: HashMap::new(),
            in_use_is_new: false,
        }
    }

    /// The endpoints to use now.
    pub(super) fn used(&self) -> &CowMap<Query, Arc<Endpoints>> {
        &self.used
    }

    /// For queries whose source does not answer: when their endpoints were last known to be correct.
    pub(super) fn confirmed(&self) -> &CowMap<Query, Instant> {
        &self.confirmed
    }

    /// Queries whose endpoints in use are not the last answer.
    pub(super) fn in_use(&self) -> &HashMap<Query, InUse> {
        &self.in_use
    }

    /// Whether [`Self::in_use`] has changed since the last call.
    pub(super) fn in_use_has_changed(&mut self) -> bool {
        std::mem::take(&mut self.in_use_is_new)
    }

    /// Queries whose endpoints may have changed without an answer. They must be settled again.
    pub(super) fn restless(&self) -> impl Iterator<Item = &Query> {
        self.restless.iter().chain(self.kept.keys())
    }

    /// Decides which endpoints of a query to use. `known`: the query's state; `None` before its first answer or error, and
    /// if it is no longer followed. Returns when the decision ends even if nothing else changes.
    pub(super) fn settle(
        &mut self,
        query: &Query,
        known: Option<&Known<Endpoints>>,
        now: Instant,
    ) -> Option<Instant> {
        if self.kept.get(query).is_some_and(|kept| kept.until <= now) {
            self.kept.remove(query);
        }
        let (endpoints, end) = known.map_or((None, None), |known| self.choose(query, known, now));
        match known.filter(|known| known.error.is_some()) {
            Some(known) => {
                let kept = self.kept.get(query).map(|kept| kept.confirmed);
                if let Some(at) = known.confirmed.or(kept) {
                    self.confirmed.insert(query.clone(), at);
                }
            }
            None => drop(self.confirmed.remove(query)),
        }
        let in_use = match (known.and_then(|known| known.value.as_ref()), end) {
            (Some(_), Some(until)) => Some(InUse::Held { until }),
            (None, Some(_)) => {
                self.kept.get(query).map(|kept| InUse::Kept { confirmed: kept.confirmed })
            }
            (_, None) => None,
        };
        if self.in_use.get(query) != in_use.as_ref() {
            self.in_use_is_new = true;
            match in_use {
                Some(in_use) => drop(self.in_use.insert(query.clone(), in_use)),
                None => drop(self.in_use.remove(query)),
            }
        }
        let may_change = end.is_some() || endpoints.as_ref().is_some_and(|e| !e.stays.is_empty());
        if may_change {
            self.restless.insert(query.clone());
        } else {
            self.restless.remove(query);
        }
        match endpoints {
            Some(endpoints) => {
                let same = |used: &Arc<Endpoints>| Arc::ptr_eq(used, &endpoints);
                if !self.used.get(query).is_some_and(same) {
                    self.used.insert(query.clone(), endpoints);
                }
            }
            None => {
                self.used.remove(query);
                self.short_since.remove(query);
            }
        }
        end
    }

    /// The endpoints to use, and until when, if there is a limit.
    fn choose(
        &mut self,
        query: &Query,
        known: &Known<Endpoints>,
        now: Instant,
    ) -> (Option<Arc<Endpoints>>, Option<Instant>) {
        let Some(value) = &known.value else {
            // Saved endpoints are used only after an error. Before that, the source's answer is awaited.
            let kept = self.kept.get(query).filter(|_| known.error.is_some());
            return (kept.map(|kept| kept.endpoints.living()), kept.map(|kept| kept.until));
        };
        let kept = self.kept.remove(query).map(|kept| kept.endpoints);
        // Endpoints of ended containers are not kept: their addresses may belong to other containers.
        let last = self.used.get(query).or(kept.as_ref()).map(Endpoints::living);
        let last_count = last.as_ref().map_or(0, |last| last.list.len());
        if !value.list.is_empty() && !is_collapse(last_count, value.list.len()) {
            self.short_since.remove(query);
            return (Some(value.living()), None);
        }
        // Measured from the first such answer: the rejected entries of an empty answer may keep changing.
        let since = known.changed.unwrap_or(now);
        let end = *self.short_since.entry(query.clone()).or_insert(since) + self.hold;
        // A failing check is a statement of the registry about one instance, and no sign of a problem of the registry.
        let last =
            last.map(|last| if value.list.is_empty() { last } else { without(last, &value.unfit) });
        let holds_any =
            |last: &Arc<Endpoints>| !last.list.iter().all(|one| value.list.contains(one));
        match last.filter(|last| now < end && holds_any(last)) {
            Some(last) => (Some(both(last, &value.living())), Some(end)),
            None => {
                // The next loss gets the full time again.
                if !value.list.is_empty() {
                    self.short_since.remove(query);
                }
                (Some(value.living()), None)
            }
        }
    }

    /// Saved endpoints of queries that have neither an answer nor an error yet. They are not used, but must be saved again
    /// in case this run ends before the source answers.
    pub(super) fn awaited<'a>(
        &'a self,
        unheard: &'a HashSet<Query>,
    ) -> impl Iterator<Item = (&'a Query, &'a Kept)> {
        self.kept.iter().filter(|(query, _)| unheard.contains(query))
    }
}

/// Whether a list lost most of its endpoints at once. A small list may lose most of its endpoints normally.
fn is_collapse(before: usize, now: usize) -> bool {
    const MANY: usize = 5;
    before >= MANY && now < before.div_ceil(2)
}

fn without(held: Arc<Endpoints>, unfit: &BTreeSet<Endpoint>) -> Arc<Endpoints> {
    if !held.list.iter().any(|one| unfit.contains(one)) {
        return held;
    }
    let mut held = Endpoints::clone(&held);
    held.list.retain(|one| !unfit.contains(one));
    held.stays.retain(|one, _| !unfit.contains(one));
    Arc::new(held)
}

/// The held endpoints, together with those of the last answer.
fn both(held: Arc<Endpoints>, answer: &Arc<Endpoints>) -> Arc<Endpoints> {
    let says_no_more = answer.list.iter().all(|endpoint| held.list.binary_search(endpoint).is_ok())
        && (answer.list.is_empty()
            || (&answer.rejected, &answer.problem) == (&held.rejected, &held.problem));
    if says_no_more {
        return held;
    }
    let list = held.list.iter().chain(&answer.list).copied();
    let mut both = Endpoints::new(list, answer.rejected.clone());
    both.stays = held.stays.iter().chain(&answer.stays).map(|(e, s)| (*e, s.clone())).collect();
    both.problem.clone_from(&answer.problem);
    Arc::new(both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerId, RunEnd, ServiceName, Stay};

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
            let wake = hold.settle(&query(), Some(known), now);
            (hold.used().get(&query()).map(|endpoints| endpoints.list.len()), wake)
        };
        assert_eq!(settle(&Known::default(), start), (None, None));
        assert_eq!(settle(&known(&["10.0.0.1:1", "10.0.0.2:1"], start), start), (Some(2), None));
        let empty = known(&[], second(10));
        assert_eq!(settle(&empty, second(10)), (Some(2), Some(second(40))));
        assert_eq!(settle(&empty, second(39)), (Some(2), Some(second(40))));
        // Another empty answer does not restart the time.
        assert_eq!(settle(&known(&[], second(39)), second(39)), (Some(2), Some(second(40))));
        assert_eq!(settle(&empty, second(40)), (Some(0), None));
        assert_eq!(settle(&known(&["10.0.0.3:1"], second(50)), second(50)), (Some(1), None));
        assert_eq!(settle(&known(&["10.0.0.3:1"], second(50)), second(50)), (Some(1), None));
    }

    #[test]
    fn a_list_that_loses_most_of_its_members_at_once_is_held_and_one_that_shrinks_is_not() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let hosts = |hosts: std::ops::Range<u8>| {
            hosts.map(|host| format!("10.0.0.{host}:1")).collect::<Vec<_>>()
        };
        let new = || EmptyHold::new(Duration::from_secs(30));
        let settle = |hold: &mut EmptyHold, list: &[String], changed, now| {
            let list: Vec<_> = list.iter().map(String::as_str).collect();
            let wake = hold.settle(&query(), Some(&known(&list, second(changed))), second(now));
            let used = hold.used().get(&query()).unwrap();
            assert_eq!(hold.in_use().contains_key(&query()), wake.is_some());
            (used.list.len(), wake)
        };
        let mut hold = new();
        assert_eq!(settle(&mut hold, &hosts(0..132), 0, 0), (132, None));
        // One endpoint is left, then two others appear: all are used.
        assert_eq!(settle(&mut hold, &hosts(0..1), 10, 10), (132, Some(second(40))));
        assert_eq!(settle(&mut hold, &hosts(200..202), 20, 20), (134, Some(second(40))));
        assert_eq!(settle(&mut hold, &hosts(200..202), 20, 39), (134, Some(second(40))));
        // The loss was real.
        assert_eq!(settle(&mut hold, &hosts(200..202), 20, 40), (2, None));
        // The next loss gets the full time, whenever it happens.
        assert_eq!(settle(&mut hold, &[], 500, 500), (2, Some(second(530))));

        // The loss was not real: the returning members end the hold, and the next loss is another one.
        let mut hold = new();
        settle(&mut hold, &hosts(0..100), 0, 0);
        assert_eq!(settle(&mut hold, &hosts(0..1), 10, 10), (100, Some(second(40))));
        assert_eq!(settle(&mut hold, &hosts(0..99), 20, 20), (99, None));
        assert_eq!(settle(&mut hold, &[], 30, 30), (99, Some(second(60))));

        // Half of many; most of a few; most of five, which is held; and as many others instead.
        for (before, after, used) in [(10, 0..5, 5), (4, 0..1, 1), (5, 0..2, 5), (10, 50..60, 10)] {
            let mut hold = new();
            settle(&mut hold, &hosts(0..before), 0, 0);
            assert_eq!(settle(&mut hold, &hosts(after), 1, 1).0, used, "of {before}");
        }
        let mut hold = EmptyHold::new(Duration::ZERO);
        settle(&mut hold, &hosts(0..100), 0, 0);
        assert_eq!(settle(&mut hold, &hosts(0..1), 1, 1), (1, None));
    }

    /// If a registry lists an instance with a failing check, it has not lost the instance.
    #[test]
    fn an_instance_whose_check_fails_is_not_held_while_another_passes() {
        let start = Instant::now();
        let hosts = |hosts: std::ops::Range<u8>| {
            let endpoints = hosts.map(|host| Endpoint(([10, 0, 0, host], 1).into()));
            endpoints.collect::<Vec<_>>()
        };
        let mut hold = EmptyHold::new(Duration::from_secs(30));
        let mut settle = |list: Vec<Endpoint>, unfit: Vec<Endpoint>, changed| {
            let unfit = unfit.into_iter().collect();
            let value = Some(Arc::new(Endpoints { unfit, ..Endpoints::new(list, vec![]) }));
            let now = start + Duration::from_secs(changed);
            let known = Known { value, changed: Some(now), ..Known::default() };
            let wake = hold.settle(&query(), Some(&known), now);
            (hold.used().get(&query()).unwrap().list.clone(), wake.is_some())
        };
        assert_eq!(settle(hosts(0..10), vec![], 0), (hosts(0..10), false));
        // Nine checks fail, one endpoint is left.
        assert_eq!(settle(hosts(0..1), hosts(1..10), 1), (hosts(0..1), false));
        assert_eq!(settle(hosts(0..10), vec![], 2), (hosts(0..10), false));
        // Four checks fail, and five endpoints are missing: only the missing ones may still exist.
        let held = [hosts(0..1), hosts(5..10)].concat();
        assert_eq!(settle(hosts(0..1), hosts(1..5), 3), (held, true));
        assert_eq!(settle(hosts(0..10), vec![], 4), (hosts(0..10), false));
        // No check passes: using all endpoints is better than using none.
        assert_eq!(settle(vec![], hosts(0..10), 5), (hosts(0..10), true));
    }

    fn failed() -> Known<Endpoints> {
        Known { error: Some("gone".into()), failures: 1, ..Known::default() }
    }

    #[test]
    fn what_an_earlier_run_knew_is_used_only_while_the_source_fails_and_not_for_ever() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let kept = || {
            let endpoints = known(&["10.0.0.1:1", "10.0.0.2:1"], start).value.unwrap();
            let mut hold = EmptyHold::new(Duration::from_secs(30));
            hold.kept.insert(query(), Kept { endpoints, confirmed: start, until: second(5000) });
            move |known: &Known<Endpoints>, now| {
                let wake = hold.settle(&query(), Some(known), now);
                (hold.used().get(&query()).map(|endpoints| endpoints.list.len()), wake)
            }
        };
        let mut settle = kept();
        assert_eq!(settle(&Known::default(), start), (None, None), "nothing has failed");
        assert_eq!(settle(&Known::default(), second(1000)), (None, None));
        assert_eq!(settle(&failed(), second(1000)), (Some(2), Some(second(5000))));
        let empty = known(&[], second(1000));
        assert_eq!(settle(&empty, second(1000)), (Some(2), Some(second(1030))));
        assert_eq!(settle(&empty, second(1030)), (Some(0), None));
        assert_eq!(settle(&failed(), second(1031)), (None, None), "it is used no more");

        let mut settle = kept();
        assert_eq!(settle(&failed(), second(4999)), (Some(2), Some(second(5000))));
        assert_eq!(settle(&failed(), second(5000)), (None, None), "it is too old");
        let mut settle = kept();
        assert_eq!(settle(&known(&[], second(5000)), second(5000)), (Some(0), None));
    }

    #[test]
    fn a_container_that_is_gone_is_no_endpoint_whatever_is_known_and_held() {
        let start = Instant::now();
        let mut hold = EmptyHold::new(Duration::from_secs(30));
        let ends = [RunEnd::default(), RunEnd::default()];
        let list = ["10.0.0.1:1", "10.0.0.2:1"].map(|e| Endpoint(e.parse().unwrap()));
        let stay = |end: &RunEnd| Stay {
            runs: vec![(ContainerId::new("a"), end.clone())],
            left: vec![RunEnd::default()],
        };
        let stays = list.into_iter().zip(ends.iter().map(stay)).collect();
        let value = Endpoints { stays, ..Endpoints::new(list, vec![]) };
        let both = Known { value: Some(Arc::new(value)), error: Some("gone".into()), ..failed() };
        let mut settle = |known: &Known<Endpoints>| {
            hold.settle(&query(), Some(known), start);
            let used = hold.used().get(&query()).unwrap().list.clone();
            let restless = hold.restless().any(|one| *one == query());
            assert_eq!(restless, !used.is_empty(), "its containers may end");
            used
        };
        assert_eq!(settle(&both), list);
        ends[0].mark_ended();
        assert_eq!(settle(&both), list[1..]);
        let empty = known(&[], start);
        assert_eq!(settle(&empty), list[1..]);
        ends[1].mark_ended();
        assert_eq!(settle(&empty), []);
    }

    #[test]
    fn what_is_waited_for_is_kept_on_though_it_is_not_used() {
        let start = Instant::now();
        let endpoints = known(&["10.0.0.1:1"], start).value.unwrap();
        let mut hold = EmptyHold::new(Duration::ZERO);
        let until = start + Duration::from_secs(9);
        hold.kept.insert(query(), Kept { endpoints, confirmed: start, until });
        let awaited = |hold: &EmptyHold, unheard: &[Query]| {
            let unheard = unheard.iter().cloned().collect();
            hold.awaited(&unheard).map(|(_, kept)| kept.endpoints.list.len()).sum::<usize>()
        };
        // The query's endpoints are in use, so it is not awaited.
        assert_eq!(awaited(&hold, &[]), 0);
        hold.settle(&query(), None, start);
        assert!(hold.used().is_empty());
        assert_eq!(awaited(&hold, &[query()]), 1);
        // They are saved until their time is over.
        hold.settle(&query(), None, until);
        assert_eq!(awaited(&hold, &[query()]), 0);
    }

    #[test]
    fn what_is_kept_has_the_age_that_its_source_gave_it() {
        let start = Instant::now();
        let endpoints = known(&["10.0.0.1:1"], start).value.unwrap();
        let mut hold = EmptyHold::new(Duration::ZERO);
        let kept = Kept { endpoints, confirmed: start, until: start + Duration::from_secs(1) };
        hold.kept.insert(query(), kept);
        let mut confirmed = |known| {
            hold.settle(&query(), Some(&known), start);
            hold.confirmed().get(&query()).copied()
        };
        assert_eq!(confirmed(failed()), Some(start));
        let later = start + Duration::from_secs(1);
        assert_eq!(confirmed(Known { confirmed: Some(later), ..failed() }), Some(later));
        // A source that answers is up to date, so no time of confirmation is kept.
        assert_eq!(confirmed(known(&["10.0.0.1:1"], start)), None);
    }

    #[test]
    fn without_a_hold_empty_is_empty() {
        let start = Instant::now();
        let mut hold = EmptyHold::new(Duration::ZERO);
        hold.settle(&query(), Some(&known(&["10.0.0.1:1"], start)), start);
        let wake = hold.settle(&query(), Some(&known(&[], start)), start);
        assert_eq!((hold.used().get(&query()).unwrap().list.len(), wake), (0, None));
        // The query is no longer followed.
        hold.settle(&query(), None, start);
        assert!(hold.used().is_empty());
    }
}
