//! The endpoints in use, where their source says that there are none, or says nothing.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    discovery::{Endpoints, Query},
    source::Known,
    state::Kept,
};

/// Keeps the last endpoints of a service for a while after discovery says, validly, that there are none: a registry that
/// lost its data and is being filled again says so too.
#[derive(Debug)]
pub(super) struct EmptyHold {
    hold: Duration,
    held: HashMap<Query, Arc<Endpoints>>,
    /// What an earlier run knew, of those that have not answered since.
    pub(super) kept: HashMap<Query, Kept>,
    empty_since: HashMap<Query, Instant>,
}

impl EmptyHold {
    pub(super) fn new(hold: Duration) -> Self {
        Self { hold, held: HashMap::new(), kept: HashMap::new(), empty_since: HashMap::new() }
    }

    /// The endpoints to use now, and when that ends without any other change.
    pub(super) fn settle<'a>(
        &mut self,
        known: impl IntoIterator<Item = (&'a Query, &'a Known<Endpoints>)>,
        now: Instant,
    ) -> (HashMap<Query, Arc<Endpoints>>, Option<Instant>) {
        let mut settled = HashMap::new();
        let mut wake: Option<Instant> = None;
        self.kept.retain(|_, kept| now < kept.until);
        for (query, known) in known {
            let Some(value) = &known.value else {
                // A source that has not failed is waited for.
                if let Some(kept) = self.kept.get(query).filter(|_| known.error.is_some()) {
                    settled.insert(query.clone(), kept.endpoints.living());
                    wake = Some(wake.map_or(kept.until, |wake| wake.min(kept.until)));
                }
                continue;
            };
            let kept = self.kept.remove(query).map(|kept| kept.endpoints);
            // Since when, not since the last change: what is rejected may go on changing in a list of nothing.
            let end = value.list.is_empty().then(|| {
                let since = known.changed.unwrap_or(now);
                *self.empty_since.entry(query.clone()).or_insert(since) + self.hold
            });
            if end.is_none() {
                self.empty_since.remove(query);
            }
            // A container that is gone is nothing to hold: its address may be another's.
            let held = self.held.get(query).or(kept.as_ref()).map(Endpoints::living);
            let held = held.filter(|held| !held.list.is_empty());
            let endpoints = match held.zip(end.filter(|end| now < *end)) {
                Some((held, end)) => {
                    wake = Some(wake.map_or(end, |wake| wake.min(end)));
                    held
                }
                None => value.living(),
            };
            settled.insert(query.clone(), endpoints);
        }
        self.empty_since.retain(|query, _| settled.contains_key(query));
        self.held.clone_from(&settled);
        (settled, wake)
    }

    /// When what is used was last known to be so, of those whose source does not answer.
    pub(super) fn confirmed(
        &self,
        known: &BTreeMap<Query, Known<Endpoints>>,
    ) -> HashMap<Query, Instant> {
        let lost = known.iter().filter(|(_, known)| known.error.is_some());
        let at = lost.filter_map(|(query, known)| {
            let kept = || self.kept.get(query).map(|kept| kept.confirmed);
            Some((query.clone(), known.confirmed.or_else(kept)?))
        });
        at.collect()
    }

    /// What an earlier run knew of those that are still waited for: it is not used, and must not be lost by a run that ends
    /// before they answer.
    pub(super) fn awaited(
        &self,
        known: &BTreeMap<Query, Known<Endpoints>>,
    ) -> impl Iterator<Item = (Query, &Kept)> {
        let awaited =
            known.iter().filter(|(_, known)| known.value.is_none() && known.error.is_none());
        awaited.filter_map(|(query, _)| Some((query.clone(), self.kept.get(query)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerId, Endpoint, RunEnd, ServiceName, Stay};

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
                let (settled, wake) = hold.settle([(&query(), known)], now);
                (settled.get(&query()).map(|endpoints| endpoints.list.len()), wake)
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
            let (settled, _) = hold.settle([(&query(), known)], start);
            settled[&query()].list.clone()
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
        let awaited = |hold: &EmptyHold, known: Known<Endpoints>| {
            let known = BTreeMap::from([(query(), known)]);
            hold.awaited(&known).map(|(_, kept)| kept.endpoints.list.len()).sum::<usize>()
        };
        assert_eq!(awaited(&hold, Known::default()), 1);
        // The others are among those in use.
        assert_eq!(awaited(&hold, failed()), 0);
        assert_eq!(awaited(&hold, known(&[], start)), 0);
        let waiting = Known::default();
        assert!(hold.settle([(&query(), &waiting)], start).0.is_empty());
        // For as long as it may be used, and no longer.
        hold.settle([(&query(), &waiting)], until);
        assert_eq!(awaited(&hold, Known::default()), 0);
    }

    #[test]
    fn what_is_kept_has_the_age_that_its_source_gave_it() {
        let start = Instant::now();
        let endpoints = known(&["10.0.0.1:1"], start).value.unwrap();
        let mut hold = EmptyHold::new(Duration::ZERO);
        let kept = Kept { endpoints, confirmed: start, until: start + Duration::from_secs(1) };
        hold.kept.insert(query(), kept);
        let confirmed = |known| hold.confirmed(&[(query(), known)].into()).get(&query()).copied();
        assert_eq!(confirmed(failed()), Some(start));
        let later = start + Duration::from_secs(1);
        assert_eq!(confirmed(Known { confirmed: Some(later), ..failed() }), Some(later));
        // What answers is as it says, whenever that is written.
        assert_eq!(confirmed(known(&["10.0.0.1:1"], start)), None);
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
