//! Which endpoints can be reached from which consumer's own network, for `auto`: what is known, and what is to be tried. Pure.
//!
//! A connect from there proves it. Where embassy may not enter a consumer's network, the engine's networks decide, if they leave no
//! doubt, until a connect of the consumer's own fails.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Instant,
};

use super::again::Again;
use crate::{
    model::{ConsumerId, Endpoint},
    path::{EndpointReach, Nearness},
};

#[derive(Debug, Default)]
pub(super) struct Proofs {
    known: HashMap<ConsumerId, HashMap<Endpoint, Proof>>,
    /// Whose endpoints are to be tried.
    queue: VecDeque<ConsumerId>,
    /// Those whose network cannot be entered.
    barred: HashSet<ConsumerId>,
    /// Tries that have not ended.
    under_way: usize,
    /// Whether anything waits for its next try.
    has_failed: bool,
}

#[derive(Debug)]
struct Proof {
    state: State,
    /// When to try again after a failure, the consumer's own or that of a try. It remembers how often there was one.
    again: Option<Again>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Queued,
    UnderWay,
    Reached,
    Failed,
    /// The network cannot be entered.
    Barred,
}

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    Reached,
    Failed,
    Barred,
}

impl Proofs {
    /// Connects at a time.
    const MOST: usize = 64;

    /// What is known; if nothing is, it is to be tried.
    pub(super) fn reach(
        &mut self,
        consumer: &ConsumerId,
        endpoint: Endpoint,
        nearness: Nearness,
    ) -> EndpointReach {
        if nearness == Nearness::Isolated {
            return EndpointReach::Isolated;
        }
        let known = match self.known.get_mut(consumer) {
            Some(known) => known,
            None => self.known.entry(consumer.clone()).or_default(),
        };
        let first = match self.barred.contains(consumer) {
            true => State::Barred,
            false => State::Queued,
        };
        let proof = known.entry(endpoint).or_insert_with(|| {
            if first == State::Queued && self.queue.back() != Some(consumer) {
                self.queue.push_back(consumer.clone());
            }
            Proof { state: first, again: None }
        });
        match proof.state {
            State::Queued | State::UnderWay => EndpointReach::Trying,
            State::Reached => EndpointReach::Reached,
            State::Failed => EndpointReach::Failed,
            State::Barred if nearness == Nearness::Near => EndpointReach::Reached,
            State::Barred => EndpointReach::Untried,
        }
    }

    /// The next consumer whose network is to be entered, and the endpoints to try from there: each is to be told by `ended`.
    pub(super) fn take_queued(&mut self) -> Option<(ConsumerId, Vec<Endpoint>)> {
        while self.under_way < Self::MOST {
            let consumer = self.queue.pop_front()?;
            let queued = self.known.get_mut(&consumer).into_iter().flatten();
            let queued = queued.filter(|(_, proof)| proof.state == State::Queued);
            let mut endpoints = Vec::new();
            for (endpoint, proof) in queued.take(Self::MOST - self.under_way) {
                proof.state = State::UnderWay;
                endpoints.push(*endpoint);
            }
            if endpoints.is_empty() {
                continue;
            }
            self.under_way += endpoints.len();
            // There may be more of it.
            self.queue.push_back(consumer.clone());
            return Some((consumer, endpoints));
        }
        None
    }

    /// A try has ended. Returns whether anything else is known now.
    pub(super) fn ended(
        &mut self,
        consumer: &ConsumerId,
        endpoint: Endpoint,
        how: Tried,
        now: Instant,
    ) -> bool {
        self.under_way = self.under_way.saturating_sub(1);
        // It ended meanwhile, or was requested again.
        let of_consumer = self.known.get_mut(consumer);
        let Some(proof) = of_consumer.and_then(|known| known.get_mut(&endpoint)) else {
            return false;
        };
        if proof.state != State::UnderWay {
            return false;
        }
        proof.state = match how {
            Tried::Reached => State::Reached,
            Tried::Failed => State::Failed,
            Tried::Barred => State::Barred,
        };
        match how {
            Tried::Reached => {}
            Tried::Failed => {
                proof.again.get_or_insert_with(|| Again::new(now));
                self.has_failed = true;
            }
            Tried::Barred => drop(self.barred.insert(consumer.clone())),
        }
        true
    }

    /// A connect of the consumer's own failed: what was proved is so no more. Returns whether it was.
    pub(super) fn doubt(
        &mut self,
        consumer: &ConsumerId,
        endpoint: Endpoint,
        now: Instant,
    ) -> bool {
        let of_consumer = self.known.get_mut(consumer);
        let Some(proof) = of_consumer.and_then(|known| known.get_mut(&endpoint)) else {
            return false;
        };
        let can_try = match proof.state {
            State::Reached => true,
            State::Barred => false,
            State::Queued | State::UnderWay | State::Failed => return false,
        };
        let is_due = match &mut proof.again {
            Some(again) => again.is_due(now),
            none => {
                *none = Some(Again::new(now));
                true
            }
        };
        // A consumer may break off its own connects: each time later it is tried again.
        if can_try && is_due {
            proof.state = State::Queued;
            self.queue.push_back(consumer.clone());
        } else {
            proof.state = State::Failed;
            self.has_failed = true;
        }
        true
    }

    /// The consumers with endpoints that are to be tried again now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<ConsumerId> {
        if !std::mem::take(&mut self.has_failed) {
            return Vec::new();
        }
        let mut due = Vec::new();
        for (consumer, known) in &mut self.known {
            let mut is_due = false;
            for proof in known.values_mut().filter(|proof| proof.state == State::Failed) {
                if proof.again.as_mut().is_none_or(|again| again.is_due(now)) {
                    is_due = true;
                    proof.state = match self.barred.contains(consumer) {
                        true => State::Barred,
                        false => State::Queued,
                    };
                } else {
                    self.has_failed = true;
                }
            }
            if is_due {
                self.queue.push_back(consumer.clone());
                due.push(consumer.clone());
            }
        }
        due
    }

    /// A consumer has no such routes any more.
    pub(super) fn forget(&mut self, consumer: &ConsumerId) {
        self.known.remove(consumer);
        self.barred.remove(consumer);
    }

    /// Whether anything of a consumer is known or to be tried.
    pub(super) fn has(&self, consumer: &ConsumerId) -> bool {
        self.known.contains_key(consumer)
    }

    /// What a consumer does not use any more is forgotten.
    pub(super) fn keep(&mut self, consumer: &ConsumerId, is_used: impl Fn(Endpoint) -> bool) {
        if let Some(known) = self.known.get_mut(consumer) {
            known.retain(|endpoint, _| is_used(*endpoint));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::ContainerId;

    fn consumer(n: u8) -> ConsumerId {
        ConsumerId::Container {
            id: ContainerId::new(&format!("{n:02}").repeat(32)),
            started_at: "t".into(),
        }
    }

    fn endpoint(n: u8) -> Endpoint {
        Endpoint(([10, 0, 0, n], 80).into())
    }

    #[test]
    fn a_connect_from_the_consumers_network_proves_and_its_own_failure_takes_that_back() {
        let (mut proofs, now, app) = (Proofs::default(), Instant::now(), consumer(1));
        let reach =
            |proofs: &mut Proofs, n| proofs.reach(&consumer(1), endpoint(n), Nearness::Near);
        assert_eq!(
            reach(&mut proofs, 1),
            EndpointReach::Trying,
            "near is no proof where it can be tried"
        );
        assert_eq!(reach(&mut proofs, 2), EndpointReach::Trying);
        let (whose, mut tried) = proofs.take_queued().unwrap();
        tried.sort();
        assert_eq!((whose, tried), (app.clone(), vec![endpoint(1), endpoint(2)]));
        assert_eq!(proofs.take_queued(), None);
        assert!(proofs.ended(&app, endpoint(1), Tried::Reached, now));
        assert!(proofs.ended(&app, endpoint(2), Tried::Failed, now));
        assert_eq!(
            (reach(&mut proofs, 1), reach(&mut proofs, 2)),
            (EndpointReach::Reached, EndpointReach::Failed)
        );
        assert!(proofs.due(now).is_empty(), "too soon");
        let later = now + Duration::from_secs(1);
        assert_eq!(proofs.due(later), std::slice::from_ref(&app));
        assert_eq!(proofs.take_queued(), Some((app.clone(), vec![endpoint(2)])));

        assert!(proofs.doubt(&app, endpoint(1), later), "the first time it is tried at once");
        assert!(!proofs.doubt(&app, endpoint(1), later), "many connects fail together");
        assert_eq!(reach(&mut proofs, 1), EndpointReach::Trying);
        assert_eq!(proofs.take_queued(), Some((app.clone(), vec![endpoint(1)])));
        proofs.ended(&app, endpoint(1), Tried::Reached, later);
        assert!(proofs.doubt(&app, endpoint(1), later), "the next time only later");
        assert_eq!((reach(&mut proofs, 1), proofs.take_queued()), (EndpointReach::Failed, None));
    }

    #[test]
    fn without_a_way_in_the_networks_decide_until_a_connect_fails() {
        let (mut proofs, now, app) = (Proofs::default(), Instant::now(), consumer(1));
        let reach =
            |proofs: &mut Proofs, nearness| proofs.reach(&consumer(1), endpoint(1), nearness);
        reach(&mut proofs, Nearness::Near);
        proofs.take_queued().unwrap();
        proofs.ended(&app, endpoint(1), Tried::Barred, now);
        assert_eq!(reach(&mut proofs, Nearness::Near), EndpointReach::Reached);
        assert_eq!(reach(&mut proofs, Nearness::Beyond), EndpointReach::Untried);
        assert_eq!(proofs.reach(&app, endpoint(2), Nearness::Beyond), EndpointReach::Untried);
        assert_eq!(proofs.take_queued(), None, "it is not tried again and again");
        assert!(proofs.doubt(&app, endpoint(1), now));
        assert_eq!(reach(&mut proofs, Nearness::Near), EndpointReach::Failed);
        assert_eq!(proofs.due(now + Duration::from_secs(1)).len(), 1);
        assert_eq!(reach(&mut proofs, Nearness::Near), EndpointReach::Reached);
        // Its next run may be another matter.
        proofs.forget(&app);
        assert_eq!(reach(&mut proofs, Nearness::Near), EndpointReach::Trying);
        assert_eq!(reach(&mut proofs, Nearness::Isolated), EndpointReach::Isolated);
    }

    proptest! {
        /// Whatever happens in which order: never more connects at a time than allowed, and each that was asked for ends.
        #[test]
        fn all_that_is_asked_for_is_tried_and_not_too_much_at_a_time(
            steps in prop::collection::vec((0..6_u8, 0..4_u8, 0..40_u8, 0..3_u8), 1..300),
        ) {
            let (mut proofs, mut now) = (Proofs::default(), Instant::now());
            let mut under_way: Vec<(ConsumerId, Endpoint)> = Vec::new();
            let how = |n| [Tried::Reached, Tried::Failed, Tried::Barred][usize::from(n)];
            for (step, c, e, n) in steps {
                let (app, at) = (consumer(c), endpoint(e));
                match step {
                    0 | 1 => drop(proofs.reach(&app, at, Nearness::Near)),
                    2 => while let Some((app, all)) = proofs.take_queued() {
                        under_way.extend(all.into_iter().map(|one| (app.clone(), one)));
                    },
                    3 => if let Some((app, at)) = under_way.pop() {
                        proofs.ended(&app, at, how(n), now);
                    },
                    4 => drop(proofs.doubt(&app, at, now)),
                    _ => {
                        now += Duration::from_secs(u64::from(e));
                        proofs.due(now);
                        if n == 0 { proofs.forget(&app) } else { proofs.keep(&app, |one| one != at) }
                    }
                }
                prop_assert!(under_way.len() <= Proofs::MOST);
                prop_assert_eq!(proofs.under_way, under_way.len());
            }
            loop {
                while let Some((app, at)) = under_way.pop() {
                    proofs.ended(&app, at, Tried::Reached, now);
                }
                let Some((app, all)) = proofs.take_queued() else { break };
                under_way.extend(all.into_iter().map(|one| (app.clone(), one)));
            }
            let left = proofs.known.values().flat_map(HashMap::values);
            let waits = |proof: &&Proof| matches!(proof.state, State::Queued | State::UnderWay);
            prop_assert_eq!(left.filter(waits).count(), 0);
        }
    }
}
