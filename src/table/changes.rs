//! What one table has and another has not.

use std::{net::IpAddr, sync::Arc};

use super::{Route, Table, Upstream, UpstreamInUse};
use crate::{discovery::Query, wiring::Wiring};

/// What a table has that the one before it had not, and the other way round. Of routes, each list is sorted by key.
#[derive(Debug, Default)]
pub struct Changes {
    pub added: Vec<Arc<Route>>,
    pub removed: Vec<Arc<Route>>,
    /// Routes that go on, with another name of their consumer, balance or way of arrival.
    pub updated: Vec<Arc<Route>>,
    /// Answers that are new, or have other endpoints. In no order.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Addresses that became known as a container's, or ceased to be. Sorted.
    pub known_added: Vec<IpAddr>,
    pub known_removed: Vec<IpAddr>,
    /// Routes that go on, and whose connections come by another interface: before, and now.
    pub moved: Vec<(Arc<Route>, Arc<Route>)>,
    /// Whether the VIPs or the networks are others.
    pub places: bool,
    /// How networks and addresses are connected, before and now, if that differs.
    pub wiring: Option<(Arc<Wiring>, Arc<Wiring>)>,
}

impl Changes {
    /// What `next` has and `before` has not, and the other way round: for a reader that has missed the tables between.
    pub fn between(before: &Table, next: &Table) -> Self {
        let mut changes = Self::default();
        for key in next.routes.differing_keys(&before.routes, Arc::ptr_eq) {
            changes.of_route(before.routes.get(key), next.routes.get(key));
        }
        for query in next.upstreams.differing_keys(&before.upstreams, same_upstream) {
            changes.of_upstream(before, next, query);
        }
        changes.sort();
        changes.of_places(before, next);
        changes
    }

    /// One query's answer, before and now.
    pub(super) fn of_upstream(&mut self, before: &Table, next: &Table, query: &Query) {
        let (before, now) = (before.upstreams.get(query), next.upstreams.get(query));
        if let Some(now) = now
            && before.is_none_or(|before| !same_upstream(before, now))
        {
            self.upstreams.push(now.upstream.clone());
        }
    }

    /// One key's route, before and now.
    pub(super) fn of_route(&mut self, before: Option<&Arc<Route>>, now: Option<&Arc<Route>>) {
        match (before, now) {
            (Some(before), Some(now)) if Arc::ptr_eq(before, now) => {}
            (Some(before), Some(now)) if before.continues(now) => {
                self.updated.push(now.clone());
                if before.arrival != now.arrival {
                    self.moved.push((before.clone(), now.clone()));
                }
            }
            (before, now) => {
                self.removed.extend(before.cloned());
                self.added.extend(now.cloned());
            }
        }
    }

    pub(super) fn of_places(&mut self, before: &Table, next: &Table) {
        if !Arc::ptr_eq(&before.known, &next.known) {
            self.known_added = next.known.difference(&before.known).copied().collect();
            self.known_removed = before.known.difference(&next.known).copied().collect();
        }
        self.places = before.vips != next.vips || before.networks != next.networks;
        let same = Arc::ptr_eq(&before.wiring, &next.wiring) || before.wiring == next.wiring;
        self.wiring = (!same).then(|| (before.wiring.clone(), next.wiring.clone()));
    }

    pub(super) fn sort(&mut self) {
        for routes in [&mut self.added, &mut self.removed, &mut self.updated] {
            routes.sort_by_key(|route| route.key);
        }
    }

    pub fn is_empty(&self) -> bool {
        let routes = [&self.added, &self.removed, &self.updated];
        routes.iter().all(|routes| routes.is_empty())
            && self.upstreams.is_empty()
            && self.known_added.is_empty()
            && self.known_removed.is_empty()
            && !self.places
            && self.wiring.is_none()
    }
}

fn same_upstream(one: &UpstreamInUse, other: &UpstreamInUse) -> bool {
    Arc::ptr_eq(&one.upstream, &other.upstream)
}
