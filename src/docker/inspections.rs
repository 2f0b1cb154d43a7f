//! Decides which containers to inspect: one request at a time for each container, and limited in total, so that the engine
//! is not overloaded. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::model::ContainerId;

/// Why a container is inspected. The first one is the most urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// After an event or a connection. It does not wait for a long list.
    Event,
    /// A list contains it, and it is unknown.
    New,
    /// A list contains it, and it is known.
    Known,
}

/// The right to report the result of an inspection. Void if the container had an event since the request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InspectionTicket {
    pub id: ContainerId,
    number: u64,
}

#[derive(Debug, Default)]
pub(super) struct Inspections {
    queue: BTreeMap<(Urgency, u64), ContainerId>,
    queued: HashMap<ContainerId, (Urgency, u64)>,
    under_way: HashMap<ContainerId, UnderWay>,
    /// Containers whose inspection failed.
    failed: BTreeSet<ContainerId>,
    last_number: u64,
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    /// Something happened to the container since. It is inspected again after the answer.
    void: bool,
}

impl Inspections {
    /// Maximum number of running inspections: of those from lists, and in total.
    const LISTED: usize = 8;
    const AT_ALL: usize = 16;
    /// Maximum number of waiting inspections.
    const MOST: usize = 65_536;

    /// Removes all inspections and makes all earlier tickets void.
    pub(super) fn restarted(&self) -> Self {
        Self { last_number: self.last_number, ..Self::default() }
    }

    /// Requests the inspection of a container. A running one becomes void.
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

    /// The next inspection to make now.
    pub(super) fn next(&mut self) -> Option<InspectionTicket> {
        let (&place, _) = self.queue.first_key_value()?;
        let limit = if place.0 == Urgency::Event { Self::AT_ALL } else { Self::LISTED };
        if self.under_way.len() >= limit {
            return None;
        }
        let id = self.queue.remove(&place)?;
        self.queued.remove(&id);
        let number = self.number();
        self.under_way.insert(id.clone(), UnderWay { number, void: false });
        Some(InspectionTicket { id, number })
    }

    /// Takes an answer. Returns its container, if the ticket is still valid.
    pub(super) fn answered(
        &mut self,
        InspectionTicket { id, number }: InspectionTicket,
    ) -> Option<ContainerId> {
        let is_void = self.under_way.get(&id).filter(|asked| asked.number == number)?.void;
        self.under_way.remove(&id);
        if is_void {
            self.want(id, Urgency::Event);
            return None;
        }
        Some(id)
    }

    /// Notes that the inspection of a container failed.
    pub(super) fn failed(&mut self, id: ContainerId) {
        self.failed.insert(id);
    }

    /// Requests again the inspections that failed.
    pub(super) fn retry(&mut self) {
        for id in std::mem::take(&mut self.failed) {
            self.want(id, Urgency::Known);
        }
    }

    /// Forgets a container that no longer exists.
    pub(super) fn forget(&mut self, id: &ContainerId) {
        if let Some(place) = self.queued.remove(id) {
            self.queue.remove(&place);
        }
        self.under_way.remove(id);
        self.failed.remove(id);
    }

    /// Whether no inspection is wanted or running, and the containers whose inspection failed are known otherwise.
    pub(super) fn are_done(&self, is_known: impl Fn(&ContainerId) -> bool) -> bool {
        self.queue.is_empty() && self.under_way.is_empty() && self.failed.iter().all(is_known)
    }

    /// Whether too many inspections wait to add an unknown container: an engine could report new ones without end.
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
