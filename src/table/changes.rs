//! The differences between two tables.

use std::{net::IpAddr, sync::Arc};

use super::{Route, Table, Upstream, UpstreamInUse};
use crate::{discovery::Query, wiring::Wiring};

/// The differences between a table and the previous one. Lists of routes are sorted by key.
#[derive(Debug, Default)]
pub struct Changes {
    pub added: Vec<Arc<Route>>,
    pub removed: Vec<Arc<Route>>,
    /// Routes that continue, with a changed consumer name, balance or arrival interface.
    pub updated: Vec<Arc<Route>>,
    /// Answers that are new or have changed endpoints. Not sorted.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Addresses that became known as a container's, and addresses that no longer are. Sorted.
    pub known_added: Vec<IpAddr>,
    pub known_removed: Vec<IpAddr>,
    /// Routes that continue with another arrival interface: before, and now.
    pub moved: Vec<(Arc<Route>, Arc<Route>)>,
    /// Whether the VIPs or the networks changed.
    pub places: bool,
    /// How networks and addresses are connected to this host, before and now. `None` if it is the same.
    pub wiring: Option<(Arc<Wiring>, Arc<Wiring>)>,
}

impl Changes {
    /// The differences between any two tables: for a reader that missed the tables between them.
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

    /// Adds the difference in the answer to one query.
    pub(super) fn of_upstream(&mut self, before: &Table, next: &Table, query: &Query) {
        let (before, now) = (before.upstreams.get(query), next.upstreams.get(query));
        if let Some(now) = now
            && before.is_none_or(|before| !same_upstream(before, now))
        {
            self.upstreams.push(now.upstream.clone());
        }
    }

    /// Adds the difference in the route of one key.
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
