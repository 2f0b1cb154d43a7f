//! How long an endpoint stays in use after answers do not contain it any more: many servers return a part of many addresses
//! each time. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::model::Endpoint;

/// The endpoints of the last answers.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// The priority of the answer's SRV records; `None` without any.
    priority: Option<u16>,
    /// Each endpoint with the time of the first answer without it. `None`: the last answer had it.
    used: BTreeMap<Endpoint, Option<Instant>>,
}

impl Hold {
    /// Maximum number of held endpoints: a server may invent new ones each time.
    const MOST: usize = 1000;

    /// Takes an answer. Returns the endpoints to use, and when the next of them is due to be removed, which is when to ask
    /// again.
    ///
    /// An answer without endpoints, or with another priority, replaces all: the earlier instances are no longer in service.
    pub(super) fn settle(
        &mut self,
        priority: Option<u16>,
        answer: Vec<Endpoint>,
        hold: Duration,
        now: Instant,
    ) -> (Vec<Endpoint>, Option<Instant>) {
        if answer.is_empty() || priority != self.priority {
            self.used.clear();
        }
        self.priority = priority;
        for since in self.used.values_mut() {
            since.get_or_insert(now);
        }
        self.used.extend(answer.into_iter().map(|endpoint| (endpoint, None)));
        self.used.retain(|_, since| since.is_none_or(|since| now < since + hold));
        let mut missing: Vec<_> = self.used.values().flatten().copied().collect();
        if missing.len() > Self::MOST {
            missing.sort_unstable_by(|a, b| b.cmp(a));
            missing.truncate(Self::MOST);
            let oldest = missing.last().copied();
            self.used.retain(|_, since| since.is_none_or(|since| Some(since) > oldest));
        }
        (self.used.keys().copied().collect(), missing.into_iter().min().map(|since| since + hold))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOLD: Duration = Duration::from_secs(30);

    fn endpoints(hosts: impl IntoIterator<Item = u8>) -> Vec<Endpoint> {
        let endpoint = |host| Endpoint(([10, 0, 0, host], 80).into());
        hosts.into_iter().map(endpoint).collect()
    }

    #[test]
    fn an_endpoint_goes_when_it_was_missing_for_the_hold() {
        let (mut hold, start) = (Hold::default(), Instant::now());
        let second = |n| start + Duration::from_secs(n);
        let mut settle =
            |hosts: &[u8], n| hold.settle(None, endpoints(hosts.to_vec()), HOLD, second(n));
        assert_eq!(settle(&[1, 2], 0), (endpoints([1, 2]), None));
        // 1 was in use until now, whenever an answer last had it.
        assert_eq!(settle(&[2, 3], 100), (endpoints([1, 2, 3]), Some(second(130))));
        assert_eq!(settle(&[3], 110), (endpoints([1, 2, 3]), Some(second(130))));
        assert_eq!(settle(&[1, 3], 129), (endpoints([1, 2, 3]), Some(second(140))));
        assert_eq!(settle(&[1, 3], 140), (endpoints([1, 3]), None));
        // An empty answer takes effect at once, and the earlier endpoints do not return with the next one.
        assert_eq!(settle(&[], 141), (vec![], None));
        assert_eq!(settle(&[4], 142), (endpoints([4]), None));
    }

    #[test]
    fn without_a_hold_an_answer_is_what_there_is() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        for hosts in [1..4, 2..3, 5..9] {
            let list = endpoints(hosts);
            let settled = hold.settle(None, list.clone(), Duration::ZERO, now);
            assert_eq!(settled, (list, None));
        }
    }

    #[test]
    fn another_priority_takes_over_at_once() {
        let (mut hold, now) = (Hold::default(), Instant::now());
        hold.settle(Some(1), endpoints([1, 2]), HOLD, now);
        assert_eq!(hold.settle(Some(2), endpoints([3]), HOLD, now), (endpoints([3]), None));
        assert_eq!(hold.settle(Some(1), endpoints([1]), HOLD, now), (endpoints([1]), None));
    }

    #[test]
    fn ever_new_endpoints_do_not_add_up() {
        let (mut hold, start) = (Hold::default(), Instant::now());
        for n in 0..200u8 {
            let answer = (0..50).map(|host| Endpoint(([10, 0, n, host], 80).into()));
            let now = start + Duration::from_millis(n.into());
            let (list, _) = hold.settle(None, answer.collect(), HOLD, now);
            assert!(list.len() <= Hold::MOST + 50, "{}", list.len());
        }
    }

    proptest! {
        /// Three of ten in each answer: each endpoint stays in use after its first answer, as long as it reappears in time.
        #[test]
        fn a_server_that_shows_a_part_each_time_loses_none(starts in prop::collection::vec(0..10u8, 10..60)) {
            let (mut hold, start) = (Hold::default(), Instant::now());
            let mut seen = BTreeMap::new();
            for (n, first) in (0..).zip(starts) {
                let now = start + Duration::from_secs(n);
                let shown = endpoints((0..3).map(|i| (first + i) % 10));
                seen.extend(shown.iter().map(|endpoint| (*endpoint, n)));
                let (list, _) = hold.settle(None, shown, HOLD, now);
                // Counted from the first answer without it.
                let expected: Vec<_> =
                    seen.iter().filter(|(_, last)| n <= **last || n - **last <= 30).map(|(e, _)| *e).collect();
                prop_assert_eq!(list, expected);
            }
        }
    }
}
