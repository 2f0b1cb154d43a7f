//! Which containers are to be inspected: each by one request at a time, and never so many that an engine is kept busy.
//! Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::model::ContainerId;

/// Why a container is inspected: first the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// An event or a dial asks for it: it does not wait for a long list.
    Event,
    /// A list has it, and it is unknown.
    New,
    /// A list has it.
    Known,
}

/// The right to report the result of an inspection. Void if the container had an event since the request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub id: ContainerId,
    number: u64,
}

#[derive(Debug, Default)]
pub(super) struct Inspections {
    queue: BTreeMap<(Urgency, u64), ContainerId>,
    queued: HashMap<ContainerId, (Urgency, u64)>,
    under_way: HashMap<ContainerId, UnderWay>,
    /// Those of which the engine could not say how they are.
    failed: BTreeSet<ContainerId>,
    last_number: u64,
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    /// Something happened to the container since: it is inspected again when the answer is there.
    void: bool,
}

impl Inspections {
    /// Under way at a time, while a list is gone through, and at all.
    const LISTED: usize = 8;
    const AT_ALL: usize = 16;
    /// Waiting.
    const MOST: usize = 65_536;

    /// None, and no ticket of those before is valid.
    pub(super) fn restarted(&self) -> Self {
        Self { last_number: self.last_number, ..Self::default() }
    }

    /// A container is to be inspected. What is under way for it is void.
    pub(super) fn want(&mut self, id: ContainerId, urgency: Urgency) {
        self.failed.remove(&id);
        if let Some(under_way) = self.under_way.get_mut(&id) {
            under_way.void = true;
            return;
        }
        if let Some(place) = self.queued.get(&id) {
            if place.0 <= urgency {
                return;
            }
            self.queue.remove(place);
        }
        let place = (urgency, self.number());
        self.queue.insert(place, id.clone());
        self.queued.insert(id, place);
    }

    /// One that is to be asked for now.
    pub(super) fn next(&mut self) -> Option<Ticket> {
        let (&place, _) = self.queue.first_key_value()?;
        let limit = if place.0 == Urgency::Event { Self::AT_ALL } else { Self::LISTED };
        if self.under_way.len() >= limit {
            return None;
        }
        let id = self.queue.remove(&place)?;
        self.queued.remove(&id);
        let number = self.number();
        self.under_way.insert(id.clone(), UnderWay { number, void: false });
        Some(Ticket { id, number })
    }

    /// An answer arrived. Returns its container, if the ticket is still valid.
    pub(super) fn answered(&mut self, Ticket { id, number }: Ticket) -> Option<ContainerId> {
        let is_void = self.under_way.get(&id).filter(|asked| asked.number == number)?.void;
        self.under_way.remove(&id);
        if is_void {
            self.want(id, Urgency::Event);
            return None;
        }
        Some(id)
    }

    /// The engine could not say how a container is.
    pub(super) fn failed(&mut self, id: ContainerId) {
        self.failed.insert(id);
    }

    /// Those are inspected again of which the engine could not say how they are.
    pub(super) fn retry(&mut self) {
        for id in std::mem::take(&mut self.failed) {
            self.want(id, Urgency::Known);
        }
    }

    /// A container is no more.
    pub(super) fn forget(&mut self, id: &ContainerId) {
        if let Some(place) = self.queued.remove(id) {
            self.queue.remove(&place);
        }
        self.under_way.remove(id);
        self.failed.remove(id);
    }

    /// Whether none is wanted or under way, and none failed but of those that are known otherwise.
    pub(super) fn are_done(&self, is_known: impl Fn(&ContainerId) -> bool) -> bool {
        self.queue.is_empty() && self.under_way.is_empty() && self.failed.iter().all(is_known)
    }

    /// Whether so many wait that no unknown container is added: an engine could name others without end.
    pub(super) fn is_full(&self) -> bool {
        self.queued.len() >= Self::MOST
    }

    pub(super) fn is_under_way(&self, id: &ContainerId) -> bool {
        self.under_way.contains_key(id)
    }

    /// Whether one is wanted or under way.
    pub(super) fn is_to_come(&self, id: &ContainerId) -> bool {
        self.queued.contains_key(id) || self.under_way.contains_key(id)
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }
}
